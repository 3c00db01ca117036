"""AdaDim at the config's size, compiled for a TPU slice: does it fit, what does it cost?

Quantization runs one block at a time: the choice of every linear's axis, then GPTQ. The packed
model, with groups along both axes, is evaluated and decodes with its weights cut over `tensor`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decode_step, decoder_config, scoring_step
from common.compilation.step import Step
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import place, shardings
from common.quantization.linear import pack_linears
from common.quantization.quantized_array import IntegerFormat
from common.training.mesh import AXES, make_mesh
from projects.adadim.adadim import PER_IC, along, axis_errors, fixed_axes, rtn_weights
from projects.adadim.gptq_per_ic import gptq_per_ic
from projects.adadim.methods import methods

# Rows of the packed model's steps, if the slice has no more; slots of its cache.
ROWS, CACHE_LENGTH = 8, 2048


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The axis errors of a block, per-IC GPTQ, and the packed model's two uses."""
  model = decoder_config(config.model)
  tensor = tensor_parallelism(model, config.group_size, len(devices))
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  format = methods(config, config.bits, config.group_size)["RTN-heuristic"].format
  scanned, params = abstract_stack(
    model, jnp.bfloat16, edit_block=functools.partial(heuristic_block, format=format)
  )
  rows = -(-ROWS // mesh.shape["data"]) * mesh.shape["data"]
  length = min(CACHE_LENGTH, model.max_position_embeddings)
  return [
    choice_step(config, model, format, mesh),
    gptq_step(model, along(format, PER_IC), mesh),
    scoring_step(scanned, params, mesh, batch_size=rows, seq_len=config.eval_length),
    decode_step(scanned, params, mesh, batch_size=rows, max_length=length),
  ]


def tensor_parallelism(model: DecoderConfig, group_size: int, num_devices: int) -> int:
  """The widest of 8, 4, 2, 1 that cuts heads, vocabulary and whole groups of every weight."""
  group = model.hidden_size if group_size == -1 else group_size
  widths = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim)
  grouped = (*widths, model.hidden_size, model.intermediate_size)
  sizes = (num_devices, model.num_kv_heads, model.vocab_size, *(w // group for w in grouped))
  return next(n for n in (8, 4, 2, 1) if all(size % n == 0 for size in sizes))


def heuristic_block(block: Block, format: IntegerFormat) -> Block:
  """The block packed by RTN-heuristic: some linears along either axis."""
  pack_linears(block, rtn_weights(block, fixed_axes(block, "heuristic"), format))
  return block


def choice_step(config: ConfigDict, model: DecoderConfig, format, mesh: Mesh) -> Step:
  """Errors of both axes for every linear of a block, whose heads and MLP are cut over `tensor`."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(model, nnx.Rngs(0))))
  samples, length = config.calibration_samples, config.calibration_length
  everywhere = NamedSharding(mesh, PartitionSpec())
  positions = jnp.zeros((1, length), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(model, p, jnp.ones_like(p))[0], positions)
  x = jax.ShapeDtypeStruct((samples, length, model.hidden_size), jnp.float32)
  arguments = (
    place(state, shardings(state, mesh)),
    *place((x, context), jax.tree.map(lambda _: everywhere, (x, context))),
  )

  def errors(state, x, context):
    block = nnx.merge(graphdef, state)
    return axis_errors(block, x, context, format, reference=config.reference)

  return Step(f"axis errors of a block, {samples} x {length} tokens", errors, arguments)


def gptq_step(model: DecoderConfig, format: IntegerFormat, mesh: Mesh) -> Step:
  """Per-IC GPTQ of the widest linear: whole groups of outputs are cut, the Hessian is not."""
  inputs, outputs = model.intermediate_size, model.hidden_size
  whole_groups = format.num_groups((inputs, outputs))[1] % mesh.size == 0
  cut = PartitionSpec(None, AXES if whole_groups else "tensor")
  spread = lambda rows, columns, spec: jax.ShapeDtypeStruct(
    (rows, columns), jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  arguments = (spread(inputs, outputs, cut), spread(inputs, inputs, PartitionSpec()))
  function = functools.partial(gptq_per_ic, format=format, act_order=True)
  return Step("per-IC GPTQ of down_proj", function, arguments)
