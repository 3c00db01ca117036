"""Quantile aggregation: values of the official code, invariants, libraries, bad input, tiny run."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.ensemble import RandomForestRegressor
from sklearn.isotonic import isotonic_regression

from common.errors import UserError
from common.paths import data_dir
from projects.quantile_aggregation import (
  aggregators,
  baselines,
  config,
  conformal,
  data,
  dqa,
  experiment,
  isotonic,
  library,
  losses,
  networks,
  training,
  trees,
)
from projects.quantile_aggregation.aggregators import Form
from projects.quantile_aggregation.estimator import QuantileAggregator
from projects.quantile_aggregation.search import Budget, Shape, fold_masks, padded

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "quantile_aggregation"
GOLDEN = np.load(FOLDER / "aggregators_isotonic_scores.npz")
TAUS = GOLDEN["taus"]
Z, X, Y, RAW = (jnp.asarray(GOLDEN[name]) for name in ("Z", "X", "y", "raw"))
Y = Y[:, 0]
N, P, M = Z.shape
SMALL = Budget(2, 1, layers=(1,), widths=(8,), max_rounds=2, global_rounds=2, patience=2)

rows_of_quantiles = hnp.arrays(np.float64, (6, 5), elements=st.floats(-100, 100))


# The official code.


@pytest.mark.parametrize("name, key", [("pava", "pava"), ("median_outwards", "mono")])
def test_isotonisers_of_the_official_code(name, key):
  np.testing.assert_allclose(isotonic.ISOTONISERS[name](RAW), GOLDEN[key], atol=1e-6)


@pytest.mark.parametrize("strength", ["0.01", "0.1", "1.0"])
def test_soft_sort_of_the_official_code(strength):
  with jax.enable_x64(True):
    ours = isotonic.soft_sort(jnp.asarray(GOLDEN["raw"], jnp.float64), float(strength))
    np.testing.assert_allclose(ours, GOLDEN[f"softsort_{strength}"], atol=1e-9)


@pytest.mark.parametrize("resolution", ["coarse", "medium", "fine"])
def test_aggregators_of_the_official_code(resolution):
  for name in ("softmax", "raw"):
    logits = jnp.asarray(GOLDEN[f"gw_{resolution}_{name}"]).ravel()
    form = Form(resolution, local=False, normalise=name == "softmax")
    q = aggregators.aggregate(logits, Z, X, form)
    np.testing.assert_allclose(q, GOLDEN[f"g_{resolution}_{name}"], atol=1e-5)
  params = [
    (jnp.asarray(GOLDEN[f"l_{resolution}_W{i}"].T), jnp.asarray(GOLDEN[f"l_{resolution}_b{i}"]))
    for i in range(3)
  ]
  form = Form(resolution, isotoniser="none")
  np.testing.assert_allclose(
    aggregators.predict(params, Z, X, form=form), GOLDEN[f"l_{resolution}"], atol=1e-5
  )


def test_losses_of_the_official_code():
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  close(losses.pinball(RAW, Y, TAUS).mean(), GOLDEN["pinball"])
  close(losses.pinball(RAW, Y, TAUS).mean(axis=0), GOLDEN["pinball_per_tau"])
  for alpha in (0.01, 0.1):
    close(losses.pinball(RAW, Y, TAUS, alpha).mean(), GOLDEN[f"huber_{alpha}"])
  for delta in (0.0, 0.005, 0.1):
    margins = losses.constant_margins(delta, M)
    close(losses.crossing_penalty(RAW, margins), GOLDEN[f"margin_const_{delta}"])
  q = GOLDEN["margin_list"]
  margins = 0.05 * np.maximum(q[:, None] - q[None, :], 0)
  close(losses.crossing_penalty(RAW, margins), GOLDEN["margin_vec"])


def test_scores_of_the_official_code():
  scores = experiment.score(RAW, Y, TAUS)
  np.testing.assert_allclose(scores.interval_scores, GOLDEN["interval_score"], rtol=1e-5)
  np.testing.assert_allclose(scores.picp, GOLDEN["picp"], rtol=1e-6)
  assert scores.pinball == pytest.approx(float(GOLDEN["pinball"]), rel=1e-5)
  assert scores.coverage_error == pytest.approx(float(GOLDEN["picp_err"]), abs=1e-6)
  assert scores.calibration_error == pytest.approx(float(GOLDEN["calib_err"]), abs=1e-6)
  assert scores.wis == pytest.approx(2 * scores.pinball, rel=1e-5)


# Aggregators.


@pytest.mark.parametrize("resolution", ["coarse", "medium", "fine", "factored"])
def test_zero_weights_are_the_plain_mean(resolution):
  form = Form(resolution, local=False, isotoniser="none")
  assert not aggregators.init(jax.random.key(0), form, 4, P, M).any()
  q = aggregators.predict(jnp.zeros(aggregators.num_weights(resolution, P, M)), Z, X, form=form)
  over = 1 if resolution in ("coarse", "medium") else (1, 2)
  expected = np.asarray(Z).mean(axis=over)
  expected = expected if expected.ndim == 2 else np.tile(expected[:, None], M)
  np.testing.assert_allclose(q, expected, atol=1e-6)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("resolution", ["coarse", "medium", "fine", "factored"])
def test_softmax_weights_stay_within_the_inputs(resolution, local):
  form = Form(resolution, local, layers=1, width=8)

  @jax.jit
  def random_aggregate(key):
    params = aggregators.init(key, form, 4, P, M)
    params = jax.tree.map(lambda a: a + 3 * jax.random.normal(key, a.shape), params)
    return aggregators.aggregate(params, Z, X, form)

  q = np.asarray(random_aggregate(jax.random.key(1)))
  over = 1 if resolution in ("coarse", "medium") else (1, 2)
  low, high = (np.asarray(f(Z, axis=over)).reshape(N, -1) for f in (jnp.min, jnp.max))
  assert (q >= low - 1e-5).all() and (q <= high + 1e-5).all()
  assert np.ptp(q, axis=1).max() > 1e-3


def test_factored_weights_are_a_fine_special_case():
  logits = jax.random.normal(jax.random.key(0), (P + M * M,))
  w = aggregators.weights(logits, "factored", P, M)
  assert w.shape == (P, M, M)
  np.testing.assert_allclose(w.sum(axis=(0, 1)), np.ones(M), rtol=1e-5)
  u, v = jax.nn.softmax(logits[:P]), jax.nn.softmax(logits[P:].reshape(M, M), axis=0)
  expected = sum(u[j] * Z[:, j] @ v for j in range(P))
  np.testing.assert_allclose(aggregators.combine(Z, w, "factored"), expected, atol=1e-5)


@pytest.fixture(scope="module")
def medium():
  """A global medium aggregator on a set where model 0 is right and the others are off."""
  rng = np.random.default_rng(0)
  n, levels = 400, np.array([0.2, 0.5, 0.8])
  x = rng.normal(size=(n, 1)).astype(np.float32)
  y = (x[:, 0] + rng.normal(size=n)).astype(np.float32)
  right = x + stats.norm.ppf(levels)
  z = np.stack([right, right + 1.5, right * 0.2 - 2], axis=1).astype(np.float32)
  rows = dqa.Rows(z, x, y)
  train, validation = (dqa.Rows(*(a[part] for a in rows)) for part in (slice(300), slice(300, n)))
  budget = SMALL._replace(global_rounds=100, patience=100)
  fitted = dqa.fit(
    Form("medium", local=False), train, validation, levels, budget, 0, margins="none"
  )
  return fitted, train, validation, levels


def test_global_medium_tends_to_constrained_linear_stacking(medium):
  """QRA is the exact minimum over the simplex: training can only come near it from above.

  After 10,000 steps of 1e-3 the logits of the useless models still fall: 10 % of the way is left.
  """
  fitted, train, _, levels = medium
  exact = baselines.fit_qra(train.z, train.y, levels)
  np.testing.assert_allclose(exact.sum(axis=0), 1, atol=1e-8)
  assert exact.min() >= -1e-9
  loss = lambda q: float(losses.pinball(jnp.asarray(q), train.y, levels).mean())
  best = loss(np.einsum("pm,npm->nm", exact, train.z))
  trained = loss(fitted.quantiles(train.z, train.x, isotonise=False))
  uniform = loss(baselines.average(train.z))
  assert best - 1e-6 <= trained <= best + 0.1 * (uniform - best)


def test_the_search_keeps_what_is_best_on_the_validation_rows(medium):
  fitted, _, validation, levels = medium
  q = fitted.quantiles(validation.z, validation.x)
  loss = float(losses.pinball(jnp.asarray(q), validation.y, levels).mean())
  assert loss == pytest.approx(fitted.validation_loss, rel=1e-5) and 1 <= fitted.rounds <= 100


def test_the_papers_batch_size():
  assert [aggregators.batch_size(n) for n in (99, 100, 999, 1000, 20000)] == [16, 32, 32, 64, 128]


# Losses and isotonisers.


def test_pinball_gradient_and_minimiser():
  y = jnp.asarray(np.random.default_rng(0).normal(size=99))
  gradient = jax.grad(lambda q: losses.pinball(q[None], y[:1], TAUS).sum())(RAW[0])
  np.testing.assert_allclose(gradient, (y[0] < RAW[0]).astype(float) - TAUS, atol=1e-6)
  # Over constants the minimum is at an outcome; every outcome is tried.
  losses_ = losses.pinball(jnp.tile(y[:, None, None], (1, 99, 1)), y, jnp.array([0.3]))
  best = y[losses_.mean(axis=(1, 2)).argmin()]
  assert float(best) == pytest.approx(np.quantile(y, 0.3, method="inverted_cdf"))


def test_huber_pinball_tends_to_pinball_and_is_smooth_at_0():
  plain = losses.pinball(RAW, Y, TAUS)
  np.testing.assert_allclose(losses.pinball(RAW, Y, TAUS, 1e-6), plain, atol=1e-6)
  slope = jax.grad(lambda q: losses.pinball(q[None], Y[:1], TAUS[:1], 0.1)[0, 0])
  assert float(slope(Y[:1])[0]) == 0.0
  assert np.isfinite(jax.grad(lambda q: losses.pinball(q[None], Y[:1], TAUS[:1])[0, 0])(Y[:1])[0])


def test_crossing_penalty_is_a_double_loop_and_0_where_the_gaps_suffice():
  rng = np.random.default_rng(0)
  q, margins = rng.normal(size=(4, 5)), rng.uniform(0, 1, (5, 5))
  expected = sum(
    max(q[i, t] - q[i, s] + margins[s, t], 0) for i in range(4) for s in range(5) for t in range(s)
  )
  assert float(losses.crossing_penalty(q, margins)) == pytest.approx(expected / (4 * 10), rel=1e-6)
  apart = jnp.asarray(np.arange(5.0)[None] * 0.5)
  assert losses.crossing_penalty(apart, losses.constant_margins(0.5, 5)) == 0
  assert losses.crossing_penalty(apart, losses.constant_margins(0.51, 5)) > 0
  residuals = jnp.asarray(rng.normal(size=200))
  gaps = np.asarray(losses.adaptive_margins(0.1, residuals, TAUS))
  assert gaps[5, 2] == pytest.approx(
    0.1 * (np.quantile(residuals, 0.6) - np.quantile(residuals, 0.3)), rel=1e-4
  )
  assert (np.triu(gaps) == 0).all()


@settings(max_examples=20, deadline=None)
@given(z=rows_of_quantiles, y=st.floats(-120, 120))
def test_sort_and_pava_never_raise_the_loss(z, y):
  with jax.enable_x64(True):
    z, levels = jnp.asarray(z), jnp.arange(1, 6) / 6
    outcome = jnp.full(6, y)
    before = losses.pinball(z, outcome, levels).sum(axis=1)
    for isotonise in (isotonic.sort, isotonic.pava):
      after = isotonise(z)
      assert (jnp.diff(after) >= -1e-9).all()
      assert (losses.pinball(after, outcome, levels).sum(axis=1) <= before + 1e-9).all()
      np.testing.assert_allclose(isotonise(after), after, atol=1e-9)
    swept = isotonic.median_outwards(z)
    assert (jnp.diff(swept) >= 0).all() and (swept[:, 2] == z[:, 2]).all()
    for isotonise in (isotonic.sort, isotonic.pava, isotonic.soft_sort):
      np.testing.assert_allclose(isotonise(z).sum(axis=1), z.sum(axis=1), atol=1e-8)
    expected = [isotonic_regression(np.asarray(row)) for row in z]
    np.testing.assert_allclose(isotonic.pava(z), expected, atol=1e-6)


def test_soft_sort_tends_to_sort():
  z = jnp.asarray(np.random.default_rng(0).normal(size=(10, 7)))
  gap = lambda strength: float(jnp.abs(isotonic.soft_sort(z, strength) - isotonic.sort(z)).max())
  assert gap(1e-3) < 1e-5 < gap(1.0)


def test_pava_averages_the_gradient_in_its_blocks():
  z = jnp.array([0.0, 3.0, 1.0, 2.0, 5.0])  # 3, 1, 2 are one block.
  gradient = jax.grad(lambda z: (isotonic.pava(z) * jnp.arange(5.0)).sum())(z)
  np.testing.assert_allclose(gradient, [0, 2, 2, 2, 4], atol=1e-6)


# Base learners and the library.


def test_gaussian_quantiles():
  mean, variance = jnp.array([0.5, -1.0]), jnp.array([4.0, 0.25])
  q = networks.gaussian_quantiles(mean, variance, TAUS)
  expected = stats.norm.ppf(TAUS, np.asarray(mean)[:, None], np.sqrt(variance)[:, None])
  np.testing.assert_allclose(q, expected, atol=1e-5)
  np.testing.assert_allclose(q[:, 4], mean, atol=1e-6)


def test_dropout_is_unbiased_and_0_keeps_all():
  """One hidden layer of ones: the output's mean over draws is the output without dropout."""
  params = [(jnp.ones((1, 64)), jnp.zeros(64)), (jnp.ones((64, 1)) / 64, jnp.zeros(1))]
  x, key = jnp.ones((500, 1)), jax.random.key(0)
  dropped = training.mlp(params, x, dropout=0.5, key=key)
  # The standard error is 1 / sqrt(500 * 64) = 0.0056; 5 of them.
  assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03) and float(dropped.std()) > 0.05
  np.testing.assert_array_equal(training.mlp(params, x, dropout=0.0, key=key), jnp.ones((500, 1)))


