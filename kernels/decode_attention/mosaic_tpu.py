"""Decode attention for TPU: the cache is read once, and of each row only the slots that it has.

The step is bound by the bytes of the cache. A grid step takes a block of slots of some kv heads, or
several pages (`tpu_pages`); blocks outside a row's slots are neither fetched nor computed. Codes of an
int8 or int4 cache are widened on the chip; a key's scale is applied to its score and a value's to its
weight, not to their channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_blocks import LANES
from kernels.decode_attention import tpu_pages
from kernels.decode_attention.tpu_block import (
  VMEM_BYTES,
  Parts,
  Sums,
  attend,
  heads_at_once,
  slots_at_once,
)

Array = jax.Array


def unsupported(query: Array, keys: Array, values: Array, page_table: Array | None) -> str | None:
  """Why these arguments of `api.decode_attention` have no kernel here, or None."""
  if max(keys.shape[3], values.shape[3]) > 512:
    return f"heads of {max(keys.shape[3], values.shape[3])} channels, expected at most 512"
  size = keys.shape[2]
  if page_table is not None and size % 32:
    return f"pages of {size} slots, expected a multiple of 32"
  return None


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
  if page_table is not None:
    return tpu_pages.decode_attention(
      query,
      keys,
      values,
      starts,
      lengths,
      page_table,
      key_scales,
      value_scales,
      alibi_slopes,
      scale,
    )
  batch, num_heads, key_dim = query.shape
  _, kv_heads, slots, value_dim = values.shape
  group = num_heads // kv_heads
  blocks = pl.cdiv(slots, slots_at_once(keys))
  block = pl.cdiv(pl.cdiv(slots, blocks), LANES) * LANES
  padded = blocks * block - slots
  heads = heads_at_once(kv_heads, block, keys, values)

  def pad(x):
    return jnp.pad(x, [(0, 0), (0, 0), (0, padded)] + [(0, 0)] * (x.ndim - 3)) if padded else x

  def of_slots(x):
    return pl.BlockSpec(
      (1, heads, block, x.shape[3]), lambda b, h, j, starts, lengths, at, *_: (b, h, at[b, j], 0)
    )

  of_scales = pl.BlockSpec(
    (1, heads, 1, block), lambda b, h, j, starts, lengths, at, *_: (b, h, 0, at[b, j])
  )
  scales = [
    None if x is None else pad(x.astype(jnp.float32))[:, :, None]
    for x in (key_scales, value_scales)
  ]
  whole_head = lambda b, h, j, *_: (b, h, 0, 0)
  slopes = jnp.zeros(num_heads) if alibi_slopes is None else alibi_slopes
  out, log_sum_exp = pl.pallas_call(
    functools.partial(_kernel, alibi=alibi_slopes is not None, scale=scale),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(batch, kv_heads // heads, blocks),
      in_specs=[
        pl.BlockSpec((1, heads, group, key_dim), whole_head),
        of_slots(keys),
        of_slots(values),
        *(None if x is None else of_scales for x in scales),
      ],
      out_specs=[
        pl.BlockSpec((1, heads, group, value_dim), whole_head),
        pl.BlockSpec((1, heads, group, LANES), whole_head),
      ],
      scratch_shapes=[Sums.scratch(heads, group, value_dim)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((batch, kv_heads, group, value_dim), query.dtype),
      # Equal along the lanes: a number for each row of a register.
      jax.ShapeDtypeStruct((batch, kv_heads, group, LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    name="decode_attention",
  )(
    starts,
    lengths,
    _within(blocks, starts, lengths, block).astype(jnp.int32),
    slopes.astype(jnp.float32),
    query.reshape(batch, kv_heads, group, key_dim),
    pad(keys),
    pad(values),
    *scales,
  )
  return out.reshape(batch, num_heads, value_dim), log_sum_exp[..., 0].reshape(batch, num_heads)


def _within(blocks: int, starts: Array, lengths: Array, block: int) -> Array:
  """The block to have on the chip in each step, [batch, blocks]: one without slots is not fetched.

  Known before the kernel starts: for every operand it would be work of the scalar core in each step.
  """
  first = jnp.maximum(starts, 0) // block
  last = jnp.maximum(lengths - 1, 0) // block
  return jnp.clip(jnp.arange(blocks), jnp.minimum(first, last)[:, None], last[:, None])


def _kernel(
  starts,
  lengths,
  fetched,
  slopes,
  query,
  keys,
  values,
  key_scales,
  value_scales,
  out,
  log_sum_exp,
  sums,
  *,
  alibi: bool,
  scale: float,
):
  b, h, j = (pl.program_id(axis) for axis in range(3))
  sums = Sums(*sums)
  _, heads, block, _ = keys.shape
  start, length, first = starts[b], lengths[b], j * block
  parts = Parts(*([] if x is None else [x.at[0]] for x in (keys, values, key_scales, value_scales)))

  @pl.when(j == 0)
  def _():
    sums.begin()

  @pl.when((first < length) & (first + block > start))
  def _():
    first_head = h * heads * query.shape[2]
    attend(sums, query, parts, first, start, length, slopes, first_head, alibi=alibi, scale=scale)

  @pl.when(j == pl.num_programs(2) - 1)
  def _():
    sums.finish(out, log_sum_exp)
