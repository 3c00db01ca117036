"""Conformal calibration of quantiles (section 6): CQR on held-out rows, CV+ on the folds.

Quantiles are [n, m] at increasing levels [m]. Levels below 1/2 are lower bounds, P(y < q) <= tau; the
others are upper bounds, P(y <= q) >= tau. What calibration has crossed is sorted again.
"""

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from common.evaluation.conformal import conformal_quantile, cqr_interval


def check_rows(n: int, levels: np.ndarray) -> None:
  """Refuses levels that n calibration rows cannot bound.

  Raises:
    UserError: for an outer level the bound would be infinite.
  """
  levels = np.asarray(levels, np.float64)
  outer = levels[np.minimum(levels, 1 - levels).argmin()]
  needed = int(np.ceil(1 / min(outer, 1 - outer) - 1e-6)) - 1
  if n < needed:
    raise UserError(
      f"conformal calibration has {n} rows; level {outer:g} needs at least {needed}: give more rows "
      "or leave the outer levels out"
    )


def bound(scores: jax.Array, levels: jax.Array) -> jax.Array:
  """The conformal bound of scores [n, m] at each level, [m]; lower bounds by reflection."""
  sign = jnp.where(levels < 0.5, -1, 1)
  return sign * conformal_quantile(sign * scores, jnp.where(levels < 0.5, 1 - levels, levels))


@jax.jit
def cqr_levels(
  calibration_q: jax.Array, y: jax.Array, q: jax.Array, levels: jax.Array
) -> jax.Array:
  """One-sided CQR: shifts every level by an order statistic of y - q on the calibration rows.

  Args:
    calibration_q: [n, m], y: [n]: rows that the quantiles were not fitted to.
    q: [b, m], to be calibrated.
    levels: [m]; infinite where `check_rows` refuses them.

  Returns:
    [b, m], increasing.
  """
  return jnp.sort(q + bound(y[:, None] - calibration_q, levels), axis=-1)


@jax.jit
def cqr_pairs(calibration_q: jax.Array, y: jax.Array, q: jax.Array, levels: jax.Array) -> jax.Array:
  """CQR (Romano et al., 2019) of the central intervals between columns k and m - 1 - k.

  Both ends move by the same amount; the median, if there is one, stays. Arguments and result are
  those of `cqr_levels`, with levels symmetric about 1/2.
  """
  pairs, m = q.shape[-1] // 2, q.shape[-1]
  one = jax.vmap(cqr_interval, in_axes=(1, 1, 1, 1, None, 0), out_axes=1)
  low, high = one(
    q[:, :pairs],
    q[:, ::-1][:, :pairs],
    calibration_q[:, :pairs],
    calibration_q[:, ::-1][:, :pairs],
    y,
    2 * levels[:pairs],
  )
  middle = q[:, pairs : m - pairs]
  return jnp.sort(jnp.concatenate([low, middle, high[:, ::-1]], axis=-1), axis=-1)


@jax.jit
def cv_plus(
  fold_q: jax.Array, folds: jax.Array, y: jax.Array, q: jax.Array, levels: jax.Array
) -> jax.Array:
  """CV+ (Barber et al., 2021), one-sided per level: no row is set apart for calibration.

  With g^k fitted without fold k, level tau at a new row is an order statistic, over the training
  rows i, of g^{k(i)}_tau(new) + y_i - g^{k(i)}_tau(x_i).

  Args:
    fold_q: [n, m], each training row as predicted without its fold.
    folds: [n] int, the folds.
    y: [n].
    q: [K, b, m], the new rows as predicted without each fold.
    levels: [m]; infinite where `check_rows` refuses them.

  Returns:
    [b, m], increasing.
  """
  scores = y[:, None] - fold_q
  row = lambda q_row: bound(q_row[folds] + scores, levels)  # q_row [K, m]
  return jnp.sort(jax.lax.map(row, q.swapaxes(0, 1), batch_size=16), axis=-1)
