"""SpecDec++ at the config's size: head training, a drafted token with its score, verification."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decode_step, decoder_config, replicated
from common.compilation.step import Step
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding, place, shardings
from common.training.mesh import make_mesh
from common.training.train_step import TrainState
from projects.specdec_pp.experiment import settings_of
from projects.specdec_pp.head_training import training_step
from projects.specdec_pp.specdec_pp import acceptance_probability, init_head

# Rows decoded at once, if the slice has no more.
ROWS = 4


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Steps of the draft and of the head, and of a block of the target where it does not fit whole."""
  draft, target = decoder_config(config.draft or config.model), decoder_config(config.model)
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and target.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  rows = -(-ROWS // mesh.shape["data"]) * mesh.shape["data"]
  length = config.prompt_length + config.new_tokens + config.max_drafts + 2
  scanned, params = abstract_stack(draft, jnp.bfloat16)
  return [
    head_step(config, draft, mesh),
    decode_step(scanned, params, mesh, batch_size=rows, max_length=length),
    score_step(config, draft, mesh, rows),
    verification_step(target, mesh, rows, config.max_drafts + 1, length),
  ]


def head_step(config: ConfigDict, draft: DecoderConfig, mesh: Mesh) -> Step:
  """Training of the head on states of the frozen draft, cut over rows."""
  settings = settings_of(config)
  width, rows = draft.hidden_size, -(-settings.batch_size // mesh.size) * mesh.size
  tied = settings.num_blocks if settings.tied_blocks else None
  optimizer, step = training_step(settings.learning_rate, 1000, tied)
  key = jax.eval_shape(lambda: jax.random.key(0))
  blocks = 1 if settings.tied_blocks else settings.num_blocks
  head = jax.eval_shape(lambda key: init_head(key, width, blocks), key)
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=head,
    opt_state=jax.eval_shape(optimizer.init, head),
    key=key,
  )
  spread = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
  batch = {
    "hidden": spread((rows, config.new_tokens, width), jnp.bfloat16),
    "labels": spread((rows, config.new_tokens), jnp.float32),
  }
  weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
  arguments = (place(state, replicated(state, mesh)), batch, weight)
  return Step(
    f"train the head, {rows} x {config.new_tokens} tokens",
    step,
    arguments,
  )


def score_step(config: ConfigDict, draft: DecoderConfig, mesh: Mesh, rows: int) -> Step:
  """What SpecDec++ adds to a drafted token: its predicted acceptance."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  head = jax.eval_shape(lambda key: init_head(key, draft.hidden_size, config.num_blocks), key)
  hidden = jax.ShapeDtypeStruct(
    (rows, draft.hidden_size), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
  )
  arguments = (place(head, replicated(head, mesh)), hidden)
  return Step(f"score {rows} drafted tokens", acceptance_probability, arguments)


def verification_step(
  target: DecoderConfig, mesh: Mesh, rows: int, new_tokens: int, length: int
) -> Step:
  """A block of the target over the drafts of a round, against a cache of full length."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(target, rngs=nnx.Rngs(0))))
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state)
  everywhere = NamedSharding(mesh, PartitionSpec())
  by_head = NamedSharding(mesh, PartitionSpec(None, "tensor"))
  x = jax.ShapeDtypeStruct(
    (rows, new_tokens, target.hidden_size), jnp.bfloat16, sharding=everywhere
  )
  ids = jax.ShapeDtypeStruct((rows, new_tokens), jnp.int32, sharding=everywhere)
  offset = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=everywhere)
  keys = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=everywhere)
  kv = jax.ShapeDtypeStruct(
    (rows, target.num_kv_heads, length, target.head_dim), jnp.bfloat16, sharding=by_head
  )

  def verify(state, x, positions, key_positions, key_segments, offset, kv):
    context, _ = make_context(target, positions, jnp.ones_like(positions))
    keys = context.keys._replace(positions=key_positions, segment_ids=key_segments)
    block = nnx.merge(graphdef, state)
    return block(x, context._replace(keys=keys, offset=offset), kv)

  return Step(
    f"verify {rows} x {new_tokens} tokens, a block of the target, cache {length}",
    jax.jit(verify, donate_argnums=6),
    (place(state, shardings(state, mesh)), x, ids, keys, keys, offset, (kv, kv)),
  )
