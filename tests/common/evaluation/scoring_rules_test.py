import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from common.evaluation import scoring_rules as rules

# float32 sums of a few hundred terms of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_binary_scores_agree_with_scikit_learn(rng):
  p, y = rng.uniform(0.01, 0.99, 200), rng.integers(0, 2, 200)
  np.testing.assert_allclose(
    rules.brier_score(p, y).mean(), metrics.brier_score_loss(y, p), **CLOSE
  )
  np.testing.assert_allclose(rules.log_score(p, y).mean(), metrics.log_loss(y, p), **CLOSE)


def test_scores_of_classes(rng):
  p, y = rng.dirichlet(np.ones(4), 200), rng.integers(0, 4, 200)
  np.testing.assert_allclose(
    rules.log_score(p, y).mean(), metrics.log_loss(y, p, labels=range(4)), **CLOSE
  )
  brier = ((p - np.eye(4)[y]) ** 2).sum(axis=1)
  np.testing.assert_allclose(rules.brier_score(p, y), brier, **CLOSE)
  two = rng.uniform(size=(200, 1))
  both, event = np.concatenate([1 - two, two], axis=1), rng.integers(0, 2, 200)
  np.testing.assert_allclose(
    rules.brier_score(both, event), 2 * rules.brier_score(two[:, 0], event), **CLOSE
  )


def test_an_impossible_event_scores_infinity():
  assert np.isinf(rules.log_score(jnp.array([0.0]), jnp.array([1]))).all()


def test_pinball_loss_agrees_with_scikit_learn(rng):
  q, y, levels = rng.normal(size=(100, 3)), rng.normal(size=100), np.array([0.1, 0.5, 0.8])
  found = rules.pinball_loss(q, levels, y).mean(axis=0)
  for i, level in enumerate(levels):
    np.testing.assert_allclose(
      found[i], metrics.mean_pinball_loss(y, q[:, i], alpha=level), **CLOSE
    )


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 6), median=st.booleans(), seed=st.integers(0, 2**16))
def test_weighted_interval_score_is_twice_the_mean_pinball_loss(half, median, seed):
  rng = np.random.default_rng(seed)
  low = np.sort(rng.uniform(0.01, 0.49, half))
  levels = np.concatenate([low, [0.5] if median else [], 1 - low[::-1]])
  q, y = rng.normal(size=(5, len(levels))), rng.normal(size=5)  # Crossing quantiles too.
  np.testing.assert_allclose(
    rules.weighted_interval_score(q, levels, y),
    2 * rules.pinball_loss(q, levels, y).mean(axis=-1),
    **CLOSE,
  )


def test_interval_score_by_hand():
  y = jnp.array([0.5, -1.0, 3.0])
  np.testing.assert_allclose(rules.interval_score(0.0, 2.0, y, 0.5), [2, 2 + 4 * 1, 2 + 4 * 1])


def test_crps_of_a_normal_agrees_with_its_integral():
  normal = scipy.stats.norm(0.3, 1.7)
  for y in (-1.3, 0.2, 2.5):
    below = scipy.integrate.quad(lambda x: normal.cdf(x) ** 2, -30, y)[0]
    above = scipy.integrate.quad(lambda x: normal.sf(x) ** 2, y, 30)[0]
    np.testing.assert_allclose(rules.crps_normal(0.3, 1.7, y), below + above, rtol=1e-5)


def test_rules_are_proper():
  """The expected score is smallest at the truth."""
  p = np.linspace(0.05, 0.95, 19)
  truth = 0.3
  for rule in (rules.brier_score, rules.log_score):
    expected = truth * rule(p, np.ones(19)) + (1 - truth) * rule(p, np.zeros(19))
    assert p[np.argmin(expected)] == pytest.approx(truth)
