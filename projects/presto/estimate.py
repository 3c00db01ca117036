"""PRESTO on a table of your own: `./run.sh presto --data=my.csv --outcome=y --covariates=x1,x2`.

--data=FILE          .csv, .tsv, .parquet (also .gz), or sklearn:NAME
--outcome=NAME       the ordered outcome
--order=A,B,C        its levels, the rare one last; by default numbers in increasing order
--covariates=A,B     numbers as they are, text as indicators; by default all other columns
--l1_ratio=1         1 is PRESTO, 0 its ridge variant
--num_lambdas=100 --smallest_ratio=1e-4 --folds=5 --seed=0
                     the penalties, and the cross-validation that chooses among them
--workdir=DIR        report.json, report.md, cross_validation.png, probabilities.csv
                     (default: runs/presto-data)
"""

import pathlib
import time

import numpy as np
from absl import flags

from common import cli
from common.data.tabular import check_complete, covariate_names, encode, is_numeric, read_table
from common.errors import UserError

_ROOT = pathlib.Path(__file__).parents[2]

_DATA = flags.DEFINE_string("data", None, "table")
_OUTCOME = flags.DEFINE_string("outcome", None, "column of the ordered outcome")
_ORDER = flags.DEFINE_list("order", None, "levels of the outcome in order, the rare one last")
_COVARIATES = flags.DEFINE_list("covariates", None, "columns of the covariates")
_L1_RATIO = flags.DEFINE_float("l1_ratio", 1.0, "1: PRESTO; 0: its ridge variant")
_NUM_LAMBDAS = flags.DEFINE_integer("num_lambdas", 100, "penalties to choose from")
_SMALLEST_RATIO = flags.DEFINE_float("smallest_ratio", 1e-4, "smallest / largest penalty")
_FOLDS = flags.DEFINE_integer("folds", 5, "folds of the cross-validation")
_SEED = flags.DEFINE_integer("seed", 0, "of the folds")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the results")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value, see --help")
  if not _DATA.value or not _OUTCOME.value:
    raise UserError("expected --data=FILE and --outcome=COLUMN; see --help")
  table = read_table(_DATA.value)
  outcome = _OUTCOME.value
  covariates = covariate_names(table, _COVARIATES.value, [outcome])
  check_complete(table, [outcome])
  y, classes = _ordered(outcome, table[outcome], _ORDER.value)
  x, names = encode(table, covariates)
  workdir = pathlib.Path(_WORKDIR.value or _ROOT / "runs" / "presto-data").absolute()
  with cli.writable_folder(workdir):
    cli.prepare_jax()
    _estimate(x, y, classes, names, workdir)


def _ordered(name: str, column: np.ndarray, order: list[str] | None):
  """The outcome and its levels in order; numbers are compared as numbers."""
  if is_numeric(column):
    try:
      return column, None if order is None else [float(level) for level in order]
    except ValueError:
      raise UserError(f"--order is {','.join(order)}, but column {name!r} has numbers") from None
  if order is None:
    levels = sorted(set(column))
    raise UserError(
      f"column {name!r} is text: give its levels in order, the rare one last, such as "
      f"--order={','.join(levels[:6])}"
    )
  return column, order


def _estimate(x, y, classes, names: list[str], workdir: pathlib.Path) -> None:
  from common.reporting import plots, report
  from projects.presto.estimator import Presto

  start = time.perf_counter()
  model = Presto(
    num_lambdas=_NUM_LAMBDAS.value,
    smallest_ratio=_SMALLEST_RATIO.value,
    l1_ratio=_L1_RATIO.value,
    folds=_FOLDS.value,
    seed=_SEED.value,
  ).fit(x, y, classes)
  probabilities = model.predict_proba(x)
  labels = [f"{c:g}" if isinstance(c, float) else str(c) for c in model.classes_]
  boundaries = [f"<= {label}" for label in labels[:-1]]
  coefficients = [["(intercept)", *model.intercept_]]
  coefficients += [[name, *slopes] for name, slopes in zip(names, model.coef_.T)]
  fit = [
    ["rows", len(x)],
    ["penalty", model.lambda_],
    ["KKT residual", model.kkt_residual_],
    [f"share of {labels[-1]}", float(np.mean(y == model.classes_[-1]))],
    [f"mean probability of {labels[-1]}", float(probabilities[:, -1].mean())],
  ]
  figures = []
  if model.cv_scores_ is not None:
    mean = model.cv_scores_.mean(axis=0)
    error = model.cv_scores_.std(axis=0, ddof=1) / len(model.cv_scores_) ** 0.5
    fit.append(["cross-validated Brier score", float(mean.min())])
    plots.line_plot(
      workdir / "cross_validation.png",
      {"Brier score": (model.lambdas_, mean, error)},
      xlabel="penalty",
      ylabel="cross-validated Brier score",
      title=f"Smallest at a penalty of {model.lambda_:.3g}",
      log="x",
    )
    figures.append(
      report.Figure("Cross-validation", "cross_validation.png", "Mean and standard error of folds.")
    )
  result = report.Report(
    project="presto",
    preset=pathlib.Path(_DATA.value).name,
    tables=[
      report.Table(
        f"Log odds of {_OUTCOME.value} at or below a level",
        ["covariate", *[report.Column(name, ".4f") for name in boundaries]],
        coefficients,
        note="Penalised estimates; they have no standard errors.",
      ),
      report.Table("Fit", ["", "value"], fit),
    ],
    figures=figures,
    environment=report.environment(),
    seconds=time.perf_counter() - start,
  )
  lines = [",".join(f'"{label}"' for label in labels)]
  lines += [",".join(f"{p:.8g}" for p in row) for row in probabilities]
  report.write_text(workdir / "probabilities.csv", "\n".join(lines) + "\n")
  report.write_report(result, workdir)
  report.print_report(result)
  print(f"written to {workdir}")
