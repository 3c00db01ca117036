"""Residual convolutional networks: ResNet with basic or bottleneck blocks.

He et al. 2016, with the stride of a bottleneck in its 3x3 convolution ("v1.5") by default.

Shapes: `batch` images of [height, width, channels].
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.activations import ACTIVATIONS, Activation
from common.models.vit import VisionOutput

Array = jax.Array

BOTTLENECK = 4  # A bottleneck's 3x3 convolution has this fraction of its output's channels.


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
  """Architecture of a ResNet.

  Attributes:
    embedding_size: channels after the stem.
    hidden_sizes, depths: channels and number of blocks of each stage.
    activation: after the stem and after each residual sum; inside a block it is always ReLU.
    downsample_in_first_stage: the first stage halves the resolution too.
    downsample_in_bottleneck: the stride is in a bottleneck's first convolution, not its second.
    labels: names of the classes; without any there is no head.
    family: the Hugging Face model_type that this config reads and writes.
  """

  embedding_size: int
  hidden_sizes: tuple[int, ...]
  depths: tuple[int, ...]
  block: Literal["basic", "bottleneck"] = "bottleneck"
  num_channels: int = 3
  activation: Activation = "relu"
  downsample_in_first_stage: bool = False
  downsample_in_bottleneck: bool = False
  labels: tuple[str, ...] = ()
  family: str = "resnet"


def _he_normal(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
  """Normal with variance 2 / fan_out. shape: (height, width, in, out)."""
  # Drawn flat: on CPUs XLA takes seconds to compile a draw of four dimensions.
  draw = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
  return draw * math.sqrt(2 / (shape[0] * shape[1] * shape[3]))


class ConvNorm(nnx.Module):
  """Convolution, batch norm and, where one is given, an activation."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    size: int,
    stride: int,
    activation: Activation | None,
    rngs: nnx.Rngs,
  ):
    self.conv = nnx.Conv(
      in_channels,
      out_channels,
      (size, size),
      stride,
      padding=((size // 2, size // 2),) * 2,  # Hashable: part of a graph definition.
      use_bias=False,
      kernel_init=_he_normal,
      rngs=rngs,
    )
    self.norm = nnx.BatchNorm(
      out_channels, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs
    )
    self.activation = None if activation is None else ACTIVATIONS[activation]

  def __call__(self, x: Array, train: bool) -> Array:
    x = self.norm(self.conv(x), use_running_average=not train)
    return x if self.activation is None else self.activation(x)


class ResidualBlock(nnx.Module):
  """activation(shortcut(x) + layers(x))."""

  def __init__(
    self, config: ResNetConfig, in_channels: int, out_channels: int, stride: int, rngs: nnx.Rngs
  ):
    narrow = out_channels // BOTTLENECK
    if config.block == "bottleneck":
      first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
      layers = [
        ConvNorm(in_channels, narrow, 1, first, "relu", rngs),
        ConvNorm(narrow, narrow, 3, second, "relu", rngs),
        ConvNorm(narrow, out_channels, 1, 1, None, rngs),
      ]
    else:
      layers = [
        ConvNorm(in_channels, out_channels, 3, stride, "relu", rngs),
        ConvNorm(out_channels, out_channels, 3, 1, None, rngs),
      ]
    self.layers = nnx.List(layers)
    same = in_channels == out_channels and stride == 1
    self.shortcut = None if same else ConvNorm(in_channels, out_channels, 1, stride, None, rngs)
    self.activation = ACTIVATIONS[config.activation]

  def __call__(self, x: Array, train: bool) -> Array:
    residual = x if self.shortcut is None else self.shortcut(x, train)
    for layer in self.layers:
      x = layer(x, train)
    return self.activation(x + residual)


class ResNet(nnx.Module):
  """Stem, stages of residual blocks, global average pool and classifier."""

  def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
    self.config = config
    channels = config.embedding_size
    self.stem = ConvNorm(config.num_channels, channels, 7, 2, config.activation, rngs)
    stages = []
    for i, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths)):
      stride = 2 if i > 0 or config.downsample_in_first_stage else 1
      blocks = [ResidualBlock(config, channels, width, stride, rngs)]
      blocks += [ResidualBlock(config, width, width, 1, rngs) for _ in range(depth - 1)]
      stages.append(nnx.List(blocks))
      channels = width
    self.stages = nnx.List(stages)
    classes = len(config.labels)
    self.classifier = nnx.Linear(channels, classes, rngs=rngs) if classes else None

  def __call__(self, images: Array, *, train: bool = False) -> VisionOutput:
    """Runs the model.

    Args:
      images: float [batch, height, width, channels], normalised as the model was trained.
      train: normalise by the batch's own statistics, and update the running ones (which are
        `nnx.BatchStat` variables) in place.
    """
    x = self.stem(images, train)
    x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage in self.stages:
      for block in stage:
        x = block(x, train)
    pooled = x.mean(axis=(1, 2))
    logits = None if self.classifier is None else self.classifier(pooled).astype(jnp.float32)
    return VisionOutput(x, pooled, logits)
