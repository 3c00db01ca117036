"""ThinK at the config's size, a block at a time: prefill with pruning, one token over the cache."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decoder_config
from common.compilation.step import Step
from common.decoding.eviction import snapkv_scores
from common.decoding.pruned_cache import Compression, PrunedCache, compress, observe, run_pruned
from common.models.decoder import Decoder, DecoderConfig
from common.models.sharding import place, shardings
from common.training.mesh import make_mesh
from projects.think.think import query_driven_scores

ROWS = 4  # Prompts decoded at once, if the slice has no more devices.


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """One block of the model: a whole prompt and its compression, and a decoding step."""
  whole = decoder_config(config.model)
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and whole.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  compression = Compression(
    query_driven_scores,
    ratio=config.main_ratio,
    recent=config.recent,
    window=config.window,
    evict=snapkv_scores,
    capacity=config.capacity,
  )
  length = -(-config.prompt_length // 32) * 32
  return [
    prefill_step(whole, mesh, compression, length, config.new_tokens),
    decode_step(whole, mesh, compression, length, config.new_tokens),
  ]


def one_block(whole: DecoderConfig, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
  """A model with one of the blocks and its abstract bfloat16 parameters.

  The vocabulary is left out: embedding and head take hidden states elsewhere.
  """
  config = dataclasses.replace(whole, num_layers=1, vocab_size=256, tie_word_embeddings=True)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state)
  return graphdef, place(state, shardings(state, mesh))


def prefill_step(
  whole: DecoderConfig, mesh: Mesh, compression: Compression, length: int, new_tokens: int
) -> Step:
  """Reads prompts, evicts tokens and drops channels."""
  graphdef, state = one_block(whole, mesh)

  def prefill(state, tokens, segment_ids):
    observed = observe(nnx.merge(graphdef, state), tokens, segment_ids)
    return observed.hidden[:, -1], compress(observed, segment_ids, compression, new_tokens)

  rows = mesh.shape["data"]
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=by_row(mesh))
  return Step(
    f"prefill and prune {rows} x {length} tokens, a block", jax.jit(prefill), (state, ids, ids)
  )


def decode_step(
  whole: DecoderConfig, mesh: Mesh, compression: Compression, length: int, new_tokens: int
) -> Step:
  """One token over a pruned cache."""
  graphdef, state = one_block(whole, mesh)
  rows = -(-ROWS // mesh.shape["data"]) * mesh.shape["data"]

  def cache_of(state, tokens):
    observed = observe(nnx.merge(graphdef, state), tokens, jnp.ones_like(tokens))
    return compress(observed, jnp.ones_like(tokens), compression, new_tokens)

  cache = jax.eval_shape(cache_of, state, jax.ShapeDtypeStruct((rows, length), jnp.int32))

  def decode(state, token, positions, cache: PrunedCache):
    x, cache = run_pruned(nnx.merge(graphdef, state), token, positions, cache)
    return x, cache

  ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=by_row(mesh))
  return Step(
    f"decode {rows} x 1 tokens over {compression.capacity} pruned slots, a block",
    jax.jit(decode, donate_argnums=3),
    (state, ids, ids, place(cache, jax.tree.map(functools.partial(cache_sharding, mesh), cache))),
  )


def by_row(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec("data"))


def cache_sharding(mesh: Mesh, x: jax.ShapeDtypeStruct) -> NamedSharding:
  """Keys, values and channels by row and head, lengths everywhere."""
  axes = ("data", "tensor")[: 2 if x.ndim > 1 else x.ndim]
  return NamedSharding(mesh, PartitionSpec(*axes))
