"""The paper's tables: four or more of the UCI sets, scikit-learn's diabetes, and a synthetic one."""

from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from common.data.tabular import SKLEARN_SETS, read_table
from common.errors import UserError
from common.paths import data_dir

UCI_SETS = ("yacht", "energy", "concrete", "wine_quality_red", "kin8nm", "power")


class Part(NamedTuple):
  """Rows as float32: x [n, d], y [n]."""

  x: np.ndarray
  y: np.ndarray


class Parts(NamedTuple):
  """A shuffled split, standardised by the mean and deviation of training and validation rows."""

  train: Part
  validation: Part
  test: Part


def load(name: str, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """x [n, d] and y [n], float64; of a UCI set the last column is the outcome.

  Args:
    name: one of `UCI_SETS`, or a regression set of scikit-learn.
    rows: keep that many random rows (always the same ones).

  Raises:
    UserError: the data set is not there.
  """
  if name in SKLEARN_SETS:
    table = read_table(f"sklearn:{name}")
    y = table.pop("target")
    x = np.stack(list(table.values()), axis=1)
  else:
    folder = data_dir("uci_regression")
    path = next(
      (p for p in (folder / f"{name}.txt", folder / f"{name}.txt.gz") if p.exists()), None
    )
    if path is None:
      raise UserError(
        f"{folder} has no {name}.txt or {name}.txt.gz: whitespace-separated numbers, the outcome "
        "last; put it there"
      )
    table = np.loadtxt(path)  # Decompresses by the suffix.
    x, y = table[:, :-1], table[:, -1]
  if rows is not None and rows < len(y):
    kept = np.sort(np.random.default_rng(0).choice(len(y), rows, replace=False))
    x, y = x[kept], y[kept]
  return x, y


def split(
  x: np.ndarray,
  y: np.ndarray,
  rng: np.random.Generator,
  *,
  test_share: float = 0.1,
  validation_share: float = 0.2,
) -> Parts:
  """Shuffles once; the test part is cut off first, the validation part from the rest."""
  order = rng.permutation(len(y))
  test, rest = np.split(order, [round(test_share * len(y))])
  validation, train = np.split(rest, [round(validation_share * len(rest))])
  x_mean, x_sd = x[rest].mean(axis=0), x[rest].std(axis=0)
  y_mean, y_sd = y[rest].mean(), y[rest].std()
  x = (x - x_mean) / np.where(x_sd > 0, x_sd, 1)  # A column may be constant in these rows.
  y = (y - y_mean) / y_sd
  part = lambda rows: Part(x[rows].astype(np.float32), y[rows].astype(np.float32))
  return Parts(part(train), part(validation), part(test))


def two_experts(rng: np.random.Generator, n: int, levels: np.ndarray):
  """A heteroscedastic set with two base models, A right for x < 0 and B for x > 0.

  y = x + (1/2 + |x|) noise, x uniform on [-1, 1], noise normal. Each model has the true quantiles
  on its own side; on the other its location is off by 2 and its scale doubled.

  Returns:
    z [n, 2, m], x [n, 1], y [n], all float32.
  """
  x = rng.uniform(-1, 1, n)
  scale = 0.5 + np.abs(x)
  y = x + scale * rng.normal(size=n)
  noise = norm.ppf(levels)
  right = x[:, None] + scale[:, None] * noise
  wrong = x[:, None] + 2 + 2 * scale[:, None] * noise
  left = (x < 0)[:, None]
  z = np.stack([np.where(left, right, wrong), np.where(left, wrong, right)], axis=1)
  return z.astype(np.float32), x[:, None].astype(np.float32), y.astype(np.float32)
