"""How well the probability of the rare class is estimated."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


def squared_calibration_error(
  outcome: np.ndarray,
  probability: np.ndarray,
  bins: int | None = None,
  *,
  legacy_order: bool = False,
) -> float:
  """The observed squared calibration error (OSCE) with bins of equal frequency (section 4.3).

  Rows are sorted by predicted probability and cut into bins of equal size (the first ones have one
  row more); the error is the mean over rows of (predicted - share of outcomes in the row's bin)^2.

  Args:
    outcome: [n], 0 or 1.
    probability: [n], predicted.
    bins: their number; by default max(n / 100, 10).
    legacy_order: as the published code has it, which takes the predictions of a bin from the rows
      before they were sorted.
  """
  order = np.argsort(probability, kind="stable")
  bins = min(bins or max(round(len(order) / 100), 10), len(order))
  shares = np.empty(len(order))
  for rows in np.array_split(np.arange(len(order)), bins):
    shares[rows] = outcome[order[rows]].mean()
  predicted = probability if legacy_order else probability[order]
  return float(np.mean((predicted - shares) ** 2))


class PairedTest(NamedTuple):
  """Whether the first method's errors are smaller, replication by replication."""

  t: float  # Positive where the first is better.
  p_value: float  # One-sided.
  win_rate: float  # Share of replications in which the first is strictly better.


def paired_test(errors: Sequence[float], baseline: Sequence[float]) -> PairedTest:
  """The paired one-sided t test that mean(errors) < mean(baseline)."""
  result = stats.ttest_rel(baseline, errors, alternative="greater")
  return PairedTest(
    float(result.statistic), float(result.pvalue), float(np.mean(np.less(errors, baseline)))
  )
