"""PRESTO on NumPy arrays: fit, predict, predict_proba, coefficients."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from common.data.tabular import check_covariates
from common.errors import UserError
from projects.presto import likelihood, presto


class Presto:
  """PRESTO with its penalty chosen by cross-validation, or given.

  Args:
    lambdas: the penalties to choose from, decreasing; one number fits at that penalty; None takes
      `num_lambdas` values log-spaced from the smallest that makes all slopes 0 down to
      `smallest_ratio` of it.
    num_lambdas, smallest_ratio: see `lambdas`.
    l1_ratio: a in [0, 1]; 1 is PRESTO, 0 its ridge variant.
    folds: of the cross-validation by Brier score.
    seed: of the folds.
    tolerance: of the KKT residual of the standardised problem.
    max_iterations: proximal Newton iterations at each penalty.

  After `fit`:
    classes_: [K], the labels in their order.
    intercept_: [K-1], alpha.   coef_: [K-1, p], beta.   P(y <= k | x) = sigmoid(alpha_k + x'beta_k)
    lambda_: the penalty.   lambdas_: [L], those it was chosen from.
    cv_scores_: [folds, L] Brier scores, or None.
    kkt_residual_: the certificate of the fit, at most `tolerance`.

  Computes in float64 whatever JAX's default is: the certificate is out of float32's reach.
  """

  def __init__(
    self,
    lambdas: float | Sequence[float] | None = None,
    *,
    num_lambdas: int = 100,
    smallest_ratio: float = 1e-4,
    l1_ratio: float = 1.0,
    folds: int = 5,
    seed: int = 0,
    tolerance: float = 1e-8,
    max_iterations: int = 100,
  ):
    if not 0 <= l1_ratio <= 1:
      raise UserError(f"l1_ratio is {l1_ratio}; expected a number from 0 (ridge) to 1 (PRESTO)")
    if not (num_lambdas >= 1 and 0 < smallest_ratio < 1 and folds >= 2):
      raise UserError(
        f"num_lambdas={num_lambdas}, smallest_ratio={smallest_ratio}, folds={folds}; expected at "
        "least 1 penalty, a ratio between 0 and 1, and at least 2 folds"
      )
    self.lambdas = None if lambdas is None else _check_lambdas(lambdas)
    self.num_lambdas, self.smallest_ratio, self.l1_ratio = num_lambdas, smallest_ratio, l1_ratio
    self.folds, self.seed = folds, seed
    self.tolerance, self.max_iterations = tolerance, max_iterations

  def fit(self, x: np.ndarray, y: np.ndarray, classes: Sequence | None = None) -> "Presto":
    """Fits the model.

    Args:
      x: [n, p] covariates.
      y: [n] labels.
      classes: all labels in their order, the rare one last; by default the sorted labels.

    Raises:
      UserError: missing or infinite values, wrong shapes, a constant column, fewer than three
        classes, a class without observations (also in a training part of the cross-validation), or
        a fit that did not converge.
    """
    x, codes, self.classes_ = check_data(x, y, classes)
    num_classes = len(self.classes_)
    settings = dict(
      num_classes=num_classes,
      l1_ratio=self.l1_ratio,
      tolerance=self.tolerance,
      max_iterations=self.max_iterations,
    )
    with jax.enable_x64(True):
      x, codes, weights = jnp.asarray(x), jnp.asarray(codes), jnp.ones(len(x))
      if self.lambdas is None:
        largest = presto.largest_lambda(
          x, codes, weights, num_classes=num_classes, l1_ratio=self.l1_ratio
        )
        lambdas = presto.lambda_path(largest, self.num_lambdas, self.smallest_ratio)
      else:
        lambdas = jnp.asarray(self.lambdas)
      chosen, self.cv_scores_ = 0, None
      if len(lambdas) == 1:
        path = presto.fit_path(x, codes, weights, lambdas, **settings)
      else:
        folds = jnp.asarray(self._folds(np.asarray(codes)))
        validation = presto.cross_validate(
          x, codes, folds, lambdas, num_folds=self.folds, **settings
        )
        self._check_converged(validation, lambdas, " in cross-validation")
        path, chosen = validation.path, int(validation.best)
        self.cv_scores_ = np.asarray(validation.scores)
      self._check_converged(path, lambdas)
      self.lambdas_, self.lambda_ = np.asarray(lambdas), float(lambdas[chosen])
      self.intercept_ = np.asarray(path.intercepts[chosen])
      self.coef_ = np.asarray(path.slopes[chosen])
      self.kkt_residual_ = float(path.kkt_residual[chosen])
    return self

  def predict_proba(self, x: np.ndarray) -> np.ndarray:
    """[n, K], summing to 1. The last class's probability is in [0, 1]; at an x far from the sample
    the boundaries may cross, and the class between them then has a negative one.

    Raises:
      UserError: missing or infinite values, another number of columns, or not fitted.
    """
    if not hasattr(self, "coef_"):
      raise UserError("this Presto is not fitted; call fit first")
    x = check_covariates(x)
    if x.shape[1] != self.coef_.shape[1]:
      raise UserError(f"x has {x.shape[1]} columns; the model has {self.coef_.shape[1]}")
    with jax.enable_x64(True):
      eta = presto.linear_predictors(x, jnp.asarray(self.intercept_), jnp.asarray(self.coef_))
      return np.asarray(likelihood.class_probabilities(eta))

  def predict(self, x: np.ndarray) -> np.ndarray:
    """The most probable labels [n]; see `predict_proba`."""
    best = self.predict_proba(x).argmax(axis=1)
    return self.classes_[best]

  def _folds(self, codes: np.ndarray) -> np.ndarray:
    try:
      return presto.random_folds(codes, self.folds, np.random.default_rng(self.seed))
    except ValueError as e:
      rarest = np.bincount(codes).min()
      raise UserError(
        f"cross-validation is not possible: {e}; the rarest class has {rarest} observations; "
        "merge classes, or give one penalty instead of a path"
      ) from None

  def _check_converged(self, fit, lambdas, where: str = "") -> None:
    converged = np.asarray(fit.converged)
    if converged.all():
      return
    first = (~converged.reshape(-1, len(lambdas))).any(axis=0).argmax()
    residual = float(np.max(np.asarray(fit.kkt_residual)[~converged]))
    raise UserError(
      f"{int((~converged).sum())} of {converged.size} fits did not converge{where}, the first at "
      f"penalty {float(lambdas[first]):.3g}: KKT residual up to {residual:.2g} after "
      f"{self.max_iterations} iterations, expected at most {self.tolerance:g} and a bounded "
      "solution; use larger penalties (classes may be separable) or raise max_iterations"
    )


def check_data(
  x: np.ndarray, y: np.ndarray, classes: Sequence | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns x float64 [n, p], codes int64 [n] and the labels [K], in their order.

  Raises:
    UserError: what `Presto.fit` lists about the data.
  """
  x, y = check_covariates(x), np.asarray(y)
  if y.shape != (len(x),):
    raise UserError(f"y is of shape {y.shape}; expected one label for each of the {len(x)} rows")
  if y.dtype.kind == "f" and not np.isfinite(y).all():
    raise UserError(f"y has {(~np.isfinite(y)).sum()} missing or infinite labels; drop those rows")
  if y.dtype == object and any(label is None for label in y):
    raise UserError("y has missing labels (None); drop those rows")
  labels = np.unique(y) if classes is None else np.asarray(classes)
  if len(labels) < 3:
    raise UserError(
      f"the outcome has {len(labels)} classes; expected at least 3 in order (with 2, PRESTO is "
      "logistic regression)"
    )
  counts = np.array([(y == label).sum() for label in labels])
  if counts.sum() != len(y):
    unknown = next(label for label in y if label not in labels)
    raise UserError(f"y has the label {unknown!r}, which is not among the classes {list(labels)}")
  if not counts.all():
    empty = labels[counts.argmin()]
    raise UserError(f"class {empty} has no observations; merge it with a neighbour")
  constant = np.flatnonzero(x.min(axis=0) == x.max(axis=0))
  if len(constant):
    raise UserError(f"column {constant[0]} of x is constant: it explains nothing; drop it")
  codes = (y[:, None] == labels[None, :]).argmax(axis=1)
  return x, codes, labels


def _check_lambdas(lambdas: float | Sequence[float]) -> np.ndarray:
  values = np.atleast_1d(np.asarray(lambdas, np.float64))
  if values.ndim != 1 or not values.size or not (np.isfinite(values) & (values >= 0)).all():
    raise UserError(f"lambdas is {lambdas}; expected finite penalties, at least 0")
  if (np.diff(values) >= 0).any():
    raise UserError(f"the penalties {list(values)} are out of order; expected decreasing ones")
  return values
