"""FlashAttention-2 (Dao 2023) for TPU: exact attention whose scores never leave the chip.

Scores are made and used block by block: the softmax of a row is corrected as larger scores turn up
(forward), and is made again from the row's log-sum-exp (backward, once for all three gradients).
Blocks of queries and keys that do not meet, because of causality, the sliding window or packed
segments, are neither read nor computed: every block of queries has a range of key blocks, known
before the kernel starts.

Scores are transposed, [keys, queries]: the numbers of a query (the largest score, the sum, the
log-sum-exp) then lie along the lanes, a few registers instead of one for every eight queries, and
reductions over keys are sums of registers, not sums within them.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.attention import xla
from kernels.attention.masks import Rule, Tokens
from kernels.attention.tpu_backward import backward
from kernels.attention.tpu_blocks import LANES, Settings, resident_tokens
from kernels.attention.tpu_forward import forward
from kernels.platform import tpu_chip

Array = jax.Array

_BLOCK = 512  # Queries, and keys, of one block of scores, at most.
# Bytes of a token of a head. With more, two blocks of keys are on the chip at once, and with twice as
# many blocks are half as large: backward a TPU v4 has 16 MiB for all.
_WIDE_BYTES = 256
_RESIDENT_WITH_BIAS = 1024  # Keys.


def unsupported(query: Array, key: Array, value: Array) -> str | None:
  """Why these arguments of `api.attention` have no kernel here, or None."""
  for name, x in (("query", query), ("key", key), ("value", value)):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name} of {x.dtype}, expected bfloat16 or float32"
    if x.shape[-1] > 512:
      return f"{name} with heads of {x.shape[-1]}, expected at most 512"
  return None


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
  """As `api.attention`, for arguments that `unsupported` has nothing against."""
  seq, count = query.shape[2], key.shape[2]
  alibi = alibi_slopes is not None
  widest = max(x.shape[3] * x.dtype.itemsize for x in (query, key, value))
  most = _BLOCK if widest <= 2 * _WIDE_BYTES else _BLOCK // 2
  query_block, key_block = _block_size(seq, most), _block_size(count, most)
  limit = count if widest <= _WIDE_BYTES else 2 * key_block
  if bias is not None:
    limit = min(limit, _RESIDENT_WITH_BIAS)
  resident = resident_tokens(key_block, limit, key, value)
  settings = Settings(rule, scale, alibi, query_block, key_block, resident, products_are_fast())
  slopes = alibi_slopes if alibi else jnp.zeros(query.shape[1])
  # Padding belongs to segment 0: no query sees it, and it sees no key.
  pad_queries = functools.partial(_pad, multiple=settings.query_block)
  pad_keys = functools.partial(_pad, multiple=resident)
  whole = lambda tokens: Tokens(*(jnp.broadcast_to(x, (len(query), x.shape[1])) for x in tokens))
  queries, keys = whole(queries), whole(keys)
  query = pad_queries(query, axis=2)
  key, value = pad_keys(key, axis=2), pad_keys(value, axis=2)
  queries = Tokens(*(pad_queries(x, axis=1) for x in queries))
  keys = Tokens(*(pad_keys(x, axis=1) for x in keys))
  if bias is not None:
    shape = (*jnp.broadcast_shapes(bias.shape, (1,) * 4)[:2], seq, count)
    bias = jnp.broadcast_to(bias.astype(jnp.float32), shape)
    bias = pad_keys(pad_queries(bias, axis=2), axis=3)
  out = _attention(query, key, value, queries, keys, slopes.astype(jnp.float32), bias, settings)
  return out[:, :, :seq]


def products_are_fast() -> bool:
  """Whether the softmax takes the chip longer than the products, which must not hold it up then."""
  info = tpu_chip()
  return info is not None and info.generation >= 6


def _block_size(tokens: int, most: int) -> int:
  return min(most, -(-tokens // LANES) * LANES)


def _pad(x: Array, *, multiple: int, axis: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(query, key, value, queries, keys, slopes, bias, settings: Settings) -> Array:
  return forward(query, key, value, queries, keys, slopes, bias, settings)[0]


def _attention_forward(query, key, value, queries, keys, slopes, bias, settings: Settings):
  out, lse = forward(query, key, value, queries, keys, slopes, bias, settings)
  return out, (query, key, value, queries, keys, slopes, bias, out, lse)


def _attention_backward(settings: Settings, residuals, d_out):
  query, key, value, queries, keys, slopes, bias, out, lse = residuals
  if bias is None:
    arrays = (query, key, value, queries, keys, slopes, lse, _delta(out, d_out), d_out)
    d_query, d_key, d_value = backward(*arrays, settings)
    # Slopes are constants of the architecture.
    return d_query, d_key, d_value, None, None, jnp.zeros_like(slopes), None

  # The gradient of a bias has the size of the scores: the reference keeps them too.
  def reference(query, key, value, slopes, bias):
    return xla.attention(
      query,
      key,
      value,
      queries,
      keys,
      settings.rule,
      alibi_slopes=slopes,
      bias=bias,
      scale=settings.scale,
    )

  *gradients, d_slopes, d_bias = jax.vjp(reference, query, key, value, slopes, bias)[1](d_out)
  return *gradients, None, None, d_slopes, d_bias


_attention.defvjp(_attention_forward, _attention_backward)


def _delta(out: Array, d_out: Array) -> Array:
  """sum over the head's channels of out * d_out, float32 [batch, heads, 1, seq]."""
  product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
  return jnp.sum(product, axis=-1)[:, :, None]
