"""Decode attention over pages on TPU; see `mosaic_tpu`.

The pipeline of a grid reads one block of every operand ahead, and its bookkeeping for an operand takes as long
as some pages of codes. So the kernel itself starts the copies of the next step's pages, several of keys, values
and scales, and waits for those of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_blocks import LANES
from kernels.decode_attention.tpu_block import (
  VMEM_BYTES,
  Parts,
  Sums,
  attend,
  heads_at_once,
  slots_at_once,
)
from kernels.platform import tpu_chip

Array = jax.Array

_MAX_PAGES = 8  # In a step.


def decode_attention(
  query: Array,
  keys: Array,
  values: Array,
  starts: Array,
  lengths: Array,
  page_table: Array,
  key_scales: Array | None,
  value_scales: Array | None,
  alibi_slopes: Array | None,
  scale: float,
) -> tuple[Array, Array]:
  """As `mosaic_tpu.decode_attention`."""
  batch, num_heads, key_dim = query.shape
  _, kv_heads, page, value_dim = values.shape
  group, pages = num_heads // kv_heads, page_table.shape[1]
  parts = min(_MAX_PAGES, max(1, slots_at_once(keys) // page), pages)
  heads = heads_at_once(kv_heads, parts * page, keys, values)
  # The first and the last block of a row's slots, at least one, and its last page.
  last_slot = jnp.maximum(lengths - 1, 0)
  first = jnp.clip(starts, 0, last_slot)
  spans = jnp.stack([first // (parts * page), last_slot // (parts * page), last_slot // page])
  # Each of two cores copies for its own rows.
  cores = 2 if (info := tpu_chip()) and info.is_megacore and batch % 2 == 0 else 1
  rows = batch // cores

  whole_head = lambda core, row, h, j, *_: (core * rows + row, h, 0, 0)
  paged = [keys, values]
  if key_scales is not None:
    paged.append(key_scales.astype(jnp.float32)[:, :, None])
  if value_scales is not None:
    paged.append(value_scales.astype(jnp.float32)[:, :, None])
  slopes = jnp.zeros(num_heads) if alibi_slopes is None else alibi_slopes
  out, log_sum_exp = pl.pallas_call(
    functools.partial(
      _kernel,
      scaled=(key_scales is not None, value_scales is not None),
      alibi=alibi_slopes is not None,
      scale=scale,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(cores, rows, kv_heads // heads, pl.cdiv(pages, parts)),
      in_specs=[
        pl.BlockSpec((1, heads, group, key_dim), whole_head),
        *[pl.BlockSpec(memory_space=pl.ANY)] * len(paged),
      ],
      out_specs=[
        pl.BlockSpec((1, heads, group, value_dim), whole_head),
        pl.BlockSpec((1, heads, group, LANES), whole_head),
      ],
      scratch_shapes=[
        Sums.scratch(heads, group, value_dim),
        # Two steps' pages.
        [pltpu.VMEM((2, parts, heads, *x.shape[2:]), x.dtype) for x in paged],
        pltpu.SemaphoreType.DMA((2, len(paged))),
        pltpu.SMEM((1,), jnp.int32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((batch, kv_heads, group, value_dim), query.dtype),
      # Equal along the lanes: a number for each row of a register.
      jax.ShapeDtypeStruct((batch, kv_heads, group, LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    name="decode_attention_pages",
  )(
    starts,
    lengths,
    spans.astype(jnp.int32),
    page_table,
    slopes.astype(jnp.float32),
    query.reshape(batch, kv_heads, group, key_dim),
    *paged,
  )
  return out.reshape(batch, num_heads, value_dim), log_sum_exp[..., 0].reshape(batch, num_heads)


def _kernel(
  starts,
  lengths,
  spans,
  page_table,
  slopes,
  query,
  *refs,
  scaled: tuple[bool, bool],
  alibi: bool,
  scale: float,
):
  *paged, out, log_sum_exp, sums, buffers, semaphores, step = refs
  core, row, h, j = (pl.program_id(axis) for axis in range(4))
  rows, head_blocks = pl.num_programs(1), pl.num_programs(2)
  b = core * rows + row
  sums = Sums(*sums)
  _, parts, heads, page, _ = buffers[0].shape
  first, last = spans[0, b], spans[1, b]

  def copies(b, h, j, buffer):
    """Of the pages of a row's block; of those past the row's end the last one again."""
    for part in range(parts):
      at = page_table[b, jnp.minimum(j * parts + part, spans[2, b])]
      for n, (source, target) in enumerate(zip(paged, buffers)):
        yield pltpu.make_async_copy(
          source.at[at, pl.ds(h * heads, heads)],
          target.at[buffer, part],
          semaphores.at[buffer, n],
        )

  def start_copies(*block):
    for copy in copies(*block):
      copy.start()

  @pl.when((row == 0) & (h == 0) & (j == first))
  def _():
    step[0] = 0
    start_copies(b, h, j, 0)

  @pl.when(j == first)
  def _():
    sums.begin()

  @pl.when((first <= j) & (j <= last))
  def _():
    buffer = step[0] & 1
    step[0] += 1
    row_ends = j == last
    heads_end = row_ends & (h == head_blocks - 1)
    next_b = jnp.where(heads_end, jnp.minimum(b + 1, (core + 1) * rows - 1), b)
    next_h = jnp.where(heads_end, 0, h + row_ends.astype(jnp.int32))
    next_j = jnp.where(row_ends, spans[0, next_b], j + 1)

    @pl.when(~heads_end | (row < rows - 1))
    def _():
      start_copies(next_b, next_h, next_j, 1 - buffer)

    for n, target in enumerate(buffers):
      # As many bytes as all pages have.
      whole = target.at[buffer]
      pltpu.make_async_copy(whole, whole, semaphores.at[buffer, n]).wait()
    of_parts = [[target.at[buffer, part] for part in range(parts)] for target in buffers]
    keys, values, *scales = of_parts
    key_scales = scales.pop(0) if scaled[0] else []
    value_scales = scales.pop(0) if scaled[1] else []
    attend(
      sums,
      query,
      Parts(keys, values, key_scales, value_scales),
      j * parts * page,
      starts[b],
      lengths[b],
      slopes,
      h * heads * query.shape[2],
      alibi=alibi,
      scale=scale,
    )

  @pl.when(j == last)
  def _():
    sums.finish(out, log_sum_exp)
