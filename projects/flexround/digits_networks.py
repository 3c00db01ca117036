"""Small ResNet and MobileNetV2, trained on the digits of scikit-learn."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common.errors import UserError
from common.models.mobilenet import MobileNet, MobileNetConfig, Stage
from common.models.resnet import ResNet, ResNetConfig
from projects.flexround.convnets import ConvNet, Network, Score, fold_batch_norms

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
  # Split on the host, where nothing is compiled for it.
  images = np.asarray(jax.image.resize(images, (len(images), SIDE, SIDE, 1), "bilinear"))
  train, test = train_test_split(
    np.arange(len(labels)), train_size=NUM_TRAIN, stratify=labels, random_state=seed
  )
  labels = labels.astype(np.int32)
  return jax.device_put(Digits(images[train], labels[train], images[test], labels[test]))


def digits_network(config: ConfigDict, name: str, seed: int) -> Network:
  """A network of `NETWORKS`, its calibration images, and how its copies do on the test images.

  Args:
    config: the number of training steps and of calibration images.
    name: of the network.
    seed: of the split, the training and the draw of calibration images.
  """
  digits = load(seed)
  model = train(name, digits, num_steps=config.train_steps, seed=seed)
  rows = np.random.default_rng(seed).permutation(NUM_TRAIN)[: config.calibration_images]
  target = logits(model, digits.test_images)

  def score(quantized: ConvNet) -> Score:
    found = logits(quantized, digits.test_images)
    top1 = float(jnp.mean(found.argmax(axis=-1) == digits.test_labels))
    return Score(top1, float(jnp.mean((found - target) ** 2)))

  return Network(model, digits.train_images[rows], score)


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


def logits(model: ConvNet, images: Array) -> Array:
  """float32 [n, classes]."""
  return _logits(*nnx.split(model), images)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, images):
  return nnx.merge(graphdef, state)(images).logits