def test_a_network_learns_quantiles():
  """The loss of MQR against the true quantiles' on fresh rows."""
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (600, 1)).astype(np.float32)
  y = (2 * x[:, 0] + (0.5 + 0.4 * x[:, 0]) * rng.normal(size=600)).astype(np.float32)
  levels = np.array([0.1, 0.5, 0.9])
  train, validation = library.Split(x[:400], y[:400]), library.Split(x[400:500], y[400:500])
  budget = SMALL._replace(max_rounds=20, patience=5, widths=(16,))
  folds = library.contiguous_folds(400, 2)
  shape = Shape(420, 120, 3)  # Padding must not keep it from learning.
  predict = library.fit_learner("MQR", train, validation, levels, folds, budget, 0, shape)
  q = predict(x[500:])
  assert q.shape == (3, 100, 3) and q.dtype == np.float32
  assert np.abs(q[0] - q[1]).max() > 1e-3  # The folds' models differ.
  loss = lambda q: float(losses.pinball(jnp.asarray(q), y[500:], levels).mean())
  true = 2 * x[500:] + (0.5 + 0.4 * x[500:]) * stats.norm.ppf(levels)
  constant = np.tile(np.quantile(y[:400], levels), (100, 1))
  assert loss(q[-1]) < loss(true) + 0.2 * (loss(constant) - loss(true))


