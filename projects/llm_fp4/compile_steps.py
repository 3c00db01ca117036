"""FPQ at the config's size, compiled for a TPU slice: does it fit, what does it cost?

A linear is searched with its calibration tokens cut over the slice. The folded 4-bit model is small
enough to lie on every device; rows are cut over the slice.
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
from common.compilation.step import Step
from common.errors import UserError
from common.models.decoder import Block, DecoderConfig
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding
from common.models.surgery import get_module, linear_paths, replace_module
from common.quantization.float_linear import FloatLinear
from common.quantization.linear import get_kernels
from common.training.mesh import make_mesh
from projects.llm_fp4.llm_fp4 import DEFAULT_FORMATS, FPQSettings, search_linear
from projects.llm_fp4.methods import fpq_settings

# Rows of the folded model's steps; slots of its cache.
ROWS, CACHE_LENGTH = 8, 2048

# One linear of each shape of a block.
SEARCHED = ("attention.q_proj", "mlp.up_proj", "mlp.down_proj")


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The search of a block's linears, and the folded model's two uses.

  Raises:
    UserError: the config has no decoder.
  """
  if not config.model:
    raise UserError("only a decoder's steps are compiled here; use the preset paper")
  model, settings = decoder_config(config.model), fpq_settings(config, config.bits)
  mesh = make_mesh({"data": -1}, devices)
  rows = -(-ROWS // len(devices)) * len(devices)
  return [
    *search_steps(config, model, settings, mesh),
    *folded_steps(model, settings, mesh, rows, config.eval_length),
  ]


def search_steps(
  config: ConfigDict, model: DecoderConfig, settings: FPQSettings, mesh: Mesh
) -> list[Step]:
  """`search_linear` of one linear of each shape, on all tokens or as many as the search takes."""
  kernels = nnx.eval_shape(lambda: get_kernels(Block(model, nnx.Rngs(0)), list(SEARCHED)))
  tokens = settings.tokens or config.calibration_samples * config.calibration_length
  tokens = -(-tokens // mesh.size) * mesh.size
  everywhere = NamedSharding(mesh, PartitionSpec())
  steps = []
  for path in SEARCHED:
    kernel = kernels[path]
    array = lambda *shape, sharding=everywhere: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=sharding
    )
    channels = kernel.shape[0]
    x = array(tokens, channels, sharding=batch_sharding(mesh))
    arguments = (array(*kernel.shape), x, array(channels))
    search = functools.partial(search_linear, settings=settings)
    name = path.rpartition(".")[2]
    steps.append(Step(f"search of {name}, {tokens} tokens", search, arguments))
  return steps


def folded_steps(
  model: DecoderConfig, settings: FPQSettings, mesh: Mesh, rows: int, length: int
) -> list[Step]:
  """Scoring and decoding with folded codes on every device."""

  def pack(block):
    for path in linear_paths(block):
      replace_module(block, path, empty_folded(get_module(block, path), settings))
    return block

  scanned, params = abstract_stack(model, jnp.bfloat16, edit_block=pack)
  common = {"batch_size": rows, "params_at": replicated(params, mesh)}
  return [
    scoring_step(scanned, params, mesh, seq_len=length, **common),
    decode_step(scanned, params, mesh, max_length=CACHE_LENGTH, **common),
  ]


def empty_folded(linear: nnx.Linear, settings: FPQSettings) -> FloatLinear:
  """A folded layer of a linear's size."""
  channels, outputs = linear.kernel.shape
  weight_format = DEFAULT_FORMATS[settings.weight_bits]
  return FloatLinear(
    jnp.zeros((channels, outputs), weight_format.dtype),
    jnp.zeros(outputs),
    jnp.zeros(channels, jnp.int32),
    jnp.zeros(()),
    None if linear.bias is None else linear.bias[...],
    weight_format=weight_format,
    activation_format=DEFAULT_FORMATS[settings.activation_bits],
    shift_weights=settings.fold == "exact",
  )
