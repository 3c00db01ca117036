"""Deep quantile aggregation beside its base models, fixed averages and linear aggregation."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from scipy import stats

from common.errors import UserError
from common.evaluation.calibration import coverage, interval_width
from common.evaluation.scoring_rules import interval_score, pinball_loss, weighted_interval_score
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.quantile_aggregation import baselines, conformal, data, dqa, isotonic, library
from projects.quantile_aggregation.aggregators import Form
from projects.quantile_aggregation.search import Budget, Shape

AVERAGE, MEDIAN, MIXTURE, QRA, FQRA = "average", "median", "mixture", "QRA", "FQRA"
# The six of the DQA family, and the factored form.
FORMS = {
  f"{'local' if local else 'global'} {resolution}": Form(resolution, local)
  for local in (False, True)
  for resolution in ("coarse", "medium", "fine")
} | {"global factored": Form("factored", False)}
# Variants of the aggregator that the config puts first.
RAW, PAVA, SWEEP = "DQA, not sorted", "DQA, PAVA", "DQA, median outwards"
CQR, CQR_PAIRS, CV_PLUS = "DQA + CQR", "DQA + CQR, pairs", "DQA + CV+"
CONFORMAL = (CQR, CQR_PAIRS, CV_PLUS)


class Scores(NamedTuple):
  """Of one method on the test rows of one split; the outcome has unit deviation.

  Attributes:
    pinball, wis: mean pinball loss and weighted interval score.
    coverage_error: mean |PICP - nominal| over the central intervals.
    calibration_error: mean |share of outcomes at or below a quantile - level|.
    width: of the widest central interval, mean.
    sharpness: mean width over all central intervals.
    interval_scores, picp: of each central interval, [pairs].
  """

  pinball: float
  wis: float
  coverage_error: float
  calibration_error: float
  width: float
  sharpness: float
  interval_scores: np.ndarray
  picp: np.ndarray


def score(q: np.ndarray, y: np.ndarray, levels: np.ndarray) -> Scores:
  """Scores quantiles [n, m] at symmetric levels [m], in float64."""
  q, y = np.asarray(q, np.float64), np.asarray(y, np.float64)
  pairs = len(levels) // 2
  low, high, alpha = q[:, :pairs], q[:, ::-1][:, :pairs], 2 * levels[:pairs]
  picp = np.asarray(coverage(low, high, y[:, None]))
  width = np.asarray(interval_width(low, high))
  return Scores(
    float(np.mean(pinball_loss(q, levels, y))),
    float(np.mean(weighted_interval_score(q, levels, y))),
    float(np.abs(picp - (1 - alpha)).mean()),
    float(np.abs((y[:, None] <= q).mean(axis=0) - levels).mean()),
    float(width[0]),
    float(width.mean()),
    np.asarray(interval_score(low, high, y[:, None], alpha)).mean(axis=0),
    picp,
  )


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """The real tables, the switches, and the synthetic set where local weights must win."""
  check(config)
  report = Report(tables=[], figures=[], claims=[])
  levels = np.arange(1, config.levels + 1) / (config.levels + 1)
  budget = Budget(**config.budget)
  real_tables(config, levels, budget, workdir, report)
  if config.expert_rows:
    experts(config, levels, budget, workdir, report)
  return report


def check(config: ConfigDict) -> None:
  """Refuses names and numbers that no part could use.

  Raises:
    UserError: an unknown set, learner, isotoniser or kind of margins; fewer than 3 levels.
  """
  for field, known in (
    ("sets", (*data.UCI_SETS, "diabetes")),
    ("ablation_sets", (*data.UCI_SETS, "diabetes")),
    ("learners", library.LEARNERS),
    ("forms", FORMS),
  ):
    for name in config[field]:
      if name not in known:
        raise UserError(f"{field} has {name!r}; expected {', '.join(known)}")
  for field, known in (
    ("isotoniser", isotonic.ISOTONISERS),
    ("margins", dqa.GRIDS),
    ("aggregator", config.forms),
  ):
    if config[field] not in known:
      raise UserError(f"{field} is {config[field]!r}; expected one of {', '.join(known)}")
  if config.levels < 3 or config.levels % 2 == 0:
    raise UserError(f"levels is {config.levels}; expected an odd number, at least 3")


class Prepared(NamedTuple):
  """A split with the predictions of its library; predictions are [K + 1, n, p, m]."""

  parts: data.Parts
  folds: np.ndarray
  train: dqa.Rows
  validation: dqa.Rows
  test: dqa.Rows
  train_folds: np.ndarray
  test_folds: np.ndarray
  shape: Shape


def side_by_side(function: Callable, items: Sequence) -> dict:
  """{item: function(item)} by threads: compiling, training and trees leave Python to the others."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(items, pool.map(function, items)))


