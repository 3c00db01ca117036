"""One config-driven encoder-decoder: T5, both the original and v1.1 (FLAN).

T5 differs from the decoder-only models in that attention scores are not scaled, positions are a
bias learned per head and distance bucket (one table for all blocks of a stack), and no layer has
a bias. The decoder always runs against a `DecoderCache`, which holds the source's keys and values
besides its own: a whole target is one step of its length.

Shapes: `batch` rows, `source` and `target` tokens, `heads` heads, `dim` the hidden size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.activations import ACTIVATIONS, Activation
from common.models.attention import merge_heads, split_heads
from common.models.linear import linear_dot_general
from kernels.attention.api import attention

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
  """Architecture of an encoder-decoder.

  Attributes:
    num_buckets, max_distance: of the relative positions, see `relative_buckets`.
    scale_output: multiply the decoder's output by dim^-0.5 before the head, which the original T5
      does to use its embeddings as the head.
    decoder_start_token_id: what generation starts from.
    family: the Hugging Face model_type that this config reads and writes.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_decoder_layers: int
  num_heads: int
  head_dim: int
  num_buckets: int = 32
  max_distance: int = 128
  norm_eps: float = 1e-6
  activation: Activation = "relu"
  gated_mlp: bool = False
  tie_word_embeddings: bool = True
  scale_output: bool = True
  pad_token_id: int = 0
  eos_token_id: int = 1
  decoder_start_token_id: int = 0
  family: str = "t5"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecoderCache:
  """What the decoder reads besides its new tokens.

  Attributes:
    keys, values: per block [batch, heads, max_length, head_dim], of the target so far.
    segment_ids: int32 [batch, max_length] of the target; 0 marks padding and free slots.
    length: int32 [], number of slots written.
    source_keys, source_values: per block [batch, heads, source, head_dim].
    source_segment_ids: int32 [batch, source]; 0 marks padding.
  """

  keys: list[Array]
  values: list[Array]
  segment_ids: Array
  length: Array
  source_keys: list[Array]
  source_values: list[Array]
  source_segment_ids: Array


