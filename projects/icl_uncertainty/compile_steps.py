"""Training at the config's size, data-parallel, compiled for a TPU slice."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.step import Step
from common.models.sharding import RULES
from common.training.mesh import make_mesh
from projects.icl_uncertainty.experiment import models
from projects.icl_uncertainty.icl_uncertainty import init_states, make_update, scan_updates
from projects.icl_uncertainty.prompts import PromptDistribution, UniformNoise, sample_prompts
from projects.icl_uncertainty.tables import FRESH


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """A chunk of batches drawn, and the chunk's updates of one model, the rows cut over the slice."""
  architecture, training, *_ = models(config)[FRESH]
  batch = -(-training.batch // len(devices)) * len(devices)
  mesh = make_mesh({"data": -1}, devices)
  at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  place = lambda tree, where: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
  )

  def draw(key, pool_key, low, high):
    source = PromptDistribution(UniformNoise(low, high), pool_key)
    size = (config.chunk * batch, training.length, architecture.dim)
    prompts = sample_prompts(key, source, *size)
    return jax.tree.map(lambda a: a.reshape(config.chunk, batch, *a.shape[1:]), prompts)

  key, number = jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(0)))
  states = jax.eval_shape(
    functools.partial(init_states, architecture, training),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)),
  )
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)
  drawing = place((key, key, number, number), at())
  prompts = jax.eval_shape(draw, key, key, number, number)
  cut = at(None, RULES["batch"])
  arguments = (
    place(state, at()),
    place(prompts, cut),
    place(jax.ShapeDtypeStruct((), jnp.bool), at()),
  )
  size = f"{config.chunk} x {batch} prompts of {training.length} labels"
  update = functools.partial(scan_updates, make_update(architecture, training))
  return [
    Step(f"draw {size}", jax.jit(draw, out_shardings=cut), drawing),
    Step(f"train, {size}", jax.jit(update, donate_argnums=0, out_shardings=at()), arguments),
  ]
