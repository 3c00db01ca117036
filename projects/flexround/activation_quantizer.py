"""LSQ activation quantizer: a step per layer that is learned with the weights' rounding.

x_hat = s (clip(round(x / s), -z, 2^n - 1 - z)),  z fixed at initialisation      (per tensor)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.surgery import get_module, replace_module
from common.quantization.activations import (
  ActivationFormat,
  QuantizedInput,
  range_to_scale,
  static_range,
)
from common.quantization.reconstruction import Learned
from common.quantization.straight_through import lsq

Array = jax.Array


class LearnedInput(nnx.Module):
  """A layer whose input is rounded by LSQ with an asymmetric step for the whole tensor.

  What is learned is log(s / s0), so that one rate serves steps of any magnitude.
  """

  def __init__(self, layer: nnx.Module, format: ActivationFormat, low: Array, high: Array):
    self.layer = layer
    self.format = format
    step, zero_point = range_to_scale(low, high, format)
    self.initial_step, self.zero_point = nnx.Param(step), nnx.Param(zero_point)
    self.log_step = Learned(jnp.zeros_like(step))

  def step(self) -> Array:
    """s, float32 []."""
    return self.initial_step[...] * jnp.exp(self.log_step[...])

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    smallest, largest = self.format.code_range
    zero = self.zero_point[...]
    rounded = lsq(x.astype(jnp.float32), self.step(), (smallest - zero, largest - zero))
    return self.layer(rounded.astype(x.dtype))


def learn_inputs(module: nnx.Module, inputs: dict[str, Array], format: ActivationFormat) -> None:
  """Lets the layers at the paths of `inputs` learn their input's step, in place.

  Args:
    module: a block.
    inputs: {path of a layer: its calibration inputs}; the step starts in the range with the least
      squared error on them.
    format: a per-tensor format.
  """
  for path, x in inputs.items():
    low, high = static_range(x, format, "mse")
    replace_module(module, path, LearnedInput(get_module(module, path), format, low, high))


def freeze_inputs(module: nnx.Module) -> None:
  """Turns every `LearnedInput` into a plain `QuantizedInput` with the learned range, in place."""
  found = [
    (".".join(map(str, path)), layer)
    for path, layer in nnx.iter_modules(module)
    if isinstance(layer, LearnedInput)
  ]
  for path, layer in found:
    smallest, largest = layer.format.code_range
    low, high = ((c - layer.zero_point[...]) * layer.step() for c in (smallest, largest))
    replace_module(module, path, QuantizedInput(layer.layer, layer.format, low, high))
