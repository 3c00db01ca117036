"""In-context uncertainty: Bayes against libraries and brute force, the model, the tiny run."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor

from common.compilation.topology import tpu_slice
from common.errors import UserError
from projects.icl_uncertainty import bayes, comparators, config, experiment, tables
from projects.icl_uncertainty.compile_steps import compile_steps
from projects.icl_uncertainty.estimator import InContextRegressor
from projects.icl_uncertainty.icl_uncertainty import (
  Architecture,
  abstract_transformer,
  alternate,
  init_states,
  make_chunk,
  merge,
  sample_batches,
)
from projects.icl_uncertainty.metrics import Prediction, gaussian_nll, icl_score
from projects.icl_uncertainty.prompts import (
  FiniteNoise,
  InverseGammaNoise,
  PromptDistribution,
  UniformNoise,
  sample_prompts,
)

N, T, D = 64, 10, 2  # Prompts, labels, covariates: of the tiny preset, so that shapes recur.
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, T, D))
SIGMA = RNG.uniform(0.1, 1, N)
Y = np.einsum("ntd,nd->nt", X, RNG.standard_normal((N, D))) + SIGMA[:, None] * RNG.standard_normal(
  (N, T)
)
PRIOR = comparators.PriorKnowledge(0.1, 1.0, 0.37, 1.0)
UNIFORM = UniformNoise(0.1, 1.0)


@pytest.fixture(autouse=True, scope="module")
def x64():
  with jax.enable_x64(True):
    yield


def over_prompts(function):
  """The function of one prompt's moments, jitted over prompts (x, y)."""
  one = lambda x, y: function(bayes.prefix_moments(x, y))
  return jax.jit(jax.vmap(one))


def on_grid(noise, size):
  sigmas, log_prior = (jnp.asarray(a) for a in noise.grid(size))
  grid = (sigmas, log_prior, noise.weight_sd(sigmas))
  return over_prompts(lambda moments: bayes.grid_bayes(moments, *grid))


def source(**changes) -> PromptDistribution:
  """Typed leaves: one compilation for all changes."""
  made = PromptDistribution(UNIFORM, pool_key=0)._replace(**changes)
  made = jax.tree.map(np.float32, made)
  return made._replace(pool_key=jax.random.key(7), pool_size=np.uint32(made.pool_size))


@jax.jit
def sample(key, source):
  return sample_prompts(key, source, 4000, T, D)


def draw(**changes):
  return jax.tree.map(np.asarray, sample(jax.random.key(1), source(**changes)))


@pytest.fixture(scope="module")
def grid_prediction():
  predict = on_grid(UNIFORM, 50)
  return lambda x, y: jax.tree.map(np.asarray, predict(x, y))


def test_one_grid_point_is_ridge_with_the_direct_inverse():
  """And without enough labels, and at t = 1."""
  sigma = 0.5
  found = on_grid(FiniteNoise(np.array([sigma])), 1)(X, Y)
  for t in (1, 4, T):
    x, y, query = X[0, : t - 1], Y[0, : t - 1], X[0, t - 1]
    mean, covariance = 0.0, np.linalg.inv(np.eye(D) + x.T @ x / sigma**2)
    if t > 1:
      mean = Ridge(alpha=sigma**2, fit_intercept=False).fit(x, y).predict(query[None])[0]
    np.testing.assert_allclose(found.mean[0, t - 1], mean, atol=1e-9)
    np.testing.assert_allclose(found.sd[0, t - 1] ** 2, sigma**2 + query @ covariance @ query)


def test_the_evidence_is_that_of_a_multivariate_normal():
  sigma, weight_sd = 0.3, 1.7
  one = lambda moments: bayes.known_noise(moments, jnp.array(sigma), jnp.array(weight_sd))[1]
  found = over_prompts(one)(X[:1], Y[:1])[0]
  for t in (2, T):
    x, y = X[0, : t - 1], Y[0, : t - 1]
    normal = scipy.stats.multivariate_normal(cov=weight_sd**2 * x @ x.T + sigma**2 * np.eye(t - 1))
    np.testing.assert_allclose(found[t - 1], normal.logpdf(y))


