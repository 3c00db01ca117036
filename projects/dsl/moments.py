"""The doubly robust moment estimator: estimates, sandwich errors, power (equations in README.md).

Everything here is a pure function of float64 arrays (call it inside `jax.enable_x64()`: sandwich
errors multiply inverses of moment matrices, and float32 loses their digits), without Python control
flow on values, so that it can be jitted and mapped over sample splits and Monte-Carlo draws.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Family = Literal["linear", "logistic"]

NEWTON_STEPS = 50


class Sample(NamedTuple):
  """n units, as observed by experts and as predicted.

  Attributes:
    x: design with gold values [n, k]; of no account where `weight` is 0, but finite.
    y: gold outcome [n]; likewise.
    x_hat: design with predictions in the place of gold values [n, k].
    y_hat: predicted outcome [n].
    weight: R / pi [n]: 0 for a unit without expert labels.
  """

  x: Array
  y: Array
  x_hat: Array
  y_hat: Array
  weight: Array


class Estimate(NamedTuple):
  """Coefficients and what their variance is made of.

  Attributes:
    theta: coefficients [k].
    covariance: J^-1 (main_1 + main_23) J^-1 / n, [k, k].
    jacobian: J = -d mean(m) / d theta, [k, k].
    main_1: the part of the moments' variance that expert labels reduce, [k, k].
    main_23: the part that they do not, [k, k].
    converged: whether theta is a root of the mean moment, bool.
  """

  theta: Array
  covariance: Array
  jacobian: Array
  main_1: Array
  main_23: Array
  converged: Array


def mean(family: Family, linear_predictor: Array) -> tuple[Array, Array]:
  """The expected outcome mu(eta) and its slope mu'(eta)."""
  if family == "linear":
    return linear_predictor, jnp.ones_like(linear_predictor)
  mu = jax.nn.sigmoid(linear_predictor)
  return mu, mu * (1 - mu)  # Not e / (1 + e)^2 with e = exp(-eta), which overflows.


def score(family: Family, theta: Array, x: Array, y: Array) -> Array:
  """m_i = x_i (y_i - mu(x_i^T theta)): the moments of an ordinary regression, [n, k]."""
  return x * (y - mean(family, x @ theta)[0])[:, None]


def mean_moment(family: Family, theta: Array, sample: Sample) -> Array:
  """mean_i of m_hat_i + (R_i / pi_i) (m_i - m_hat_i), [k]."""
  gold = score(family, theta, sample.x, sample.y)
  predicted = score(family, theta, sample.x_hat, sample.y_hat)
  return jnp.mean(predicted + sample.weight[:, None] * (gold - predicted), axis=0)


def jacobian(family: Family, theta: Array, sample: Sample) -> Array:
  """J = mean_i of w mu'(x theta) x x^T + (1 - w) mu'(x_hat theta) x_hat x_hat^T, [k, k]."""
  gold = sample.weight * mean(family, sample.x @ theta)[1]
  predicted = (1 - sample.weight) * mean(family, sample.x_hat @ theta)[1]
  total = (sample.x.T * gold) @ sample.x + (sample.x_hat.T * predicted) @ sample.x_hat
  return total / len(sample.y)


def solve_linear(sample: Sample) -> Array:
  """The root of the linear model's moment in closed form, [k]."""
  at_zero = jnp.zeros(sample.x.shape[1])
  return _solve(jacobian("linear", at_zero, sample), mean_moment("linear", at_zero, sample))


def newton(family: Family, sample: Sample) -> tuple[Array, Array]:
  """The root of the mean moment by Newton's method from 0.

  The moment need not be the gradient of a convex function (pseudo outcomes leave [0, 1], and
  predicted covariates enter with negative weights), so a step is halved until the moment shrinks.
  Newton's method is affine invariant: the design needs no standardisation.

  Returns:
    theta [k], and whether a last full step moved the linear predictor by no more than 1e-9.
  """
  scale = jnp.sqrt(jnp.mean(sample.x_hat**2 + sample.weight[:, None] * sample.x**2, axis=0))
  scale = jnp.where(scale > 0, scale, 1.0)

  def size(moment):
    return jnp.sum((moment / scale) ** 2)

  def go_on(state):
    _, _, change, steps = state
    return (steps < NEWTON_STEPS) & (change > 1e-9)  # False for NaN: a singular Jacobian.

  def step(state):
    theta, moment, _, steps = state
    direction = _solve(jacobian(family, theta, sample), moment)

    def moved(fraction):
      return mean_moment(family, theta + fraction * direction, sample)

    def too_far(state):
      fraction, new = state
      return (fraction > 1e-3) & ~(size(new) <= size(moment))

    def halve(state):
      fraction = state[0] / 2
      return fraction, moved(fraction)

    one = jnp.array(1.0)
    fraction, new = jax.lax.while_loop(too_far, halve, (one, moved(one)))
    return theta + fraction * direction, new, jnp.max(jnp.abs(direction) * scale), steps + 1

  start = jnp.zeros(sample.x.shape[1])
  state = (start, mean_moment(family, start, sample), jnp.array(jnp.inf), jnp.array(0))
  theta, _, change, _ = jax.lax.while_loop(go_on, step, state)
  return theta, change <= 1e-9


