"""PRESTO: values of the reference code, the model's invariants, libraries, bad input, tiny run."""

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
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from statsmodels.miscmodels.ordinal_model import OrderedModel

from common.errors import UserError
from common.paths import data_dir
from common.reporting.report import Report
from projects.presto import appendix_e, config, data, experiment, likelihood, presto
from projects.presto.estimator import Presto
from projects.presto.metrics import paired_test, squared_calibration_error

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "presto" / "fixed_lambda_fits.npz")
X, Y = GOLDEN["X"], GOLDEN["y"] - 1
N, K = len(Y), 4
LAMBDAS = GOLDEN["centred_path_lambda"]


@pytest.fixture(autouse=True, scope="module")
def x64():
  with jax.enable_x64(True):
    yield


def fit(x, y, lambdas, weights=None, block_weights=(1.0, 1.0, 1.0), **changes):
  """A path as NumPy arrays. Always 6 penalties and all arguments given: one compilation."""
  padded = np.concatenate([lambdas, np.full(6 - len(lambdas), lambdas[-1])])
  arguments = {"l1_ratio": 1.0, "tolerance": 1e-8} | changes
  weights = np.ones(len(y)) if weights is None else weights
  path = presto.fit_path(
    jnp.asarray(x),
    jnp.asarray(y),
    jnp.asarray(weights, float),
    jnp.asarray(padded),
    num_classes=K,
    block_weights=jnp.asarray(block_weights),
    **{name: jnp.asarray(value) for name, value in arguments.items()},
  )
  return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(lambdas)], path)


@pytest.fixture(scope="module")
def model():
  return Presto(num_lambdas=6, smallest_ratio=0.01, folds=3).fit(X, GOLDEN["y"])


def mean_loss(x, y, intercepts, slopes, weights=None):
  """The plain formula: -mean log of differences of sigmoids."""
  below = 1 / (1 + np.exp(-(intercepts + x @ slopes.T)))
  probability = np.diff(below, axis=1, prepend=0, append=1)[np.arange(len(y)), y]
  return -np.average(np.log(probability), weights=weights)


@pytest.mark.parametrize("which", ["centred", "shifted"])
def test_the_reference_codes_path(which):
  """Its own tolerance is a relative change of 1e-8 in the log-likelihood: 1e-6 there, and about the
  square root of it in the coefficients."""
  x = X + (GOLDEN["shift"] if which == "shifted" else 0)
  gold = {
    name: GOLDEN[f"{which}_path_{name}"] for name in ("lambda", "loglik", "psi", "intercepts")
  }
  path = fit(x, Y, gold["lambda"])
  assert path.converged.all() and path.kkt_residual.max() <= 1e-8
  largest = presto.largest_lambda(x, Y, np.ones(N), num_classes=K)
  assert float(largest) == pytest.approx(gold["lambda"][0], rel=1e-10)
  np.testing.assert_allclose(path.log_likelihood, gold["loglik"], rtol=1e-6)
  np.testing.assert_allclose(path.differences, gold["psi"], atol=5e-4)
  legacy = presto.legacy_intercepts(path, x.mean(axis=0))
  np.testing.assert_allclose(legacy, gold["intercepts"], atol=5e-4)
  # The right intercepts reproduce the fit's likelihood; the reference's own do not when shifted.
  for i in range(6):
    loss = mean_loss(x, Y, path.intercepts[i], path.slopes[i])
    assert -N * loss == pytest.approx(path.log_likelihood[i], rel=1e-10)
  wrong = -N * mean_loss(x, Y, legacy[3], path.slopes[3])
  assert (wrong < path.log_likelihood[3] - 10) == (which == "shifted")
  # The objective is no worse than the reference's.
  sd = x.std(axis=0)
  penalty = lambda psi: gold["lambda"] * np.abs(psi * sd).sum(axis=(1, 2))
  ours = penalty(path.differences) - path.log_likelihood / N
  theirs = penalty(gold["psi"]) - gold["loglik"] / N
  assert (ours <= theirs + 1e-9).all()


