"""Instance labels from a table with the counts of bags: `./run.sh llp_bp --data=my.csv --bag=B --count=C`.

--data=FILE          .csv, .tsv, .parquet (also .gz), or sklearn:NAME; a row per instance
--bag=NAME           column of the instances' bags
--count=NAME         column of the positives of a row's bag; the same in all rows of a bag
--proportion=NAME    instead of --count: their share, which times the bag's size is a whole number
--covariates=A,B     numbers as they are, text as indicators; by default all other columns
--bag_factor=cardinality
                     or quadratic: all pairs of bag mates, quadratic in the bags' sizes
--rounds=2 --neighbours=5,10,25 --lambda_s=0.1,0.25,0.5 --lambda_bag=4,8,12
                     candidates; the best for the counts of held-out bags is chosen
--validation_share=0.1 --seed=0
                     bags that are held out
--workdir=DIR        report.json, report.md, bags.png, probabilities.csv (default: runs/llp_bp-data)
"""

import pathlib
import time

import numpy as np
from absl import flags

from common import cli
from common.data.tabular import check_complete, covariate_names, encode, read_table
from common.errors import UserError
from projects.llp_bp.counts import bag_counts

_ROOT = pathlib.Path(__file__).parents[2]

_DATA = flags.DEFINE_string("data", None, "table")
_BAG = flags.DEFINE_string("bag", None, "column of the bags")
_COUNT = flags.DEFINE_string("count", None, "column of the bags' positives")
_PROPORTION = flags.DEFINE_string("proportion", None, "column of the bags' shares of positives")
_COVARIATES = flags.DEFINE_list("covariates", None, "columns of the covariates")
_BAG_FACTOR = flags.DEFINE_enum(
  "bag_factor", "cardinality", ["cardinality", "quadratic"], "factor of a bag"
)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "of belief propagation and training")
_NEIGHBOURS = flags.DEFINE_list("neighbours", ["5", "10", "25"], "candidates of k")
_LAMBDA_S = flags.DEFINE_list("lambda_s", ["0.1", "0.25", "0.5"], "weights of the edges")
_LAMBDA_BAG = flags.DEFINE_list("lambda_bag", ["4", "8", "12"], "weights of the counts")
_VALIDATION_SHARE = flags.DEFINE_float("validation_share", 0.1, "bags that are held out")
_SEED = flags.DEFINE_integer("seed", 0, "of the held-out bags and the training")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the results")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value, see --help")
  given = _COUNT.value or _PROPORTION.value
  if not _DATA.value or not _BAG.value or not given or (_COUNT.value and _PROPORTION.value):
    raise UserError(
      "expected --data=FILE, --bag=COLUMN and one of --count=COLUMN and --proportion=COLUMN; see "
      "--help"
    )
  table = read_table(_DATA.value)
  covariates = covariate_names(table, _COVARIATES.value, (_BAG.value, given))
  check_complete(table, [_BAG.value])
  counts = bag_counts(table, _BAG.value, given, proportion=bool(_PROPORTION.value))
  x, _ = encode(table, covariates)
  options = {
    "neighbours": tuple(map(int, _numbers("neighbours", _NEIGHBOURS.value))),
    "lambda_s": _numbers("lambda_s", _LAMBDA_S.value),
    "lambda_bag": _numbers("lambda_bag", _LAMBDA_BAG.value),
    "bag_factor": _BAG_FACTOR.value,
    "rounds": _ROUNDS.value,
  }
  workdir = pathlib.Path(_WORKDIR.value or _ROOT / "runs" / "llp_bp-data").absolute()
  with cli.writable_folder(workdir):
    cli.prepare_jax()
    _estimate(x, table[_BAG.value], counts, options, workdir)


def _numbers(flag: str, values: list[str]) -> tuple[float, ...]:
  try:
    return tuple(float(value) for value in values)
  except ValueError:
    raise UserError(f"--{flag} is {','.join(values)}; expected numbers with commas") from None


def _by_share(shares: np.ndarray, predicted: np.ndarray) -> tuple[list[float], list[float]]:
  """Means of both, of up to 10 groups of bags with similar shares."""
  groups = np.array_split(np.argsort(shares), min(10, len(shares)))
  return [shares[rows].mean() for rows in groups], [predicted[rows].mean() for rows in groups]


def _estimate(x, bags, counts: dict, options: dict, workdir: pathlib.Path) -> None:
  from common.reporting import plots, report
  from projects.llp_bp.estimator import BagClassifier

  start = time.perf_counter()
  model = BagClassifier(validation_share=_VALIDATION_SHARE.value, seed=_SEED.value, **options)
  probability = model.fit(x, bags, counts).predict_proba(x)[:, 1]
  labels, codes, sizes = np.unique(bags, return_inverse=True, return_counts=True)
  shares = np.array([counts[label] for label in labels.tolist()]) / sizes
  predicted = np.bincount(codes, weights=probability) / sizes
  learnt = np.zeros(len(labels), bool)
  learnt[codes[model.training_rows_]] = True
  rows = []
  for number, done in enumerate(model.rounds_, 1):
    c = done.chosen
    rows.append([number, c.neighbours, c.lambda_s, c.lambda_bag, c.score])
    rows[-1] += [c.iterations, c.residual, "yes" if c.converged else "no"]
  errors = np.abs(predicted - shares)
  constant = np.abs(shares - shares[learnt] @ sizes[learnt] / sizes[learnt].sum())
  fit = [
    ["rows", len(x)],
    ["bags", len(labels)],
    ["share of positives", float(shares @ sizes / len(x))],
    ["mean probability", float(probability.mean())],
    ["mean error of a bag's share, learnt from", float(errors[learnt].mean())],
    ["mean error of a bag's share, held out", float(errors[~learnt].mean())],
    ["... if every share were the overall one, held out", float(constant[~learnt].mean())],
  ]
  plots.line_plot(
    workdir / "bags.png",
    {
      name: _by_share(shares[kept], predicted[kept])
      for name, kept in {"learnt from": learnt, "held out": ~learnt}.items()
    },
    xlabel="share of positives of a bag",
    ylabel="mean probability of its rows",
    title="Bags: given and predicted",
  )
  converged = "" if model.converged_ else " Belief propagation did NOT converge in all rounds."
  result = report.Report(
    project="llp_bp",
    preset=pathlib.Path(_DATA.value).name,
    tables=[
      report.Table(
        "Belief propagation, the candidate chosen in each round",
        ["round", "k", report.Column("lambda_s", ".3g"), "lambda_bag", report.Column("fit", ".4f")]
        + ["iterations", report.Column("residual", ".1e"), "converged"],
        rows,
        note="Fit: minus the cross-entropy of the shares of held-out bags." + converged,
      ),
      report.Table("Fit", ["", "value"], fit),
    ],
    figures=[
      report.Figure(
        "Bags", "bags.png", "Bags in up to 10 groups by their share; means of the groups."
      )
    ],
    environment=report.environment(),
    seconds=time.perf_counter() - start,
  )
  lines = ["probability", *(f"{p:.6g}" for p in probability)]
  report.write_text(workdir / "probabilities.csv", "\n".join(lines) + "\n")
  report.write_report(result, workdir)
  report.print_report(result)
  print(f"written to {workdir}")
