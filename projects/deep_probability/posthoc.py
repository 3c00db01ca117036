"""Calibrators fitted after training, on the validation part.

Each takes log odds z [n] and outcomes y [n] of the validation part, and returns a function from log
odds to probabilities, both float64 arrays of any shape.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression

Calibrator = Callable[[np.ndarray], np.ndarray]

NUM_BINS = 15


def nll(z: np.ndarray, y: np.ndarray) -> float:
  """Mean negative log-likelihood of outcomes y under sigmoid(z), nats."""
  return -float(np.mean(np.where(y == 1, log_expit(z), log_expit(-z))))


def fit_temperature(z: np.ndarray, y: np.ndarray) -> float:
  """T that minimises the NLL of sigmoid(z / T), in [0.01, 1000]. Guo et al. (2017).

  The NLL is convex in 1 / T, so a bounded search finds the minimum.
  """
  found = optimize.minimize_scalar(
    lambda beta: nll(beta * z, y), bounds=(1e-3, 100), method="bounded", options={"xatol": 1e-8}
  )
  return 1 / float(found.x)


def temperature(z: np.ndarray, y: np.ndarray) -> Calibrator:
  """Temperature scaling."""
  t = fit_temperature(z, y)
  return lambda new: expit(new / t)


def platt(z: np.ndarray, y: np.ndarray) -> Calibrator:
  """Platt scaling: logistic regression of y on the log odds, without a penalty."""
  model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(z[:, None], y)
  slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
  return lambda new: expit(slope * new + intercept)


def histogram_binning(z: np.ndarray, y: np.ndarray) -> Calibrator:
  """The share of y = 1 in each of 15 bins of equal width, (b / 15, (b + 1) / 15], 0 in the first.

  A bin without validation points keeps its centre. Zadrozny and Elkan (2001).
  """
  bin_of = lambda p: np.clip(np.ceil(p * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
  bins = bin_of(expit(z))
  count = np.bincount(bins, minlength=NUM_BINS)
  total = np.bincount(bins, weights=y, minlength=NUM_BINS)
  centre = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
  share = np.where(count > 0, total / np.maximum(count, 1), centre)
  return lambda new: share[bin_of(expit(new))]


@jax.jit
def _fit_dirichlet(log_p: jax.Array, y: jax.Array, penalty: float) -> tuple[jax.Array, jax.Array]:
  def loss(weights):
    matrix, bias = weights
    logits = log_p @ matrix + bias
    off_diagonal = matrix * (1 - jnp.eye(2))
    fit = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return fit + penalty * jnp.sum(off_diagonal**2)

  adam = optax.scale_by_adam()

  def step(carry, rate):
    weights, state = carry
    updates, state = adam.update(jax.grad(loss)(weights), state)
    return (jax.tree.map(lambda w, u: w - rate * u, weights, updates), state), None

  weights = (jnp.eye(2), jnp.zeros(2))
  rates = jnp.concatenate([jnp.full(2000, 1e-3), jnp.full(1000, 1e-4)])
  return jax.lax.scan(step, (weights, adam.init(weights)), rates)[0][0]


def dirichlet(z: np.ndarray, y: np.ndarray, *, penalty: float = 1e-2) -> Calibrator:
  """Dirichlet calibration: softmax(log(1 - p, p) W + b), an L2 penalty on the off-diagonal of W.

  Adam from the identity, 2000 steps at 1e-3 and 1000 at 1e-4. Kull et al. (2019).
  """
  log_p = lambda z: np.stack([log_expit(-z), log_expit(z)], axis=-1)
  with jax.enable_x64(True):
    matrix, bias = map(np.asarray, _fit_dirichlet(log_p(z), np.asarray(y, np.int32), penalty))
  return lambda new: expit((log_p(new) @ matrix + bias) @ np.array([-1.0, 1.0]))


def ensemble_temperature(z: np.ndarray, y: np.ndarray) -> Calibrator:
  """Mix-n-match (ETS): w_1 sigmoid(z / T) + w_2 sigmoid(z) + w_3 / 2, fitted by squared error.

  T in [0.05, 5] first, then w on the simplex by SLSQP. Zhang et al. (2020).
  """
  # Weights of (0, 1, 0) leave the forecasts alone; a search over 1 / T is well scaled.
  error = lambda p: float(np.mean((p - y) ** 2))
  # The squared error has several minima in T: the best of a grid starts the search.
  grid = np.geomspace(0.05, 5, 41)
  best = int(np.argmin([error(expit(z / t)) for t in grid]))
  t = optimize.minimize_scalar(
    lambda t: error(expit(z / t)),
    bounds=(grid[max(best - 1, 0)], grid[min(best + 1, 40)]),
    method="bounded",
    options={"xatol": 1e-6},
  ).x
  parts = lambda z: np.stack([expit(z / t), expit(z), np.full_like(z, 0.5)])
  fitted = parts(z)
  weights = optimize.minimize(
    lambda w: error(w @ fitted),
    jac=lambda w: 2 * fitted @ (w @ fitted - y) / len(y),
    x0=(1.0, 0.0, 0.0),
    bounds=[(0, 1)] * 3,
    constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
    method="SLSQP",
    options={"ftol": 1e-12},
  ).x
  weights = np.clip(weights, 0, None) / np.clip(weights, 0, None).sum()
  return lambda new: np.tensordot(weights, parts(np.asarray(new, np.float64)), 1)


CALIBRATORS: dict[str, Callable[[np.ndarray, np.ndarray], Calibrator]] = {
  "temperature": temperature,
  "Platt": platt,
  "histogram binning": histogram_binning,
  "Dirichlet": dirichlet,
  "mix-n-match": ensemble_temperature,
}
