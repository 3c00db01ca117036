"""One config-driven text encoder: BERT and RoBERTa, with their heads.

The blocks are the decoder's, post-norm, under a mask without causality: a token attends to the
tokens of its own segment. `segment_ids` therefore describe padding on either side and packed
documents alike.

Shapes: `batch` rows, `seq` tokens, `dim` the hidden size.
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
class EncoderConfig:
  """Architecture of an encoder and its head.

  Attributes:
    max_position_embeddings: rows of the table of positions.
    positions_skip_padding: RoBERTa's positions: a token that is not `pad_token_id` has the number
      of such tokens up to it, itself included, plus `pad_token_id`. Otherwise 0, 1, 2, ...
    pooler: a dense tanh layer over the first token.
    head: what `logits` are. A "sequence" head without a pooler has a dense tanh layer of its own.
    head_activation: of the "masked_lm" head.
    labels: names of the classes of a "sequence" or "token" head.
    tie_word_embeddings: the "masked_lm" head multiplies by the token embeddings.
    family: the Hugging Face model_type that this config reads and writes.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  max_position_embeddings: int
  num_token_types: int = 2
  norm_eps: float = 1e-12
  activation: Activation = "gelu"
  pad_token_id: int = 0
  positions_skip_padding: bool = False
  pooler: bool = False
  head: Literal["none", "masked_lm", "sequence", "token"] = "none"
  head_activation: Activation = "gelu"
  labels: tuple[str, ...] = ()
  tie_word_embeddings: bool = True
  family: str = "bert"

  @property
  def block(self) -> DecoderConfig:
    """What the blocks need to know."""
    return DecoderConfig(
      causal=False,
      vocab_size=self.vocab_size,
      hidden_size=self.hidden_size,
      intermediate_size=self.intermediate_size,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_heads,
      head_dim=self.hidden_size // self.num_heads,
      max_position_embeddings=self.max_position_embeddings,
      norm="layer",
      norm_eps=self.norm_eps,
      norm_placement="post",
      activation=self.activation,
      gated_mlp=False,
      qkv_bias=True,
      attention_out_bias=True,
      mlp_bias=True,
    )


class EncoderOutput(NamedTuple):
  """What an encoder returns.

  Attributes:
    hidden: [batch, seq, dim], the last block's output.
    pooled: [batch, dim], or None without a pooler.
    logits: float32, of the head: [batch, seq, vocab] ("masked_lm"), [batch, labels] ("sequence"),
      [batch, seq, labels] ("token"), or None ("none").
  """

  hidden: Array
  pooled: Array | None
  logits: Array | None


