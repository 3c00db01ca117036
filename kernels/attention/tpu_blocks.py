"""What the attention kernels for TPU share: which blocks they visit, and the scores of a block."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.masks import (
  Rule,
  Span,
  Tokens,
  all_may_attend,
  block_spans,
  blocks_that_meet,
)

Array = jax.Array

LANES = 128
# Of a head's keys and values (backward also queries and their gradients) that are on the chip at
# once, at most: twice that is in use, as the next ones are fetched meanwhile. A TPU v4 has 16 MiB.
_RESIDENT_BYTES = 2 * 2**20
_VMEM_BYTES = 64 * 2**20
LOG2_E = math.log2(math.e)
# A score that is not allowed: finite, so that differences of two are 0 and not NaN.
FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
_NO_SEGMENT = jnp.iinfo(jnp.int32).min


class Settings(NamedTuple):
  """What is fixed when a kernel is compiled; blocks are in tokens."""

  rule: Rule
  scale: float
  alibi: bool
  query_block: int
  key_block: int


def ids(tokens: Tokens) -> Array:
  """int32 [batch, 2, tokens]: positions and segment ids as rows."""
  return jnp.stack(tokens, axis=1)


def key_ids(keys: Tokens) -> Array:
  """As `ids`, padding in a segment of no query: that spares a comparison for every score."""
  segments = jnp.where(keys.segment_ids == 0, _NO_SEGMENT, keys.segment_ids)
  return ids(Tokens(keys.positions, segments))


def ranges_of(meet: Array) -> Array:
  """The first and the end of the blocks that every block meets: [batch, n, m] -> [2, batch, n]."""
  m = meet.shape[2]
  first = jnp.argmax(meet, axis=2)
  end = m - jnp.argmax(meet[:, :, ::-1], axis=2)
  any_ = meet.any(axis=2)
  return jnp.stack([jnp.where(any_, first, 0), jnp.where(any_, end, 0)]).astype(jnp.int32)


def resident_tokens(block: int, limit: int, *arrays: Array) -> int:
  """Tokens of the arrays [.., .., tokens, channels] to have on the chip at once.

  The largest multiple of `block` that divides their number and is within the limits, or a block.
  """
  tokens = arrays[0].shape[2]
  of_a_token = sum(-(-x.shape[3] // LANES) * LANES * x.dtype.itemsize for x in arrays)
  limit = min(limit, _RESIDENT_BYTES // of_a_token)
  blocks = tokens // block
  fits = (n for n in range(1, blocks + 1) if blocks % n == 0 and n * block <= limit)
  return block * max(fits, default=1)


def visit(ranges, index, part, blocks: int, is_whole, body, in_pairs: bool = False) -> None:
  """Calls body(j, masked) for the blocks of this resident part that are in the range at `index`.

  Most blocks are whole, all their queries may attend to all their keys: there the mask, a good part
  of the work, is left out. is_whole: (the block's number among all) -> bool.

  in_pairs: calls body(j, False, 2) for two whole blocks on end, whose work overlaps.
  """
  first = jnp.maximum(ranges[0, *index] - part * blocks, 0)
  end = jnp.minimum(ranges[1, *index] - part * blocks, blocks)

  def visit(j, _):
    whole = is_whole(part * blocks + j)
    pl.when(whole)(lambda: body(j, False))
    pl.when(~whole)(lambda: body(j, True))

  def visit_two(i, _):
    j = first + 2 * i
    # Spans are read of blocks that there are.
    second = jnp.minimum(j + 1, end - 1)
    both = (second > j) & is_whole(part * blocks + j) & is_whole(part * blocks + second)
    pl.when(both)(lambda: body(j, False, 2))
    jax.lax.fori_loop(j, jnp.where(both, j, second + 1), visit, None)

  if in_pairs and blocks > 1:
    jax.lax.fori_loop(0, div(jnp.maximum(end - first, 0) + 1, 2), visit_two, None)
  else:
    jax.lax.fori_loop(first, end, visit, None)


def is_whole(query_spans, key_spans, rule: Rule, b, i, j):
  of = lambda spans, block: Span(*(spans[n, b, block] for n in range(4)))
  return all_may_attend(of(query_spans, i), of(key_spans, j), rule)


def scalars(queries: Tokens, keys: Tokens, settings: Settings, *, by_keys: bool = False):
  """What the kernels know of blocks beforehand: ranges, and the spans of queries and of keys."""
  meet = blocks_that_meet(queries, keys, settings.rule, settings.query_block, settings.key_block)
  return (
    ranges_of(meet.swapaxes(1, 2) if by_keys else meet),
    jnp.stack(block_spans(queries, settings.query_block)),
    jnp.stack(block_spans(keys, settings.key_block)),
  )


def needed_part(ranges, index, part, blocks: int):
  """The resident part to have on the chip: one that is not needed is not fetched.

  Where there is one part only, its number must be a constant instead: this is work for every step.
  """
  first = div(ranges[0, *index], blocks)
  last = div(jnp.maximum(ranges[1, *index] - 1, 0), blocks)
  return jnp.clip(part, first, jnp.maximum(last, first))


def div(a: Array, b: int) -> Array:
  """a // b of numbers that are not negative, which spares the scalar core the signs."""
  return jax.lax.div(a, jnp.int32(b))


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  """Product over a's and b's given axes, accumulated in float32."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def as_rows(ids, tokens=slice(None)) -> Tokens:
  """[1, n], along the lanes."""
  return Tokens(ids[0, 0:1, tokens], ids[0, 1:2, tokens])


def as_columns(ids, tokens=slice(None)) -> Tokens:
  """[n, 1], along the sublanes."""
  column = lambda row: jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
  return Tokens(*map(column, as_rows(ids, tokens)))


def scores_of(
  products: Array, queries: Tokens, keys: Tokens, slope, masked: bool, settings: Settings
) -> Array:
  """Scores [keys, queries] in units of log 2, which spares the exponential a product."""
  scores = products * (settings.scale * LOG2_E)
  if settings.alibi:
    distance = queries.positions - keys.positions
    scores = scores - (slope * LOG2_E) * distance.astype(jnp.float32)
  if masked:
    scores = jnp.where(_may_attend(queries, keys, settings.rule), scores, FORBIDDEN)
  return scores


def _may_attend(queries: Tokens, keys: Tokens, rule: Rule) -> Array:
  """`masks.may_attend` of keys of `key_ids`, with as few operations for a score as there are."""
  allowed = queries.segment_ids == keys.segment_ids
  if rule.causal:
    allowed &= queries.positions >= keys.positions
  if rule.sliding_window is not None:
    allowed &= queries.positions - rule.sliding_window < keys.positions
  return allowed


class OverQueries(NamedTuple):
  """How a kernel goes over blocks of queries, and for each over parts of the keys.

  Attributes:
    grid: (batch, heads, blocks of queries, parts of the keys).
    specs: of query, key, value, the queries' ids and the keys' ids.
    queries, numbers: index maps of [batch, heads, seq, ..] and of [batch, heads, 1, seq].
    part: (b, i, part, ranges) -> the part of the keys to have on the chip.
  """

  grid: tuple[int, int, int, int]
  specs: list[pl.BlockSpec]
  queries: Callable
  numbers: Callable
  part: Callable


def over_queries(
  query: Array, key: Array, value: Array, limit: int, settings: Settings
) -> OverQueries:
  """limit: keys to have on the chip at once, at most."""
  batch, heads, seq, key_dim = query.shape
  kv_heads, count, value_dim = value.shape[1:]
  group, block = heads // kv_heads, settings.query_block
  resident = resident_tokens(settings.key_block, limit, key, value)
  blocks = resident // settings.key_block

  def needed(b, i, part, ranges):
    return needed_part(ranges, (b, i), part, blocks) if count > resident else 0

  def queries(b, h, i, part, *_):
    return b, h, i, 0

  def numbers(b, h, i, part, *_):
    return b, h, 0, i

  def of_keys(b, h, i, part, ranges, *_):
    return b, div(h, group), needed(b, i, part, ranges), 0

  def ids_of_keys(b, h, i, part, ranges, *_):
    return b, 0, needed(b, i, part, ranges)

  specs = [
    pl.BlockSpec((1, 1, block, key_dim), queries),
    pl.BlockSpec((1, 1, resident, key_dim), of_keys),
    pl.BlockSpec((1, 1, resident, value_dim), of_keys),
    pl.BlockSpec((1, 2, block), lambda b, h, i, part, *_: (b, 0, i)),
    pl.BlockSpec((1, 2, resident), ids_of_keys),
  ]
  grid = (batch, heads, seq // block, count // resident)
  return OverQueries(grid, specs, queries, numbers, needed)


def compiler_parameters(parallel: int, sequential: int):
  return pltpu.CompilerParams(
    dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential,
    vmem_limit_bytes=_VMEM_BYTES,
  )