def prepare(
  parts: data.Parts,
  shape: Shape,
  seed: int,
  config: ConfigDict,
  levels: np.ndarray,
  budget: Budget,
) -> Prepared:
  """Fits the library to the training part of a split."""
  folds = library.contiguous_folds(len(parts.train.y), config.folds)
  everything = np.concatenate([part.x for part in parts])
  fit = lambda kind: library.fit_learner(
    kind, parts.train, parts.validation, levels, folds, budget, seed, shape
  )
  learners = side_by_side(fit, config.learners).values()
  # All rows at once: one compilation.
  predictions = np.stack([learner(everything) for learner in learners], axis=2)
  ends = np.cumsum([len(part.y) for part in parts])[:-1]
  train, validation, test = np.split(predictions, ends, axis=1)
  return Prepared(
    parts,
    folds,
    dqa.Rows(library.out_of_fold(train, folds), *parts.train),
    dqa.Rows(validation[-1], *parts.validation),
    dqa.Rows(test[-1], *parts.test),
    train,
    test,
    shape,
  )


def predict_all(
  split: Prepared, seed: int, config: ConfigDict, levels: np.ndarray, budget: Budget
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Test quantiles [n, m] of every method, uncrossed except RAW; and those before isotonisation."""
  train, validation, test = split.train, split.validation, split.test
  isotonise = lambda q: np.asarray(isotonic.ISOTONISERS[config.isotoniser](jnp.asarray(q)))
  raw = {kind: test.z[:, j] for j, kind in enumerate(config.learners)}
  raw[AVERAGE] = np.asarray(baselines.average(test.z))
  raw[MEDIAN] = np.asarray(baselines.median(test.z))
  raw[MIXTURE] = np.asarray(baselines.mixture(test.z, jnp.asarray(levels, jnp.float32)))
  raw[QRA] = np.einsum("pm,npm->nm", baselines.fit_qra(train.z, train.y, levels), test.z)
  fqra = baselines.fit_fqra(train.z, train.y, validation.z, validation.y, levels)
  raw[FQRA] = fqra(test.z)
  fit = lambda name: dqa.fit(
    FORMS[name]._replace(isotoniser=config.isotoniser),
    train,
    validation,
    levels,
    budget,
    seed,
    margins=config.margins,
    folds=split.folds if name == config.aggregator else None,
    shape=split.shape,
  )
  fitted = side_by_side(fit, config.forms[::-1])  # The longest first.
  main = fitted[config.aggregator]
  raw |= {name: fitted[name].quantiles(test.z, test.x, isotonise=False) for name in config.forms}
  methods = {name: isotonise(q) for name, q in raw.items()}
  methods[RAW] = raw[config.aggregator]
  methods[PAVA] = np.asarray(isotonic.pava(jnp.asarray(raw[config.aggregator])))
  methods[SWEEP] = np.asarray(isotonic.median_outwards(jnp.asarray(raw[config.aggregator])))
  taus = jnp.asarray(levels, jnp.float32)
  held_out = main.quantiles(validation.z, validation.x)
  q = methods[config.aggregator]
  by_fold = library.out_of_fold(main.fold_quantiles(split.train_folds, train.x), split.folds)
  new = main.fold_quantiles(split.test_folds, test.x)
  calibrated = {
    CQR: conformal.cqr_levels(held_out, validation.y, q, taus),
    CQR_PAIRS: conformal.cqr_pairs(held_out, validation.y, q, taus),
    CV_PLUS: conformal.cv_plus(by_fold, split.folds, train.y, new, taus),
  }
  for name, shifted in calibrated.items():
    # A level that so few rows cannot bound stays as it was.
    methods[name] = np.sort(np.where(np.isfinite(shifted), shifted, q))
  return methods, raw


def real_tables(
  config: ConfigDict, levels: np.ndarray, budget: Budget, workdir: pathlib.Path, report: Report
) -> None:
  """Every method on every set and seed; relative scores, ranks, calibration."""
  results: dict[tuple[str, int], dict[str, Scores]] = {}
  rises, ablations, missing, splits = [], {}, {}, {}
  for name in config.sets:
    try:
      table = data.load(name, config.rows or None)
    except UserError as e:  # The other sets run without.
      missing[name] = str(e)
      continue
    splits |= {(name, s): data.split(*table, np.random.default_rng(s)) for s in config.seeds}
  if missing:
    report.tables.append(Table("Not run", ["set", "reason"], list(missing.items())))
  if not splits:
    return
  console = Console(stderr=True)
  for (name, seed), parts in track(splits.items(), "real tables", console=console):
    shape = library.common_shape(parts, splits.values())
    split = prepare(parts, shape, seed, config, levels, budget)
    methods, raw = predict_all(split, seed, config, levels, budget)
    y = split.test.y
    results[name, seed] = {method: score(q, y, levels) for method, q in methods.items()}
    rises.append(
      max(score(np.sort(q), y, levels).wis - score(q, y, levels).wis for q in raw.values())
    )
    if name in config.ablation_sets:
      ablations[name, seed] = switches(split, seed, config, levels, budget)
  relative_tables(config, results, workdir, report)
  calibration_tables(config, results, levels, workdir, report)
  report.claims.append(
    Claim.less(
      "sorting raises no method's WIS on any split (largest change; 1e-9 is rounding)", rises, 1e-9
    )
  )
  if ablations:
    ablation_table(ablations, report)


def geometric_means(config: ConfigDict, results) -> dict[str, np.ndarray]:
  """{method: [seeds]}: WIS divided by that of the best base model of the split, over sets."""
  sets = list(dict.fromkeys(name for name, _ in results))
  methods = next(iter(results.values()))
  best = {key: min(scores[kind].wis for kind in config.learners) for key, scores in results.items()}
  logs = lambda method, seed: [
    np.log(results[name, seed][method].wis / best[name, seed]) for name in sets
  ]
  return {
    method: np.array([np.exp(np.mean(logs(method, seed))) for seed in config.seeds])
    for method in methods
  }


def rank_test(differences: np.ndarray) -> float:
  """Exact one-sided p-value of the signed-rank test that paired differences are below 0."""
  if not np.any(differences):
    return 1.0
  return float(stats.wilcoxon(differences, alternative="less", method="exact").pvalue)


def relative_tables(config: ConfigDict, results, workdir: pathlib.Path, report: Report) -> None:
  """WIS relative to the best base model, ranks, and the claims about them."""
  main = config.aggregator
  sets = list(dict.fromkeys(name for name, _ in results))
  means = geometric_means(config, results)
  ranked = [method for method in means if method not in (RAW, PAVA, SWEEP, *CONFORMAL)]
  wis = np.array([[scores[method].wis for method in ranked] for scores in results.values()])
  ranks = dict(zip(ranked, stats.rankdata(wis, axis=1).mean(axis=0)))
  best = {key: min(scores[kind].wis for kind in config.learners) for key, scores in results.items()}
  of_set = lambda method, s: np.exp(
    np.mean([np.log(results[s, seed][method].wis / best[s, seed]) for seed in config.seeds])
  )
  per_set = {method: [of_set(method, s) for s in sets] for method in means}
  friedman = stats.friedmanchisquare(*[per_set[method] for method in ranked]).pvalue
  rows = []
  for method in means:
    wins = np.mean([scores[main].wis < scores[method].wis for scores in results.values()])
    versus = (float(wins), rank_test(np.log(per_set[main]) - np.log(per_set[method])))
    rows.append(
      [method, *per_set[method], means[method].mean(), ranks.get(method)]
      + ([None, None] if method == main else [*versus])
    )
  report.tables.append(
    Table(
      "WIS relative to the best base model",
      [
        "method",
        *[Column(name, ".3f", "lower") for name in sets],
        Column("geometric mean", ".3f", "lower"),
        Column("mean rank", ".1f", "lower"),
        Column(f"{main} better", ".2f"),
        Column("Wilcoxon p", ".3f"),
      ],
      rows,
      note=(
        f"Seeds {', '.join(map(str, config.seeds))}. The best base model is that of each split, "
        "chosen on the test rows: no method can choose it. Ranks are over all splits, without the "
        f"variants of one aggregator; `{main} better` is the share of splits. Wilcoxon: the "
        f"signed-rank test over sets that {main} has the smaller log WIS (mean over seeds), at least "
        f"{0.5 ** len(sets):.2g} with {len(sets)} sets. Friedman's test of equal ranks over sets: "
        f"p = {friedman:.2g}. DQA is {main}."
      ),
    )
  )
  worst = np.max([means[kind] for kind in config.learners], axis=0)
  report.claims.extend(
    [
      Claim.less(
        "local medium is below the average ensemble in relative WIS",
        {"local medium": means["local medium"], AVERAGE: means[AVERAGE]},
      ),
      Claim.less(
        "the average ensemble is below the worst base model in relative WIS",
        {AVERAGE: means[AVERAGE], "worst base": worst},
      ),
      Claim.less(f"{main} is below the best base model of each split", means[main], 1.0),
    ]
  )
  for other in (AVERAGE, QRA, *config.forms):
    if other != main:
      compared = {main: means[main], other: means[other]}
      report.claims.append(Claim.less(f"{main} is below {other} in relative WIS", compared))
  shown = [*config.learners, AVERAGE, MEDIAN, MIXTURE, QRA, FQRA, *config.forms]
  spread = [means[m].std(ddof=1) / len(means[m]) ** 0.5 if len(means[m]) > 1 else 0 for m in shown]
  values = np.array([means[m].mean() for m in shown])
  plots.interval_plot(
    workdir / "relative_wis.png",
    shown,
    {"relative WIS": (values - 1, np.stack([values - spread, values + spread], axis=1) - 1)},
    xlabel="WIS relative to the best base model, minus 1",
    title="Geometric mean over sets",
  )
  report.figures.append(
    Figure("Relative WIS", "relative_wis.png", "Mean and standard error over seeds.")
  )


def calibration_tables(
  config: ConfigDict, results, levels: np.ndarray, workdir: pathlib.Path, report: Report
) -> None:
  """Every other score, averaged over sets and seeds; interval scores and coverage per level."""
  main = config.aggregator
  mean = lambda method, field: np.mean(
    [getattr(scores[method], field) for scores in results.values()], axis=0
  )
  methods = list(next(iter(results.values())))
  fields = ("pinball", "wis", "coverage_error", "calibration_error", "width", "sharpness")
  report.tables.append(
    Table(
      "Scores, means over sets and seeds",
      ["method"]
      + [Column(name, ".4f", "lower") for name in ("pinball", "WIS")]
      + [Column(name, ".4f", "lower") for name in ("PICP error", "calibration error")]
      + [Column(f"width, {1 - 2 * levels[0]:.0%}", ".3f"), Column("sharpness", ".3f")],
      [[method, *[float(mean(method, field)) for field in fields]] for method in methods],
      note="Outcomes have unit deviation. PICP error: mean |coverage - nominal| of the intervals.",
    )
  )
  shown = [AVERAGE, QRA, RAW, main, *CONFORMAL]
  report.tables.append(
    Table(
      "Interval score of each central interval, means over sets and seeds",
      ["nominal", *[Column(method, ".3f", "") for method in shown]],
      [
        [f"{1 - 2 * level:.0%}", *[float(mean(m, "interval_scores")[k]) for m in shown]]
        for k, level in enumerate(levels[: len(levels) // 2])
      ],
    )
  )
  nominal = 1 - 2 * levels[: len(levels) // 2]
  plots.line_plot(
    workdir / "coverage.png",
    {"nominal": (nominal, nominal)}
    | {method: (nominal, mean(method, "picp")) for method in (main, CQR_PAIRS, CV_PLUS)},
    xlabel="nominal coverage",
    ylabel="coverage on test rows",
    title="Central intervals",
  )
  report.figures.append(Figure("Coverage", "coverage.png", "Means over sets and seeds."))
  per_seed = lambda method: [
    np.mean([s[method].coverage_error for (_, seed), s in results.items() if seed == wanted])
    for wanted in config.seeds
  ]
  for method in CONFORMAL:
    report.claims.append(
      Claim.less(
        f"{method}: mean coverage error is below that of {main}",
        {method: per_seed(method), main: per_seed(main)},
      )
    )


def switches(
  split: Prepared, seed: int, config: ConfigDict, levels: np.ndarray, budget: Budget
) -> dict[str, float]:
  """Test WIS of the local medium aggregator with one switch changed at a time."""
  variants = {
    "as in the tables": (Form("medium"), config.margins),
    "no crossing penalty": (Form("medium"), "none"),
    "adaptive margins": (Form("medium"), "adaptive"),
    "weights not normalised": (Form("medium", normalise=False), config.margins),
  } | {
    f"{name} in training": (
      Form("medium", isotoniser=name, isotonise_in_training=True),
      config.margins,
    )
    for name in ("sort", "pava", "median_outwards", "soft_sort")
  }

  def wis(name):
    form, margins = variants[name]
    data_ = split.train, split.validation, levels
    fitted = dqa.fit(form, *data_, budget, seed, margins=margins, shape=split.shape)
    q = fitted.quantiles(split.test.z, split.test.x)
    return score(np.sort(q), split.test.y, levels).wis

  return side_by_side(wis, list(variants))


def ablation_table(ablations: dict, report: Report) -> None:
  """WIS of each variant relative to the first, geometric mean and range over splits."""
  variants = list(next(iter(ablations.values())))
  ratios = {
    v: np.array([scores[v] / scores[variants[0]] for scores in ablations.values()])
    for v in variants
  }
  report.tables.append(
    Table(
      "Switches of the local medium aggregator: WIS relative to the first row",
      ["variant", *[Column(c, ".4f") for c in ("geometric mean", "smallest", "largest")]],
      [[v, float(stats.gmean(r)), r.min(), r.max()] for v, r in ratios.items()],
      note=f"Over {len(ablations)} splits of {', '.join(dict.fromkeys(n for n, _ in ablations))}.",
    )
  )


def experts(
  config: ConfigDict, levels: np.ndarray, budget: Budget, workdir: pathlib.Path, report: Report
) -> None:
  """Two base models, each right on its own side of 0: only local weights can tell them apart."""
  wis = {}
  for seed in config.seeds:
    rng = np.random.default_rng([seed, 7])
    train, validation, test = (
      dqa.Rows(*data.two_experts(rng, config.expert_rows, levels)) for _ in range(3)
    )
    q = {"expert A": test.z[:, 0], "expert B": test.z[:, 1]}
    q[AVERAGE] = np.asarray(baselines.average(test.z))
    q[QRA] = np.einsum("pm,npm->nm", baselines.fit_qra(train.z, train.y, levels), test.z)
    fit = lambda name, train=train, validation=validation, seed=seed: dqa.fit(
      FORMS[name], train, validation, levels, budget, seed, margins=config.margins
    )
    for name, fitted in side_by_side(fit, config.forms).items():
      q[name] = fitted.quantiles(test.z, test.x)
    # What is best for every x: the expert of its side.
    q["truth"] = np.where(test.x < 0, test.z[:, 0], test.z[:, 1])
    for name, quantiles in q.items():
      wis.setdefault(name, []).append(score(np.sort(quantiles), test.y, levels).wis)
  wis = {name: np.array(values) for name, values in wis.items()}
  report.tables.append(
    Table(
      "Synthetic: expert A is right for x < 0, B for x > 0",
      ["method", Column("WIS", ".4f", "lower"), Column("relative to the truth", ".3f", "lower")],
      [[name, v.mean(), float(stats.gmean(v / wis["truth"]))] for name, v in wis.items()],
      note=f"{config.expert_rows} rows for each of training, validation and test.",
    )
  )
  pairs = [r for r in ("coarse", "medium", "fine") if {f"local {r}", f"global {r}"} <= {*wis}]
  for resolution in pairs:
    ratio = wis[f"local {resolution}"] / wis[f"global {resolution}"]
    report.claims.append(
      Claim.less(f"synthetic: local {resolution} is 10 % below global in WIS (ratio)", ratio, 0.9)
    )
  plots.bar_plot(
    workdir / "experts.png",
    pairs,
    {
      where: [wis[f"{where} {resolution}"].mean() for resolution in pairs]
      for where in ("global", "local")
    },
    ylabel="WIS",
    title=f"Experts by region; truth {wis['truth'].mean():.3f}",
  )
  report.figures.append(Figure("Synthetic", "experts.png", "Means over seeds."))
