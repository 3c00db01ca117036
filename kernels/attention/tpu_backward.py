"""The two backward kernels of `mosaic_tpu`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_blocks import (
  Settings,
  as_columns,
  as_rows,
  compiler_parameters,
  dot,
  ids,
  is_whole,
  key_ids,
  needed_part,
  over_queries,
  resident_tokens,
  scalars,
  scores_of,
  visit,
)

Array = jax.Array


def backward_queries(
  query, key, value, queries, keys, slopes, lse, delta, d_out, settings: Settings
) -> Array:
  """The gradient of the queries, like `query`."""
  key_dim, value_dim = query.shape[3], value.shape[3]
  block = settings.query_block
  over = over_queries(query, key, value, key.shape[2], settings)
  return pl.pallas_call(
    functools.partial(_backward_queries_kernel, settings=settings),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=over.grid,
      in_specs=[
        *over.specs,
        pl.BlockSpec((1, 1, 1, block), over.numbers),
        pl.BlockSpec((1, 1, 1, block), over.numbers),
        pl.BlockSpec((1, 1, block, value_dim), over.queries),
      ],
      out_specs=pl.BlockSpec((1, 1, block, key_dim), over.queries),
      scratch_shapes=[pltpu.VMEM((key_dim, block), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    compiler_params=compiler_parameters(3, 1),
    name="attention_backward_queries",
  )(
    *scalars(queries, keys, settings),
    slopes,
    query,
    key,
    value,
    ids(queries),
    key_ids(keys),
    lse,
    delta,
    d_out,
  )


def _backward_queries_kernel(
  ranges,
  query_spans,
  key_spans,
  slopes,
  query,
  key,
  value,
  query_ids,
  key_ids,
  lse,
  delta,
  d_out,
  d_query,
  sums,
  *,
  settings: Settings,
):
  b, h, i, part = (pl.program_id(axis) for axis in range(4))
  block = settings.key_block

  @pl.when(part == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  queries = as_rows(query_ids)

  def attend(j, masked):
    rows = pl.ds(pl.multiple_of(j * block, block), block)
    k = key[0, 0, rows, :]
    keys = as_columns(key_ids, rows)
    scores = scores_of(dot(k, query[0, 0], (1, 1)), queries, keys, slopes[h], masked, settings)
    weights = jnp.exp2(scores - lse[0, 0])
    d_weights = dot(value[0, 0, rows, :], d_out[0, 0], (1, 1))
    d_scores = weights * (d_weights - delta[0, 0])
    sums[...] += dot(k, d_scores.astype(k.dtype), (0, 0))

  whole = lambda j: is_whole(query_spans, key_spans, settings.rule, b, i, j)
  visit(ranges, (b, i), part, key.shape[2] // block, whole, attend)

  @pl.when(part == pl.num_programs(3) - 1)
  def _():
    d_query[0, 0] = (sums[...] * settings.scale).T.astype(d_query.dtype)


def backward_keys(
  query, key, value, queries, keys, slopes, lse, delta, d_out, settings: Settings
) -> tuple[Array, Array]:
  """The gradients of keys and values, summed over the query heads that share them."""
  batch, heads, seq, key_dim = query.shape
  kv_heads, count, value_dim = value.shape[1:]
  group = heads // kv_heads
  query_block, key_block = settings.query_block, settings.key_block
  resident = resident_tokens(query_block, seq, query, d_out)
  blocks = resident // query_block

  def of_keys(b, h, j, g, part, *_):
    return b, h, j, 0

  def needed(b, j, part, ranges):
    return needed_part(ranges, (b, j), part, blocks) if seq > resident else 0

  def of_queries(b, h, j, g, part, ranges, *_):
    return b, h * group + g, needed(b, j, part, ranges), 0

  def numbers(b, h, j, g, part, ranges, *_):
    return b, h * group + g, 0, needed(b, j, part, ranges)

  def ids_of_queries(b, h, j, g, part, ranges, *_):
    return b, 0, needed(b, j, part, ranges)

  return pl.pallas_call(
    functools.partial(_backward_keys_kernel, settings=settings),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(batch, kv_heads, count // key_block, group, seq // resident),
      in_specs=[
        pl.BlockSpec((1, 1, resident, key_dim), of_queries),
        pl.BlockSpec((1, 1, key_block, key_dim), of_keys),
        pl.BlockSpec((1, 1, key_block, value_dim), of_keys),
        pl.BlockSpec((1, 2, resident), ids_of_queries),
        pl.BlockSpec((1, 2, key_block), lambda b, h, j, g, part, *_: (b, 0, j)),
        pl.BlockSpec((1, 1, 1, resident), numbers),
        pl.BlockSpec((1, 1, 1, resident), numbers),
        pl.BlockSpec((1, 1, resident, value_dim), of_queries),
      ],
      out_specs=[
        pl.BlockSpec((1, 1, key_block, key_dim), of_keys),
        pl.BlockSpec((1, 1, key_block, value_dim), of_keys),
      ],
      scratch_shapes=[
        pltpu.VMEM((key_block, key_dim), jnp.float32),
        pltpu.VMEM((key_block, value_dim), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(key.shape, key.dtype),
      jax.ShapeDtypeStruct(value.shape, value.dtype),
    ],
    compiler_params=compiler_parameters(3, 2),
    name="attention_backward_keys",
  )(
    *scalars(queries, keys, settings, by_keys=True),
    slopes,
    query,
    key,
    value,
    ids(queries),
    key_ids(keys),
    lse,
    delta,
    d_out,
  )


def _backward_keys_kernel(
  ranges,
  query_spans,
  key_spans,
  slopes,
  query,
  key,
  value,
  query_ids,
  key_ids,
  lse,
  delta,
  d_out,
  d_key,
  d_value,
  key_sums,
  value_sums,
  *,
  settings: Settings,
):
  b, h, j, g, part = (pl.program_id(axis) for axis in range(5))
  block = settings.query_block
  slope = slopes[h * pl.num_programs(3) + g]

  @pl.when((g == 0) & (part == 0))
  def _():
    key_sums[...] = jnp.zeros_like(key_sums)
    value_sums[...] = jnp.zeros_like(value_sums)

  keys = as_columns(key_ids)

  def attend(i, masked):
    rows = pl.ds(pl.multiple_of(i * block, block), block)
    q, d_o = query[0, 0, rows, :], d_out[0, 0, rows, :]
    queries = as_rows(query_ids, rows)
    scores = scores_of(dot(key[0, 0], q, (1, 1)), queries, keys, slope, masked, settings)
    weights = jnp.exp2(scores - lse[0, 0, :, rows])
    value_sums[...] += dot(weights.astype(d_o.dtype), d_o, (1, 0))
    d_weights = dot(value[0, 0], d_o, (1, 1))
    d_scores = weights * (d_weights - delta[0, 0, :, rows])
    key_sums[...] += dot(d_scores.astype(q.dtype), q, (1, 0))

  whole = lambda i: is_whole(query_spans, key_spans, settings.rule, b, i, j)
  visit(ranges, (b, j), part, query.shape[2] // block, whole, attend)

  @pl.when((g == pl.num_programs(3) - 1) & (part == pl.num_programs(4) - 1))
  def _():
    d_key[0, 0] = (key_sums[...] * settings.scale).astype(d_key.dtype)
    d_value[0, 0] = value_sums[...].astype(d_value.dtype)
