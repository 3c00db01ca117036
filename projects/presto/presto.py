"""PRESTO: cumulative logits whose slopes are shrunk towards proportional odds (section 2).

    minimise  -(1/n) sum_i log pi_{y_i}(x_i) + lambda sum_k w_k (a |psi_k|_1 + (1-a)/2 |psi_k|_2^2)

psi_0 = beta_0 and psi_k = beta_k - beta_{k-1} are the slopes of the first boundary and their
changes from one boundary to the next. PRESTO has a = 1 and all block weights w_k = 1; a = 0 is its
ridge variant; intercepts are free. Covariates are standardised before the fit (divided by n, not n - 1).

The same fit gives the baselines: with w = (0, inf, ..., inf) the slopes are equal and unpenalised,
which is proportional odds; with two classes and lambda = 0 it is logistic regression.

Everything here is pure and can be jitted and vmapped. Give it float64: the KKT tolerance of 1e-8 is
near the rounding error of float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from projects.presto import likelihood
from projects.presto.solver import solve


class Path(NamedTuple):
  """Fits along a path of L penalties, on the covariates' own scale."""

  lambdas: jax.Array  # [L]
  intercepts: jax.Array  # [L, K-1], alpha
  differences: jax.Array  # [L, K-1, p], psi
  log_likelihood: jax.Array  # [L], sum over observations (weights as given)
  kkt_residual: jax.Array  # [L], of the standardised problem, per unit of weight
  iterations: jax.Array  # [L]
  converged: jax.Array  # [L], bool

  @property
  def slopes(self) -> jax.Array:
    """beta [L, K-1, p]."""
    return jnp.cumsum(self.differences, axis=-2)


class _Problem(NamedTuple):
  """The standardised problem and its fit without slopes."""

  design: jax.Array  # [1+p, n]
  y: jax.Array  # [n], sorted
  weights: jax.Array  # [n], sum 1
  mean: jax.Array  # [p]
  sd: jax.Array  # [p]; 1 for a constant column, whose coefficients are then 0
  null: jax.Array  # [K-1, 1+p]


def _standardized(x: jax.Array, y: jax.Array, weights: jax.Array, num_classes: int) -> _Problem:
  order = jnp.argsort(y)
  x, y, weights = x[order], y[order], weights[order] / weights.sum()
  mean = weights @ x
  centred = x - mean
  sd = jnp.sqrt(weights @ centred**2)
  constant = sd <= 1e-12 * (1 + jnp.abs(mean))  # Up to the rounding error of the mean.
  centred, sd = jnp.where(constant, 0, centred), jnp.where(constant, 1, sd)
  design = jnp.concatenate([jnp.ones((1, len(x)), x.dtype), (centred / sd).T])
  null = jnp.zeros((num_classes - 1, len(design)), x.dtype)
  null = null.at[:, 0].set(likelihood.null_intercepts(y, weights, num_classes))
  return _Problem(design, y, weights, mean, sd, null)


@functools.partial(jax.jit, static_argnames="num_classes")
def largest_lambda(
  x: jax.Array, y: jax.Array, weights: jax.Array, *, num_classes: int, l1_ratio: float = 1.0
) -> jax.Array:
  """The smallest lambda at which all psi are 0 (for a > 0; below a = 0.01 that of a = 0.01)."""
  problem = _standardized(x, y, weights, num_classes)
  eta = likelihood.linear_predictors(problem.design, problem.null)
  score = likelihood.score(problem.design, eta, problem.y, problem.weights)
  return jnp.max(jnp.abs(score[:, 1:])) / jnp.maximum(l1_ratio, 0.01)


def lambda_path(largest: jax.Array, count: int, smallest_ratio: float) -> jax.Array:
  """`count` values, log-spaced from `largest` down to smallest_ratio * largest."""
  return largest * jnp.logspace(0, jnp.log10(smallest_ratio), count, dtype=largest.dtype)


@functools.partial(jax.jit, static_argnames="num_classes")
def fit_path(
  x: jax.Array,
  y: jax.Array,
  weights: jax.Array,
  lambdas: jax.Array,
  *,
  num_classes: int,
  l1_ratio: float = 1.0,
  block_weights: jax.Array | None = None,
  tolerance: float = 1e-8,
  max_iterations: int = 100,
) -> Path:
  """Fits the model at every lambda, each from the solution before it.

  Args:
    x: [n, p] covariates, float64.
    y: [n] classes, integers 0 ... num_classes-1; every class has positive weight.
    weights: [n] non-negative weights of the observations; 0 leaves one out.
    lambdas: [L], decreasing for speed.
    num_classes: K >= 2.
    l1_ratio: a in [0, 1].
    block_weights: [K-1] penalty weights w_k, 0 free, inf fixed at 0; default ones.
    tolerance: of the KKT residual, see `solver`.
    max_iterations: proximal Newton iterations at each lambda.

  Returns:
    The path. Fits may not have converged: see `converged` and `kkt_residual`.
  """
  problem = _standardized(x, y, weights, num_classes)
  if block_weights is None:
    block_weights = jnp.ones(num_classes - 1)
  block_weights = jnp.asarray(block_weights, x.dtype)[:, None]
  fixed = jnp.isinf(block_weights)
  penalised = jnp.ones_like(problem.null).at[:, 0].set(0)

  def step(carry, lambda_):
    theta, hessian = carry
    weight = penalised * lambda_ * jnp.where(fixed, 0, block_weights)
    solution, hessian = solve(
      problem.design,
      problem.y,
      problem.weights,
      jnp.where(fixed & (penalised > 0), jnp.inf, l1_ratio * weight),
      (1 - l1_ratio) * weight,
      theta,
      hessian,
      tolerance=tolerance,
      max_iterations=max_iterations,
    )
    return (solution.theta, hessian), solution

  eta = likelihood.linear_predictors(problem.design, problem.null)
  hessian = likelihood.information(problem.design, eta, problem.y, problem.weights)
  _, solutions = jax.lax.scan(step, (problem.null, hessian), lambdas)
  differences = solutions.theta[:, :, 1:] / problem.sd
  shift = jnp.cumsum(differences, axis=1) @ problem.mean
  return Path(
    lambdas=lambdas,
    intercepts=solutions.theta[:, :, 0] - shift,
    differences=differences,
    log_likelihood=-solutions.negative_log_likelihood * weights.sum(),
    kkt_residual=solutions.kkt_residual,
    iterations=solutions.iterations,
    converged=solutions.converged,
  )


