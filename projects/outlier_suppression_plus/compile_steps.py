"""Outlier Suppression+ at the config's size, compiled for a TPU slice: does it fit, what does it cost?

The searches run one block at a time on the search's samples, their columns or heads spread over the
slice; the packed model is evaluated with its weights cut over `tensor`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decoder_config, scoring_step
from common.compilation.step import Step
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.scan import abstract_stack
from common.models.sharding import place, shardings
from common.quantization.calibration import rtn_block
from common.quantization.equivalent import ScalingGroup
from common.training.mesh import make_mesh
from projects.outlier_suppression_plus.methods import settings_of
from projects.outlier_suppression_plus.outlier_suppression_plus import (
  Settings,
  search_site,
)
from projects.outlier_suppression_plus.sites import sites


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The search at every site of a block, and scoring with the packed model."""
  model = decoder_config(config.model)
  settings = settings_of(config, config.settings[-1])
  tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == model.num_kv_heads % n == 0)
  mesh = make_mesh({"data": -1, "tensor": tensor}, devices)
  scanned, params = abstract_stack(
    model, jnp.bfloat16, edit_block=lambda block: rtn_block(block, settings.weights)
  )
  return [
    *[
      search_step(config, model, settings, site, mesh)
      for site in sites(model, settings.linear_to_linear)
    ],
    scoring_step(scanned, params, mesh, batch_size=mesh.shape["data"], seq_len=config.eval_length),
  ]


def search_step(
  config: ConfigDict, model: DecoderConfig, settings: Settings, site: ScalingGroup, mesh: Mesh
) -> Step:
  """The threshold search of one site, all candidates."""
  owner = site.linears[0].split(".")[0]
  graphdef, state = nnx.split(nnx.eval_shape(lambda: getattr(Block(model, nnx.Rngs(0)), owner)))
  everywhere = NamedSharding(mesh, PartitionSpec())
  rows, length = settings.search_samples, config.calibration_length
  positions = jnp.zeros((1, length), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(model, p, jnp.ones_like(p))[0], positions)
  width = model.intermediate_size if site.linears[0].endswith("down_proj") else model.hidden_size
  vector = jax.ShapeDtypeStruct((width,), jnp.float32, sharding=everywhere)
  arguments = (
    place(state, shardings(state, mesh)),
    jax.ShapeDtypeStruct((rows, length, width), jnp.float32, sharding=everywhere),
    place(context, jax.tree.map(lambda _: everywhere, context)),
    vector,
    vector,
  )
  names = " + ".join(path.rpartition(".")[2] for path in site.linears)
  search = functools.partial(_search, graphdef, site, settings)
  return Step(f"scale search of {names}, {rows} x {length} tokens", search, arguments)


def _search(graphdef, site, settings, state, x, context, low, high):
  return search_site(
    graphdef,
    state,
    x,
    context,
    low,
    high,
    site,
    settings.objective,
    settings.weights,
    settings.activations,
    settings.lower_bound,
    settings.lower_fraction,
  )
