"""The estimators that DSL is compared with, on the same problem, with the same sandwich errors.

SO      surrogates in the place of gold variables
pooled  gold where there is gold, surrogates elsewhere
SSL     cross-fitted predictions g as if they were true (supervised learning without correction)
GSO     labelled units only, weighted by 1 / pi
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from common.cli import closest
from common.errors import UserError
from projects.dsl import dsl, moments
from projects.dsl.moments import Sample
from projects.dsl.problem import Data, Problem

BASELINES = ("SO", "pooled", "SSL", "GSO")


def as_if_true(data: Data, gold: tuple[int, ...], values: Array) -> Sample:
  """The sample of an ordinary regression on given values [n, v] of the gold variables."""
  return dsl.doubly_robust_sample(data._replace(labelled=jnp.zeros_like(data.y)), gold, values)


def pooled_values(data: Data, gold: tuple[int, ...]) -> Array:
  """Gold values where labelled, surrogates elsewhere, [n, v]."""
  known = jnp.asarray(data.labelled)[:, None] > 0
  return jnp.where(known, dsl.gold_values(data, gold), data.surrogates)


def gold_only(data: Data) -> Sample:
  """The sample of a regression on the labelled units: no prediction has a moment of its own."""
  weight = jnp.asarray(data.labelled / data.probability)
  observed = jnp.column_stack([data.x, data.y])
  if data.groups is not None:
    observed -= dsl.group_effects(weight[:, None] * observed, weight, data.groups)
  x, y = observed[:, :-1], observed[:, -1]
  return Sample(x, y, jnp.zeros_like(x), jnp.zeros_like(y), weight)


def baseline_sample(name: str, data: Data, gold: tuple[int, ...], predictions: Array) -> Sample:
  """What a baseline is an ordinary regression of; `predictions` [n, v] are SSL's alone."""
  if name == "GSO":
    return gold_only(data)
  if name == "SSL":
    return as_if_true(data, gold, predictions)
  if name == "pooled":
    return as_if_true(data, gold, pooled_values(data, gold))
  return as_if_true(data, gold, jnp.asarray(data.surrogates))


def fit_baseline(
  name: str, problem: Problem, model: dsl.DSL, predictions: Array | None = None
) -> dsl.Fit:
  """Fits a baseline to the problem; SSL with the learner, folds and splits of `model`.

  `predictions` are what `model.predict_gold` returned, if that is known already.

  Raises:
    UserError: no such baseline; surrogates that do not pair with the gold columns; what
      `check_problem` refuses; no root.
  """
  if name not in BASELINES:
    raise UserError(f"unknown baseline {name!r}; {closest(name, BASELINES)}")
  if name in ("SO", "pooled") and problem.data.surrogates is None:
    raise UserError(f"{name} needs one surrogate per gold column, in the same order")
  dsl.check_problem(model.family, problem)
  with jax.enable_x64():
    if name == "SSL":
      predictions = model.predict_gold(problem) if predictions is None else predictions
    else:
      predictions = jnp.zeros((1, *problem.data.y.shape, len(problem.gold)))
    estimates = _estimate_all(name, problem.data, predictions, model.family, problem.gold)
    return dsl.make_fit(estimates, problem, model.family, name)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _estimate_all(name, data, predictions, family, gold):
  def of_split(predictions):
    sample = baseline_sample(name, data, gold, predictions)
    return moments.estimate(family, sample, data.clusters)

  return jax.lax.map(of_split, predictions)
