"""One config-driven decoder: Llama, Mistral, Qwen2, OPT, GPT-2, GPT-NeoX and BLOOM.

`DecoderConfig` says what a family does differently; there is no copy per family. The forward pass
takes explicit positions and segment ids, so that padding on either side, packed documents and a
KV cache are all the same rule: a token attends to the tokens of its own segment whose position is
not after its own.

Shapes: `batch` rows, `seq` tokens, `heads` query heads, `kv_heads` key/value heads, `dim` the
hidden size. Linear kernels are [in_features, out_features].
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.activations import ACTIVATIONS, Activation
from common.models.attention import merge_heads, split_heads
from common.models.linear import linear_dot_general
from common.models.sharding import CACHE_ENTRY, constrain
from kernels.attention.api import attention
from kernels.attention.masks import Tokens

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the training length.

  kind "linear" divides positions by `factor`; "dynamic" (NTK-aware) raises theta once the sequence
  is longer than `original_max_position`; "llama3" stretches low frequencies only.
  """

  kind: Literal["linear", "dynamic", "llama3"]
  factor: float
  original_max_position: int
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Architecture of a decoder-only language model."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_position_embeddings: int
  norm: Literal["rms", "layer"] = "rms"
  norm_eps: float = 1e-6
  norm_placement: Literal["pre", "post"] = "pre"
  parallel_residual: bool = False
  final_norm: bool = True
  embedding_norm: bool = False
  embedding_dim: int | None = None  # OPT-350m projects embeddings of another width in and out.
  activation: Activation = "silu"
  gated_mlp: bool = True
  qkv_bias: bool = False
  attention_out_bias: bool = False
  mlp_bias: bool = False
  position: Literal["rope", "learned", "alibi"] = "rope"
  position_offset: int = 0  # OPT's table of learned positions starts at row 2.
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rotary_dim: int | None = None  # None rotates the whole head.
  causal: bool = True
  sliding_window: int | None = None
  full_attention_layers: tuple[int, ...] = ()  # Blocks without the window (Qwen2).
  tie_word_embeddings: bool = False
  family: str = "llama"  # The Hugging Face model_type that this config reads and writes.

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads={self.num_heads} is no multiple of {self.num_kv_heads} kv heads")


class AttentionContext(NamedTuple):
  """What every block of one forward pass shares.

  Attributes:
    queries: positions and segments of this pass's tokens, [batch, seq]; batch may be 1 for all rows.
    keys: of the tokens that they may attend to, [batch, keys]: the cache's, or their own.
    rope: (cos, sin), float32 [batch, seq, rotary_dim / 2], or None.
    offset: int32 [] or [batch], where this pass writes its keys in the cache (0 without a cache).
    mask: bool [batch, 1, seq, keys], what a query may attend to besides; None for no more rules.
  """

  queries: Tokens
  keys: Tokens
  rope: tuple[Array, Array] | None
  offset: Array
  mask: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVCache:
  """Keys and values of the tokens seen so far, outside the model.

  Attributes:
    keys: per block [batch, kv_heads, max_length, head_dim], rotated already.
    values: per block [batch, kv_heads, max_length, head_dim].
    positions: int32 [batch, max_length].
    segment_ids: int32 [batch, max_length]; 0 marks padding and slots not yet written.
    length: int32 [], number of slots written; or [batch], where rows differ in it.
  """

  keys: list[Array]
  values: list[Array]
  positions: Array
  segment_ids: Array
  length: Array

  @classmethod
  def empty(cls, config: DecoderConfig, batch: int, max_length: int, dtype=jnp.float32):
    """An empty cache, cut over the current mesh like its batch and its heads."""
    shape = (batch, config.num_kv_heads, max_length, config.head_dim)
    entry = lambda: constrain(jnp.zeros(shape, dtype), *CACHE_ENTRY)
    return cls(
      keys=[entry() for _ in range(config.num_layers)],
      values=[entry() for _ in range(config.num_layers)],
      positions=jnp.zeros((batch, max_length), jnp.int32),
      segment_ids=jnp.zeros((batch, max_length), jnp.int32),
      length=jnp.zeros((), jnp.int32),
    )


def write_slots(cache: Array, new: Array, offset: Array, axis: int) -> Array:
  """Writes new entries from slot `offset` on, of every row ([]) or of each ([batch]).

  There must be room for all of them: else they would be written before the offset.
  """
  new = new.astype(cache.dtype)
  if offset.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(cache, new, offset, axis=axis)
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
  return jax.vmap(write)(cache, new, offset)


