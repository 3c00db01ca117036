"""Whether forecast probabilities come true as often as they say, and intervals hold what they say.

Binning is data-dependent but of fixed shape, so everything jits and vmaps.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

Array = jax.Array


class Reliability(NamedTuple):
  """The bins of a reliability diagram; an empty bin has NaN means.

  Attributes:
    predicted: mean forecast probability, [bins].
    observed: share of the events that happened, [bins].
    count: forecasts in the bin, int [bins].
  """

  predicted: Array
  observed: Array
  count: Array


def reliability(
  probabilities: Array,
  outcomes: Array,
  *,
  num_bins: int = 15,
  strategy: Literal["count", "width"] = "count",
) -> Reliability:
  """Bins forecasts by their probability.

  Args:
    probabilities: of the event, [n].
    outcomes: 0 or 1, [n].
    num_bins: B.
    strategy: "count": bin b holds the sorted forecasts int(b n / B) to int((b+1) n / B) - 1.
      "width": forecasts in (b / B, (b+1) / B], and 0 in the first.
  """
  probabilities, outcomes = jnp.asarray(probabilities), jnp.asarray(outcomes)
  n = len(probabilities)
  if strategy == "count":
    order = jnp.argsort(probabilities, stable=True)
    probabilities, outcomes = probabilities[order], outcomes[order]
    edges = np.arange(num_bins + 1) * n // num_bins
    bins = np.searchsorted(edges, np.arange(n), side="right") - 1
  else:
    bins = jnp.clip(jnp.ceil(probabilities * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
  total = lambda x: jax.ops.segment_sum(x, bins, num_segments=num_bins)
  count = total(jnp.ones(n, jnp.int32))
  mean = lambda x: total(x.astype(probabilities.dtype)) / count
  return Reliability(mean(probabilities), mean(outcomes), count)


def expected_calibration_error(bins: Reliability, *, weighted: bool = True) -> Array:
  """ECE: mean |observed - predicted| over the bins that have forecasts.

  Args:
    bins: of `reliability`.
    weighted: by the number of forecasts; otherwise all bins count alike.
  """
  filled = bins.count > 0
  gap = jnp.where(filled, jnp.abs(bins.observed - bins.predicted), 0)
  weight = jnp.where(filled, bins.count if weighted else 1, 0)
  return jnp.sum(weight * gap) / jnp.sum(weight)


def maximum_calibration_error(bins: Reliability) -> Array:
  """MCE: the largest |observed - predicted| of a bin that has forecasts."""
  return jnp.max(jnp.where(bins.count > 0, jnp.abs(bins.observed - bins.predicted), 0))


def ks_calibration_error(probabilities: Array, outcomes: Array) -> Array:
  """max_k |sum_{i <= k} (p_i - y_i)| / n over the forecasts sorted by p: no bins.

  Gupta et al., "Calibration of Neural Networks using Splines" (2021).

  Args:
    probabilities, outcomes: [n].
  """
  order = jnp.argsort(probabilities, stable=True)
  gap = jnp.asarray(probabilities)[order] - jnp.asarray(outcomes)[order]
  return jnp.max(jnp.abs(jnp.cumsum(gap))) / len(gap)


def coverage(low: Array, high: Array, y: Array) -> Array:
  """Share of the y [n, ...] in [low, high], over the first axis: [...]."""
  return jnp.mean((low <= y) & (y <= high), axis=0)


def interval_width(low: Array, high: Array) -> Array:
  """Mean width over the first axis of [n, ...]: [...]."""
  return jnp.mean(high - low, axis=0)


class Interval(NamedTuple):
  """A mean with its confidence interval."""

  mean: float
  low: float
  high: float


def mean_interval(values: np.ndarray, level: float = 0.95) -> Interval:
  """Student's interval of the mean of independent values [n], as of seeds; infinite for one."""
  values = np.asarray(values, np.float64)
  mean = float(values.mean())
  if len(values) < 2:
    return Interval(mean, -np.inf, np.inf)
  reach = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * scipy.stats.sem(values)
  return Interval(mean, mean - float(reach), mean + float(reach))
