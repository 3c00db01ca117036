"""The cumulative logit model with one slope vector per boundary (section 2, equation 1).

    P(y <= k | x) = sigmoid(eta_k),     eta_k = alpha_k + x' beta_k,     k = 0 ... K-2

Classes are coded 0 ... K-1. An observation of class y lies between the boundaries y - 1 and y, so
with upper = eta_y and lower = eta_{y-1} (infinite for the outer classes)

    -log pi_y = log(1 + e^-upper) + log(1 + e^lower) - log(1 - e^-(upper - lower))

which is exact in the tails, convex term by term, and +inf where the boundaries cross. Its
derivatives are written out: automatic differentiation would make NaN of the infinities.

The parameters are theta [K-1, 1+p]: column 0 the intercepts alpha_k, the others the differences
psi_0 = beta_0, psi_k = beta_k - beta_{k-1}. A `design` [1+p, n] is a row of ones above X'; with the
observations along the last axis its products with a few boundaries take half the time.
"""

import jax
import jax.numpy as jnp

# Observations per block of the Hessian's products: their weighted copies stay in the cache.
_BLOCK = 2048


def boundary_coefficients(theta: jax.Array) -> jax.Array:
  """theta [K-1, 1+p] to (alpha_k, beta_k) [K-1, 1+p], beta_k = psi_0 + ... + psi_k."""
  return jnp.concatenate([theta[:, :1], jnp.cumsum(theta[:, 1:], axis=0)], axis=1)


def difference_gradient(gradient: jax.Array) -> jax.Array:
  """The transpose of `boundary_coefficients`: d/d(alpha, beta) to d/d(alpha, psi), on the axes 0
  and 1 of [K-1, 1+p, ...]."""
  suffix_sums = jnp.cumsum(gradient[::-1, 1:], axis=0)[::-1]
  return jnp.concatenate([gradient[:, :1], suffix_sums], axis=1)


def linear_predictors(design: jax.Array, theta: jax.Array) -> jax.Array:
  """eta [K-1, n]."""
  return boundary_coefficients(theta) @ design


def _bounds(eta: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """eta of the boundaries below and above each observation, both [n]."""
  infinity = jnp.full((1, y.size), jnp.inf, eta.dtype)
  padded = jnp.concatenate([-infinity, eta, infinity])
  pick = lambda row: jnp.take_along_axis(padded, row[None], axis=0)[0]
  return pick(y), pick(y + 1)


def _is_class(y: jax.Array, num_classes: int) -> jax.Array:
  """bool [K, n]. Row k: the observations that boundary k is above, k - 1 below."""
  return jnp.arange(num_classes)[:, None] == y


def negative_log_likelihood(eta: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
  """sum_i w_i (-log pi_{y_i}); +inf if a boundary pair crosses at an observation between them.

  Args:
    eta: [K-1, n].
    y: [n], integers 0 ... K-1.
    weights: [n], non-negative. Observations of weight 0 do not count, crossed or not.
  """
  lower, upper = _bounds(eta, y)
  gap = upper - lower
  loss = jnp.logaddexp(0, -upper) + jnp.logaddexp(0, lower) - jnp.log(-jnp.expm1(-gap))
  return jnp.sum(_weighted(weights, jnp.where(gap > 0, loss, jnp.inf)))


def residuals(eta: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
  """The derivative of the negative log-likelihood by eta, [K-1, n]."""
  lower, upper = _bounds(eta, y)
  by_gap = 1 / jnp.expm1(upper - lower)
  by_upper = _weighted(weights, -jax.nn.sigmoid(-upper) - by_gap)
  by_lower = _weighted(weights, jax.nn.sigmoid(lower) + by_gap)
  own = _is_class(y, len(eta) + 1)
  return jnp.where(own[:-1], by_upper, 0) + jnp.where(own[1:], by_lower, 0)


def score(design: jax.Array, eta: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
  """The gradient of the negative log-likelihood by theta, [K-1, 1+p]."""
  return difference_gradient(residuals(eta, y, weights) @ design.T)


def information(design: jax.Array, eta: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
  """The Hessian of the negative log-likelihood by theta, [(K-1)(1+p), (K-1)(1+p)].

  By (alpha, beta) it is block tridiagonal, for an observation touches two adjacent boundaries.
  """
  lower, upper = _bounds(eta, y)
  crossing = 0.25 / jnp.sinh((upper - lower) / 2) ** 2
  variance = lambda bound: jax.nn.sigmoid(bound) * jax.nn.sigmoid(-bound)
  own = _is_class(y, len(eta) + 1)
  diagonal = jnp.where(own[:-1], _weighted(weights, variance(upper) + crossing), 0)
  diagonal += jnp.where(own[1:], _weighted(weights, variance(lower) + crossing), 0)
  adjacent = jnp.where(own[1:-1], _weighted(weights, -crossing), 0)
  grams = _weighted_grams(design, jnp.concatenate([diagonal, adjacent]))
  m, q = len(eta), len(design)
  k = jnp.arange(m)
  before, after = k[:-1], k[1:]
  hessian = jnp.zeros((m, m, q, q), eta.dtype).at[k, k].set(grams[:m])
  hessian = hessian.at[before, after].set(grams[m:]).at[after, before].set(grams[m:])
  half = difference_gradient(hessian.transpose(0, 2, 1, 3))  # Rows by psi, columns by beta.
  return difference_gradient(half.transpose(2, 3, 0, 1)).reshape(m * q, m * q)


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
  """weights * values, with 0 where the weight is 0 and the value may be anything."""
  return jnp.where(weights > 0, weights * values, 0)


def _weighted_grams(design: jax.Array, weights: jax.Array) -> jax.Array:
  """design diag(weights[c]) design' for every row c: [q, n], [c, n] -> [c, q, q].

  Blocks of observations without weight are skipped. When observations are sorted by class, that is
  more than half of the work, as each class touches two boundaries and the last classes are rare.
  """

  def grams(columns, w):
    weighted = (columns * w[:, None, :]).reshape(-1, w.shape[1])
    return (weighted @ columns.T).reshape(len(w), *2 * [len(columns)])

  def add(block, total):
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, block * _BLOCK, _BLOCK, axis=1)
    columns, w = cut(design), cut(weights)
    for c in range(len(w)):
      more = lambda total, c=c: total.at[c].add(grams(columns, w[c : c + 1])[0])
      total = jax.lax.cond(jnp.any(w[c] != 0), more, lambda total: total, total)
    return total

  blocks = design.shape[1] // _BLOCK
  if blocks < 2:
    return grams(design, weights)
  rest = grams(design[:, blocks * _BLOCK :], weights[:, blocks * _BLOCK :])
  return jax.lax.fori_loop(0, blocks, add, rest)


def null_intercepts(y: jax.Array, weights: jax.Array, num_classes: int) -> jax.Array:
  """The empirical cumulative logits [K-1]: the fit without slopes."""
  shares = jnp.zeros(num_classes, weights.dtype).at[y].add(weights) / weights.sum()
  below, above = jnp.cumsum(shares)[:-1], jnp.cumsum(shares[::-1])[::-1][1:]
  return jnp.log(below) - jnp.log(above)


def class_probabilities(eta: jax.Array) -> jax.Array:
  """pi: eta [..., K-1] -> [..., K], differences of the cumulative probabilities.

  They sum to 1. Where boundaries cross, a middle one is negative; the outer ones never are.
  """
  first, last = jax.nn.sigmoid(eta[..., :1]), jax.nn.sigmoid(-eta[..., -1:])
  return jnp.concatenate([first, jnp.diff(jax.nn.sigmoid(eta), axis=-1), last], axis=-1)