def test_the_reference_codes_ridge():
  path = fit(X, Y, GOLDEN["centred_ridge_lambda"], l1_ratio=0.0)
  assert path.converged.all()
  np.testing.assert_allclose(path.differences, GOLDEN["centred_ridge_psi"], atol=5e-4)
  np.testing.assert_allclose(path.log_likelihood, GOLDEN["centred_ridge_loglik"], rtol=1e-6)


def test_likelihood_derivatives():
  """Against automatic differentiation of the plain formula, where that is finite."""
  rng = np.random.default_rng(0)
  design = jnp.asarray(np.concatenate([np.ones((1, N)), X.T]))
  weights = jnp.asarray(rng.uniform(0, 1, N) * (rng.random(N) < 0.8))
  theta = jnp.asarray(np.concatenate([[[-1.0], [0.5], [2.0]], rng.normal(0, 0.1, (3, 4))], axis=1))

  def plain(theta):
    coefficients = jnp.concatenate([theta[:, :1], jnp.cumsum(theta[:, 1:], axis=0)], axis=1)
    below = jax.nn.sigmoid(coefficients @ design)
    edges = jnp.concatenate([jnp.zeros((1, N)), below, jnp.ones((1, N))])
    return -weights @ jnp.log(jnp.diff(edges, axis=0)[Y, jnp.arange(N)])

  @jax.jit
  def ours(theta):
    eta = likelihood.linear_predictors(design, theta)
    return [
      likelihood.negative_log_likelihood(eta, Y, weights),
      likelihood.score(design, eta, Y, weights),
      likelihood.information(design, eta, Y, weights),
    ]

  value, score, information = ours(theta)
  expected, gradient = jax.jit(jax.value_and_grad(plain))(theta)
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  np.testing.assert_allclose(score, gradient, rtol=1e-9, atol=1e-10)
  hessian = jax.jit(jax.hessian(plain))(theta).reshape(15, 15)
  np.testing.assert_allclose(information, hessian, rtol=1e-8, atol=1e-9)


def test_information_in_blocks_is_the_whole():
  """Enough observations for the blockwise sum, sorted so that whole blocks lack a class."""
  rng = np.random.default_rng(1)
  n = 3 * likelihood._BLOCK + 17
  design, weights = rng.normal(size=(3, n)), rng.random((2, n))
  weights[1, : 2 * likelihood._BLOCK] = 0
  expected = np.einsum("in,cn,jn->cij", design, weights, design)
  grams = likelihood._weighted_grams(jnp.asarray(design), jnp.asarray(weights))
  np.testing.assert_allclose(grams, expected, rtol=1e-10, atol=1e-9)


def test_crossed_boundaries_are_infinitely_unlikely_not_nan():
  eta, y = jnp.array([[1.0, 1.0, 40.0], [0.0, 800.0, 41.0]]), jnp.array([1, 0, 2])
  loss = jax.jit(functools.partial(likelihood.negative_log_likelihood, eta, y))
  assert np.isinf(loss(jnp.ones(3)))
  assert np.isfinite(loss(jnp.array([0.0, 1.0, 1.0])))  # Without weight it does not count.
  assert float(loss(jnp.array([0.0, 0.0, 1.0]))) == pytest.approx(41.0)  # Exact in the tail.


def test_largest_lambda_gives_class_frequencies():
  path = fit(X, Y, np.array([2.0, 1.001, 0.99]) * LAMBDAS[0])
  assert (path.differences[:2] == 0).all() and (path.differences[2] != 0).sum() == 1
  frequencies = np.bincount(Y) / N
  logits = np.log(np.cumsum(frequencies)[:-1] / (1 - np.cumsum(frequencies)[:-1]))
  np.testing.assert_allclose(path.intercepts[:2], [logits, logits], rtol=1e-12)
  eta = presto.linear_predictors(X, path.intercepts[0], path.slopes[0])
  np.testing.assert_allclose(likelihood.class_probabilities(eta)[0], frequencies, rtol=1e-12)


