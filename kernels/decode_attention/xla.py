"""Attention of one new token over a KV cache, for any platform: the readable reference."""

import jax
import jax.numpy as jnp

from kernels.attention.xla import masked_attention

Array = jax.Array


def decode_attention(
  query: Array,
  keys: Array,
  values: Array,
  starts: Array,
  lengths: Array,
  *,
  page_table: Array | None,
  key_scales: Array | None,
  value_scales: Array | None,
  alibi_slopes: Array | None,
  scale: float,
) -> tuple[Array, Array]:
  """As `api.decode_attention`, with the sliding window within `starts`; also the log-sum-exp."""
  keys = _dequantized(keys, key_scales, query.dtype)
  values = _dequantized(values, value_scales, query.dtype)
  if page_table is not None:
    keys, values = _rows(keys, page_table), _rows(values, page_table)
  slots = jnp.arange(keys.shape[2])
  allowed = (slots >= starts[:, None]) & (slots < lengths[:, None])
  bias = None
  if alibi_slopes is not None:
    distance = slots - (lengths[:, None] - 1)
    bias = alibi_slopes[:, None, None] * distance[:, None, None]
  out = masked_attention(query[:, :, None], keys, values, allowed[:, None, None], bias, scale)
  return out[:, :, 0], _log_sum_exp(query, keys, allowed, bias, scale)


def _log_sum_exp(query: Array, keys: Array, allowed: Array, bias: Array | None, scale) -> Array:
  """Of the allowed scores, float32 [batch, heads]. allowed: bool [batch, slots]."""
  batch, heads, _ = query.shape
  kv_heads, slots = keys.shape[1:3]
  scores = jnp.einsum(
    "bkgd,bksd->bkgs",
    query.reshape(batch, kv_heads, heads // kv_heads, -1),
    keys,
    precision="highest" if query.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  scores = scores.reshape(batch, heads, slots) * scale
  if bias is not None:
    scores += bias[:, :, 0]
  return jax.nn.logsumexp(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)


def _dequantized(x: Array, scales: Array | None, dtype) -> Array:
  if scales is None:
    return x.astype(dtype)
  return (x.astype(jnp.float32) * scales[..., None]).astype(dtype)


def _rows(pages: Array, page_table: Array) -> Array:
  """[num_pages, heads, page_size, channels] -> [batch, heads, slots, channels]."""
  rows = pages[page_table].swapaxes(1, 2)
  return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