def test_forest_quantiles_by_hand():
  """Weights of every training row, row by row, against Meinshausen's definition."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(60, 2)), rng.normal(size=60)
  levels = np.array([0.1, 0.5, 0.9])
  new = rng.normal(size=(5, 2))
  setting = {"min_samples_split": 8, "min_samples_leaf": 8}
  q = trees.fit("RF", x, y, levels, 0, setting)(new)
  forest = RandomForestRegressor(50, random_state=0, **setting).fit(x, y)
  leaves, new_leaves = forest.apply(x), forest.apply(new)
  order = np.argsort(y)
  for i in range(5):
    same = leaves == new_leaves[i]
    weights = (same / same.sum(axis=0)).mean(axis=1)[order]
    expected = [y[order][np.argmax(np.cumsum(weights) >= level - 1e-6)] for level in levels]
    np.testing.assert_allclose(q[i], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["XT", "GBM", "LQR"])
def test_scikit_learns_learners(kind):
  """Out-of-fold rows come from models that have not seen their fold."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(80, 2)).astype(np.float32)
  y = (x[:, 0] + 0.5 * rng.normal(size=80)).astype(np.float32)
  folds = library.contiguous_folds(60, 3)
  levels = np.array([0.25, 0.75])
  train, validation = library.Split(x[:60], y[:60]), library.Split(x[60:], y[60:])
  predict = library.fit_learner(kind, train, validation, levels, folds, SMALL, 0)
  everywhere = predict(train.x)
  assert everywhere.shape == (4, 60, 2)
  by_fold = library.out_of_fold(everywhere, folds)
  np.testing.assert_array_equal(by_fold[25], everywhere[1, 25])
  # Changing the outcomes of a fold leaves its own predictions as they are.
  moved = library.Split(train.x, np.where(folds == 1, train.y + 10, train.y))
  again = library.fit_learner(kind, moved, validation, levels, folds, SMALL, 0)(train.x)
  np.testing.assert_allclose(again[1], everywhere[1], atol=1e-5)
  assert np.abs(again[0] - everywhere[0]).max() > 1


