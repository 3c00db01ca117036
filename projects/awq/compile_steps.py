"""AWQ at the config's size, compiled for a TPU slice: does it fit, what does it cost?

The searches run one block at a time, with the calibration samples spread over the slice; the
packed model is evaluated and decodes with its weights cut over `tensor`.
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
from common.models.sharding import batch_sharding, place, shardings
from common.quantization.awq import search_clip, search_group_scale
from common.quantization.calibration import rtn_block
from common.quantization.equivalent import scaling_groups
from common.quantization.gptq import gptq
from common.quantization.linear import get_kernels
from common.quantization.quantized_array import IntegerFormat
from common.training.mesh import AXES, make_mesh
from projects.awq.methods import awq_settings, integer_format

# Rows of the packed model's steps, if the slice has no more; slots of its cache.
ROWS, CACHE_LENGTH = 32, 4096

# The linear with the most inputs, and with as many weights as any.
WIDEST = "mlp.down_proj"


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Scale and clip searches, GPTQ of the widest linear, and the packed model's two uses."""
  model = decoder_config(config.model)
  tensor = tensor_parallelism(model, config.group_size, len(devices))
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  format = integer_format(config, config.bits)
  scanned, params = abstract_stack(
    model, jnp.bfloat16, edit_block=lambda block: rtn_block(block, format)
  )
  rows = multiple_of(mesh.shape["data"], ROWS)
  length = min(CACHE_LENGTH, model.max_position_embeddings)
  return [
    *search_steps(config, model, mesh),
    gptq_step(model, format, mesh),
    scoring_step(scanned, params, mesh, batch_size=rows, seq_len=config.eval_length),
    decode_step(scanned, params, mesh, batch_size=rows, max_length=length),
  ]


def tensor_parallelism(model: DecoderConfig, group_size: int, num_devices: int) -> int:
  """The widest of 8, 4, 2, 1 that cuts heads, vocabulary and whole groups of every weight."""
  group = model.hidden_size if group_size == -1 else group_size
  sizes = (
    num_devices,
    model.num_kv_heads,
    model.vocab_size,
    model.num_heads * model.head_dim // group,
    model.intermediate_size // group,
  )
  return next(n for n in (8, 4, 2, 1) if all(size % n == 0 for size in sizes))


def search_steps(config: ConfigDict, model: DecoderConfig, mesh: Mesh) -> list[Step]:
  """The scale search of every group of a block, and the clip search of its widest linear."""
  settings = awq_settings(config, integer_format(config, config.bits))
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(model, nnx.Rngs(0))))
  block = place(state, shardings(state, mesh))
  rows, length = (
    multiple_of(mesh.shape["data"], config.calibration_samples),
    config.calibration_length,
  )
  positions = jnp.zeros((1, length), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(model, p, jnp.ones_like(p))[0], positions)
  context = place(context, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), context))
  kernels = jax.eval_shape(lambda state: get_kernels(nnx.merge(graphdef, state)), state)
  features = lambda path: jax.ShapeDtypeStruct(
    (rows, length, kernels[path].shape[0]), jnp.float32, sharding=batch_sharding(mesh)
  )
  steps = []
  for group in scaling_groups(model):
    names = " + ".join(path.rpartition(".")[2] for path in group.linears)
    search = functools.partial(_search_group, graphdef, group, settings)
    arguments = (block, features(group.linears[0]), context)
    steps.append(Step(f"scale search of {names}, {rows} x {length} tokens", search, arguments))
  arguments = (columns_everywhere(kernels[WIDEST], mesh), features(WIDEST))
  search = functools.partial(search_clip, settings=settings)
  return [*steps, Step(f"clip search of down_proj, {rows} x {length} tokens", search, arguments)]


def gptq_step(model: DecoderConfig, format: IntegerFormat, mesh: Mesh) -> Step:
  """GPTQ of the widest linear: output channels are independent, the Hessian is on every device."""
  width = model.intermediate_size
  kernel = jax.ShapeDtypeStruct((width, model.hidden_size), jnp.float32)
  hessian = jax.ShapeDtypeStruct(
    (width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
  )
  function = functools.partial(gptq, format=format)
  return Step("GPTQ of down_proj", function, (columns_everywhere(kernel, mesh), hessian))


def columns_everywhere(kernel: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """A kernel [in, out] with its output channels cut over all devices."""
  sharding = NamedSharding(mesh, PartitionSpec(None, AXES))
  return jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding)


def multiple_of(count: int, wanted: int) -> int:
  """The smallest multiple of `count` that is at least `wanted`."""
  return -(-wanted // count) * count


def _search_group(graphdef, group, settings, block, x, context):
  return search_group_scale(graphdef, block, x, context, group, settings)