def test_grid_agrees_with_students_t_under_the_conjugate_prior():
  noise = InverseGammaNoise(3.0, 0.5)
  grid = on_grid(noise, 2000)(X, Y)
  exact = over_prompts(lambda moments: bayes.student_t(moments, 3.0, 0.5))(X, Y)
  np.testing.assert_allclose(grid.mean, exact.mean, atol=1e-3)
  np.testing.assert_allclose(grid.sd, exact.sd, rtol=1e-3)
  # Student's t of scikit's kind: the density's own variance, at the last position of one prompt.
  x, y, query = X[0, :-1], Y[0, :-1], X[0, -1]
  covariance = np.linalg.inv(np.eye(D) + x.T @ x)
  m = covariance @ x.T @ y
  a = 3 + (T - 1) / 2
  b = 0.5 + (y @ y - m @ np.linalg.solve(covariance, m)) / 2
  t = scipy.stats.t(2 * a, query @ m, np.sqrt(b / a * (1 + query @ covariance @ query)))
  np.testing.assert_allclose([exact.mean[0, -1], exact.sd[0, -1]], [t.mean(), t.std()])


def test_without_context_bayes_is_the_prior(grid_prediction):
  found = grid_prediction(X, Y)
  sigmas, log_prior = UNIFORM.grid(50)
  expected = np.sum(np.exp(log_prior) * sigmas**2) + np.sum(X[:, 0] ** 2, axis=-1)
  np.testing.assert_allclose(found.mean[:, 0], 0, atol=1e-12)
  np.testing.assert_allclose(found.sd[:, 0] ** 2, expected)


def test_bayes_ignores_the_order_of_the_context_and_rotations(grid_prediction):
  rotation = scipy.stats.ortho_group(D, seed=0).rvs()
  order = np.append(RNG.permutation(T - 1), T - 1)
  base = grid_prediction(X, Y)
  permuted = grid_prediction(X[:, order], Y[:, order])
  rotated = grid_prediction(X @ rotation, Y)
  for field in ("mean", "sd"):
    np.testing.assert_allclose(getattr(permuted, field)[:, -1], getattr(base, field)[:, -1])
    np.testing.assert_allclose(getattr(rotated, field), getattr(base, field), atol=1e-9)


def test_the_predictive_variance_falls_towards_the_noise(grid_prediction):
  sd = grid_prediction(X, Y).sd
  explained = np.mean(sd**2 - SIGMA[:, None] ** 2, axis=0)
  assert explained[0] > explained[3] > abs(explained[-1])


def test_a_mixture_keeps_the_law_of_total_variance():
  log_weights, means = RNG.standard_normal((2, 5, 3))
  variances = RNG.uniform(0.1, 1, (5, 3))
  weights = np.exp(log_weights) / np.exp(log_weights).sum(0)
  found = jax.jit(bayes.mixture)(log_weights, means, variances)
  second_moment = (weights * (variances + means**2)).sum(0)
  np.testing.assert_allclose(found.sd**2 + found.mean**2, second_moment)


def test_the_negative_log_likelihood_is_least_at_the_error_and_at_bayes():
  error = Y - 0.3
  best = np.sqrt(np.mean(error**2))
  nll = jax.jit(gaussian_nll)
  at = lambda sd: nll(Prediction(np.full_like(Y, 0.3), np.full_like(Y, sd)), Y).mean()
  assert at(best) < min(at(0.97 * best), at(1.03 * best))
  # Bayes is the best on average: every comparator is worse by more than four standard errors. Late
  # positions only: the error of least squares with as many labels as covariates has no variance.
  settings = config.get_config("tiny")
  settings.grid = 50
  batch = jax.tree.map(lambda leaf: np.asarray(leaf)[None], draw())
  found = experiment.references(settings, batch)
  best = nll(found.pop(tables.BAYES), batch.y)
  for name, prediction in found.items():
    gap = np.mean((nll(prediction, batch.y) - best)[0, :, 5:], axis=-1)
    assert gap.mean() > 4 * scipy.stats.sem(gap), name


