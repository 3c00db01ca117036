"""Predictors that are not Bayes: least squares, ridge, neighbours, and the prior alone.

The plug-in noise levels are kept within the prior's range [low, high]: with few labels a residual
sd may be near 0, whose negative log-likelihood has no finite mean. Before there are residuals the
mean noise of the prior stands in. One prompt each; `vmap` over prompts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from projects.icl_uncertainty.bayes import Moments, known_noise, ridge
from projects.icl_uncertainty.metrics import Prediction

Array = jax.Array


class PriorKnowledge(NamedTuple):
  """What the comparators know of the training tasks; scalars.

  Attributes:
    low, high: the range of sigma.
    mean_variance: E[sigma^2].
    weight_variance: E[w_j^2].
  """

  low: Array
  high: Array
  mean_variance: Array
  weight_variance: Array


def in_weight(x: Array, prior: PriorKnowledge) -> Prediction:
  """Ignores the labels: mean 0, variance E[sigma^2] + x_t' E[w w'] x_t. x [T, d] -> [T]."""
  variance = prior.mean_variance + prior.weight_variance * jnp.sum(x**2, axis=-1)
  return Prediction(jnp.zeros_like(variance), jnp.sqrt(variance))


def least_squares(moments: Moments, x: Array, prior: PriorKnowledge) -> Prediction:
  """OLS, of minimum norm while t <= d, with the residuals' sd over their degrees of freedom.

  The variance is s^2 (1 + x'(X'X)^+ x); while no residual is free, that of `in_weight`.
  """
  # Eigenvalues that are 0 but for rounding are directions that were not seen.
  largest = moments.eigenvalues.max(axis=-1, keepdims=True)
  seen = moments.eigenvalues > 1e-9 * largest
  inverse = jnp.where(seen, 1 / jnp.where(seen, moments.eigenvalues, 1), 0)
  mean = jnp.sum(moments.query * moments.projected * inverse, axis=-1)
  leverage = jnp.sum(moments.query**2 * inverse, axis=-1)
  residual = moments.squares - jnp.sum(moments.projected**2 * inverse, axis=-1)
  free = moments.count - seen.sum(axis=-1)
  variance = jnp.maximum(residual, 0) / jnp.maximum(free, 1)
  sigma = jnp.clip(jnp.sqrt(variance), prior.low, prior.high)
  sd = jnp.where(free > 0, sigma * jnp.sqrt(1 + leverage), in_weight(x, prior).sd)
  return Prediction(mean, sd)


def ridge_mean_noise(moments: Moments, prior: PriorKnowledge) -> Prediction:
  """Ridge with penalty E[sigma^2] / E[w_j^2]: Bayes as if sigma^2 were always its mean."""
  return known_noise(moments, jnp.sqrt(prior.mean_variance), jnp.sqrt(prior.weight_variance))[0]


def ridge_plug_in(moments: Moments, prior: PriorKnowledge) -> Prediction:
  """Ridge, then Bayes as if sigma were known to be what ridge's residuals say.

  sigma^2 = |y - Xw|^2 / (t - 1 - tr H), of `ridge_mean_noise` with hat matrix H.
  """
  penalty = prior.mean_variance / prior.weight_variance
  _, _, minimum = ridge(moments, penalty)
  shrunk = moments.eigenvalues + penalty
  residual = minimum - penalty * jnp.sum((moments.projected / shrunk) ** 2, axis=-1)
  free = moments.count - jnp.sum(moments.eigenvalues / shrunk, axis=-1)
  variance = jnp.maximum(residual, 0) / jnp.where(moments.count > 0, free, 1)
  variance = jnp.where(moments.count > 0, variance, prior.mean_variance)
  sigma = jnp.clip(jnp.sqrt(variance), prior.low, prior.high)
  return known_noise(moments, sigma, jnp.sqrt(prior.weight_variance))[0]


def nearest_neighbours(x: Array, y: Array, prior: PriorKnowledge, neighbours: int) -> Prediction:
  """Mean and spread of the labels of the nearest covariates before t.

  The variance is s^2 (1 + 1/k) with k - 1 degrees of freedom. `in_weight` until k labels are there.
  """
  length = len(y)
  distance = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
  distance = jnp.where(jnp.tri(length, k=-1, dtype=bool), distance, jnp.inf)
  _, nearest = jax.lax.top_k(-distance, neighbours)  # [T, k]
  labels = y[nearest]
  enough = jnp.arange(length) >= neighbours
  unconditional = in_weight(x, prior)
  sd = labels.std(axis=-1, ddof=1) * jnp.sqrt(1 + 1 / neighbours)
  return Prediction(
    jnp.where(enough, labels.mean(axis=-1), unconditional.mean),
    jnp.where(enough, sd, unconditional.sd),
  )