def rope_frequencies(config: DecoderConfig, longest: Array) -> Array:
  """Rotary frequencies in radians per position, float32 [rotary_dim / 2].

  Args:
    config: gives theta, the rotated width and the scaling.
    longest: int32 [], length of the longest sequence; only "dynamic" scaling depends on it.
  """
  dim = config.rotary_dim or config.head_dim
  exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
  scaling = config.rope_scaling
  theta = jnp.float32(config.rope_theta)
  if scaling is not None and scaling.kind == "dynamic":
    ratio = jnp.maximum(longest / scaling.original_max_position, 1.0)
    theta = theta * (scaling.factor * ratio - (scaling.factor - 1)) ** (dim / (dim - 2))
  frequencies = 1.0 / theta**exponents
  if scaling is not None and scaling.kind == "linear":
    frequencies = frequencies / scaling.factor
  if scaling is not None and scaling.kind == "llama3":
    # Wavelengths short against the training length keep their frequency, long ones are divided by
    # `factor`, and the band between is interpolated.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (
      scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = jnp.clip(smooth, 0.0, 1.0)
    frequencies = frequencies * (smooth + (1 - smooth) / scaling.factor)
  return frequencies


def apply_rope(x: Array, rope: tuple[Array, Array]) -> Array:
  """Rotates the leading channels of each head by halves. x: [batch, heads, seq, head_dim]."""
  cos, sin = (table[:, None] for table in rope)
  half = cos.shape[-1]
  a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
  rotated = [a * cos - b * sin, b * cos + a * sin, rest]
  return jnp.concatenate([part.astype(x.dtype) for part in rotated], axis=-1)


def alibi_slopes(num_heads: int) -> Array:
  """Per-head slopes of ALiBi, float32 [heads] (Press et al. 2022, with BLOOM's interpolation)."""
  power = 2 ** math.floor(math.log2(num_heads))
  base = 2.0 ** (-8.0 / power)
  slopes = [base ** (i + 1) for i in range(power)]
  between = 2.0 ** (-4.0 / power)
  slopes += [between ** (2 * i + 1) for i in range(num_heads - power)]
  return jnp.array(slopes, jnp.float32)


def _norm(config: DecoderConfig, features: int, rngs: nnx.Rngs):
  if config.norm == "rms":
    return nnx.RMSNorm(features, epsilon=config.norm_eps, rngs=rngs)
  # The fast variance E[x^2] - E[x]^2 cancels on channels with a large mean.
  return nnx.LayerNorm(features, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs)


