"""Decode attention for TPU: the cache is read once, and of each row only the slots that it has.

The step is bound by the bytes of the cache. A grid step takes a block of slots of some kv heads, or
several pages; blocks outside a row's slots are neither fetched nor computed. Codes of an int8 or int4
cache are widened on the chip; a key's scale is applied to its score and a value's to its weight, not
to their channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_blocks import FORBIDDEN, LANES, LOG2_E, div, dot

Array = jax.Array

_BLOCK_SLOTS = 512
_BLOCK_BYTES = 2 * 2**20  # Of keys and values in a grid step.
_MAX_PAGES = 8  # In a grid step.
_VMEM_BYTES = 64 * 2**20


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
  batch, heads, key_dim = query.shape
  _, kv_heads, slots, value_dim = values.shape
  group = heads // kv_heads
  slopes = jnp.zeros(heads) if alibi_slopes is None else alibi_slopes
  if page_table is None:
    parts, block = 1, min(_BLOCK_SLOTS, -(-slots // LANES) * LANES)
    blocks = -(-slots // block)
    padded = blocks * block - slots
    if padded:
      pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, padded)] + [(0, 0)] * (x.ndim - 3))
      keys, values = pad(keys), pad(values)
      key_scales = None if key_scales is None else pad(key_scales)
      value_scales = None if value_scales is None else pad(value_scales)
    page_table = jnp.zeros((1, 1), jnp.int32)

    def place(b, j, part, starts, lengths, table):
      return b, _within(j, starts[b], lengths[b], block)
  else:
    pages, block = page_table.shape[1], slots
    parts = min(_MAX_PAGES, max(1, _BLOCK_SLOTS // block), pages)
    blocks = -(-pages // parts)
    page_table = jnp.pad(page_table, ((0, 0), (0, blocks * parts - pages)))

    def place(b, j, part, starts, lengths, table):
      # Pages past the row's end would be fetched for nothing: take the last one again.
      page = _within(j, starts[b], lengths[b], parts * block) * parts + part
      last = div(jnp.maximum(lengths[b] - 1, 0), block)
      return table[b, jnp.minimum(page, last)], 0

  heads_at_once = _heads_at_once(kv_heads, parts * block, keys, values)

  def rows_of(part, four):
    def index(b, h, j, starts, lengths, table, slopes):
      row, slot_block = place(b, j, part, starts, lengths, table)
      return (row, h, slot_block, 0) if four else (row, h, 0, slot_block)

    return index

  specs, arrays = [], []
  whole_head = lambda b, h, j, *_: (b, h, 0, 0)
  specs.append(pl.BlockSpec((1, heads_at_once, group, key_dim), whole_head))
  arrays.append(query.reshape(batch, kv_heads, group, key_dim))
  for x, scales in ((keys, key_scales), (values, value_scales)):
    for part in range(parts):
      specs.append(pl.BlockSpec((1, heads_at_once, block, x.shape[3]), rows_of(part, True)))
      arrays.append(x)
    if scales is not None:
      for part in range(parts):
        specs.append(pl.BlockSpec((1, heads_at_once, 1, block), rows_of(part, False)))
        arrays.append(scales.astype(jnp.float32)[:, :, None])
  out, log_sum_exp = pl.pallas_call(
    functools.partial(
      _kernel,
      parts=parts,
      block=block,
      scaled=(key_scales is not None, value_scales is not None),
      alibi=alibi_slopes is not None,
      scale=scale,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(batch, kv_heads // heads_at_once, blocks),
      in_specs=specs,
      out_specs=[
        pl.BlockSpec((1, heads_at_once, group, value_dim), whole_head),
        pl.BlockSpec((1, heads_at_once, group, LANES), whole_head),
      ],
      scratch_shapes=[
        pltpu.VMEM((heads_at_once, group, LANES), jnp.float32),
        pltpu.VMEM((heads_at_once, group, LANES), jnp.float32),
        pltpu.VMEM((heads_at_once, group, value_dim), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((batch, kv_heads, group, value_dim), query.dtype),
      # Equal along the lanes: a number for each row of a register.
      jax.ShapeDtypeStruct((batch, kv_heads, group, LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    ),
    name="decode_attention",
  )(starts, lengths, page_table, slopes.astype(jnp.float32), *arrays)
  return out.reshape(batch, heads, value_dim), log_sum_exp[..., 0].reshape(batch, heads)


def _within(j, start, length, block: int):
  """The block to have on the chip in step j: one without slots of the row is not fetched."""
  first = div(jnp.maximum(start, 0), block)
  last = div(jnp.maximum(length - 1, 0), block)
  return jnp.clip(j, jnp.minimum(first, last), last)


def _heads_at_once(kv_heads: int, slots: int, *arrays: Array) -> int:
  of_a_slot = sum(-(-x.shape[3] // LANES) * LANES * x.dtype.itemsize for x in arrays)
  fits = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0)
  return max((n for n in fits if n * slots * of_a_slot <= _BLOCK_BYTES), default=1)


def _kernel(
  starts,
  lengths,
  table,
  slopes,
  query,
  *refs,
  parts: int,
  block: int,
  scaled: tuple[bool, bool],
  alibi: bool,
  scale: float,
):
  refs = list(refs)
  take = lambda there: [refs.pop(0) for _ in range(parts)] if there else None
  keys, key_scales = take(True), take(scaled[0])
  values, value_scales = take(True), take(scaled[1])
  out, log_sum_exp, largest, total, sums = refs
  b, h, j = (pl.program_id(axis) for axis in range(3))
  _, heads_at_once, group, _ = query.shape
  start, length, first = starts[b], lengths[b], j * parts * block
  # The parts of a head, one behind the other.
  of_head = lambda parts, head, axis: jnp.concatenate([x[0, head] for x in parts], axis=axis)

  @pl.when(j == 0)
  def _():
    largest[...] = jnp.full_like(largest, FORBIDDEN)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  @pl.when((first < length) & (first + parts * block > start))
  def _():
    slots = first + jax.lax.broadcasted_iota(jnp.int32, (1, parts * block), 1)
    allowed = (slots >= start) & (slots < length)
    distance = (slots - (length - 1)).astype(jnp.float32)
    for head in range(heads_at_once):
      q = query[0, head]
      scores = dot(q, _widened(of_head(keys, head, 0), q.dtype), (1, 1)) * (scale * LOG2_E)
      if key_scales is not None:
        scores = scores * of_head(key_scales, head, 1)
      if alibi:
        query_head = (h * heads_at_once + head) * group
        slope = jnp.concatenate([jnp.full((1, 1), slopes[query_head + g]) for g in range(group)])
        scores = scores + (slope * LOG2_E) * distance
      scores = jnp.where(allowed, scores, FORBIDDEN)
      before = largest[head, :, :1]
      now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
      weights = jnp.exp2(scores - now)
      correction = jnp.exp2(before - now)
      summed = correction * total[head, :, :1] + weights.sum(axis=1, keepdims=True)
      if value_scales is not None:
        weights = weights * of_head(value_scales, head, 1)
      v = _widened(of_head(values, head, 0), q.dtype)
      sums[head] = correction * sums[head] + dot(weights.astype(v.dtype), v, (1, 0))
      largest[head] = jnp.broadcast_to(now, largest.shape[1:])
      total[head] = jnp.broadcast_to(summed, total.shape[1:])

  @pl.when(j == pl.num_programs(2) - 1)
  def _():
    some = largest[:, :, :1] > FORBIDDEN / 2
    mean = jnp.where(some, sums[...] / jnp.where(some, total[:, :, :1], 1), 0)
    out[0] = mean.astype(out.dtype)
    of_row = (largest[...] + jnp.log2(total[...])) / LOG2_E
    log_sum_exp[0] = jnp.where(largest[...] > FORBIDDEN / 2, of_row, -jnp.inf)


def _widened(x: Array, dtype) -> Array:
  """Codes as numbers of `dtype`: exact, as they have 8 bits at most."""
  if not jnp.issubdtype(x.dtype, jnp.integer):
    return x.astype(dtype)
  return x.astype(jnp.float32).astype(dtype)
