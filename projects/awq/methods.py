"""What is compared, and on what: the methods, the calibration draws and the evaluation text."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import calibration_samples, evaluation_windows
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel
from common.models.decoder import Decoder
from common.quantization.awq import AWQSettings, apply_to_model, search_model
from common.quantization.calibration import (
  gptq_block,
  quantize_model,
  rtn_block,
  smoothquant_block,
)
from common.quantization.quantized_array import IntegerFormat

Array = jax.Array


class Evaluation(NamedTuple):
  """The evaluation text: windows of every domain, {domain: int32 [windows, seq]}."""

  windows: dict[str, np.ndarray]

  def losses(self, model: Decoder) -> WindowLosses:
    """Losses on all domains together."""
    return window_losses(model, np.concatenate(list(self.windows.values())))

  def losses_by_domain(self, model: Decoder) -> dict[str, WindowLosses]:
    return {domain: window_losses(model, w) for domain, w in self.windows.items()}


def integer_format(config: ConfigDict, bits: int) -> IntegerFormat:
  """The weights' format; scales are stored, and evaluated, in float16."""
  return IntegerFormat(bits, config.group_size, scale_dtype=jnp.float16)


def awq_settings(config: ConfigDict, format: IntegerFormat, **changes) -> AWQSettings:
  return AWQSettings(
    format=format,
    scale_grid=config.scale_grid,
    clip_grid=config.clip_grid,
    max_shrink=config.max_shrink,
    scale_stat=config.scale_stat,
    **changes,
  )


def load_evaluation(config: ConfigDict, base: BaseModel) -> Evaluation:
  windows = evaluation_windows(
    config.domains, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
  )
  return Evaluation(windows)


def mixed_calibration(config: ConfigDict, base: BaseModel, seed: int) -> Array:
  """A draw from all domains together, int32 [samples, seq]."""
  return calibration(config, base, ",".join(config.domains), config.calibration_samples, seed)


def calibration(config, base: BaseModel, source: str, count: int, seed: int) -> Array:
  samples = calibration_samples(
    source,
    base.tokenizer,
    num_samples=count,
    seq_len=config.calibration_length,
    seed=seed,
  )
  return jnp.asarray(samples)


def rtn(model: Decoder, format: IntegerFormat) -> Decoder:
  quantized = nnx.clone(model)
  quantized.blocks = nnx.List([rtn_block(block, format) for block in model.blocks])
  return quantized


def gptq(model: Decoder, tokens: Array, format: IntegerFormat, act_order=False) -> Decoder:
  block = lambda i, block, x, context: gptq_block(block, x, context, format, act_order=act_order)
  return quantize_model(model, tokens, block, stream="quantized")


def smoothquant(model: Decoder, tokens: Array, format: IntegerFormat) -> Decoder:
  block = lambda i, block, x, context: smoothquant_block(block, x, context, model.config, format)
  return quantize_model(model, tokens, block, stream="full_precision")


def awq(model: Decoder, tokens: Array, settings: AWQSettings) -> Decoder:
  return apply_to_model(model, search_model(model, tokens, settings), settings.format)


def compared_methods(
  config: ConfigDict, tokens: Array, format: IntegerFormat, ablations: bool
) -> dict[str, Callable[[Decoder], Decoder]]:
  """The main table's methods, beside RTN, for one calibration draw."""
  settings = functools.partial(awq_settings, config, format)
  methods = {"GPTQ": lambda model: gptq(model, tokens, format)}
  if ablations:
    fixed, scales_only = settings(fixed_ratio=0.5, mse_range=False), settings(mse_range=False)
    methods |= {
      "GPTQ act-order": lambda model: gptq(model, tokens, format, act_order=True),
      "SmoothQuant": lambda model: smoothquant(model, tokens, format),
      "AWQ r=0.5, no clip": lambda model: awq(model, tokens, fixed),
      "AWQ, no clip": lambda model: awq(model, tokens, scales_only),
    }
  return methods | {"AWQ": lambda model: awq(model, tokens, settings())}
