import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.evaluation import conformal


@pytest.mark.parametrize("n, level, rank", [(9, 0.5, 5), (9, 0.9, 9), (19, 0.05, 1), (99, 0.9, 90)])
def test_rank_of_the_quantile(n, level, rank):
  scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
  assert conformal.conformal_quantile(scores, level) == rank


def test_too_few_scores_for_the_level():
  assert conformal.conformal_quantile(np.arange(8.0), 0.9) == np.inf


def test_coverage_is_exact_over_exchangeable_data():
  """Ranks are uniform: the share of covered y is Beta, with mean ceil((n + 1) level) / (n + 1)."""
  n, alpha, splits = 20, 0.2, 4000

  def covered(key):
    y = jax.random.normal(key, (n + 1,))
    flat = jnp.zeros(n)
    low, high = conformal.cqr_interval(flat[:1], flat[:1], flat, flat, y[:n], alpha)
    return (low[0] <= y[n]) & (y[n] <= high[0])

  found = jax.vmap(covered)(jax.random.split(jax.random.key(0), splits)).mean()
  expected = np.ceil((n + 1) * (1 - alpha)) / (n + 1)
  # Four standard errors of a binomial share.
  assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / splits)


def test_an_interval_that_covers_too_much_is_narrowed():
  y = np.linspace(-1, 1, 99)
  low, high = conformal.cqr_interval(-9.0, 9.0, np.full(99, -9.0), np.full(99, 9.0), y, 0.1)
  assert high < 1 and low > -1
