"""Reading prompts, ranking first tokens and completing branches at the config's size."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decode_step, decoder_config
from common.compilation.step import Step
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding
from common.training.mesh import make_mesh
from projects.icn.icn import next_tokens
from projects.icn.lm_training import lm_config


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Steps of the model asked; prompts are as long as the longest of `prompt_lengths`."""
  model = decoder_config(config.model) if config.model else lm_config(config)
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and model.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  whole = lambda rows: -(-rows // mesh.shape["data"]) * mesh.shape["data"]
  scanned, params = abstract_stack(model, jnp.bfloat16)
  longest = max(config.prompt_lengths)
  prompts, branches = whole(config.prompt_batch), whole(config.branch_batch)
  decode = functools.partial(decode_step, scanned, params, mesh)
  tokens = max(config.max_new_tokens, config.cot_tokens if config.cot_tasks else 0)
  return [
    # One prompt after the other: its logits at every position would not fit beside others'.
    decode(batch_size=whole(1), max_length=longest, new_tokens=longest),
    ranking_step(model.vocab_size, prompts, config.per_round, mesh),
    decode(batch_size=branches, max_length=min(config.prompt_lengths) + tokens),
  ]


def ranking_step(vocab: int, rows: int, per_round: int, mesh) -> Step:
  """The first tokens of a round."""
  spread = functools.partial(jax.ShapeDtypeStruct, (rows, vocab), sharding=batch_sharding(mesh))
  groups = jax.ShapeDtypeStruct((vocab,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
  rank = functools.partial(next_tokens, count=per_round)
  return Step(
    f"rank {vocab} first tokens of {rows} prompts",
    lambda logits, probed, groups: rank(logits, probed, groups),
    (spread(jnp.float32), spread(jnp.bool_), groups),
  )
