"""Design-based supervised learning: cross-fitting, the doubly robust estimate, medians over splits.

table = read_table("posts.csv")
problem = regression(table, outcome="y", covariates=["x1", "x2"], surrogates=["llm_y"])
fit = DSL("logistic", learner="random_forest").fit(problem)
print(fit.coefficients, fit.standard_errors, fit.confidence_intervals(0.95))
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats
from sklearn.base import BaseEstimator

from common.errors import UserError
from common.reporting.report import Column, Table
from projects.dsl import moments
from projects.dsl.learners import Learner, cross_fit, cross_fit_sklearn, find_learner, random_folds
from projects.dsl.moments import Estimate, Family, Sample
from projects.dsl.problem import OUTCOME, Data, Problem

# Predictions that need no learner: g = Q, and g = 0 (inverse probability weighting).
FIXED = ("surrogate", "zero")


def gold_values(data: Data, gold: tuple[int, ...]) -> Array:
  """The gold variables, [n, v]; 0 where not labelled."""
  columns = [data.y if place == OUTCOME else data.x[:, place] for place in gold]
  return jnp.stack(columns, axis=1)


def replace_gold(data: Data, gold: tuple[int, ...], values: Array) -> tuple[Array, Array]:
  """The design [n, k] and the outcome [n] with other values [n, v] for the gold variables."""
  x, y = jnp.asarray(data.x), jnp.asarray(data.y)
  for i, place in enumerate(gold):
    if place == OUTCOME:
      y = values[:, i]
    else:
      x = x.at[:, place].set(values[:, i])
  return x, y


def doubly_robust_sample(data: Data, gold: tuple[int, ...], predictions: Array) -> Sample:
  """Observed and predicted variables with weights R / pi, fixed effects taken out.

  Args:
    data: the units.
    gold: places of the gold variables.
    predictions: D_hat, [n, v].
  """
  x_hat, y_hat = replace_gold(data, gold, predictions)
  sample = Sample(data.x, data.y, x_hat, y_hat, data.labelled / data.probability)
  if data.groups is None:
    return sample
  return without_effects(sample, data.groups)


def without_effects(sample: Sample, groups: Array) -> Sample:
  """Subtracts fixed effects from every variable.

  Effects are fitted to the pseudo variables x_hat + w (x - x_hat), whose group means are unbiased.
  The linear model of what is left has the coefficients and the sandwich of the one with an
  indicator per group (Frisch-Waugh-Lovell).

  Args:
    sample: see `Sample`.
    groups: int [n, 1 or 2].
  """
  observed = jnp.column_stack([sample.x, sample.y])
  predicted = jnp.column_stack([sample.x_hat, sample.y_hat])
  pseudo = predicted + sample.weight[:, None] * (observed - predicted)
  fitted = group_effects(pseudo, jnp.ones(len(pseudo)), groups)
  observed, predicted = observed - fitted, predicted - fitted
  return Sample(
    observed[:, :-1], observed[:, -1], predicted[:, :-1], predicted[:, -1], sample.weight
  )


def group_effects(values: Array, mass: Array, groups: Array) -> Array:
  """Fitted effects f, one or the sum of two per unit, with sum of (values - mass f) = 0 per group.

  By alternating projections: once suffices for one way and for balanced panels, where f is the sum
  of both group means minus the grand mean.

  Args:
    values: [n, c].
    mass: weight of each unit in the group means, [n].
    groups: int [n, 1 or 2].

  Returns:
    [n, c].
  """
  n = len(values)
  total = lambda x, group: jax.ops.segment_sum(x, group, num_segments=n)
  scale = 1e-12 * (1 + jnp.max(jnp.abs(values), axis=0))

  def go_on(state):
    _, change, steps = state
    return jnp.any(change > scale) & (steps < 10_000)

  def sweep(state):
    fitted, _, steps = state
    before = fitted
    for group in groups.T:
      mean = (
        total(values - mass[:, None] * fitted, group)
        / jnp.maximum(total(mass, group), 1e-300)[:, None]
      )
      fitted = fitted + mean[group]
    return fitted, jnp.max(jnp.abs(fitted - before), axis=0), steps + 1

  start = (jnp.zeros_like(values), jnp.full(values.shape[1], jnp.inf), 0)
  return jax.lax.while_loop(go_on, sweep, start)[0]


def predict_gold(
  key: Array,
  data: Data,
  gold: tuple[int, ...],
  learner: Learner | str,
  num_folds: int,
  num_labelled: int | None = None,
) -> Array:
  """Cross-fitted predictions D_hat of every gold variable for one random split, [n, v].

  num_labelled: see `cross_fit`.
  """
  if learner == "surrogate":
    return jnp.asarray(data.surrogates)
  if learner == "zero":
    return jnp.zeros((len(data.y), len(gold)))
  fold_key, *keys = jax.random.split(key, 1 + len(gold))
  folds = random_folds(fold_key, _clusters(data), num_folds)
  predict = lambda key, target: cross_fit(
    learner,
    key,
    jnp.asarray(data.features),
    target,
    jnp.asarray(data.labelled),
    folds,
    num_folds,
    num_labelled,
  )
  return jnp.stack([predict(k, d) for k, d in zip(keys, gold_values(data, gold).T)], axis=1)


@dataclasses.dataclass(frozen=True)
class DSL:
  """The estimator.

  Attributes:
    family: "linear" or "logistic".
    learner: a name of `learners.LEARNERS`, "surrogate" (g = Q), "zero" (g = 0), a function as
      described there, or a scikit-learn regressor.
    folds: L, of each split.
    splits: S, random repetitions.
    seed: of the splits and the learner.
  """

  family: Family = "linear"
  learner: str | Learner | BaseEstimator = "random_forest"
  folds: int = 5
  splits: int = 10
  seed: int = 0

  def fit(self, problem: Problem, predictions: Array | None = None) -> "Fit":
    """Estimates the coefficients.

    Args:
      problem: what to estimate.
      predictions: what `predict_gold` returned for it, if that is known already.

    Raises:
      UserError: an unsuitable problem, too few labels, collinear covariates, or no root.
    """
    data, gold = problem.data, problem.gold
    check_problem(self.family, problem)
    if predictions is None:
      predictions = self.predict_gold(problem)
    with jax.enable_x64():
      estimates = _estimate_all(data, predictions, self.family, gold)
      return make_fit(estimates, problem, self.family, "DSL")

  def predict_gold(self, problem: Problem) -> Array:
    """Cross-fitted predictions of the gold variables for every split, float64 [splits, n, v].

    Raises:
      UserError: too few labels or clusters for the folds; labels that the learner cannot learn.
    """
    self._check(problem)
    data, gold = problem.data, problem.gold
    learner = self.learner if self.learner in FIXED else find_learner(self.learner)
    with jax.enable_x64():
      keys = jax.random.split(jax.random.key(self.seed), self.splits)
      if not isinstance(learner, BaseEstimator):
        return _predict_all(keys, data, gold, learner, self.folds, int(data.labelled.sum()))
      folds = jax.vmap(lambda key: random_folds(key, _clusters(data), self.folds))(keys)
      values = np.asarray(gold_values(data, gold)).T
      predict = lambda seed, folds: [
        cross_fit_sklearn(learner, seed, data.features, d, data.labelled, folds) for d in values
      ]
      seeds = self.seed + self.folds * np.arange(self.splits)
      return jnp.asarray([predict(int(s), f) for s, f in zip(seeds, np.asarray(folds))]).mT

  def _check(self, problem: Problem) -> None:
    data = problem.data
    if self.splits < 1 or self.folds < 2:
      raise UserError(f"splits={self.splits}, folds={self.folds}: expected at least 1 and 2")
    if self.learner == "surrogate" and data.surrogates is None:
      raise UserError("learner 'surrogate' needs one surrogate per gold column, in the same order")
    if self.learner == "logistic":
      for name, values in _gold_names(problem):
        if not np.isin(values, (0, 1)).all():
          raise UserError(f"learner 'logistic' needs labels 0 and 1, which {name} has not")
    if data.clusters is not None and data.clusters.max() + 1 < self.folds:
      raise UserError(f"{data.clusters.max() + 1} clusters cannot make {self.folds} folds")
    if data.labelled.sum() < 4 * self.folds:
      raise UserError(
        f"{int(data.labelled.sum())} labelled rows are too few for {self.folds} folds: expected at "
        f"least {4 * self.folds}"
      )


@dataclasses.dataclass(frozen=True)
class Fit:
  """Estimated coefficients.

  Attributes:
    method: what estimated them.
    family: of the regression.
    names: of the coefficients.
    coefficients: [k].
    standard_errors: [k].
    covariance: [k, k].
    num_units: n.
    num_labelled: units with expert labels.
    estimates: of each split, a leading axis [splits].
  """

  method: str
  family: Family
  names: tuple[str, ...]
  coefficients: np.ndarray
  standard_errors: np.ndarray
  covariance: np.ndarray
  num_units: int
  num_labelled: int
  estimates: Estimate

  def confidence_intervals(self, level: float = 0.95) -> np.ndarray:
    """Normal intervals, [k, 2]."""
    reach = stats.norm.ppf((1 + level) / 2) * self.standard_errors
    return np.stack([self.coefficients - reach, self.coefficients + reach], axis=1)

  def p_values(self) -> np.ndarray:
    """Two-sided, of the hypothesis that a coefficient is 0, [k]."""
    return 2 * stats.norm.sf(np.abs(self.coefficients / self.standard_errors))

  def predict(self, x: np.ndarray) -> np.ndarray:
    """The expected outcome (the probability, if logistic) of designs [rows, k], [rows].

    Columns are those of `names`, an intercept included. With fixed effects it is the part of the
    outcome that covariates explain.

    Raises:
      UserError: another number of columns.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != len(self.names):
      raise UserError(f"expected [rows, {len(self.names)}] for {self.names}, got {x.shape}")
    with jax.enable_x64():
      return np.asarray(moments.mean(self.family, x @ self.coefficients)[0])

  def power(self, labelled: Sequence[int]) -> np.ndarray:
    """Standard errors to expect with other numbers of expert labels, [sizes, k].

    Raises:
      UserError: numbers that are not ascending or not above 0.
    """
    sizes = np.asarray(labelled, np.float64)
    if not (sizes > 0).all() or (np.diff(sizes) <= 0).any():
      raise UserError(f"expected ascending numbers of labels above 0, got {list(labelled)}")
    with jax.enable_x64():
      ratios = jnp.asarray(sizes / self.num_labelled)
      return np.asarray(_predicted_errors(self.estimates, ratios, self.num_units))

  def table(self, level: float = 0.95) -> Table:
    """Estimates, standard errors, intervals and p-values, to print."""
    number = lambda name: Column(name, ".4f")
    intervals = self.confidence_intervals(level)
    rows = zip(self.names, self.coefficients, self.standard_errors, *intervals.T, self.p_values())
    return Table(
      f"{self.method}, {self.family} regression",
      [
        "coefficient",
        *map(number, ("estimate", "standard error", f"{level:.0%} from", "to")),
        Column("p", ".2g"),
      ],
      [list(row) for row in rows],
      note=f"{self.num_units} units, {self.num_labelled} of them labelled by experts.",
    )


