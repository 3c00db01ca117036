"""PRESTO beside logistic regression and proportional odds: simulations, soup, prediabetes."""

import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.errors import UserError
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.presto import appendix_e, data, presto
from projects.presto.metrics import paired_test, squared_calibration_error

PRESTO, RIDGE, LOGIT, ODDS = "PRESTO", "PRESTO, ridge", "logistic", "proportional odds"
BASELINES = (LOGIT, ODDS)


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  report = Report(tables=[], figures=[], claims=[])
  # The KKT certificate of 1e-8 needs float64; a context, so that other code keeps its dtypes.
  with jax.enable_x64(True):
    simulations(config, workdir, report)
    real_data(config, workdir, report)
    theorem_condition(config, report)
  return report


class RareBoundary(NamedTuple):
  """The last boundary in R replications: P(rare | x) = sigmoid(-(alpha + x'beta))."""

  intercept: jax.Array  # [R]
  slopes: jax.Array  # [R, p]
  converged: jax.Array  # [R], every fit of the path and of its cross-validation

  def probability(self, x: np.ndarray) -> np.ndarray:
    """x [R, m, p] -> [R, m]."""
    eta = self.intercept[:, None] + np.einsum("rmp,rp->rm", x, self.slopes)
    return 1 / (1 + np.exp(eta))


@functools.partial(
  jax.jit, static_argnames=("classes", "lambdas", "num_folds", "ridge", "legacy_intercept")
)
def fit_methods(
  x: jax.Array,
  y: jax.Array,
  folds: jax.Array,
  smallest_ratio: float,
  *,
  classes: int,
  lambdas: int,
  num_folds: int,
  ridge: bool,
  legacy_intercept: bool,
) -> dict[str, RareBoundary]:
  """Fits all methods to every replication of (x [R, n, p], y [R, n], folds [R, n]).

  Replications are mapped, not vmapped; see `presto.cross_validate`.
  """

  def fit(replication):
    x, y, folds = replication
    weights = jnp.ones(len(x), x.dtype)

    def boundary(path: presto.Path, converged, chosen=0):
      intercepts = path.intercepts
      if legacy_intercept:
        intercepts = presto.legacy_intercepts(path, x.mean(axis=0))
      return RareBoundary(intercepts[chosen, -1], path.slopes[chosen, -1], converged)

    def penalised(l1_ratio):
      settings = {"num_classes": classes, "l1_ratio": l1_ratio}
      largest = presto.largest_lambda(x, y, weights, **settings)
      values = presto.lambda_path(largest, lambdas, smallest_ratio)
      validation = presto.cross_validate(x, y, folds, values, num_folds=num_folds, **settings)
      path = validation.path
      return boundary(path, path.converged.all() & validation.converged.all(), validation.best)

    # One compiled program for both penalties.
    ratios = jnp.array([1.0, 0.0] if ridge else [1.0])
    both = jax.lax.map(penalised, ratios)
    take = lambda i: jax.tree.map(lambda leaf: leaf[i], both)
    fits = {name: take(i) for i, name in enumerate((PRESTO, RIDGE)[: len(ratios)])}
    logit = presto.fit_logit(x, y, weights, boundary=classes - 2)
    odds = presto.fit_proportional_odds(x, y, weights, num_classes=classes)
    return fits | {
      LOGIT: boundary(logit, logit.converged[0]),
      ODDS: boundary(odds, odds.converged[0]),
    }

  return jax.lax.map(fit, (x, y, folds))


