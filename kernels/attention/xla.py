"""Attention for any platform: the readable reference."""

import jax
import jax.numpy as jnp

from kernels.attention.masks import Rule, Tokens, may_attend

Array = jax.Array


def attention(
  query: Array,
  key: Array,
  value: Array,
  queries: Tokens,
  keys: Tokens,
  rule: Rule,
  *,
  alibi_slopes: Array | None,
  bias: Array | None,
  scale: float,
) -> Array:
  """As `api.attention`, with every argument filled in."""
  column = lambda tokens: Tokens(*(x[:, None, :, None] for x in tokens))
  row = lambda tokens: Tokens(*(x[:, None, None, :] for x in tokens))
  allowed = may_attend(column(queries), row(keys), rule)
  if alibi_slopes is not None:
    distance = column(queries).positions - row(keys).positions
    slopes = alibi_slopes[:, None, None] * distance
    bias = -slopes if bias is None else bias - slopes
  return masked_attention(query, key, value, allowed, bias, scale)


def masked_attention(
  query: Array, key: Array, value: Array, allowed: Array, bias: Array | None, scale: float
) -> Array:
  """softmax(scale query key^T + bias) value over the allowed keys; zeros where there are none.

  Args:
    query: [batch, heads, seq, key_dim].
    key: [batch, kv_heads, keys, key_dim].
    value: [batch, kv_heads, keys, value_dim].
    allowed: bool, broadcastable to [batch, heads, seq, keys].
    bias: broadcastable likewise, -inf to forbid; or None.
    scale: of the scores.

  Returns:
    [batch, heads, seq, value_dim] in query's dtype; scores and softmax are float32.
  """
  batch, heads, seq, _ = query.shape
  kv_heads, keys = key.shape[1:3]
  # The query heads of a group are rows of one product with the head that they share.
  grouped = query.reshape(batch, kv_heads, heads // kv_heads * seq, -1)
  precision = "highest" if query.dtype == jnp.float32 else None
  product = lambda equation, *operands: jnp.einsum(
    equation, *operands, precision=precision, preferred_element_type=jnp.float32
  )
  scores = product("bkqd,bksd->bkqs", grouped, key).reshape(batch, heads, seq, keys) * scale
  if bias is not None:
    scores += bias
    allowed = allowed & (bias > -jnp.inf)
  lowest = jnp.finfo(jnp.float32).min
  weights = jax.nn.softmax(jnp.where(allowed, scores, lowest)).astype(value.dtype)
  out = product("bkqs,bksd->bkqd", weights.reshape(batch, kv_heads, -1, keys), value)
  out = out.reshape(batch, heads, seq, -1)
  # Where nothing is allowed all weights are equal, not 0.
  return jnp.where(allowed.any(axis=-1, keepdims=True), out, 0).astype(query.dtype)