def legacy_intercepts(path: Path, mean: jax.Array) -> jax.Array:
  """The intercepts [L, K-1] that the published code returns, for comparison with its numbers.

  It corrects alpha_k for the centring of x by psi_k' mean, though boundary k uses beta_k.
  """
  return path.intercepts + (path.slopes - path.differences) @ mean


def linear_predictors(x: jax.Array, intercepts: jax.Array, slopes: jax.Array) -> jax.Array:
  """eta: x [n, p], alpha [..., K-1], beta [..., K-1, p] -> [..., n, K-1]."""
  return intercepts[..., None, :] + x @ jnp.swapaxes(slopes, -1, -2)


def brier_score(probabilities: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
  """The weighted mean of sum_k (1{y = k} - pi_k)^2: [..., n, K], [n], [n] -> [...]."""
  outcome = jnp.eye(probabilities.shape[-1], dtype=probabilities.dtype)[y]
  return jnp.sum((probabilities - outcome) ** 2, axis=-1) @ weights / weights.sum()


class CrossValidation(NamedTuple):
  path: Path  # of all observations
  scores: jax.Array  # [folds, L], Brier scores of the held-out observations
  kkt_residual: jax.Array  # [folds, L]
  converged: jax.Array  # [folds, L]

  @property
  def best(self) -> jax.Array:
    """Index of the largest lambda with the smallest mean score; lambdas must be decreasing."""
    return jnp.argmin(self.scores.mean(axis=-2), axis=-1)


@functools.partial(jax.jit, static_argnames=("num_classes", "num_folds"))
def cross_validate(
  x: jax.Array,
  y: jax.Array,
  folds: jax.Array,
  lambdas: jax.Array,
  *,
  num_classes: int,
  num_folds: int,
  l1_ratio: float = 1.0,
  tolerance: float = 1e-8,
  max_iterations: int = 100,
) -> CrossValidation:
  """Fits the path to all observations and to those outside of every fold, and scores the latter.

  A fold is left out by weights of 0, so that all fits have one shape. They are mapped, not vmapped:
  in lock step each would wait for the slowest, and a Hessian that one needs is computed for all.

  Args:
    x, y, lambdas, num_classes, l1_ratio, tolerance, max_iterations: as in `fit_path`.
    folds: [n], integers 0 ... num_folds-1; every class occurs outside of every fold.
  """

  def fit(fold):
    held_out = (folds == fold).astype(x.dtype)
    path = fit_path(
      x,
      y,
      1 - held_out,
      lambdas,
      num_classes=num_classes,
      l1_ratio=l1_ratio,
      tolerance=tolerance,
      max_iterations=max_iterations,
    )
    eta = linear_predictors(x, path.intercepts, path.slopes)
    return path, brier_score(likelihood.class_probabilities(eta), y, held_out)

  paths, scores = jax.lax.map(fit, jnp.arange(-1, num_folds))  # No observation is in fold -1.
  path = jax.tree.map(lambda leaf: leaf[0], paths)
  return CrossValidation(path, scores[1:], paths.kkt_residual[1:], paths.converged[1:])


def random_folds(y: np.ndarray, num_folds: int, rng: np.random.Generator) -> np.ndarray:
  """Random folds [n] of equal size, drawn again until every class occurs outside of each fold.

  Raises:
    ValueError: 100 draws did not do: a class has too few observations.
  """
  for _ in range(100):
    folds = rng.permutation(np.arange(len(y)) % num_folds)
    if all(len(np.unique(y[folds != k])) == len(np.unique(y)) for k in range(num_folds)):
      return folds
  raise ValueError(f"no split into {num_folds} folds leaves every class in every training part")


def fit_proportional_odds(
  x: jax.Array, y: jax.Array, weights: jax.Array, *, num_classes: int
) -> Path:
  """Maximum likelihood with one slope vector for all boundaries; a path of one fit."""
  block_weights = jnp.full(num_classes - 1, jnp.inf).at[0].set(0)
  lambdas = jnp.zeros(1, x.dtype)
  return fit_path(x, y, weights, lambdas, num_classes=num_classes, block_weights=block_weights)


def fit_logit(x: jax.Array, y: jax.Array, weights: jax.Array, *, boundary: int) -> Path:
  """Logistic regression of whether y <= boundary; a path of one fit, [1, 1] and [1, 1, p].

  Where the classes are separable there is no maximum; the fit has then not converged.
  """
  return fit_path(x, (y > boundary).astype(y.dtype), weights, jnp.zeros(1, x.dtype), num_classes=2)
