"""DSL: vectors of the official code, invariants, libraries as oracles, the tiny run."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm
from sklearn.linear_model import LinearRegression

from common.data.tabular import read_table
from common.errors import UserError
from common.paths import data_dir
from projects.dsl import config, dsl, experiment, labelling, learners, moments, simulation
from projects.dsl.baselines import BASELINES, fit_baseline
from projects.dsl.dsl import DSL
from projects.dsl.moments import Sample
from projects.dsl.problem import OUTCOME, regression

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "dsl" / "moment_estimator.npz"
estimate = jax.jit(moments.estimate, static_argnums=0)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64():
    yield


@pytest.fixture(scope="module")
def table():
  """300 rows: y labelled in 120 of them with unequal probabilities; z is 0 or 1."""
  rng = np.random.default_rng(0)
  n = 300
  x, w = rng.normal(size=n), rng.normal(size=n)
  group = rng.integers(0, 12, n)
  y = 0.5 + x - 0.5 * w + 0.3 * group + rng.normal(size=n) * (1 + 0.5 * np.abs(x))
  z = (rng.random(n) < 1 / (1 + np.exp(-x))).astype(float)
  p = np.where(w > 0, 0.6, 0.2)
  known = rng.random(n) < p
  q = y + 0.5 * x + rng.normal(size=n)
  zq = np.where(rng.random(n) < 0.2, 1 - z, z)
  hide = lambda v: np.where(known, v, np.nan)
  names = np.array([f"g{g:02d}" for g in group], object)
  return {
    "x": x, "w": w, "y": hide(y), "z": hide(z), "q": q, "zq": zq, "p": p, "group": names,
    "all_y": y, "all_z": z, "x_few": hide(x), "xq": x + rng.normal(size=n),
    "row": np.arange(n).astype(float), "period": np.arange(n) % 7.0,
  }  # fmt: skip


def y_on_x_w(table, **changes):
  arguments = dict(outcome="y", covariates=["x", "w"], surrogates=["q"], probability="p")
  return regression(table, **(arguments | changes))


def golden_sample(golden, case):
  column = lambda name: golden[f"data_{name}"]
  y, g = ("Yb", "gYb") if case.startswith("logit") else ("Yc", "gYc")
  x1_hat = column("gx1") if case.endswith(("cov", "both")) else column("x1")
  others = [column("x2")] if case in ("lm_cov", "lm_noint") else [column("x2"), column("x3")]
  constant = [] if case == "lm_noint" else [np.ones(400)]
  design = lambda x1: np.stack([*constant, x1, *others], axis=1)
  outcome = (column("x3"),) * 2 if case == "lm_cov" else (column(y), column(g))
  sample = Sample(
    design(column("x1")), outcome[0], design(x1_hat), outcome[1], column("R") / column("pi")
  )
  codes = np.unique(column("cluster"), return_inverse=True)[1]
  return sample, codes if case.endswith("cluster") else None


@pytest.mark.parametrize("part", ["out", "cluster", "noint", "cov", "both"])
@pytest.mark.parametrize("model, family", [("lm", "linear"), ("logit", "logistic")])
def test_moment_estimator_of_the_official_code(model, family, part):
  case = f"{model}_{part}"
  with np.load(GOLDEN) as golden:
    if f"{case}_coef" not in golden:
      assert case in ("logit_noint", "logit_cov")
      return
    sample, clusters = golden_sample(golden, case)
    found = estimate(family, sample, clusters)
    # R's optimiser stops at a gradient of a squared norm: 1e-5 for lm, 1e-4 for logit.
    coefficients, relative = (1e-5, 1e-5) if model == "lm" else (1e-3, 1e-3)
    errors = np.sqrt(np.diagonal(found.covariance))
    np.testing.assert_allclose(found.theta, golden[f"{case}_coef"], atol=coefficients)
    np.testing.assert_allclose(errors, golden[f"{case}_se"], rtol=relative)
    np.testing.assert_allclose(
      found.covariance, golden[f"{case}_vcov"], rtol=relative, atol=1e-3 * relative
    )
    # The official parts are those of the standardised design.
    back = golden[f"{case}_D"]
    for name, value in (("J", found.jacobian), ("main1", found.main_1), ("main23", found.main_23)):
      expected = golden[f"{case}_{name}"]
      scale = np.abs(expected).max()
      np.testing.assert_allclose(back.T @ value @ back, expected, atol=relative * scale)


@pytest.mark.parametrize("family", ["linear", "logistic"])
@pytest.mark.parametrize("learner", ["zero", "surrogate", "ridge"])
def test_with_every_label_it_is_the_ordinary_estimator_with_hc0_errors(table, family, learner):
  outcome, surrogate = ("all_y", "q") if family == "linear" else ("all_z", "zq")
  problem = regression(table, outcome=outcome, covariates=["x", "w"], surrogates=[surrogate])
  fit = DSL(family, learner, splits=3).fit(problem)
  x = sm.add_constant(np.stack([table["x"], table["w"]], axis=1))
  oracle = (
    sm.OLS(table[outcome], x).fit(cov_type="HC0")
    if family == "linear"
    else sm.Logit(table[outcome], x).fit(cov_type="HC0", disp=0, tol=1e-12)
  )
  np.testing.assert_allclose(fit.coefficients, oracle.params, atol=1e-8)
  np.testing.assert_allclose(fit.covariance, oracle.cov_params(), atol=1e-8)
  np.testing.assert_allclose(fit.confidence_intervals(), oracle.conf_int(), atol=1e-7)
  np.testing.assert_allclose(fit.p_values(), oracle.pvalues, atol=1e-7)
  np.testing.assert_allclose(fit.predict(x), oracle.predict(x), atol=1e-7)


def test_cluster_robust_errors_are_those_of_statsmodels(table):
  problem = regression(table, outcome="all_y", covariates=["x"], surrogates=["q"], clusters="group")
  groups = np.unique(table["group"], return_inverse=True)[1]
  kwds = {"groups": groups, "use_correction": False}
  oracle = sm.OLS(table["all_y"], sm.add_constant(table["x"])).fit(
    cov_type="cluster", cov_kwds=kwds
  )
  fit = DSL("linear", "zero").fit(problem)
  np.testing.assert_allclose(fit.standard_errors, oracle.bse, rtol=1e-9)


def test_singleton_clusters_change_nothing(table):
  plain, single = (
    DSL("linear", "zero").fit(y_on_x_w(table, clusters=clusters)) for clusters in (None, "row")
  )
  np.testing.assert_allclose(single.covariance, plain.covariance, rtol=1e-9)


def test_g_of_zero_is_inverse_probability_weighting(table):
  problem = y_on_x_w(table)
  data = problem.data
  weighted = data.labelled * data.y / data.probability
  expected = np.linalg.lstsq(data.x, weighted, rcond=None)[0]
  fit = DSL("linear", "zero").fit(problem)
  np.testing.assert_allclose(fit.coefficients, expected, atol=1e-10)


def test_perfect_surrogates_give_the_full_data_estimate(table):
  problem = y_on_x_w(table, surrogates=["all_y"])
  expected = np.linalg.lstsq(problem.data.x, table["all_y"], rcond=None)[0]
  fit = DSL("linear", "surrogate").fit(problem)
  np.testing.assert_allclose(fit.coefficients, expected, atol=1e-10)


def test_closed_form_is_the_root_that_newton_finds(table):
  problem = regression(
    table, outcome="y", covariates=["x_few", "w"], gold=["y", "x_few"], surrogates=["q", "xq"]
  )
  assert problem.gold == (OUTCOME, 1)
  sample = dsl.doubly_robust_sample(problem.data, problem.gold, problem.data.surrogates)
  root, converged = jax.jit(moments.newton, static_argnums=0)("linear", sample)
  assert converged
  np.testing.assert_allclose(root, moments.solve_linear(sample), atol=1e-9)
  np.testing.assert_allclose(moments.mean_moment("linear", root, sample), 0, atol=1e-9)


def test_proportions_are_group_means_of_the_pseudo_outcome(table):
  problem = regression(table, outcome="z", surrogates=["zq"], by="group", probability="p")
  fit = DSL("linear", "surrogate").fit(problem)
  data = problem.data
  pseudo = table["zq"] + data.labelled / data.probability * (data.y - table["zq"])
  expected = [pseudo[table["group"] == g].mean() for g in np.unique(table["group"])]
  np.testing.assert_allclose(fit.coefficients, expected, atol=1e-10)
  assert fit.names[0] == "group[g00]"


def test_a_constant_added_to_g_cancels_when_weights_sum_to_n(table):
  problem = regression(table, outcome="y", surrogates=["q"])  # A mean, equal probabilities.
  data = problem.data
  np.testing.assert_allclose(np.sum(data.labelled / data.probability), len(data.y))
  thetas = [
    moments.solve_linear(dsl.doubly_robust_sample(data, problem.gold, data.surrogates + c))
    for c in (0.0, 7.0)
  ]
  np.testing.assert_allclose(*thetas, atol=1e-10)


@pytest.mark.parametrize("family", ["linear", "logistic"])
def test_another_basis_of_the_design_transforms_the_coefficients(table, family):
  outcome, surrogate = ("y", "q") if family == "linear" else ("z", "zq")
  problem = y_on_x_w(table, outcome=outcome, surrogates=[surrogate])
  sample = dsl.doubly_robust_sample(problem.data, problem.gold, problem.data.surrogates)
  a = np.array([[1.0, 300.0, 0.0], [0.0, 1000.0, 2.0], [0.0, 0.0, 1e-3]])
  other = sample._replace(x=sample.x @ a, x_hat=sample.x_hat @ a)
  found, changed = estimate(family, sample), estimate(family, other)
  back = np.linalg.inv(a)
  assert changed.converged
  np.testing.assert_allclose(a @ changed.theta, found.theta, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(a @ changed.covariance @ a.T, found.covariance, rtol=1e-6, atol=1e-10)
  assert np.abs(back).max() > 100  # Far from the standardised design.


def test_power_analysis(table):
  fit = DSL("linear", "ridge", splits=1).fit(y_on_x_w(table))
  n = fit.num_labelled
  power = fit.power([n // 2, n, 2 * n, 10**9])
  np.testing.assert_allclose(power[1], fit.standard_errors, rtol=1e-9)
  assert (np.diff(power[:3], axis=0) < 0).all()
  e = fit.estimates
  limit = moments.covariance(e.jacobian, e.main_23, fit.num_units)[0]
  variance = np.diagonal(limit)
  positive = variance > 0
  np.testing.assert_allclose(power[3, positive], np.sqrt(variance[positive]), rtol=1e-4)
  with pytest.raises(UserError, match="ascending"):
    fit.power([200, 100])


def test_power_where_the_variance_would_be_negative():
  one, two = jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 2.0)
  e = moments.Estimate(jnp.zeros((1, 1)), one / 100, one, two, -one, jnp.array([True]))
  errors = moments.predicted_errors(e, jnp.array([1.0, 4.0, 8.0]), 100)
  np.testing.assert_allclose(errors[:, 0], 0.1 / np.sqrt([1, 4, 8]))


def test_medians_over_splits():
  rng = np.random.default_rng(0)
  theta = rng.normal(size=(5, 3))
  half = rng.normal(size=(5, 3, 3))
  v = half @ half.transpose(0, 2, 1)
  middle, errors, covariance = moments.combine(jnp.asarray(theta), jnp.asarray(v))
  np.testing.assert_allclose(middle, np.median(theta, axis=0))
  variances = np.diagonal(v, axis1=1, axis2=2) + (theta - middle) ** 2
  np.testing.assert_allclose(errors, np.sqrt(np.median(variances, axis=0)))
  assert np.linalg.eigvalsh(covariance)[0] >= -1e-12
  np.testing.assert_allclose(np.diagonal(covariance), np.asarray(errors) ** 2)


@pytest.mark.parametrize("effects", [["group"], ["group", "period"]])
def test_fixed_effects_are_the_regression_with_indicators(table, effects):
  """Of an unbalanced panel, with coefficients and sandwich errors."""
  problem = y_on_x_w(table, effects=effects)
  q = problem.data.surrogates
  found = estimate("linear", dsl.doubly_robust_sample(problem.data, problem.gold, q))
  columns = [problem.data.x]
  for i, name in enumerate(effects):
    codes = np.unique(table[name], return_inverse=True)[1]
    columns.append(np.eye(codes.max() + 1)[codes][:, min(i, 1) :])
  wide = problem.data._replace(x=np.concatenate(columns, axis=1), groups=None)
  expected = estimate("linear", dsl.doubly_robust_sample(wide, problem.gold, q))
  np.testing.assert_allclose(found.theta, expected.theta[:2], atol=1e-8)
  np.testing.assert_allclose(found.covariance, expected.covariance[:2, :2], atol=1e-8)
  # The labelled rows alone, against weighted least squares with indicators.
  known = problem.data.labelled > 0
  w = 1 / problem.data.probability[known]
  oracle = sm.WLS(problem.data.y[known], wide.x[known], weights=w).fit()
  gold = fit_baseline("GSO", problem, DSL())
  np.testing.assert_allclose(gold.coefficients, oracle.params[:2], atol=1e-8)


def test_effects_of_a_balanced_panel_are_group_means_less_the_grand_mean():
  values = np.random.default_rng(0).normal(size=(4, 5))
  groups = np.stack([g.ravel() for g in np.indices((4, 5))], axis=1)
  found = dsl.group_effects(jnp.asarray(values.reshape(-1, 1)), jnp.ones(20), jnp.asarray(groups))
  expected = values.mean(1, keepdims=True) + values.mean(0, keepdims=True) - values.mean()
  np.testing.assert_allclose(found[:, 0], expected.ravel(), atol=1e-10)


def test_baselines_are_ordinary_regressions(table):
  problem = y_on_x_w(table, probability=None)
  x, known = problem.data.x, problem.data.labelled > 0
  outcomes = {"SO": table["q"], "pooled": np.where(known, table["y"], table["q"])}
  model = DSL("linear", "ridge", splits=1)
  outcomes["SSL"] = np.asarray(model.predict_gold(problem))[0, :, 0]
  for name in BASELINES:
    fit = fit_baseline(name, problem, model)
    rows = known if name == "GSO" else slice(None)
    y = table["y"] if name == "GSO" else outcomes[name]
    oracle = sm.OLS(y[rows], x[rows]).fit(cov_type="HC0")
    np.testing.assert_allclose(fit.coefficients, oracle.params, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(fit.standard_errors, oracle.bse, rtol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", learners.LEARNERS)
def test_every_learner_learns_and_never_sees_its_own_fold(table, name):
  problem = y_on_x_w(table) if name != "logistic" else y_on_x_w(table, outcome="z")
  model = DSL("linear", name, folds=3, splits=1)
  predictions = np.asarray(model.predict_gold(problem))[0, :, 0]
  truth = table["all_y"] if name != "logistic" else table["all_z"]
  assert np.corrcoef(predictions, truth)[0, 1] > 0.35
  # Another label of one unit: its own fold's predictions must not change, others' may.
  row = int(np.flatnonzero(problem.data.labelled)[0])
  changed = problem.data.y.copy()
  changed[row] = 1 - changed[row] if name == "logistic" else changed[row] + 100
  other = np.asarray(model.predict_gold(type(problem)(
    problem.data._replace(y=changed), problem.gold, problem.names
  )))[0, :, 0]  # fmt: skip
  fold_key = jax.random.split(jax.random.split(jax.random.key(0), 1)[0], 2)[0]
  folds = np.asarray(learners.random_folds(fold_key, jnp.arange(300), 3))
  if name in ("ridge", "logistic", "mlp"):
    np.testing.assert_array_equal(predictions[folds == folds[row]], other[folds == folds[row]])
  assert predictions[row] == other[row]
  assert (predictions != other).any()


def test_a_sklearn_regressor_is_a_learner(table):
  problem = y_on_x_w(table)
  fit = DSL("linear", LinearRegression(), splits=2).fit(problem)
  assert np.isfinite(fit.standard_errors).all()


def test_folds_keep_clusters_together_and_are_of_equal_size():
  folds = np.asarray(learners.random_folds(jax.random.key(0), jnp.arange(23), 5))
  assert sorted(np.bincount(folds)) == [4, 4, 5, 5, 5]
  clusters = jnp.asarray(np.repeat(np.arange(10), 4))
  folds = np.asarray(learners.random_folds(jax.random.key(1), clusters, 5)).reshape(10, 4)
  assert (folds == folds[:, :1]).all()
  assert (np.bincount(folds[:, 0]) == 2).all()


def test_logistic_slope_does_not_overflow():
  mu, slope = moments.mean("logistic", jnp.array([-1000.0, 0.0, 1000.0]))
  np.testing.assert_allclose(mu, [0, 0.5, 1])
  np.testing.assert_allclose(slope, [0, 0.25, 0])


def test_coverage_of_the_intervals():
  """600 draws: the Monte-Carlo error of 95 % is 0.9 points; 3.5 of them are allowed."""
  design = simulation.linear_model("both", 1000, 250)
  results = simulation.replicate(design, ("SO", "GSO", "DSL"), learners.ridge, draws=600, seed=1)
  for j in range(3):
    assert abs(results["DSL"].coverage(j) - 0.95) < 0.031, j
  assert results["SO"].coverage(1) < 0.1
  assert results["DSL"].rmse(1) < results["GSO"].rmse(1)
  assert results["DSL"].standardised_bias(1) < 0.15


def bad(table, **columns):
  return table | columns


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(outcome="yy"), "no column 'yy'; did you mean y"),
    (dict(gold=["z"]), "'z' is neither the outcome"),
    (dict(covariates=["x", "x"]), "named twice"),
    (dict(covariates=["x", "constant"]), "'constant' is constant"),
    (dict(covariates=["x", "x_few"]), "'x_few' in [0-9]+ of 300 rows"),
    (dict(covariates=["x", "twice_x"]), "x, twice_x are collinear"),
    (dict(covariates=["infinite"]), "'infinite' is infinite in 1"),
    (dict(outcome="nothing"), "no row has nothing"),
    (dict(outcome="text"), "'text' must be numbers"),
    (dict(outcome="few"), "3 labelled rows are too few"),
    (dict(probability="zero_p"), "must be probabilities"),
    (dict(outcome="y", covariates=["half"], gold=["y", "half"]), "rows have some of y, half"),
    (dict(surrogates=[], covariates=[]), "nothing to predict"),
    (dict(effects=["group"], covariates=["of_group"]), "of_group is constant within"),
    (dict(effects=["group", "period", "row"]), "at most two effects"),
    (dict(clusters="two"), "2 clusters cannot make 5 folds"),
  ],
)
def test_unsuitable_input_is_named(table, changes, message):
  nan = np.full(300, np.nan)
  few, half, zero_p = nan.copy(), np.where(np.arange(300) < 50, 1.0, np.nan), table["p"].copy()
  few[:3], zero_p[7] = [1.0, 2.0, 3.0], 0.0
  infinite = table["x"].copy()
  infinite[3] = np.inf
  codes = np.unique(table["group"], return_inverse=True)[1]
  columns = bad(
    table, constant=np.ones(300), twice_x=2 * table["x"], infinite=infinite, nothing=nan, few=few,
    text=table["group"], half=half, zero_p=zero_p, of_group=codes * 2.0, two=np.arange(300) % 2.0,
  )  # fmt: skip
  with pytest.raises(UserError, match=message):
    DSL("linear", "ridge").fit(y_on_x_w(columns, **changes))


def test_unsuitable_models_are_named(table):
  problem = y_on_x_w(table)
  for model, message in (
    (DSL("probit"), "unknown family 'probit'"),
    (DSL("logistic"), "outcome of 0 and 1"),
    (DSL(learner="forest"), "unknown learner 'forest'"),
    (DSL(learner="logistic"), "needs labels 0 and 1"),
    (DSL(folds=1), "folds=1"),
  ):
    with pytest.raises(UserError, match=message):
      model.fit(problem)
  ones = table | {"z": np.where(np.isnan(table["z"]), np.nan, 1.0)}
  with pytest.raises(UserError, match="one class is empty"):
    DSL("logistic", "ridge").fit(y_on_x_w(ones, outcome="z", surrogates=["zq"]))
  separated = table | {"all_z": (table["x"] > 0).astype(float)}
  with pytest.raises(UserError, match="no root"):
    DSL("logistic", "zero").fit(y_on_x_w(separated, outcome="all_z", surrogates=["zq"]))
  with pytest.raises(UserError, match="one surrogate per gold column"):
    fit_baseline("SO", y_on_x_w(table, surrogates=["q", "xq"]), DSL())


def test_incomplete_rows_are_dropped_before_probabilities_are_rescaled(table):
  w = table["w"].copy()
  w[:40] = np.nan
  problem = y_on_x_w(table | {"w": w}, drop_missing=True)
  data = problem.data
  assert len(data.y) == 260
  np.testing.assert_allclose(data.probability.mean(), data.labelled.mean())
  expected = table["p"][40:] * data.labelled.mean() / table["p"][40:].mean()
  np.testing.assert_allclose(data.probability, expected)


def test_complaints_of_pan_and_chen():
  try:
    path = data_dir("dsl") / "PanChen.csv"
  except UserError as e:
    pytest.skip(str(e))
  covariates = ["countyWrong", "prefecWrong", "connect2b", "prevalence", "regionj", "groupIssue"]
  problem = regression(
    read_table(path),
    outcome="SendOrNot",
    covariates=covariates,
    gold=["countyWrong"],
    surrogates=["pred_countyWrong"],
  )
  assert problem.data.x.shape == (1412, 7) and problem.data.labelled.sum() == 500
  fit = DSL("logistic", "ridge").fit(problem)
  gold = fit_baseline("GSO", problem, DSL("logistic"))
  known = problem.data.labelled > 0
  oracle = sm.Logit(problem.data.y[known], problem.data.x[known]).fit(cov_type="HC0", disp=0)
  np.testing.assert_allclose(gold.coefficients, oracle.params, atol=1e-6)
  np.testing.assert_allclose(gold.standard_errors, oracle.bse, rtol=1e-5)
  # What was observed for everyone gains; what experts labelled cannot lose.
  ratio = fit.standard_errors / gold.standard_errors
  assert ratio[2] < 0.8 and ratio[1] < 1.05


class KeywordModel:
  """Says yes where the question's document has the word; counts examples."""

  def log_likelihoods(self, pairs):
    self.pairs = pairs
    last = [context.rpartition("Document: ")[2] for context, _ in pairs]
    return [(float(("tax" in t) == (a == " yes")), True) for t, (_, a) in zip(last, pairs)]