def test_without_penalty_it_is_maximum_likelihood():
  """Against BFGS on the plain formula, whose gradient tolerance is 1e-6."""

  def loss(parameters):
    with np.errstate(invalid="ignore", divide="ignore"):
      value = mean_loss(X, Y, parameters[:3], parameters[3:].reshape(3, 4))
    return value if np.isfinite(value) else 1e10

  start = np.concatenate([[-0.1, 1.9, 3.4], np.zeros(12)])
  best = optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-6})
  path = fit(X, Y, np.zeros(1))
  assert path.converged.all() and -path.log_likelihood[0] / N <= best.fun + 1e-12
  np.testing.assert_allclose(path.intercepts[0], best.x[:3], atol=2e-4)
  np.testing.assert_allclose(path.slopes[0].ravel(), best.x[3:], atol=2e-4)


def test_without_penalty_on_one_factor_it_is_separate_logistic_regressions():
  """With a saturated design both reproduce the cumulative shares of every level of the factor; in
  general they differ, for the joint likelihood is not the sum of the separate ones."""
  level = (X[:, 0] > 0).astype(float)
  x = np.stack([level, np.ones(N), np.ones(N), np.ones(N)], axis=1)  # Constants get no slope.
  path = fit(x, Y, np.zeros(1))
  assert path.converged.all() and (path.differences[0, :, 1:] == 0).all()
  for boundary in range(3):
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(level[:, None], Y <= boundary)
    assert path.intercepts[0, boundary] == pytest.approx(model.intercept_[0], abs=1e-4)
    assert path.slopes[0, boundary, 0] == pytest.approx(model.coef_[0, 0], abs=1e-4)


def test_infinite_penalty_on_differences_is_proportional_odds():
  """Against statsmodels, whose slopes have the other sign and whose gradient tolerance is 1e-8."""
  path = fit(X, Y, np.zeros(1), block_weights=(0.0, np.inf, np.inf))
  model = OrderedModel(Y, X, distr="logit")
  result = model.fit(method="bfgs", disp=False, gtol=1e-8)
  assert path.converged.all() and (path.differences[0, 1:] == 0).all()
  assert path.log_likelihood[0] == pytest.approx(result.llf, rel=1e-10)
  np.testing.assert_allclose(path.slopes[0], np.tile(-result.params[:4], (3, 1)), atol=1e-5)
  thresholds = model.transform_threshold_params(result.params)[1:-1]
  np.testing.assert_allclose(path.intercepts[0], thresholds, atol=1e-5)
  # The limit of large finite penalties.
  finite = fit(X, Y, np.ones(1), block_weights=(0.0, 1.0, 1.0))
  np.testing.assert_allclose(finite.slopes, path.slopes, atol=1e-7)


def test_two_classes_are_l1_logistic_regression():
  y = (Y > 1).astype(int)
  z = (X - X.mean(axis=0)) / X.std(axis=0)
  for lambda_ in (0.02, 0.0):
    path = presto.fit_path(z, y, np.ones(N), jnp.array([lambda_]), num_classes=2)
    # saga leaves the intercept free; liblinear would penalise it.
    model = LogisticRegression(
      l1_ratio=1.0, C=1 / (N * lambda_) if lambda_ else np.inf, solver="saga", tol=1e-10,
      max_iter=100_000,
    )  # fmt: skip
    model.fit(z, y == 0)
    assert path.converged.all()
    np.testing.assert_allclose(path.slopes[0], model.coef_, atol=1e-5)
    np.testing.assert_allclose(path.intercepts[0], model.intercept_, atol=1e-5)
  logit = presto.fit_logit(z, Y, np.ones(N), boundary=1)
  np.testing.assert_allclose(logit.slopes, path.slopes, atol=1e-10)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.3])
