"""Supervised learners of g = E[D | Q, X, R = 1], the expert's label from what is always observed.

A learner is a function (key, features [l, p], target [l], train [l], new [n, p]) -> predictions [n]:
it learns from the rows where `train` is 1 and predicts the new ones. Fixed shapes and a mask let it
be mapped over folds, splits and Monte-Carlo draws. A scikit-learn regressor is as good a learner; it runs one
fold at a time. The inference does not rely on any of them being right, only its precision does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common.cli import closest
from common.errors import UserError

Learner = Callable[[Array, Array, Array, Array, Array], Array]


def ridge(key: Array, features: Array, target: Array, train: Array, new: Array) -> Array:
  """Ridge regression on the features and their pairwise products."""
  del key
  x, new = _design(features, train, new)
  centre = jnp.sum(train * target) / jnp.sum(train)
  gram = (x.T * train) @ x + jnp.eye(x.shape[1])
  return centre + new @ jnp.linalg.solve(gram, x.T @ (train * (target - centre)))


def logistic(key: Array, features: Array, target: Array, train: Array, new: Array) -> Array:
  """Logistic regression with a ridge penalty on the features and their products. target: 0 or 1."""
  del key
  x, new = (jnp.insert(x, 0, 1.0, axis=1) for x in _design(features, train, new))
  # As in `ridge`; almost none on the intercept, but some, for labels that are all alike.
  penalty = jnp.ones(x.shape[1]).at[0].set(1e-3)

  def go_on(state):
    _, change, steps = state
    return (change > 1e-6) & (steps < 30)

  def step(state):
    beta, _, steps = state
    mu = jax.nn.sigmoid(x @ beta)
    gradient = x.T @ (train * (target - mu)) - penalty * beta
    hessian = (x.T * (train * mu * (1 - mu))) @ x + jnp.diag(penalty)
    direction = jnp.linalg.solve(hessian, gradient)
    change = jnp.max(jnp.abs(x @ direction))
    # Far from the optimum a full step may overshoot into saturation.
    return beta + direction * jnp.minimum(1, 5 / change), change, steps + 1

  start = (jnp.zeros(x.shape[1]), jnp.array(jnp.inf), 0)
  beta = jax.lax.while_loop(go_on, step, start)[0]
  return jax.nn.sigmoid(new @ beta)


def mlp(key: Array, features: Array, target: Array, train: Array, new: Array) -> Array:
  """A network with one hidden layer of 16 tanh units: 200 full-batch steps of AdamW."""
  x, new = _standardise(features, train, new)
  total = jnp.sum(train)
  centre = jnp.sum(train * target) / total
  spread = jnp.sqrt(jnp.sum(train * (target - centre) ** 2) / total) + 1e-12
  goal = (target - centre) / spread
  first, last = jax.random.split(key)
  params = {
    "w1": jax.random.normal(first, (x.shape[1], 16)) / jnp.sqrt(x.shape[1]),
    "b1": jnp.zeros(16),
    "w2": jax.random.normal(last, (16,)) / 4,
    "b2": jnp.zeros(()),
  }
  optimizer = optax.adamw(0.02, weight_decay=0.02)

  def forward(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

  def loss(params):
    return jnp.sum(train * (forward(params, x) - goal) ** 2) / total

  def step(state, _):
    params, moments = state
    updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
    return (optax.apply_updates(params, updates), moments), None

  (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=200)
  return centre + spread * forward(params, new)


LEARNERS: dict[str, Learner | BaseEstimator] = {
  "ridge": ridge,
  "logistic": logistic,
  "mlp": mlp,
  "knn": make_pipeline(StandardScaler(), KNeighborsRegressor(n_neighbors=15)),
  "random_forest": RandomForestRegressor(n_estimators=100, min_samples_leaf=5, max_features=0.5),
  "gradient_boosting": GradientBoostingRegressor(n_estimators=100, subsample=0.5),
}


def find_learner(learner: str | Learner | BaseEstimator) -> Learner | BaseEstimator:
  """A learner by name, or the one given.

  Raises:
    UserError: there is no such name.
  """
  if isinstance(learner, str) and learner not in LEARNERS:
    raise UserError(f"unknown learner {learner!r}; {closest(learner, LEARNERS)}")
  return LEARNERS[learner] if isinstance(learner, str) else learner


def random_folds(key: Array, clusters: Array, num_folds: int) -> Array:
  """A fold for every unit, int [n]; a cluster's units share theirs.

  Folds hold equally many clusters, but for one. clusters: int [n], all of 0 ... their number - 1.
  """
  order = jax.random.uniform(key, (len(clusters),))
  order = jnp.where(jnp.arange(len(clusters)) <= jnp.max(clusters), order, jnp.inf)
  return (jnp.argsort(order) % num_folds)[clusters]  # Of random numbers: a random permutation.


def cross_fit(
  learner: Learner,
  key: Array,
  features: Array,
  target: Array,
  labelled: Array,
  folds: Array,
  num_folds: int,
  num_labelled: int | None = None,
) -> Array:
  """Predicts every unit by a learner that saw only the labelled units of other folds.

  Args:
    learner: a function, see the module's docstring.
    key: the learner's randomness.
    features: [n, p].
    target: [n], finite; of no account where `labelled` is 0.
    labelled: R, 0 or 1, [n].
    folds: int [n].
    num_folds: L.
    num_labelled: the sum of `labelled`; None where it is not known before the run. The learner is
      given only so many rows then, instead of all of them with a mask.

  Returns:
    D_hat [n].
  """
  rows = slice(None) if num_labelled is None else jnp.nonzero(labelled, size=num_labelled)[0]
  train = features[rows], target[rows]

  def predict(fold, key):
    return learner(key, *train, (labelled * (folds != fold))[rows], features)

  predictions = jax.vmap(predict)(jnp.arange(num_folds), jax.random.split(key, num_folds))
  return jnp.take_along_axis(predictions, folds[None], axis=0)[0]


def cross_fit_sklearn(
  learner: BaseEstimator,
  seed: int,
  features: np.ndarray,
  target: np.ndarray,
  labelled: np.ndarray,
  folds: np.ndarray,
) -> np.ndarray:
  """`cross_fit` with a scikit-learn regressor; a copy of it is fitted to each fold."""
  predictions = np.zeros(len(target))
  for fold in np.unique(folds):
    fitted = clone(learner)
    if "random_state" in fitted.get_params():
      fitted.set_params(random_state=seed + int(fold))
    train = (labelled > 0) & (folds != fold)
    fitted.fit(features[train], target[train])
    predictions[folds == fold] = fitted.predict(features[folds == fold])
  return predictions


def _standardise(features: Array, train: Array, new: Array) -> tuple[Array, Array]:
  """Both kinds of rows, with mean 0 and variance 1 in the training ones; constants become 0."""
  total = jnp.sum(train)
  centre = (train @ features) / total
  spread = jnp.sqrt((train @ (features - centre) ** 2) / total)
  spread = jnp.where(spread > 1e-12, spread, jnp.inf)
  return (features - centre) / spread, (new - centre) / spread


def _design(features: Array, train: Array, new: Array) -> tuple[Array, Array]:
  """Standardised features and their pairwise products, [., p (p + 1) / 2], standardised again.

  Products let the surrogate's error depend on a covariate. The penalty on the coefficients is 1, a
  weak one, as a strong one would bias the predictions.
  """
  i, j = np.triu_indices(features.shape[1], k=1)
  x, new = (
    jnp.concatenate([x, x[:, i] * x[:, j]], axis=1) for x in _standardise(features, train, new)
  )
  return _standardise(x, train, new)
