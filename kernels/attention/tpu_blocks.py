"""What the attention kernels for TPU share: which blocks they visit, and the scores of a block."""

import math
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
# Of a head's keys and values that are on the chip at once, at most. Twice that is in use, as the next
# ones are fetched meanwhile, and backward six times: with their gradients, which are float32 until
# they are written. A TPU v4 has 16 MiB.
_RESIDENT_BYTES = 2 * 2**20
_VMEM_BYTES = 64 * 2**20
LOG2_E = math.log2(math.e)
# A score that is not allowed: finite, so that differences of two are 0 and not NaN.
FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
_NO_SEGMENT = jnp.iinfo(jnp.int32).min


class Settings(NamedTuple):
  """What is fixed when a kernel is compiled; blocks are in tokens.

  `resident` is the keys on the chip at once, a multiple of `key_block`. `pipelined`: forward, the
  products of keys ahead and of values behind are computed during a softmax.
  """

  rule: Rule
  scale: float
  alibi: bool
  query_block: int
  key_block: int
  resident: int
  pipelined: bool


def ids(tokens: Tokens) -> Array:
  """int32 [batch, 2, tokens]: positions and segment ids as rows."""
  return jnp.stack(tokens, axis=1)


def key_ids(keys: Tokens) -> Array:
  """As `ids`, padding in a segment of no query: that spares a comparison for every score."""
  segments = jnp.where(keys.segment_ids == 0, _NO_SEGMENT, keys.segment_ids)
  return ids(Tokens(keys.positions, segments))


def ranges_of(queries: Tokens, keys: Tokens, settings: Settings) -> Array:
  """Which blocks of keys every block of queries visits, int32 [4, batch, query blocks].

  The first and the end of those that it meets, and those of a run of whole ones among them: there
  all queries may attend to all keys, and the mask, a good part of the work, is left out.
  """
  rule, query_block, key_block = settings.rule, settings.query_block, settings.key_block
  meet = blocks_that_meet(queries, keys, rule, query_block, key_block)
  row = Span(*(x[:, :, None] for x in block_spans(queries, query_block)))
  column = Span(*(x[:, None, :] for x in block_spans(keys, key_block)))
  whole = all_may_attend(row, column, rule)
  blocks = jnp.arange(meet.shape[2])
  last = jnp.max(jnp.where(meet, blocks + 1, 0), axis=2)
  first_whole = jnp.argmax(whole, axis=2)
  # The first block behind the run; where there is none, 0 up to 0.
  behind = ~whole & (blocks > first_whole[..., None])
  end_whole = jnp.min(jnp.where(behind, blocks, len(blocks)), axis=2)
  end_whole = jnp.where(whole.any(axis=2), end_whole, 0)
  return jnp.stack([jnp.argmax(meet, axis=2), last, first_whole, end_whole]).astype(jnp.int32)


def resident_tokens(block: int, limit: int, *arrays: Array) -> int:
  """Tokens of the arrays [.., .., tokens, channels] to have on the chip at once: whole blocks.

  As few parts of equal size as the memory and `limit`, in tokens, allow; the last may need padding.
  """
  of_a_token = sum(-(-x.shape[3] // LANES) * LANES * x.dtype.itemsize for x in arrays)
  at_most = max(min(limit, _RESIDENT_BYTES // of_a_token) // block, 1)
  blocks = pl.cdiv(arrays[0].shape[2], block)
  return block * pl.cdiv(blocks, pl.cdiv(blocks, at_most))


def visit(ranges, index, part, blocks: int, body, at_once: int = 1, first=None) -> None:
  """Calls body(blocks, masked, following) for the blocks of this resident part in the ranges at `index`.

  blocks: one, or two if `at_once` is 2, whose work overlaps: whole ones, and one that is left over
  with one that needs the mask.
  masked: for each of them, whether it needs the mask.
  following: the first block of the next call; in the last call any block of the part.

  `first` is called with the first block before; with any block if there is none.
  """
  start, end, whole_start, whole_end = (
    jnp.clip(ranges[n, *index] - part * blocks, 0, blocks) for n in range(4)
  )
  whole = whole_end - whole_start
  masked = end - start - whole
  ahead = whole_start - start  # Masked ones ahead of the whole ones; the others are behind.

  def at(n):
    """The n-th block: the whole ones come first."""
    m = n - whole
    of_masked = jnp.where(m < ahead, start + m, whole_end + m - ahead)
    return jnp.clip(jnp.where(m < 0, whole_start + n, of_masked), 0, blocks - 1)

  def call(n, *needs_mask):
    body([at(n + i) for i in range(len(needs_mask))], needs_mask, at(n + len(needs_mask)))

  if first is not None:
    first(at(0))
  jax.lax.fori_loop(
    0, div(whole, at_once), lambda n, _: call(at_once * n, *(False,) * at_once), None
  )
  together = jnp.int32(0)
  if at_once == 2:
    left = whole & 1
    together = left & (masked > 0)
    pl.when(together == 1)(lambda: call(whole - 1, False, True))
    pl.when(left > together)(lambda: call(whole - 1, False))
  jax.lax.fori_loop(together, masked, lambda n, _: call(whole + n, True), None)


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


def as_columns(ids, width: int, tokens=slice(None)) -> Tokens:
  """[n, width], each equal along the lanes; width is a multiple of `LANES`."""

  def column(row):
    one = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return jnp.concatenate([one] * (width // LANES), axis=1)  # The same registers.

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


def cost_estimate(products: int, query: Array, count: int, *arrays: Array) -> pl.CostEstimate:
  """What the compiler is told of a kernel: as if all queries attended to all `count` keys.

  Args:
    products: multiplications for a query, head and key.
    query: [batch, heads, seq, key_dim].
    count: keys.
    arrays: of which each is read or written once.
  """
  scores = math.prod(query.shape[:3]) * count
  moved = sum(x.size * x.dtype.itemsize for x in arrays)
  return pl.CostEstimate(flops=2 * products * scores, transcendentals=scores, bytes_accessed=moved)


def compiler_parameters(parallel: int, sequential: int):
  return pltpu.CompilerParams(
    dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential,
    vmem_limit_bytes=_VMEM_BYTES,
  )
