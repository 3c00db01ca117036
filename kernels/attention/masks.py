"""Which query may attend to which key: the rule that all implementations share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Tokens(NamedTuple):
  """Where tokens stand.

  Attributes:
    positions: int32 [batch, tokens], within the segment.
    segment_ids: int32 [batch, tokens]; 0 marks padding.
  """

  positions: Array
  segment_ids: Array


class Rule(NamedTuple):
  """What holds besides segments: a query attends to keys of its own segment only, never to padding.

  Attributes:
    causal: only to keys whose position is not after its own.
    sliding_window: only to keys less than so many positions before its own; None for all.
  """

  causal: bool = True
  sliding_window: int | None = None


def may_attend(queries: Tokens, keys: Tokens, rule: Rule) -> Array:
  """bool, of the shape to which the two broadcast."""
  allowed = (queries.segment_ids == keys.segment_ids) & (keys.segment_ids != 0)
  distance = queries.positions - keys.positions
  if rule.causal:
    allowed &= distance >= 0
  if rule.sliding_window is not None:
    allowed &= distance < rule.sliding_window
  return allowed


def blocks_that_meet(
  queries: Tokens, keys: Tokens, rule: Rule, query_block: int, key_block: int
) -> Array:
  """Which blocks of queries may attend to anything in which blocks of keys.

  It looks at the smallest and largest segment and position of a block only: it may say yes where
  the answer is no, never the other way round.

  Args:
    queries, keys: whose numbers are multiples of the blocks'.

  Returns:
    bool [batch, query blocks, key blocks].
  """
  far = jnp.iinfo(jnp.int32).max // 2

  def bounds(tokens: Tokens, block: int):
    real = tokens.segment_ids != 0

    def of(values):
      split = lambda x: x.reshape(len(x), -1, block)
      low = split(jnp.where(real, values, far)).min(axis=-1)
      return low, split(jnp.where(real, values, -far)).max(axis=-1)

    return of(tokens.segment_ids), of(tokens.positions)

  (q_first, q_last), (q_low, q_high) = bounds(queries, query_block)
  (k_first, k_last), (k_low, k_high) = bounds(keys, key_block)
  row, column = lambda x: x[:, :, None], lambda x: x[:, None, :]
  meet = (row(q_first) <= column(k_last)) & (column(k_first) <= row(q_last))
  if rule.causal:
    meet &= row(q_high) >= column(k_low)
  if rule.sliding_window is not None:
    meet &= row(q_low) - column(k_high) < rule.sliding_window
  return meet


class Span(NamedTuple):
  """The smallest and largest segment and position of a block's tokens, padding included."""

  first_segment: Array
  last_segment: Array
  first_position: Array
  last_position: Array


def block_spans(tokens: Tokens, block: int) -> Span:
  """int32 [batch, blocks] each; the number of tokens is a multiple of `block`."""
  split = lambda x: x.reshape(len(x), -1, block)
  segments, positions = split(tokens.segment_ids), split(tokens.positions)
  return Span(segments.min(-1), segments.max(-1), positions.min(-1), positions.max(-1))


def all_may_attend(queries: Span, keys: Span, rule: Rule) -> Array:
  """Whether every query of a block may attend to every key of another."""
  allowed = (
    (queries.first_segment == queries.last_segment)
    & (keys.first_segment == keys.last_segment)
    & (queries.first_segment == keys.first_segment)
    & (keys.first_segment != 0)
  )
  if rule.causal:
    allowed &= queries.first_position >= keys.last_position
  if rule.sliding_window is not None:
    allowed &= queries.last_position - keys.first_position < rule.sliding_window
  return allowed
