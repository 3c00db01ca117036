"""Split conformal prediction: corrections that give intervals their coverage.

With n exchangeable held-out scores, adding their (1 - alpha)(1 + 1/n) empirical quantile covers a
new observation with probability at least 1 - alpha, and, without ties, at most 1 - alpha + 1/(n+1)
(Lei et al. 2018; Romano, Patterson and Candes, "Conformalized Quantile Regression", 2019).
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def conformal_quantile(scores: Array, level: Array) -> Array:
  """The ceil((n + 1) level)-th smallest score; infinite where n is too small for the level.

  Args:
    scores: [n, ...], held out.
    level: 1 - alpha in (0, 1), a scalar or [...], one per column.

  Returns:
    [...].
  """
  ordered = jnp.sort(scores, axis=0)
  n = len(scores)
  # Rounding must not turn an exact (n + 1) level into the next integer.
  rank = jnp.ceil((n + 1) * jnp.broadcast_to(level, ordered.shape[1:]) - 1e-6 * n).astype(jnp.int32)
  chosen = jnp.take_along_axis(ordered, jnp.clip(rank - 1, 0, n - 1)[None], axis=0)[0]
  return jnp.where(rank > n, jnp.inf, chosen)


def cqr_interval(
  low: Array, high: Array, calibration_low: Array, calibration_high: Array, y: Array, alpha: float
) -> tuple[Array, Array]:
  """Conformalized quantile regression of a central interval.

  Args:
    low, high: of the new observations, [m].
    calibration_low, calibration_high, y: of the held-out observations, [n].
    alpha: the probability to miss.

  Returns:
    The corrected low and high, [m]: wider, or narrower where the given ones cover too much.
  """
  scores = jnp.maximum(calibration_low - y, y - calibration_high)
  shift = conformal_quantile(scores, 1 - alpha)
  return low - shift, high + shift
