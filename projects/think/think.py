"""ThinK: which channels of the key cache the last queries do not need.

Of one head with keys K [S, D], after rotary position embedding, and queries Q, a selection R
(diagonal, 0 or 1, trace T) is wanted that keeps the attention logits (equation 3):

    min over R of || Q K^T - (Q R) (K R)^T ||_F

Q K^T is the sum over channels j of the outer products q_j k_j^T, so that the norm of a channel's own
product says what dropping it costs at most (equation 4); the T largest stay:

    Score_j = || q_j k_j^T ||_F = ||q_j||_2 ||k_j||_2

Only the queries of an observation window enter, the last ones of the prompt. Here their squares are
averaged over the tokens that count, which ranks channels alike. All query heads that share a kv head
share its selection, and their squared norms are summed.

Every score takes (query [batch, heads, window, head_dim], keys [batch, kv_heads, slots, head_dim],
valid queries bool [batch, window], valid keys bool [batch, slots]) and returns the importance of each
channel, float32 [batch, kv_heads, head_dim]: a `ChannelScores` of `common.decoding.pruned_cache`.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def query_driven_scores(query: Array, keys: Array, valid_query: Array, valid: Array) -> Array:
  """ThinK's (equation 4, squared): sum over the group of mean q_j^2, times mean k_j^2."""
  batch, heads, window, head_dim = query.shape
  group = query.reshape(batch, keys.shape[1], heads // keys.shape[1], window, head_dim)
  energy = _mean_over_tokens(jnp.square(group.astype(jnp.float32)), valid_query[:, None, None])
  return energy.sum(axis=2) * _key_energy(keys, valid)


def l2_scores(query: Array, keys: Array, valid_query: Array, valid: Array) -> Array:
  """Baseline: the l2 norm of a channel of the keys, whatever the queries are."""
  del query, valid_query
  return _key_energy(keys, valid)


def l1_scores(query: Array, keys: Array, valid_query: Array, valid: Array) -> Array:
  """Baseline: the l1 norm of a channel of the keys."""
  del query, valid_query
  return _mean_over_tokens(jnp.abs(keys.astype(jnp.float32)), valid[:, None])


def value_scores(values: Array, output_kernel: Array, valid: Array) -> Array:
  """Channels of the values (appendix): Score_j = ||v_j|| ||W_O[j, :]||, squared.

  Args:
    values: [batch, kv_heads, slots, head_dim].
    output_kernel: [heads * head_dim, dim], the output projection's.
    valid: bool [batch, slots].
  """
  kv_heads, head_dim = values.shape[1], values.shape[3]
  rows = jnp.sum(jnp.square(output_kernel.astype(jnp.float32)), axis=1)
  rows = rows.reshape(kv_heads, -1, head_dim).sum(axis=1)
  return rows * _key_energy(values, valid)


def pruning_error(query: Array, keys: Array, kept: Array) -> Array:
  """The objective of equation 3, squared and relative: ||Q K^T - Q R K^T||_F^2 / ||Q K^T||_F^2.

  Channels i and j meet in (q_i . q_j) (k_i . k_j), so that with G the element-wise product of both
  Gram matrices and d the indicator of what is dropped, the numerator is d^T G d; the score above is
  its diagonal.

  Args:
    query: [..., queries, head_dim].
    keys: [..., slots, head_dim].
    kept: bool [..., head_dim].

  Returns:
    float32 [...]; 0 where all logits are.
  """
  dropped = 1.0 - kept.astype(jnp.float32)
  gram = channel_gram(query, keys)
  numerator = jnp.einsum("...i,...ij,...j->...", dropped, gram, dropped)
  total = jnp.sum(gram, axis=(-2, -1))
  return jnp.where(total > 0, jnp.maximum(numerator, 0.0) / jnp.where(total > 0, total, 1), 0.0)


def channel_gram(query: Array, keys: Array) -> Array:
  """(q_i . q_j) (k_i . k_j), float32 [..., head_dim, head_dim]."""
  gram = lambda x: jnp.einsum("...si,...sj->...ij", x, x, precision="highest")
  return gram(query.astype(jnp.float32)) * gram(keys.astype(jnp.float32))


def best_selection(gram: Array, selections: Array) -> tuple[Array, Array]:
  """The selection with the least d^T G d of those given (all of them: exhaustive search).

  Args:
    gram: of `channel_gram`, [head_dim, head_dim].
    selections: bool [candidates, head_dim].

  Returns:
    the selection, bool [head_dim], and its d^T G d.
  """
  dropped = 1.0 - selections.astype(jnp.float32)
  errors = jnp.einsum("ci,ij,cj->c", dropped, gram, dropped)
  best = jnp.argmin(errors)
  return selections[best], errors[best]


def kept_mask(scores: Array, kept: Array | int) -> Array:
  """The `kept` best channels as a mask, bool [..., head_dim]; `kept` may be traced."""
  ranks = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
  return ranks < kept


def _key_energy(keys: Array, valid: Array) -> Array:
  return _mean_over_tokens(jnp.square(keys.astype(jnp.float32)), valid[:, None])


def _mean_over_tokens(x: Array, valid: Array) -> Array:
  """Mean over the last axis but one where `valid`, bool [..., tokens]; 0 where nothing is."""
  total = jnp.sum(jnp.where(valid[..., None], x, 0.0), axis=-2)
  return total / jnp.maximum(jnp.sum(valid, axis=-1), 1)[..., None]
