"""CaPE: values of the official code, invariants, libraries, bad input, the tiny run."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from common.errors import UserError
from common.paths import data_dir
from common.reporting.report import Report
from projects.deep_probability import (
  cape,
  compile_steps,
  config,
  data,
  experiment,
  losses,
  metrics,
  posthoc,
  training,
)
from projects.deep_probability.estimator import CapeClassifier, stratified_split
from projects.deep_probability.networks import Network, Weights

GOLDEN = dict(
  np.load(
    pathlib.Path(__file__).parents[1]
    / "golden"
    / "deep_probability"
    / "cape_targets_losses_metrics.npz"
  )
)
Z, Y = GOLDEN["logits"][:, 1] - GOLDEN["logits"][:, 0], GOLDEN["y"]
P, P_TRUE = expit(Z), GOLDEN["p_true"]
N = len(Y)
BIN, KDE = jax.jit(cape.bin_targets), jax.jit(cape.kde_targets, static_argnums=3)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


# The method.


def test_targets_of_the_official_code(x64):
  """Up to the rounding of float64, as the kernel weights come from another exp."""
  q = BIN(P, Y, int(GOLDEN["n_bins"]))
  np.testing.assert_allclose(q, GOLDEN["targets_bin"], atol=1e-9)
  q = cape.kde_targets(
    jnp.asarray(P), jnp.asarray(Y), float(GOLDEN["sigma"]), int(GOLDEN["window"])
  )
  np.testing.assert_allclose(q, GOLDEN["targets_kde"], atol=1e-9)


@pytest.mark.parametrize("bins", [1, 7, 15, N])
def test_bin_targets(x64, bins):
  """Against a loop, also where B does not divide n."""
  q = np.asarray(BIN(P, Y, bins))
  order = np.argsort(P)
  for b in range(bins):
    rows = order[b * N // bins : (b + 1) * N // bins]
    np.testing.assert_allclose(q[rows], Y[rows].mean(), rtol=1e-12)
  # Its mean is the base rate, as every bin's is its own.
  assert q.mean() == pytest.approx(Y.mean())
  if bins == 1:
    np.testing.assert_allclose(q, Y.mean())
  if bins == N:
    np.testing.assert_array_equal(q, Y)


def test_kde_targets(x64):
  """Wide kernels are moving averages of the window, narrow ones the outcome itself."""
  p, y = jnp.asarray(P), jnp.asarray(Y)
  order, wide = np.argsort(P), KDE(p, y, 1e6, 20)
  for i in (0, 7, 300, N - 1):
    window = order[max(i - 20, 0) : min(i + 20, N)]
    assert float(wide[order[i]]) == pytest.approx(Y[window].mean(), rel=1e-9)
  np.testing.assert_allclose(KDE(p, y, 1e-9, 20), Y, atol=1e-12)


def test_cross_entropy_with_soft_targets(x64):
  loss_and_gradient = jax.jit(
    lambda z, q: (cape.cross_entropy(z, q), jax.grad(lambda z: cape.cross_entropy(z, q).sum())(z))
  )
  assert float(loss_and_gradient(Z, Y)[0].mean()) == pytest.approx(log_loss(Y, P), rel=1e-12)
  np.testing.assert_allclose(loss_and_gradient(Z, P_TRUE)[1], P - P_TRUE, atol=1e-12)
  extreme = loss_and_gradient(np.where(np.arange(N) % 2, 900.0, -900.0), np.full(N, 0.3))[1]
  np.testing.assert_allclose(extreme[:2], [-0.3, 0.7])


def test_a_calibrated_network_stays(x64):
  """If p_hat is each bin's share, the mean gradient of a calibration epoch is 0 in every bin."""
  y = jnp.asarray(Y)
  shares = jnp.asarray(GOLDEN["targets_bin"])
  # Five levels, told apart inside a bin by less than rounding of the mean: order is kept.
  p_hat = shares + 1e-12 * jnp.asarray(P)
  q = BIN(p_hat, y, 5)
  gradient = np.asarray(p_hat - q)
  for level in np.unique(GOLDEN["targets_bin"]):
    assert abs(gradient[GOLDEN["targets_bin"] == level].mean()) < 1e-9


