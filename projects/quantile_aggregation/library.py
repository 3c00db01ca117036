"""The library of base models: random search, out-of-fold predictions, refits (section 5.1).

Every learner is searched on the validation part, and its best setting is fitted to the whole
training part and to each of K training parts with one fold left out. What it predicts is
[K + 1, n, m]: the models without fold 0 ... K - 1, then that of the whole training part. Validation
rows choose settings and the number of steps, and are in no training set.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.evaluation.scoring_rules import pinball_loss
from projects.quantile_aggregation import losses, networks, trees
from projects.quantile_aggregation.aggregators import Settings, batch_size
from projects.quantile_aggregation.search import (
  Budget,
  draw_settings,
  refit_without_folds,
  search,
)

NETWORKS = ("CGN", "SQR", "MQR")
TREES = ("RF", "XT", "GBM", "LQR")
LEARNERS = NETWORKS + TREES

# The paper's grids; `layers` and `width` come from the budget.
NETWORK_GRID = {
  "learning_rate": (1e-3, 3e-4),
  "weight_decay": (1e-5, 1e-7),
  "dropout": (0.0, 0.05, 0.1),
  "alpha": (0.0, 0.01),
  "margin_weight": (0.0, 0.5, 1.0, 5.0),
  "delta": (1e-4, 1e-3, 5e-3, 7.5e-3, 9.9e-3),
}


class Split(NamedTuple):
  """Standardised float32 rows; x [n, d], y [n]."""

  x: np.ndarray
  y: np.ndarray


def contiguous_folds(n: int, num_folds: int) -> np.ndarray:
  """The fold of every row, [n]: unshuffled, as the rows were shuffled when they were split."""
  return np.arange(n) * num_folds // n


def fit_learner(
  kind: str,
  train: Split,
  validation: Split,
  levels: np.ndarray,
  folds: np.ndarray,
  budget: Budget,
  seed: int,
) -> Callable[[np.ndarray], np.ndarray]:
  """Searches and fits one learner; returns x [n, d] -> quantiles float32 [K + 1, n, m]."""
  rng = np.random.default_rng([seed, LEARNERS.index(kind)])
  if kind in TREES:
    return _fit_sklearn(kind, train, validation, levels, folds, budget, rng)
  grid = NETWORK_GRID | {"layers": budget.layers, "width": budget.widths}
  draws = draw_settings(grid, budget.settings, rng)
  levels = jnp.asarray(levels, jnp.float32)

  def to_settings(draw: dict) -> Settings:
    values = {name: jnp.asarray(draw[name]) for name in Settings._fields if name != "margins"}
    return Settings(margins=losses.constant_margins(draw["delta"], len(levels)), **values)

  def run(keys, masks, settings, rounds, patience, *, layers, width):
    return networks.train(
      keys,
      tuple(train),
      masks,
      tuple(validation),
      levels,
      settings,
      rounds,
      patience,
      kind=kind,
      layers=layers,
      width=width,
      batch_size=batch_size(len(train.y)),
      max_rounds=budget.max_rounds,
    )

  search_key, fold_key = jax.random.split(jax.random.key(rng.integers(2**31)))
  draw, settings, whole = search(run, search_key, len(train.y), draws, to_settings, budget)
  parts = refit_without_folds(run, fold_key, folds, settings, whole, draw, budget)
  params = jax.tree.map(
    lambda fold, full: jnp.concatenate([fold, full[None]]), parts.params, whole.best_params
  )
  return lambda x: np.asarray(networks.predict(params, x, levels, kind=kind))


def _fit_sklearn(kind, train, validation, levels, folds, budget, rng):
  seed = int(rng.integers(2**31))
  draws = draw_settings(trees.GRIDS[kind], budget.tree_settings, rng)
  draws = list({tuple(draw.values()): draw for draw in draws}.values())  # Each once.
  fits = [trees.fit(kind, *train, levels, seed, draw) for draw in draws]
  scores = [float(pinball_loss(fit(validation.x), levels, validation.y).mean()) for fit in fits]
  best = int(np.argmin(scores))
  parts = [
    trees.fit(kind, train.x[folds != k], train.y[folds != k], levels, seed, draws[best])
    for k in range(folds.max() + 1)
  ]
  models = [*parts, fits[best]]
  return lambda x: np.stack([model(x) for model in models]).astype(np.float32)


def out_of_fold(predictions: np.ndarray, folds: np.ndarray) -> np.ndarray:
  """Each training row as predicted without its fold: [K + 1, n, ...] -> [n, ...]."""
  return predictions[folds, np.arange(len(folds))]
