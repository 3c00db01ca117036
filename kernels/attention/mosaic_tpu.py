"""FlashAttention-2 (Dao 2023) for TPU: exact attention whose scores never leave the chip.

Scores are made and used block by block: the softmax of a row is corrected as larger scores turn up
(forward), and is made again from the row's log-sum-exp (backward). Blocks of queries and keys that
do not meet, because of causality, the sliding window or packed segments, are neither read nor
computed: every block of queries has a range of key blocks, known before the kernel starts.

Scores are transposed, [keys, queries]: the numbers of a query (the largest score, the sum, the
log-sum-exp) then lie along the lanes, a few registers instead of one for every eight queries, and
reductions over keys are sums of registers, not sums within them.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import xla
from kernels.attention.masks import (
  Rule,
  Span,
  Tokens,
  all_may_attend,
  block_spans,
  blocks_that_meet,
  may_attend,
)

Array = jax.Array

LANES = 128
_BLOCK = 512  # Queries, and keys, of one block of scores, at most.
# Of a head's keys and values (backward also queries and their gradients) that are on the chip at
# once, at most: twice that is in use, as the next ones are fetched meanwhile. A TPU v4 has 16 MiB.
_RESIDENT_BYTES = 2 * 2**20
_RESIDENT_WITH_BIAS = 1024  # Tokens.
_VMEM_BYTES = 64 * 2**20
# A score that is not allowed: finite, so that differences of two are 0 and not NaN.
_LOG2_E = math.log2(math.e)
_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


class _Settings(NamedTuple):
  rule: Rule
  scale: float
  alibi: bool
  query_block: int
  key_block: int


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
  settings = _Settings(rule, scale, alibi, _block_size(seq), _block_size(count))
  slopes = alibi_slopes if alibi else jnp.zeros(query.shape[1])
  # Padding belongs to segment 0: no query sees it, and it sees no key.
  pad_queries = functools.partial(_pad, multiple=settings.query_block)
  pad_keys = functools.partial(_pad, multiple=settings.key_block)
  query = pad_queries(query, axis=2)
  key, value = pad_keys(key, axis=2), pad_keys(value, axis=2)
  queries = Tokens(*(pad_queries(x, axis=1) for x in queries))
  keys = Tokens(*(pad_keys(x, axis=1) for x in keys))
  if bias is not None:
    whole = (*jnp.broadcast_shapes(bias.shape, (1,) * 4)[:2], seq, count)
    bias = jnp.broadcast_to(bias.astype(jnp.float32), whole)
    bias = pad_keys(pad_queries(bias, axis=2), axis=3)
  out = _attention(query, key, value, queries, keys, slopes.astype(jnp.float32), bias, settings)
  return out[:, :, :seq]


def _block_size(tokens: int) -> int:
  return min(_BLOCK, -(-tokens // LANES) * LANES)


def _pad(x: Array, *, multiple: int, axis: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(query, key, value, queries, keys, slopes, bias, settings: _Settings) -> Array:
  return _forward(query, key, value, queries, keys, slopes, bias, settings)[0]


def _attention_forward(query, key, value, queries, keys, slopes, bias, settings: _Settings):
  out, lse = _forward(query, key, value, queries, keys, slopes, bias, settings)
  return out, (query, key, value, queries, keys, slopes, bias, out, lse)


def _attention_backward(settings: _Settings, residuals, d_out):
  query, key, value, queries, keys, slopes, bias, out, lse = residuals
  if bias is None:
    arrays = (query, key, value, queries, keys, slopes, lse, _delta(out, d_out), d_out)
    d_query = _backward_queries(*arrays, settings)
    d_key, d_value = _backward_keys(*arrays, settings)
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


# --- What the three kernels share -----------------------------------------------------------------


def _ids(tokens: Tokens) -> Array:
  """int32 [batch, 2, tokens]: positions and segment ids as rows."""
  return jnp.stack(tokens, axis=1)


def _ranges(meet: Array) -> Array:
  """The first and the end of the blocks that every block meets: [batch, n, m] -> [2, batch, n]."""
  m = meet.shape[2]
  first = jnp.argmax(meet, axis=2)
  end = m - jnp.argmax(meet[:, :, ::-1], axis=2)
  any_ = meet.any(axis=2)
  return jnp.stack([jnp.where(any_, first, 0), jnp.where(any_, end, 0)]).astype(jnp.int32)


def _resident(block: int, limit: int, *arrays: Array) -> int:
  """Tokens of the arrays [.., .., tokens, channels] to have on the chip at once.

  The largest multiple of `block` that divides their number and is within the limits, or a block.
  """
  tokens = arrays[0].shape[2]
  of_a_token = sum(-(-x.shape[3] // LANES) * LANES * x.dtype.itemsize for x in arrays)
  limit = min(limit, _RESIDENT_BYTES // of_a_token)
  blocks = tokens // block
  fits = (n for n in range(1, blocks + 1) if blocks % n == 0 and n * block <= limit)
  return block * max(fits, default=1)


def _visit(ranges, index, part, blocks: int, is_whole, body) -> None:
  """Calls body(j, masked) for the blocks of this resident part that are in the range at `index`.

  Most blocks are whole, all their queries may attend to all their keys: there the mask, a good part
  of the work, is left out. is_whole: (the block's number among all) -> bool.
  """
  first = jnp.maximum(ranges[0, *index] - part * blocks, 0)
  end = jnp.minimum(ranges[1, *index] - part * blocks, blocks)

  def visit(j, _):
    whole = is_whole(part * blocks + j)
    pl.when(whole)(lambda: body(j, False))
    pl.when(~whole)(lambda: body(j, True))

  jax.lax.fori_loop(first, end, visit, None)


def _is_whole(query_spans, key_spans, rule: Rule, b, i, j):
  of = lambda spans, block: Span(*(spans[n, b, block] for n in range(4)))
  return all_may_attend(of(query_spans, i), of(key_spans, j), rule)


def _scalars(queries: Tokens, keys: Tokens, settings: _Settings, *, by_keys: bool = False):
  """What the kernels know of blocks beforehand: ranges, and the spans of queries and of keys."""
  meet = blocks_that_meet(queries, keys, settings.rule, settings.query_block, settings.key_block)
  return (
    _ranges(meet.swapaxes(1, 2) if by_keys else meet),
    jnp.stack(block_spans(queries, settings.query_block)),
    jnp.stack(block_spans(keys, settings.key_block)),
  )


def _needed_part(ranges, index, part, blocks: int):
  """The resident part to have on the chip: one that is not needed is not fetched."""
  first = _div(ranges[0, *index], blocks)
  last = _div(jnp.maximum(ranges[1, *index] - 1, 0), blocks)
  return jnp.clip(part, first, jnp.maximum(last, first))


def _div(a: Array, b: int) -> Array:
  """a // b of numbers that are not negative, which spares the scalar core the signs."""
  return jax.lax.div(a, jnp.int32(b))


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  """Product over a's and b's given axes, accumulated in float32."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def _as_rows(ids, tokens=slice(None)) -> Tokens:
  """[1, n], along the lanes."""
  return Tokens(ids[0, 0:1, tokens], ids[0, 1:2, tokens])


def _as_columns(ids, tokens=slice(None)) -> Tokens:
  """[n, 1], along the sublanes."""
  column = lambda row: jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
  return Tokens(*map(column, _as_rows(ids, tokens)))


def _scores(
  products: Array, queries: Tokens, keys: Tokens, slope, masked: bool, settings: _Settings
) -> Array:
  """Scores [keys, queries] in units of log 2, which spares the exponential a product."""
  scores = products * (settings.scale * _LOG2_E)
  if settings.alibi:
    distance = queries.positions - keys.positions
    scores = scores - (slope * _LOG2_E) * distance.astype(jnp.float32)
  if masked:
    scores = jnp.where(may_attend(queries, keys, settings.rule), scores, _FORBIDDEN)
  return scores


def _compiler_parameters(parallel: int, sequential: int):
  return pltpu.CompilerParams(
    dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential,
    vmem_limit_bytes=_VMEM_BYTES,
  )


# --- Forward --------------------------------------------------------------------------------------


def _forward(query, key, value, queries, keys, slopes, bias, settings: _Settings):
  """out [batch, heads, seq, value_dim] and the rows' log-sum-exp, float32 [batch, heads, 1, seq]."""
  batch, heads, seq, key_dim = query.shape
  kv_heads, count, value_dim = value.shape[1:]
  group = heads // kv_heads
  query_block, key_block = settings.query_block, settings.key_block
  limit = count if bias is None else _RESIDENT_WITH_BIAS
  resident = _resident(key_block, limit, key, value)
  blocks = resident // key_block

  def of_queries(b, h, i, part, *_):
    return b, h, i, 0

  def of_keys(b, h, i, part, ranges, *_):
    return b, _div(h, group), _needed_part(ranges, (b, i), part, blocks), 0

  def ids_of_keys(b, h, i, part, ranges, *_):
    return b, 0, _needed_part(ranges, (b, i), part, blocks)

  specs = [
    pl.BlockSpec((1, 1, query_block, key_dim), of_queries),
    pl.BlockSpec((1, 1, resident, key_dim), of_keys),
    pl.BlockSpec((1, 1, resident, value_dim), of_keys),
    pl.BlockSpec((1, 2, query_block), lambda b, h, i, part, *_: (b, 0, i)),
    pl.BlockSpec((1, 2, resident), ids_of_keys),
  ]
  arrays = [query, key, value, _ids(queries), _ids(keys)]
  if bias is not None:

    def of_bias(b, h, i, part, ranges, *_):
      part = _needed_part(ranges, (b, i), part, blocks)
      return (b if bias.shape[0] > 1 else 0), (h if bias.shape[1] > 1 else 0), part, i

    specs.append(pl.BlockSpec((1, 1, resident, query_block), of_bias))
    arrays.append(bias.mT)
  return pl.pallas_call(
    functools.partial(_forward_kernel, settings=settings, has_bias=bias is not None),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(batch, heads, seq // query_block, count // resident),
      in_specs=specs,
      out_specs=[
        pl.BlockSpec((1, 1, query_block, value_dim), of_queries),
        pl.BlockSpec((1, 1, 1, query_block), lambda b, h, i, part, *_: (b, h, 0, i)),
      ],
      scratch_shapes=[
        pltpu.VMEM((1, query_block), jnp.float32),
        pltpu.VMEM((1, query_block), jnp.float32),
        pltpu.VMEM((value_dim, query_block), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((batch, heads, seq, value_dim), query.dtype),
      jax.ShapeDtypeStruct((batch, heads, 1, seq), jnp.float32),
    ],
    compiler_params=_compiler_parameters(3, 1),
    name="attention_forward",
  )(*_scalars(queries, keys, settings), slopes, *arrays)


def _forward_kernel(
  ranges, query_spans, key_spans, slopes, *refs, settings: _Settings, has_bias: bool
):
  query, key, value, query_ids, key_ids, *rest = refs
  bias, (out, lse, largest, total, sums) = (rest[0], rest[1:]) if has_bias else (None, rest)
  b, h, i, part = (pl.program_id(axis) for axis in range(4))
  block = settings.key_block

  @pl.when(part == 0)
  def _():
    largest[...] = jnp.full_like(largest, _FORBIDDEN)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

  queries = _as_rows(query_ids)

  def attend(j, masked):
    rows = pl.ds(pl.multiple_of(j * block, block), block)
    keys = _as_columns(key_ids, rows)
    products = _dot(key[0, 0, rows, :], query[0, 0], (1, 1))
    scores = _scores(products, queries, keys, slopes[h], masked, settings)
    if bias is not None:
      scores = scores + bias[0, 0, rows, :] * _LOG2_E
    before = largest[...]
    now = jnp.maximum(before, scores.max(axis=0, keepdims=True))
    # Where every key so far is forbidden this is 1, and of no account: see below.
    weights = jnp.exp2(scores - now)
    correction = jnp.exp2(before - now)
    v = value[0, 0, rows, :]
    sums[...] = correction * sums[...] + _dot(v, weights.astype(v.dtype), (0, 0))
    total[...] = correction * total[...] + weights.sum(axis=0, keepdims=True)
    largest[...] = now

  whole = lambda j: _is_whole(query_spans, key_spans, settings.rule, b, i, j)
  _visit(ranges, (b, i), part, key.shape[2] // block, whole, attend)

  @pl.when(part == pl.num_programs(3) - 1)
  def _():
    # A row that may attend to nothing gives zeros, and weights of 0 backward.
    some = largest[...] > _FORBIDDEN / 2
    mean = jnp.where(some, sums[...] / jnp.where(some, total[...], 1), 0)
    out[0, 0] = mean.T.astype(out.dtype)
    lse[0, 0] = jnp.where(some, largest[...] + jnp.log2(total[...]), jnp.inf)


# --- Backward -------------------------------------------------------------------------------------


def _backward_queries(
  query, key, value, queries, keys, slopes, lse, delta, d_out, settings: _Settings
) -> Array:
  """The gradient of the queries, like `query`."""
  batch, heads, seq, key_dim = query.shape
  kv_heads, count, value_dim = value.shape[1:]
  group = heads // kv_heads
  query_block, key_block = settings.query_block, settings.key_block
  resident = _resident(key_block, count, key, value)
  blocks = resident // key_block

  def of_queries(b, h, i, part, *_):
    return b, h, i, 0

  def numbers(b, h, i, part, *_):
    return b, h, 0, i

  def of_keys(b, h, i, part, ranges, *_):
    return b, _div(h, group), _needed_part(ranges, (b, i), part, blocks), 0

  def ids_of_keys(b, h, i, part, ranges, *_):
    return b, 0, _needed_part(ranges, (b, i), part, blocks)

  return pl.pallas_call(
    functools.partial(_backward_queries_kernel, settings=settings),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(batch, heads, seq // query_block, count // resident),
      in_specs=[
        pl.BlockSpec((1, 1, query_block, key_dim), of_queries),
        pl.BlockSpec((1, 1, resident, key_dim), of_keys),
        pl.BlockSpec((1, 1, resident, value_dim), of_keys),
        pl.BlockSpec((1, 2, query_block), lambda b, h, i, part, *_: (b, 0, i)),
        pl.BlockSpec((1, 2, resident), ids_of_keys),
        pl.BlockSpec((1, 1, 1, query_block), numbers),
        pl.BlockSpec((1, 1, 1, query_block), numbers),
        pl.BlockSpec((1, 1, query_block, value_dim), of_queries),
      ],
      out_specs=pl.BlockSpec((1, 1, query_block, key_dim), of_queries),
      scratch_shapes=[pltpu.VMEM((key_dim, query_block), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
    compiler_params=_compiler_parameters(3, 1),
    name="attention_backward_queries",
  )(
    *_scalars(queries, keys, settings),
    slopes,
    query,
    key,
    value,
    _ids(queries),
    _ids(keys),
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
  settings: _Settings,
):
  b, h, i, part = (pl.program_id(axis) for axis in range(4))
  block = settings.key_block

  @pl.when(part == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  queries = _as_rows(query_ids)

  def attend(j, masked):
    rows = pl.ds(pl.multiple_of(j * block, block), block)
    k = key[0, 0, rows, :]
    keys = _as_columns(key_ids, rows)
    scores = _scores(_dot(k, query[0, 0], (1, 1)), queries, keys, slopes[h], masked, settings)
    weights = jnp.exp2(scores - lse[0, 0])
    d_weights = _dot(value[0, 0, rows, :], d_out[0, 0], (1, 1))
    d_scores = weights * (d_weights - delta[0, 0])
    sums[...] += _dot(k, d_scores.astype(k.dtype), (0, 0))

  whole = lambda j: _is_whole(query_spans, key_spans, settings.rule, b, i, j)
  _visit(ranges, (b, i), part, key.shape[2] // block, whole, attend)

  @pl.when(part == pl.num_programs(3) - 1)
  def _():
    d_query[0, 0] = (sums[...] * settings.scale).T.astype(d_query.dtype)


def _backward_keys(
  query, key, value, queries, keys, slopes, lse, delta, d_out, settings: _Settings
) -> tuple[Array, Array]:
  """The gradients of keys and values, summed over the query heads that share them."""
  batch, heads, seq, key_dim = query.shape
  kv_heads, count, value_dim = value.shape[1:]
  group = heads // kv_heads
  query_block, key_block = settings.query_block, settings.key_block
  resident = _resident(query_block, seq, query, d_out)
  blocks = resident // query_block

  def of_keys(b, h, j, g, part, *_):
    return b, h, j, 0

  def of_queries(b, h, j, g, part, ranges, *_):
    return b, h * group + g, _needed_part(ranges, (b, j), part, blocks), 0

  def numbers(b, h, j, g, part, ranges, *_):
    return b, h * group + g, 0, _needed_part(ranges, (b, j), part, blocks)

  def ids_of_queries(b, h, j, g, part, ranges, *_):
    return b, 0, _needed_part(ranges, (b, j), part, blocks)

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
    compiler_params=_compiler_parameters(3, 2),
    name="attention_backward_keys",
  )(
    *_scalars(queries, keys, settings, by_keys=True),
    slopes,
    query,
    key,
    value,
    _ids(queries),
    _ids(keys),
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
  settings: _Settings,
):
  b, h, j, g, part = (pl.program_id(axis) for axis in range(5))
  block = settings.query_block
  slope = slopes[h * pl.num_programs(3) + g]

  @pl.when((g == 0) & (part == 0))
  def _():
    key_sums[...] = jnp.zeros_like(key_sums)
    value_sums[...] = jnp.zeros_like(value_sums)

  keys = _as_columns(key_ids)

  def attend(i, masked):
    rows = pl.ds(pl.multiple_of(i * block, block), block)
    q, d_o = query[0, 0, rows, :], d_out[0, 0, rows, :]
    queries = _as_rows(query_ids, rows)
    scores = _scores(_dot(key[0, 0], q, (1, 1)), queries, keys, slope, masked, settings)
    weights = jnp.exp2(scores - lse[0, 0, :, rows])
    value_sums[...] += _dot(weights.astype(d_o.dtype), d_o, (1, 0))
    d_weights = _dot(value[0, 0], d_o, (1, 1))
    d_scores = weights * (d_weights - delta[0, 0, :, rows])
    key_sums[...] += _dot(d_scores.astype(q.dtype), q, (1, 0))

  whole = lambda i: _is_whole(query_spans, key_spans, settings.rule, b, i, j)
  _visit(ranges, (b, j), part, query.shape[2] // block, whole, attend)

  @pl.when((g == pl.num_programs(3) - 1) & (part == pl.num_programs(4) - 1))
  def _():
    d_key[0, 0] = (key_sums[...] * settings.scale).astype(d_key.dtype)
    d_value[0, 0] = value_sums[...].astype(d_value.dtype)
