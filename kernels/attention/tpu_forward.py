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
  dot,
  ids,
  is_whole,
  key_ids,
  over_queries,
  scalars,
  scores_of,
  visit,
)

Array = jax.Array

_RESIDENT_WITH_BIAS = 1024  # Tokens.
_CHUNK = 256  # Keys.


def forward(query, key, value, queries, keys, slopes, bias, settings: Settings):
  """out [batch, heads, seq, value_dim] and the rows' log-sum-exp, float32 [batch, heads, 1, seq]."""
  batch, heads, seq, _ = query.shape
  count, value_dim = value.shape[2:]
  block = settings.query_block
  limit = count if bias is None else _RESIDENT_WITH_BIAS
  over = over_queries(query, key, value, limit, settings)
  specs = over.specs
  arrays = [query, key, value, ids(queries), key_ids(keys)]
  if bias is not None:

    def of_bias(b, h, i, part, ranges, *_):
      row, head = (b if bias.shape[0] > 1 else 0), (h if bias.shape[1] > 1 else 0)
      return row, head, over.part(b, i, part, ranges), i

    specs = [*specs, pl.BlockSpec((1, 1, count // over.grid[3], block), of_bias)]
    arrays.append(bias.mT)
  return pl.pallas_call(
    functools.partial(_forward_kernel, settings=settings, has_bias=bias is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=over.grid,
      in_specs=specs,
      out_specs=[
        pl.BlockSpec((1, 1, block, value_dim), over.queries),
        pl.BlockSpec((1, 1, 1, block), over.numbers),
      ],
      scratch_shapes=[
        pltpu.VMEM((1, block), jnp.float32),
        pltpu.VMEM((1, block), jnp.float32),
        pltpu.VMEM((value_dim, block), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((batch, heads, seq, value_dim), query.dtype),
      jax.ShapeDtypeStruct((batch, heads, 1, seq), jnp.float32),
    ],
    compiler_params=compiler_parameters(3, 1),
    name="attention_forward",
  )(*scalars(queries, keys, settings), slopes, *arrays)


def _forward_kernel(
  ranges, query_spans, key_spans, slopes, *refs, settings: Settings, has_bias: bool
):
  query, key, value, query_ids, all_keys, *rest = refs
  bias, (out, lse, largest, total, sums) = (rest[0], rest[1:]) if has_bias else (None, rest)
  b, h, i, part = (pl.program_id(axis) for axis in range(4))
  block = settings.key_block

  @pl.when(part == 0)
  def _():
    largest[...] = jnp.full_like(largest, FORBIDDEN)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  queries = as_rows(query_ids)
  chunk = math.gcd(block, _CHUNK)

  def attend(j, masked, blocks=1):
    chunks = [
      pl.ds(pl.multiple_of(j * block + start, chunk), chunk)
      for start in range(0, blocks * block, chunk)
    ]
    product = lambda rows: dot(key[0, 0, rows, :], query[0, 0], (1, 1))
    products = product(chunks[0])
    for rows, following in zip(chunks, [*chunks[1:], None]):
      # The matrix unit works on the next products meanwhile: the compiler keeps this order.
      later = None if following is None else product(following)
      update(rows, products, masked)
      products = later

  def update(rows, products, masked):
    keys = as_columns(all_keys, rows) if masked or settings.alibi else None
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
    v = value[0, 0, rows, :]
    sums[...] = correction * sums[...] + dot(v, weights.astype(v.dtype), (0, 0))

  whole = lambda j: is_whole(query_spans, key_spans, settings.rule, b, i, j)
  visit(ranges, (b, i), part, key.shape[2] // block, whole, attend, in_pairs=True)

  @pl.when(part == pl.num_programs(3) - 1)
  def _():
    # A row that may attend to nothing gives zeros, and weights of 0 backward.
    some = largest[...] > FORBIDDEN / 2
    mean = sums[...] * jnp.where(some, 1 / total[...], 0)
    out[0, 0] = mean.T.astype(out.dtype)
    lse[0, 0] = jnp.where(some, largest[...] + jnp.log2(total[...]), jnp.inf)
