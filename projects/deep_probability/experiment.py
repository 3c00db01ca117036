"""CaPE beside its baselines where the probabilities are known, and the paper's saved outputs."""

import pathlib
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.calibration import calibration_curve

from common.cli import closest
from common.errors import UserError
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.deep_probability import data, methods
from projects.deep_probability.data import Problem
from projects.deep_probability.metrics import NUM_BINS, OUTCOME_METRICS, TRUE_METRICS, evaluate
from projects.deep_probability.networks import Network
from projects.deep_probability.posthoc import CALIBRATORS

METRICS = (*TRUE_METRICS, *OUTCOME_METRICS)
LABELS = {
  "infinite": methods.INFINITE,
  "overfit": methods.OVERFIT,
  "early_stop": methods.EARLY,
  "cape_bin": methods.CAPE_BIN,
}
# The paper's models on held-out faces, from its repository's outputs: PUBLISHED_METRICS.
PUBLISHED = {
  ("linear", "infinite"): (0.0122, 0.1938, 0.709, 0.031, 0.088, 0.027),
  ("linear", "overfit"): (0.1038, 0.2911, 0.616, 0.248, 0.527, 0.146),
  ("linear", "early_stop"): (0.0368, 0.2193, 0.670, 0.106, 0.260, 0.106),
  ("linear", "cape_bin"): (0.0241, 0.2067, 0.669, 0.062, 0.171, 0.029),
  ("discrete", "infinite"): (0.0151, 0.2040, 0.687, 0.029, 0.072, 0.019),
  ("discrete", "overfit"): (0.1039, 0.2878, 0.615, 0.241, 0.411, 0.139),
  ("discrete", "early_stop"): (0.0261, 0.2139, 0.653, 0.050, 0.117, 0.024),
  ("discrete", "cape_bin"): (0.0248, 0.2115, 0.661, 0.045, 0.112, 0.020),
}
PUBLISHED_METRICS = {"MSE_p": 4, "Brier": 4, "AUC": 3, "ECE": 3, "MCE": 3, "KS": 3}  # Decimals.


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  report = Report(tables=[], figures=[], claims=[])
  console = Console(stderr=True)
  measured = {}
  for problem, network in problems(config):
    with console.status(problem.name) as status:
      tell = lambda method, status=status, name=problem.name: status.update(f"{name}: {method}")
      outcome = methods.run_methods(problem, network, config, tell)
    measured[problem.name] = {
      name: evaluate(p_hat, outcome.y, outcome.p) for name, p_hat in outcome.p_hat.items()
    }
    describe(problem.name, outcome, measured[problem.name], workdir, report)
  metric_study(measured, report, workdir)
  if config.saved_outputs:
    saved_outputs(report, workdir)
  return report


def problems(config: ConfigDict) -> Iterator[tuple[Problem, Network]]:
  """Yields the problems of the config with their networks, one at a time: images are large.

  Raises:
    UserError: unknown inputs or risks, or no images.
  """
  for risk in config.risks:
    if risk not in data.RISKS:
      raise UserError(f"unknown risk {risk!r}; {closest(risk, data.RISKS)}")
  if config.inputs == "faces":
    for risk in config.risks:
      yield data.faces(config.images, risk, size=config.image_size), Network("resnet18")
    return
  if config.inputs != "digits":
    raise UserError(f"inputs is {config.inputs!r}; expected digits or faces")
  sizes = {"train": config.train, "validation": config.validation}
  for risk in config.risks:
    problem = data.digits(risk, **sizes)
    yield problem, Network("mlp", problem.x.shape[1], tuple(config.hidden))
  if config.dimension:
    problem = data.high_dimensional(
      features=config.dimension, test=config.test_normal, seed=config.seed, **sizes
    )
    yield problem, Network("mlp", config.dimension, tuple(config.hidden_normal))