def test_a_pool_of_one_knows_its_task_and_a_pool_is_brute_force():
  weights, sigmas = RNG.standard_normal((3, D)), np.array([0.2, 0.5, 0.9])
  pool_bayes = jax.jit(bayes.pool_bayes)
  one = pool_bayes(X[0], Y[0], weights[:1], sigmas[:1])
  np.testing.assert_allclose(one.mean, X[0] @ weights[0])
  np.testing.assert_allclose(one.sd, 0.2)
  three = pool_bayes(X[0], Y[0], weights, sigmas)
  likelihood = [
    scipy.stats.norm(X[0, :4] @ w, s).pdf(Y[0, :4]).prod() for w, s in zip(weights, sigmas)
  ]
  posterior = likelihood / np.sum(likelihood)
  means = weights @ X[0, 4]
  mean = posterior @ means
  np.testing.assert_allclose(three.mean[4], mean)
  np.testing.assert_allclose(three.sd[4] ** 2, posterior @ (sigmas**2 + means**2) - mean**2)


def test_comparators_agree_with_scikit_learn():
  wide = PRIOR._replace(low=0.0, high=np.inf)
  ols = over_prompts(lambda moments: comparators.least_squares(moments, X[0], wide))(X[:1], Y[:1])
  x, y, query = X[0, :-1], Y[0, :-1], X[0, -1:]
  model = LinearRegression(fit_intercept=False).fit(x, y)
  residual = y - model.predict(x)
  variance = residual @ residual / (len(y) - D) * (1 + query @ np.linalg.inv(x.T @ x) @ query.T)
  np.testing.assert_allclose(ols.mean[0, -1], model.predict(query)[0])
  np.testing.assert_allclose(ols.sd[0, -1] ** 2, variance[0, 0])
  # One label and two covariates: of minimum norm.
  np.testing.assert_allclose(ols.mean[0, 1], np.linalg.pinv(X[0, :1]) @ Y[0, :1] @ X[0, 1])
  nearest = jax.jit(lambda x, y: comparators.nearest_neighbours(x, y, PRIOR, 5))
  neighbours = nearest(X[0], Y[0])
  expected = KNeighborsRegressor(5).fit(x, y).predict(query)
  np.testing.assert_allclose(neighbours.mean[-1], expected[0])
  np.testing.assert_allclose(neighbours.mean[:5], 0)


def test_the_plug_in_noise_is_ridges_with_its_own_degrees_of_freedom():
  @jax.jit
  def plug_in(prior):
    return comparators.ridge_plug_in(bayes.prefix_moments(X[0], Y[0]), prior)

  found = plug_in(PRIOR._replace(low=0.0, high=np.inf))
  x, y, query = X[0, :-1], Y[0, :-1], X[0, -1]
  hat = x @ np.linalg.inv(x.T @ x + 0.37 * np.eye(D)) @ x.T
  variance = np.sum((y - hat @ y) ** 2) / (len(y) - np.trace(hat))
  covariance = np.linalg.inv(np.eye(D) + x.T @ x / variance)
  np.testing.assert_allclose(found.mean[-1], query @ covariance @ x.T @ y / variance)
  np.testing.assert_allclose(found.sd[-1] ** 2, variance + query @ covariance @ query)
  kept = plug_in(PRIOR._replace(low=1.5, high=2.0))
  assert np.all(kept.sd[1:] >= 1.5) and np.any(found.sd[1:] < 1.5)


def test_prompts_have_the_distribution_that_was_asked_for():
  plain = draw()
  # 80,000 standard normals: standard errors of 0.0035 and 0.0025.
  assert abs(plain.x.mean()) < 0.015 and abs(plain.x.std() - 1) < 0.015
  residual = (plain.y - plain.truth) / plain.sigma[:, None]
  assert abs(residual.mean()) < 0.02 and abs(residual.std() - 1) < 0.02
  assert scipy.stats.kstest(plain.sigma, scipy.stats.uniform(0.1, 0.9).cdf).pvalue > 1e-3
  assert scipy.stats.kstest(plain.weights.ravel(), "norm").pvalue > 1e-3
  assert len(np.unique(plain.sigma)) > 3990 and plain.counted.all()

  pool = draw(pool_size=8)
  assert len(np.unique(pool.sigma)) == len(np.unique(pool.weights[:, 0])) == 8
  scaled = draw(weight_scale=2.0, covariate_scale=(2.0, 2.0), covariate_shift=(3.0, 3.0))
  np.testing.assert_allclose(scaled.weights, 2 * plain.weights, rtol=1e-6)
  mean = (scaled.x - 2 * plain.x).mean(axis=1)
  np.testing.assert_allclose(np.linalg.norm(mean, axis=-1), 3, rtol=1e-4)
  meta = draw(covariate_scale=(0.5, 2.5), length=(1, 4))
  scale = np.linalg.norm(meta.x, axis=(1, 2)) / np.linalg.norm(plain.x, axis=(1, 2))
  assert scipy.stats.kstest(scale, scipy.stats.uniform(0.5, 2).cdf).pvalue > 1e-3
  assert set(meta.counted.sum(axis=1)) == {1, 2, 3, 4}