def test_kkt_conditions(l1_ratio):
  """By finite differences of the plain formula (error 1e-9 or less at steps of 1e-6)."""
  path = fit(X, Y, LAMBDAS, l1_ratio=l1_ratio)
  z = (X - X.mean(axis=0)) / X.std(axis=0)
  for lambda_, differences, intercepts, slopes in zip(
    path.lambdas, path.differences, path.intercepts, path.slopes
  ):
    psi, alpha = differences * X.std(axis=0), intercepts + slopes @ X.mean(axis=0)

    def loss(change, k, j, psi=psi, alpha=alpha):
      moved = psi.copy()
      moved[k, j] += change
      return mean_loss(z, Y, alpha, np.cumsum(moved, axis=0))

    for k, j in np.ndindex(psi.shape):
      score = (loss(1e-6, k, j) - loss(-1e-6, k, j)) / 2e-6
      score += lambda_ * (1 - l1_ratio) * psi[k, j]
      if psi[k, j] == 0:
        assert abs(score) <= lambda_ * l1_ratio + 1e-8
      else:
        assert score == pytest.approx(-lambda_ * l1_ratio * np.sign(psi[k, j]), abs=1e-8)


@settings(max_examples=10, deadline=None)
@given(
  scale=st.floats(0.01, 100),
  negative=st.booleans(),
  shift=st.floats(-100, 100),
  column=st.integers(0, 3),
)
def test_equivariance(scale, negative, shift, column):
  """Standardisation: a rescaled, shifted column changes its coefficients, not the predictions."""
  scale = -scale if negative else scale
  changed = X.copy()
  changed[:, column] = scale * X[:, column] + shift
  first, second = fit(X, Y, LAMBDAS), fit(changed, Y, LAMBDAS)
  factor = np.ones(4)
  factor[column] = scale
  # Each is within 1e-8 of optimality in the score; the smallest curvature is about 1e-3.
  np.testing.assert_allclose(second.differences * factor, first.differences, atol=1e-4)
  eta = presto.linear_predictors(X, first.intercepts, first.slopes)
  moved = presto.linear_predictors(changed, second.intercepts, second.slopes)
  np.testing.assert_allclose(moved, eta, atol=1e-4)


def test_weights_are_repetitions():
  """Also zero weights: rows that a fold holds out."""
  counts = np.random.default_rng(2).multinomial(N, np.full(N, 1 / N))
  rows = np.repeat(np.arange(N), counts)
  weighted = fit(X, Y, LAMBDAS, weights=counts)
  repeated = fit(X[rows], Y[rows], LAMBDAS)
  assert (counts == 0).any() and weighted.converged.all()
  np.testing.assert_allclose(weighted.slopes, repeated.slopes, atol=1e-5)
  np.testing.assert_allclose(weighted.log_likelihood, repeated.log_likelihood, rtol=1e-8)


def test_cross_validation_scores_held_out_rows(model):
  """Against one fit per fold, the fold held out by weights of zero."""
  folds = presto.random_folds(Y, 3, np.random.default_rng(0))
  scores = []
  for k in range(3):
    path = fit(X, Y, model.lambdas_, weights=folds != k)
    test = folds == k
    below = 1 / (1 + np.exp(-presto.linear_predictors(X[test], path.intercepts, path.slopes)))
    probabilities = np.diff(below, axis=2, prepend=0, append=1)
    scores.append(((probabilities - np.eye(K)[Y[test]]) ** 2).sum(axis=2).mean(axis=1))
  np.testing.assert_allclose(model.cv_scores_, scores, atol=1e-6)
  assert model.lambda_ == model.lambdas_[np.mean(scores, axis=0).argmin()]
  assert not np.array_equal(folds, presto.random_folds(Y, 3, np.random.default_rng(1)))
  np.testing.assert_array_equal(np.bincount(folds), [100, 100, 100])


