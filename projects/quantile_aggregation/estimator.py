"""Aggregated quantiles on NumPy arrays: fit, predict_quantiles, predict, predict_interval."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from common.cli import closest
from common.data.tabular import check_covariates
from common.errors import UserError
from common.evaluation.scoring_rules import pinball_loss
from projects.quantile_aggregation import aggregators, conformal, dqa, isotonic, library
from projects.quantile_aggregation.search import Budget

CALIBRATIONS = ("none", "cqr", "cv+")
RESOLUTIONS = ("coarse", "medium", "fine", "factored")
_VALIDATION_SHARE = _CALIBRATION_SHARE = 0.2
_FEWEST_ROWS = 30


class QuantileAggregator:
  """A library of quantile models aggregated with weights that may depend on x.

  Args:
    levels: increasing, in (0, 1).
    learners: the base models, of `library.LEARNERS`.
    resolution: of the weights: coarse (one per model), medium (one per model and level), fine (each
      level mixes all levels of all models), factored.
    local: weights depend on x.
    isotoniser: how crossed quantiles are mended: sort, pava, median_outwards, soft_sort or none.
    calibration: "none"; "cqr" sets a fifth of the rows apart and shifts every level by its
      conformal correction; "cv+" uses the folds instead.
    folds: of the out-of-fold predictions.
    budget: of the random searches.
    seed: of splits, draws and initial values.

  After `fit`:
    levels_: [m].   validation_loss_: mean pinball loss of the chosen setting, in deviations of y.
    base_losses_: {learner: its mean pinball loss on the validation rows}, in the same unit.
    form_: the aggregator, with the architecture that was chosen.

  A fifth of the rows that are not set apart chooses settings and the number of steps.
  """

  def __init__(
    self,
    levels: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95),
    *,
    learners: Sequence[str] = ("CGN", "MQR", "RF", "GBM"),
    resolution: aggregators.Resolution = "medium",
    local: bool = True,
    isotoniser: str = "sort",
    calibration: Literal["none", "cqr", "cv+"] = "none",
    folds: int = 5,
    budget: Budget = Budget(  # noqa: B008 (immutable)
      settings=5, tree_settings=3, layers=(2,), widths=(64,), max_rounds=60, global_rounds=300
    ),
    seed: int = 0,
  ):
    self.levels_ = check_levels(levels)
    for name, value, known in (
      ("resolution", resolution, RESOLUTIONS),
      ("isotoniser", isotoniser, isotonic.ISOTONISERS),
      ("calibration", calibration, CALIBRATIONS),
      *(("learners", learner, library.LEARNERS) for learner in learners),
    ):
      if value not in known:
        raise UserError(f"{name}: {value!r} is unknown; {closest(value, known)}")
    if not learners or len(set(learners)) != len(learners):
      raise UserError(f"learners is {list(learners)}; expected at least one, each once")
    if folds < 2:
      raise UserError(f"folds is {folds}; expected at least 2")
    self.learners, self.calibration = tuple(learners), calibration
    self.form = aggregators.Form(resolution, local, isotoniser=isotoniser)
    self.folds, self.budget, self.seed = folds, budget, seed

  def fit(self, x: np.ndarray, y: np.ndarray) -> "QuantileAggregator":
    """Fits the library and the aggregator.

    Args:
      x: [n, d] covariates.
      y: [n] outcomes.

    Raises:
      UserError: missing or infinite values, wrong shapes, a constant column or outcome, too few
        rows, also for the conformal correction of the outer levels.
    """
    x, y = check_data(x, y)
    parts = np.random.default_rng(self.seed).permutation(len(y))
    held = round(_CALIBRATION_SHARE * len(y)) if self.calibration == "cqr" else 0
    held_out, rest = np.split(parts, [held])
    chosen_on, trained_on = np.split(rest, [round(_VALIDATION_SHARE * len(rest))])
    if self.calibration != "none":
      rows = len(held_out) if self.calibration == "cqr" else len(trained_on)
      conformal.check_rows(rows, self.levels_)
    self._x_mean, self._x_sd = x[rest].mean(axis=0), x[rest].std(axis=0)
    self._x_sd = np.where(self._x_sd > 0, self._x_sd, 1)  # Constant in these rows only.
    self._y_mean, self._y_sd = y[rest].mean(), y[rest].std()
    if not self._y_sd > 0:
      raise UserError("the outcome is constant in the rows that models are fitted to; give more")
    x = self._standardise(x)
    y = ((y - self._y_mean) / self._y_sd).astype(np.float32)
    train, validation = (library.Split(x[r], y[r]) for r in (trained_on, chosen_on))
    fold_of = library.contiguous_folds(len(train.y), self.folds)
    self._library = [
      library.fit_learner(kind, train, validation, self.levels_, fold_of, self.budget, self.seed)
      for kind in self.learners
    ]
    by_fold = self._base(train.x)
    validation_z = self._base(validation.x)[-1]
    train_rows = dqa.Rows(library.out_of_fold(by_fold, fold_of), *train)
    self._aggregator = dqa.fit(
      self.form,
      train_rows,
      dqa.Rows(validation_z, *validation),
      self.levels_,
      self.budget,
      self.seed,
      folds=fold_of if self.calibration == "cv+" else None,
    )
    self.form_ = self._aggregator.form
    self.validation_loss_ = self._aggregator.validation_loss
    losses = pinball_loss(validation_z, self.levels_, validation.y[:, None]).mean(axis=(0, 2))
    self.base_losses_ = dict(zip(self.learners, losses.tolist()))
    if self.calibration == "cqr":
      q = self._aggregator.quantiles(self._base(x[held_out])[-1], x[held_out])
      self._held_out = q, y[held_out]
    if self.calibration == "cv+":
      q = library.out_of_fold(self._aggregator.fold_quantiles(by_fold, train.x), fold_of)
      self._held_out = q, fold_of, train.y
    return self

  def predict_quantiles(self, x: np.ndarray, levels: Sequence[float] | None = None) -> np.ndarray:
    """Quantiles in the unit of y, increasing (unless isotoniser="none").

    Args:
      x: [n, d].
      levels: some of `levels_`, in order; None is all of them.

    Returns:
      float64 [n, levels].

    Raises:
      UserError: not fitted, another number of columns, missing values, or a level not fitted.
    """
    if not hasattr(self, "_aggregator"):
      raise UserError("this QuantileAggregator is not fitted; call fit first")
    columns = slice(None) if levels is None else self._columns(check_levels(levels))
    x = check_covariates(x)
    if x.shape[1] != len(self._x_mean):
      raise UserError(f"x has {x.shape[1]} columns; the model has {len(self._x_mean)}")
    x = self._standardise(x)
    z, taus = self._base(x), jnp.asarray(self.levels_, jnp.float32)
    if self.calibration == "cv+":
      new = self._aggregator.fold_quantiles(z, x)
      q = conformal.cv_plus(*self._held_out, new, taus)
    else:
      q = self._aggregator.quantiles(z[-1], x)
      if self.calibration == "cqr":
        q = conformal.cqr_levels(*self._held_out, q, taus)
    return self._y_mean + self._y_sd * np.asarray(q, np.float64)[:, columns]

  def predict(self, x: np.ndarray) -> np.ndarray:
    """The quantile of the fitted level nearest to 1/2, [n]; errors of `predict_quantiles`."""
    return self.predict_quantiles(x)[:, np.abs(self.levels_ - 0.5).argmin()]

  def predict_interval(self, x: np.ndarray, coverage: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The central interval (low [n], high [n]) of a coverage whose two levels were fitted.

    Raises:
      UserError: those of `predict_quantiles`, or a coverage outside (0, 1).
    """
    if not 0 < coverage < 1:
      raise UserError(f"coverage is {coverage}; expected a number between 0 and 1")
    tail = (1 - coverage) / 2
    low, high = self.predict_quantiles(x, (tail, 1 - tail)).T
    return low, high

  def _columns(self, levels: np.ndarray) -> np.ndarray:
    gaps = np.abs(levels[:, None] - self.levels_)
    if (gaps.min(axis=1) > 1e-9).any():
      unknown = levels[gaps.min(axis=1).argmax()]
      fitted = ", ".join(f"{level:g}" for level in self.levels_)
      raise UserError(f"level {unknown:g} was not fitted; expected some of {fitted}")
    return gaps.argmin(axis=1)

  def _standardise(self, x: np.ndarray) -> np.ndarray:
    return ((x - self._x_mean) / self._x_sd).astype(np.float32)

  def _base(self, x: np.ndarray) -> np.ndarray:
    return np.stack([learner(x) for learner in self._library], axis=2)


