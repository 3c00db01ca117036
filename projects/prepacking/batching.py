"""How a list of prompts becomes batches: padded, sorted by length, or packed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.decoding.bin_packing import Bins, Packer, best_fit_decreasing

Prompts = Sequence[Sequence[int]]

# The ways of batching.
PREPACKING, DATASET = "prepacking", "dataset prepacking"
ORDERED, FULL = "length-ordered", "full-batching"


class Batch(NamedTuple):
  """Prompts that are read in one pass.

  Attributes:
    prompts: token ids.
    bins: which of them share a row; None if each has a row, padded to the longest.
  """

  prompts: Prompts
  bins: Bins | None = None

  @property
  def lengths(self) -> list[int]:
    return [len(prompt) for prompt in self.prompts]


def full_batching(prompts: Prompts, batch_size: int) -> list[Batch]:
  """Batches in the given (random) order, padded to the longest of each."""
  return [Batch(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]


def length_ordered(prompts: Prompts, batch_size: int) -> list[Batch]:
  """Batches of prompts sorted by their tokens, padded to the longest of each."""
  return full_batching(sorted(prompts, key=len), batch_size)


def prepacked(
  prompts: Prompts, batch_size: int, packer: Packer = best_fit_decreasing
) -> list[Batch]:
  """The batches of `full_batching`, each packed into rows as long as its longest prompt."""
  return [pack_batch(batch.prompts, packer) for batch in full_batching(prompts, batch_size)]


def pack_batch(prompts: Prompts, packer: Packer = best_fit_decreasing) -> Batch:
  """One batch, packed. Its capacity is the longest prompt's length, though a token less is packed."""
  lengths = [len(prompt) for prompt in prompts]
  return Batch(prompts, packer(lengths, max(lengths)))


def dataset_prepacked(
  prompts: Prompts, batch_size: int, seed: int, packer: Packer = best_fit_decreasing
) -> list[Batch]:
  """The whole data set is packed once, the bins are shuffled, and `batch_size` of them are a batch."""
  whole = pack_batch(prompts, packer)
  order = np.random.default_rng(seed).permutation(len(whole.bins))
  batches = []
  for start in range(0, len(order), batch_size):
    bins = [whole.bins[i] for i in order[start : start + batch_size]]
    chosen = sorted(item for items in bins for item in items)
    new = {item: i for i, item in enumerate(chosen)}
    batches.append(Batch([prompts[i] for i in chosen], [[new[i] for i in items] for items in bins]))
  return batches


def batchings(prompts: Prompts, batch_size: int, seed: int) -> dict[str, list[Batch]]:
  """Every way of batching the same prompts, the least memory first."""
  return {
    PREPACKING: prepacked(prompts, batch_size),
    DATASET: dataset_prepacked(prompts, batch_size, seed),
    ORDERED: length_ordered(prompts, batch_size),
    FULL: full_batching(prompts, batch_size),
  }
