"""Random search on the validation part, and refits without each fold: for networks and aggregators."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from projects.quantile_aggregation import training
from projects.quantile_aggregation.aggregators import Settings


class Budget(NamedTuple):
  """How much is searched and trained.

  Attributes:
    settings: of the random search of a network or aggregator.
    tree_settings: of the random search of a learner of scikit-learn.
    layers, widths: of networks, to choose from.
    max_rounds, patience: rounds of 100 steps; patience in rounds without improvement.
    global_rounds: `max_rounds` of global aggregators, whose few parameters begin at 0.
  """

  settings: int = 20
  tree_settings: int = 20
  layers: tuple[int, ...] = (2, 3)
  widths: tuple[int, ...] = (64, 128)
  max_rounds: int = 200
  global_rounds: int = 500
  patience: int = 5


class Shape(NamedTuple):
  """Rows and columns of x that smaller tables are padded to: all are trained by one program."""

  train: int
  validation: int
  columns: int


def padded(rows: Any, count: int, columns: int) -> Any:
  """A named tuple of arrays x [n, d], y [n] and perhaps z [n, ...] with `count` rows.

  What is added is 0, and NaN in y: training leaves such rows out by its mask, validation by that.
  """
  more = count - len(rows.y)
  filled = {
    name: np.pad(a, [(0, more), *[(0, 0)] * (a.ndim - 1)]) for name, a in rows._asdict().items()
  }
  filled["x"] = np.pad(filled["x"], [(0, 0), (0, columns - rows.x.shape[1])])
  filled["y"] = np.pad(rows.y, (0, more), constant_values=np.nan)
  return type(rows)(**filled)


def draw_settings(grid: dict[str, tuple], count: int, rng: np.random.Generator) -> list[dict]:
  """A random search: `count` independent draws."""
  return [{name: rng.choice(values).item() for name, values in grid.items()} for _ in range(count)]


def search(
  train: Callable[..., training.Trained],
  key: jax.Array,
  mask: jax.Array,
  draws: Sequence[dict],
  to_settings: Callable[[dict], Settings],
  budget: Budget,
) -> tuple[dict, Settings, training.Trained]:
  """Trains every draw, those of one architecture side by side, and returns the best.

  Args:
    train: (keys, masks, settings, rounds, patience, layers, width) -> Trained of leading axis B.
    key: of initial values and batches.
    mask: [n] bool, the rows to train on.
    draws: settings, with `layers` and `width`.
    to_settings: makes a draw arrays.
    budget: see `Budget`.

  Returns:
    The draw, its settings and its training, without the leading axis.
  """
  groups: dict[tuple[int, int], list[dict]] = {}
  for draw in draws:
    groups.setdefault((draw["layers"], draw["width"]), []).append(draw)
  best = None
  for index, ((layers, width), members) in enumerate(groups.items()):
    settings = stack([to_settings(draw) for draw in members])
    trained = train(
      jax.random.split(jax.random.fold_in(key, index), len(members)),
      jnp.tile(mask, (len(members), 1)),
      settings,
      jnp.full(len(members), budget.max_rounds),
      jnp.asarray(budget.patience),
      layers=layers,
      width=width,
    )
    first = int(jnp.argmin(trained.best_loss))
    take = lambda leaf, first=first: leaf[first]
    found = members[first], jax.tree.map(take, settings), jax.tree.map(take, trained)
    if best is None or found[2].best_loss < best[2].best_loss:
      best = found
  return best


def stack(trees_: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees_)


def fold_masks(folds: np.ndarray) -> jax.Array:
  """[K, n] bool: the rows that are not in fold k; those of fold -1 are in none."""
  return jnp.asarray((folds >= 0) & (folds != np.arange(folds.max() + 1)[:, None]))


def refit_without_folds(run, key, folds, settings, whole, draw, budget) -> training.Trained:
  """Trains the chosen setting for the chosen number of rounds without each fold, side by side."""
  k = int(folds.max()) + 1
  return run(
    jax.random.split(key, k),
    fold_masks(folds),
    stack([settings] * k),
    jnp.full(k, whole.best_rounds),
    jnp.asarray(budget.max_rounds),  # No early stopping: it would look at the validation rows.
    layers=draw["layers"],
    width=draw["width"],
  )
