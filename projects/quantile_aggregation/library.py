"""The library of base models: random search, out-of-fold predictions, refits (section 5.1).

Every learner is searched on the validation part, and its best setting is fitted to the whole
training part and to each of K training parts with one fold left out. What it predicts is
[K + 1, n, m]: the models without fold 0 ... K - 1, then that of the whole training part. Validation
rows choose settings and the number of steps, and are in no training set.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.evaluation.scoring_rules import pinball_loss
from projects.quantile_aggregation import losses, networks, trees
from projects.quantile_aggregation.aggregators import Settings, batch_size
from projects.quantile_aggregation.data import Parts
from projects.quantile_aggregation.search import (
  Budget,
  Shape,
  draw_settings,
  padded,
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


def common_shape(parts: Parts, others: Iterable[Parts]) -> Shape:
  """The largest shape of the splits whose training steps have as many rows as those of `parts`.

  Only those can share its programs.
  """
  size = lambda parts: batch_size(len(parts.train.y))
  shapes = [
    (*parts_.train.x.shape, len(parts_.validation.y))
    for parts_ in others
    if size(parts_) == size(parts)
  ]
  train, columns, validation = np.max(shapes, axis=0).tolist()
  return Shape(train, validation, columns)


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
  shape: Shape | None = None,
) -> Callable[[np.ndarray], np.ndarray]:
  """Searches and fits one learner; returns x [n, d] -> quantiles float32 [K + 1, n, m].

  Networks are trained on rows padded to `shape`.
  """
  rng = np.random.default_rng([seed, LEARNERS.index(kind)])
  if kind in TREES:
    return _fit_sklearn(kind, train, validation, levels, folds, budget, rng)
  grid = NETWORK_GRID | {"layers": budget.layers, "width": budget.widths}
  draws = draw_settings(grid, budget.settings, rng)
  levels = jnp.asarray(levels, jnp.float32)
  shape = shape or Shape(len(train.y), len(validation.y), train.x.shape[1])
  size = batch_size(len(train.y))
  folds = np.pad(folds, (0, shape.train - len(folds)), constant_values=-1)
  train = padded(train, shape.train, shape.columns)
  validation = padded(validation, shape.validation, shape.columns)

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
      batch_size=size,
      max_rounds=budget.max_rounds,
    )

  search_key, fold_key = jax.random.split(jax.random.key(rng.integers(2**31)))
  draw, settings, whole = search(
    run, search_key, jnp.asarray(folds >= 0), draws, to_settings, budget
  )
  parts = refit_without_folds(run, fold_key, folds, settings, whole, draw, budget)
  params = jax.tree.map(
    lambda fold, full: jnp.concatenate([fold, full[None]]), parts.params, whole.best_params
  )

  def predict(x: np.ndarray) -> np.ndarray:
    x = np.pad(x, [(0, 0), (0, shape.columns - x.shape[1])])
    return np.asarray(networks.predict(params, x, levels, kind=kind))

  return predict


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
