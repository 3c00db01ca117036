"""The forward kernel of `mosaic_tpu`."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_blocks import (
  FORBIDDEN,
  LOG2_E,
  Settings,
  as_columns,
  as_rows,
  compiler_parameters,
  cost_estimate,
  div,
  dot,
  ids,
  key_ids,
  needed_part,
  ranges_of,
  scores_of,
  visit,
)

Array = jax.Array

_CHUNK = 256  # Keys.


def forward(query, key, value, queries, keys, slopes, bias, settings: Settings):
  """out [batch, heads, seq, value_dim] and the rows' log-sum-exp, float32 [batch, heads, 1, seq]."""
  batch, heads, seq, key_dim = query.shape
  kv_heads, count, value_dim = value.shape[1:]
  group, block, resident = heads // kv_heads, settings.query_block, settings.resident

  def needed(b, i, part, ranges):
    blocks = resident // settings.key_block
    return needed_part(ranges, (b, i), part, blocks) if count > resident else 0

  def of_queries(b, h, i, part, *_):
    return b, h, i, 0

  def numbers(b, h, i, part, *_):
    return b, h, 0, i

  def of_keys(b, h, i, part, ranges, *_):
    return b, div(h, group), needed(b, i, part, ranges), 0

  def ids_of_keys(b, h, i, part, ranges, *_):
    return b, 0, needed(b, i, part, ranges)

  arrays = [query, key, value, ids(queries), key_ids(keys)]
  specs = [
    pl.BlockSpec((1, 1, block, key_dim), of_queries),
    pl.BlockSpec((1, 1, resident, key_dim), of_keys),
    pl.BlockSpec((1, 1, resident, value_dim), of_keys),
    pl.BlockSpec((1, 2, block), lambda b, h, i, part, *_: (b, 0, i)),
    pl.BlockSpec((1, 2, resident), ids_of_keys),
  ]
  if bias is not None:

    def of_bias(b, h, i, part, ranges, *_):
      row, head = (b if bias.shape[0] > 1 else 0), (h if bias.shape[1] > 1 else 0)
      return row, head, needed(b, i, part, ranges), i

    specs.append(pl.BlockSpec((1, 1, resident, block), of_bias))
    arrays.append(bias.mT)
  return pl.pallas_call(
    functools.partial(_forward_kernel, settings=settings, has_bias=bias is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, heads, seq // block, count // resident),
      in_specs=specs,
      out_specs=[
        pl.BlockSpec((1, 1, block, value_dim), of_queries),
        pl.BlockSpec((1, 1, 1, block), numbers),
      ],
      scratch_shapes=[
        pltpu.VMEM((1, block), jnp.float32),
        pltpu.VMEM((1, block), jnp.float32),
        pltpu.VMEM((value_dim, block), jnp.float32),
        pltpu.VMEM((_chunk(settings), block), jnp.float32) if settings.pipelined else None,
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((batch, heads, seq, value_dim), query.dtype),
      jax.ShapeDtypeStruct((batch, heads, 1, seq), jnp.float32),
    ],
    cost_estimate=cost_estimate(key_dim + value_dim, query, count, *arrays, query),
    compiler_params=compiler_parameters(3, 1),
    name="attention_forward",
  )(ranges_of(queries, keys, settings), slopes, *arrays)


def _chunk(settings: Settings) -> int:
  """Keys that are worked on at once."""
  return math.gcd(settings.key_block, _CHUNK)


def _forward_kernel(ranges, slopes, *refs, settings: Settings, has_bias: bool):
  query, key, value, query_ids, all_keys, *rest = refs
  bias, (out, lse, largest, total, sums, products) = (
    (rest[0], rest[1:]) if has_bias else (None, rest)
  )
  b, h, i, part = (pl.program_id(axis) for axis in range(4))
  block, chunk, pipelined = settings.key_block, _chunk(settings), settings.pipelined

  @pl.when(part == 0)
  def _():
    largest[...] = jnp.full_like(largest, FORBIDDEN)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  queries = as_rows(query_ids)

  rows_at = lambda j, start: pl.ds(pl.multiple_of(j * block + start, chunk), chunk)
  product = lambda rows: dot(key[0, 0, rows, :], query[0, 0], (1, 1))

  def first(j):
    products[...] = product(rows_at(j, 0))

  def attend(blocks, masked, following):
    chunks = [
      (rows_at(j, start), needs_mask)
      for j, needs_mask in zip(blocks, masked)
      for start in range(0, block, chunk)
    ]
    of_chunk = products[...] if pipelined else product(chunks[0][0])
    ahead = [rows for rows, _ in chunks[1:]] + [rows_at(following, 0) if pipelined else None]
    behind = []
    for (rows, needs_mask), later in zip(chunks, ahead):
      # The matrix unit works on the next products meanwhile: the compiler keeps this order.
      of_later = None if later is None else product(later)
      behind.append((rows, *softmax(rows, of_chunk, needs_mask)))
      if len(behind) > pipelined:
        add(*behind.pop(0))
      of_chunk = of_later
    if pipelined:
      products[...] = of_chunk
      add(*behind.pop())

  def softmax(rows, products, masked):
    """The weights [keys, queries] of these keys, and what the sums so far are multiplied by."""
    keys = as_columns(all_keys, query.shape[2], rows) if masked or settings.alibi else None
    scores = scores_of(products, queries, keys, slopes[h], masked, settings)
    if bias is not None:
      scores = scores + bias[0, 0, rows, :] * LOG2_E
    before = largest[...]
    now = jnp.maximum(before, scores.max(axis=0, keepdims=True))
    # Where every key so far is forbidden this is 1, and of no account: see below.
    weights = jnp.exp2(scores - now)
    correction = jnp.exp2(before - now)
    total[...] = correction * total[...] + weights.sum(axis=0, keepdims=True)
    largest[...] = now
    return weights.astype(value.dtype), correction

  def add(rows, weights, correction):
    sums[...] = correction * sums[...] + dot(value[0, 0, rows, :], weights, (0, 0))

  blocks = key.shape[2] // block
  visit(ranges, (b, i), part, blocks, attend, at_once=2, first=first if pipelined else None)

  @pl.when(part == pl.num_programs(3) - 1)
  def _():
    # A row that may attend to nothing gives zeros, and weights of 0 backward.
    some = largest[...] > FORBIDDEN / 2
    mean = sums[...] * jnp.where(some, 1 / total[...], 0)
    out[0, 0] = mean.astype(out.dtype).T  # Half the registers to transpose.
    lse[0, 0] = jnp.where(some, largest[...] + jnp.log2(total[...]), jnp.inf)