def describe(
  name: str,
  outcome: methods.Outcome,
  scores: dict[str, dict[str, np.ndarray]],
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """One problem's table, claims, learning curves and reliability diagram."""
  early = scores[methods.EARLY]["MSE_p"]
  rows = []
  for method, values in scores.items():
    gain = (values["MSE_p"] - early) / early if method != methods.EARLY else None
    error = values["MSE_p"].std(ddof=1) / len(early) ** 0.5 if len(early) > 1 else None
    rows.append([method, values["MSE_p"].mean(), error])
    rows[-1] += [None if gain is None else 100 * float(gain.mean())]
    rows[-1] += [values[metric].mean() for metric in METRICS[1:]]
  report.tables.append(
    Table(
      f"{name}: means over {len(early)} draws",
      [
        "method",
        Column("MSE_p", ".4f", "lower"),
        Column("standard error", ".4f"),
        Column("to early stop, %", "+.1f"),
        *[Column(m, ".4f" if m in ("Brier", *TRUE_METRICS) else ".3f") for m in METRICS[1:]],
      ],
      rows,
      note=(
        f'Test rows: {outcome.p.shape[1]}. Without "last epoch" a method stops at its best '
        "validation cross-entropy; the infinite-data and the overfit network are those of the last "
        f"epoch. CaPE-bin chose B = {', '.join(map(str, outcome.num_bins))}, and in "
        f"{outcome.moved} of {len(early)} draws another epoch than its starting point."
      ),
    )
  )
  report.claims.extend(claims(name, scores))
  stem = name.replace(", ", "_").replace(" = ", "")
  first = {label: outcome.curves[label] for label in ("CE", methods.INFINITE)}
  second = {
    label: outcome.curves[label] for label in (methods.CE_TUNED, methods.CAPE_BIN, methods.CAPE_KDE)
  }
  for part, curves, title in (("stage1", first, "from scratch"), ("stage2", second, "fine-tuning")):
    plots.line_plot(
      workdir / f"{stem}_{part}.png",
      {
        label: (np.arange(curve.shape[1]), curve.mean(axis=0), _standard_error(curve))
        for label, curve in curves.items()
      },
      xlabel="epoch",
      ylabel="MSE_p on test rows",
      title=f"{name}: {title}",
    )
    report.figures.append(
      Figure(
        f"Learning curves, {name}, {title}",
        f"{stem}_{part}.png",
        "Mean and standard error over the draws.",
      )
    )
  diagram = {}
  for method in (methods.OVERFIT, methods.EARLY, methods.CAPE_BIN, methods.INFINITE):
    observed, predicted = calibration_curve(
      outcome.y.ravel(), outcome.p_hat[method].ravel(), n_bins=NUM_BINS
    )
    diagram[method] = (predicted, observed)
  plots.reliability_plot(workdir / f"{stem}_reliability.png", diagram, title=name)
  report.figures.append(
    Figure(
      f"Reliability, {name}",
      f"{stem}_reliability.png",
      f"{NUM_BINS} bins of equal width; the test rows of all draws together.",
    )
  )


def _standard_error(curve: np.ndarray) -> np.ndarray:
  return curve.std(axis=0, ddof=1) / len(curve) ** 0.5 if len(curve) > 1 else 0 * curve[0]


def claims(name: str, scores: dict[str, dict[str, np.ndarray]]) -> list[Claim]:
  """What the paper says of MSE_p, for one problem."""
  error = {method: values["MSE_p"] for method, values in scores.items()}
  pair = lambda first, second: {first: error[first], second: error[second]}
  ratio = lambda first, second: error[first] / error[second]
  found = [
    Claim.less(
      f"{name}: more data helps: MSE_p of infinite data is below that of early stopping",
      pair(methods.INFINITE, methods.EARLY),
    ),
    Claim.greater(
      f"{name}: early learning, then memorisation: MSE_p of the overfit network is at least twice "
      "that of early stopping",
      ratio(methods.OVERFIT, methods.EARLY),
      2.0,
    ),
  ]
  for cape in (methods.CAPE_BIN, methods.CAPE_KDE):
    final = f"{cape}, last epoch"
    found += [
      Claim.less(
        f"{name}: {cape} does not memorise: after the whole fine-tuning its MSE_p is below that of "
        "cross-entropy",
        pair(final, methods.CE_TUNED_LAST),
      ),
      Claim.less(
        f"... in every draw ({name}, {cape}; the largest difference)",
        [float(np.max(error[final] - error[methods.CE_TUNED_LAST]))],
      ),
      Claim.less(
        f"{name}: {cape} costs nothing: its MSE_p is at most 1.05 times that of early stopping",
        ratio(cape, methods.EARLY),
        1.05,
      ),
      Claim.less(
        f"{name}: {cape} improves on early stopping in MSE_p (the paper: by 5 to 35 %)",
        pair(cape, methods.EARLY),
      ),
      Claim.less(
        f"{name}: {cape} at its best epoch is below cross-entropy fine-tuned as long, at its best",
        pair(cape, methods.CE_TUNED),
      ),
    ]
  # Those that see what CaPE sees.
  baselines = (*CALIBRATORS, methods.FOCAL, methods.ENTROPY, methods.MMCE)
  baselines += (methods.MMCE_PUBLISHED, methods.ENSEMBLE, methods.CE_TUNED)
  others = {method: error[method].mean() for method in baselines}
  best = min(others, key=others.get)
  found.append(
    Claim.less(
      f"{name}: CaPE-bin's MSE_p is below that of the best baseline, {best}",
      pair(methods.CAPE_BIN, best),
    )
  )
  return found


def metric_study(
  measured: dict[str, dict[str, dict[str, np.ndarray]]], report: Report, workdir: pathlib.Path
) -> None:
  """Which metric of outcomes ranks the methods as MSE_p does: Spearman's rho.

  Within each problem over the methods, by their means over draws and draw by draw; and over all
  methods and problems together.
  """
  rho = lambda a, b: float(spearmanr(a, b).statistic)
  rows = []
  sign = {"AUC": -1}
  for metric in OUTCOME_METRICS:
    flip = sign.get(metric, 1)
    row = [metric]
    pooled_true, pooled = [], []
    for scores in measured.values():
      true = np.stack([values["MSE_p"] for values in scores.values()])  # [methods, draws]
      value = flip * np.stack([values[metric] for values in scores.values()])
      row += [
        rho(true.mean(axis=1), value.mean(axis=1)),
        float(np.mean([rho(t, v) for t, v in zip(true.T, value.T)])),
      ]
      pooled_true.append(true.mean(axis=1))
      pooled.append(value.mean(axis=1))
    rows.append([*row, rho(np.concatenate(pooled_true), np.concatenate(pooled))])
  columns = ["metric"]
  for name in measured:
    columns += [Column(f"{name}", ".2f"), Column(f"{name}, one draw", ".2f")]
  report.tables.append(
    Table(
      "Metrics of outcomes: Spearman correlation with MSE_p over the methods",
      [*columns, Column("all together", ".2f")],
      rows,
      note=(
        "By the methods' means over the draws, or draw by draw and then averaged. AUC with its sign "
        "turned. All together: methods and problems pooled."
      ),
    )
  )
  plots.heatmap(
    workdir / "metrics.png",
    np.array([row[1:-1:2] for row in rows]).T,
    list(measured),
    [row[0] for row in rows],
    title="Spearman correlation with MSE_p over methods",
    annotate=".2f",
  )
  report.figures.append(Figure("Metric study", "metrics.png", "Over the methods, by their means."))


def saved_outputs(report: Report, workdir: pathlib.Path) -> None:
  """The headline table, recomputed from the published outputs of the paper's networks."""
  try:
    saved = data.saved_outputs()
  except UserError as e:  # The other parts need no data set, and run without.
    report.tables.append(Table("Not run: the paper's saved outputs", ["reason"], [[str(e)]]))
    return
  scores, diagram = {}, {}
  for key, outputs in saved.items():
    values = evaluate(*(part[None] for part in outputs))
    scores[key] = {metric: float(value[0]) for metric, value in values.items()}
    # As published: bins between quantiles, which are not quite of equal count for 4,738 rows.
    observed, predicted = calibration_curve(
      outputs.y, outputs.p_hat, n_bins=NUM_BINS, strategy="quantile"
    )
    gap = np.abs(observed - predicted)
    if key[0] == "linear":
      diagram[LABELS[key[1]]] = (predicted, observed)
    scores[key] |= {"ECE": float(gap.mean()), "MCE": float(gap.max())}
  rows, off = [], []
  for key, values in scores.items():
    row = [key[0], LABELS[key[1]]]
    for published, (metric, decimals) in zip(PUBLISHED[key], PUBLISHED_METRICS.items()):
      row += [values[metric], published]
      off.append(abs(values[metric] - published) * 10**decimals)
    rows.append(row)
  columns = ["scenario", "model"]
  for metric, decimals in PUBLISHED_METRICS.items():
    columns += [Column(metric, f".{decimals}f"), Column(f"paper's {metric}", f".{decimals}f")]
  report.tables.append(
    Table(
      "The paper's ResNet-18 on faces, from its saved outputs",
      columns,
      rows,
      note=(
        "4,738 held-out faces. ECE and MCE here have bins between scikit-learn's quantiles, as the "
        "paper's code."
      ),
    )
  )
  report.claims.append(
    Claim.less(
      "our metrics of the paper's saved outputs are the published ones: largest difference in units "
      "of the last published digit",
      [max(off)],
      0.51,
    )
  )
  for scenario in data.SAVED_SCENARIOS:
    error = lambda model, s=scenario: [scores[s, model]["MSE_p"]]
    report.claims.append(
      Claim.less(
        f"faces, {scenario}: CaPE-bin improves on early stopping in MSE_p",
        {methods.CAPE_BIN: error("cape_bin"), methods.EARLY: error("early_stop")},
      )
    )
  report.tables.append(
    Table(
      "Metrics of outcomes on faces: Spearman correlation with MSE_p over the paper's 4 models",
      ["metric", *[Column(scenario, ".2f") for scenario in data.SAVED_SCENARIOS]],
      [
        [metric]
        + [
          float(
            spearmanr(
              [scores[s, m]["MSE_p"] for m in data.SAVED_MODELS],
              [(-1 if metric == "AUC" else 1) * scores[s, m][metric] for m in data.SAVED_MODELS],
            ).statistic
          )
          for s in data.SAVED_SCENARIOS
        ]
        for metric in OUTCOME_METRICS
      ],
      note="AUC with its sign turned.",
    )
  )
  plots.reliability_plot(workdir / "faces_reliability.png", diagram, title="faces, linear")
  report.figures.append(
    Figure("Reliability, faces", "faces_reliability.png", f"{NUM_BINS} bins of equal count.")
  )