def test_ties_choose_the_largest_penalty():
  scores = jnp.array([[3.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
  assert int(presto.CrossValidation(None, scores, None, None).best) == 1


def test_class_probabilities():
  eta = jnp.array([[-1.0, 0.5, 0.2, 900.0]])
  probability = likelihood.class_probabilities(eta)
  assert float(probability.sum()) == pytest.approx(1) and probability[0, 2] < 0
  assert 0 <= probability[0, 4] <= 1 and 0 <= probability[0, 0] <= 1


def test_separable_classes_do_not_converge():
  """The score vanishes in the limit, but there is no maximum: the certificate must not pass."""
  y = np.searchsorted([-0.5, 0.0, 0.5], X[:, 0])
  path = presto.fit_logit(X, y, np.ones(N), boundary=2)
  assert not path.converged.any()
  assert np.isfinite(path.slopes).all()


def test_estimator(model):
  assert model.coef_.shape == (3, 4) and model.intercept_.shape == (3,)
  assert model.cv_scores_.shape == (3, 6) and model.lambda_ in model.lambdas_
  assert model.kkt_residual_ <= 1e-8
  probability = model.predict_proba(X)
  np.testing.assert_allclose(probability.sum(axis=1), 1)
  np.testing.assert_allclose(
    probability[:, -1], 1 / (1 + np.exp(model.intercept_[-1] + X @ model.coef_[-1]))
  )
  np.testing.assert_array_equal(model.predict(X), 1 + probability.argmax(axis=1))
  with jax.enable_x64(False):  # As a user has it.
    np.testing.assert_array_equal(model.predict_proba(X), probability)


def test_labels_in_their_order():
  names = np.array(["rare", "none", "some", "more"])[(Y + 1) % 4]
  order = ["none", "some", "more", "rare"]
  with jax.enable_x64(False):  # As a user has it; the fit is in float64 all the same.
    model = Presto(LAMBDAS[3]).fit(X, names, classes=order)
  assert model.coef_.dtype == model.intercept_.dtype == np.float64
  reference = fit(X, Y, LAMBDAS[3:4])
  np.testing.assert_allclose(model.coef_, reference.slopes[0], atol=1e-5)
  assert set(model.predict(X)) <= set(order) and model.cv_scores_ is None


def changed_x(value):
  x = X.copy()
  x[5, 2] = value
  return x


@pytest.mark.parametrize(
  "x, y, classes, message",
  [
    (changed_x(np.nan), Y, None, "column 2 of x has 1 missing or infinite"),
    (changed_x(np.inf), Y, None, "column 2 of x has 1 missing or infinite"),
    (X * [1, 0, 1, 1], Y, None, "column 1 of x is constant"),
    (X[:, 0], Y, None, r"x is of shape \(300,\)"),
    (X.astype(str)[:, :1] + "a", Y, None, "x must be numbers"),
    (X, Y[1:], None, r"y is of shape \(299,\)"),
    (X, np.where(Y == 1, np.nan, Y), None, "missing or infinite labels"),
    (X, np.where(Y == 1, None, Y), None, "missing labels"),
    (X, np.minimum(Y, 1), None, "has 2 classes; expected at least 3"),
    (X, Y, [0, 1, 2, 3, 4], "class 4 has no observations"),
    (X, Y, [0, 1, 2], "the label .*3.*, which is not among the classes"),
    (X, np.where(np.arange(N) == 0, 9, Y), None, "the rarest class has 1 observations"),
  ],
)
def test_bad_data(x, y, classes, message):
  with pytest.raises(UserError, match=message):
    Presto(num_lambdas=6, folds=3).fit(x, y, classes)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"lambdas": [0.01, 0.1]}, "out of order; expected decreasing"),
    ({"lambdas": [0.1, 0.1]}, "out of order"),
    ({"lambdas": [0.1, -0.1]}, "expected finite penalties, at least 0"),
    ({"lambdas": []}, "expected finite penalties"),
    ({"l1_ratio": 1.5}, "l1_ratio is 1.5"),
    ({"folds": 1}, "at least 2 folds"),
  ],
)
def test_bad_settings(arguments, message):
  with pytest.raises(UserError, match=message):
    Presto(**arguments)


