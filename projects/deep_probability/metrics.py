"""How good estimated probabilities are: against the true ones, and against outcomes alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from common.evaluation import calibration, scoring_rules

Array = jax.Array

NUM_BINS = 15
# Logarithms are of probabilities kept this far from 0 and 1: overfitted networks reach both.
MARGIN = 1e-7

# Need the true probabilities.
TRUE_METRICS = ("MSE_p", "KL(p, p_hat)", "KL(p_hat, p)", "CE to p")
# Need outcomes only.
OUTCOME_METRICS = ("Brier", "NLL", "AUC", "ECE", "MCE", "KS")


def _clip(p: Array) -> Array:
  return jnp.clip(p, MARGIN, 1 - MARGIN)


def _cross_entropy(p: Array, q: Array) -> Array:
  """E_p[-log q] of events with probabilities p [n]; both away from 0 and 1."""
  return -(p * jnp.log(q) + (1 - p) * jnp.log1p(-q))


def true_metrics(p_hat: Array, p: Array) -> dict[str, Array]:
  """Errors against the true probabilities; p_hat, p [n] -> TRUE_METRICS but the order, each []."""
  q, r = _clip(p_hat), _clip(p)
  return {
    "MSE_p": jnp.mean((p_hat - p) ** 2),
    "KL(p, p_hat)": jnp.mean(_cross_entropy(r, q) - _cross_entropy(r, r)),
    "KL(p_hat, p)": jnp.mean(_cross_entropy(q, r) - _cross_entropy(q, q)),
    "CE to p": jnp.mean(_cross_entropy(r, q)),
  }


def outcome_metrics(p_hat: Array, y: Array) -> dict[str, Array]:
  """Of OUTCOME_METRICS all but AUC; ECE and MCE of 15 equal-count bins, which count alike.

  p_hat, y (0 or 1) [n] -> each [].
  """
  bins = calibration.reliability(p_hat, y, num_bins=NUM_BINS)
  return {
    "Brier": scoring_rules.brier_score(p_hat, y).mean(),
    "NLL": scoring_rules.log_score(_clip(p_hat), y).mean(),
    "ECE": calibration.expected_calibration_error(bins, weighted=False),
    "MCE": calibration.maximum_calibration_error(bins),
    "KS": calibration.ks_calibration_error(p_hat, y),
  }


@jax.jit
def _many(p_hat: Array, y: Array, p: Array) -> dict[str, Array]:
  return jax.vmap(lambda *row: outcome_metrics(*row[:2]) | true_metrics(row[0], row[2]))(
    p_hat, y, p
  )


def evaluate(p_hat: np.ndarray, y: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
  """Every metric of every draw, in float64.

  Args:
    p_hat: estimated probabilities, [draws, n].
    y: outcomes, 0 or 1, both of them in every draw, [draws, n].
    p: true probabilities, [draws, n].

  Returns:
    {name: [draws]}, TRUE_METRICS and OUTCOME_METRICS.
  """
  with jax.enable_x64(True):
    values = _many(*(jnp.asarray(a, jnp.float64) for a in (p_hat, y, p)))
    values = {name: np.asarray(value) for name, value in values.items()}
  values["AUC"] = np.array([roc_auc_score(*draw) for draw in zip(y, p_hat)])
  return {name: values[name] for name in (*TRUE_METRICS, *OUTCOME_METRICS)}


@functools.partial(jax.jit, static_argnames="resamples")
def _bootstrap(key: Array, p_hat: Array, y: Array, *, resamples: int) -> dict[str, Array]:
  """Of all rows, then of every resample: [1 + resamples] each."""
  n = len(y)
  rows = jnp.vstack([jnp.arange(n), jax.random.randint(key, (resamples, n), 0, n)])
  return jax.lax.map(lambda r: outcome_metrics(p_hat[r], y[r]), rows, batch_size=64)


def with_intervals(
  p_hat: np.ndarray, y: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
  """Each of `outcome_metrics` with its 95 % percentile bootstrap interval over the rows.

  ECE, MCE and KS are at least 0 and noise raises them: their intervals lie too high, and may leave
  the estimate out.

  Args:
    p_hat, y: [n].

  Returns:
    {name: (estimate, low, high)}.
  """
  with jax.enable_x64(True):
    p_hat, y = jnp.asarray(p_hat, jnp.float64), jnp.asarray(y, jnp.float64)
    draws = _bootstrap(jax.random.key(seed), p_hat, y, resamples=resamples)
  return {
    name: (float(v[0]), *np.quantile(np.asarray(v)[1:], (0.025, 0.975)).tolist())
    for name, v in draws.items()
  }
