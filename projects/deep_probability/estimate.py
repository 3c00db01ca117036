"""CaPE on a table: `./run.sh deep_probability --data=my.csv --outcome=y --covariates=a,b`.

--data=FILE          .csv, .tsv, .parquet (also .gz), or sklearn:NAME
--outcome=NAME       a column of two values; the larger one, or the later in the alphabet, is the event
--event=VALUE        the event, if it is the other one
--covariates=A,B     numbers as they are, text as indicators; by default all other columns
--targets=bin        bin or kde: the empirical probabilities that CaPE trains on
--num_bins=10 --hidden=64,64 --epochs=100 --fine_tune_epochs=100
--test_share=0.25    rows held out of everything, on which the printed table is measured
--seed=0             of the splits and the network
--workdir=DIR        report.json, report.md, reliability.png, probabilities.csv
                     (default: runs/deep_probability-data)
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
_OUTCOME = flags.DEFINE_string("outcome", None, "column of the outcome")
_EVENT = flags.DEFINE_string("event", None, "value of the outcome that is the event")
_COVARIATES = flags.DEFINE_list("covariates", None, "columns of the covariates")
_TARGETS = flags.DEFINE_enum("targets", "bin", ["bin", "kde"], "CaPE-bin or CaPE-kde")
_NUM_BINS = flags.DEFINE_integer("num_bins", 10, "B of CaPE-bin")
_HIDDEN = flags.DEFINE_list("hidden", ["64", "64"], "widths of the hidden layers")
_EPOCHS = flags.DEFINE_integer("epochs", 100, "of cross-entropy, at most")
_FINE_TUNE_EPOCHS = flags.DEFINE_integer("fine_tune_epochs", 100, "of CaPE, at most")
_TEST_SHARE = flags.DEFINE_float("test_share", 0.25, "share of the rows to measure on")
_SEED = flags.DEFINE_integer("seed", 0, "of the splits and the network")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the results")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value, see --help")
  if not _DATA.value or not _OUTCOME.value:
    raise UserError("expected --data=FILE and --outcome=COLUMN; see --help")
  if not 0 < _TEST_SHARE.value < 1:
    raise UserError(f"--test_share is {_TEST_SHARE.value}; expected a share between 0 and 1")
  try:
    hidden = tuple(int(width) for width in _HIDDEN.value if width)
  except ValueError:
    raise UserError(f"--hidden is {','.join(_HIDDEN.value)}; expected whole numbers") from None
  table = read_table(_DATA.value)
  outcome = _OUTCOME.value
  covariates = covariate_names(table, _COVARIATES.value, [outcome])
  check_complete(table, [outcome])
  y, event = binary(outcome, table[outcome], _EVENT.value)
  x, _ = encode(table, covariates)
  workdir = pathlib.Path(_WORKDIR.value or _ROOT / "runs" / "deep_probability-data").absolute()
  with cli.writable_folder(workdir):
    cli.prepare_jax()
    _estimate(x, y, event, hidden, workdir)


def binary(name: str, column: np.ndarray, event: str | None) -> tuple[np.ndarray, str]:
  """The outcome as 0 and 1, int [n], and the event's name.

  Raises:
    UserError: not two values, a value with fewer than four rows, or an event that does not occur.
  """
  levels, codes, counts = np.unique(column, return_inverse=True, return_counts=True)
  names = [f"{level:g}" if is_numeric(column) else level for level in levels]
  if len(levels) != 2:
    shown = ", ".join(names[:4]) + (", ..." if len(levels) > 4 else "")
    raise UserError(f"column {name!r} has {len(levels)} values ({shown}); expected exactly 2")
  if counts.min() < 4:
    raise UserError(
      f"column {name!r} is {names[counts.argmin()]} in {counts.min()} rows; expected at least 4 of "
      "either value: they are split into training, validation and test"
    )
  if event is None:
    return codes, names[1]
  if event not in names:
    raise UserError(f"--event is {event}, but column {name!r} is {' or '.join(names)}")
  return (codes == names.index(event)).astype(int), event


def _estimate(
  x: np.ndarray, y: np.ndarray, event: str, hidden: tuple[int, ...], workdir: pathlib.Path
) -> None:
  from sklearn.calibration import calibration_curve

  from common.reporting import plots, report
  from projects.deep_probability.estimator import CapeClassifier, stratified_split
  from projects.deep_probability.metrics import with_intervals

  start = time.perf_counter()
  model = CapeClassifier(
    targets=_TARGETS.value,
    num_bins=_NUM_BINS.value,
    hidden=hidden,
    epochs=_EPOCHS.value,
    fine_tune_epochs=_FINE_TUNE_EPOCHS.value,
    seed=_SEED.value,
  )
  # The split's own stream: the classifier splits what it is given with the seed itself.
  kept, test = stratified_split(y, _TEST_SHARE.value, np.random.default_rng([_SEED.value, 1]))
  constant = np.flatnonzero(x[kept].min(axis=0) == x[kept].max(axis=0))
  x = np.delete(x, constant, axis=1)
  if not x.shape[1]:
    raise UserError("every covariate is constant among the rows that are not held out")
  model.fit(x[kept], y[kept])
  base_rate = np.full(len(test), y[kept].mean())
  stages = {"early stop": "cross-entropy, early stop", "CaPE": f"CaPE-{_TARGETS.value}"}
  forecasts = {"base rate": base_rate} | {
    label: model.predict_proba(x[test], stage=stage)[:, 1] for stage, label in stages.items()
  }
  rows, diagram = [], {}
  for label, p_hat in forecasts.items():
    scores = with_intervals(p_hat, y[test], seed=_SEED.value)
    rows.append([label])
    for metric in ("Brier", "NLL", "ECE", "KS"):
      estimate, low, high = scores[metric]
      # Sorting a constant says nothing: its bins would be the order of the rows.
      sorts = label == "base rate" and metric in ("ECE", "KS")
      rows[-1] += [None, None] if sorts else [estimate, f"{low:.3f} to {high:.3f}"]
    if label != "base rate":
      observed, predicted = calibration_curve(y[test], p_hat, n_bins=10, strategy="quantile")
      diagram[label] = (predicted, observed)
  plots.reliability_plot(
    workdir / "reliability.png", diagram, title=f"{_OUTCOME.value} = {event}, test rows"
  )
  columns = ["method"]
  for metric in ("Brier", "log score", "ECE", "KS"):
    columns += [report.Column(metric, ".4f", "lower"), f"{metric}, 95 %"]
  epochs = model.best_epoch_
  kept_epoch = f"epoch {epochs['CaPE']}" if epochs["CaPE"] else "its starting point"
  dropped = f" Left out, constant outside the test rows: {len(constant)}." if len(constant) else ""
  result = report.Report(
    project="deep_probability",
    preset=pathlib.Path(_DATA.value).name,
    tables=[
      report.Table(
        f"Probability of {_OUTCOME.value} = {event}, on {len(test)} test rows",
        columns,
        rows,
        note=(
          "Percentile bootstrap over the test rows. ECE (15 bins of equal count, which count alike) "
          "and KS are at least 0 and grow with noise: their intervals lie too high."
        ),
      ),
      report.Table(
        "Fit",
        ["", "value"],
        [
          ["rows: training", len(model.training_rows_)],
          ["rows: validation", len(model.validation_rows_)],
          ["rows: test", len(test)],
          ["regressors", x.shape[1]],
          [f"share of {event}", float(y.mean())],
          [f"mean probability of {event}, test", float(forecasts[stages["CaPE"]].mean())],
          ["epoch of early stopping", epochs["early stop"]],
          ["epoch of CaPE, 0 is the start", epochs["CaPE"]],
        ],
        note=f"On validation CaPE was best at {kept_epoch}.{dropped}",
      ),
    ],
    figures=[
      report.Figure("Reliability", "reliability.png", "Up to 10 bins of equal count, test rows.")
    ],
    environment=report.environment(),
    seconds=time.perf_counter() - start,
  )
  part = np.full(len(x), "training", object)
  part[kept[model.validation_rows_]] = "validation"
  part[test] = "test"
  p_hat = model.predict_proba(x)[:, 1]
  lines = ["probability,part", *(f"{p:.6g},{name}" for p, name in zip(p_hat, part))]
  report.write_text(workdir / "probabilities.csv", "\n".join(lines) + "\n")
  report.write_report(result, workdir)
  report.print_report(result)
  print(f"written to {workdir}")