def test_the_alternation():
  kind = lambda targets, c: [int(cape.epoch_kind(targets, e, c)) for e in range(7)]
  assert kind(cape.BIN, 2) == [cape.BIN, 0, 0, cape.BIN, 0, 0, cape.BIN]
  assert kind(cape.KDE, 3) == [cape.KDE, 0, 0, 0, cape.KDE, 0, 0]
  assert kind(cape.BIN, 0) == [cape.BIN] * 7
  assert kind(cape.REDRAWN, 2) == [cape.REDRAWN] * 7 and kind(cape.LABELS, 2) == [0] * 7


# Losses of the baselines.


def test_losses_of_the_official_code(x64):
  """The official losses are float32: 1e-5."""

  @jax.jit
  def measured(z, y):
    ce = losses.focal(z, y, 0.0).mean()
    return {
      "focal_0": ce,
      "focal_2": losses.focal(z, y, 2.0).mean(),
      "entropy_reg_beta1": ce - losses.entropy(z).mean(),
      "mmce_beta3": ce + 3 * losses.mmce(z, y, 2.0),
    }

  for name, value in measured(Z[:64], Y[:64]).items():
    assert float(value) == pytest.approx(float(GOLDEN[name]), abs=1e-5), name


def test_mmce_as_defined(x64):
  """Against the plain double sum; all right, and a gradient at 0."""
  z, y = Z[:40], Y[:40]
  r, right = np.maximum(P[:40], 1 - P[:40]), (P[:40] > 0.5) == (y == 1)
  total = 0.0
  for i in range(40):
    for j in range(40):
      a, b = (((1 - r[k]) / right.sum()) if right[k] else -r[k] / (~right).sum() for k in (i, j))
      total += a * b * np.exp(-abs(r[i] - r[j]) / 0.4)
  value_and_gradient = jax.jit(jax.value_and_grad(losses.mmce))
  assert float(value_and_gradient(z, y)[0]) == pytest.approx(total**0.5, rel=1e-6)
  z, y = np.where(np.arange(40) % 2, 800.0, -800.0), np.arange(40) % 2
  value, gradient = value_and_gradient(z, y)
  assert float(value) == pytest.approx(1e-5) and np.isfinite(gradient).all()


def test_switched_off_losses_are_cross_entropy(x64):
  focal = jax.jit(lambda z, q: losses.focal(z, q, 0.0))
  ce = jax.jit(cape.cross_entropy)
  np.testing.assert_allclose(focal(Z, P_TRUE), ce(Z, P_TRUE), rtol=1e-12)
  network, x = Network("mlp", 3), np.random.default_rng(0).normal(size=(N, 3))
  weights = jax.jit(training.initialise, static_argnums=0)(network, jax.random.key(0))

  @jax.jit
  def gradient(recipe):
    return jax.tree.leaves(training._gradient(network, weights, x, P_TRUE, Y, recipe)[0])

  @jax.jit
  def expected():
    def loss(params):
      z = training.log_odds(network, Weights(params, weights.statistics), x, train=False)[0]
      return cape.cross_entropy(z, P_TRUE).mean()

    return jax.tree.leaves(jax.grad(loss)(weights.params))

  # The weights are float32.
  recipe = training.Recipe(0.1)
  for a, b in zip(gradient(recipe), expected()):
    np.testing.assert_allclose(a, b, atol=1e-6)
  # FGSM with the smallest step is the same too, and a real step is not; nor is any other loss.
  near = gradient(recipe._replace(adversarial_eps=1e-12))
  np.testing.assert_allclose(near[0], expected()[0], atol=1e-6)
  for changes in (
    {"adversarial_eps": 0.1},
    {"focal_gamma": 2.0},
    {"entropy_beta": 1.0},
    {"mmce_beta": 3.0, "mmce_power": 1.0},
  ):
    moved = gradient(recipe._replace(**changes))
    assert max(np.abs(a - b).max() for a, b in zip(moved, expected())) > 1e-4
  certain = jax.jit(jax.grad(lambda z: losses.focal(z, jnp.ones(1), 0.0).sum()))(np.array([900.0]))
  assert float(certain[0]) == 0.0


# Metrics.


def test_metrics_of_the_official_code():
  values = metrics.evaluate(P[None], Y[None], P_TRUE[None])
  for name in ("ECE", "MCE", "Brier", "AUC", "KS"):
    assert values[name][0] == pytest.approx(float(GOLDEN[name.lower()]), abs=1e-9)


