"""PRESTO's simulations at the config's size, compiled for a TPU slice."""

from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from common.compilation.step import Step, independent
from projects.presto.experiment import fit_methods


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """All methods with cross-validation, the replications of one setting cut over the slice."""
  shape = (config.replications, config.observations)
  arguments = (
    jax.ShapeDtypeStruct((*shape, config.covariates), np.float32),
    jax.ShapeDtypeStruct(shape, np.int32),
    jax.ShapeDtypeStruct(shape, np.int32),
  )
  settings = dict(
    smallest_ratio=config.simulated_smallest_ratio,
    classes=4,
    lambdas=config.simulated_lambdas,
    num_folds=config.folds,
    ridge=config.ridge,
    legacy_intercept=config.legacy_intercept,
  )

  def fit(x, y, folds):
    # Widened here: the TPU compiler refuses 64-bit arguments of a program cut by hand.
    return fit_methods(x.astype(np.float64), y, folds, **settings)

  name = f"{config.replications} simulations of {config.observations} x {config.covariates}"
  return [independent(name, fit, arguments, devices, x64=True)]
