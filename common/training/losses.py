"""Losses as (sum, count) pairs, which add up over microbatches and devices."""

import jax
import jax.numpy as jnp
import optax


def next_token_loss(
  logits: jax.Array, tokens: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of every token given those before it in its document.

    sum over targets of  logsumexp(logits[t]) - logits[t, tokens[t + 1]]

  Position t has a target where t and t + 1 lie in one document: the first token of a document
  and padding are never targets.

  Args:
    logits: [batch, seq, vocab], any float; the arithmetic is float32.
    tokens: [batch, seq] int32.
    segment_ids: [batch, seq] int32, the document of each token in a packed row; 0 is padding.

  Returns:
    (sum of the negative log-likelihoods in nats, number of targets), both float32 [].
  """
  is_target = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
  nll = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
  )
  return jnp.sum(nll, where=is_target), jnp.sum(is_target, dtype=jnp.float32)