def test_metrics():
  values = {k: v[0] for k, v in metrics.evaluate(P[None], Y[None], P_TRUE[None]).items()}
  observed, predicted = calibration_curve(Y, P, strategy="quantile", n_bins=15)
  assert values["ECE"] == pytest.approx(np.abs(observed - predicted).mean())
  assert values["NLL"] == pytest.approx(log_loss(Y, P))
  assert values["MSE_p"] == pytest.approx(np.mean((P - P_TRUE) ** 2))
  entropy = -(P_TRUE * np.log(P_TRUE) + (1 - P_TRUE) * np.log(1 - P_TRUE)).mean()
  assert values["CE to p"] == pytest.approx(values["KL(p, p_hat)"] + entropy)
  reverse = P * np.log(P / P_TRUE) + (1 - P) * np.log((1 - P) / (1 - P_TRUE))
  assert values["KL(p_hat, p)"] == pytest.approx(reverse.mean())
  # Of the truth itself, and of the certain forecasts of an overfitted network.
  exact = metrics.evaluate(P_TRUE[None], Y[None], P_TRUE[None])
  assert (
    max(exact["MSE_p"][0], abs(exact["KL(p, p_hat)"][0]), abs(exact["KL(p_hat, p)"][0])) < 1e-12
  )
  certain = metrics.evaluate((Z > 0)[None].astype(float), Y[None], P_TRUE[None])
  assert all(np.isfinite(value).all() for value in certain.values())


def test_brier_is_mse_p_and_noise():
  """E[Brier] = MSE_p + mean p (1 - p): within five standard errors of 400 draws."""
  y = np.random.default_rng(0).random((400, N)) < P_TRUE
  brier = ((P - y) ** 2).mean(axis=1)
  expected = np.mean((P - P_TRUE) ** 2) + np.mean(P_TRUE * (1 - P_TRUE))
  assert abs(brier.mean() - expected) < 5 * brier.std() / 20


def test_ks_of_a_constant_is_the_walk_of_the_labels():
  values = metrics.evaluate(np.full((1, N), Y.mean()), Y[None], P_TRUE[None])
  assert values["KS"][0] == pytest.approx(np.abs(np.cumsum(Y - Y.mean())).max() / N)


def test_bootstrap_intervals():
  """Brier's against its normal interval, within the noise of 1000 resamples."""
  intervals = metrics.with_intervals(P, Y)
  estimate, low, high = intervals["Brier"]
  error = np.std((P - Y) ** 2) / N**0.5
  assert estimate == pytest.approx(float(GOLDEN["brier"]))
  assert (low, high) == pytest.approx((estimate - 1.96 * error, estimate + 1.96 * error), rel=0.05)
  assert set(intervals) == {"Brier", "NLL", "ECE", "MCE", "KS"}


# Post-hoc calibration.


def test_calibrators_of_the_official_code():
  assert posthoc.fit_temperature(Z, Y) == pytest.approx(float(GOLDEN["temperature"]), abs=1e-3)
  np.testing.assert_allclose(posthoc.temperature(Z, Y)(Z), GOLDEN["temp_probs"][:, 1], atol=1e-3)
  np.testing.assert_allclose(posthoc.histogram_binning(Z, Y)(Z), GOLDEN["hist_pred"], atol=1e-9)
  weights, t = GOLDEN["ets_w"], GOLDEN["ets_t"][0]
  expected = weights @ np.stack([expit(Z / t), P, np.full(N, 0.5)])
  np.testing.assert_allclose(posthoc.ensemble_temperature(Z, Y)(Z), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["temperature", "Platt", "Dirichlet"])
def test_a_calibrator_does_not_raise_its_own_nll(name):
  # As many rows as the tiny run validates on: one compilation.
  p = posthoc.CALIBRATORS[name](Z[:100], Y[:100])(Z[:100])
  assert log_loss(Y[:100], p) < log_loss(Y[:100], P[:100])