def meat(
  family: Family, theta: Array, sample: Sample, clusters: Array | None = None
) -> tuple[Array, Array]:
  """The variance of the moments in its two parts, with d = w (m - m_hat):

    main_1 = sum d d^T / n,   main_23 = sum (m_hat m_hat^T + m_hat d^T + d m_hat^T) / n.

  Args:
    clusters: int [n], in 0 ... n - 1: the sums are then over clusters of their units' sums.

  Returns:
    main_1 and main_23, each [k, k]; their sum is mean m m^T of the doubly robust moments.
  """
  n = len(sample.y)
  predicted = score(family, theta, sample.x_hat, sample.y_hat)
  difference = sample.weight[:, None] * (score(family, theta, sample.x, sample.y) - predicted)
  if clusters is not None:
    predicted = jax.ops.segment_sum(predicted, clusters, num_segments=n)
    difference = jax.ops.segment_sum(difference, clusters, num_segments=n)
  cross = predicted.T @ difference
  return difference.T @ difference / n, (predicted.T @ predicted + cross + cross.T) / n


def covariance(jacobian: Array, meat: Array, n: int) -> Array:
  """The sandwich J^-1 M J^-T / n, [..., k, k]."""
  half = jnp.linalg.solve(jacobian, meat)
  return jnp.linalg.solve(jacobian, jnp.swapaxes(half, -1, -2)) / n


def estimate(family: Family, sample: Sample, clusters: Array | None = None) -> Estimate:
  """Solves for theta and computes its sandwich variance.

  Args:
    family: "linear" or "logistic".
    sample: see `Sample`.
    clusters: see `meat`.
  """
  if family == "linear":
    theta = solve_linear(sample)
    converged = jnp.all(jnp.isfinite(theta))
  else:
    theta, converged = newton(family, sample)
  bread = jacobian(family, theta, sample)
  main_1, main_23 = meat(family, theta, sample, clusters)
  variance = covariance(bread, main_1 + main_23, len(sample.y))
  return Estimate(theta, variance, bread, main_1, main_23, converged)


def combine(theta: Array, covariance: Array) -> tuple[Array, Array, Array]:
  """Medians over sample splits, with the spread between splits added to the variance.

  Args:
    theta: [splits, k].
    covariance: [splits, k, k].

  Returns:
    coefficients [k]: the median of each; standard errors [k]: the square root of the median of
    se_s^2 + (theta_s - theta)^2; covariance [k, k]: the elementwise median of
    V_s + (theta_s - theta)(theta_s - theta)^T, made positive semidefinite with its diagonal kept
    when it is not.
  """
  middle = jnp.median(theta, axis=0)
  spread = theta - middle
  variance = jnp.median(covariance + spread[:, :, None] * spread[:, None, :], axis=0)
  return middle, jnp.sqrt(jnp.diagonal(variance)), _positive_semidefinite(variance)


def predicted_errors(estimate: Estimate, ratios: Array, n: int) -> Array:
  """Standard errors if the number of expert labels were multiplied (the power analysis).

  M(c) = main_1 / c + main_23, with everything else as it is. The median over splits is taken of
  those with a positive variance; where there is none the last valid error is scaled by 1 / sqrt of
  the ratio of sizes.

  Args:
    estimate: of every split, a leading axis [splits] on each array.
    ratios: c, [sizes], ascending; 1 is the present number.
    n: units.

  Returns:
    [sizes, k].
  """

  def of_ratio(ratio):
    return covariance(estimate.jacobian, estimate.main_1 / ratio + estimate.main_23, n)

  variances = jnp.diagonal(jax.vmap(of_ratio)(ratios), axis1=-2, axis2=-1)  # [sizes, splits, k]
  errors = jnp.nanmedian(jnp.sqrt(jnp.where(variances > 0, variances, jnp.nan)), axis=1)

  def fill(last, row):
    last_error, last_ratio = last
    error, ratio = row
    valid = jnp.isfinite(error)
    error = jnp.where(valid, error, last_error * jnp.sqrt(last_ratio / ratio))
    return (jnp.where(valid, error, last_error), jnp.where(valid, ratio, last_ratio)), error

  present = combine(estimate.theta, estimate.covariance)[1]
  start = (present, jnp.ones_like(present))
  return jax.lax.scan(fill, start, (errors, ratios))[1]


def _solve(matrix: Array, vector: Array) -> Array:
  """Solves with rows and columns scaled to a unit diagonal, as units of covariates are arbitrary."""
  scale = 1 / jnp.sqrt(jnp.abs(jnp.diagonal(matrix)))
  return scale * jnp.linalg.solve(scale[:, None] * matrix * scale, scale * vector)


def _positive_semidefinite(matrix: Array) -> Array:
  """The matrix itself, or its eigenvalues clipped at 0 and its diagonal restored."""
  values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
  clipped = (vectors * jnp.maximum(values, 0)) @ vectors.T
  scale = jnp.sqrt(jnp.diagonal(matrix) / jnp.diagonal(clipped))
  return jnp.where(values[0] >= 0, matrix, scale[:, None] * clipped * scale)