def check_problem(family: Family, problem: Problem) -> None:
  """Refuses what no estimator could answer.

  Raises:
    UserError: no such family; a logistic outcome other than 0 and 1, or all alike; fixed effects in
      a logistic model; a gold column that is constant; collinear covariates.
  """
  data = problem.data
  if family not in ("linear", "logistic"):
    raise UserError(f"unknown family {family!r}; there are linear and logistic")
  if family == "logistic":
    if data.groups is not None:
      raise UserError("fixed effects are of linear models: subtracting means is not valid here")
    known = data.y[data.labelled > 0] if OUTCOME in problem.gold else data.y
    if not np.isin(known, (0, 1)).all():
      raise UserError("a logistic regression needs an outcome of 0 and 1; this one has others")
    if len(np.unique(known)) < 2:
      raise UserError(f"every known outcome is {known[0]:g}: one class is empty; label more units")
  for name, values in _gold_names(problem):
    if name != "the outcome" and len(np.unique(values)) < 2:
      raise UserError(f"every expert label of {name} is {values[0]:g}: it is constant; drop it")
  _check_rank(problem)


def make_fit(estimates: Estimate, problem: Problem, family: Family, method: str) -> Fit:
  """Combines the splits of an estimate (arrays with a leading axis).

  Raises:
    UserError: a split has no finite root.
  """
  if not np.all(estimates.converged):
    raise UserError(
      f"{method}: the moment equations have no root in {np.sum(~np.asarray(estimates.converged))} "
      f"of {len(estimates.converged)} splits; perfectly separated classes or too few labels: label "
      "more units or use fewer covariates"
    )
  theta, errors, covariance = map(np.asarray, _combine(estimates.theta, estimates.covariance))
  return Fit(
    method=method,
    family=family,
    names=problem.names,
    coefficients=theta,
    standard_errors=errors,
    covariance=covariance,
    num_units=len(problem.data.y),
    num_labelled=int(problem.data.labelled.sum()),
    estimates=estimates,
  )