def check_levels(levels: Sequence[float]) -> np.ndarray:
  """Returns levels as float64 [m].

  Raises:
    UserError: none, outside (0, 1), or not increasing.
  """
  values = np.asarray(levels, np.float64)
  shown = ", ".join(f"{level:g}" for level in values.ravel())
  if values.ndim != 1 or not len(values) or not ((values > 0) & (values < 1)).all():
    raise UserError(f"the levels are [{shown}]; expected numbers between 0 and 1, such as 0.05")
  if (np.diff(values) <= 0).any():
    raise UserError(f"the levels {shown} are out of order; expected increasing ones, each once")
  return values


def check_data(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns x [n, d] and y [n] as float64.

  Raises:
    UserError: what `QuantileAggregator.fit` lists about the data.
  """
  x = check_covariates(x)
  try:
    y = np.asarray(y, np.float64)
  except (TypeError, ValueError):
    raise UserError("y must be numbers") from None
  if y.shape != (len(x),):
    raise UserError(f"y is of shape {y.shape}; expected one outcome for each of the {len(x)} rows")
  if not np.isfinite(y).all():
    raise UserError(f"y has {(~np.isfinite(y)).sum()} missing or infinite values; drop those rows")
  if len(y) < _FEWEST_ROWS:
    raise UserError(f"there are {len(y)} rows; expected at least {_FEWEST_ROWS} to fit and choose")
  constant = np.flatnonzero(x.min(axis=0) == x.max(axis=0))
  if len(constant):
    raise UserError(f"column {constant[0]} of x is constant: it explains nothing; drop it")
  if y.min() == y.max():
    raise UserError(f"the outcome is constant ({y[0]:g}): there is nothing to predict")
  return x, y