@pytest.mark.parametrize("noise", [FiniteNoise(np.array([0.2, 0.7])), InverseGammaNoise(3.0, 0.5)])
def test_the_grid_has_the_moments_of_the_noise(noise):
  sigmas, log_prior = noise.grid(400)
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = np.asarray(jax.jit(jax.vmap(noise.sample))(keys))
  np.testing.assert_allclose(np.exp(log_prior).sum(), 1)
  standard_error = scipy.stats.sem(drawn)
  assert abs(np.exp(log_prior) @ sigmas - drawn.mean()) < 4 * standard_error


def random_params(architecture):
  """Random leaves, kernels as large as at the start; one seed. Nothing is compiled for it."""
  shapes = abstract_transformer(architecture)[1]
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.standard_normal((1, *leaf.shape), np.float32) / leaf.shape[0] ** 0.5
  return jax.tree.map(draw, shapes)


@pytest.mark.parametrize("merged", [True, False])
def test_outputs_see_only_what_came_before(merged):
  """Also through the window: of the last S tokens of one layer."""
  architecture = Architecture(D, T, 8, 1, 2, window=4, merged_tokens=merged)
  params = random_params(architecture)
  s, x, y = 4, np.float32(X[:1]), np.float32(Y[:1])
  model = lambda x, y: jax.tree.map(
    lambda a: np.asarray(a[0]), experiment.predict(architecture, params, x[None], y[None])
  )
  base = model(x, y)
  t = np.arange(T)
  later = model(x + np.float32(t > s)[:, None], y + np.float32(t >= s))
  for a, b in zip(base, later):
    np.testing.assert_array_equal(a[:, : s + 1], b[:, : s + 1])
  assert not np.allclose(base.mean[:, s + 1], later.mean[:, s + 1])
  first = model(x + np.float32(t == 0)[:, None], y)
  seen = 5 if merged else 2  # Outputs that see the first x: merged, two tokens have it.
  np.testing.assert_array_equal(base.mean[:, seen:], first.mean[:, seen:])
  assert not np.allclose(base.mean[:, seen - 1], first.mean[:, seen - 1])
  assert np.all(base.sd > 0)


def test_tokens():
  x, y = jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), jnp.array([[5.0, 6.0]])
  np.testing.assert_array_equal(merge(x, y), [[[1, 2, 0, 0, 0], [3, 4, 1, 2, 5]]])
  np.testing.assert_array_equal(alternate(x, y), [[[1, 2], [5, 0], [3, 4], [6, 0]]])


