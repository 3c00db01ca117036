"""ZeroQuant-V2 at the config's size, compiled for a TPU slice: does it fit, what does it cost?

A block at a time: ZQ-Global trains its weights on calibration samples that are spread over the
slice; GPTQ cuts a linear's output channels. The packed model scores with its corrections. LoRC's SVD is
not among the steps: the TPU compiler takes more than ten minutes for one of a 7B model's matrices, and
it needs no data, so that the host may do it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decoder_config, replicated, scoring_step
from common.compilation.step import Step
from common.models.base import FAMILIES
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding, place
from common.quantization.gptq import gptq
from common.quantization.linear import get_kernels
from common.quantization.quantized_array import IntegerFormat
from common.training.mesh import AXES, make_mesh
from projects.zeroquant_v2.evaluation import activation_format, parse_setting
from projects.zeroquant_v2.methods import integer_format, settings_of
from projects.zeroquant_v2.zeroquant_v2 import (
  ZeroQuantSettings,
  distill,
  pack_block,
  quantize_weight,
)


def _opt(hidden: int, layers: int, heads: int) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=50272,
    hidden_size=hidden,
    intermediate_size=4 * hidden,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=hidden // heads,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    **FAMILIES["opt"],
  )


# The paper preset's models, as in their config.json.
OPT_SIZES = {"facebook/opt-6.7b": _opt(4096, 32, 32), "facebook/opt-13b": _opt(5120, 40, 40)}


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The first model at the last of the settings."""
  name = config.models[0]
  model = OPT_SIZES[name] if name in OPT_SIZES else decoder_config(name)
  setting, group_size = config.method_settings[-1]
  bits, activation_bits = parse_setting(setting)
  format = integer_format(bits, group_size, config.symmetric)
  settings = dataclasses.replace(
    settings_of(config, "ZQ-Global", format, activation_format(activation_bits)),
    rank=config.rank,
    factor_bits=config.factor_bits,
  )
  mesh = make_mesh({"data": -1}, devices)
  return [
    distillation_step(config, model, settings, mesh),
    gptq_step(model, format, mesh),
    packed_scoring_step(config, model, settings, mesh),
  ]


def distillation_step(
  config: ConfigDict, model: DecoderConfig, settings: ZeroQuantSettings, mesh: Mesh
) -> Step:
  """ZQ-Global of one block: every learning rate, all its steps."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(model, nnx.Rngs(0))))
  samples = -(-config.calibration_samples // mesh.size) * mesh.size
  length = config.calibration_length
  positions = jnp.zeros((1, length), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(model, p, jnp.ones_like(p))[0], positions)
  where = batch_sharding(mesh).with_memory_kind(config.sample_memory)
  features = jax.ShapeDtypeStruct((samples, length, model.hidden_size), jnp.float32, sharding=where)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def step(state, x, targets, context, key):
    return distill(nnx.merge(graphdef, state), x, targets, context, key, settings)

  arguments = (
    place(state, jax.tree.map(lambda leaf: columns_everywhere(leaf, mesh), state)),
    features,
    features,
    place(context, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), context)),
    place(key, NamedSharding(mesh, PartitionSpec())),
  )
  steps = f"{len(config.learning_rates)} rates, {config.distillation_steps} steps"
  return Step(f"ZQ-Global of a block, {steps}, {samples} x {length} tokens", step, arguments)


def gptq_step(model: DecoderConfig, format: IntegerFormat, mesh: Mesh) -> Step:
  """GPTQ of a linear; the Hessian is on every device.

  That of down_proj, with four times the inputs, takes the TPU compiler more than ten minutes.
  """
  kernel = jax.ShapeDtypeStruct((model.hidden_size, model.intermediate_size), jnp.float32)
  hessian = jax.ShapeDtypeStruct((model.hidden_size,) * 2, jnp.float32)
  arguments = (
    place(kernel, columns_everywhere(kernel, mesh)),
    place(hessian, NamedSharding(mesh, PartitionSpec())),
  )
  return Step("GPTQ of up_proj", lambda w, h: gptq(w, h, format), arguments)


def packed_scoring_step(
  config: ConfigDict, model: DecoderConfig, settings: ZeroQuantSettings, mesh: Mesh
) -> Step:
  """The packed and compensated model on windows of text, a row on every device."""

  def pack(block):
    weights = {path: quantize_weight(w, settings.format) for path, w in get_kernels(block).items()}
    return pack_block(block, weights, settings)

  scanned, params = abstract_stack(model, jnp.bfloat16, edit_block=pack)
  return scoring_step(
    scanned,
    params,
    mesh,
    batch_size=mesh.size,
    seq_len=config.eval_length,
    params_at=replicated(params, mesh),
  )


def columns_everywhere(leaf, mesh: Mesh) -> NamedSharding:
  """Output channels, the last axis of every matrix, cut over all devices where they divide."""
  cut = leaf.ndim >= 2 and leaf.shape[-1] % mesh.size == 0
  return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - 1), AXES if cut else None))
