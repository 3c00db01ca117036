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

from kernels.attention.tpu_blocks import FORBIDDEN, LANES, LOG2_E, dot

Array = jax.Array

_BLOCK_SLOTS = 512  # In a grid step.
_BLOCK_BYTES = 2 * 2**20  # Of keys and values, likewise.
_MAX_PAGES = 8  # Likewise.
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
  # A slot of codes has half the bytes, at most.
  at_once = _BLOCK_SLOTS if key_scales is None else 2 * _BLOCK_SLOTS
  paged = page_table is not None
  if not paged:
    parts, blocks = 1, pl.cdiv(slots, at_once)
    block = pl.cdiv(pl.cdiv(slots, blocks), LANES) * LANES
    padded = blocks * block - slots
    if padded:
      pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, padded)] + [(0, 0)] * (x.ndim - 3))
      keys, values = pad(keys), pad(values)
      key_scales = None if key_scales is None else pad(key_scales)
      value_scales = None if value_scales is None else pad(value_scales)
    fetched = _within(blocks, starts, lengths, block)
  else:
    pages, block = page_table.shape[1], slots
    parts = min(_MAX_PAGES, max(1, at_once // block), pages)
    blocks = pl.cdiv(pages, parts)
    steps = _within(blocks, starts, lengths, parts * block)
    fetched = (steps[:, :, None] * parts + jnp.arange(parts)).reshape(batch, -1)
    # Pages past the row's end would be fetched for nothing: take the last one again.
    last = jnp.maximum(lengths - 1, 0) // block
    fetched = jnp.minimum(fetched, last[:, None])
    fetched = jnp.take_along_axis(page_table, fetched, axis=1, mode="clip")

  heads_at_once = _heads_at_once(kv_heads, parts * block, keys, values)

  def rows_of(part, four):
    def index(b, h, j, starts, lengths, fetched, slopes):
      at = fetched[b, j * parts + part]
      row, slot_block = (at, 0) if paged else (b, at)
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
  )(starts, lengths, fetched.astype(jnp.int32), slopes.astype(jnp.float32), *arrays)
  return out.reshape(batch, heads, value_dim), log_sum_exp[..., 0].reshape(batch, heads)


def _within(blocks: int, starts: Array, lengths: Array, block: int) -> Array:
  """The block to have on the chip in each step, [batch, blocks]: one without slots is not fetched.

  Known before the kernel starts: for every operand it would be work of the scalar core in each step.
  """
  first = jnp.maximum(starts, 0) // block
  last = jnp.maximum(lengths - 1, 0) // block
  return jnp.clip(jnp.arange(blocks), jnp.minimum(first, last)[:, None], last[:, None])


def _heads_at_once(kv_heads: int, slots: int, *arrays: Array) -> int:
  of_a_slot = sum(-(-x.shape[3] // LANES) * LANES * x.dtype.itemsize for x in arrays)
  fits = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0)
  return max((n for n in fits if n * slots * of_a_slot <= _BLOCK_BYTES), default=1)


def _kernel(
  starts,
  lengths,
  fetched,
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
  of_head = lambda parts, head: jnp.concatenate([x[0, head] for x in parts], axis=0)
  of_all = lambda parts: jnp.concatenate([x[0] for x in parts], axis=2)

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
    each = range(heads_at_once)

    # One stage for all heads after the other: theirs do not wait for each other.
    def of_keys(head):
      q = query[0, head]
      return dot(q, _widened(of_head(keys, head), q.dtype), (1, 1))

    scores = jnp.stack([of_keys(head) for head in each]) * (scale * LOG2_E)
    if key_scales is not None:
      scores = scores * of_all(key_scales)
    if alibi:
      first_head = h * heads_at_once * group
      slope = lambda head, g: jnp.full((1, 1), slopes[first_head + head * group + g])
      of_heads = jnp.stack([jnp.concatenate([slope(n, g) for g in range(group)]) for n in each])
      scores = scores + (of_heads * LOG2_E) * distance
    scores = jnp.where(allowed, scores, FORBIDDEN)
    before = largest[:, :, :1]
    now = jnp.maximum(before, scores.max(axis=2, keepdims=True))
    weights = jnp.exp2(scores - now)
    correction = jnp.exp2(before - now)
    summed = correction * total[:, :, :1] + weights.sum(axis=2, keepdims=True)
    if value_scales is not None:
      weights = weights * of_all(value_scales)
    weights = weights.astype(query.dtype)
    of_values = lambda head: dot(
      weights[head], _widened(of_head(values, head), query.dtype), (1, 0)
    )
    sums[...] = correction * sums[...] + jnp.stack([of_values(head) for head in each])
    largest[...] = jnp.broadcast_to(now, largest.shape)
    total[...] = jnp.broadcast_to(summed, total.shape)

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