def _linear(in_features: int, out_features: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
  init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
  return nnx.Linear(
    in_features,
    out_features,
    use_bias=bias,
    kernel_init=init,
    dot_general=linear_dot_general,
    rngs=rngs,
  )


class Attention(nnx.Module):
  """Multi-head attention with grouped key/value heads."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, full_attention: bool = False):
    self.causal = config.causal
    self.sliding_window = None if full_attention else config.sliding_window
    self.alibi = config.position == "alibi"
    query_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    self.head_dim = config.head_dim
    self.q_proj = _linear(config.hidden_size, query_width, config.qkv_bias, rngs)
    self.k_proj = _linear(config.hidden_size, kv_width, config.qkv_bias, rngs)
    self.v_proj = _linear(config.hidden_size, kv_width, config.qkv_bias, rngs)
    self.o_proj = _linear(query_width, config.hidden_size, config.attention_out_bias, rngs)
    # Surgery may put a module here, which then sees the operands of both products.
    self.attend = attention

  def __call__(self, x: Array, context: AttentionContext, kv=None):
    """x: [batch, seq, dim] -> ([batch, seq, dim], the block's updated (keys, values) or None)."""
    split = lambda y, heads: constrain(split_heads(y, self.head_dim), "batch", heads, None, None)
    query = split(self.q_proj(x), "heads")
    key, value = split(self.k_proj(x), "kv_heads"), split(self.v_proj(x), "kv_heads")
    if context.rope is not None:
      query, key = apply_rope(query, context.rope), apply_rope(key, context.rope)
    if kv is not None:
      write = lambda cache, new: write_slots(cache, new, context.offset, axis=2)
      key, value = kv = write(kv[0], key), write(kv[1], value)
      key, value = key.astype(query.dtype), value.astype(query.dtype)
    out = self.attend(
      query,
      key,
      value,
      positions=context.queries.positions,
      segment_ids=context.queries.segment_ids,
      key_positions=context.keys.positions,
      key_segment_ids=context.keys.segment_ids,
      causal=self.causal,
      sliding_window=self.sliding_window,
      alibi_slopes=alibi_slopes(query.shape[1]) if self.alibi else None,
      mask=context.mask,
    )
    return self.o_proj(merge_heads(out)), kv


class MLP(nnx.Module):
  """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    dim, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    self.gate_proj = _linear(dim, hidden, bias, rngs) if config.gated_mlp else None
    self.up_proj = _linear(dim, hidden, bias, rngs)
    self.activation = ACTIVATIONS[config.activation]
    self.down_proj = _linear(hidden, dim, bias, rngs)

  def __call__(self, x: Array) -> Array:
    """x: [batch, seq, dim] -> [batch, seq, dim]."""
    if self.gate_proj is None:
      return self.down_proj(self.activation(self.up_proj(x)))
    return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """One transformer layer; `full_attention` exempts it from the config's sliding window."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, full_attention: bool = False):
    self.norm_placement = config.norm_placement
    self.parallel_residual = config.parallel_residual
    self.attention_norm = _norm(config, config.hidden_size, rngs)
    self.attention = Attention(config, rngs, full_attention)
    self.mlp_norm = _norm(config, config.hidden_size, rngs)
    self.mlp = MLP(config, rngs)

  def __call__(self, x: Array, context: AttentionContext, kv=None):
    """x: [batch, seq, dim] -> ([batch, seq, dim], updated (keys, values) or None)."""
    # Each device keeps its rows whole, so that weights travel between devices, not activations.
    x = constrain(x, "batch", None, "residual")
    if self.norm_placement == "post":
      attended, kv = self.attention(x, context, kv)
      x = self.attention_norm(x + attended)
      return self.mlp_norm(x + self.mlp(x)), kv
    attended, kv = self.attention(self.attention_norm(x), context, kv)
    if self.parallel_residual:
      return x + attended + self.mlp(self.mlp_norm(x)), kv
    x = x + attended
    return x + self.mlp(self.mlp_norm(x)), kv


class Decoder(nnx.Module):
  """Decoder-only language model."""

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    width = config.embedding_dim or config.hidden_size
    init = nnx.initializers.normal(0.02)
    self.embed_tokens = nnx.Embed(config.vocab_size, width, embedding_init=init, rngs=rngs)
    rows = config.max_position_embeddings + config.position_offset
    self.embed_positions = (
      nnx.Embed(rows, config.hidden_size, embedding_init=init, rngs=rngs)
      if config.position == "learned"
      else None
    )
    projects = width != config.hidden_size
    self.project_in = _linear(width, config.hidden_size, False, rngs) if projects else None
    self.project_out = _linear(config.hidden_size, width, False, rngs) if projects else None
    self.embed_norm = _norm(config, config.hidden_size, rngs) if config.embedding_norm else None
    full = [i in config.full_attention_layers for i in range(config.num_layers)]
    self.blocks = nnx.List([Block(config, rngs, f) for f in full])
    self.final_norm = _norm(config, config.hidden_size, rngs) if config.final_norm else None
    tied = config.tie_word_embeddings
    self.lm_head = None if tied else _linear(width, config.vocab_size, False, rngs)

  def __call__(
    self,
    tokens: Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: KVCache | None = None,
    mask: Array | None = None,
  ) -> tuple[Array, KVCache | None]:
    """Runs the model.

    Args:
      tokens: int32 [batch, seq].
      positions: int32 [batch, seq]; by default 0, 1, ... (continued after the cache's tokens).
      segment_ids: int32 [batch, seq], 0 for padding; by default all 1.
      cache: keys and values to read and to append to.
      mask: bool [batch, seq, seq] (batch may be 1), which of these tokens each of them may attend to
        besides the usual rules, as in a tree of drafts; what the cache holds is not concerned.

    Returns:
      logits float32 [batch, seq, vocab], and the updated cache (None without one).
    """
    x, cache = self.run_blocks(tokens, positions, segment_ids, cache, mask)
    return self.head(x), cache

  def run_blocks(
    self,
    tokens: Array,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: KVCache | None = None,
    mask: Array | None = None,
  ) -> tuple[Array, KVCache | None]:
    """As `__call__`, up to the last block's output [batch, seq, dim], which `head` takes."""
    if positions is None:
      start = jnp.zeros((), jnp.int32) if cache is None else cache.length
      positions = jnp.broadcast_to(start[..., None] + jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    context, cache = self.context(positions, segment_ids, cache)
    if mask is not None:
      context = context._replace(mask=_over_slots(mask, context))
    x = self.embed(tokens, positions)
    for i, block in enumerate(self.blocks):
      x, kv = block(x, context, None if cache is None else (cache.keys[i], cache.values[i]))
      if cache is not None:
        cache.keys[i], cache.values[i] = kv
    if cache is not None:
      cache.length = cache.length + tokens.shape[1]
    return x, cache

  def context(self, positions: Array, segment_ids: Array, cache: KVCache | None = None):
    """Returns the blocks' `AttentionContext` and the cache with these tokens' ids written."""
    return make_context(self.config, positions, segment_ids, cache)

  def stem(self, tokens: Array, segment_ids: Array | None = None) -> tuple[Array, AttentionContext]:
    """What comes before the blocks: their input [batch, seq, dim] and their context.

    Args:
      tokens: int32 [batch, seq].
      segment_ids: int32 [batch, seq], 0 for padding; by default all 1, and the context is that of
        one row.
    """
    positions = jnp.arange(tokens.shape[1])[None]
    segments = jnp.ones_like(positions) if segment_ids is None else segment_ids
    context, _ = self.context(jnp.broadcast_to(positions, segments.shape), segments)
    return self.embed(tokens, jnp.broadcast_to(positions, tokens.shape)), context

  def embed(self, tokens: Array, positions: Array) -> Array:
    """int32 [batch, seq] -> [batch, seq, dim], the first block's input."""
    x = self.embed_tokens(tokens)
    if self.project_in is not None:
      x = self.project_in(x)
    if self.embed_positions is not None:
      x = x + self.embed_positions(positions + self.config.position_offset)
    return x if self.embed_norm is None else self.embed_norm(x)

  def head(self, x: Array) -> Array:
    """The last block's output [batch, seq, dim] -> logits float32 [batch, seq, vocab]."""
    return self.logits(self.head_input(x))

  def logits(self, x: Array) -> Array:
    """What `head_input` returns, [..., width] -> logits float32 [..., vocab]."""
    logits = self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)
    return logits.astype(jnp.float32)

  def head_input(self, x: Array) -> Array:
    """The last block's output -> what the logits are a product of, [batch, seq, width]."""
    if self.final_norm is not None:
      x = self.final_norm(x)
    return x if self.project_out is None else self.project_out(x)

  @property
  def head_kernel(self) -> Array:
    """The other factor of the logits, [width, vocab]; only of a head that is not quantized."""
    tied = self.lm_head is None
    return self.embed_tokens.embedding[...].T if tied else self.lm_head.kernel[...]


def make_context(
  config: DecoderConfig, positions: Array, segment_ids: Array, cache: KVCache | None = None
) -> tuple[AttentionContext, KVCache | None]:
  """`AttentionContext` of one forward pass, and the cache with the new tokens' ids written.

  Args:
    config: the decoder's.
    positions, segment_ids: int32 [batch, seq] of the new tokens.
    cache: the cache before the pass; its own fields are not modified.

  Raises:
    ValueError: the cache has fewer slots than there are new tokens. (How many of them are taken is
      known on the device only: whoever makes the cache sees to it that the tokens fit.)
  """
  key_positions, key_segments, offset = positions, segment_ids, jnp.zeros((), jnp.int32)
  if cache is not None:
    if positions.shape[1] > cache.positions.shape[1]:
      raise ValueError(
        f"{positions.shape[1]} tokens do not fit into a cache of {cache.positions.shape[1]}"
      )
    offset = cache.length
    key_positions = write_slots(cache.positions, positions, offset, axis=1)
    key_segments = write_slots(cache.segment_ids, segment_ids, offset, axis=1)
    cache = KVCache(list(cache.keys), list(cache.values), key_positions, key_segments, offset)
  rope = None
  if config.position == "rope":
    longest = jnp.max(jnp.where(key_segments != 0, key_positions, 0)) + 1
    angles = positions[..., None] * rope_frequencies(config, longest)
    # Made once: fused into every layer's rotation, they would be computed again for every head.
    rope = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
  queries, keys = Tokens(positions, segment_ids), Tokens(key_positions, key_segments)
  return AttentionContext(queries, keys, rope, offset), cache


def _over_slots(mask: Array, context: AttentionContext) -> Array:
  """A mask among new tokens [batch, seq, seq] -> over all keys [batch, 1, seq, keys]."""
  keys = context.keys.positions.shape[1]
  offset = context.offset
  rows = len(mask) if offset.ndim == 0 else len(offset)
  mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))
  everything = jnp.ones((*mask.shape[:2], keys), bool)
  return write_slots(everything, mask, offset, axis=2)[:, None]
