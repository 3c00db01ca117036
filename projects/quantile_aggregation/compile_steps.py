"""The training of the aggregators at the config's size, compiled for a TPU slice."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from common.compilation.step import Step, independent
from projects.quantile_aggregation import aggregators
from projects.quantile_aggregation.aggregators import Settings, batch_size
from projects.quantile_aggregation.experiment import FORMS

# Of the largest of the UCI tables: a tenth is for testing, a fifth of the rest for validation.
ROWS, COVARIATES = 9568, 4


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The random search of every form of aggregator, the seeds cut over the slice."""
  rows = min(ROWS, config.rows or ROWS)
  n = rows * 9 // 10 * 4 // 5
  count, m, p = config.budget.settings, config.levels, len(config.learners)
  seeds = lambda *shape: jax.ShapeDtypeStruct((len(config.seeds), *shape), np.float32)
  integers = lambda *shape: jax.ShapeDtypeStruct((len(config.seeds), *shape), np.int32)
  data = lambda rows: (seeds(rows, p, m), seeds(rows, COVARIATES), seeds(rows))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (len(config.seeds), count)))
  arguments = (
    keys,
    data(n),
    jax.ShapeDtypeStruct((len(config.seeds), count, n), bool),
    data(n // 4),
    seeds(m),
    Settings(*[seeds(count)] * 5, margins=seeds(count, m, m)),
    integers(count),
    integers(),
  )
  steps = []
  for name in config.forms:
    form = FORMS[name]._replace(
      isotoniser=config.isotoniser,
      layers=max(config.budget.layers),
      width=max(config.budget.widths),
    )
    train = functools.partial(
      aggregators.train, form=form, batch_size=batch_size(n), max_rounds=config.budget.max_rounds
    )
    each = lambda *arrays, train=train: jax.lax.map(lambda row: train(*row), arrays)
    title = f"{name}, {len(config.seeds)} seeds of {count} settings, {n} rows"
    steps.append(independent(title, each, arguments, devices))
  return steps
