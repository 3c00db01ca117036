"""DSL on real data: digits, complaints to Chinese officials, documents of one's own."""

import pathlib

import numpy as np
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from common.data.tabular import read_table
from common.errors import UserError
from common.paths import data_dir
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.dsl import simulation
from projects.dsl.baselines import fit_baseline
from projects.dsl.dsl import DSL
from projects.dsl.labelling import label_documents
from projects.dsl.learners import logistic
from projects.dsl.problem import regression
from projects.dsl.simulation import METHODS, Design, metric_columns, metrics, replicate


def digits(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Real images: is the digit 5 or more? A weak classifier stands in for the language model."""
  del workdir
  design, share = digits_design(config.digits_labels, config.seed)
  results = replicate(
    design, METHODS, logistic, draws=config.draws, seed=config.seed, folds=config.folds
  )
  names = ("(intercept)", "ink in the lower half", "ink on the left")
  report.tables.append(
    Table(
      f"Handwritten digits, `5 or more` regressed on ink (surrogate right in {share:.1%})",
      ["coefficient", "truth", "method", *metric_columns()],
      [
        [names[j], design.truth[j], method, *metrics(result, j)]
        for j in range(len(names))
        for method, result in results.items()
      ],
      note=(
        f"{config.draws} draws with replacement of 1797 images, {config.digits_labels} expert labels; "
        "the truth is the regression on all labels. A logistic regression on 5 % of the images is "
        "the surrogate."
      ),
    )
  )
  # The worst coefficient, so that none is chosen after the fact.
  of = lambda name, metric: [
    results[name].blocks(metric, j, config.blocks) for j in range(len(names))
  ]
  worst = lambda name: np.min(of(name, "coverage"), axis=0)
  mean_rmse = lambda name: np.mean(of(name, "rmse"), axis=0)
  report.claims.extend(
    [
      Claim.less("surrogates alone do not cover (digits, worst coefficient)", worst("SO"), 0.5),
      Claim.greater("DSL's intervals cover (digits, worst coefficient)", worst("DSL"), 0.92),
      Claim.less(
        "DSL has lower RMSE than the expert labels alone (digits, mean over coefficients)",
        {"DSL": mean_rmse("DSL"), "GSO": mean_rmse("GSO")},
      ),
    ]
  )


def digits_design(labels: int, seed: int) -> tuple[Design, float]:
  """The digits as a `Design`, and the accuracy of its surrogate."""
  data = load_digits()
  y = (data.target >= 5).astype(np.float64)
  rng = np.random.default_rng(seed)
  few = rng.permutation(len(y))[: len(y) // 20]
  weak = LogisticRegression(C=0.01, max_iter=2000).fit(data.data[few], y[few])
  surrogate = weak.predict(data.data)
  ink = data.images / data.images.mean()
  regressors = np.stack([ink[:, 4:].mean((1, 2)), ink[:, :, :4].mean((1, 2))], axis=1)
  regressors = (regressors - regressors.mean(0)) / regressors.std(0)
  regressors += 0.3 * rng.normal(size=regressors.shape)
  x = np.column_stack([np.ones(len(y)), regressors])
  features = np.column_stack([surrogate, regressors])
  design = simulation.resampled(x, y, surrogate, features, "logistic", labels)
  return design, float((surrogate == y).mean())


def complaints(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """Pan and Chen (2018): are complaints of county corruption passed on? GPT-4 is the surrogate."""
  try:
    path = data_dir("dsl") / "PanChen.csv"
  except UserError as e:
    print(f"left out: the complaints of Pan and Chen (2018); {e}")
    return
  covariates = ["countyWrong", "prefecWrong", "connect2b", "prevalence", "regionj", "groupIssue"]
  problem = regression(
    read_table(path),
    outcome="SendOrNot",
    covariates=covariates,
    gold=["countyWrong"],
    surrogates=["pred_countyWrong"],
  )
  model = DSL("logistic", "random_forest", config.folds, config.splits, config.seed)
  predictions = model.predict_gold(problem)
  fits = [model.fit(problem, predictions)]
  fits += [fit_baseline(name, problem, model, predictions) for name in ("SO", "SSL", "GSO")]
  report.tables.append(
    Table(
      f"Complaints passed on to superiors (logistic, {fits[0].num_units} complaints, "
      f"{fits[0].num_labelled} expert labels of countyWrong)",
      ["coefficient", *(f.method for f in fits)],
      [
        [name, *(f"{f.coefficients[j]:.3f} ({f.standard_errors[j]:.3f})" for f in fits)]
        for j, name in enumerate(problem.names)
      ],
      note="Estimate (standard error).",
    )
  )
  plots.interval_plot(
    workdir / "complaints.png",
    fits[0].names,
    {f.method: (f.coefficients, f.confidence_intervals()) for f in fits if f.method != "SSL"},
    xlabel="log odds, 95 % interval",
    title="Complaints passed on to superiors",
  )
  report.figures.append(
    Figure("Complaints", "complaints.png", "Pan and Chen (2018), countyWrong labelled by experts.")
  )
  dsl, gold = fits[0], fits[-1]
  report.claims.append(
    Claim.less(
      "DSL has smaller errors than the expert labels alone (complaints, mean ratio over "
      "coefficients)",
      [float(np.mean(dsl.standard_errors / gold.standard_errors))],
      1.0,
    )
  )


def labelled_documents(config: ConfigDict, workdir: pathlib.Path, report: Report) -> None:
  """The paper's experiment: documents labelled by a language model without and with examples."""
  del workdir
  folder = pathlib.Path(config.documents).expanduser()
  files = sorted(folder.glob("*.csv"))
  if not files:
    raise UserError(f"config.documents={config.documents}: expected a folder with CSV files")
  rows = []
  for path in files:
    table = read_table(path, ["text", "label", *_covariates(path)])
    for shots in config.shots:
      surrogate = label_documents(table, config.model, shots=shots, seed=config.seed)
      covariates = np.column_stack(
        [np.ones(len(surrogate)), *(table[name] for name in _covariates(path))]
      )
      features = np.column_stack([surrogate, covariates[:, 1:]])
      for family, x in (("linear", covariates[:, :1]), ("logistic", covariates)):
        labels = min(config.labels, len(surrogate) // 2)
        design = simulation.resampled(x, table["label"], surrogate, features, family, labels)
        results = replicate(
          design, METHODS, logistic, draws=config.other_draws, seed=config.seed, folds=config.folds
        )
        j = x.shape[1] - 1
        share = float((surrogate == table["label"]).mean())
        rows += [
          [path.stem, shots, share, "prevalence" if family == "linear" else "regression", method]
          + metrics(result, j)
          for method, result in results.items()
        ]
  report.tables.append(
    Table(
      f"Documents labelled by {config.model}",
      ["set", "shots", Column("accuracy", ".3f"), "target", "method", *metric_columns()],
      rows,
      note="Prevalence of label 1; logistic regression: its last coefficient.",
    )
  )


def _covariates(path: pathlib.Path) -> list[str]:
  return [name for name in read_table(path) if name not in ("text", "label")]
