"""Multi-head attention over arrays laid out [batch, heads, seq, head_dim].

With the heads before the tokens each head's keys are one matrix in memory: the products need no
transposed copy of a KV cache, which on the CPU costs more than they do. That is why this is not
`jax.nn.dot_product_attention`, whose tokens come first.
"""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def split_heads(x: Array, head_dim: int) -> Array:
  """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
  return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
  """[batch, heads, seq, head_dim] -> [batch, seq, heads * head_dim]."""
  x = x.swapaxes(1, 2)
  return x.reshape(*x.shape[:2], -1)


def dot_product_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  mask: Array,
  bias: Array | None = None,
  scale: float | None = None,
) -> Array:
  """softmax(scale * query key^T + bias) value (Vaswani et al. 2017, section 3.2.1).

  Scores and softmax are float32. A query that may attend to nothing gets the mean of the values:
  finite, and nobody's output.

  Args:
    query: [batch, heads, seq, head_dim].
    key, value: [batch, kv_heads, keys, head_dim]; consecutive query heads share one of them.
    mask: bool, broadcastable to [batch, heads, seq, keys]: True where the query may attend.
    bias: added to the scores, broadcastable likewise.
    scale: 1 / sqrt(head_dim) by default.

  Returns:
    [batch, heads, seq, head_dim], of query's dtype.
  """
  batch, heads, seq, head_dim = query.shape
  kv_heads, keys = key.shape[1:3]
  # The query heads of a group are rows of one product with the head that they share.
  grouped = query.reshape(batch, kv_heads, heads // kv_heads * seq, head_dim)
  scores = jnp.einsum("bkqd,bksd->bkqs", grouped, key, preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, heads, seq, keys)
  scores *= 1 / math.sqrt(head_dim) if scale is None else scale
  if bias is not None:
    scores += bias
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores).astype(value.dtype)
  weights = weights.reshape(batch, kv_heads, -1, keys)
  out = jnp.einsum("bkqs,bksd->bkqd", weights, value)
  return out.reshape(query.shape).astype(query.dtype)
