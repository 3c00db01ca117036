"""What a step of decode attention on TPU does with a block of slots; see `mosaic_tpu`."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_blocks import FORBIDDEN, LANES, LOG2_E, dot

Array = jax.Array

_SLOTS = 512  # In a block, of codes twice as many: they have half the bytes, at most.
_BYTES = 2 * 2**20  # Of keys and values, likewise.
VMEM_BYTES = 64 * 2**20


def slots_at_once(keys: Array) -> int:
  """Slots of a block, about."""
  return _SLOTS * (2 if jnp.issubdtype(keys.dtype, jnp.integer) else 1)


def heads_at_once(kv_heads: int, slots: int, *arrays: Array) -> int:
  """Heads of a block of so many slots of keys and values."""
  of_a_slot = sum(-(-x.shape[3] // LANES) * LANES * x.dtype.itemsize for x in arrays)
  fits = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0)
  return max((n for n in fits if n * slots * of_a_slot <= _BYTES), default=1)


class Sums(NamedTuple):
  """References of what is summed over the blocks of a row's heads.

  Attributes:
    largest, total: of the scores and of the weights, [heads, group, LANES], equal along the lanes.
    values: [heads, group, value_dim].
  """

  largest: Array
  total: Array
  values: Array

  @staticmethod
  def scratch(heads: int, group: int, value_dim: int) -> list:
    """float32."""
    shapes = [(heads, group, n) for n in (LANES, LANES, value_dim)]
    return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]

  def begin(self) -> None:
    self.largest[...] = jnp.full_like(self.largest, FORBIDDEN)
    self.total[...] = jnp.zeros_like(self.total)
    self.values[...] = jnp.zeros_like(self.values)

  def finish(self, out, log_sum_exp) -> None:
    """Writes the results of a row's heads, [1, heads, group, value_dim] and [1, heads, group, LANES]."""
    some = self.largest[:, :, :1] > FORBIDDEN / 2
    mean = jnp.where(some, self.values[...] / jnp.where(some, self.total[:, :, :1], 1), 0)
    out[0] = mean.astype(out.dtype)
    of_row = (self.largest[...] + jnp.log2(self.total[...])) / LOG2_E
    log_sum_exp[0] = jnp.where(self.largest[...] > FORBIDDEN / 2, of_row, -jnp.inf)


class Parts(NamedTuple):
  """References of the parts of a block of slots, one behind the other, of some kv heads.

  Attributes:
    keys, values: [heads, slots of the part, channels] each.
    key_scales, value_scales: [heads, 1, slots of the part] each, or empty.
  """

  keys: Sequence[Array]
  values: Sequence[Array]
  key_scales: Sequence[Array]
  value_scales: Sequence[Array]


def attend(
  sums: Sums,
  query,
  parts: Parts,
  first,
  start,
  length,
  slopes,
  first_head,
  *,
  alibi: bool,
  scale: float,
) -> None:
  """Adds a block of slots.

  Args:
    query: reference, [1, heads, group, channels].
    first: slot of the row that the block begins with.
    start, length: the row's.
    slopes, first_head: all heads' slopes, and the first of the block's, if there is `alibi`.
  """
  _, heads, group, _ = query.shape
  of_head = lambda parts, head: jnp.concatenate([x[head] for x in parts]).astype(query.dtype)
  of_all = lambda parts: jnp.concatenate([x[...] for x in parts], axis=2)
  count = sum(x.shape[1] for x in parts.keys)
  slots = first + jax.lax.broadcasted_iota(jnp.int32, (1, count), 1)
  each = range(heads)
  # One stage for all heads after the other: theirs do not wait for each other.
  scores = jnp.stack([dot(query[0, n], of_head(parts.keys, n), (1, 1)) for n in each])
  scores = scores * (scale * LOG2_E)
  if parts.key_scales:
    scores = scores * of_all(parts.key_scales)
  if alibi:
    slope = lambda head, g: jnp.full((1, 1), slopes[first_head + head * group + g])
    of_heads = jnp.stack([jnp.concatenate([slope(n, g) for g in range(group)]) for n in each])
    distance = (slots - (length - 1)).astype(jnp.float32)
    scores = scores + (of_heads * LOG2_E) * distance
  scores = jnp.where((slots >= start) & (slots < length), scores, FORBIDDEN)
  before = sums.largest[:, :, :1]
  now = jnp.maximum(before, scores.max(axis=2, keepdims=True))
  weights = jnp.exp2(scores - now)
  correction = jnp.exp2(before - now)
  summed = correction * sums.total[:, :, :1] + weights.sum(axis=2, keepdims=True)
  if parts.value_scales:
    weights = weights * of_all(parts.value_scales)
  weights = weights.astype(query.dtype)
  of_values = jnp.stack([dot(weights[n], of_head(parts.values, n), (1, 0)) for n in each])
  sums.values[...] = correction * sums.values[...] + of_values
  sums.largest[...] = jnp.broadcast_to(now, sums.largest.shape)
  sums.total[...] = jnp.broadcast_to(summed, sums.total.shape)
