"""Attention of one new token over a KV cache: the one public function."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.decode_attention import mosaic_gpu, mosaic_tpu, xla
from kernels.partitioning import batch_axes, on_parts, tensor_axes
from kernels.platform import has_tpu

Array = jax.Array

CACHE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4)
_IMPLEMENTATIONS = {"xla": xla, "mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}


def decode_attention(
  query: Array,
  keys: Array,
  values: Array,
  lengths: Array,
  *,
  starts: Array | None = None,
  page_table: Array | None = None,
  key_scales: Array | None = None,
  value_scales: Array | None = None,
  sliding_window: int | None = None,
  alibi_slopes: Array | None = None,
  scale: float | None = None,
  return_log_sum_exp: bool = False,
  implementation: Literal["xla", "mosaic_tpu", "mosaic_gpu"] | None = None,
) -> Array | tuple[Array, Array]:
  """softmax(scale query key^T) value over slots starts ... lengths - 1 of each row's cache.

  The query stands at the last of these slots. A row without any gives zeros.

  Args:
    query: [batch, heads, key_dim], float32 or bfloat16.
    keys: [batch, kv_heads, slots, key_dim]; consecutive query heads share one kv head. Keys with
      fewer channels (ThinK) need a query with the same channels left, and the `scale` of all.
    values: [batch, kv_heads, slots, value_dim].
    lengths: int32 [batch], the end of each row's tokens; at most `slots`.
    starts: int32 [batch], the first slot that is no (left) padding; by default 0.
    page_table: int32 [batch, pages]. With it keys and values are [num_pages, kv_heads, page_size,
      channels] for all rows, and slot j of row b is slot j % page_size of page
      page_table[b, j // page_size]. Entries beyond a row's length are not read, but must be pages.
    key_scales, value_scales: of an int8 or int4 cache, shaped like keys and values without the
      channels: a stored code stands for code * scale.
    sliding_window: slots that the query sees, its own included.
    alibi_slopes: [heads]; slope * (slot - the query's slot) is added to the scores.
    scale: 1 / sqrt(key_dim) by default.
    return_log_sum_exp: whether to return a second array, with which the results over the parts of
      a cache, each of its own call, are joined exactly: the average with weights exp(log_sum_exp).
    implementation: "xla" for any platform; "mosaic_tpu" and, for Hopper GPUs, "mosaic_gpu", which
      read the slots of each row only; None picks the best that supports the arguments: mosaic_tpu on
      one TPU, or on a mesh of them (`jax.set_mesh`), which then cuts batch and heads, pages by heads
      only (`kernels/partitioning.py`). mosaic_gpu, which has not run on a GPU yet, has to be named.

  Returns:
    [batch, heads, value_dim] in query's dtype; scores and softmax are float32. With
    `return_log_sum_exp` also log(sum(exp(scores))), float32 [batch, heads], which is -inf in a row
    without slots.

  Raises:
    ValueError: shapes or types that do not belong together, or what the named implementation lacks.
  """
  if implementation is not None and implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"implementation {implementation!r} is not supported; supported: {', '.join(_IMPLEMENTATIONS)}"
    )
  _check(query, keys, values, page_table, key_scales, value_scales)
  batch, heads, key_dim = query.shape
  for name, x, shape in (
    ("lengths", lengths, (batch,)),
    ("starts", starts, (batch,)),
    ("alibi_slopes", alibi_slopes, (heads,)),
  ):
    if x is not None and x.shape != shape:
      raise ValueError(f"{name} have shape {x.shape}, expected {shape}")
  if sliding_window is not None and sliding_window < 1:
    raise ValueError(f"sliding_window={sliding_window} must be positive")
  starts = jnp.zeros_like(lengths) if starts is None else starts
  if sliding_window is not None:
    starts = jnp.maximum(starts, lengths - sliding_window)
  problems = {
    "mosaic_tpu": mosaic_tpu.unsupported(query, keys, values, page_table),
    "mosaic_gpu": mosaic_gpu.unsupported(query, keys, values, page_table),
  }
  if problem := problems.get(implementation):
    raise ValueError(
      f"{implementation} does not support {problem}; implementation=None or 'xla' does"
    )
  if implementation is None and not problems["mosaic_tpu"] and has_tpu():
    implementation = "mosaic_tpu"
  chosen = _IMPLEMENTATIONS[implementation or "xla"]
  scale = 1 / math.sqrt(key_dim) if scale is None else scale
  function = lambda arrays: chosen.decode_attention(**arrays, scale=scale)
  if implementation == "mosaic_tpu":
    rows, of_heads = batch_axes(batch), tensor_axes(heads, keys.shape[1])
    of_row, of_head = PartitionSpec(rows), PartitionSpec(rows, of_heads)
    # Any row may have any page.
    cache = of_head if page_table is None else PartitionSpec(None, of_heads)
    specs = {
      "query": of_head,
      "keys": cache,
      "values": cache,
      "starts": of_row,
      "lengths": of_row,
      "page_table": of_row,
      "key_scales": cache,
      "value_scales": cache,
      "alibi_slopes": PartitionSpec(of_heads),
    }
    function = on_parts(function, (specs,), of_head)
  out, log_sum_exp = function(
    {
      "query": query,
      "keys": keys,
      "values": values,
      "starts": starts.astype(jnp.int32),
      "lengths": lengths.astype(jnp.int32),
      "page_table": page_table,
      "key_scales": key_scales,
      "value_scales": value_scales,
      "alibi_slopes": alibi_slopes,
    }
  )
  return (out, log_sum_exp) if return_log_sum_exp else out


def quantize_tokens(x: Array, dtype) -> tuple[Array, Array]:
  """Codes and scales of keys or values, symmetric, one scale for each token and head.

  Args:
    x: [..., channels].
    dtype: jnp.int8 or jnp.int4.

  Returns:
    codes of `dtype` [..., channels] and float32 scales [...]; code * scale is x to half a scale.
  """
  x = x.astype(jnp.float32)
  largest = jnp.iinfo(dtype).max
  scales = jnp.max(jnp.abs(x), axis=-1) / largest
  codes = jnp.round(x / jnp.where(scales == 0, 1, scales)[..., None])
  # Rounding of the quotient may exceed the largest code by one.
  return jnp.clip(codes, -largest, largest).astype(dtype), scales


def _check(query, keys, values, page_table, key_scales, value_scales) -> None:
  if query.ndim != 3 or keys.ndim != 4 or values.ndim != 4 or 0 in (*keys.shape, *values.shape):
    raise ValueError(
      f"expected query [batch, heads, channels], keys and values [batch, heads, slots, channels], "
      f"got {query.shape}, {keys.shape}, {values.shape}"
    )
  if keys.shape[:3] != values.shape[:3]:
    raise ValueError(f"keys {keys.shape} and values {values.shape} do not match")
  if query.shape[2] != keys.shape[3] or query.shape[1] % keys.shape[1]:
    raise ValueError(
      f"query {query.shape} needs as many channels as keys {keys.shape}, and a multiple of its heads"
    )
  if page_table is None and keys.shape[0] != query.shape[0]:
    raise ValueError(f"query {query.shape} and keys {keys.shape} have different batches")
  if page_table is not None and (page_table.ndim != 2 or len(page_table) != len(query)):
    raise ValueError(
      f"page_table has shape {page_table.shape}, expected [{query.shape[0]}, pages of a row]"
    )
  if query.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"query is {query.dtype}, expected float32 or bfloat16")
  for name, x, scales in (("keys", keys, key_scales), ("values", values, value_scales)):
    if x.dtype not in CACHE_DTYPES:
      raise ValueError(f"{name} are {x.dtype}, expected float32, bfloat16, int8 or int4")
    if jnp.issubdtype(x.dtype, jnp.integer) != (scales is not None):
      raise ValueError(f"{name} of {x.dtype} {'need' if scales is None else 'have no'} scales")
    if scales is not None and scales.shape != x.shape[:3]:
      raise ValueError(f"scales of {name} have shape {scales.shape}, expected {x.shape[:3]}")
