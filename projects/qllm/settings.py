"""What QLLM does: formats, reassembly, tuning."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from common.errors import UserError
from common.quantization.activations import ActivationFormat
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import (
  ReconstructionSettings,
  SampleMemory,
  check_sample_memory,
)

# The largest share of extra channels for which enough unsplit channels to merge are left, whatever
# the activations are.
LARGEST_RATIO = 0.2


def _check_choice(name: str, value: str, supported: Sequence[str]) -> None:
  if value not in supported:
    raise UserError(f"{name}={value!r} is not supported; supported: {', '.join(supported)}")


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How a round is tuned.

  Attributes:
    learn: "low_rank" terms, or "all_weights" (the baseline TQW). Norm gains and biases are learned
      with either.
    rank: r of the low-rank terms.
    blocks_per_round: blocks tuned jointly.
    merge: see `error_correction`.
    epochs, batch_size, learning_rate: of AdamW, linearly to 0.
    final_norm: also tune the final norm, with a bias.
    sample_memory: see `ReconstructionSettings`.
  """

  learn: Literal["low_rank", "all_weights"] = "low_rank"
  rank: int = 4
  blocks_per_round: int = 4
  merge: Literal["requant", "keep"] = "requant"
  epochs: int = 10
  batch_size: int = 1
  learning_rate: float = 5e-4
  final_norm: bool = True
  sample_memory: SampleMemory = "device"

  def __post_init__(self):
    _check_choice("learn", self.learn, ("low_rank", "all_weights"))
    _check_choice("merge", self.merge, ("requant", "keep"))
    check_sample_memory(self.sample_memory)
    if min(self.rank, self.blocks_per_round, self.epochs, self.batch_size) < 1:
      raise UserError(
        f"rank={self.rank}, blocks_per_round={self.blocks_per_round}, epochs={self.epochs}, "
        f"batch_size={self.batch_size}; expected at least 1 each"
      )

  def steps(self, samples: int) -> int:
    """Optimizer steps of a round."""
    return self.epochs * max(1, samples // self.batch_size)

  def reconstruction(self, samples: int) -> ReconstructionSettings:
    """The same as `reconstruct` takes it; the last parameters are kept."""
    return ReconstructionSettings(
      self.steps(samples), self.batch_size, keep_best=False, sample_memory=self.sample_memory
    )


@dataclasses.dataclass(frozen=True)
class Settings:
  """The formats, and which parts of QLLM. The defaults are the paper's.

  Attributes:
    weights: every linear's format, per output channel in the paper.
    activations: of every linear's input, and of queries, keys and values.
    reassembly: "none", or of `channel_reassembly.Kind`.
    threshold: "adaptive", the search; "ratio", the smallest of its grid that the ratio admits; or a
      number, raised to that one where the ratio does not admit it.
    channel_ratio: gamma, the largest share of extra channels.
    score: which pairs are merged, see `pair_scores`.
    search_samples: calibration samples that the search and the scores are computed on. Channel
      maxima are of all.
    tuning: of a round; None leaves the rounded blocks as they are.

  Raises:
    UserError: a value is outside the supported set.
  """

  weights: IntegerFormat
  activations: ActivationFormat
  reassembly: Literal["none", "disassembly", "assembly", "pruning", "both"] = "both"
  threshold: Literal["adaptive", "ratio"] | float = "adaptive"
  channel_ratio: float = 0.2
  score: Literal["code", "exact"] = "code"
  search_samples: int = 1
  tuning: Tuning | None = Tuning()

  def __post_init__(self):
    kinds = ("none", "disassembly", "assembly", "pruning", "both")
    _check_choice("reassembly", self.reassembly, kinds)
    _check_choice("score", self.score, ("code", "exact"))
    if isinstance(self.threshold, str):
      _check_choice("threshold", self.threshold, ("adaptive", "ratio"))
    elif not self.threshold > 0:
      raise UserError(f"threshold={self.threshold}; expected a positive number")
    if not 0 < self.channel_ratio <= LARGEST_RATIO:
      raise UserError(
        f"channel_ratio={self.channel_ratio}; expected more than 0 and at most {LARGEST_RATIO}: with "
        "more extra channels there may be too few unsplit ones to merge"
      )
    if self.search_samples < 1:
      raise UserError(f"search_samples={self.search_samples}; expected at least 1")

  def max_extra(self, channels: int) -> int:
    """The largest number of extra channels of a site."""
    # 0.2 of 15 are 3, not 2.9999.
    return int(self.channel_ratio * channels + 1e-6)
