"""ResNet and MobileNetV2, folded and quantized unit by unit.

A unit is the stem, a residual block, the last convolution or the classifier. Batch norms are folded
into the convolutions first, as quantized networks are deployed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.mobilenet import MobileNet
from common.models.resnet import ConvNorm, ResNet
from common.models.surgery import get_module, replace_module
from common.quantization.calibration import Streams
from projects.flexround.methods import Layer, run_layer, run_unit

Array = jax.Array

ConvNet = ResNet | MobileNet


class Folded(nnx.Module):
  """Stands where a batch norm was that is now part of its convolution."""

  def __call__(self, x: Array, use_running_average: bool) -> Array:
    del use_running_average
    return x


def fold_batch_norms(model: nnx.Module) -> None:
  """Folds the running statistics of every `ConvNorm` into its convolution, in place."""
  for _, layer in list(nnx.iter_modules(model)):
    if isinstance(layer, ConvNorm) and isinstance(layer.norm, nnx.BatchNorm):
      norm = layer.norm
      gain = norm.scale[...] / jnp.sqrt(norm.var[...] + norm.epsilon)
      layer.conv.kernel = nnx.Param(layer.conv.kernel[...] * gain)
      layer.conv.bias = nnx.Param(norm.bias[...] - norm.mean[...] * gain)
      layer.conv.use_bias = True
      layer.norm = Folded()


class UnitPlace(NamedTuple):
  """Where a unit is, and what its input goes through first."""

  path: str
  before: Callable[[Array], Array]


def units(model: ConvNet) -> list[UnitPlace]:
  """The units in order."""
  same = lambda x: x
  pool = lambda x: nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
  places = [UnitPlace("stem", same)]
  if isinstance(model, ResNet):
    paths = [f"stages.{i}.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage))]
    places += [UnitPlace(path, pool if path == paths[0] else same) for path in paths]
  else:
    paths = ["first", *(f"blocks.{i}" for i in range(len(model.blocks))), "last"]
    places += [UnitPlace(path, same) for path in paths]
  return [*places, UnitPlace("classifier", lambda x: x.mean(axis=(1, 2)))]


def unit_at(model: ConvNet, path: str) -> nnx.Module:
  """The unit at `path`; a classifier as a `Layer`."""
  unit = get_module(model, path)
  return Layer(unit) if isinstance(unit, nnx.Linear) else unit


def run_conv_unit(unit: nnx.Module, x: Array, context) -> Array:
  """Output of a stem, block or last convolution."""
  del context
  return unit(x, False)


class Score(NamedTuple):
  """A quantized network on images that were not used for calibration.

  Attributes:
    accuracy: top-1.
    logit_error: mean squared difference of its logits from full precision's; None if not measured.
  """

  accuracy: float
  logit_error: float | None = None


class Network(NamedTuple):
  """What an experiment quantizes.

  Attributes:
    model: in full precision, its batch norms folded.
    images: to calibrate on, float32 [samples, height, width, channels].
    score: of a copy of the model.
  """

  model: ConvNet
  images: Array
  score: Callable[[ConvNet], Score]


# (index, is it the first or the last, unit, its inputs, how it runs) -> quantized unit
QuantizeUnit = Callable[[int, bool, nnx.Module, Streams, Callable], nnx.Module]


def quantize_network(model: ConvNet, images: Array, quantize: QuantizeUnit) -> ConvNet:
  """A copy of a folded network with every unit quantized, in order.

  Args:
    model: in full precision; not modified.
    images: to calibrate on, [samples, height, width, channels].
    quantize: returns the quantized unit; a classifier comes as a `Layer`.
  """
  quantized, streams = nnx.clone(model), Streams(images, images)
  places = units(model)
  for i, (path, before) in enumerate(places):
    unit = unit_at(model, path)
    single = isinstance(unit, Layer)
    run = run_layer if single else run_conv_unit
    streams = Streams(*map(before, streams))
    new = quantize(i, i in (0, len(places) - 1), unit, streams, run)
    streams = Streams(
      run_unit(unit, streams.full_precision, None, run),
      run_unit(new, streams.quantized, None, run),
    )
    replace_module(quantized, path, new.layer if single else new)
  return quantized
