"""The steps of a batch at the config's size: packed prefill, unpacking, padded prefill, decoding."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decode_step, decoder_config, replicated
from common.compilation.step import Step
from common.decoding.cache import unpack
from common.decoding.generation import bucket
from common.models.decoder import DecoderConfig, KVCache
from common.models.scan import ScannedDecoder, abstract_stack
from common.models.sharding import PyTree, cache_shardings, place, shardings
from common.training.mesh import make_mesh

# Prompts per packed row, k / B, for which the packed steps are sized.
PROMPTS_PER_ROW = 4


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Heads are cut over devices; rows are whole, as prompts move between them."""
  model = decoder_config(config.model)
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and model.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  prompts, length = config.batch_sizes[0], bucket(max(config.clips))
  scanned, params = abstract_stack(model, jnp.bfloat16)
  rows = -(-prompts // (PROMPTS_PER_ROW * mesh.shape["data"])) * mesh.shape["data"]
  room = length + config.new_tokens
  return [
    prefill_step("packed prefill", scanned, params, mesh, rows, length),
    unpack_step(model, mesh, rows, length, prompts, room),
    prefill_step("padded prefill", scanned, params, mesh, prompts, length),
    decode_step(scanned, params, mesh, batch_size=prompts, max_length=room),
  ]


def prefill_step(
  name: str, scanned: ScannedDecoder, params: PyTree, mesh: Mesh, rows: int, length: int
) -> Step:
  """One pass without logits: packed and padded rows differ in positions and segment ids only."""
  cache = jax.eval_shape(lambda: scanned.empty_cache(rows, length, jnp.bfloat16))
  cache_at = cache_shardings(cache, mesh)

  def step(params, tokens, positions, segment_ids):
    cache = scanned.empty_cache(rows, length, jnp.bfloat16)
    return scanned(params, tokens, positions=positions, segment_ids=segment_ids, cache=cache)[1]

  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  ids = place((ids,) * 3, replicated((ids,) * 3, mesh))
  return Step(
    f"{name}, {rows} x {length} tokens",
    jax.jit(step, out_shardings=cache_at),
    (place(params, shardings(params, mesh)), *ids),
  )


def unpack_step(
  model: DecoderConfig, mesh: Mesh, rows: int, length: int, prompts: int, room: int
) -> Step:
  """From packed rows to one prompt per row, of one layer."""
  layer = dataclasses.replace(model, num_layers=1)
  cache = jax.eval_shape(lambda: KVCache.empty(layer, rows, length, jnp.bfloat16))
  by_head = NamedSharding(mesh, PartitionSpec(None, "tensor"))
  everywhere = NamedSharding(mesh, PartitionSpec())
  at = jax.tree.map(lambda leaf: by_head if leaf.ndim == 4 else everywhere, cache)
  ids = jax.ShapeDtypeStruct((prompts,), jnp.int32, sharding=everywhere)

  def step(cache, prompt_rows, prompt_segments, lengths):
    return unpack(cache, prompt_rows, prompt_segments, lengths, room)

  name = f"unpack one layer, {rows} x {length} to {prompts} x {room} slots"
  return Step(name, step, (place(cache, at), ids, ids, ids))
