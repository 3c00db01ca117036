"""The base learners that scikit-learn fits: quantile forests, boosting and linear quantile regression.

  RF, XT   random forest, extra trees; weighted quantiles of the outcomes in a row's leaves
           (Meinshausen, 2006)
  GBM      histogram gradient boosting of the pinball loss, one model per level
  LQR      linear quantile regression with an L1 penalty, one linear program per level

A fitted learner is a function from x [n, d] to quantiles [n, m].
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from scipy import sparse
from sklearn.ensemble import (
  ExtraTreesRegressor,
  HistGradientBoostingRegressor,
  RandomForestRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import QuantileRegressor
from threadpoolctl import threadpool_limits

from common.errors import UserError

Kind = Literal["RF", "XT", "GBM", "LQR"]
Predictor = Callable[[np.ndarray], np.ndarray]

_TREES = 50

# What the random search draws from. LightGBM's row sampling and L1 penalty have no counterpart in
# scikit-learn's boosting.
GRIDS: dict[str, dict[str, tuple]] = {
  "RF": {"min_samples_split": (8, 16, 64), "min_samples_leaf": (8, 16, 64)},
  "XT": {"min_samples_split": (8, 16, 64), "min_samples_leaf": (8, 16, 64)},
  "GBM": {
    "max_leaf_nodes": (4, 8, 16, 31),
    "min_samples_leaf": (5, 10, 20),
    "max_features": (0.4, 0.6, 0.8, 1.0),
    "l2_regularization": (0.0, 0.1, 1.0),
  },
  "LQR": {"alpha": (0.0, 1e-4, 1e-3, 1e-2)},
}


def fit(
  kind: Kind, x: np.ndarray, y: np.ndarray, levels: np.ndarray, seed: int, settings: dict[str, Any]
) -> Predictor:
  """Fits one learner to x [n, d], y [n].

  Raises:
    UserError: the linear program of a level was not solved.
  """
  if kind in ("RF", "XT"):
    return _fit_forest(kind, x, y, levels, seed, settings)
  if kind == "GBM":
    make = lambda level: HistGradientBoostingRegressor(
      loss="quantile",
      quantile=level,
      max_iter=_TREES,
      early_stopping=False,
      random_state=seed,
      **settings,
    )
  else:
    make = lambda level: QuantileRegressor(quantile=level, solver="highs", **settings)
  # Tables of a few thousand rows lose more to waking threads than those save.
  with warnings.catch_warnings(), threadpool_limits(1):
    warnings.simplefilter("error", ConvergenceWarning)
    try:
      models = [make(level).fit(x, y) for level in levels]
    except ConvergenceWarning as e:
      raise UserError(f"linear quantile regression did not converge: {e}; leave LQR out") from None

  def predict(x: np.ndarray) -> np.ndarray:
    with threadpool_limits(1):
      return np.stack([model.predict(x) for model in models], axis=1)

  return predict


def _fit_forest(kind, x, y, levels, seed, settings) -> Predictor:
  make = RandomForestRegressor if kind == "RF" else ExtraTreesRegressor
  forest = make(_TREES, random_state=seed, **settings).fit(x, y)
  order = np.argsort(y, kind="stable")
  leaves, outcomes = forest.apply(x)[order], y[order]

  def predict(x: np.ndarray) -> np.ndarray:
    return forest_quantiles(leaves, outcomes, forest.apply(x), levels)

  return predict


def forest_quantiles(
  leaves: np.ndarray, outcomes: np.ndarray, new_leaves: np.ndarray, levels: np.ndarray
) -> np.ndarray:
  """Quantiles of the outcomes, weighted by how often they share a leaf with a new row.

  A training row weighs the mean over trees of 1 / (size of its leaf), or 0 in other leaves; the
  quantile is the smallest outcome at which the weights reach the level.

  Args:
    leaves: [n, trees] int, the leaves of the training rows, which are sorted by outcome.
    outcomes: [n], increasing.
    new_leaves: [b, trees] int.
    levels: [m].

  Returns:
    [b, m], in the dtype of `outcomes`.
  """
  nodes, trees = max(leaves.max(), new_leaves.max()) + 1, leaves.shape[1]

  def indicators(leaves):  # [rows, trees * nodes]
    columns = leaves + nodes * np.arange(trees)
    starts = trees * np.arange(len(leaves) + 1)
    return sparse.csr_array(
      (np.ones(leaves.size), columns.ravel(), starts), (len(leaves), trees * nodes)
    )

  train = indicators(leaves)
  shares = (train / (trees * np.maximum(train.sum(axis=0), 1))).T.tocsr()

  def of_rows(leaves):
    cumulative = np.cumsum((indicators(leaves) @ shares).toarray(), axis=1)
    # One search for all rows, each in its own range of numbers. A level that the weights reach in
    # exact arithmetic must not be missed by rounding.
    start = 2.0 * np.arange(len(leaves))[:, None]
    places = np.searchsorted((cumulative + start).ravel(), levels + start - 1e-6)
    return outcomes[places - len(outcomes) * np.arange(len(leaves))[:, None]]

  # So many rows at once that their weights take little memory.
  return np.concatenate([of_rows(new_leaves[i : i + 512]) for i in range(0, len(new_leaves), 512)])
