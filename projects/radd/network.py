"""The network: a bidirectional transformer without time input, and SEDD's with it.

SEDD's diffusion transformer (DDiT) is told the noise by adaptive layer norms (adaLN). RADD's is the
same without them: pre-LN blocks, rotary positions, attention without biases, tanh-GELU. Both begin
with a uniform distribution, as their heads begin at zero. (Section 3.2 and appendix.)
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import (
  MLP,
  Attention,
  AttentionContext,
  Decoder,
  DecoderConfig,
  make_context,
)

Array = jax.Array

# Width of the noise's embedding, and of the sinusoids that it is made of.
CONDITION_DIM, SINUSOIDS = 128, 256
# Stacks of so many blocks are scanned: compilation does not grow with their depth.
SCANNED_FROM = 4


def decoder_config(
  vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_length: int
) -> DecoderConfig:
  """The sizes of all models here. Tokens are those of the vocabulary, and M behind them."""
  return DecoderConfig(
    vocab_size=vocab_size + 1,
    hidden_size=hidden_size,
    intermediate_size=4 * hidden_size,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=hidden_size // num_heads,
    max_position_embeddings=max_length,
    norm="layer",
    norm_eps=1e-5,
    activation="gelu_tanh",
    gated_mlp=False,
    mlp_bias=True,
  )


def autoregressive(config: DecoderConfig, rngs: nnx.Rngs) -> Decoder:
  """The baseline of the same size: causal attention, and M as its beginning-of-sequence token."""
  return Decoder(config, rngs=rngs)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Zeroes entries with probability `rate` and scales up the others; nothing without a key."""
  if key is None or rate == 0:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def layer_norm(config: DecoderConfig, adaptive: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """In float32. RADD's bias begins at 1, as in the official code; an adaptive norm has none."""
  return nnx.LayerNorm(
    config.hidden_size,
    epsilon=config.norm_eps,
    use_bias=not adaptive,
    bias_init=nnx.initializers.ones_init(),
    use_fast_variance=False,
    dtype=jnp.float32,
    rngs=rngs,
  )


def modulate(x: Array, shift: Array, scale: Array) -> Array:
  """x: [batch, seq, dim]; shift and scale: [batch, dim]."""
  return x * (1 + scale[:, None]) + shift[:, None]


def zero_linear(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear:
  """Weight and bias begin at zero."""
  zeros = nnx.initializers.zeros_init()
  return nnx.Linear(in_features, out_features, kernel_init=zeros, rngs=rngs)


class Block(nnx.Module):
  """x + gate dropout(attention(norm(x))), then the same with the MLP; no gate without time."""

  def __init__(self, config: DecoderConfig, rate: float, time: bool, rngs: nnx.Rngs):
    self.rate = rate
    self.attention_norm = layer_norm(config, time, rngs)
    self.attention = Attention(config, rngs)
    self.mlp_norm = layer_norm(config, time, rngs)
    self.mlp = MLP(config, rngs)
    width = 6 * config.hidden_size
    self.modulation = zero_linear(CONDITION_DIM, width, rngs) if time else None

  def __call__(
    self, x: Array, context: AttentionContext, condition: Array | None, key: Array | None
  ) -> Array:
    """x: [batch, seq, dim], condition: [batch, CONDITION_DIM] or None -> [batch, seq, dim]."""
    keys = (None, None) if key is None else jax.random.split(key)
    normed = self.attention_norm(x)
    if self.modulation is not None:
      parts = jnp.split(self.modulation(condition), 6, axis=-1)
      shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
      normed = modulate(normed, shift, scale)
    attended, _ = self.attention(normed.astype(x.dtype), context)
    attended = dropout(attended, self.rate, keys[0])
    x = x + (attended if self.modulation is None else gate[:, None] * attended)
    normed = self.mlp_norm(x)
    if self.modulation is not None:
      normed = modulate(normed, mlp_shift, mlp_scale)
    out = dropout(self.mlp(normed.astype(x.dtype)), self.rate, keys[1])
    return x + (out if self.modulation is None else mlp_gate[:, None] * out)


def run_blocks(
  blocks: Sequence[Block],
  x: Array,
  context: AttentionContext,
  condition: Array | None,
  keys: Array | None,
) -> Array:
  """The blocks one after the other; from `SCANNED_FROM` on as one compiled, rematerialised body.

  Args:
    blocks: all alike.
    x, context, condition: see `Block`.
    keys: for dropout, one for each block, or None.
  """
  if len(blocks) < SCANNED_FROM:
    for i, block in enumerate(blocks):
      x = block(x, context, condition, None if keys is None else keys[i])
    return x
  graphdef, _ = nnx.split(blocks[0])
  layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[nnx.state(b) for b in blocks])

  def body(x, layer):
    state, key = layer
    return nnx.merge(graphdef, state)(x, context, condition, key), None

  # prevent_cse is for code outside of loops, where XLA could undo the recomputation.
  return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, (layers, keys))[0]