def test_no_convergence_is_an_error(model):
  with pytest.raises(UserError, match="did not converge.* after 1 iterations"):
    Presto(LAMBDAS[5], max_iterations=1).fit(X, Y)
  with pytest.raises(UserError, match="not fitted"):
    Presto().predict(X)
  with pytest.raises(UserError, match="x has 3 columns; the model has 4"):
    model.predict(X[:, :3])


def test_calibration_error():
  """The invariants of a constant predictor, and of one that is right on average in each bin."""
  outcome = np.tile([0.0, 1, 0, 0, 1, 0, 0, 0, 0, 0], 20)
  constant = np.full(200, 0.2)
  shares = np.array([outcome[i : i + 20].mean() for i in range(0, 200, 20)])
  error = squared_calibration_error(outcome, constant)
  assert error == pytest.approx(np.mean((shares - 0.2) ** 2))
  probability = np.random.default_rng(0).permutation(np.repeat([0.0, 1.0], 100))
  assert squared_calibration_error(probability, probability, 2) == 0
  legacy = squared_calibration_error(probability, probability, 2, legacy_order=True)
  assert legacy == pytest.approx(np.mean((probability - np.sort(probability)) ** 2)) and legacy > 0
  # 7 rows in 3 bins: 3, 2, 2.
  small = squared_calibration_error(np.array([1, 0, 0, 1, 0, 1, 1]), np.arange(7) / 10, 3)
  shares = np.array([1, 1, 1, 1.5, 1.5, 3, 3]) / 3
  assert small == pytest.approx(np.mean((np.arange(7) / 10 - shares) ** 2))


def test_paired_test():
  result = paired_test([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 4.5])
  gain = np.array([1, 0, 2, 0.5])
  assert result.t == pytest.approx(gain.mean() / (gain.std(ddof=1) / 2))
  assert result.win_rate == 0.75 and 0 < result.p_value < 0.5


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_simulated_draws(kind):
  draw = data.simulate(kind, (0.0, 3.5, 5.5), np.random.default_rng(3))
  psi = np.diff(draw.slopes, axis=0, prepend=0)
  if kind == "sparse":
    assert set(psi[0]) <= {0.0, 0.5} and set(psi[1:].ravel()) == {-0.5, 0.0, 0.5}
  else:
    assert np.abs(psi).max() <= 0.5 and len(np.unique(psi)) == 30
  assert draw.x.shape == (2500, 10) and np.abs(draw.x).max() <= 1
  assert draw.probabilities.min() >= 0 and set(draw.y) == {0, 1, 2, 3}
  np.testing.assert_allclose(draw.probabilities.sum(axis=1), 1)
  last = draw.intercepts[-1] + draw.x @ draw.slopes[-1]
  np.testing.assert_allclose(draw.probabilities[:, -1], 1 / (1 + np.exp(last)))
  # Five standard errors of a share.
  shares, expected = np.bincount(draw.y) / 2500, draw.probabilities.mean(axis=0)
  assert (np.abs(shares - expected) < 5 * np.sqrt(expected / 2500)).all()
  with pytest.raises(ValueError, match="no valid draw"):
    data.simulate(kind, (0.0, 0.01, 0.02), np.random.default_rng(0))


def found(name):
  try:
    return data_dir(name)
  except UserError:
    return None


