"""The backward kernel of `mosaic_tpu`: all three gradients from one visit of every block of scores.

The sums for keys and values stay on the chip while the queries of all heads that share them go by.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.masks import Tokens
from kernels.attention.tpu_blocks import (
  Settings,
  as_columns,
  as_rows,
  compiler_parameters,
  cost_estimate,
  dot,
  ids,
  key_ids,
  ranges_of,
  scores_of,
  visit,
)

Array = jax.Array


def backward(
  query, key, value, queries, keys, slopes, lse, delta, d_out, settings: Settings
) -> tuple[Array, Array, Array]:
  """The gradients of query, key and value, in their shapes and dtypes."""
  count, resident = key.shape[2], settings.resident
  parts = count // resident
  of_part = functools.partial(_backward, settings=settings)
  if parts == 1:
    return of_part(query, key, value, queries, keys, slopes, lse, delta, d_out, None)

  # One part of the keys after the other; each adds to the gradient of all queries.
  def step(d_query, part):
    key, value, keys = part
    d_query, *d_part = of_part(query, key, value, queries, keys, slopes, lse, delta, d_out, d_query)
    return d_query, d_part

  split = lambda x, axis: jnp.stack(jnp.split(x, parts, axis))
  xs = split(key, 2), split(value, 2), Tokens(*(split(x, 1) for x in keys))
  zeros = jnp.zeros(query.shape, jnp.float32)
  d_query, d_parts = jax.lax.scan(step, zeros, xs)
  d_key, d_value = (jnp.concatenate(x, axis=2) for x in d_parts)
  return d_query.astype(query.dtype), d_key, d_value


def _backward(
  query, key, value, queries, keys, slopes, lse, delta, d_out, before, *, settings: Settings
) -> tuple[Array, Array, Array]:
  """`backward` of keys that are on the chip at once.

  before: the gradient of the queries so far, float32, and so is the one that is returned; or None.
  """
  batch, heads, seq, key_dim = query.shape
  kv_heads, count, value_dim = value.shape[1:]
  group, block = heads // kv_heads, settings.query_block

  def of_keys(b, h, g, i, *_):
    return b, h, 0, 0

  def of_queries(b, h, g, i, *_):
    return b, h * group + g, i, 0

  def numbers(b, h, g, i, *_):
    return b, h * group + g, 0, i

  query_spec = pl.BlockSpec((1, 1, block, key_dim), of_queries)
  key_specs = [
    pl.BlockSpec((1, 1, count, key_dim), of_keys),
    pl.BlockSpec((1, 1, count, value_dim), of_keys),
  ]
  specs = [
    query_spec,
    *key_specs,
    pl.BlockSpec((1, 2, block), lambda b, h, g, i, *_: (b, 0, i)),
    pl.BlockSpec((1, 2, count), lambda b, h, g, i, *_: (b, 0, 0)),
    pl.BlockSpec((1, 1, 1, block), numbers),
    pl.BlockSpec((1, 1, 1, block), numbers),
    pl.BlockSpec((1, 1, block, value_dim), of_queries),
  ]
  scalars = (ranges_of(queries, keys, settings), slopes)
  arrays = [query, key, value, ids(queries), key_ids(keys), lse, delta, d_out]
  aliases = {}
  if before is not None:
    specs.append(query_spec)
    arrays.append(before)
    aliases[len(scalars) + len(arrays) - 1] = 0  # Added to in place.
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  return pl.pallas_call(
    functools.partial(_backward_kernel, settings=settings, adds=before is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(batch, kv_heads, group, seq // block),
      in_specs=specs,
      out_specs=[query_spec, *key_specs],
      scratch_shapes=[
        pltpu.VMEM((key_dim, block), jnp.float32),
        pltpu.VMEM((count, key_dim), jnp.float32),
        pltpu.VMEM((count, value_dim), jnp.float32),
      ],
    ),
    out_shape=[like(query if before is None else before), like(key), like(value)],
    input_output_aliases=aliases,
    cost_estimate=cost_estimate(
      3 * key_dim + 2 * value_dim, query, count, *arrays, query, key, value
    ),
    compiler_params=compiler_parameters(2, 2),
    name="attention_backward",
  )(*scalars, *arrays)


def _backward_kernel(ranges, slopes, *refs, settings: Settings, adds: bool):
  query, key, value, query_ids, key_ids, lse, delta, d_out, *rest = refs
  before, rest = (rest[0], rest[1:]) if adds else (None, rest)
  d_query, d_key, d_value, query_sums, key_sums, value_sums = rest
  b, h, g, i = (pl.program_id(axis) for axis in range(4))
  block = settings.key_block
  slope = slopes[h * pl.num_programs(2) + g]

  @pl.when((g == 0) & (i == 0))
  def _():
    key_sums[...] = jnp.zeros_like(key_sums)
    value_sums[...] = jnp.zeros_like(value_sums)

  query_sums[...] = jnp.zeros_like(query_sums)
  queries = as_rows(query_ids)

  def attend(blocks, masked, _):
    rows = pl.ds(pl.multiple_of(blocks[0] * block, block), block)
    q, k, v, d_o = query[0, 0], key[0, 0, rows, :], value[0, 0, rows, :], d_out[0, 0]
    keys = as_columns(key_ids, q.shape[0], rows)
    scores = scores_of(dot(k, q, (1, 1)), queries, keys, slope, masked[0], settings)
    weights = jnp.exp2(scores - lse[0, 0])
    value_sums[rows, :] += dot(weights.astype(d_o.dtype), d_o, (1, 0))
    d_weights = dot(v, d_o, (1, 1))
    d_scores = (weights * (d_weights - delta[0, 0])).astype(k.dtype)
    key_sums[rows, :] += dot(d_scores, q, (1, 0))
    query_sums[...] += dot(k, d_scores, (0, 0))

  visit(ranges, (b, i), 0, key.shape[2] // block, attend)

  of_queries = (query_sums[...] * settings.scale).T
  d_query[0, 0] = (before[0, 0] + of_queries if adds else of_queries).astype(d_query.dtype)

  @pl.when((g == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
  def _():
    d_key[0, 0] = (key_sums[...] * settings.scale).astype(d_key.dtype)
    d_value[0, 0] = value_sums[...].astype(d_value.dtype)
