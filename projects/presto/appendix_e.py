"""Appendix E: does the condition of theorem 2.3 on the design hold where the class is rare enough?

The theorem says that the variance of proportional odds beats that of logistic regression when the
rarest class's probability is at most lambda_min / (3 M^2 (2 + M)) everywhere. lambda_min is the
smallest eigenvalue of

    E[I_bb] - 2 E[I_ba] E[I_ba]' / E[I_aa]

with the Fisher information of the slopes b and the first intercept a of a three-class proportional
odds model, and M bounds |x|.
"""

import jax
import jax.numpy as jnp


def smallest_eigenvalue(x: jax.Array, intercepts: jax.Array, slopes: jax.Array) -> jax.Array:
  """lambda_min, means over the rows of x [n, p]; intercepts [2], the second may be inf."""
  eta = x @ slopes
  first, last = jax.nn.sigmoid(intercepts[0] + eta), jax.nn.sigmoid(-intercepts[1] - eta)
  middle = 1 - first - last
  slope_weight = (1 - first) * (1 - middle) * (1 - last)
  intercept_weight = (1 - last) * first * (1 - first)
  mixed = intercept_weight @ x / len(x)
  matrix = (x.T * slope_weight) @ x / len(x)
  matrix -= 2 * jnp.outer(mixed, mixed) / intercept_weight.mean()
  return jnp.linalg.eigvalsh(matrix)[0]


def rarest_allowed(smallest_eigenvalue: jax.Array, bound: float) -> jax.Array:
  """The largest probability of the rare class that the theorem allows; `bound` is M."""
  return smallest_eigenvalue / (3 * bound**2 * (2 + bound))


def uniform_design(key: jax.Array, n: int, p: int) -> tuple[jax.Array, float]:
  """Study A: x [n, p] uniform on [-1, 1]^p, and M."""
  return jax.random.uniform(key, (n, p), minval=-1.0, maxval=1.0), p**0.5


def normal_design(
  key: jax.Array, n: int, p: int, correlation: float, bound: float = 3.0
) -> tuple[jax.Array, float]:
  """Study B: x [n, p] equicorrelated standard normal, clipped to [-bound, bound], and M."""
  own, common = jax.random.split(key)
  shared = jax.random.normal(common, (n, 1))
  x = (1 - correlation) ** 0.5 * jax.random.normal(own, (n, p)) + correlation**0.5 * shared
  return jnp.clip(x, -bound, bound), bound * p**0.5


def rare_intercept(rare_probability: float, slopes: jax.Array, bound: float) -> jax.Array:
  """The second intercept with which P(rare | x) <= rare_probability on [-bound, bound]^p."""
  return jnp.abs(slopes).sum() * bound - jax.scipy.special.logit(rare_probability)