@pytest.mark.skipif(not (found("soup") and found("prediabetes")), reason="the data are not there")
def test_soup_and_prediabetes():
  soup = data.soup()
  assert soup.x.shape == (1847, 22)
  np.testing.assert_array_equal(np.bincount(soup.y), [869, 277, 98, 115, 260, 228])
  for age, diabetes, pre in ((30, 0.0092, 0.0036), (65, 0.5093, 0.0539)):
    set_ = data.prediabetes(age)
    assert set_.x.shape == (3059, 5)
    np.testing.assert_allclose(np.bincount(set_.y)[1:] / 3059, [pre, diabetes], atol=6e-5)
  train, test = data.train_test_split(soup.y, 0.1, np.random.default_rng(0))
  assert len(test) == 185 and sorted([*train, *test]) == list(range(1847))
  assert len(np.unique(soup.y[test])) == 6


def test_the_theorems_condition():
  """Two rows +-1 of one covariate: everything by hand."""
  x, intercepts = jnp.array([[1.0], [-1.0]]), jnp.array([0.0, jnp.inf])
  first = 1 / (1 + np.exp(-np.array([1.0, -1.0])))
  weight = (1 - first) * first
  expected = weight.mean() - 2 * (weight * [1, -1]).mean() ** 2 / weight.mean()
  value = appendix_e.smallest_eigenvalue(x, intercepts, jnp.ones(1))
  assert float(value) == pytest.approx(expected)
  assert float(appendix_e.rarest_allowed(0.6, 2.0)) == pytest.approx(0.6 / (3 * 4 * 4))
  slopes = jnp.array([1.0, -2.0])
  intercept = appendix_e.rare_intercept(1e-3, slopes, 3.0)
  corner = jnp.array([-3.0, 3.0])
  assert float(jax.nn.sigmoid(-(intercept + corner @ slopes))) == pytest.approx(1e-3)
  x, bound = appendix_e.normal_design(jax.random.key(0), 20_000, 2, 0.5)
  assert float(jnp.corrcoef(x.T)[0, 1]) == pytest.approx(0.5, abs=0.03)
  assert float(jnp.abs(x).max()) <= 3.0 and bound == pytest.approx(3 * 2**0.5)


def test_a_table_from_the_command_line(tmp_path):
  levels = np.array(["none", "some", "more", "rare"])[Y]
  header, rows = "a,b,c,d,level", [f"{','.join(map(str, x))},{y}" for x, y in zip(X, levels)]
  (tmp_path / "my.csv").write_text("\n".join([header, *rows]))
  command = [sys.executable, "-m", "projects.presto.main", f"--data={tmp_path / 'my.csv'}"]
  command += ["--outcome=level", f"--workdir={tmp_path / 'out'}", "--num_lambdas=6", "--folds=3"]
  run = functools.partial(subprocess.run, capture_output=True, text=True)
  done = run([*command, "--order=none,some,more,rare"])
  assert done.returncode == 0, done.stderr
  assert "(intercept)" in done.stdout and "KKT residual" in done.stdout
  written = np.genfromtxt(tmp_path / "out" / "probabilities.csv", delimiter=",", skip_header=1)
  np.testing.assert_allclose(written.sum(axis=1), 1, atol=1e-6)
  assert (tmp_path / "out" / "cross_validation.png").stat().st_size > 0
  done = run(command)
  assert done.returncode == 2 and "--order=" in done.stderr and done.stderr.count("\n") == 1


def test_without_the_data_sets_the_report_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path))
  report = Report(tables=[], figures=[], claims=[])
  experiment.real_data(config.get_config("default"), tmp_path, report)
  assert [table.title for table in report.tables][:2] == [
    "Not run: soup",
    "Not run: prediabetes, age 40",
  ]
  assert "FLAXWORKS_DATA" in report.tables[0].rows[0][0] and not report.claims


def test_tiny_run(tmp_path):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  # Without the data set its four claims are missing, and a table says why.
  assert len(report.claims) == (14 if found("prediabetes") else 10) and len(report.tables) == 3
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  errors = [row[3] for row in report.tables[0].rows]
  assert np.isfinite(errors).all() and min(errors) > 0
  assert all(row[-1] == 0 for row in report.tables[0].rows)
