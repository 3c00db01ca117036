"""DSL against its baselines: Monte-Carlo coverage where the truth is known, and two real data sets."""

import concurrent.futures
import functools
import os
import pathlib

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.cli import closest
from common.errors import UserError
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.dsl import simulation
from projects.dsl.dsl import DSL
from projects.dsl.learners import LEARNERS, logistic, ridge
from projects.dsl.real_data import complaints, digits, labelled_documents
from projects.dsl.simulation import METHODS, Replications, metric_columns, metrics, replicate

# What to look at: the coefficient of x_1, on which the surrogate's errors depend.
SLOPE = 1
# |bias| in standard deviations that 200 draws would tell from 0 at 2.5 Monte-Carlo errors.
NEGLIGIBLE_BIAS = 2.5 / np.sqrt(200)


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for, as many at a time as there are cores."""
  unknown = [name for name in config.parts if name not in PARTS]
  if unknown:
    raise UserError(f"config.parts: no part {unknown[0]!r}; {closest(unknown[0], PARTS)}")

  def run_part(name: str) -> Report:
    report = Report(tables=[], figures=[], claims=[])
    PARTS[name](config, workdir, report)
    return report

  # A part keeps one core busy, and most of the time leaves Python alone.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    console = Console(stderr=True)
    reports = list(
      track(pool.map(run_part, config.parts), "DSL", len(config.parts), console=console)
    )
  joined = lambda field: [item for report in reports for item in getattr(report, field)]
  return Report(tables=joined("tables"), figures=joined("figures"), claims=joined("claims"))


def main_experiment(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """A logistic regression on a surrogate that is right in about 82 % of the documents."""
  design = simulation.logistic_outcome(config.units, config.labels)
  results = replicate(
    design, METHODS, logistic, draws=config.draws, seed=config.seed, folds=config.folds
  )
  share = simulation.accuracy(design)
  report.tables.append(
    Table(
      f"Coefficient of x1 (truth {design.truth[SLOPE]}), surrogate right in {share:.1%}",
      ["method", *metric_columns()],
      [[name, *metrics(results[name], SLOPE)] for name in METHODS],
      note=(
        f"{config.draws} draws of {config.units} documents with {config.labels} expert labels; "
        f"the Monte-Carlo error of a coverage of 95 % is "
        f"{np.sqrt(0.95 * 0.05 / config.draws):.2%}. `full`: every document labelled by experts."
      ),
    )
  )
  plot_coverage(results, config, workdir, report)
  of = lambda name, metric: results[name].blocks(metric, SLOPE, config.blocks)
  setting = "logistic regression, surrogate right in about 82 %"
  draws = np.sqrt(config.draws // config.blocks)
  mc_errors = [draws * bias for bias in of("SO", "standardised_bias")]
  report.claims.extend(
    [
      Claim.greater(f"surrogates alone are biased ({setting}, Monte-Carlo errors)", mc_errors, 3),
      Claim.less(f"their intervals do not hold the truth ({setting})", of("SO", "coverage"), 0.5),
      Claim.less(
        f"DSL's bias is negligible ({setting}, standard deviations)",
        of("DSL", "standardised_bias"),
        NEGLIGIBLE_BIAS,
      ),
      Claim.greater(f"DSL's 95 % intervals cover ({setting})", of("DSL", "coverage"), 0.93),
      Claim.less(f"they are not too wide ({setting}, coverage)", of("DSL", "coverage"), 0.97),
      Claim.less(
        f"DSL has lower RMSE than the expert labels alone ({setting})",
        {"DSL": of("DSL", "rmse"), "GSO": of("GSO", "rmse")},
      ),
      Claim.less(
        f"DSL's RMSE is comparable to SSL's ({setting}, ratio)",
        [a / b for a, b in zip(of("DSL", "rmse"), of("SSL", "rmse"))],
        1.1,
      ),
      Claim.less(f"SSL's intervals do not cover ({setting})", of("SSL", "coverage"), 0.85),
    ]
  )


def plot_coverage(results: dict[str, Replications], config, workdir, report: Report) -> None:
  levels = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
  series = {"nominal": (levels, levels)}
  for name in ("DSL", "SSL", "SO"):
    series[name] = (levels, [results[name].coverage(SLOPE, level) for level in levels])
  plots.line_plot(
    workdir / "coverage.png",
    series,
    xlabel="nominal coverage",
    ylabel="measured coverage",
    title="Intervals of the coefficient of x1",
  )
  report.figures.append(
    Figure(
      "Coverage",
      "coverage.png",
      f"Share of intervals that hold the truth at each nominal level, {config.draws} draws.",
    )
  )


def accuracy_sweep(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """How good must a surrogate be to be used as it is?"""
  names = ("SO", "SSL", "GSO", "DSL")
  rows, series = [], {name: [] for name in names}
  shares, coverage = [], {}
  design = simulation.logistic_outcome(config.units, config.labels)
  for error in config.errors:
    # Where x1 > 0 it errs three times as often as elsewhere; on average as often as it says.
    parameters = (error / 2, error)
    share = simulation.accuracy(design, parameters)
    results = replicate(
      design,
      METHODS,
      logistic,
      draws=config.other_draws,
      seed=config.seed,
      folds=config.folds,
      parameters=parameters,
    )
    shares.append(share)
    for name in names:
      rows.append([share, name, *metrics(results[name], SLOPE)])
      series[name].append(results[name].rmse(SLOPE))
    coverage[error] = results
  report.tables.append(
    Table(
      "Accuracy of the surrogate (coefficient of x1)",
      [Column("accuracy", ".2f"), "method", *metric_columns()],
      rows,
      note=f"{config.other_draws} draws each.",
    )
  )
  plots.line_plot(
    workdir / "accuracy.png",
    {name: (shares, values) for name, values in series.items()},
    xlabel="accuracy of the surrogate",
    ylabel="RMSE of the coefficient of x1",
    title="What surrogates are worth",
    log="y",
  )
  report.figures.append(
    Figure(
      "Accuracy of the surrogate", "accuracy.png", "Root mean squared error against the truth."
    )
  )
  of = lambda error, name: coverage[error][name].blocks("coverage", SLOPE, config.blocks)
  for error in (0.2, 0.1):
    if error in coverage:
      right = f"surrogate right in {1 - error:.0%}"
      report.claims.append(
        Claim.less(f"surrogates alone: intervals do not cover ({right})", of(error, "SO"), 0.5)
      )
      report.claims.append(Claim.greater(f"DSL: they do ({right})", of(error, "DSL"), 0.93))


def unequal_probabilities(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Documents of the surrogate's class 1 are labelled three times as often."""
  del workdir
  design = simulation.logistic_outcome(config.units, unequal=(0.3, 0.1))
  rows, results = [], {}
  for label, learner in (("g = Q", "surrogate"), ("logistic", logistic)):
    results[label] = replicate(
      design,
      ("ignoring pi", "DSL"),
      learner,
      draws=config.other_draws,
      seed=config.seed,
      folds=config.folds,
    )
    for j, coefficient in ((0, "intercept"), (SLOPE, "x1")):
      for name, result in results[label].items():
        shown = "DSL, pi ignored" if name == "ignoring pi" else "DSL"
        rows.append([label, coefficient, shown, *metrics(result, j)])
  report.tables.append(
    Table(
      "Unequal probabilities of labelling: 0.3 where Q = 1, 0.1 where Q = 0",
      ["learner", "coefficient", "method", *metric_columns()],
      rows,
      note=(
        f"{config.other_draws} draws. A g close to E[Y | Q, X] hides most of the harm done by wrong "
        "probabilities: the estimator is doubly robust."
      ),
    )
  )
  of = lambda name: results["g = Q"][name].blocks("coverage", 0, config.blocks)
  report.claims.append(
    Claim.less("ignoring unequal probabilities breaks coverage (g = Q)", of("ignoring pi"), 0.9)
  )
  report.claims.append(Claim.greater("using them keeps it (g = Q, coverage)", of("DSL"), 0.93))


