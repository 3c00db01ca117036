"""Which tokens of a prompt a KV cache keeps: SnapKV and H2O.

Both score the prompt's tokens by the attention that they get from its queries and keep the best of
them, besides the last ones (the window). Queries and keys are those of the attention's product:
rotated, where the model rotates.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

# (query, keys, valid, window) -> scores, see `snapkv_scores`.
Eviction = Callable[[Array, Array, Array, int], Array]


def snapkv_scores(
  query: Array,
  keys: Array,
  valid: Array,
  window: int,
  *,
  pooling: Literal["max", "avg"] = "max",
  kernel: int = 7,
) -> Array:
  """Attention from the window's queries, pooled over neighbouring positions (Li et al. 2024).

  Args:
    query: [batch, heads, seq, head_dim] of the prompt.
    keys: [batch, kv_heads, seq, head_dim].
    valid: bool [batch, seq], False for padding.
    window: the queries that count, the last ones; their own tokens are always kept.
    pooling, kernel: over positions, as in the official scripts.

  Returns:
    float32 [batch, kv_heads, seq - window], summed over the query heads that share a kv head.
  """
  scores = _attention_sums(query[:, :, -window:], keys, valid, window)
  # As torch pools with this padding and a stride of 1.
  padding = (0, 0), (0, 0), ((kernel - 1) // 2, kernel // 2)
  pool = lambda start, combine: jax.lax.reduce_window(
    scores, start, combine, (1, 1, kernel), (1, 1, 1), padding
  )
  return pool(-jnp.inf, jax.lax.max) if pooling == "max" else pool(0.0, jax.lax.add) / kernel


def h2o_scores(query: Array, keys: Array, valid: Array, window: int) -> Array:
  """Attention from all queries of the prompt (heavy hitters, Zhang et al. 2023); as `snapkv_scores`."""
  return _attention_sums(query, keys, valid, window)


def keep_slots_of(scores: Array, valid: Array, capacity: int, window: int) -> Array:
  """The slots to keep: the `capacity` - `window` best and the window.

  Args:
    scores: [batch, kv_heads, seq - window].
    valid: bool [batch, seq]. Padding, on the left, is kept only where there are too few tokens.
    capacity: slots to keep, at least `window` and at most seq.
    window: at the end, always kept.

  Returns:
    int32 [batch, kv_heads, capacity], ascending: padding stays before the tokens.

  Raises:
    ValueError: the capacity does not fit.
  """
  seq = valid.shape[1]
  if not window <= capacity <= seq:
    raise ValueError(
      f"capacity={capacity} must be from the window's {window} to the prompt's {seq}"
    )
  batch, kv_heads, earlier = scores.shape
  scores = jnp.where(valid[:, None, :earlier], scores, -jnp.inf)
  best = jax.lax.top_k(scores, capacity - window)[1]
  last = jnp.broadcast_to(jnp.arange(earlier, seq), (batch, kv_heads, window))
  return jnp.concatenate([jnp.sort(best, axis=-1), last], axis=-1).astype(jnp.int32)


def take_slots(x: Array, slots: Array) -> Array:
  """Keys or values [batch, kv_heads, seq, channels] of int32 [batch, kv_heads, kept] slots."""
  return jnp.take_along_axis(x, slots[..., None], axis=2)


def _attention_sums(query, keys, valid, window: int) -> Array:
  """Attention probabilities summed over queries, float32 [batch, kv_heads, seq - window]."""
  batch, heads, queries, head_dim = query.shape
  kv_heads, seq = keys.shape[1:3]
  grouped = query.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
  logits = jnp.einsum("bkgqd,bksd->bkgqs", grouped, keys, preferred_element_type=jnp.float32)
  logits = logits / math.sqrt(head_dim)
  causal = jnp.arange(seq) <= jnp.arange(seq - queries, seq)[:, None]
  allowed = causal & valid[:, None]
  weights = jax.nn.softmax(jnp.where(allowed[:, None, None], logits, -jnp.inf), axis=-1)
  # Queries of padding count for nothing.
  counts = valid[:, None, None, seq - queries :, None]
  return jnp.sum(jnp.where(counts, weights, 0.0)[..., : seq - window], axis=(2, 3))
