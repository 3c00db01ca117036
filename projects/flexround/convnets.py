"""Small ResNet and MobileNetV2 on the digits of scikit-learn: trained, folded, quantized unit by unit.

A unit is the stem, a residual block, the last convolution or the classifier. Batch norms are folded
into the convolutions first, as quantized networks are deployed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common.errors import UserError
from common.models.mobilenet import MobileNet, MobileNetConfig, Stage
from common.models.resnet import ConvNorm, ResNet, ResNetConfig
from common.models.surgery import get_module, replace_module
from common.quantization.calibration import Streams
from projects.flexround.methods import Layer, run_layer, run_unit

Array = jax.Array

NUM_TRAIN = 1200
SIDE = 16  # Digits are 8 x 8 pixels; residual networks shrink an image by more than that.
LABELS = tuple("0123456789")
NETWORKS = {
  "ResNet": ResNetConfig(
    embedding_size=16,
    hidden_sizes=(16, 32, 64),
    depths=(1, 1, 1),
    block="basic",
    num_channels=1,
    labels=LABELS,
  ),
  # For tests.
  "ResNet, one block": ResNetConfig(
    embedding_size=8,
    hidden_sizes=(8,),
    depths=(1,),
    block="basic",
    num_channels=1,
    labels=LABELS,
  ),
  # Narrow: XLA's depthwise gradients are slow on CPUs.
  "MobileNetV2": MobileNetConfig(
    stem_channels=8,
    stages=(Stage(1, 8, 1, 1), Stage(3, 12, 1, 2), Stage(3, 16, 1, 2)),
    head_channels=32,
    num_channels=1,
    labels=LABELS,
  ),
}

ConvNet = ResNet | MobileNet


class Digits(NamedTuple):
  """Images float32 [n, SIDE, SIDE, 1] in [-1, 1] and labels int32 [n]."""

  train_images: Array
  train_labels: Array
  test_images: Array
  test_labels: Array


def load(seed: int) -> Digits:
  """A stratified split of the digits: 1200 to train on, 597 to test."""
  images, labels = load_digits(return_X_y=True)
  images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
  images = jax.image.resize(images, (len(images), SIDE, SIDE, 1), "bilinear")
  train, test = train_test_split(
    np.arange(len(labels)), train_size=NUM_TRAIN, stratify=labels, random_state=seed
  )
  labels = jnp.asarray(labels, jnp.int32)
  return Digits(images[train], labels[train], images[test], labels[test])


def train(name: str, digits: Digits, *, num_steps: int, seed: int, batch_size: int = 64) -> ConvNet:
  """A network of `NETWORKS` trained on the digits, its batch norms folded.

  Raises:
    UserError: there is no such network.
  """
  if name not in NETWORKS:
    raise UserError(f"network={name!r} is not supported; supported: {', '.join(NETWORKS)}")
  config = NETWORKS[name]
  kind = ResNet if isinstance(config, ResNetConfig) else MobileNet
  model = kind(config, rngs=nnx.Rngs(seed))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  data, key = (digits.train_images, digits.train_labels), jax.random.key(seed)
  params, rest = _train(graphdef, num_steps, batch_size, params, rest, data, key)
  model = nnx.merge(graphdef, params, rest)
  fold_batch_norms(model)
  return model


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(graphdef, num_steps, batch_size, params, rest, data, key):
  images, labels = data
  optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))

  def step(carry, key):
    params, rest, state = carry
    rows = jax.random.choice(key, len(images), (batch_size,), replace=False)

    def loss_fn(params):
      model = nnx.merge(graphdef, params, rest, copy=True)  # It updates its statistics.
      logits = model(images[rows], train=True).logits
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()
      return loss, nnx.state(model, nnx.Not(nnx.Param))

    gradient, rest = jax.grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), rest, state), None

  carry = (params, rest, optimizer.init(params))
  (params, rest, _), _ = jax.lax.scan(step, carry, jax.random.split(key, num_steps))
  return params, rest


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
    places += [UnitPlace(f"blocks.{i}", same) for i in range(len(model.blocks))]
    places.append(UnitPlace("last", same))
  return [*places, UnitPlace("classifier", lambda x: x.mean(axis=(1, 2)))]


def unit_at(model: ConvNet, path: str) -> nnx.Module:
  """The unit at `path`; a classifier as a `Layer`."""
  unit = get_module(model, path)
  return Layer(unit) if isinstance(unit, nnx.Linear) else unit


def run_conv_unit(unit: nnx.Module, x: Array, context) -> Array:
  """Output of a stem, block or last convolution."""
  del context
  return unit(x, False)


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


def logits(model: ConvNet, images: Array) -> Array:
  """float32 [n, classes]."""
  return _logits(*nnx.split(model), images)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, images):
  return nnx.merge(graphdef, state)(images).logits