class MaskedLMHead(nnx.Module):
  """Dense layer, activation and norm, then scores by the token embeddings or a matrix of its own."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.dense = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
    self.activation = ACTIVATIONS[config.head_activation]
    self.norm = _layer_norm(config, rngs)
    tied = config.tie_word_embeddings
    self.bias = nnx.Param(jnp.zeros(config.vocab_size)) if tied else None
    self.decoder = None if tied else nnx.Linear(config.hidden_size, config.vocab_size, rngs=rngs)

  def __call__(self, hidden: Array, embed_tokens: nnx.Embed) -> Array:
    """[batch, seq, dim] -> [batch, seq, vocab]."""
    x = self.norm(self.activation(self.dense(hidden)))
    return self.decoder(x) if self.decoder else embed_tokens.attend(x) + self.bias[...]


class Encoder(nnx.Module):
  """Bidirectional transformer over tokens."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    dim = config.hidden_size
    embed = lambda rows: nnx.Embed(
      rows, dim, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
    )
    self.embed_tokens = embed(config.vocab_size)
    self.embed_positions = embed(config.max_position_embeddings)
    self.embed_token_types = embed(config.num_token_types)
    self.embed_norm = _layer_norm(config, rngs)
    self.blocks = nnx.List([Block(config.block, rngs) for _ in range(config.num_layers)])
    self.pooler = nnx.Linear(dim, dim, rngs=rngs) if config.pooler else None
    sequence, token = config.head == "sequence", config.head == "token"
    classes = len(config.labels)
    self.lm_head = MaskedLMHead(config, rngs) if config.head == "masked_lm" else None
    own_dense = sequence and not config.pooler
    self.sequence_dense = nnx.Linear(dim, dim, rngs=rngs) if own_dense else None
    self.sequence_classifier = nnx.Linear(dim, classes, rngs=rngs) if sequence else None
    self.token_classifier = nnx.Linear(dim, classes, rngs=rngs) if token else None

  def __call__(
    self,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    token_types: Array | None = None,
    positions: Array | None = None,
  ) -> EncoderOutput:
    """Runs the model.

    Args:
      tokens: int32 [batch, seq].
      segment_ids: int32 [batch, seq], 0 for padding; by default all 1.
      token_types: int32 [batch, seq], the first or second sentence; by default all 0.
      positions: int32 [batch, seq], rows of the table; by default as the config says.
    """
    x, context = self.stem(tokens, segment_ids, token_types=token_types, positions=positions)
    for block in self.blocks:
      x, _ = block(x, context)
    first = x[:, 0]
    pooled = None if self.pooler is None else jnp.tanh(self.pooler(first))
    return EncoderOutput(x, pooled, self._logits(x, first, pooled))

  def stem(
    self,
    tokens: Array,
    segment_ids: Array | None = None,
    *,
    token_types: Array | None = None,
    positions: Array | None = None,
  ) -> tuple[Array, AttentionContext]:
    """What comes before the blocks: their input [batch, seq, dim] and their context.

    Args: as of `__call__`.
    """
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    if token_types is None:
      token_types = jnp.zeros_like(tokens)
    if positions is None:
      positions = default_positions(self.config, tokens)
    x = self.embed_tokens(tokens) + self.embed_token_types(token_types)
    x = self.embed_norm(x + self.embed_positions(positions))
    # A padding token attends to the first segment, as it would without segments: heads read the
    # first position of a left-padded row too.
    queries = Tokens(positions, jnp.maximum(segment_ids, 1))
    return x, AttentionContext(queries, Tokens(positions, segment_ids), None, jnp.int32(0))

  def _logits(self, x: Array, first: Array, pooled: Array | None) -> Array | None:
    if self.lm_head is not None:
      return self.lm_head(x, self.embed_tokens).astype(jnp.float32)
    if self.token_classifier is not None:
      return self.token_classifier(x).astype(jnp.float32)
    if self.sequence_classifier is not None:
      features = pooled if self.sequence_dense is None else jnp.tanh(self.sequence_dense(first))
      return self.sequence_classifier(features).astype(jnp.float32)
    return None


def default_positions(config: EncoderConfig, tokens: Array) -> Array:
  """Rows of the table of positions, int32 [batch, seq]. tokens: int32 [batch, seq]."""
  if not config.positions_skip_padding:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  real = (tokens != config.pad_token_id).astype(jnp.int32)
  return jnp.cumsum(real, axis=1) * real + config.pad_token_id


def sentence_embeddings(
  hidden: Array,
  segment_ids: Array,
  *,
  pooling: Literal["mean", "cls"] = "mean",
  normalize: bool = True,
) -> Array:
  """One vector per row, float32 [batch, dim].

  Args:
    hidden: [batch, seq, dim].
    segment_ids: int32 [batch, seq], 0 for padding.
    pooling: "mean" over the tokens that are not padding, or the first of them ("cls").
    normalize: scale to unit L2 norm.
  """
  hidden, real = hidden.astype(jnp.float32), (segment_ids != 0).astype(jnp.float32)
  if pooling == "cls":
    first = jnp.argmax(real, axis=1)
    pooled = jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0]
  else:
    total = jnp.einsum("bsd,bs->bd", hidden, real)
    pooled = total / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
  if normalize:
    pooled = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
  return pooled


def _layer_norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(
    config.hidden_size, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs
  )