def _check_rank(problem: Problem) -> None:
  """Names the covariates that are linear combinations of others (or of the fixed effects)."""
  data = problem.data
  known = data.labelled > 0 if any(place != OUTCOME for place in problem.gold) else data.y == data.y
  x = data.x[known]
  if data.groups is not None:
    with jax.enable_x64():
      x = x - np.asarray(group_effects(jnp.asarray(x), jnp.ones(len(x)), data.groups[known]))
  length = np.linalg.norm(x, axis=0)
  vanished = length <= 1e-9 * (np.linalg.norm(data.x[known], axis=0) + 1e-300)
  if vanished.any():
    names = ", ".join(np.array(problem.names)[vanished])
    raise UserError(f"{names} is constant within the fixed effects or everywhere 0: drop it")
  values, vectors = np.linalg.eigh((x / length).T @ (x / length))
  if values[0] < 1e-11:
    names = ", ".join(np.array(problem.names)[np.abs(vectors[:, 0]) > 1e-3])
    raise UserError(f"{names} are collinear: one is a combination of the others; drop one")


def _gold_names(problem: Problem) -> list[tuple[str, np.ndarray]]:
  """(name, labelled values) of each gold variable."""
  data, known = problem.data, problem.data.labelled > 0
  return [
    ("the outcome", data.y[known])
    if place == OUTCOME
    else (repr(problem.names[place]), data.x[known, place])
    for place in problem.gold
  ]


_combine = jax.jit(moments.combine)
_predicted_errors = jax.jit(moments.predicted_errors, static_argnums=2)


def _clusters(data: Data) -> Array:
  return jnp.arange(len(data.y)) if data.clusters is None else jnp.asarray(data.clusters)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _predict_all(keys, data, gold, learner, num_folds, num_labelled):
  def of_split(key):
    return predict_gold(key, data, gold, learner, num_folds, num_labelled)

  return jax.lax.map(of_split, keys)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _estimate_all(data, predictions, family, gold):
  def of_split(predictions):
    return moments.estimate(family, doubly_robust_sample(data, gold, predictions), data.clusters)

  return jax.lax.map(of_split, predictions)