def test_temperature_keeps_the_order():
  p = posthoc.temperature(Z, Y)(Z)
  assert roc_auc_score(Y, p) == roc_auc_score(Y, P)
  np.testing.assert_array_equal(p > 0.5, P > 0.5)
  # Outcomes drawn from the forecasts themselves need none: 1 within five standard errors.
  z = np.random.default_rng(1).normal(scale=2, size=20_000)
  y = (np.random.default_rng(2).random(len(z)) < expit(z)).astype(int)
  information = np.mean(z**2 * expit(z) * (1 - expit(z))) * len(z)
  assert abs(1 / posthoc.fit_temperature(z, y) - 1) < 5 / information**0.5


def test_dirichlet_reaches_platt():
  """With two classes and nearly no penalty it spans Platt scaling: 3000 small steps come close."""
  z, y = Z[:100], Y[:100]
  p = posthoc.dirichlet(z, y, penalty=1e-4)(z)
  assert log_loss(y, p) < log_loss(y, posthoc.platt(z, y)(z)) + 1e-3


def test_histogram_binning_without_points():
  z = np.array([-4.0, -4.0, 4.0, 4.0])
  calibrate = posthoc.histogram_binning(z, np.array([0, 1, 1, 1]))
  p = calibrate(np.array([-np.inf, -4.0, 0.0, 4.0]))
  np.testing.assert_allclose(p, [0.5, 0.5, 0.5, 1.0])
  # An empty bin keeps its centre.
  np.testing.assert_allclose(calibrate(np.array([np.log(0.25 / 0.75)])), [3.5 / 15])


# Data.


def test_risks():
  z = np.array([0.0, 19, 20, 40, 59, 80, 100])
  np.testing.assert_allclose(data.RISKS["discrete"](z), [0.1, 0.1, 0.3, 0.5, 0.5, 0.9, 0.9])
  np.testing.assert_allclose(data.RISKS["linear"](z), z / 100)
  np.testing.assert_allclose(data.RISKS["skewed"](z), z / 250)
  np.testing.assert_allclose(data.RISKS["centered"](z), z / 300 + 0.35)
  np.testing.assert_allclose(data.RISKS["sigmoid"](z), 1 - expit(25 * (z / 100 - 0.29)))


def test_draws():
  problem = data.digits("linear", train=200, validation=100)
  draws = data.draw(problem, 3, seed=0)
  for rows in zip(draws.train, draws.validation, draws.test):
    assert sorted(np.concatenate(rows)) == list(range(1797))
  assert not np.array_equal(draws.y[0], draws.y[1])
  # Five standard errors of a share.
  assert abs(draws.y.mean() - problem.p.mean()) < 5 * 0.5 / (3 * 1797) ** 0.5
  normal = data.high_dimensional(features=50)
  assert normal.x.shape == (3300, 50) and normal.p.std() > 0.2


def test_a_folder_of_faces(tmp_path):
  from PIL import Image

  for number in range(100):
    Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number + 10}_0_{number}.png")
  problem = data.faces(str(tmp_path), "linear", size=4)
  assert problem.x.shape == (100, 4, 4, 3) and problem.x.dtype == np.uint8
  assert (problem.train, problem.validation) == (60, 20)
  # The oldest are cut off at 100 years.
  ages = np.sort(problem.p * 100)
  np.testing.assert_allclose(ages, np.minimum(np.arange(10, 110), 100))
  Image.new("RGB", (8, 8)).save(tmp_path / "old.png")
  with pytest.raises(UserError, match="old.png does not begin with an age"):
    data.faces(str(tmp_path), "linear", size=4)
  with pytest.raises(UserError, match="--config.images=FOLDER"):
    data.faces("", "linear", size=4)
  with pytest.raises(UserError, match="has 0 .jpg and .png files"):
    data.faces(str(tmp_path / "none"), "linear", size=4)


# The estimator and the command.

ROWS = 240
X_USER = np.random.default_rng(3).normal(size=(ROWS, 4)).round(3)
Y_USER = (np.random.default_rng(4).random(ROWS) < expit(3 * X_USER[:, 0])).astype(int)
SMALL = {"hidden": (16,), "epochs": 15, "fine_tune_epochs": 15, "num_bins": 5}


@pytest.fixture(scope="module")
def split():
  return stratified_split(Y_USER, 0.25, np.random.default_rng([0, 1]))


@pytest.fixture(scope="module")
def model(split):
  return CapeClassifier(**SMALL).fit(X_USER[split[0]], Y_USER[split[0]])


