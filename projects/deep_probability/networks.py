"""The networks: two logits for an input, as the paper's."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.resnet import ResNet, ResNetConfig

Array = jax.Array


class Network(NamedTuple):
  """What is trained.

  Attributes:
    kind: "mlp", or "resnet18" for images [height, width, 3].
    features: d, of the mlp.
    hidden: widths of the mlp's hidden layers; () is a linear model.
  """

  kind: str
  features: int = 0
  hidden: tuple[int, ...] = ()


class Weights(NamedTuple):
  """Parameters, and the running statistics of batch normalisation where there are any."""

  params: nnx.State
  statistics: nnx.State


class Mlp(nnx.Module):
  """Hidden layers with ReLU, and two logits."""

  def __init__(self, features: int, hidden: tuple[int, ...], *, rngs: nnx.Rngs):
    widths = (features, *hidden, 2)
    self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:])])

  def __call__(self, x: Array, *, train: bool) -> Array:
    """[n, d] -> [n, 2]; training changes nothing."""
    for layer in self.layers[:-1]:
      x = nnx.relu(layer(x))
    return self.layers[-1](x)


class ResNet18(nnx.Module):
  """ResNet-18 with two logits."""

  def __init__(self, *, rngs: nnx.Rngs):
    config = ResNetConfig(
      64, (64, 128, 256, 512), (2, 2, 2, 2), block="basic", labels=("no event", "event")
    )
    self.resnet = ResNet(config, rngs=rngs)

  def __call__(self, x: Array, *, train: bool) -> Array:
    """[n, height, width, 3] -> [n, 2]."""
    return self.resnet(x, train=train).logits


def _make(network: Network, rngs: nnx.Rngs) -> nnx.Module:
  if network.kind == "resnet18":
    return ResNet18(rngs=rngs)
  return Mlp(network.features, network.hidden, rngs=rngs)


@functools.lru_cache
def _graph(network: Network) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(lambda: _make(network, nnx.Rngs(0))), nnx.Param, ...)[0]


def initialise(network: Network, key: Array) -> Weights:
  """New weights; a pure function that vmaps over keys."""
  return Weights(*nnx.split(_make(network, nnx.Rngs(key)), nnx.Param, ...)[1:])


def log_odds(
  network: Network, weights: Weights, x: Array, *, train: bool
) -> tuple[Array, nnx.State]:
  """The difference of the two logits: p_hat is its sigmoid.

  Args:
    network: static.
    weights: from `initialise`.
    x: [n, ...]; uint8 images are scaled to [0, 1].
    train: normalise by the batch, and update the running statistics.

  Returns:
    float32 [n], and the statistics afterwards.
  """
  if x.dtype == jnp.uint8:
    x = x.astype(jnp.float32) / 255
  # A copy: statistics that a gradient does not differentiate cannot be changed in place.
  module = nnx.merge(_graph(network), *weights, copy=True)
  logits = module(x, train=train)
  statistics = nnx.split(module, nnx.Param, ...)[2]
  return logits[:, 1] - logits[:, 0], statistics
