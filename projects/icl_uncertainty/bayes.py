"""The Bayes-optimal mean and variance of y_t given (x_1, y_1, ..., x_t), for three priors.

All positions t of a prompt come from prefix sums of x x', x y and y^2: the d x d form, which stays
well conditioned where X X' + sigma^2 I (t x t) does not. Differences of large sums want float64:
call within `jax.enable_x64(True)`. Functions take one prompt; `vmap` them over prompts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from projects.icl_uncertainty.metrics import Prediction

Array = jax.Array


class Moments(NamedTuple):
  """What the t - 1 labels before x_t tell, for t = 1 ... T.

  With X'X = U diag(eigenvalues) U':

  Attributes:
    count: t - 1, [T].
    eigenvalues: of X'X, [T, d], at least 0.
    projected: U'X'y, [T, d].
    query: U'x_t, [T, d].
    squares: y'y, [T].
  """

  count: Array
  eigenvalues: Array
  projected: Array
  query: Array
  squares: Array


def prefix_moments(x: Array, y: Array) -> Moments:
  """x [T, d], y [T] -> the moments of the labels before each."""
  before = lambda terms: jnp.cumsum(terms, axis=0) - terms
  eigenvalues, basis = jnp.linalg.eigh(before(x[:, :, None] * x[:, None, :]))
  rotate = lambda v: jnp.einsum("tij,ti->tj", basis, v)
  return Moments(
    jnp.arange(len(y), dtype=x.dtype),
    jnp.maximum(eigenvalues, 0),
    rotate(before(x * y[:, None])),
    rotate(x),
    before(y**2),
  )


def ridge(moments: Moments, penalty: Array) -> tuple[Array, Array, Array]:
  """Ridge regression at every position, w = (X'X + penalty I)^{-1} X'y.

  Args:
    moments: [T] of them.
    penalty: broadcastable to [T], positive.

  Returns:
    w'x_t; x_t'(X'X + penalty I)^{-1} x_t; and |y - Xw|^2 + penalty |w|^2, all [T].
  """
  shrunk = moments.eigenvalues + jnp.asarray(penalty)[..., None]
  mean = jnp.sum(moments.query * moments.projected / shrunk, axis=-1)
  leverage = jnp.sum(moments.query**2 / shrunk, axis=-1)
  minimum = moments.squares - jnp.sum(moments.projected**2 / shrunk, axis=-1)
  return mean, leverage, jnp.maximum(minimum, 0)


def known_noise(moments: Moments, sigma: Array, weight_sd: Array) -> tuple[Prediction, Array]:
  """Bayes for known sigma and w ~ N(0, weight_sd^2 I).

    V = (X'X / sigma^2 + I / weight_sd^2)^{-1},  m = V X'y / sigma^2,
    mean x'm, variance sigma^2 + x'V x.

  Args:
    moments: [T] of them.
    sigma, weight_sd: broadcastable to [T].

  Returns:
    The prediction, and log N(y | 0, weight_sd^2 X X' + sigma^2 I) of the labels before, [T].
  """
  penalty = (sigma / weight_sd) ** 2
  mean, leverage, minimum = ridge(moments, penalty)
  # The determinant of the t x t covariance by its d eigenvalues that are not sigma^2.
  log_det = 2 * moments.count * jnp.log(sigma)
  log_det += jnp.sum(jnp.log1p(moments.eigenvalues / jnp.asarray(penalty)[..., None]), axis=-1)
  log_evidence = -0.5 * (log_det + minimum / sigma**2 + moments.count * jnp.log(2 * jnp.pi))
  return Prediction(mean, sigma * jnp.sqrt(1 + leverage)), log_evidence


def grid_bayes(moments: Moments, sigmas: Array, log_prior: Array, weight_sds: Array) -> Prediction:
  """Bayes for sigma on a grid: mixtures of `known_noise` by the posterior of sigma.

  Args:
    moments: [T] of them.
    sigmas, log_prior, weight_sds: [G].
  """
  each, log_evidence = jax.vmap(known_noise, in_axes=(None, 0, 0))(moments, sigmas, weight_sds)
  return mixture(log_prior[:, None] + log_evidence, each.mean, each.sd**2)


def mixture(log_weights: Array, means: Array, variances: Array) -> Prediction:
  """Mean and sd of mixtures [T] of components [G, T]: the law of total variance."""
  weights = jax.nn.softmax(log_weights, axis=0)
  mean = jnp.sum(weights * means, axis=0)
  return Prediction(mean, jnp.sqrt(jnp.sum(weights * (variances + (means - mean) ** 2), axis=0)))


def student_t(moments: Moments, shape: Array, scale: Array) -> Prediction:
  """Bayes for sigma^2 ~ InverseGamma(shape, scale), w | sigma ~ N(0, sigma^2 I), in closed form.

    y_t | H_t ~ t with 2 a degrees of freedom, location x'm and squared scale (b / a)(1 + x'V x),
    a = shape + (t-1)/2,  b = scale + (y'y - m'V^{-1}m) / 2,  V = (X'X + I)^{-1},  m = V X'y.

  The variance, b / (a - 1) (1 + x'V x), needs shape > 1.
  """
  mean, leverage, minimum = ridge(moments, jnp.ones(()))
  a, b = shape + moments.count / 2, scale + minimum / 2
  return Prediction(mean, jnp.sqrt(b / (a - 1) * (1 + leverage)))


def pool_bayes(x: Array, y: Array, weights: Array, sigmas: Array) -> Prediction:
  """Bayes for n equally likely known tasks: the posterior over the pool's members.

  Args:
    x: [T, d].
    y: [T].
    weights, sigmas: of the pool, [n, d] and [n].
  """
  means = weights @ x.T  # [n, T]
  terms = -jnp.log(sigmas)[:, None] - 0.5 * ((y - means) / sigmas[:, None]) ** 2
  log_weights = jnp.cumsum(terms, axis=1) - terms  # Of the labels before t.
  return mixture(log_weights, means, jnp.broadcast_to(sigmas[:, None] ** 2, means.shape))
