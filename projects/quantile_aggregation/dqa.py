"""An aggregator searched, trained and refitted without each fold: the whole of the method."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from projects.quantile_aggregation import aggregators, losses, training
from projects.quantile_aggregation.aggregators import Form, Settings, batch_size
from projects.quantile_aggregation.search import (
  Budget,
  Shape,
  draw_settings,
  padded,
  refit_without_folds,
  search,
)

# The paper's grids. `delta` is the constant margin, or the scale of the adaptive ones.
_GRID = {
  "weight_decay": (1e-7,),
  "dropout": (0.0, 0.05, 0.1),
  "alpha": (0.0, 0.01),
}
GRIDS = {
  "constant": _GRID
  | {
    "learning_rate": (1e-3,),
    "margin_weight": (0.5, 1.0, 2.0, 5.0, 10.0),
    "delta": (1e-4, 1e-3, 5e-3, 7.5e-3, 9.9e-3),
  },
  "adaptive": _GRID
  | {
    "learning_rate": (1e-3, 5e-4),
    "margin_weight": (0.5, 1.0, 2.0, 5.0, 10.0),
    "delta": (0.1, 0.05, 0.01, 1e-3, 1e-4),
  },
  "none": _GRID | {"learning_rate": (1e-3,), "margin_weight": (0.0,), "delta": (0.0,)},
}


class Rows(NamedTuple):
  """Standardised float32 rows with the base models' predictions: z [n, p, m], x [n, d], y [n]."""

  z: np.ndarray
  x: np.ndarray
  y: np.ndarray


class Aggregator(NamedTuple):
  """A trained aggregator.

  Attributes:
    form: what it is; `layers` and `width` as the search chose them.
    params: fitted to the whole training part.
    fold_params: leading axis K, each fitted without one fold; None if not asked for.
    rounds: how many rounds of 100 steps it was trained.
    validation_loss: its mean pinball loss on the validation part.
  """

  form: Form
  params: object
  fold_params: object
  rounds: int
  validation_loss: float

  def quantiles(self, z: np.ndarray, x: np.ndarray, *, isotonise: bool = True) -> np.ndarray:
    """z [n, p, m], x [n, d] -> [n, m]."""
    return _predict(self.params, z, x, self.form, isotonise)

  def fold_quantiles(self, z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Predictions of the aggregators without a fold, each from the base models without it.

    z [K + 1, n, p, m] as the library predicts, x [n, d] -> [K, n, m].
    """
    take = lambda k: jax.tree.map(lambda leaf: leaf[k], self.fold_params)
    return np.stack([_predict(take(k), z[k], x, self.form) for k in range(len(z) - 1)])


def _predict(params, z, x, form: Form, isotonise: bool = True) -> np.ndarray:
  """`aggregators.predict` with whole batches of rows and as many columns as were trained on."""
  n, columns = len(x), params[0][0].shape[0] if form.local else 0
  more = -n % aggregators.BATCH
  z = np.pad(z, [(0, more), (0, 0), (0, 0)])
  x = np.pad(x[:, :columns], [(0, more), (0, max(columns - x.shape[1], 0))])
  q = aggregators.predict(params, z, x, form=form, isotonise=isotonise)
  return np.asarray(q)[:n]


def fit(
  form: Form,
  train: Rows,
  validation: Rows,
  levels: np.ndarray,
  budget: Budget,
  seed: int,
  *,
  margins: str = "constant",
  folds: np.ndarray | None = None,
  shape: Shape | None = None,
) -> Aggregator:
  """Random search on the validation part, then, for CV+, refits without each fold.

  Args:
    form: which aggregator.
    train: with out-of-fold base predictions.
    validation: with predictions of the base models of the whole training part.
    levels: [m].
    budget: of the search.
    seed: of draws, initial values and batches.
    margins: a name of `GRIDS`.
    folds: [n], the fold of each training row; None for no refits.
    shape: what rows are padded to.
  """
  rng = np.random.default_rng([seed, 1])
  architecture = {"layers": budget.layers, "width": budget.widths}
  if not form.local:  # There is no network: one architecture, and dropout has no effect.
    architecture = {"layers": (form.layers,), "width": (form.width,)}
    budget = budget._replace(max_rounds=budget.global_rounds)
  draws = draw_settings(GRIDS[margins] | architecture, budget.settings, rng)
  levels = jnp.asarray(levels, jnp.float32)
  residuals = train.y - np.median(train.z[:, :, np.abs(levels - 0.5).argmin()], axis=1)
  n, size = len(train.y), batch_size(len(train.y))
  shape = shape or Shape(n, len(validation.y), train.x.shape[1])
  if not form.local:  # Its weights do not see x: tables of another width need no other program.
    shape = shape._replace(columns=0)
    train, validation = (rows._replace(x=rows.x[:, :0]) for rows in (train, validation))
  train = padded(train, shape.train, shape.columns)
  validation = padded(validation, shape.validation, shape.columns)

  def to_settings(draw: dict) -> Settings:
    values = {name: jnp.asarray(draw[name]) for name in Settings._fields if name != "margins"}
    if margins == "adaptive":
      gaps = losses.adaptive_margins(draw["delta"], residuals, levels)
    else:
      gaps = losses.constant_margins(draw["delta"], len(levels))
    return Settings(margins=gaps, **values)

  def run(keys, masks, settings, rounds, patience, *, layers, width) -> training.Trained:
    return aggregators.train(
      keys,
      tuple(train),
      masks,
      tuple(validation),
      levels,
      settings,
      rounds,
      patience,
      form=form._replace(layers=layers, width=width),
      batch_size=size,
      max_rounds=budget.max_rounds,
    )

  search_key, fold_key = jax.random.split(jax.random.key(rng.integers(2**31)))
  draw, settings, whole = search(
    run, search_key, jnp.arange(shape.train) < n, draws, to_settings, budget
  )
  fold_params = None
  if folds is not None:
    folds = np.pad(folds, (0, shape.train - n), constant_values=-1)
    parts = refit_without_folds(run, fold_key, folds, settings, whole, draw, budget)
    fold_params = parts.params
  return Aggregator(
    form._replace(layers=draw["layers"], width=draw["width"]),
    whole.best_params,
    fold_params,
    int(whole.best_rounds),
    float(whole.best_loss),
  )
