"""VPTQ at the config's size, compiled for a TPU slice: does it fit, what does it cost?

A block's linears do not know of each other: each is quantized on a device of its own. The packed
model is small enough to lie on every device; rows are cut over the slice.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import (
  decode_step,
  decoder_config,
  replicated,
  scoring_step,
)
from common.compilation.step import Step, independent
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding
from common.models.surgery import linear_paths
from common.quantization.calibration import block_hessians
from common.quantization.linear import get_kernels
from common.quantization.vector_quantized import VectorQuantizedArray
from common.training.mesh import make_mesh
from projects.vptq.blocks import replace_linears
from projects.vptq.kmeans import lloyd
from projects.vptq.methods import settings
from projects.vptq.vptq import (
  VPTQSettings,
  column_pass,
  inverse_factor,
  to_vectors,
  vector_mask,
  vptq,
)

# Rows of the packed model's steps; slots of its cache.
ROWS, CACHE_LENGTH = 8, 4096


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Hessians of a block, the parts of VPTQ of a linear, and the packed model's two uses."""
  model = decoder_config(config.model)
  method = settings(config)
  mesh = make_mesh({"data": -1}, devices)
  rows = -(-ROWS // len(devices)) * len(devices)
  return [
    hessian_step(config, model, mesh),
    *linear_steps("up_proj", (model.hidden_size, model.intermediate_size), method, devices),
    *packed_steps(model, method, mesh, rows, config.eval_length),
  ]


def abstract_weight(w: jax.Array, method: VPTQSettings) -> VectorQuantizedArray:
  """The shapes of `vptq`'s result for a kernel [in, out]."""
  hessian = jax.ShapeDtypeStruct((w.shape[0],) * 2, jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  weight, _ = jax.eval_shape(functools.partial(vptq, settings=method), w, hessian, key)
  return weight


def hessian_step(config: ConfigDict, model: DecoderConfig, mesh: Mesh) -> Step:
  """Hessians of all linears of one block, the samples spread over the slice."""
  block = nnx.eval_shape(lambda: Block(model, nnx.Rngs(0)))
  paths = linear_paths(block)
  graphdef, state = nnx.split(block)
  everywhere = NamedSharding(mesh, PartitionSpec())
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=everywhere), state
  )
  rows = -(-config.calibration_samples // mesh.size) * mesh.size
  length = config.calibration_length
  x = jax.ShapeDtypeStruct(
    (rows, length, model.hidden_size), jnp.bfloat16, sharding=batch_sharding(mesh)
  )

  def hessians(state, x):
    positions = jnp.arange(length)[None]
    context, _ = make_context(model, positions, jnp.ones_like(positions))
    return block_hessians(nnx.merge(graphdef, state), x, context, paths)

  return Step(f"Hessians of a block, {rows} x {length} tokens", hessians, (state, x))


def linear_steps(
  name: str, shape: tuple[int, int], method: VPTQSettings, devices: Sequence[jax.Device]
) -> list[Step]:
  """What `vptq` runs for one linear [in, out], one linear a device: its k-means and its pass.

  The draw of the k-means' starting vectors is not among them.
  """
  rows, columns = shape
  v, k = method.vector_length, method.num_centroids
  array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)

  def kmeans(w, importance, start):
    weights = importance[:, None, None] * vector_mask(columns, v)
    return lloyd(to_vectors(w, v).reshape(-1, v), weights.reshape(-1, v), start)[0]

  def feedback(w, h, codebooks):
    return column_pass(w, inverse_factor(h, method.damping), codebooks)

  each = lambda function: lambda *linears: jax.lax.map(lambda linear: function(*linear), linears)
  return [
    independent(
      f"k-means of {name}",
      each(kmeans),
      (array(rows, columns), array(rows), array(k, v)),
      devices,
    ),
    independent(
      f"Cholesky factor and pass of {name}",
      each(feedback),
      (array(rows, columns), array(rows, rows), array(method.num_groups, k, v)),
      devices,
    ),
  ]


def packed_steps(
  model: DecoderConfig, method: VPTQSettings, mesh: Mesh, rows: int, length: int
) -> list[Step]:
  """Scoring and decoding with packed weights on every device."""

  def pack(block):
    kernels = get_kernels(block)
    shapes = {path: abstract_weight(w, method) for path, w in kernels.items()}
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    return replace_linears(block, {p: jax.tree.map(zeros, w) for p, w in shapes.items()})

  scanned, params = abstract_stack(model, jnp.bfloat16, edit_block=pack)
  common = {"batch_size": rows, "params_at": replicated(params, mesh)}
  return [
    scoring_step(scanned, params, mesh, seq_len=length, **common),
    decode_step(scanned, params, mesh, max_length=CACHE_LENGTH, **common),
  ]
