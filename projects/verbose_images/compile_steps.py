"""An iteration of the attack at BLIP-2's size, in parts: decoder, a block of the encoder, decoding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decode_step, replicated
from common.compilation.step import Step
from common.models.decoder import AttentionContext, Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding, place, shardings
from common.models.vit import VisionTransformerConfig
from common.training.mesh import make_mesh
from kernels.attention.masks import Tokens
from projects.verbose_images.verbose_images import (
  VERBOSE,
  Losses,
  balanced_weights,
  diversity_loss,
  eos_loss,
  temporal_decay,
  total_loss,
  uncertainty_loss,
)

OPT_2_7B = DecoderConfig(
  vocab_size=50272,
  hidden_size=2560,
  intermediate_size=10240,
  num_layers=32,
  num_heads=32,
  num_kv_heads=32,
  head_dim=80,
  max_position_embeddings=2048,
  norm="layer",
  norm_eps=1e-5,
  activation="relu",
  gated_mlp=False,
  qkv_bias=True,
  attention_out_bias=True,
  mlp_bias=True,
  position="learned",
  position_offset=2,
  tie_word_embeddings=True,
  family="opt",
)
# The encoder of BLIP-2, but for its patches' convolution.
VIT_G = VisionTransformerConfig(
  image_size=(224, 224),
  patch_size=(14, 14),
  hidden_size=1408,
  intermediate_size=6144,
  num_layers=39,
  num_heads=16,
)


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The decoder cut over the devices, its captions over rows."""
  mesh = make_mesh({"tensor": len(devices)}, devices)
  length = config.num_prefix + config.cap
  scanned, params = abstract_stack(OPT_2_7B, jnp.bfloat16)
  rows = config.batch_images * config.samples
  return [
    losses_step(config, mesh),
    encoder_step(config, mesh),
    decode_step(scanned, params, mesh, batch_size=rows, max_length=length),
  ]


def losses_step(config: ConfigDict, mesh) -> Step:
  """L and its gradient by the prefix, of one image under a text of full length."""
  scanned, params = abstract_stack(OPT_2_7B, jnp.bfloat16)
  everywhere = NamedSharding(mesh, PartitionSpec())
  prefix = jax.ShapeDtypeStruct(
    (1, config.num_prefix, OPT_2_7B.hidden_size), jnp.bfloat16, sharding=everywhere
  )
  tokens = jax.ShapeDtypeStruct((1, config.cap), jnp.int32, sharding=everywhere)
  iteration = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)

  def loss(prefix, params, tokens, iteration):
    outer = nnx.merge(scanned.outer, {k: v for k, v in params.items() if k != "blocks"})
    positions = jnp.arange(config.num_prefix + config.cap)[None]
    context, _ = make_context(OPT_2_7B, positions, jnp.ones_like(positions))
    first, rest = positions[:, : config.num_prefix], positions[:, config.num_prefix :]
    offset = OPT_2_7B.position_offset
    x = jnp.concatenate(
      [prefix + outer.embed_positions(first + offset), outer.embed(tokens, rest)], axis=1
    )

    @jax.checkpoint
    def body(x, block):
      return nnx.merge(scanned.block, block)(x, context)[0].astype(x.dtype), None

    x, _ = jax.lax.scan(body, x, params["blocks"])
    hidden = outer.head_input(x)[:, config.num_prefix - 1 : -1]
    logits, mask = outer.logits(hidden), jnp.ones(tokens.shape, bool)
    zero = jnp.zeros(1)
    losses = Losses(
      eos=eos_loss(logits, mask, config.eos),
      uncertainty=uncertainty_loss(logits, mask),
      diversity=diversity_loss(hidden.astype(jnp.float32), mask),
      nicg=zero,
      sponge=zero,
    )
    weights = balanced_weights(losses, temporal_decay(iteration))
    return total_loss(losses, weights, VERBOSE).sum()

  params = place(params, shardings(params, mesh))
  name = f"losses and gradient, 1 image, {config.num_prefix} + {config.cap} tokens"
  return Step(name, jax.value_and_grad(loss), (prefix, params, tokens, iteration))


def encoder_step(config: ConfigDict, mesh) -> Step:
  """A block of the encoder, there and back, for a batch of images."""
  block_config = VIT_G.block
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(block_config, nnx.Rngs(0))))
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state)
  shape = (config.batch_images, VIT_G.sequence_length, VIT_G.hidden_size)
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh))

  def there_and_back(state, x, cotangent):
    seq = Tokens(jnp.arange(x.shape[1])[None], jnp.ones((1, x.shape[1]), jnp.int32))
    context = AttentionContext(seq, seq, None, jnp.int32(0))
    forward = lambda x: nnx.merge(graphdef, state)(x, context)[0].astype(x.dtype)
    out, pull_back = jax.vjp(forward, x)
    return out, pull_back(cotangent)[0]

  arguments = (place(state, replicated(state, mesh)), x, x)
  return Step(f"a block of the encoder, {config.batch_images} images", there_and_back, arguments)
