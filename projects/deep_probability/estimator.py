"""CaPE on NumPy arrays: fit, predict, predict_proba."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from common.data.tabular import check_covariates
from common.errors import UserError
from projects.deep_probability import cape
from projects.deep_probability.networks import Network
from projects.deep_probability.training import Draw, Recipe, Settings, predict, starts, train

TARGETS = {"bin": cape.BIN, "kde": cape.KDE}


class CapeClassifier:
  """Calibrated probabilities of a binary event from a small network, fine-tuned with CaPE.

  Args:
    targets: "bin" or "kde", the empirical probabilities of the calibration epochs.
    num_bins: B of "bin".
    sigma, window: of "kde", the kernel's width in units of probability, and w.
    ordinary_epochs: c, the epochs on outcomes between two calibration epochs.
    hidden: widths of the network's hidden layers; () is logistic regression.
    epochs, learning_rate: of the first stage, cross-entropy with early stopping.
    fine_tune_epochs, fine_tune_rate: of CaPE.
    batch_size: at most.
    validation_share: of the rows; they choose the epoch of both stages, and are not learnt from.
    seed: of the split, the weights and the shuffles.

  After `fit`:
    classes_: [2], the labels; the second is the event.
    validation_loss_: cross-entropy of the validation rows after every epoch, {"early stop": [1 +
      epochs], "CaPE": [1 + fine_tune_epochs]}; entry 0 is the start.
    best_epoch_: {"early stop": int, "CaPE": int}. 0 of CaPE means that no epoch of it was better on
      validation: the early-stopped network is kept.
    training_rows_, validation_rows_: rows of x.
  """

  def __init__(
    self,
    *,
    targets: str = "bin",
    num_bins: int = 10,
    sigma: float = 0.05,
    window: int = 100,
    ordinary_epochs: int = 2,
    hidden: tuple[int, ...] = (64, 64),
    epochs: int = 100,
    learning_rate: float = 0.05,
    fine_tune_epochs: int = 100,
    fine_tune_rate: float = 0.005,
    batch_size: int = 256,
    validation_share: float = 0.25,
    seed: int = 0,
  ):
    if targets not in TARGETS:
      raise UserError(f"targets is {targets!r}; expected {' or '.join(TARGETS)}")
    numbers = {
      "num_bins": num_bins,
      "window": window,
      "epochs": epochs,
      "fine_tune_epochs": fine_tune_epochs,
      "batch_size": batch_size,
      **{f"hidden[{i}]": width for i, width in enumerate(hidden)},
    }
    for name, value in numbers.items():
      if value < 1:
        raise UserError(f"{name} is {value}; expected at least 1")
    for name, value in {
      "sigma": sigma,
      "learning_rate": learning_rate,
      "fine_tune_rate": fine_tune_rate,
    }.items():
      if not 0 < value < np.inf:
        raise UserError(f"{name} is {value}; expected a positive number")
    if ordinary_epochs < 0:
      raise UserError(f"ordinary_epochs is {ordinary_epochs}; expected at least 0")
    if not 0 < validation_share < 1:
      raise UserError(f"validation_share is {validation_share}; expected a share between 0 and 1")
    self.hidden, self.seed, self.validation_share = tuple(hidden), seed, validation_share
    self.epochs, self.fine_tune_epochs = epochs, fine_tune_epochs
    self.settings = Settings(epochs, batch_size, window)
    self.first = Recipe(float(learning_rate))
    self.second = Recipe(
      float(fine_tune_rate), TARGETS[targets], num_bins, float(sigma), ordinary_epochs
    )

  def fit(self, x: np.ndarray, y: np.ndarray) -> "CapeClassifier":
    """Fits the network.

    Args:
      x: [n, d] numbers.
      y: [n], two different labels; the larger one is the event.

    Raises:
      UserError: missing or infinite values, wrong shapes, a constant column, an outcome that does
        not have two classes, a class with fewer than two rows, more bins than training rows, or
        training that diverged.
    """
    x, codes, self.classes_ = check_data(x, y)
    self._mean, self._scale = x.mean(axis=0), x.std(axis=0)
    self.training_rows_, self.validation_rows_ = stratified_split(
      codes, self.validation_share, np.random.default_rng(self.seed)
    )
    if self.second.targets == cape.BIN and self.second.num_bins > len(self.training_rows_):
      raise UserError(
        f"num_bins is {self.second.num_bins}, but there are {len(self.training_rows_)} training "
        "rows; take fewer bins"
      )
    draw = Draw(
      codes.astype(np.float32)[None],
      np.zeros((1, len(codes)), np.float32),  # Unknown, and not read.
      self.training_rows_[None],
      self.validation_rows_[None],
      np.zeros((1, 0), np.int32),
    )
    self._network = Network("mlp", x.shape[1], self.hidden)
    z = jnp.asarray(self._standardise(x))
    keys = jax.random.split(jax.random.key(self.seed), (3, 1))
    start = starts(self._network, keys[0])
    early = train(
      start, keys[1], z, draw, self.first, network=self._network, settings=self.settings
    )
    if int(early.best_epoch[0]) == 0 and not np.isfinite(early.validation_loss[0, -1]):
      raise UserError(
        f"training diverged at a learning rate of {self.first.learning_rate:g}; take a smaller one"
      )
    fine_tuning = self.settings._replace(epochs=self.fine_tune_epochs)
    tuned = train(
      early.best, keys[2], z, draw, self.second, network=self._network, settings=fine_tuning
    )
    stages = {"early stop": early, "CaPE": tuned}
    self._weights = {
      name: jax.tree.map(lambda leaf: leaf[0], stage.best) for name, stage in stages.items()
    }
    self.validation_loss_ = {
      name: np.asarray(stage.validation_loss[0]) for name, stage in stages.items()
    }
    self.best_epoch_ = {name: int(stage.best_epoch[0]) for name, stage in stages.items()}
    return self

  def predict_proba(self, x: np.ndarray, *, stage: str = "CaPE") -> np.ndarray:
    """Probabilities of the two classes, float64 [n, 2].

    Args:
      x: [n, d].
      stage: "CaPE", or "early stop" for the network that it started from.

    Raises:
      UserError: missing or infinite values, another number of columns, no such stage, or not
        fitted.
    """
    if not hasattr(self, "_weights"):
      raise UserError("this CapeClassifier is not fitted; call fit first")
    if stage not in self._weights:
      raise UserError(f"stage is {stage!r}; expected {' or '.join(map(repr, self._weights))}")
    x = check_covariates(x)
    if x.shape[1] != len(self._mean):
      raise UserError(f"x has {x.shape[1]} columns; the classifier has {len(self._mean)}")
    z = predict(self._network, self._weights[stage], jnp.asarray(self._standardise(x)))
    p = expit(np.asarray(z, np.float64))
    return np.stack([1 - p, p], axis=1)

  def predict(self, x: np.ndarray) -> np.ndarray:
    """The more probable labels, [n]; see `predict_proba`."""
    best = self.predict_proba(x).argmax(axis=1)
    return self.classes_[best]

  def _standardise(self, x: np.ndarray) -> np.ndarray:
    return ((x - self._mean) / self._scale).astype(np.float32)


def stratified_split(
  codes: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Rows kept and rows held out, int32; of either class `share` is held out, at least one row.

  codes: 0 or 1, [n], at least two of each.
  """
  held_out = np.zeros(len(codes), bool)
  for code in (0, 1):
    rows = rng.permutation(np.flatnonzero(codes == code))
    held_out[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
  return np.flatnonzero(~held_out).astype(np.int32), np.flatnonzero(held_out).astype(np.int32)


def check_data(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns x float64 [n, d], codes 0 or 1 [n] and the two labels.

  Raises:
    UserError: what `CapeClassifier.fit` lists about the data.
  """
  x, y = check_covariates(x), np.asarray(y)
  if y.shape != (len(x),):
    raise UserError(f"y is of shape {y.shape}; expected one label for each of the {len(x)} rows")
  if y.dtype.kind == "f" and not np.isfinite(y).all():
    raise UserError(f"y has {(~np.isfinite(y)).sum()} missing or infinite labels; drop those rows")
  if y.dtype == object and any(label is None for label in y):
    raise UserError("y has missing labels (None); drop those rows")
  labels, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
  if len(labels) != 2:
    shown = ", ".join(map(str, labels[:4])) + (", ..." if len(labels) > 4 else "")
    raise UserError(f"the outcome has {len(labels)} classes ({shown}); expected exactly 2")
  if counts.min() < 2:
    raise UserError(
      f"class {labels[counts.argmin()]} has 1 row; expected at least 2, one of them for validation"
    )
  constant = np.flatnonzero(x.min(axis=0) == x.max(axis=0))
  if len(constant):
    raise UserError(f"column {constant[0]} of x is constant: it explains nothing; drop it")
  return x, codes, labels
