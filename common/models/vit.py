"""Vision transformers: ViT and DeiT, with their heads.

The blocks are the decoder's, pre-norm, under a mask that lets every patch see every other.

Shapes: `batch` images of [height, width, channels], `dim` the hidden size; a sequence holds the
class token, DeiT's distillation token, then the patches row by row.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.activations import ACTIVATIONS, Activation
from common.models.decoder import AttentionContext, Block, DecoderConfig
from kernels.attention.masks import Tokens

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VisionTransformerConfig:
  """Architecture of a vision transformer and its head.

  Attributes:
    image_size, patch_size: (height, width) in pixels.
    distillation_token: DeiT's second token.
    pooler_size: width of a dense layer over the class token, None without one.
    head: "classification" reads the class token; "distilled" has a second classifier on the
      distillation token and averages the two.
    labels: names of the classes.
    family: the Hugging Face model_type that this config reads and writes.
  """

  image_size: tuple[int, int]
  patch_size: tuple[int, int]
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_channels: int = 3
  norm_eps: float = 1e-12
  activation: Activation = "gelu"
  qkv_bias: bool = True
  distillation_token: bool = False
  pooler_size: int | None = None
  pooler_activation: Activation = "tanh"
  head: Literal["none", "classification", "distilled"] = "none"
  labels: tuple[str, ...] = ()
  family: str = "vit"

  @property
  def sequence_length(self) -> int:
    """Number of patches and special tokens."""
    rows, columns = (i // p for i, p in zip(self.image_size, self.patch_size))
    return rows * columns + 1 + self.distillation_token

  @property
  def block(self) -> DecoderConfig:
    """What the blocks need to know."""
    return DecoderConfig(
      causal=False,
      vocab_size=0,
      hidden_size=self.hidden_size,
      intermediate_size=self.intermediate_size,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_heads,
      head_dim=self.hidden_size // self.num_heads,
      max_position_embeddings=self.sequence_length,
      norm="layer",
      norm_eps=self.norm_eps,
      activation=self.activation,
      gated_mlp=False,
      qkv_bias=self.qkv_bias,
      attention_out_bias=True,
      mlp_bias=True,
    )


class VisionOutput(NamedTuple):
  """What a vision model returns.

  Attributes:
    hidden: the last features: [batch, seq, dim], or [batch, height, width, dim] of a ResNet.
    pooled: one vector per image, [batch, dim], or None without a pooler.
    logits: float32 [batch, labels], or None without a head.
  """

  hidden: Array
  pooled: Array | None
  logits: Array | None


class VisionTransformer(nnx.Module):
  """Transformer over the patches of an image."""

  def __init__(self, config: VisionTransformerConfig, *, rngs: nnx.Rngs):
    self.config = config
    dim, classes = config.hidden_size, len(config.labels)
    parameter = lambda length: nnx.Param(rngs.params.normal((1, length, dim)) * 0.02)
    self.class_token = parameter(1)
    self.distillation_token = parameter(1) if config.distillation_token else None
    self.embed_positions = parameter(config.sequence_length)
    self.embed_patches = nnx.Conv(
      config.num_channels, dim, config.patch_size, config.patch_size, padding="VALID", rngs=rngs
    )
    self.blocks = nnx.List([Block(config.block, rngs) for _ in range(config.num_layers)])
    self.final_norm = nnx.LayerNorm(
      dim, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs
    )
    self.pooler = nnx.Linear(dim, config.pooler_size, rngs=rngs) if config.pooler_size else None
    classifier = lambda exists: nnx.Linear(dim, classes, rngs=rngs) if exists else None
    self.classifier = classifier(config.head == "classification")
    self.class_classifier = classifier(config.head == "distilled")
    self.distillation_classifier = classifier(config.head == "distilled")

  def __call__(self, images: Array) -> VisionOutput:
    """Runs the model on float [batch, height, width, channels], normalised as it was trained.

    Raises:
      ValueError: the images are not of the model's size.
    """
    x, context = self.stem(images)
    for block in self.blocks:
      x, _ = block(x, context)
    x = self.final_norm(x)
    pooled = None
    if self.pooler is not None:
      pooled = ACTIVATIONS[self.config.pooler_activation](self.pooler(x[:, 0]))
    logits = None
    if self.classifier is not None:
      logits = self.classifier(x[:, 0]).astype(jnp.float32)
    if self.class_classifier is not None:
      both = self.class_classifier(x[:, 0]) + self.distillation_classifier(x[:, 1])
      logits = both.astype(jnp.float32) / 2
    return VisionOutput(x, pooled, logits)

  def stem(self, images: Array) -> tuple[Array, AttentionContext]:
    """What comes before the blocks: their input [batch, seq, dim] and their context.

    Raises:
      ValueError: the images are not of the model's size.
    """
    expected = (*self.config.image_size, self.config.num_channels)
    if images.shape[1:] != expected:
      raise ValueError(f"images of shape {images.shape[1:]}; the model takes {expected}")
    patches = self.embed_patches(images)
    x = patches.reshape(len(images), -1, patches.shape[-1])
    special = [self.class_token, self.distillation_token]
    special = [jnp.broadcast_to(t[...], (len(x), 1, x.shape[-1])) for t in special if t is not None]
    x = jnp.concatenate([*special, x], axis=1) + self.embed_positions[...]
    tokens = Tokens(jnp.arange(x.shape[1])[None], jnp.ones((1, x.shape[1]), jnp.int32))
    return x, AttentionContext(tokens, tokens, None, jnp.int32(0))