def other_regressions(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Predicted covariates, both sides predicted, clusters and fixed effects."""
  del workdir
  units, labels = config.units, config.labels
  panel = functools.partial(
    simulation.clustered_panel, groups=max(units // 25, 40), periods=units // max(units // 25, 40)
  )
  panel = functools.partial(panel, labels=labels)
  designs = {
    "linear, outcome": simulation.linear_model("outcome", units, labels),
    "linear, covariate": simulation.linear_model("covariate", units, labels),
    "linear, both": simulation.linear_model("both", units, labels),
    "logistic, covariate": simulation.linear_model("covariate", units, labels, family="logistic"),
    "logistic, both": simulation.linear_model("both", units, labels, family="logistic"),
    "clusters, ordinary errors": panel(effects=0, robust=False),
    "clusters, robust errors": panel(effects=0, robust=True),
    "one-way effects": panel(effects=1, robust=True),
    "two-way effects": panel(effects=2, robust=True),
  }
  rows, dsl = [], {}
  for name, design in designs.items():
    j = 0 if len(design.truth) == 1 else SLOPE
    results = replicate(
      design,
      ("full", "SO", "SSL", "GSO", "DSL"),
      ridge,
      draws=config.draws,
      seed=config.seed,
      folds=config.folds,
    )
    rows += [[name, method, *metrics(result, j)] for method, result in results.items()]
    dsl[name] = results["DSL"].blocks("coverage", j, config.blocks)
  report.tables.append(
    Table(
      "Other regressions: what experts label",
      ["regression", "method", *metric_columns()],
      rows,
      note=(
        f"{config.draws} draws each; ridge regression as the learner. `full`: every document "
        "labelled by experts."
      ),
    )
  )
  for name, coverages in dsl.items():
    if name == "clusters, ordinary errors":
      report.claims.append(Claim.less("ordinary errors do not cover with clusters", coverages, 0.9))
    else:
      report.claims.append(Claim.greater(f"DSL's intervals cover ({name})", coverages, 0.93))


def learners(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Any learner will do; better ones give narrower intervals."""
  del workdir
  design = simulation.logistic_outcome(config.units, config.labels)
  rows = []
  for name in ("zero", "surrogate", *LEARNERS):
    learner = LEARNERS.get(name, name)
    if isinstance(learner, str) or callable(learner):
      draws = config.other_draws
      result = replicate(
        design, ("DSL",), learner, draws=draws, seed=config.seed, folds=config.folds
      )["DSL"]
    else:
      draws = config.sklearn_draws
      model = DSL("logistic", name, folds=config.folds, splits=1, seed=config.seed)
      result = simulation.replicate_with(design, model, draws=draws, seed=config.seed)
    shown = {"zero": "none, g = 0", "surrogate": "none, g = Q"}.get(name, name)
    rows.append([shown, draws, *metrics(result, SLOPE)])
  report.tables.append(
    Table(
      "Learners of g (DSL, coefficient of x1)",
      ["learner", "draws", *metric_columns()],
      rows,
      note="With few draws (scikit-learn's learners) coverage says little; the width does.",
    )
  )


def power_analysis(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Errors predicted from the present labels, and errors found with more or fewer."""
  design = functools.partial(simulation.logistic_outcome, config.units)
  draws = config.other_draws
  model = DSL("logistic", logistic, folds=config.folds, splits=1, seed=config.seed)
  pilot = max(draws // 10, 2)
  fits = simulation.fits(design(config.labels), model, draws=pilot, seed=config.seed)
  rows, ratios = [], {}
  for labels in config.power_labels:
    predicted = np.array([fit.power([labels])[0, SLOPE] for fit in fits])
    found = replicate(
      design(labels), ("DSL",), logistic, draws=draws, seed=config.seed + 1, folds=config.folds
    )["DSL"]
    error = float(np.mean(found.errors[:, SLOPE]))
    rows.append([labels, float(predicted.mean()), error, float(found.theta[:, SLOPE].std(ddof=1))])
    ratios[labels] = (predicted / error).tolist()
  report.tables.append(
    Table(
      f"Power analysis from {config.labels} expert labels (coefficient of x1)",
      [
        "expert labels",
        Column("predicted error", ".4f"),
        Column("estimated error", ".4f"),
        Column("true spread", ".4f"),
      ],
      rows,
      note=f"Mean of {pilot} predictions; mean and standard deviation of {draws} draws.",
    )
  )
  for labels, values in ratios.items():
    report.claims.append(
      Claim.less(
        f"the error at {labels} labels is foretold within a tenth ({config.labels} labels, "
        "|predicted / found - 1|)",
        [abs(float(np.mean(values)) - 1)],
        0.1,
      )
    )
  sizes = [int(config.labels * r) for r in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)]
  power = np.mean([fit.power(sizes)[:, SLOPE] for fit in fits], axis=0)
  found = [[config.labels, *config.power_labels], []]
  found[1] = [float(np.mean([fit.standard_errors[SLOPE] for fit in fits])), *(r[2] for r in rows)]
  plots.line_plot(
    workdir / "power.png",
    {"predicted": (sizes, power), "found": tuple(np.array(found)[:, np.argsort(found[0])])},
    xlabel="expert labels",
    ylabel="standard error, coefficient of x1",
    title="Power analysis",
  )
  report.figures.append(
    Figure("Power analysis", "power.png", f"Predicted from {config.labels} expert labels.")
  )


PARTS = {
  part.__name__: part
  for part in (
    main_experiment,
    accuracy_sweep,
    unequal_probabilities,
    other_regressions,
    learners,
    power_analysis,
    digits,
    complaints,
    labelled_documents,
  )
}
