"""Swin Transformer: attention in windows that shift from block to block (Liu et al., ICCV 2021).

A stage works on one grid of tokens. Its blocks attend within windows of `window_size` x
`window_size` tokens; every other block moves the windows by half their side, by rolling the grid.
Between two stages 2 x 2 tokens are merged into one of twice the channels.

Shapes: `batch` images of [height, width, channels]; `seq` the tokens of a stage's grid, row by row;
`tokens` those of a window; `dim` a stage's channels.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.activations import Activation, gelu
from common.models.attention import merge_heads, split_heads
from common.models.decoder import MLP, DecoderConfig
from common.models.vit import VisionOutput
from kernels.attention.api import attention

Array = jax.Array

# Of the norms after the patches and before merging, which have no setting of their own.
OUTER_NORM_EPS = 1e-5
# Added to the scores of tokens that only the roll has brought together, as in published models.
MASKED = -100.0


@dataclasses.dataclass(frozen=True)
class SwinConfig:
  """Architecture of a Swin Transformer and its head.

  Attributes:
    image_size, patch_size: (height, width) in pixels; images are padded to whole patches.
    embedding_size: channels of the first stage; every further one has twice as many.
    depths, num_heads: blocks, and heads of each, by stage.
    window_size: side of a window in tokens; grids are padded to whole windows.
    mlp_ratio: hidden channels of an MLP, in units of its input's.
    norm_eps: of the blocks' norms and the last.
    head: "classification" reads the mean of the last tokens.
    labels: names of the classes.
    family: the Hugging Face model_type that this config reads and writes.

  Raises:
    ValueError: stages, heads, windows and grids do not fit each other.
  """

  image_size: tuple[int, int]
  patch_size: tuple[int, int]
  embedding_size: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  window_size: int
  mlp_ratio: float = 4.0
  num_channels: int = 3
  norm_eps: float = 1e-5
  activation: Activation = "gelu"
  qkv_bias: bool = True
  head: Literal["none", "classification"] = "none"
  labels: tuple[str, ...] = ()
  family: str = "swin"

  def __post_init__(self):
    if len(self.depths) != len(self.num_heads) or not self.depths:
      raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} are of other lengths")
    for stage, heads in enumerate(self.num_heads):
      if self.width(stage) % heads:
        raise ValueError(f"{heads} heads do not divide {self.width(stage)} channels")
      if min(self.grid(stage)) < self.window_size:
        raise ValueError(f"stage {stage} has {self.grid(stage)} tokens, less than a window's side")

  def width(self, stage: int) -> int:
    """Channels of a stage."""
    return self.embedding_size * 2**stage

  def grid(self, stage: int) -> tuple[int, int]:
    """(rows, columns) of a stage's tokens; a side that is odd is padded before it is halved."""
    halved = lambda size, patch: -(-size // (patch * 2**stage))
    return tuple(halved(size, patch) for size, patch in zip(self.image_size, self.patch_size))

  def mlp(self, stage: int) -> DecoderConfig:
    """What an MLP needs to know, in the decoder's words."""
    width = self.width(stage)
    return DecoderConfig(
      vocab_size=0,
      hidden_size=width,
      intermediate_size=int(self.mlp_ratio * width),
      num_layers=self.depths[stage],
      num_heads=self.num_heads[stage],
      num_kv_heads=self.num_heads[stage],
      head_dim=width // self.num_heads[stage],
      max_position_embeddings=self.window_size**2,
      activation=self.activation,
      gated_mlp=False,
      mlp_bias=True,
    )


def to_windows(x: Array, window: int) -> Array:
  """[batch, height, width, dim] -> [batch * windows, window * window, dim]; sides are multiples."""
  batch, height, width, dim = x.shape
  x = x.reshape(batch, height // window, window, width // window, window, dim)
  return x.swapaxes(2, 3).reshape(-1, window * window, dim)


def from_windows(x: Array, grid: tuple[int, int], window: int) -> Array:
  """Inverse of `to_windows`; grid: (height, width)."""
  rows, columns = grid[0] // window, grid[1] // window
  x = x.reshape(-1, rows, columns, window, window, x.shape[-1])
  return x.swapaxes(2, 3).reshape(-1, *grid, x.shape[-1])


def relative_positions(window: int) -> np.ndarray:
  """Rows of a bias table, int [tokens, tokens]: (2 w - 1)(di + w - 1) + (dj + w - 1).

  (di, dj) is the query's row and column less the key's.
  """
  row, column = np.divmod(np.arange(window * window), window)
  apart = lambda x: x[:, None] - x[None] + window - 1
  return (2 * window - 1) * apart(row) + apart(column)


def same_region(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
  """Which tokens of a window may see each other after the roll, bool [windows, tokens, tokens].

  Rolling by `shift` brings the first rows behind the last ones, columns alike: windows at the end
  hold tokens of two sides, which are no neighbours.
  """
  rolled = lambda size: (np.arange(size) >= size - shift).astype(np.int32)
  region = 2 * rolled(grid[0])[:, None] + rolled(grid[1])
  region = to_windows(region[None, :, :, None], window)[..., 0]
  return region[:, :, None] == region[:, None]


class WindowAttention(nnx.Module):
  """Multi-head attention among the tokens of each window."""

  def __init__(self, dim: int, num_heads: int, qkv_bias: bool, rngs: nnx.Rngs):
    linear = lambda bias: nnx.Linear(dim, dim, use_bias=bias, rngs=rngs)
    self.head_dim = dim // num_heads
    self.q_proj, self.k_proj, self.v_proj = (linear(qkv_bias) for _ in range(3))
    self.o_proj = linear(True)

  def __call__(self, x: Array, bias: Array) -> Array:
    """x: [windows, tokens, dim], bias: [windows, heads, tokens, tokens] -> x's shape."""
    split = lambda y: split_heads(y, self.head_dim)
    query, key, value = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
    return self.o_proj(merge_heads(attention(query, key, value, causal=False, bias=bias)))


def gelu_apart(x: Array) -> Array:
  """Exact GELU that no product is fused with.

  XLA's TPU compiler unrolls its error function into the products of the windows' tokens, forward and
  backward, which takes most of the time that a training step compiles.
  """
  return jax.lax.optimization_barrier(gelu(x))


class SwinBlock(nnx.Module):
  """Attention in windows of one grid, shifted or not, then an MLP; both pre-norm."""

  def __init__(self, config: SwinConfig, stage: int, shifts: bool, rngs: nnx.Rngs):
    dim, heads = config.width(stage), config.num_heads[stage]
    self.grid, self.window = config.grid(stage), config.window_size
    # A grid of one window across has nothing to shift to.
    self.shift = self.window // 2 if shifts and min(self.grid) > self.window else 0
    norm = lambda: _norm(dim, config.norm_eps, rngs)
    self.attention_norm, self.mlp_norm = norm(), norm()
    self.attention = WindowAttention(dim, heads, config.qkv_bias, rngs)
    table = rngs.params.normal(((2 * self.window - 1) ** 2, heads)) * 0.02
    self.relative_position_bias = nnx.Param(table)
    self.mlp = MLP(config.mlp(stage), rngs)
    if self.mlp.activation is gelu:
      self.mlp.activation = gelu_apart

  def __call__(self, x: Array) -> Array:
    """x: [batch, seq, dim] -> the same."""
    (height, width), window, shift = self.grid, self.window, self.shift
    batch, _, dim = x.shape
    y = self.attention_norm(x).reshape(batch, height, width, dim)
    # Padding takes part in attention, as zeros.
    y = jnp.pad(y, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    padded = y.shape[1:3]
    y = to_windows(jnp.roll(y, (-shift, -shift), (1, 2)), window)
    y = self.attention(y, self.score_bias(batch, padded))
    y = jnp.roll(from_windows(y, padded, window), (shift, shift), (1, 2))
    x = x + y[:, :height, :width].reshape(x.shape)
    return x + self.mlp(self.mlp_norm(x))

  def score_bias(self, batch: int, padded: tuple[int, int]) -> Array:
    """Relative positions' bias and the mask of the roll, [batch * windows, heads, tokens, tokens].

    padded: (height, width) of the grid with its padding.
    """
    table = self.relative_position_bias[...]
    bias = table[relative_positions(self.window)].transpose(2, 0, 1)[None]
    if self.shift:
      sees = same_region(padded, self.window, self.shift)[:, None]
      bias = bias + np.where(sees, 0.0, MASKED).astype(table.dtype)
    windows = math.prod(padded) // self.window**2
    bias = jnp.broadcast_to(bias, (batch, windows, *bias.shape[1:]))
    return bias.reshape(batch * windows, *bias.shape[2:])


class PatchMerging(nnx.Module):
  """2 x 2 tokens become one of twice the channels."""

  def __init__(self, grid: tuple[int, int], dim: int, rngs: nnx.Rngs):
    self.grid = grid
    self.norm = _norm(4 * dim, OUTER_NORM_EPS, rngs)
    self.reduction = nnx.Linear(4 * dim, 2 * dim, use_bias=False, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    """[batch, seq, dim] -> [batch, seq of the halved grid, 2 dim]."""
    height, width = self.grid
    x = x.reshape(len(x), height, width, -1)
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    # Of the four, the lower neighbour comes second.
    x = x.reshape(len(x), rows, 2, columns, 2, -1).transpose(0, 1, 3, 4, 2, 5)
    return self.reduction(self.norm(x.reshape(len(x), rows * columns, -1)))


class SwinStage(nnx.Module):
  """Blocks on one grid, and what leads to the next grid."""

  def __init__(self, config: SwinConfig, stage: int, rngs: nnx.Rngs):
    self.blocks = nnx.List(
      [SwinBlock(config, stage, i % 2 == 1, rngs) for i in range(config.depths[stage])]
    )
    is_last = stage == len(config.depths) - 1
    self.merging = None if is_last else PatchMerging(config.grid(stage), config.width(stage), rngs)

  def __call__(self, x: Array) -> Array:
    """[batch, seq, dim] -> the next stage's input [batch, seq', 2 dim], or the same shape."""
    for block in self.blocks:
      x = block(x)
    return x if self.merging is None else self.merging(x)


class Swin(nnx.Module):
  """Patches, stages of blocks in windows, mean over the tokens, classifier."""

  def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs):
    self.config = config
    dim, last = config.embedding_size, len(config.depths) - 1
    self.embed_patches = nnx.Conv(
      config.num_channels, dim, config.patch_size, config.patch_size, padding="VALID", rngs=rngs
    )
    self.embed_norm = _norm(dim, OUTER_NORM_EPS, rngs)
    self.stages = nnx.List([SwinStage(config, i, rngs) for i in range(last + 1)])
    self.final_norm = _norm(config.width(last), config.norm_eps, rngs)
    has_head = config.head == "classification"
    classes = len(config.labels)
    self.classifier = nnx.Linear(config.width(last), classes, rngs=rngs) if has_head else None

  def __call__(self, images: Array) -> VisionOutput:
    """Runs the model on float [batch, height, width, channels], normalised as it was trained.

    Returns:
      hidden [batch, seq of the last grid, dim]; pooled [batch, dim]; logits [batch, labels], or
      None without a head.

    Raises:
      ValueError: the images are not of the model's size.
    """
    expected = (*self.config.image_size, self.config.num_channels)
    if images.shape[1:] != expected:
      raise ValueError(f"images of shape {images.shape[1:]}; the model takes {expected}")
    (height, width), (rows, columns) = self.config.image_size, self.config.patch_size
    images = jnp.pad(images, ((0, 0), (0, -height % rows), (0, -width % columns), (0, 0)))
    x = self.embed_patches(images)
    x = self.embed_norm(x.reshape(len(x), -1, x.shape[-1]))
    for stage in self.stages:
      x = stage(x)
    x = self.final_norm(x)
    pooled = jnp.mean(x, axis=1)
    logits = None if self.classifier is None else self.classifier(pooled).astype(jnp.float32)
    return VisionOutput(x, pooled, logits)


def _norm(dim: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(dim, epsilon=eps, use_fast_variance=False, rngs=rngs)