def test_labels_from_a_language_model():
  table = {
    "text": np.array(["a tax", "a road", "tax cuts", "a park"], object),
    "label": np.array([1.0, 0.0, 1.0, 0.0]),
  }
  for shots in (0, 2):
    model = KeywordModel()
    found = labelling.label_documents(table, model, shots=shots)
    np.testing.assert_array_equal(found, table["label"])
    for row, text in enumerate(table["text"]):
      context = model.pairs[2 * row][0]
      assert context.count("Document:") == shots + 1
      assert context.count(f"Document: {text}\n") == 1
  with pytest.raises(UserError, match="4 examples"):
    labelling.label_documents(table, KeywordModel(), shots=4)


def test_tiny_run(tmp_path):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  assert len(report.tables) == 2
  rows = {row[0]: row for row in report.tables[0].rows}
  assert rows["SO"][4] < 0.5 < rows["DSL"][4]
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0


def test_the_command_on_a_table(table, tmp_path):
  lines = ["y,x,party,q"]
  for i in range(300):
    label = "" if np.isnan(table["y"][i]) else table["y"][i]
    lines.append(f"{label},{table['x'][i]},{'left' if i % 2 else 'right'},{table['q'][i]}")
  (tmp_path / "my.csv").write_text("\n".join(lines))
  command = [sys.executable, "-m", "projects.dsl.main", f"--data={tmp_path / 'my.csv'}"]
  command += ["--outcome=y", "--surrogate=q", "--learner=ridge", "--splits=2", "--labels=200"]
  run = lambda *more: subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
  done = run("--covariates=x,party", f"--workdir={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert "party[right]" in done.stdout and "standard error" in done.stdout
  fitted = read_table(tmp_path / "out" / "coefficients.csv")
  problem = regression(
    read_table(tmp_path / "my.csv"), outcome="y", covariates=["x", "party"], surrogates=["q"]
  )
  expected = DSL("linear", "ridge", splits=2).fit(problem)
  np.testing.assert_allclose(fitted["estimate"], expected.coefficients, rtol=1e-9)
  assert (tmp_path / "out" / "coefficients.png").stat().st_size > 0
  failed = run("--covariates=x,partyy")
  assert failed.returncode == 2 and "did you mean party?" in failed.stderr