def test_estimator(model, split):
  kept, test = split
  p = model.predict_proba(X_USER[test])
  np.testing.assert_allclose(p.sum(axis=1), 1)
  # It has learnt: far better than the base rate.
  assert log_loss(Y_USER[test], p[:, 1]) < 0.9 * log_loss(
    Y_USER[test], np.full(len(test), Y_USER[kept].mean())
  )
  np.testing.assert_array_equal(model.predict(X_USER[test]), p[:, 1] > 0.5)
  rows = np.concatenate([model.training_rows_, model.validation_rows_])
  assert sorted(rows) == list(range(len(kept)))
  for stage, curve in model.validation_loss_.items():
    best = model.best_epoch_[stage]
    assert curve.shape == (16,) and curve[best] == curve.min()
    validation = kept[model.validation_rows_]
    p = model.predict_proba(X_USER[validation], stage=stage)[:, 1]
    assert log_loss(Y_USER[validation], p) == pytest.approx(curve[best], rel=1e-4)
  # CaPE starts where early stopping ended.
  assert model.validation_loss_["CaPE"][0] == pytest.approx(
    model.validation_loss_["early stop"].min(), rel=1e-5
  )


def test_estimator_of_text_labels_is_reproducible(model, split):
  kept, test = split
  names = np.where(Y_USER == 1, "yes", "no")
  again = CapeClassifier(**SMALL).fit(X_USER[kept], names[kept])
  assert list(again.classes_) == ["no", "yes"] and set(again.predict(X_USER)) == {"no", "yes"}
  np.testing.assert_array_equal(
    again.predict_proba(X_USER[test]), model.predict_proba(X_USER[test])
  )


def changed(value):
  x = X_USER.copy()
  x[5, 2] = value
  return x


@pytest.mark.parametrize(
  "x, y, message",
  [
    (changed(np.nan), Y_USER, "column 2 of x has 1 missing or infinite"),
    (changed(np.inf), Y_USER, "column 2 of x has 1 missing or infinite"),
    (X_USER * [1, 0, 1, 1], Y_USER, "column 1 of x is constant"),
    (X_USER[:, 0], Y_USER, r"x is of shape \(240,\)"),
    (X_USER.astype(str) + "a", Y_USER, "x must be numbers"),
    (X_USER, Y_USER[1:], r"y is of shape \(239,\)"),
    (X_USER, np.where(np.arange(ROWS) == 3, np.nan, Y_USER), "1 missing or infinite labels"),
    (X_USER, np.where(Y_USER == 1, None, Y_USER), "missing labels"),
    (X_USER, np.zeros(ROWS), r"has 1 classes \(0.0\); expected exactly 2"),
    (X_USER, np.arange(ROWS) % 3, "has 3 classes"),
    (X_USER, np.arange(ROWS) == 0, "class True has 1 row"),
  ],
)
def test_bad_data(x, y, message):
  with pytest.raises(UserError, match=message):
    CapeClassifier().fit(x, y)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"targets": "bins"}, "expected bin or kde"),
    ({"num_bins": 0}, "num_bins is 0; expected at least 1"),
    ({"hidden": (8, 0)}, r"hidden\[1\] is 0"),
    ({"sigma": 0.0}, "sigma is 0.0; expected a positive"),
    ({"learning_rate": -1.0}, "learning_rate is -1"),
    ({"ordinary_epochs": -1}, "ordinary_epochs is -1"),
    ({"validation_share": 1.0}, "validation_share is 1.0"),
  ],
)
def test_bad_settings(arguments, message):
  with pytest.raises(UserError, match=message):
    CapeClassifier(**arguments)


def test_estimator_that_cannot(model, split):
  kept = split[0]
  with pytest.raises(UserError, match="num_bins is 500, but there are 13[0-9] training rows"):
    CapeClassifier(num_bins=500).fit(X_USER[kept], Y_USER[kept])
  with pytest.raises(UserError, match="training diverged at a learning rate of 1e[+]20"):
    CapeClassifier(**SMALL, learning_rate=1e20).fit(X_USER[kept], Y_USER[kept])
  with pytest.raises(UserError, match="not fitted"):
    CapeClassifier().predict(X_USER)
  with pytest.raises(UserError, match="x has 3 columns; the classifier has 4"):
    model.predict(X_USER[:, :3])
  with pytest.raises(UserError, match="stage is 'kde'"):
    model.predict_proba(X_USER, stage="kde")


