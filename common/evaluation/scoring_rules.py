"""Proper scoring rules of probabilities, quantiles, intervals and normals.

Every rule is negatively oriented (smaller is better), and is returned for each observation: take
the mean of whichever are meant. See Gneiting and Raftery, "Strictly Proper Scoring Rules,
Prediction, and Estimation" (2007). All are pure functions that jit and vmap.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def brier_score(probabilities: Array, outcomes: Array) -> Array:
  """Squared error of probabilities.

  Args:
    probabilities: [...] of the event, with outcomes [...] 0 or 1; or [..., classes] with integer
      outcomes [...], whose score is summed over the classes and so is twice the other's for two.

  Returns:
    [...].
  """
  probabilities, outcomes = jnp.asarray(probabilities), jnp.asarray(outcomes)
  if probabilities.ndim == outcomes.ndim:
    return (probabilities - outcomes) ** 2
  hot = jax.nn.one_hot(outcomes, probabilities.shape[-1], dtype=probabilities.dtype)
  return jnp.sum((probabilities - hot) ** 2, axis=-1)


def log_score(probabilities: Array, outcomes: Array) -> Array:
  """-log of the probability of what happened, nats; infinite where it had none.

  Args:
    probabilities, outcomes: as of `brier_score`.

  Returns:
    [...].
  """
  probabilities, outcomes = jnp.asarray(probabilities), jnp.asarray(outcomes)
  if probabilities.ndim == outcomes.ndim:
    return -jnp.log(jnp.where(outcomes == 1, probabilities, 1 - probabilities))
  happened = jnp.take_along_axis(probabilities, outcomes[..., None], axis=-1)[..., 0]
  return -jnp.log(happened)


def pinball_loss(quantiles: Array, levels: Array, y: Array) -> Array:
  """max(tau (y - q), (tau - 1) (y - q)): the loss that the tau-quantile minimises.

  Args:
    quantiles: [..., levels].
    levels: tau in (0, 1), [levels].
    y: [...].

  Returns:
    [..., levels].
  """
  error = y[..., None] - quantiles
  return jnp.maximum(levels * error, (levels - 1) * error)


def interval_score(low: Array, high: Array, y: Array, alpha: Array | float) -> Array:
  """(high - low) + 2/alpha (low - y)+ + 2/alpha (y - high)+ of central (1 - alpha) intervals.

  Args:
    low, high, y: broadcastable to one shape.
    alpha: the intervals' nominal probability to miss, broadcastable likewise.
  """
  missed = jnp.maximum(low - y, 0) + jnp.maximum(y - high, 0)
  return high - low + 2 / alpha * missed


def weighted_interval_score(quantiles: Array, levels: Array, y: Array) -> Array:
  """The weighted interval score of quantiles at symmetric levels (Bracher et al. 2021).

    (|y - median| / 2 + sum_k alpha_k / 2 IS_alpha_k) / (K + 1/2)

  of K central intervals and the median: twice the mean pinball loss over the levels. Without the
  median its term and the 1/2 of the divisor are left out, and the identity still holds.

  Args:
    quantiles: [..., levels].
    levels: ascending and symmetric, tau_i = 1 - tau_{m-1-i}, [levels].
    y: [...].

  Returns:
    [...].
  """
  count = quantiles.shape[-1]
  half = count // 2
  low, high = quantiles[..., :half], quantiles[..., ::-1][..., :half]
  alpha = 2 * levels[:half]
  total = jnp.sum(alpha / 2 * interval_score(low, high, y[..., None], alpha), axis=-1)
  if count % 2:
    total += jnp.abs(y - quantiles[..., half]) / 2
  return total / (count / 2)


def crps_normal(mean: Array, sd: Array, y: Array) -> Array:
  """Continuous ranked probability score of normal forecasts; all broadcast to one shape."""
  z = (y - mean) / sd
  density, cumulative = jax.scipy.stats.norm.pdf(z), jax.scipy.stats.norm.cdf(z)
  return sd * (z * (2 * cumulative - 1) + 2 * density - 1 / jnp.sqrt(jnp.pi))
