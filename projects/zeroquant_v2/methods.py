"""From the config to a quantized model: the four methods, and LoRC on top of any of them."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from common.models.decoder import Decoder
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.calibration import quantize_model
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.low_rank import bits_per_weight
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings
from projects.zeroquant_v2.evaluation import Factors, Weights, dense_kernels
from projects.zeroquant_v2.zeroquant_v2 import (
  ZeroQuantSettings,
  compensate,
  quantize_weights,
)

Array = jax.Array


def integer_format(bits: int, group_size: int, symmetric: bool = False) -> IntegerFormat:
  """The weights' format; scales are stored, and evaluated, in float16."""
  return IntegerFormat(bits, group_size, symmetric=symmetric, scale_dtype=jnp.float16)


def settings_of(
  config: ConfigDict,
  method: str,
  format: IntegerFormat,
  activations: ActivationFormat | None = None,
) -> ZeroQuantSettings:
  """The config's settings of a method. (LoRC is applied to the finished model, see `factors_of`.)"""
  return ZeroQuantSettings(
    method=method,
    format=format,
    scale_rule=config.scale_rule,
    activations=activations,
    inputs=config.inputs,
    damping=config.damping,
    learning_rates=tuple(config.learning_rates),
    distillation=ReconstructionSettings(
      config.distillation_steps,
      config.distillation_batch_size,
      sample_memory=config.sample_memory,
    ),
  )


def quantize_model_weights(
  model: Decoder, tokens: Array | None, settings: ZeroQuantSettings, seed: int = 0
) -> Weights:
  """Packed weights of every block.

  Args:
    model: in full precision.
    tokens: calibration text, int32 [samples, seq]; RTN needs none.
    settings: the method.
    seed: of the batches of ZQ-*.
  """
  if settings.method == "RTN":
    return [quantize_weights(i, b, None, None, None, settings) for i, b in enumerate(model.blocks)]
  key, found = jax.random.key(seed), []

  def block(index, block, x, context):
    weights = quantize_weights(index, block, x, context, key, settings)
    found.append(weights)
    # What the next block sees, in plain layers.
    quantized = nnx.clone(block)
    set_kernels(quantized, dense_kernels(weights, {}))
    if settings.activations is not None:
      quantize_inputs(quantized, list(weights), settings.activations)
    return quantized

  quantize_model(model, tokens, block, stream=settings.inputs)
  return found


def factors_of(model: Decoder, weights: Weights, rank: int, factor_bits: int) -> Factors:
  """LoRC's factors of every block of a quantized model."""
  correct = functools.partial(compensate, rank=rank, factor_bits=factor_bits)
  return [correct(get_kernels(b), dict(w)) for b, w in zip(model.blocks, weights, strict=True)]


def stored_bits(weights: Weights, factors: Factors) -> float:
  """Bits per weight of a model's blocks."""
  flat = lambda blocks: [value for block in blocks for value in block.values()]
  return bits_per_weight(flat(weights), flat(factors))