def write_table(path, y=Y_USER, **columns):
  table = {name: x for name, x in zip("abcd", X_USER.T)} | columns | {"y": y}
  rows = [",".join(map(str, row)) for row in zip(*table.values())]
  path.write_text("\n".join([",".join(table), *rows]) + "\n")
  return str(path)


def test_a_table(tmp_path, model):
  """A process of its own, as flags are; it finds the estimator's program in the cache."""
  path = write_table(tmp_path / "my.csv", np.where(Y_USER == 1, "yes", "no"))
  command = [sys.executable, "-m", "projects.deep_probability.main", f"--data={path}"]
  command += ["--outcome=y", "--covariates=a,b,c,d", "--hidden=16", "--num_bins=5"]
  command += ["--epochs=15", "--fine_tune_epochs=15", f"--workdir={tmp_path / 'out'}"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert all(word in done.stdout for word in ("CaPE-bin", "Brier", "log score", "ECE", "KS"))
  lines = (tmp_path / "out" / "probabilities.csv").read_text().splitlines()
  assert len(lines) == 1 + ROWS and sum(line.endswith(",test") for line in lines) == 60
  np.testing.assert_allclose(
    [float(line.split(",")[0]) for line in lines[1:]],
    model.predict_proba(X_USER)[:, 1],
    atol=1e-5,
  )
  assert (tmp_path / "out" / "reliability.png").stat().st_size > 0


# Flags belong to a process: all bad commands in one.
COMMANDS = """
import json, sys
from absl import flags
from common.errors import UserError
from projects.deep_probability import estimate
for arguments in json.loads(sys.argv[1]):
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS.flags_by_module_dict()["projects.deep_probability.estimate"]:
    name.unparse()
  flags.FLAGS(["main", *arguments])
  try:
    estimate.main(["main"])
  except UserError as e:
    print(" ".join(str(e).split()))
"""


def test_bad_tables(tmp_path):
  first = np.arange(ROWS) == 0
  cases = [
    ({}, "--outcome=z", "has no column 'z'"),
    ({"y": np.ones(ROWS)}, "--outcome=y", "column 'y' has 1 values (1); expected exactly 2"),
    ({"y": np.where(first, "", Y_USER)}, "--outcome=y", "missing values: column 'y' in 1"),
    ({"e": np.ones(ROWS)}, "--outcome=y", "column 'e' is constant"),
    ({"e": np.where(first, "", "1.5")}, "--outcome=y", "missing values: column 'e' in 1"),
    ({"y": np.arange(ROWS) < 3}, "--outcome=y", "in 3 rows; expected at least 4"),
    ({}, "--outcome=y --event=2", "--event is 2, but column 'y' is 0 or 1"),
    ({}, "--outcome=y --covariates=a,y", "also among the covariates"),
    ({}, "--outcome=y --test_share=0", "--test_share is 0"),
    ({}, "--outcome=y --hidden=a", "--hidden is a; expected whole numbers"),
    ({}, "", "expected --data=FILE and --outcome=COLUMN"),
  ]
  arguments = [
    [f"--data={write_table(tmp_path / f'{i}.csv', **table)}", *flags.split()]
    for i, (table, flags, _) in enumerate(cases)
  ]
  command = [sys.executable, "-c", COMMANDS, json.dumps(arguments)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  printed = done.stdout.splitlines()
  assert len(printed) == len(cases)
  for line, (_, _, message) in zip(printed, cases):
    assert message in line


# The experiment.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("tiny")
  return experiment.run(config.get_config("tiny"), workdir), workdir


def found(name):
  try:
    return data_dir(name)
  except UserError:
    return None


def test_tiny_run(tiny):
  report, workdir = tiny
  saved = found("cape_face_outputs") is not None
  # 13 claims for the digits, and 3 of the saved outputs.
  assert len(report.claims) == (16 if saved else 13)
  assert len(report.tables) == (4 if saved else 3)
  for figure in report.figures:
    assert (workdir / figure.path).stat().st_size > 0
  rows = report.tables[0].rows
  assert len(rows) == 19 and np.isfinite([row[4:] for row in rows]).all()
  # Errors of probabilities, and of different methods: best epochs may coincide, no more.
  assert all(0 < row[1] < 0.5 for row in rows) and len({row[1] for row in rows}) >= 14


def test_one_run_at_a_time_is_the_same(tiny):
  """The draws that train together do not see each other, and the schedule is torch's."""
  del tiny  # Only so that its shapes are compiled already.
  tiny_config = config.get_config("tiny")
  problem = data.digits("linear", train=tiny_config.train, validation=tiny_config.validation)
  network = Network("mlp", 64, tuple(tiny_config.hidden))
  settings = experiment.methods.settings_of(tiny_config)[0]
  draws = data.draw(problem, 2, seed=0)
  keys = jax.random.split(jax.random.key(0), 2)
  fit = functools.partial(training.train, network=network, settings=settings)
  start, recipe = training.starts(network, keys), training.Recipe(0.05)
  first = fit(start, keys, jnp.asarray(problem.x), draws, recipe)
  swapped = fit(
    *jax.tree.map(lambda a: a[::-1], (start, keys)),
    jnp.asarray(problem.x),
    jax.tree.map(lambda a: a[::-1], draws),
    recipe,
  )
  np.testing.assert_allclose(first.test[0], swapped.test[1], atol=1e-5)
  assert first.test.shape == (2, 9, 1497) and first.validation.shape == (2, 9, 100)
  y = np.take_along_axis(draws.y, draws.validation, axis=1)
  expected = np.mean(np.logaddexp(0, first.validation) - y[:, None] * first.validation, axis=2)
  np.testing.assert_allclose(first.validation_loss, expected, rtol=1e-5)
  np.testing.assert_array_equal(first.best_epoch, first.validation_loss.argmin(axis=1))


@pytest.mark.skipif(not found("cape_face_outputs"), reason="the data set is not there")
def test_saved_outputs(tiny):
  report, _ = tiny
  assert all(claim.holds for claim in report.claims[-3:])
  assert [table.rows[0][0] for table in report.tables[-2:]] == ["linear", "Brier"]


def test_without_the_data_set_the_report_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path))
  report = Report(tables=[], figures=[], claims=[])
  experiment.saved_outputs(report, tmp_path)
  assert report.tables[0].title.startswith("Not run") and not report.claims
  assert "FLAXWORKS_DATA" in report.tables[0].rows[0][0]


