"""A regression on your own table, some of whose values experts labelled for a few rows only.

./run.sh dsl --data=my.csv --outcome=label --covariates=x1,x2 --gold=label --surrogate=llm_label

--data=FILE            .csv, .tsv (also .gz) or .parquet, with a header
--outcome=NAME         the outcome
--covariates=A,B,...   text columns become indicators; none at all: the outcome's mean
--gold=A,...           outcome or covariates that experts label: empty where they did not
                       (default: the outcome)
--surrogate=A,...      machine-made labels, known in every row: one per gold column, in its order
--features=A,...       more columns that help to predict the expert labels
--family=linear        or logistic
--probability=NAME     column of the probabilities of being labelled (default: all equal)
--clusters=NAME        column for cluster-robust errors
--effects=A[,B]        one- or two-way fixed effects (linear)
--by=NAME              the outcome's mean in each level of a column, instead of covariates
--learner=NAME         random_forest, gradient_boosting, knn, ridge, logistic, mlp; surrogate or
                       zero use none
--folds=5 --splits=10 --seed=0 --level=0.95
--labels=A,B,...       power analysis: errors to expect with so many expert labels
--drop_missing         leave out rows with other missing values, instead of refusing them
--workdir=DIR          report.json, report.md, coefficients.csv, coefficients.png
                       (default: runs/dsl-NAME)
"""

import csv
import dataclasses
import io
import pathlib
import time

from absl import flags

from common import cli
from common.errors import UserError

_ROOT = pathlib.Path(__file__).parents[2]

_DATA = flags.DEFINE_string("data", None, "table to read")
_OUTCOME = flags.DEFINE_string("outcome", None, "outcome")
_COVARIATES = flags.DEFINE_list("covariates", [], "covariates")
_GOLD = flags.DEFINE_list("gold", None, "columns that experts label")
_SURROGATE = flags.DEFINE_list("surrogate", [], "machine-made labels")
_FEATURES = flags.DEFINE_list("features", [], "further predictors of expert labels")
_FAMILY = flags.DEFINE_enum("family", "linear", ["linear", "logistic"], "regression")
_PROBABILITY = flags.DEFINE_string("probability", None, "probabilities of being labelled")
_CLUSTERS = flags.DEFINE_string("clusters", None, "clusters")
_EFFECTS = flags.DEFINE_list("effects", [], "fixed effects")
_BY = flags.DEFINE_string("by", None, "means by level")
_LEARNER = flags.DEFINE_string("learner", "random_forest", "learner of g")
_FOLDS = flags.DEFINE_integer("folds", 5, "folds")
_SPLITS = flags.DEFINE_integer("splits", 10, "random splits")
_SEED = flags.DEFINE_integer("seed", 0, "of the splits and the learner")
_LEVEL = flags.DEFINE_float("level", 0.95, "of the intervals", 0.5, 0.9999)
_LABELS = flags.DEFINE_list("labels", [], "numbers of expert labels for the power analysis")
_DROP_MISSING = flags.DEFINE_boolean("drop_missing", False, "leave out incomplete rows")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the results")


def main(argv: list[str]) -> None:
  """Reads the table, fits DSL and its baselines, prints and writes the report."""
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value, see --help")
  if not _DATA.value or not _OUTCOME.value:
    raise UserError("expected --data=FILE and --outcome=NAME; see ./run.sh dsl --data= --help")
  sizes = [_integer(size) for size in _LABELS.value]
  path = pathlib.Path(_DATA.value)
  workdir = pathlib.Path(_WORKDIR.value or _ROOT / "runs" / f"dsl-{path.name.split('.')[0]}")
  cli.prepare_jax()
  from common.data.tabular import read_table
  from common.reporting import plots
  from common.reporting import report as reporting
  from projects.dsl.baselines import BASELINES, fit_baseline
  from projects.dsl.dsl import DSL
  from projects.dsl.problem import regression

  start = time.perf_counter()
  problem = regression(
    read_table(_DATA.value),
    outcome=_OUTCOME.value,
    covariates=_COVARIATES.value,
    gold=_GOLD.value,
    surrogates=_SURROGATE.value,
    features=_FEATURES.value,
    probability=_PROBABILITY.value,
    clusters=_CLUSTERS.value,
    effects=_EFFECTS.value,
    by=_BY.value,
    drop_missing=_DROP_MISSING.value,
  )
  model = DSL(_FAMILY.value, _LEARNER.value, _FOLDS.value, _SPLITS.value, _SEED.value)
  with cli.writable_folder(workdir):
    predictions = model.predict_gold(problem)
    fit = model.fit(problem, predictions)
    tables, fits = [fit.table(_LEVEL.value)], [fit]
    if sizes:
      tables.append(power_table(fit, sizes))
    failures = []
    for name in BASELINES:
      try:
        fits.append(fit_baseline(name, problem, model, predictions))
      except UserError as e:
        failures.append(str(e))
    tables.append(comparison_table(fits, failures))
    plots.interval_plot(
      workdir / "coefficients.png",
      fits[0].names,
      {
        f.method: (f.coefficients, f.confidence_intervals())
        for f in fits
        if f.method in ("DSL", "GSO", "SO")
      },
      xlabel="coefficient, 95 % interval",
      title=path.name,
    )
    report = reporting.Report(
      tables=tables,
      figures=[reporting.Figure("Coefficients", "coefficients.png")],
      project="dsl",
      preset=path.name,
      config={name: flag.value for name, flag in _flags().items()},
      environment=reporting.environment(),
    )
    report = dataclasses.replace(report, seconds=time.perf_counter() - start)
    reporting.write_text(workdir / "coefficients.csv", to_csv(tables[0]))
    reporting.write_report(report, workdir)
  reporting.print_report(report)
  print(f"written to {workdir}")


def power_table(fit, sizes: list[int]):
  """Expected standard errors, a row per number of expert labels; the first is the present one."""
  from common.reporting.report import Column, Table

  rows = [[fit.num_labelled, *fit.standard_errors]]
  rows += [[size, *errors] for size, errors in zip(sizes, fit.power(sizes))]
  return Table(
    "Standard errors to expect",
    ["expert labels", *(Column(name, ".4f") for name in fit.names)],
    rows,
    note="The first row is the present fit.",
  )


def comparison_table(fits, failures: list[str]):
  """Every method's estimates and standard errors."""
  from common.reporting.report import Table

  cell = lambda fit, j: f"{fit.coefficients[j]:.4f} ({fit.standard_errors[j]:.4f})"
  note = (
    "Estimate (standard error). SO: surrogates as if true; pooled: gold where known, else "
    "surrogates; SSL: predictions as if true; GSO: labelled rows only. "
  )
  return Table(
    "Beside its baselines",
    ["coefficient", *(fit.method for fit in fits)],
    [[name, *(cell(fit, j) for fit in fits)] for j, name in enumerate(fits[0].names)],
    note=note + "; ".join(failures),
  )


def to_csv(table) -> str:
  """A table as CSV, unrounded."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow([column.name for column in table.columns])
  writer.writerows(table.rows)
  return text.getvalue()


def _flags() -> dict[str, flags.FlagHolder]:
  holders = [v for v in globals().values() if isinstance(v, flags.FlagHolder)]
  return {holder.name: holder for holder in holders}


def _integer(text: str) -> int:
  try:
    return int(text)
  except ValueError:
    raise UserError(f"--labels={text}: expected whole numbers, such as 500,1000") from None
