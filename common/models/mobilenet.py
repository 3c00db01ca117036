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
    norm_eps: of the batch norms.
    tf_padding: pad as TensorFlow's "SAME": with stride 2 and an even size at the end only.
    family: the Hugging Face model_type that this config reads and writes.
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
  norm_eps: float = 1e-5
  tf_padding: bool = False
  family: str = "mobilenet_v2"


class DepthwiseConvNorm(ConvNorm):
  """3x3 convolution of every channel by itself and batch norm."""

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


class InvertedResidual(nnx.Module):
  """Expand (1x1), depthwise (3x3), project (1x1, linear); the input is added where shapes agree."""

  def __init__(
    self,
    config: MobileNetConfig,
    in_channels: int,
    out_channels: int,
    expansion: int,
    stride: int,
    rngs: nnx.Rngs,
  ):
    inner = expansion * in_channels
    expands = expansion != 1
    self.expand = (
      _fitted(ConvNorm(in_channels, inner, 1, 1, None, rngs), config) if expands else None
    )
    self.depthwise = _fitted(DepthwiseConvNorm(inner, stride, rngs), config)
    self.project = _fitted(ConvNorm(inner, out_channels, 1, 1, None, rngs), config, linear=True)
    self.residual = stride == 1 and in_channels == out_channels

  def __call__(self, x: Array, train: bool) -> Array:
    y = x if self.expand is None else self.expand(x, train)
    y = self.project(self.depthwise(y, train), train)
    return x + y if self.residual else y


class MobileNet(nnx.Module):
  """Stem, inverted residuals, 1x1 convolution, global average pool and classifier.

  The first inverted residual stands apart: without an expansion, it belongs to the stem elsewhere.
  """

  def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs):
    self.config = config
    channels = config.stem_channels
    stem = ConvNorm(config.num_channels, channels, 3, config.stem_stride, None, rngs)
    self.stem = _fitted(stem, config)
    blocks = []
    for stage in config.stages:
      for i in range(stage.depth):
        stride = stage.stride if i == 0 else 1
        sizes = channels, stage.channels, stage.expansion, stride
        blocks.append(InvertedResidual(config, *sizes, rngs))
        channels = stage.channels
    self.first, self.blocks = blocks[0], nnx.List(blocks[1:])
    self.last = _fitted(ConvNorm(channels, config.head_channels, 1, 1, None, rngs), config)
    classes = len(config.labels)
    self.classifier = nnx.Linear(config.head_channels, classes, rngs=rngs) if classes else None

  def __call__(self, images: Array, *, train: bool = False) -> VisionOutput:
    """Runs the model.

    Args:
      images: float [batch, height, width, channels], normalised as the model was trained.
      train: normalise by the batch's own statistics, and update the running ones (which are
        `nnx.BatchStat` variables) in place.
    """
    x = self.first(self.stem(images, train), train)
    for block in self.blocks:
      x = block(x, train)
    x = self.last(x, train)
    pooled = x.mean(axis=(1, 2))
    logits = None if self.classifier is None else self.classifier(pooled).astype(jnp.float32)
    return VisionOutput(x, pooled, logits)


def _fitted(layer: ConvNorm, config: MobileNetConfig, *, linear: bool = False) -> ConvNorm:
  """The layer with the config's batch norm and padding, and ReLU6 unless it is linear."""
  layer.activation = None if linear else jax.nn.relu6
  layer.norm.epsilon = config.norm_eps
  if config.tf_padding:
    layer.conv.padding = "SAME"  # XLA's is TensorFlow's.
  return layer
