"""What a run measures, before it becomes tables."""

from typing import NamedTuple

from projects.prepacking.agreement import Agreement
from projects.prepacking.timing import Timed


class Counts(NamedTuple):
  """A way of batching over a data set, counted.

  Attributes:
    batches: passes.
    slots: all that are computed, held-back tokens included.
    tokens: of the prompts.
    dense_flops, kernel_flops: with masked attention, and with one that skips blocks.
    peak_slots: of the largest pass.
    peak_kv_slots: of its cache and the unpacked one together.
  """

  batches: int
  slots: int
  tokens: int
  dense_flops: int
  kernel_flops: int
  peak_slots: int
  peak_kv_slots: int


class Draw(NamedTuple):
  """A batch of the sweep over lengths; ratios are full-batching over prepacking.

  Attributes:
    long: of its prompts that have the full length.
    reduction: k / B, prompts over packed rows.
    spread: longest minus mean length, in tokens.
    slots, flops, prefill, first_token: ratios.
  """

  long: int
  reduction: float
  spread: float
  slots: float
  flops: float
  prefill: float
  first_token: float


class Packing(NamedTuple):
  """A packer on small batches: means."""

  bins: float
  slots: float
  waste: float
  seconds: float


class Results(NamedTuple):
  """What a run measured; lists are over seeds.

  Attributes:
    counts: {batch size: {method: [...]}}; timed likewise.
    sweep: draws of each seed.
    feasible: {method: [(within the slots of the pass, with the unpacked cache beside them)]}.
    packings: {packer: ...}, all seeds together.
    distributions: {(source, clip): {method: [Counts]}} at the first batch size.
    sizes: {width: the draw of no long prompts}.
    public_sizes: {model: counted on the same prompts as `counts` at the first batch size}.
  """

  agreements: list[Agreement]
  counts: dict[int, dict[str, list[Counts]]]
  timed: dict[int, dict[str, list[Timed]]]
  sweep: list[list[Draw]]
  feasible: dict[str, list[tuple[int, int]]]
  packings: dict[str, Packing]
  distributions: dict[tuple[str, int], dict[str, list[Counts]]]
  sizes: dict[int, Draw]
  public_sizes: dict[str, dict[str, list[Counts]]]
