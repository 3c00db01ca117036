"""Quantiles of a table of your own: `./run.sh quantile_aggregation --data=my.csv --outcome=y`.

--data=FILE          .csv, .tsv, .parquet (also .gz), or sklearn:NAME
--outcome=NAME       a column of numbers
--covariates=A,B     numbers as they are, text as indicators; by default all other columns
--levels=0.05,0.5,0.95
                     increasing, between 0 and 1
--learners=CGN,MQR,RF,GBM
                     base models; also SQR, XT, LQR
--resolution=medium --local=True
                     weights: coarse, medium, fine or factored; whether they depend on x
--calibration=none   cqr (sets a fifth of the rows apart) or cv+
--isotoniser=sort --folds=5 --seed=0
--workdir=DIR        report.json, report.md, quantiles.png, quantiles.csv
                     (default: runs/quantile_aggregation-data)

A tenth of the rows, at random, is kept for the test that the table shows; the model that writes
quantiles.csv, for every row, is that of the other rows.
"""

import pathlib
import time

import numpy as np
from absl import flags

from common import cli
from common.data.tabular import covariate_names, encode, numeric, read_table
from common.errors import UserError

_ROOT = pathlib.Path(__file__).parents[2]
_TEST_SHARE = 0.1

_DATA = flags.DEFINE_string("data", None, "table")
_OUTCOME = flags.DEFINE_string("outcome", None, "column of the outcome")
_COVARIATES = flags.DEFINE_list("covariates", None, "columns of the covariates")
_LEVELS = flags.DEFINE_list("levels", ["0.05", "0.25", "0.5", "0.75", "0.95"], "quantile levels")
_LEARNERS = flags.DEFINE_list("learners", ["CGN", "MQR", "RF", "GBM"], "base models")
_RESOLUTION = flags.DEFINE_string("resolution", "medium", "coarse, medium, fine or factored")
_LOCAL = flags.DEFINE_bool("local", True, "weights depend on the covariates")
_CALIBRATION = flags.DEFINE_string("calibration", "none", "none, cqr or cv+")
_ISOTONISER = flags.DEFINE_string("isotoniser", "sort", "how crossed quantiles are mended")
_FOLDS = flags.DEFINE_integer("folds", 5, "folds of the out-of-fold predictions")
_SEED = flags.DEFINE_integer("seed", 0, "of splits, draws and initial values")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the results")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value, see --help")
  if not _DATA.value or not _OUTCOME.value:
    raise UserError("expected --data=FILE and --outcome=COLUMN; see --help")
  try:
    levels = [float(level) for level in _LEVELS.value]
  except ValueError:
    raise UserError(f"--levels={','.join(_LEVELS.value)}: expected numbers, as 0.05,0.5") from None
  table = read_table(_DATA.value)
  outcome = _OUTCOME.value
  covariates = covariate_names(table, _COVARIATES.value, [outcome])
  y = numeric(table, outcome)
  x, _ = encode(table, covariates)
  workdir = pathlib.Path(_WORKDIR.value or _ROOT / "runs" / "quantile_aggregation-data").absolute()
  with cli.writable_folder(workdir):
    cli.prepare_jax()
    _estimate(x, y, levels, workdir)


def _estimate(x: np.ndarray, y: np.ndarray, levels: list[float], workdir: pathlib.Path) -> None:
  from common.evaluation.scoring_rules import pinball_loss
  from common.reporting import plots, report
  from projects.quantile_aggregation.estimator import QuantileAggregator, check_data

  start = time.perf_counter()
  model = QuantileAggregator(
    levels,
    learners=_LEARNERS.value,
    resolution=_RESOLUTION.value,
    local=_LOCAL.value,
    isotoniser=_ISOTONISER.value,
    calibration=_CALIBRATION.value,
    folds=_FOLDS.value,
    seed=_SEED.value,
  )
  x, y = check_data(x, y)
  order = np.random.default_rng(_SEED.value).permutation(len(y))
  test, train = np.split(order, [max(1, round(_TEST_SHARE * len(y)))])
  model.fit(x[train], y[train])
  quantiles = model.predict_quantiles(x)
  q, outcome, taus = quantiles[test], y[test], model.levels_
  loss = np.asarray(pinball_loss(q, taus, outcome)).mean(axis=0)
  fixed = np.asarray(pinball_loss(np.quantile(y[train], taus)[None], taus, outcome)).mean(axis=0)
  rows = [
    [f"{taus[k]:g}", float((outcome <= q[:, k]).mean()), float(loss[k]), float(fixed[k])]
    for k in range(len(taus))
  ]
  sd = y[train].std()
  library = [[name, value] for name, value in model.base_losses_.items()]
  place = np.argsort(q[:, np.abs(taus - 0.5).argmin()])
  plots.line_plot(
    workdir / "quantiles.png",
    {
      f"level {taus[k]:g}": (np.arange(len(test)), q[place, k])
      for k in sorted({0, len(taus) // 2, len(taus) - 1})
    }
    | {"outcome": (np.arange(len(test)), outcome[place])},
    xlabel="test row, in the order of the median",
    ylabel=_OUTCOME.value,
    title=f"Quantiles of {len(test)} test rows",
  )
  result = report.Report(
    project="quantile_aggregation",
    preset=pathlib.Path(_DATA.value).name,
    tables=[
      report.Table(
        f"Quantiles of {_OUTCOME.value} on {len(test)} test rows",
        [
          "level",
          report.Column("outcomes at or below", ".3f"),
          report.Column("pinball loss", ".4g"),
          report.Column("without covariates", ".4g"),
        ],
        rows,
        note=(
          f"{len(train)} other rows. Without covariates: the loss of their empirical quantiles. "
          f"Calibration: {_CALIBRATION.value}."
        ),
      ),
      report.Table(
        "Mean pinball loss on the validation rows",
        ["model", report.Column("loss / deviation of the outcome", ".4f", "lower")],
        [*library, ["aggregate", model.validation_loss_]],
        note=f"The deviation is {sd:.4g}. These rows chose the settings: the losses flatter.",
      ),
    ],
    figures=[report.Figure("Quantiles", "quantiles.png", "Outcomes and quantiles of test rows.")],
    environment=report.environment(),
    seconds=time.perf_counter() - start,
  )
  lines = [",".join(f"q{level:g}" for level in taus)]
  lines += [",".join(f"{value:.8g}" for value in row) for row in quantiles]
  report.write_text(workdir / "quantiles.csv", "\n".join(lines) + "\n")
  report.write_report(result, workdir)
  report.print_report(result)
  print(f"written to {workdir}")
