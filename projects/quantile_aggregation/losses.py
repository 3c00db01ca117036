"""What aggregators and quantile networks minimise: (Huberised) pinball plus a crossing penalty.

Quantiles are [..., n, m] at increasing levels [m], outcomes [n].
"""

import jax
import jax.numpy as jnp


@jax.jit
def pinball(q: jax.Array, y: jax.Array, levels: jax.Array, alpha: float = 0.0) -> jax.Array:
  """Pinball loss of every row and level, [n, m] (section 2).

  With e = y - q it is |e| * (tau if e >= 0 else 1 - tau). alpha > 0 replaces |e| by
  e^2 / (2 alpha) where |e| < alpha and by |e| - alpha / 2 elsewhere; alpha may be traced.
  """
  error = y[..., None] - q
  size = jnp.abs(error)
  # A divisor of 1 where there is no Huber zone keeps the unused branch finite.
  safe = jnp.where(alpha > 0, alpha, 1.0)
  size = jnp.where(size < alpha, error**2 / (2 * safe), size - alpha / 2)
  return size * jnp.where(error >= 0, levels, 1 - levels)


def validation_loss(q: jax.Array, y: jax.Array, levels: jax.Array) -> jax.Array:
  """Mean pinball loss of the rows whose outcome is not NaN (see `search.padded`), a scalar."""
  return pinball(q, y, levels).mean(where=~jnp.isnan(y)[:, None])


def constant_margins(delta: float, num_levels: int) -> jax.Array:
  """delta for every pair of levels, [m, m]."""
  return jnp.full((num_levels, num_levels), delta)


def adaptive_margins(scale: float, residuals: jax.Array, levels: jax.Array) -> jax.Array:
  """scale * (q_s - q_t)_+ of the empirical quantiles of residuals [n], row s, column t, [m, m]."""
  q = jnp.quantile(residuals, levels)
  return scale * jax.nn.relu(q[:, None] - q[None, :])


@jax.jit
def crossing_penalty(q: jax.Array, margins: jax.Array) -> jax.Array:
  """Mean over rows and pairs s > t of (q_t - q_s + margins[s, t])_+, a scalar (section 4.1)."""
  m = q.shape[-1]
  violation = jax.nn.relu(q[..., None, :] - q[..., :, None] + margins)
  rows = q.size // m
  return jnp.tril(violation, k=-1).sum() / (rows * max(m * (m - 1) / 2, 1))
