"""DSL's main experiment at the config's size, compiled for a TPU slice."""

import functools
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from common.compilation.step import Step, independent
from projects.dsl import simulation
from projects.dsl.learners import logistic


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Every method of the main experiment, its draws cut over the slice."""
  design = simulation.logistic_outcome(config.units, config.labels)
  estimate = functools.partial(
    simulation.estimate_draws, design, simulation.METHODS, logistic, config.folds
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.draws))
  name = f"{config.draws} draws of {config.units} documents"
  return [independent(name, estimate, (keys,), devices, x64=True)]
