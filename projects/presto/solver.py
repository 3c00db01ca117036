"""Proximal Newton for the penalised cumulative logit, with a certificate.

    minimise over theta   nll(theta) + sum_j l1_j |theta_j| + l2_j / 2 theta_j^2

l1_j = inf fixes theta_j at 0. Every iteration minimises the quadratic model of the likelihood plus
the exact penalty by coordinate descent, then backtracks. The Hessian, nearly all of the work when
there are many rows, is computed again only when the last one has become poor.

A solution is certified by its KKT residual, the largest component of the distance from 0 to the
subdifferential: for theta_j != 0 it is |score_j + l2_j theta_j + l1_j sign theta_j|, otherwise
max(|score_j| - l1_j, 0). A separable sample, whose likelihood has no maximum, also drives the
residual to 0; there the Newton step stays large, so a small step is asked for as well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from projects.presto import likelihood

# A Newton step above this, relative to 1 + the largest parameter, is not a solution.
_LARGEST_STEP = 1e-3
_SUFFICIENT_DECREASE = 1e-4
_HALVINGS = 30
# The Hessian is kept while an iteration with it divides the residual by this.
_GOOD_REDUCTION = 4.0
# Sweeps of coordinate descent between two Newton steps on the signs found, and how many such
# rounds.
_SWEEPS, _ROUNDS = 2, 100
# Relative to the Hessian's diagonal: the support's system stays solvable with collinear columns.
_RIDGE = 1e-12


class Solution(NamedTuple):
  """theta [K-1, 1+p]; the rest are scalars."""

  theta: jax.Array
  objective: jax.Array
  negative_log_likelihood: jax.Array
  kkt_residual: jax.Array
  iterations: jax.Array
  converged: jax.Array


class _State(NamedTuple):
  theta: jax.Array  # [d], d = (K-1)(1+p)
  eta: jax.Array  # [K-1, n]
  objective: jax.Array
  gradient: jax.Array  # [d], of the likelihood
  hessian: jax.Array  # [d, d], of the likelihood, perhaps at an earlier theta
  hessian_is_poor: jax.Array
  residual: jax.Array
  step: jax.Array  # The largest component of the last Newton step, relative.
  iterations: jax.Array


def solve(
  design: jax.Array,
  y: jax.Array,
  weights: jax.Array,
  l1: jax.Array,
  l2: jax.Array,
  theta: jax.Array,
  hessian: jax.Array,
  *,
  tolerance: float = 1e-8,
  max_iterations: int = 100,
) -> tuple[Solution, jax.Array]:
  """Minimises the penalised negative log-likelihood.

  Args:
    design: [1+p, n], a row of ones above the standardised covariates.
    y: [n], integers 0 ... K-1; sorted, the Hessian takes less than half the time.
    weights: [n], non-negative, summing to 1.
    l1, l2: [K-1, 1+p], the penalty's weights; 0 leaves a parameter free, l1 = inf fixes it at 0.
    theta: [K-1, 1+p], a start at which no boundaries cross; 0 where l1 = inf.
    hessian: [d, d], the likelihood's at theta or nearby.
    tolerance: of the KKT residual.
    max_iterations: of the outer loop.

  Returns:
    The solution, `converged` or not, and the last Hessian for the next problem of a path.
  """
  shape, l1, l2 = theta.shape, l1.ravel(), l2.ravel()

  def penalty(theta):
    return jnp.sum(jnp.where(theta == 0, 0, l1 * jnp.abs(theta) + l2 / 2 * theta**2))

  def objective(eta, theta):
    return likelihood.negative_log_likelihood(eta, y, weights) + penalty(theta)

  def gradient_at(eta):
    return likelihood.score(design, eta, y, weights).ravel()

  def search(state, direction, model_decrease):
    """Halves the step until the objective falls; eta moves linearly, so this costs no product."""
    eta_direction = likelihood.linear_predictors(design, direction.reshape(shape))
    rounding = 1e-15 * (1 + jnp.abs(state.objective))

    def too_long(carry):
      halvings, t, value = carry
      enough = state.objective + _SUFFICIENT_DECREASE * t * model_decrease + rounding
      return (value > enough) & (halvings < _HALVINGS)

    def halve(carry):
      halvings, t, _ = carry
      t = t / 2
      value = objective(state.eta + t * eta_direction, state.theta + t * direction)
      return halvings + 1, t, value

    # The first "halving" makes it the full step.
    start = (-1, jnp.full((), 2, state.eta.dtype), jnp.full((), jnp.inf, state.eta.dtype))
    halvings, t, value = jax.lax.while_loop(too_long, halve, start)
    t = jnp.where((halvings < _HALVINGS) & jnp.isfinite(value), t, 0)
    return t, jnp.where(t > 0, value, state.objective), eta_direction

  def iterate(state: _State) -> _State:
    hessian = jax.lax.cond(
      state.hessian_is_poor,
      lambda: likelihood.information(design, state.eta, y, weights),
      lambda: state.hessian,
    )
    inner_tolerance = jnp.maximum(0.01 * state.residual, 0.1 * tolerance)
    target = _quadratic_minimum(hessian, state.gradient, l1, l2, state.theta, inner_tolerance)
    direction = target - state.theta
    model_decrease = state.gradient @ direction + penalty(target) - penalty(state.theta)
    t, value, eta_direction = search(state, direction, model_decrease)
    # At t = 1 the target itself, so that its zeros are exact.
    theta = jnp.where(t == 1, target, state.theta + t * direction)
    eta = state.eta + t * eta_direction
    gradient = gradient_at(eta)
    residual = kkt_residual(gradient, l1, l2, theta)
    return _State(
      theta=theta,
      eta=eta,
      objective=value,
      gradient=gradient,
      hessian=hessian,
      hessian_is_poor=residual * _GOOD_REDUCTION > state.residual,
      residual=residual,
      step=jnp.max(jnp.abs(direction)) / (1 + jnp.max(jnp.abs(theta))),
      iterations=state.iterations + 1,
    )

  def is_solved(state: _State):
    return (state.residual <= tolerance) & (state.step <= _LARGEST_STEP)

  eta = likelihood.linear_predictors(design, theta)
  flat, gradient = theta.ravel(), gradient_at(eta)
  start = _State(
    theta=flat,
    eta=eta,
    objective=objective(eta, flat),
    gradient=gradient,
    hessian=hessian,
    hessian_is_poor=jnp.asarray(False),
    residual=kkt_residual(gradient, l1, l2, flat),
    step=jnp.asarray(jnp.inf, flat.dtype),
    iterations=jnp.asarray(0),
  )
  goes_on = lambda state: ~is_solved(state) & (state.iterations < max_iterations)
  end = jax.lax.while_loop(goes_on, iterate, start)
  solution = Solution(
    theta=end.theta.reshape(shape),
    objective=end.objective,
    negative_log_likelihood=end.objective - penalty(end.theta),
    kkt_residual=end.residual,
    iterations=end.iterations,
    converged=is_solved(end),
  )
  return solution, end.hessian


def kkt_residual(gradient: jax.Array, l1: jax.Array, l2: jax.Array, theta: jax.Array) -> jax.Array:
  """The largest distance of a component of 0 from the subdifferential at theta; all [d]."""
  smooth = gradient + l2 * theta
  nonzero = jnp.abs(smooth + l1 * jnp.sign(theta))
  return jnp.max(jnp.where(theta != 0, nonzero, jnp.maximum(jnp.abs(smooth) - l1, 0)))


def _quadratic_minimum(
  hessian: jax.Array,
  gradient: jax.Array,
  l1: jax.Array,
  l2: jax.Array,
  theta: jax.Array,
  tolerance: jax.Array,
) -> jax.Array:
  """argmin_z  gradient'(z - theta) + (z - theta)' hessian (z - theta) / 2 + penalty(z), [d].

  Rounds of coordinate descent, which finds the signs, and of a Newton step on the support with
  these signs, which coordinate descent is slow to make when parameters are correlated, as
  neighbouring differences psi are. Both only ever decrease the objective: the Newton step ends
  where the first sign would change.
  """
  matrix = hessian + jnp.diag(l2)
  diagonal = jnp.diag(matrix)
  movable = (diagonal > 0) & jnp.isfinite(l1)
  divisor = jnp.where(movable, diagonal, 1)
  scale = 1 / jnp.sqrt(divisor)

  def update(j, carry):
    z, slope = carry  # slope: the derivative of the smooth part at z.
    new = z[j] - slope[j] / divisor[j]
    new = jnp.sign(new) * jnp.maximum(jnp.abs(new) - l1[j] / divisor[j], 0)
    change = jnp.where(movable[j], new - z[j], 0)
    return z.at[j].add(change), slope + matrix[j] * change

  def newton_on_support(z, slope):
    support = movable & ((z != 0) | (l1 == 0))
    wanted = jnp.where(support, -(slope + jnp.where(z == 0, 0, l1 * jnp.sign(z))), 0)
    both = support[:, None] & support[None, :]
    scaled = jnp.where(both, matrix * scale[:, None] * scale[None, :], 0)
    scaled += jnp.diag(jnp.where(support, _RIDGE, 1))
    # Not by Cholesky, which the TPU compiler lacks in float64.
    direction = scale * jnp.linalg.solve(scaled, wanted * scale)
    # Rounding may make the system of collinear columns indefinite: then not a descent direction.
    descends = jnp.all(jnp.isfinite(direction)) & (wanted @ direction > 0)
    direction = jnp.where(support & descends, direction, 0)
    changes_sign = (l1 > 0) & (z * (z + direction) < 0)
    until_zero = jnp.where(changes_sign, -z / jnp.where(changes_sign, direction, 1), jnp.inf)
    t = jnp.minimum(jnp.min(until_zero), 1)
    z = jnp.where(until_zero == t, 0, z + t * direction)
    return z, gradient + hessian @ (z - theta) + l2 * z

  def round_(carry):
    rounds, z, slope, _ = carry
    z, slope = jax.lax.fori_loop(
      0, _SWEEPS * len(z), lambda i, c: update(i % len(z), c), (z, slope)
    )
    z, slope = newton_on_support(z, slope)
    return rounds + 1, z, slope, kkt_residual(slope - l2 * z, l1, l2, z)

  goes_on = lambda carry: (carry[3] > tolerance) & (carry[0] < _ROUNDS)
  start = (0, theta, gradient + l2 * theta, jnp.asarray(jnp.inf, theta.dtype))
  return jax.lax.while_loop(goes_on, round_, start)[1]