def test_icl_score_is_the_slope():
  sigma = np.linspace(0.1, 1, 20)
  np.testing.assert_allclose(icl_score(0.7 * sigma + 0.3, sigma), 0.7)
  np.testing.assert_allclose(icl_score(np.full(20, 0.5), sigma), 0, atol=1e-12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  with jax.enable_x64(False):
    folder = tmp_path_factory.mktemp("icl_uncertainty")
    return experiment.run(config.get_config("tiny"), folder), folder


def test_tiny_run_end_to_end(tiny):
  report, folder = tiny
  assert len(report.claims) == 8
  assert all(np.isfinite(claim.mean) for claim in report.claims)
  assert {figure.path for figure in report.figures} == {p.name for p in folder.glob("*.png")}
  table = report.tables[0]
  rows = {row[0]: row[1:] for row in table.rows}
  assert rows["Bayes"][4] == 0 and 0.9 < rows["Bayes"][5] < 1
  assert rows[tables.MEAN_ONLY][2:] == [None] * 5
  # The in-weight predictor has no noise to follow.
  assert rows["in-weight"][4] > rows["ridge, plug-in sigma"][4] > 0


def test_a_second_run_trains_nothing_again(tiny, monkeypatch):
  report, folder = tiny
  monkeypatch.setattr(experiment, "train", lambda *_, **__: pytest.fail("trained again"))
  with jax.enable_x64(False):
    again = experiment.run(config.get_config("tiny"), folder)
  # As text, in which NaN equals NaN.
  assert repr(again) == repr(report)


def test_steps_lower_the_loss_and_the_mean_only_loss_leaves_the_sd_alone(tiny):
  """With the program that the tiny run compiled: 2 models, 10 steps of 8 prompts of 9 labels."""
  with jax.enable_x64(False):
    settings = config.get_config("tiny")
    model = experiment.models(settings)[tables.FRESH]
    state = init_states(model.architecture, model.training, experiment.seed_keys(settings, 1))
    prompts = sample_batches(
      state.key,
      0,
      experiment.distribution(settings, 0),
      steps=settings.chunk,
      training=model.training,
      dim=D,
    )
    chunk = make_chunk(model.architecture, model.training)
    head = lambda state: np.asarray(state.params["project_out"]["kernel"][...])
    before, losses = head(state), []
    for _ in range(3):
      state, metrics = chunk(state, prompts, True)
      losses.append(np.asarray(metrics["loss"]))
    # Weight decay shrinks all of the head alike, and nothing else moves the sd's column.
    kept = head(state)[..., 1] / before[..., 1]
    np.testing.assert_allclose(kept, kept[0, 0], rtol=1e-5)
    assert 0.9 < kept[0, 0] < 1
    assert np.all(losses[-1] < losses[0])
    before = head(state)
    state, _ = chunk(state, prompts, False)
    assert np.all(np.any(head(state) != before, axis=1))


def test_estimator_predicts_trains_once_and_refuses_bad_input(monkeypatch, tmp_path):
  def untrained(settings, chosen):
    return {name: random_params(model.architecture) for name, model in chosen.items()}

  # The tiny run trains; here only what is kept and what is answered matters.
  monkeypatch.setattr("projects.icl_uncertainty.estimator.fit", untrained)
  monkeypatch.setenv("FLAXWORKS_CACHE", str(tmp_path))
  with jax.enable_x64(False):
    settings = config.get_config("tiny")
    settings.seed = 3
    with pytest.raises(UserError, match="fit"):
      InContextRegressor(settings).predict(X[0, :3], Y[0, :3], X[0, 3:5])
    model = InContextRegressor(settings).fit()
    mean, sd = model.predict(X[0, :3], Y[0, :3], X[0, 3:5])
    assert mean.shape == sd.shape == (2,) and np.all(sd > 0)
    monkeypatch.setattr("projects.icl_uncertainty.estimator.fit", None)  # Not to be called again.
    again = InContextRegressor(settings).fit().predict(X[0, :3], Y[0, :3], X[0, 3:5])
    np.testing.assert_array_equal(mean, again[0])
    for arguments, message in [
      ((X[0, :3, :1], Y[0, :3], X[0, 3:5]), "2 covariates"),
      ((X[0, :3], Y[0, :2], X[0, 3:5]), "expected x_context"),
      ((X[0, :9], Y[0, :9], X[0, 3:5]), "fewer than 9"),
      ((X[0, :3], np.array([0, np.nan, 1]), X[0, 3:5]), "missing"),
    ]:
      with pytest.raises(UserError, match=message):
        model.predict(*arguments)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("noise", "cauchy", "expected uniform"),
    ("noise_low", 2.0, "noise_low < noise_high"),
    ("length", 4, "length=4"),
    ("longest", 9, "must exceed"),
    ("pools", (0,), "at least 1"),
    ("neighbours", 1, "neighbours=1"),
    ("num_heads", 3, "multiple of num_heads"),
    ("window", -1, "window=-1"),
    ("chunk", 7, "multiple of chunk"),
  ],
)
def test_a_config_that_cannot_run_is_one_clear_line(field, value, message, tmp_path):
  settings = config.get_config("tiny")
  settings[field] = value
  with pytest.raises(UserError, match=message):
    experiment.run(settings, tmp_path)


def test_paper_steps_are_abstract_and_cut_over_the_slice():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  with jax.enable_x64(False):
    settings = config.get_config("paper")
    settings.num_layers = 1  # All are alike.
    steps = compile_steps(settings, tpu_slice("v5e:2x2").devices)
  assert [step.name.split()[0].strip(",") for step in steps] == ["draw", "train"]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
  prompts = steps[1].arguments[1]
  assert prompts.x.shape == (500, 64, 100, 8)
  assert prompts.x.sharding.shard_shape(prompts.x.shape) == (500, 16, 100, 8)