class NoiseEmbedding(nnx.Module):
  """Sinusoids of the total noise through an MLP (SEDD's time embedding)."""

  def __init__(self, rngs: nnx.Rngs):
    self.time_in = nnx.Linear(SINUSOIDS, CONDITION_DIM, rngs=rngs)
    self.time_out = nnx.Linear(CONDITION_DIM, CONDITION_DIM, rngs=rngs)

  def __call__(self, noise: Array) -> Array:
    """[batch] -> [batch, CONDITION_DIM]."""
    half = SINUSOIDS // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    angles = noise[:, None].astype(jnp.float32) * frequencies
    sinusoids = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    x = sinusoids.astype(self.time_in.kernel.dtype)
    return nnx.silu(self.time_out(nnx.silu(self.time_in(x))))


class Denoiser(nnx.Module):
  """c(x)[i, a]: what a masked position is, given the tokens that are not masked.

  Attributes:
    mask_token: M, the token behind the vocabulary's last.
  """

  def __init__(
    self,
    config: DecoderConfig,
    *,
    dropout_rate: float = 0.0,
    time_conditioned: bool = False,
    rngs: nnx.Rngs,
  ):
    self.config = dataclasses.replace(config, causal=False)
    self.mask_token = config.vocab_size - 1
    dim = config.hidden_size
    limit = dim**-0.5  # Kaiming-uniform with a = sqrt(5).
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
    self.embed_tokens = nnx.Embed(config.vocab_size, dim, embedding_init=uniform, rngs=rngs)
    self.embed_noise = NoiseEmbedding(rngs) if time_conditioned else None
    self.blocks = nnx.List(
      [Block(self.config, dropout_rate, time_conditioned, rngs) for _ in range(config.num_layers)]
    )
    self.final_norm = layer_norm(config, time_conditioned, rngs)
    self.modulation = zero_linear(CONDITION_DIM, 2 * dim, rngs) if time_conditioned else None
    self.lm_head = zero_linear(dim, config.vocab_size, rngs)

  def __call__(self, tokens: Array, noise: Array | None = None, key: Array | None = None) -> Array:
    """log c, float32 [batch, seq, V].

    Args:
      tokens: int32 [batch, seq], M where masked.
      noise: total noise of each row, float32 [batch]; only a time-conditioned network reads it.
      key: for dropout; None for none.

    Returns:
      Log-probabilities over the real tokens. With time, SEDD's scaled output: the score is
      exp(output) / (V (exp(noise) - 1)), so that log c is the output less log V, not normalised.
    """
    positions = jnp.arange(tokens.shape[1])[None]
    context, _ = make_context(self.config, positions, jnp.ones_like(positions))
    condition = None if self.embed_noise is None else self.embed_noise(noise)
    keys = None if key is None else jax.random.split(key, len(self.blocks))
    x = run_blocks(self.blocks, self.embed_tokens(tokens), context, condition, keys)
    normed = self.final_norm(x)
    if self.modulation is not None:
      normed = modulate(normed, *jnp.split(self.modulation(condition), 2, axis=-1))
    # The channel of M itself means nothing.
    output = self.lm_head(normed.astype(x.dtype))[..., : self.mask_token].astype(jnp.float32)
    if self.embed_noise is None:
      return jax.nn.log_softmax(output)
    return output - math.log(self.mask_token)