def relative_buckets(
  distance: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
  """Buckets of relative positions, int32 in [0, num_buckets).

  Half of the buckets hold one distance each, the other half logarithmically wider ranges up to
  `max_distance`, beyond which all share the last. Bidirectional attention has half of the buckets
  for keys after the query; causal attention puts those in bucket 0.

  Args:
    distance: int32, the key's position minus the query's.
  """
  offset = jnp.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = jnp.where(distance > 0, num_buckets, 0)
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(-distance, 0)
  exact = num_buckets // 2
  # A table made on the host, so that rounding at the ranges' borders depends on no accelerator.
  steps = np.arange(max(max_distance, exact) + 1)
  ratio = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
  ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
  wide = np.minimum(exact + ratio.astype(np.int32), num_buckets - 1)
  table = jnp.asarray(np.where(steps < exact, steps, wide), jnp.int32)
  return offset + table[jnp.minimum(distance, len(steps) - 1)]


class Attention(nnx.Module):
  """Multi-head attention without biases and without the 1/sqrt(head_dim)."""

  def __init__(self, config: EncoderDecoderConfig, rngs: nnx.Rngs):
    dim, width = config.hidden_size, config.num_heads * config.head_dim
    self.head_dim = config.head_dim
    self.q_proj = _linear(dim, width, rngs)
    self.k_proj = _linear(dim, width, rngs)
    self.v_proj = _linear(dim, width, rngs)
    self.o_proj = _linear(width, dim, rngs)

  def keys_values(self, x: Array) -> tuple[Array, Array]:
    """[batch, keys, dim] -> keys and values, each [batch, heads, keys, head_dim]."""
    return tuple(split_heads(y, self.head_dim) for y in (self.k_proj(x), self.v_proj(x)))

  def __call__(self, x: Array, keys_values: tuple[Array, Array], mask: Array, bias=None) -> Array:
    """[batch, seq, dim] -> [batch, seq, dim].

    Args:
      mask: bool [batch, 1, seq, keys].
      bias: [1, heads, seq, keys], added to the scores.
    """
    query = split_heads(self.q_proj(x), self.head_dim)
    key, value = (y.astype(query.dtype) for y in keys_values)
    out = attention(query, key, value, causal=False, mask=mask, bias=bias, scale=1.0)
    return self.o_proj(merge_heads(out))


class FeedForward(nnx.Module):
  """down(activation(gate(x)) * up(x)), or down(activation(in(x))) without a gate."""

  def __init__(self, config: EncoderDecoderConfig, rngs: nnx.Rngs):
    dim, hidden, gated = config.hidden_size, config.intermediate_size, config.gated_mlp
    self.in_proj = None if gated else _linear(dim, hidden, rngs)
    self.gate_proj = _linear(dim, hidden, rngs) if gated else None
    self.up_proj = _linear(dim, hidden, rngs) if gated else None
    self.activation = ACTIVATIONS[config.activation]
    self.down_proj = _linear(hidden, dim, rngs)

  def __call__(self, x: Array) -> Array:
    """[batch, seq, dim] -> [batch, seq, dim]."""
    if self.in_proj is not None:
      return self.down_proj(self.activation(self.in_proj(x)))
    return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """One layer of either stack; the decoder's attends to the source as well."""

  def __init__(self, config: EncoderDecoderConfig, reads_source: bool, rngs: nnx.Rngs):
    self.attention_norm = _rms_norm(config, rngs)
    self.attention = Attention(config, rngs)
    self.cross_norm = _rms_norm(config, rngs) if reads_source else None
    self.cross_attention = Attention(config, rngs) if reads_source else None
    self.mlp_norm = _rms_norm(config, rngs)
    self.mlp = FeedForward(config, rngs)


class Stack(nnx.Module):
  """The blocks of the encoder or the decoder, with their table of relative positions."""

  def __init__(self, config: EncoderDecoderConfig, is_decoder: bool, rngs: nnx.Rngs):
    layers = config.num_decoder_layers if is_decoder else config.num_layers
    self.bidirectional = not is_decoder
    self.max_distance = config.max_distance
    self.relative_bias = nnx.Embed(config.num_buckets, config.num_heads, rngs=rngs)
    self.blocks = nnx.List([Block(config, is_decoder, rngs) for _ in range(layers)])
    self.final_norm = _rms_norm(config, rngs)

  def bias(self, query_positions: Array, key_positions: Array) -> Array:
    """[1, heads, queries, keys], from int32 [queries] and [keys]."""
    buckets = relative_buckets(
      key_positions[None, :] - query_positions[:, None],
      bidirectional=self.bidirectional,
      num_buckets=self.relative_bias.num_embeddings,
      max_distance=self.max_distance,
    )
    return jnp.transpose(self.relative_bias(buckets), (2, 0, 1))[None]


class EncoderDecoder(nnx.Module):
  """Sequence-to-sequence language model."""

  def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    dim, init = config.hidden_size, nnx.initializers.normal(1.0)
    self.embed_tokens = nnx.Embed(config.vocab_size, dim, embedding_init=init, rngs=rngs)
    self.encoder = Stack(config, False, rngs)
    self.decoder = Stack(config, True, rngs)
    self.lm_head = None if config.tie_word_embeddings else _linear(dim, config.vocab_size, rngs)

  def __call__(
    self,
    tokens: Array,
    target: Array,
    *,
    segment_ids: Array | None = None,
    target_segment_ids: Array | None = None,
  ) -> Array:
    """Logits of a whole target, float32 [batch, target, vocab].

    Args:
      tokens: int32 [batch, source].
      target: int32 [batch, target], the decoder's input: it begins with the start token.
      segment_ids: int32 [batch, source], 0 for padding; by default all 1.
      target_segment_ids: int32 [batch, target], likewise.
    """
    cache = self.start(tokens, segment_ids=segment_ids, max_length=target.shape[1])
    return self.decode(target, cache, segment_ids=target_segment_ids)[0]

  def encode(self, tokens: Array, segment_ids: Array | None = None) -> Array:
    """int32 [batch, source] -> [batch, source, dim]; segment 0 is padding."""
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    mask, positions = bidirectional_mask(segment_ids), jnp.arange(tokens.shape[1])
    bias = self.encoder.bias(positions, positions)
    x = self.embed_tokens(tokens)
    for block in self.encoder.blocks:
      y = block.attention_norm(x)
      x = x + block.attention(y, block.attention.keys_values(y), mask, bias)
      x = x + block.mlp(block.mlp_norm(x))
    return self.encoder.final_norm(x)

  def start(
    self, tokens: Array, *, segment_ids: Array | None = None, max_length: int
  ) -> DecoderCache:
    """Encodes the source and returns a cache for targets of up to `max_length` tokens."""
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    source = self.encode(tokens, segment_ids)
    blocks = self.decoder.blocks
    source_keys, source_values = zip(*(b.cross_attention.keys_values(source) for b in blocks))
    shape = (len(tokens), self.config.num_heads, max_length, self.config.head_dim)
    return DecoderCache(
      keys=[jnp.zeros(shape, source.dtype) for _ in blocks],
      values=[jnp.zeros(shape, source.dtype) for _ in blocks],
      segment_ids=jnp.zeros((len(tokens), max_length), jnp.int32),
      length=jnp.zeros((), jnp.int32),
      source_keys=list(source_keys),
      source_values=list(source_values),
      source_segment_ids=segment_ids,
    )

  def decode(
    self, target: Array, cache: DecoderCache, *, segment_ids: Array | None = None
  ) -> tuple[Array, DecoderCache]:
    """Appends tokens to the target.

    Args:
      target: int32 [batch, new].
      cache: of `start`, or returned by the call before; it is not modified.
      segment_ids: int32 [batch, new], 0 for padding; by default all 1.

    Returns:
      logits float32 [batch, new, vocab] and the cache with the new tokens.
    """
    segment_ids = jnp.ones_like(target) if segment_ids is None else segment_ids
    write = lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(
      old, new.astype(old.dtype), cache.length, axis
    )
    segments = write(cache.segment_ids, segment_ids, 1)
    positions, slots = cache.length + jnp.arange(target.shape[1]), jnp.arange(segments.shape[1])
    mask = bidirectional_mask(segment_ids, segments) & (slots <= positions[:, None])
    source_mask = (cache.source_segment_ids != 0)[:, None, None]
    bias = self.decoder.bias(positions, slots)
    keys, values = list(cache.keys), list(cache.values)
    x = self.embed_tokens(target)
    for i, block in enumerate(self.decoder.blocks):
      y = block.attention_norm(x)
      key, value = block.attention.keys_values(y)
      keys[i], values[i] = write(keys[i], key, 2), write(values[i], value, 2)
      x = x + block.attention(y, (keys[i], values[i]), mask, bias)
      source = cache.source_keys[i], cache.source_values[i]
      x = x + block.cross_attention(block.cross_norm(x), source, source_mask)
      x = x + block.mlp(block.mlp_norm(x))
    cache = dataclasses.replace(
      cache,
      keys=keys,
      values=values,
      segment_ids=segments,
      length=cache.length + target.shape[1],
    )
    return self._head(self.decoder.final_norm(x)), cache

  def _head(self, x: Array) -> Array:
    if self.config.scale_output:
      x = x * self.config.hidden_size**-0.5
    logits = self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)
    return logits.astype(jnp.float32)


def _linear(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
  init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
  return nnx.Linear(
    in_features,
    out_features,
    use_bias=False,
    kernel_init=init,
    dot_general=linear_dot_general,
    rngs=rngs,
  )


def _rms_norm(config: EncoderDecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, rngs=rngs)


def bidirectional_mask(segment_ids: Array, key_segment_ids: Array | None = None) -> Array:
  """Attention within segments, bool [batch, 1, seq, keys].

  A padding query sees every token that is not padding: nothing reads its output but a head on the
  first position of a left-padded row, and its softmax has a finite input.

  Args:
    segment_ids: int32 [batch, seq] of the queries; 0 is padding.
    key_segment_ids: int32 [batch, keys]; by default the queries'.
  """
  keys = segment_ids if key_segment_ids is None else key_segment_ids
  query, key = segment_ids[:, :, None], keys[:, None, :]
  return ((key != 0) & ((query == key) | (query == 0)))[:, None]
