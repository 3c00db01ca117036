"""What is compared: the settings' formats, QLLM, its baselines and its ablations."""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from common.errors import UserError
from common.models.decoder import Decoder
from common.quantization.activations import ActivationFormat
from common.quantization.quantized_array import IntegerFormat
from projects.qllm.baselines import omniquant, outlier_suppression_plus, rtn_model, smoothquant
from projects.qllm.qllm import RoundLog, quantize
from projects.qllm.settings import Settings, Tuning

Array = jax.Array


class Quantized(NamedTuple):
  """A quantized decoder; of QLLM also what happened in its rounds."""

  model: Decoder
  rounds: list[RoundLog]


# (model, calibration tokens, key) -> quantized.
Method = Callable[[Decoder, Array, Array], Quantized]


def settings_of(config: ConfigDict, name: str) -> Settings:
  """QLLM at the formats that "WxAy" names: per output channel and per token, asymmetric.

  Raises:
    UserError: there is no such format.
  """
  match = re.fullmatch(r"W([23468])A([2-8])", name)
  if not match:
    raise UserError(
      f"settings={name!r} is not supported; expected WxAy with x of 2, 3, 4, 6, 8 and y of 2 to 8"
    )
  return Settings(
    IntegerFormat(int(match[1])),
    ActivationFormat(int(match[2]), include_zero=False),
    channel_ratio=config.channel_ratio,
    score=config.score,
    search_samples=config.search_samples,
    tuning=Tuning(
      rank=config.rank,
      blocks_per_round=config.blocks_per_round,
      merge=config.merge,
      epochs=config.epochs,
      batch_size=config.batch_size,
      learning_rate=config.learning_rate,
      final_norm=config.final_norm,
      sample_memory=config.sample_memory,
    ),
  )


def qllm(settings: Settings, **changes) -> Method:
  """QLLM with some of its settings changed."""
  changed = dataclasses.replace(settings, **changes)
  return lambda model, tokens, key: Quantized(*quantize(model, tokens, changed, key))


def main_methods(config: ConfigDict, settings: Settings) -> dict[str, Method]:
  """The method, its halves, and the baselines."""
  reconstruction = settings.tuning.reconstruction(config.calibration_samples)
  return {
    "RTN": lambda model, tokens, key: Quantized(rtn_model(model, settings), []),
    "SmoothQuant": lambda model, tokens, key: Quantized(
      smoothquant(model, tokens, settings, config.smoothquant_alphas), []
    ),
    "OS+": lambda model, tokens, key: Quantized(
      outlier_suppression_plus(model, tokens, settings, config.osplus_lower_fraction), []
    ),
    "OmniQuant": lambda model, tokens, key: Quantized(
      omniquant(model, tokens, settings, reconstruction, config.omniquant_learning_rate, key),
      [],
    ),
    "EEC only": qllm(settings, reassembly="none"),
    "QLLM, no tuning": qllm(settings, tuning=None),
    "QLLM": qllm(settings),
  }


def reassembly_ablations(config: ConfigDict, settings: Settings) -> dict[str, Method]:
  """Other reassemblies and thresholds, all without tuning."""
  change = lambda **changes: qllm(settings, tuning=None, **changes)
  return {
    "disassembly only (wider)": change(reassembly="disassembly"),
    "assembly only (narrower)": change(reassembly="assembly"),
    "disassembly, pruning": change(reassembly="pruning"),
    "exact score of pairs": change(score="exact"),
    "fixed threshold": change(threshold=config.fixed_threshold),
    "fixed ratio": change(threshold="ratio"),
  }


def tuning_ablations(config: ConfigDict, settings: Settings) -> dict[str, Method]:
  """Other ways of tuning, all with reassembly."""
  change = lambda **changes: qllm(settings, tuning=dataclasses.replace(settings.tuning, **changes))
  rate = config.all_weights_learning_rate
  return {
    "all quantized weights (TQW)": change(learn="all_weights", learning_rate=rate),
    "merge without rounding": change(merge="keep"),
    **{f"rank {rank}": change(rank=rank) for rank in config.ranks},
    **{f"{count} blocks per round": change(blocks_per_round=count) for count in config.rounds},
  }
