"""MobileNetV2: inverted residuals with depthwise convolutions (Sandler et al., CVPR 2018).

Shapes: `batch` images of [height, width, channels].
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.resnet import ConvNorm
from common.models.vit import VisionOutput

Array = jax.Array


class Stage(NamedTuple):
  """Inverted residuals of one width (a row of the paper's Table 2).

  Attributes:
    expansion: t, the inner width as a multiple of the input's.
    channels: c, of the output.
    depth: n, number of blocks.
    stride: s, of the first.
  """

  expansion: int
  channels: int
  depth: int
  stride: int


@dataclasses.dataclass(frozen=True)
class MobileNetConfig:
  """Architecture of a MobileNetV2; the defaults are the paper's, at width 1.

  Attributes:
    stem_channels: of the first convolution, 3x3.
    stem_stride: 2 in the paper.
    stages: the inverted residuals.
    head_channels: of the last convolution, 1x1.
    labels: names of the classes; without any there is no classifier.
  """

  stem_channels: int = 32
  stem_stride: int = 2
  stages: tuple[Stage, ...] = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
  )
  head_channels: int = 1280
  num_channels: int = 3
  labels: tuple[str, ...] = ()


class DepthwiseConvNorm(ConvNorm):
  """3x3 convolution of every channel by itself, batch norm, ReLU6."""

  def __init__(self, channels: int, stride: int, rngs: nnx.Rngs):
    super().__init__(channels, channels, 3, stride, None, rngs)
    self.conv = nnx.Conv(
      channels,
      channels,
      (3, 3),
      stride,
      padding=((1, 1), (1, 1)),
      feature_group_count=channels,
      use_bias=False,
      # Nine inputs per output.
      kernel_init=nnx.initializers.normal((2 / 9) ** 0.5),
      rngs=rngs,
    )
    self.activation = jax.nn.relu6


class InvertedResidual(nnx.Module):
  """Expand (1x1), depthwise (3x3), project (1x1, linear); the input is added where shapes agree."""

  def __init__(
    self, in_channels: int, out_channels: int, expansion: int, stride: int, rngs: nnx.Rngs
  ):
    inner = expansion * in_channels
    layers = []
    if expansion != 1:
      layers.append(_relu6(ConvNorm(in_channels, inner, 1, 1, None, rngs)))
    layers.append(DepthwiseConvNorm(inner, stride, rngs))
    layers.append(ConvNorm(inner, out_channels, 1, 1, None, rngs))
    self.layers = nnx.List(layers)
    self.residual = stride == 1 and in_channels == out_channels

  def __call__(self, x: Array, train: bool) -> Array:
    y = x
    for layer in self.layers:
      y = layer(y, train)
    return x + y if self.residual else y


class MobileNet(nnx.Module):
  """Stem, inverted residuals, 1x1 convolution, global average pool and classifier."""

  def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs):
    self.config = config
    channels = config.stem_channels
    self.stem = _relu6(ConvNorm(config.num_channels, channels, 3, config.stem_stride, None, rngs))
    blocks = []
    for stage in config.stages:
      for i in range(stage.depth):
        stride = stage.stride if i == 0 else 1
        blocks.append(InvertedResidual(channels, stage.channels, stage.expansion, stride, rngs))
        channels = stage.channels
    self.blocks = nnx.List(blocks)
    self.last = _relu6(ConvNorm(channels, config.head_channels, 1, 1, None, rngs))
    classes = len(config.labels)
    self.classifier = nnx.Linear(config.head_channels, classes, rngs=rngs) if classes else None

  def __call__(self, images: Array, *, train: bool = False) -> VisionOutput:
    """Runs the model.

    Args:
      images: float [batch, height, width, channels], normalised as the model was trained.
      train: normalise by the batch's own statistics, and update the running ones (which are
        `nnx.BatchStat` variables) in place.
    """
    x = self.stem(images, train)
    for block in self.blocks:
      x = block(x, train)
    x = self.last(x, train)
    pooled = x.mean(axis=(1, 2))
    logits = None if self.classifier is None else self.classifier(pooled).astype(jnp.float32)
    return VisionOutput(x, pooled, logits)


def _relu6(layer: ConvNorm) -> ConvNorm:
  layer.activation = jax.nn.relu6
  return layer