def test_problems():
  both = list(experiment.problems(config.get_config("default")))
  assert [problem.name for problem, _ in both] == [
    "digits, linear",
    "digits, discrete",
    "normal, d = 200",
  ]
  assert [network for _, network in both][1:] == [
    Network("mlp", 64, (256, 256)),
    Network("mlp", 200, ()),
  ]
  tiny_config = config.get_config("tiny")
  for changes, message in (
    ({"risks": ("liner",)}, "unknown risk 'liner'; did you mean linear"),
    ({"inputs": "radar"}, "inputs is radar|inputs is 'radar'"),
    ({"inputs": "faces"}, "--config.images"),
  ):
    with pytest.raises(UserError, match=message):
      next(experiment.problems(ConfigDict(tiny_config.to_dict() | changes)))


def listed(preset):
  steps = compile_steps.compile_steps(config.get_config(preset), jax.devices()[:1])
  assert [step.name.split(",")[0] for step in steps] == ["cross-entropy", "CaPE-bin"]
  for step in steps:
    leaves = jax.tree.leaves(step.arguments)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  return steps


def test_steps_to_compile():
  step = listed("tiny")[1]
  trained = jax.eval_shape(step.function, *step.arguments)
  assert trained.test.shape == (2, 9, 1497) and trained.best_epoch.shape == (2,)


def test_steps_of_the_papers_network():
  """A training step of ResNet-18, abstractly: compiling one takes half a minute."""
  stacked = listed("paper")[0].arguments[0]
  weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
  y = jax.ShapeDtypeStruct((2,), jnp.float32)

  def step(weights, x, y):
    return training._gradient(Network("resnet18"), weights, x, y, y, training.Recipe(0.1))

  gradient, statistics = jax.eval_shape(step, weights, images, y)
  shapes = functools.partial(jax.tree.map, lambda leaf: leaf.shape)
  assert jax.tree.leaves(shapes(gradient)) == jax.tree.leaves(shapes(weights.params))
  assert jax.tree.leaves(shapes(statistics)) == jax.tree.leaves(shapes(weights.statistics))
