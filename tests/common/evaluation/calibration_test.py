import jax
import numpy as np
import pytest
import scipy.stats
from sklearn.calibration import calibration_curve

from common.evaluation import calibration


@pytest.fixture
def forecasts():
  rng = np.random.default_rng(0)
  p = rng.beta(2, 3, 610)
  return p, (rng.uniform(size=610) < p**1.5).astype(np.int64)


@pytest.mark.parametrize("strategy, name", [("count", "quantile"), ("width", "uniform")])
def test_bins_agree_with_scikit_learn(forecasts, strategy, name):
  p, y = forecasts
  # 610 / 10 forecasts a bin: scikit-learn's interpolated quantiles then cut at the same places.
  observed, predicted = calibration_curve(y, p, n_bins=10, strategy=name)
  bins = calibration.reliability(p, y, num_bins=10, strategy=strategy)
  filled = np.asarray(bins.count) > 0
  np.testing.assert_allclose(np.asarray(bins.predicted)[filled], predicted, rtol=1e-5)
  np.testing.assert_allclose(np.asarray(bins.observed)[filled], observed, rtol=1e-5)
  assert bins.count.sum() == 610


def test_errors_of_known_bins():
  p = np.array([0.1, 0.1, 0.1, 0.9])
  y = np.array([0, 0, 1, 1])
  bins = calibration.reliability(p, y, num_bins=2, strategy="width")
  gaps = np.array([1 / 3 - 0.1, 0.1])
  error = calibration.expected_calibration_error
  np.testing.assert_allclose(error(bins), gaps @ [0.75, 0.25], rtol=1e-6)
  np.testing.assert_allclose(error(bins, weighted=False), gaps.mean(), rtol=1e-6)
  np.testing.assert_allclose(calibration.maximum_calibration_error(bins), gaps[0], rtol=1e-6)


def test_an_empty_bin_counts_for_nothing():
  bins = calibration.reliability(np.array([0.1, 0.12]), np.array([0, 0]), strategy="width")
  assert np.isnan(bins.predicted).sum() == 14
  for weighted in (False, True):
    np.testing.assert_allclose(
      calibration.expected_calibration_error(bins, weighted=weighted), 0.11, rtol=1e-5
    )


def test_ks_error_of_a_constant_forecast(forecasts):
  _, y = forecasts
  rate = y.mean()
  expected = np.abs(np.cumsum(rate - y)).max() / len(y)
  found = calibration.ks_calibration_error(np.full(len(y), rate), y)
  np.testing.assert_allclose(found, expected, rtol=1e-4)  # A float32 sum of 610 terms.


def test_metrics_map_over_seeds(forecasts):
  p, y = forecasts
  many = jax.vmap(lambda p: calibration.reliability(p, y))(np.stack([p, p[::-1]]))
  single = calibration.reliability(p[::-1], y)
  np.testing.assert_allclose(many.observed[1], single.observed, rtol=1e-6)


def test_coverage_and_width():
  low, high = np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 3.0]])
  y = np.array([[1.0, 2.0], [0.5, 2.0]])  # An interval holds its ends.
  np.testing.assert_allclose(calibration.coverage(low, high, y), [1.0, 0.5])
  np.testing.assert_allclose(calibration.interval_width(low, high), [1.0, 1.5])


def test_mean_interval_is_students():
  x = np.array([1.0, 2.0, 4.0])
  found = calibration.mean_interval(x, 0.9)
  expected = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.9)
  np.testing.assert_allclose(found[1:], expected)
  assert calibration.mean_interval([3.0]) == (3.0, -np.inf, np.inf)
