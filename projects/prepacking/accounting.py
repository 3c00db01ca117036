"""What a batch costs, counted: token slots, floating-point operations, bytes of keys and values."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from common.decoding.generation import bucket
from common.decoding.prepacking import pack
from common.models.decoder import DecoderConfig
from kernels.attention.masks import Rule, Tokens, blocks_that_meet
from projects.prepacking.batching import Batch

# Tokens of a block of the segment-aware kernel, which skips blocks of which no pair may attend.
KERNEL_BLOCK = 128


class Slots(NamedTuple):
  """Token slots of a batch.

  Attributes:
    rows, length: of the pass.
    held_back: last tokens, read in a pass of their own.
    tokens: of the prompts.
  """

  rows: int
  length: int
  held_back: int
  tokens: int

  @property
  def in_pass(self) -> int:
    """Slots of the pass, which its peak memory is proportional to."""
    return self.rows * self.length

  @property
  def total(self) -> int:
    """All that is computed until the first new tokens are known."""
    return self.in_pass + self.held_back

  @property
  def waste(self) -> int:
    """Slots without a token."""
    return self.total - self.tokens


def slots(batch: Batch) -> Slots:
  """Slots as the method defines them, without padding to buckets."""
  lengths = batch.lengths
  if batch.bins is None:
    return Slots(len(lengths), max(lengths) - 1, len(lengths), sum(lengths))
  longest = max(sum(lengths[i] - 1 for i in items) for items in batch.bins)
  return Slots(len(batch.bins), longest, len(lengths), sum(lengths))


def attention_pairs(batch: Batch) -> dict[str, int]:
  """Pairs of a query and a key whose scores are computed in one layer and head.

  Returns:
    "dense" of the masked reference, "kernel" of one that skips blocks of 128 x 128 of which no pair
    may attend, and "needed": those that may. Held-back tokens count with the keys of their prompt, in
    the dense reference with those of the longest.
  """
  found = slots(batch)
  needed = sum(n * (n + 1) // 2 for n in batch.lengths)
  last_dense, last = found.held_back * max(batch.lengths), sum(batch.lengths)
  if not found.length:
    return {"dense": last_dense, "kernel": last, "needed": needed}
  tokens = _tokens(batch, found)
  return {
    "dense": found.rows * found.length**2 + last_dense,
    "kernel": int(_visited_blocks(tokens)) * KERNEL_BLOCK**2 + last,
    "needed": needed,
  }


def flops(batch: Batch, config: DecoderConfig, attention: str = "dense") -> int:
  """Floating-point operations until the first new tokens are known, two for a multiply-add.

  The products of the linear layers, of attention, and of the head for one token of each prompt.
  (The last block of a pass counts like the others; a compiler drops all but its keys and values.)

  Args:
    attention: a name in `attention_pairs`.
  """
  query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  mlp = (3 if config.gated_mlp else 2) * config.hidden_size * config.intermediate_size
  linear = 2 * config.hidden_size * (query + kv) + mlp
  pairs = attention_pairs(batch)[attention]
  layer = 2 * linear * slots(batch).total + 4 * query * pairs
  return config.num_layers * layer + 2 * config.hidden_size * config.vocab_size * len(batch.prompts)


def kv_slots(batch: Batch) -> tuple[int, int]:
  """Slots of the pass's cache, and with the unpacked cache beside it (the same if padded)."""
  found = slots(batch)
  unpacked = len(batch.prompts) * (max(batch.lengths) - 1) if batch.bins is not None else 0
  return found.in_pass, found.in_pass + unpacked


def kv_bytes_per_slot(config: DecoderConfig, itemsize: int) -> int:
  """Bytes of the keys and values of a token in all layers."""
  return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def largest_batch(prompts: Sequence[Sequence[int]], budget: int, cost) -> int:
  """The most of the prompts, from the first on, whose cost is at most `budget`; by bisection.

  Args:
    cost: prompts -> slots; grows with them but for the packing's remainders.
  """
  low, high = 0, len(prompts)
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if cost(prompts[:middle]) <= budget else (low, middle - 1)
  return low


@jax.jit
def _visited_blocks(tokens: Tokens) -> jax.Array:
  return blocks_that_meet(tokens, tokens, Rule(), KERNEL_BLOCK, KERNEL_BLOCK).sum()


def _tokens(batch: Batch, found: Slots) -> Tokens:
  """Positions and segments of the pass, padded to whole blocks; padded prompts are on the left."""
  if batch.bins is None:
    lengths = np.array(batch.lengths)[:, None] - 1
    segment_ids = np.arange(found.length) >= found.length - lengths
    segment_ids = segment_ids.astype(np.int32)
    positions = np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0).astype(np.int32)
  else:
    packed = pack(batch.prompts, batch.bins)
    positions, segment_ids = packed.positions, packed.segment_ids
  # Few shapes, of which each is compiled: rows of padding are not visited.
  pad = (
    (0, bucket(len(positions)) - len(positions)),
    (0, -positions.shape[1] % (4 * KERNEL_BLOCK)),
  )
  return Tokens(np.pad(positions, pad), np.pad(segment_ids, pad))