def simulations(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Sections 4.1 and 4.2: the error of the rare class's probability against the truth, at X."""
  settings = [
    ("sparse", share, intercepts)
    for share in config.shares
    for intercepts in config.sparse_intercepts
  ] + [("dense", None, intercepts) for intercepts in config.dense_intercepts]
  methods = [PRESTO, *([RIDGE] if config.ridge else []), *BASELINES]
  rows, bars = [], {}
  for kind, share, intercepts in track(settings, "simulations", console=Console(stderr=True)):
    label = f"{kind}{'' if share is None else f' {share:.2g}'}, intercepts 0,{intercepts}"
    draws, errors, fits = simulate_setting(config, label, kind, share, intercepts)
    rare_share = float(np.mean([np.mean(draw.y == draw.y.max()) for draw in draws]))
    for name in methods:
      test = paired_test(errors[PRESTO], errors[name]) if name != PRESTO else (None, None, None)
      rows.append(
        [label, name, 100 * rare_share, 1e4 * errors[name].mean(), 1e4 * np.median(errors[name])]
        + [*test, int((~fits[name].converged).sum())]
      )
    bars[f"{label.split(',')[0]} {intercepts}"] = errors
    for name in BASELINES:
      report.claims.append(
        Claim.less(
          f"PRESTO's squared error of the rare probability is below that of {name} ({label})",
          {PRESTO: errors[PRESTO], name: errors[name]},
        )
      )
      t = paired_test(errors[PRESTO], errors[name]).t
      report.claims.append(Claim.greater(f"... with a paired t above 2 ({name}, {label})", [t], 2))
  report.tables.append(
    Table(
      "Simulations: squared error of the rare class's probability",
      [
        "setting",
        "method",
        Column("rare, %", ".2f"),
        Column("mean, 1e-4", ".4f"),
        Column("median, 1e-4", ".4f"),
        Column("paired t", ".2f"),
        Column("p", ".1e"),
        Column("PRESTO wins", ".2f"),
        "not converged",
      ],
      rows,
      note=(
        f"{config.replications} replications, n = {config.observations}, p = {config.covariates}, "
        "the t test is of PRESTO against the method, one-sided. Logistic regression does not "
        "converge where the rare class is separable; it then counts as it stands after 100 "
        "iterations."
      ),
    )
  )
  error_bars(
    workdir / "simulations.png", bars, methods, 1e4, "squared error, 1e-4", "Rare-class probability"
  )
  report.figures.append(
    Figure(
      "Simulations",
      "simulations.png",
      "Mean and standard error over the replications; the design and its intercepts after 0.",
    )
  )


def error_bars(path, errors: dict, methods, scale: float, ylabel: str, title: str) -> None:
  """Bars of {group: {method: errors}}: means and standard errors, times `scale`."""
  values = lambda name: [scale * np.asarray(group[name]) for group in errors.values()]
  plots.bar_plot(
    path,
    list(errors),
    {name: [v.mean() for v in values(name)] for name in methods},
    errors={name: [v.std(ddof=1) / len(v) ** 0.5 for v in values(name)] for name in methods},
    ylabel=ylabel,
    title=title,
  )


def simulate_setting(config: ConfigDict, label: str, kind: str, share: float, intercepts: str):
  """Returns the draws, {method: errors [replications]} and the fits of one setting."""
  intercepts = (0.0, *map(float, intercepts.split(",")))
  draws, folds = [], []
  for replication in range(config.replications):
    # A stream of its own for every setting and replication: none depends on which others run.
    rng = np.random.default_rng([config.seed, zlib.crc32(label.encode()), replication])
    size = {"n": config.observations, "p": config.covariates}
    draws.append(data.simulate(kind, intercepts, rng, share=share or 0.5, **size))
    folds.append(presto.random_folds(draws[-1].y, config.folds, rng))
  x = np.stack([draw.x for draw in draws])
  fits = fit_methods(
    x,
    np.stack([draw.y for draw in draws]),
    np.stack(folds),
    config.simulated_smallest_ratio,
    classes=len(intercepts) + 1,
    lambdas=config.simulated_lambdas,
    num_folds=config.folds,
    ridge=config.ridge,
    legacy_intercept=config.legacy_intercept,
  )
  fits = jax.tree.map(np.asarray, fits)
  truth = np.stack([draw.probabilities[:, -1] for draw in draws])
  errors = {name: np.mean((fit.probability(x) - truth) ** 2, axis=1) for name, fit in fits.items()}
  return draws, errors, fits


def real_sets(config: ConfigDict) -> dict[str, tuple[int, Callable[[], data.OrdinalData]]]:
  """{label: (number of splits, loader)} of section 4.3 and appendix B."""
  sets = {"soup": (config.soup_splits, data.soup)}
  for age in config.age_cutoffs:
    load = functools.partial(data.prediabetes, age)
    sets[f"prediabetes, age {age}"] = (config.prediabetes_splits, load)
  return {label: (splits, load) for label, (splits, load) in sets.items() if splits}


def real_data(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Section 4.3 and appendix B: calibration of the rare class's probability on held-out rows."""
  methods = (PRESTO, *BASELINES)
  rows, bars = [], {}
  sets = real_sets(config)
  for label, (splits, load) in track(sets.items(), "real data", console=Console(stderr=True)):
    try:
      dataset = load()
    except UserError as e:  # The simulations need no data set, and run without.
      report.tables.append(Table(f"Not run: {label}", ["reason"], [[str(e)]]))
      continue
    errors, published, fits, rare_share = calibration(label, dataset, splits, config)
    bars[label] = errors
    for name in methods:
      test = paired_test(errors[PRESTO], errors[name]) if name != PRESTO else (None, None, None)
      means = [1e3 * float(np.mean(e[name])) for e in (errors, published)]
      rows.append(
        [label, name, splits, 100 * rare_share, *means, *test, int((~fits[name].converged).sum())]
      )
    for what, measured in (("calibration error", errors), ("error as published", published)):
      for name in BASELINES:
        statement = f"PRESTO's {what} is below that of {name} ({label})"
        report.claims.append(
          Claim.less(statement, {PRESTO: measured[PRESTO], name: measured[name]})
        )
  if not bars:
    return
  report.tables.append(
    Table(
      "Calibration error (OSCE) of the rare class's probability",
      [
        "data",
        "method",
        "splits",
        Column("rare, %", ".2f"),
        Column("OSCE, 1e-3", ".3f"),
        Column("as published, 1e-3", ".3f"),
        Column("paired t", ".2f"),
        Column("p", ".1e"),
        Column("PRESTO wins", ".2f"),
        "not converged",
      ],
      rows,
      note=(
        f"Random splits with {config.test_share:.0%} of the rows held out; {config.real_lambdas} "
        "penalties. As published: the error takes the predictions in the order of the rows, not of "
        "the bins. The t test is of the OSCE, one-sided; overlapping splits make it optimistic."
      ),
    )
  )
  groups = {label.removeprefix("prediabetes, "): errors for label, errors in bars.items()}
  error_bars(
    workdir / "calibration.png", groups, methods, 1e3, "OSCE, 1e-3", "Rare-class calibration error"
  )
  report.figures.append(
    Figure(
      "Calibration",
      "calibration.png",
      "Mean and standard error over the splits; ages: prediabetes.",
    )
  )


def calibration(label: str, dataset: data.OrdinalData, splits: int, config: ConfigDict):
  """Returns {method: OSCE [splits]}, the same as published, the fits and the rare class's share."""
  rare = dataset.y.max()
  parts, folds = [], []
  for split in range(splits):
    rng = np.random.default_rng([config.seed, zlib.crc32(label.encode()), split])
    parts.append(data.train_test_split(dataset.y, config.test_share, rng))
    folds.append(presto.random_folds(dataset.y[parts[-1][0]], config.folds, rng))
  train, test = (np.stack(rows) for rows in zip(*parts))
  fits = fit_methods(
    dataset.x[train],
    dataset.y[train],
    np.stack(folds),
    config.real_smallest_ratio,
    classes=int(rare) + 1,
    lambdas=config.real_lambdas,
    num_folds=config.folds,
    ridge=False,
    legacy_intercept=config.legacy_intercept,
  )
  fits = jax.tree.map(np.asarray, fits)
  predicted = {method: fit.probability(dataset.x[test]) for method, fit in fits.items()}
  outcomes = (dataset.y[test] == rare).astype(float)
  osce = lambda legacy: {
    method: [
      squared_calibration_error(outcome, p, legacy_order=legacy)
      for outcome, p in zip(outcomes, probabilities)
    ]
    for method, probabilities in predicted.items()
  }
  return osce(False), osce(True), fits, float(np.mean(dataset.y == rare))


def theorem_condition(config: ConfigDict, report: Report) -> None:
  """Appendix E: the smallest eigenvalue that theorem 2.3 needs, and how rare it wants the class."""
  p, n = 10, config.condition_rows
  slopes = jnp.ones(p)
  keys = jax.random.split(jax.random.key(config.seed), config.condition_repetitions)
  eigenvalue = jax.jit(appendix_e.smallest_eigenvalue)

  def row(label, rare, draw, intercept):
    values, bound = [], None
    for key in keys:
      x, bound = draw(key)
      values.append(eigenvalue(x, jnp.array([0.0, intercept]), slopes))
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    allowed = float(appendix_e.rarest_allowed(mean, bound))
    return [label, rare, mean, spread / len(keys) ** 0.5, allowed, str(bool(rare <= allowed))]

  uniform = lambda key: appendix_e.uniform_design(key, n, p)
  rows = [row("A: uniform", float(jax.nn.sigmoid(-(20.0 - p))), uniform, 20.0)]
  report.claims.append(
    Claim.greater("the smallest eigenvalue of theorem 2.3 is positive (study A)", [rows[0][2]], 0.0)
  )
  for correlation in (0.0, 0.25, 0.5, 0.75):
    for rare in (0.0, 1e-7, 1e-6, 1e-5):
      normal = lambda key, c=correlation: appendix_e.normal_design(key, n, p, c)
      intercept = appendix_e.rare_intercept(rare, slopes, 3.0)
      rows.append(row(f"B: normal, correlation {correlation:g}", rare, normal, intercept))
  report.claims.append(
    Claim.greater(
      "the smallest eigenvalue of theorem 2.3 is positive (study B, smallest of its settings)",
      [min(row[2] for row in rows[1:])],
      0.0,
    )
  )
  report.tables.append(
    Table(
      "The condition of theorem 2.3 (appendix E)",
      [
        "design",
        Column("largest rare probability", ".1e"),
        Column("smallest eigenvalue", ".5f"),
        Column("standard error", ".5f"),
        Column("rare probability allowed", ".1e"),
        "condition met",
      ],
      rows,
      note=f"{len(keys)} repetitions of a mean over {n} rows; 10 covariates, slopes 1.",
    )
  )