def test_folds_and_masks():
  folds = library.contiguous_folds(7, 3)
  np.testing.assert_array_equal(folds, [0, 0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(fold_masks(folds), [folds != 0, folds != 1, folds != 2])
  folds = np.array([0, 1, -1])  # The last is padding.
  np.testing.assert_array_equal(fold_masks(folds), [[False, True, False], [True, False, False]])


def test_padding_is_not_seen():
  """The validation loss is that of the rows themselves; training has a mask for the others."""
  rows = dqa.Rows(*(np.asarray(a, np.float32) for a in (Z, X, Y)))
  more = padded(rows, N + 7, X.shape[1] + 2)
  assert more.z.shape == (N + 7, P, M) and more.x.shape == (N + 7, X.shape[1] + 2)
  assert not more.z[N:].any() and not more.x[N:].any() and not more.x[:, X.shape[1] :].any()
  q = baselines.average(more.z)
  expected = losses.pinball(baselines.average(Z), Y, TAUS).mean()
  np.testing.assert_allclose(losses.validation_loss(q, more.y, TAUS), expected, rtol=1e-6)
  # A quantile that is not a number is not padding.
  assert np.isnan(losses.validation_loss(q.at[0, 0].set(np.nan), more.y, TAUS))


def test_tables_of_other_batches_are_not_padded_for():
  rng = np.random.default_rng(0)
  split = lambda n, d: data.split(rng.normal(size=(n, d)), rng.normal(size=n), rng)
  # 90 %, and 80 % of that: 216 and 144 rows go with batches of 32, 1440 with 64.
  splits = small, wide, large = split(300, 2), split(200, 5), split(2000, 7)
  assert library.common_shape(small, splits) == Shape(216, 54, 5)
  assert library.common_shape(wide, splits) == Shape(216, 54, 5)
  assert library.common_shape(large, splits) == Shape(1440, 360, 7)


def test_training_sees_only_the_rows_of_its_mask():
  """The mean of the rows in the mask is the minimum of squares; the others are far away."""
  data_ = jnp.concatenate([jnp.linspace(-1, 1, 20), jnp.full(20, 100.0)])
  trained = training.minimise(
    lambda p, batch, key: ((p - batch) ** 2).mean(),
    lambda p: jnp.abs(p),
    jnp.asarray(0.5),
    data_,
    jnp.arange(40) < 20,
    jax.random.key(0),
    learning_rate=1e-2,
    weight_decay=0.0,
    batch_size=20,
    rounds=jnp.asarray(10),
    patience=jnp.asarray(3),
  )
  assert abs(float(trained.params)) < 0.02 and trained.best_loss <= jnp.abs(trained.params)


# Baselines.


def test_fixed_averages():
  np.testing.assert_allclose(baselines.average(Z), np.asarray(Z).mean(axis=1), atol=1e-6)
  np.testing.assert_allclose(baselines.median(Z), np.median(Z, axis=1), atol=1e-6)


def test_mixture():
  """One model gives itself; two give the root of the mean distribution function."""
  taus = jnp.asarray(TAUS, jnp.float32)
  z = jnp.sort(Z, axis=-1)
  np.testing.assert_allclose(baselines.mixture(z[:, :1], taus), z[:, 0], atol=1e-5)
  np.testing.assert_allclose(baselines.mixture(z[:, [0, 0]], taus), z[:, 0], atol=1e-5)
  grid = np.linspace(-4, 6, 4001)
  normals = stats.norm.ppf(np.linspace(0.005, 0.995, 199))
  z = jnp.asarray(np.stack([normals, 2 + normals])[None], jnp.float32)
  q = np.asarray(baselines.mixture(z, jnp.linspace(0.005, 0.995, 199)))[0]
  height = (stats.norm.cdf(grid) + stats.norm.cdf(grid - 2)) / 2
  inside = slice(9, 190)  # The outer levels show the linear tails.
  expected = np.interp(np.linspace(0.005, 0.995, 199), height, grid)
  np.testing.assert_allclose(q[inside], expected[inside], atol=0.01)


def test_fqra_finds_a_scaled_and_shifted_model():
  """No convex combination can; a regression on the factors can, exactly without noise."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=(60, 3, 1))
  y = 3 * z[:, 0, 0] - 1
  fitted = baselines.fit_fqra(z[:40], y[:40], z[40:], y[40:], np.array([0.5]))
  np.testing.assert_allclose(fitted(z)[:, 0], y, atol=1e-5)


# Conformal calibration.


def test_cqr_covers_and_no_more_than_it_must():
  """500 exchangeable splits of 39 calibration rows; a wrong constant interval is corrected.

  Coverage is in [1 - alpha, 1 - alpha + 1/40]; 20,000 test rows share the splits' errors, whose
  standard deviation is sqrt(0.8 * 0.2 / 41) = 0.062, so 4 / sqrt(500) of it is the tolerance.
  """
  levels = jnp.array([0.1, 0.5, 0.9])
  y = jnp.asarray(np.random.default_rng(0).normal(size=(500, 79)))
  q = jnp.tile(jnp.array([-0.3, 0.1, 0.4]), (40, 1))

  def calibrated(method):
    return jax.vmap(lambda y: method(q[:39], y[:39], q, levels))(y)

  pairs = calibrated(conformal.cqr_pairs)
  inside = (pairs[..., 0] <= y[:, 39:]) & (y[:, 39:] <= pairs[..., 2])
  assert 0.8 - 0.012 <= float(inside.mean()) <= 0.8 + 1 / 40 + 0.012
  assert (pairs[..., 1] == jnp.float32(0.1)).all()
  one_sided = calibrated(conformal.cqr_levels)
  below = (y[:, 39:, None] <= one_sided).mean(axis=(0, 1))
  slack = 1 / 40 + 4 * np.sqrt(np.array([0.09, 0.25, 0.09]) / 41 / 500)
  assert (np.abs(below - levels) <= slack).all()


def test_cv_plus_by_hand():
  rng = np.random.default_rng(0)
  folds = np.repeat([0, 1, 2], 13)
  by_fold, y, new = rng.normal(size=(39, 3)), rng.normal(size=39), rng.normal(size=(3, 4, 3))
  levels = np.array([0.1, 0.5, 0.9])
  q = conformal.cv_plus(by_fold, folds, y, new, levels)
  shifted = np.sort(new[folds, 2] + y[:, None] - by_fold, axis=0)
  expected = np.sort([shifted[3, 0], shifted[19, 1], shifted[35, 2]])  # The 4th, 20th, 36th of 39.
  np.testing.assert_allclose(q[2], expected, rtol=1e-5)


def test_too_few_calibration_rows():
  conformal.check_rows(19, [0.05, 0.95])
  with pytest.raises(UserError, match="18 rows; level 0.05 needs at least 19"):
    conformal.check_rows(18, [0.05, 0.95])


# Data.


@pytest.mark.parametrize("name, shape", [("diabetes", (442, 10)), ("yacht", (308, 6))])
def test_tables_and_their_split(name, shape):
  try:
    x, y = data.load(name)
  except UserError:
    pytest.skip("the data are not there")
  assert x.shape == shape
  parts = data.split(x, y, np.random.default_rng(0))
  assert len(parts.test.y) == round(0.1 * len(y))
  rest = np.concatenate([parts.train.x, parts.validation.x])
  assert len(rest) + len(parts.test.y) == len(y)
  np.testing.assert_allclose(rest.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(rest.std(axis=0), 1, atol=1e-5)


def test_all_uci_sets_are_read():
  try:
    data_dir("uci_regression")
  except UserError:
    pytest.skip("the data are not there")
  shapes = {name: data.load(name, 50)[0].shape for name in data.UCI_SETS}
  assert shapes == {
    "yacht": (50, 6),
    "energy": (50, 8),
    "concrete": (50, 8),
    "wine_quality_red": (50, 11),
    "kin8nm": (50, 8),
    "power": (50, 4),
  }


def test_the_experts_are_right_on_their_sides():
  levels = np.array([0.1, 0.9])
  z, x, y = data.two_experts(np.random.default_rng(0), 20_000, levels)
  left = x[:, 0] < 0
  for model, side in ((0, left), (1, ~left)):
    # 10,000 rows: 5 standard errors are 0.015.
    assert (y[side, None] <= z[side, model]).mean(axis=0) == pytest.approx(levels, abs=0.015)
    assert np.abs((y[~side, None] <= z[~side, model]).mean(axis=0) - levels).max() > 0.1


# The estimator and the command line.


def table(n=120):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, 2))
  return x, 50 + 10 * (x[:, 0] + 0.3 * rng.normal(size=n))


def estimator(levels=(0.1, 0.5, 0.9), **changes):
  arguments = {"learners": ("RF", "LQR"), "resolution": "coarse", "local": False, "folds": 2}
  return QuantileAggregator(levels, budget=SMALL, **(arguments | changes))


@pytest.mark.parametrize("calibration", ["none", "cqr", "cv+"])
def test_estimator(calibration):
  x, y = table()
  model = estimator(calibration=calibration).fit(x, y)
  q = model.predict_quantiles(x)
  assert q.shape == (120, 3) and q.dtype == np.float64 and (np.diff(q) >= 0).all()
  # In the unit of y: the median follows it (the noise is 0.3 of the signal).
  assert np.corrcoef(model.predict(x), y)[0, 1] > 0.9
  np.testing.assert_array_equal(model.predict_quantiles(x, [0.1, 0.9]), q[:, [0, 2]])
  low, high = model.predict_interval(x, 0.8)
  np.testing.assert_array_equal(np.stack([low, high], axis=1), q[:, [0, 2]])
  assert 0.6 < np.mean((low <= y) & (y <= high)) <= 1
  assert set(model.base_losses_) == {"RF", "LQR"} and model.validation_loss_ > 0
  if calibration == "none":
    with pytest.raises(UserError, match="level 0.3 was not fitted; expected some of 0.1, 0.5"):
      model.predict_quantiles(x, [0.3])
    with pytest.raises(UserError, match="x has 1 columns; the model has 2"):
      model.predict(x[:, :1])


def changed(array, place, value):
  array = array.copy()
  array[place] = value
  return array


X_, Y_ = table()


@pytest.mark.parametrize(
  "x, y, message",
  [
    (changed(X_, (3, 1), np.nan), Y_, "column 1 of x has 1 missing or infinite"),
    (changed(X_, (3, 1), np.inf), Y_, "column 1 of x has 1 missing or infinite"),
    (X_ * [1, 0], Y_, "column 1 of x is constant"),
    (X_, np.ones(120), r"the outcome is constant \(1\)"),
    (X_, changed(Y_, 2, np.nan), "y has 1 missing or infinite"),
    (X_, Y_[1:], r"y is of shape \(119,\)"),
    (X_, Y_.astype(str).astype(object) + "a", "y must be numbers"),
    (X_[:, 0], Y_, r"x is of shape \(120,\)"),
    (X_[:20], Y_[:20], "there are 20 rows; expected at least 30"),
  ],
)
def test_bad_data(x, y, message):
  with pytest.raises(UserError, match=message):
    estimator().fit(x, y)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"levels": (0.5, 0.1)}, "levels 0.5, 0.1 are out of order"),
    ({"levels": (0.5, 0.5)}, "out of order"),
    ({"levels": (0.0, 0.5)}, "expected numbers between 0 and 1"),
    ({"levels": (0.5, 1.0)}, "expected numbers between 0 and 1"),
    ({"levels": (0.5, np.nan)}, "expected numbers between 0 and 1"),
    ({"levels": ()}, "expected numbers between 0 and 1"),
    ({"learners": ("RF", "RFX")}, "learners: 'RFX' is unknown"),
    ({"learners": ()}, "expected at least one"),
    ({"calibration": "cqrr"}, "calibration: 'cqrr' is unknown; did you mean cqr"),
    ({"resolution": "finest"}, "resolution: 'finest' is unknown"),
    ({"folds": 1}, "folds is 1; expected at least 2"),
  ],
)
def test_bad_settings(arguments, message):
  with pytest.raises(UserError, match=message):
    estimator(**arguments)


def test_not_fitted_and_too_few_calibration_rows():
  with pytest.raises(UserError, match="not fitted"):
    estimator().predict(X_)
  with pytest.raises(UserError, match="24 rows; level 0.01 needs at least 99"):
    estimator((0.01, 0.5), calibration="cqr").fit(X_, Y_)
  with pytest.raises(UserError, match="coverage is 90"):
    estimator().predict_interval(X_, 90)


def test_a_table_from_the_command_line(tmp_path):
  lines = ["a,b,y", *[f"{a},{b},{y}" for (a, b), y in zip(*table())]]
  (tmp_path / "my.csv").write_text("\n".join(lines))
  command = [sys.executable, "-m", "projects.quantile_aggregation.main", "--outcome=y"]
  command += [f"--data={tmp_path / 'my.csv'}", f"--workdir={tmp_path / 'out'}"]
  command += ["--learners=RF,LQR", "--resolution=coarse", "--nolocal", "--folds=2"]
  command += ["--levels=0.1,0.5,0.9", "--covariates=a,b"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "Quantiles of y on 12 test rows" in done.stdout and "aggregate" in done.stdout
  written = np.genfromtxt(tmp_path / "out" / "quantiles.csv", delimiter=",", names=True)
  assert written.dtype.names == ("q01", "q05", "q09") and len(written) == 120
  assert (tmp_path / "out" / "quantiles.png").stat().st_size > 0


# The experiment.


def test_the_signed_rank_test():
  """Of n differences that are all below 0 the exact p-value is 2^-n."""
  assert experiment.rank_test(-np.arange(1.0, 5)) == pytest.approx(1 / 16)
  assert experiment.rank_test(np.arange(1.0, 5)) == 1
  assert experiment.rank_test(np.array([3.0, -1, -2, -4])) == pytest.approx(5 / 16)
  assert experiment.rank_test(np.zeros(4)) == 1


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("sets", ("yachts",), "sets has 'yachts'"),
    ("learners", ("CNG",), "learners has 'CNG'"),
    ("forms", ("local medium", "local big"), "forms has 'local big'"),
    ("aggregator", "local fine", "aggregator is 'local fine'"),
    ("margins", "wide", "margins is 'wide'"),
    ("levels", 4, "expected an odd number"),
  ],
)
def test_a_bad_config(field, value, message):
  settings_ = config.get_config("tiny")
  settings_[field] = value
  with pytest.raises(UserError, match=message):
    experiment.check(settings_)


def test_presets_are_valid():
  for preset in config.PRESETS:
    experiment.check(config.get_config(preset))


def test_tiny_run(tmp_path, monkeypatch):
  """Also with a set that is not there: the others run, and a table says why."""
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path / "nothing"))
  settings_ = config.get_config("tiny")
  settings_.sets = ("yacht", "diabetes")
  report = experiment.run(settings_, tmp_path)
  not_run, relative, scores, intervals, experts = report.tables
  assert not_run.rows[0][0] == "yacht" and "FLAXWORKS_DATA" in not_run.rows[0][1]
  names = [row[0] for row in relative.rows]
  assert names[:2] == ["CGN", "RF"] and {"average", "QRA", "local medium", "DQA + CV+"} <= {*names}
  values = np.array([row[1:] for row in scores.rows], float)
  assert np.isfinite(values).all() and (values[:, :2] > 0).all()
  np.testing.assert_allclose(values[:, 1], 2 * values[:, 0], rtol=1e-5)
  assert len(report.claims) == 11 and len(intervals.rows) == 1
  assert min(row[1] for row in experts.rows) == experts.rows[-1][1]  # The truth.
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
