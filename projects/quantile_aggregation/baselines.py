"""What the paper compares with: fixed averages and linear aggregation of base quantiles.

Base predictions z are [n, p, m] at increasing levels [m]; results are [n, m].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import QuantileRegressor

from common.errors import UserError
from common.evaluation.scoring_rules import pinball_loss

Aggregator = Callable[[np.ndarray], np.ndarray]


@jax.jit
def average(z: jax.Array) -> jax.Array:
  """Vincentisation: the mean of the models' quantiles."""
  return z.mean(axis=-2)


@jax.jit
def median(z: jax.Array) -> jax.Array:
  """The median of the models' quantiles."""
  return jnp.median(z, axis=-2)


@jax.jit
def mixture(z: jax.Array, levels: jax.Array) -> jax.Array:
  """Quantiles of the equal mixture of the models' distributions (probability averaging).

  A model's distribution function is linear between its sorted quantiles; beyond the outer levels it
  goes on with the slope there until 0 and 1.
  """
  z = jnp.sort(z, axis=-1)
  low = z[..., :1] - (z[..., 1:2] - z[..., :1]) * levels[0] / (levels[1] - levels[0])
  high = z[..., -1:] + (z[..., -1:] - z[..., -2:-1]) * (1 - levels[-1]) / (levels[-1] - levels[-2])
  knots = jnp.concatenate([low, z, high], axis=-1)
  heights = jnp.concatenate([jnp.zeros(1), levels, jnp.ones(1)])

  def row(knots):
    at = jnp.sort(knots.ravel())  # The mean is linear between any two of these.
    height = jax.vmap(lambda own: jnp.interp(at, own, heights))(knots).mean(axis=0)
    return jnp.interp(levels, height, at)

  return jax.vmap(row)(knots)


def fit_qra(z: np.ndarray, y: np.ndarray, levels: np.ndarray) -> np.ndarray:
  """Constrained linear stacking: weights on the simplex, exact per level, [p, m].

  The linear program  min sum_i tau u_i + (1 - tau) v_i  with  y - z w = u - v,  w, u, v >= 0,
  sum w = 1. It is what a global medium aggregator without penalty tends to.

  Raises:
    UserError: the solver failed.
  """
  n, p, m = z.shape
  weights = np.empty((p, m))
  for k, level in enumerate(levels):
    identity = sparse.identity(n)
    equalities = sparse.vstack(
      [sparse.hstack([z[:, :, k], identity, -identity]), [np.r_[np.ones(p), np.zeros(2 * n)]]]
    )
    costs = np.r_[np.zeros(p), np.full(n, level), np.full(n, 1 - level)] / n
    solution = optimize.linprog(costs, A_eq=equalities, b_eq=np.r_[y, 1], method="highs")
    if not solution.success:
      raise UserError(f"QRA was not solved at level {level:g}: {solution.message}")
    weights[:, k] = solution.x[:p]
  return weights


def fit_fqra(
  z: np.ndarray,
  y: np.ndarray,
  validation_z: np.ndarray,
  validation_y: np.ndarray,
  levels: np.ndarray,
) -> Aggregator:
  """Factor quantile regression averaging (Maciejowska et al., 2016).

  At each level a linear quantile regression of y on the leading principal components of the p
  predictions; how many, 1 ... p, is chosen on the validation part, the same at all levels.
  """
  factors = [PCA(svd_solver="full").fit(z[:, :, k]) for k in range(len(levels))]

  def regress(count: int) -> Aggregator:
    models = [
      QuantileRegressor(quantile=level, alpha=0, solver="highs").fit(
        pca.transform(z[:, :, k])[:, :count], y
      )
      for k, (level, pca) in enumerate(zip(levels, factors))
    ]
    return lambda new: np.stack(
      [
        model.predict(pca.transform(new[:, :, k])[:, :count])
        for k, (model, pca) in enumerate(zip(models, factors))
      ],
      axis=1,
    )

  def score(fitted: Aggregator) -> float:
    return float(pinball_loss(fitted(validation_z), levels, validation_y).mean())

  return min((regress(count) for count in range(1, z.shape[1] + 1)), key=score)
