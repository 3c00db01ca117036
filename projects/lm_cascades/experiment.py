"""Deferral rules beside each other: area under the deferral curve, length bias, cost, ablations."""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from scipy.stats import spearmanr

from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.lm_cascades import ablations, deferral, post_hoc, rules, tasks
from projects.lm_cascades.cascade import generation_flops, run_cascade
from projects.lm_cascades.outputs import Outputs
from projects.lm_cascades.post_hoc import Labels
from projects.lm_cascades.rules import Measured, Split

_RATES = (0.1, 0.3, 0.5, 0.7)


class Result(NamedTuple):
  """One seed of a task.

  Attributes:
    flops: of generating with the small model, with the large one, and of the large model's first
      layers, float64 [n] each.
    scores: per rule, of the test inputs, float32 [runs, test].
    alpha: of Chow-Quantile, chosen on calibration inputs.
    calibration_error: per learned rule, mean |E[gain | score] - gain| over ten bins of test scores,
      of the isotonic gains.
    realised: of the cascade that was run: deferral rate, its quality, and the quality of deferring
      as many at random.
  """

  measured: Measured
  parts: Split
  flops: tuple[np.ndarray, np.ndarray, np.ndarray]
  scores: dict[str, np.ndarray]
  alpha: float
  calibration_error: dict[str, float]
  realised: tuple[float, float, float]

  @property
  def qualities(self) -> tuple[np.ndarray, np.ndarray]:
    """The small and the large model's, float32 [test] each."""
    return self.measured.labels.small[self.parts.test], self.measured.labels.large[self.parts.test]

  def gain(self, rule: str) -> float:
    """Percent of AUC-DC over random, mean over the runs of a learned rule."""
    return float(
      np.mean([deferral.percent_gain(score, *self.qualities) for score in self.scores[rule]])
    )


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every task of the config on every seed."""
  tasks.check(config)
  measurements = Measurements(workdir, config, (Measured, Outputs, Labels, Split))
  report = Report(tables=[], figures=[], claims=[])
  console = Console(stderr=True)
  for name in config.tasks:
    results, ablated = [], []
    for seed in config.seeds:
      # Only missing measurements load or train the models, which end with the seed.
      task = functools.cache(functools.partial(load_task, name, config, seed))
      with console.status(f"{name}, seed {seed}"):
        result = run_seed(name, config, seed, task, measurements)
      results.append(result)
      if (name, seed) == (config.tasks[0], config.seeds[0]):
        with console.status(f"{name}, ablations"):
          ablated = ablations.tables(
            task, result.measured, result.parts, config, seed, measurements
          )
    describe(name, results, config, workdir, report)
    report.tables.extend(ablated)
  return report


def load_task(name: str, config: ConfigDict, seed: int) -> tasks.Task:
  if name == "translation":
    return tasks.translation_task(config, seed)
  return tasks.prose_task(config, seed) if name == "prose" else tasks.file_task(config)


def run_seed(
  name: str,
  config: ConfigDict,
  seed: int,
  task: Callable[[], tasks.Task],
  measurements: Measurements,
) -> Result:
  """Decodes with both models, fits the learned rules on calibration inputs, scores the test."""
  where = f"{name}, seed {seed}"

  def answer() -> tuple:
    parts = rules.split(task(), config, seed)
    measured = rules.measure(task(), config)
    return parts, measured, flops(task(), measured, config)

  parts, measured, costs = measurements.get(f"{where}, answers of both models", answer)
  fixed = rules.fixed_scores(measured)
  alpha = rules.best_alpha(fixed, measured.labels, parts.calibration)
  scores = {rule: score[None, parts.test] for rule, score in fixed.items()}
  scores[rules.BEST] = scores[rules.quantile_name(alpha)]

  @functools.cache
  def features() -> dict[str, np.ndarray]:
    intermediate = rules.embed_2(task(), config, config.embed_layers)
    return rules.feature_sets(measured, intermediate, config.num_quantiles)

  def learned(rule: str) -> np.ndarray:
    hidden = rules.hidden_units(rule, config)
    phi = features()[rule]
    scorer = rules.fit_rule(phi, measured.labels, parts, config, seed, hidden=hidden)
    return post_hoc.predict(scorer, phi)

  errors = {}
  for rule in rules.POST_HOC:
    every = measurements.get(f"{where}, {rule}", functools.partial(learned, rule))
    scores[rule] = every[:, parts.test]
    errors[rule] = calibration_error(every[0], measured, parts)
  small, large = (x[parts.test] for x in measured.labels[:2])
  scores[rules.ORACLE] = (small - large)[None]
  realised = measurements.get(
    f"{where}, cascade",
    lambda: realise(task(), measured, fixed[rules.quantile_name(alpha)], parts, config, alpha),
  )
  return Result(measured, parts, costs, scores, alpha, errors, realised)


def flops(
  task: tasks.Task, measured: Measured, config: ConfigDict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`Result.flops`, of all inputs."""
  length = measured.prompt_tokens
  small, large = (
    generation_flops(model.config, length, written.mask.sum(axis=1))
    for model, written in ((task.small, measured.small), (task.large, measured.large))
  )
  first = generation_flops(
    task.large.config, length, np.ones_like(length), num_layers=config.embed_layers
  )
  return small, large, first


def calibration_error(scores: np.ndarray, measured: Measured, parts: Split) -> float:
  """Mean over ten equal bins of test scores of |expected - true mean gain|.

  The isotonic map is fitted on the validation inputs, which did not fit the network.
  """
  gain = measured.labels.target("diff_quality")
  expected = post_hoc.calibrate(scores[parts.validation], gain[parts.validation])
  order = parts.test[np.argsort(scores[parts.test])]
  bins = np.array_split(order, 10)
  return float(np.mean([abs(expected.predict(scores[b]).mean() - gain[b].mean()) for b in bins]))


def realise(task, measured, scores, parts, config, alpha) -> tuple[float, float, float]:
  """Runs the cascade on the test inputs with Chow-Quantile's threshold of the calibration set."""
  threshold = float(deferral.threshold_for_rate(scores[parts.calibration], config.deferral_rate))

  def score(prompts, written):
    del prompts
    mask = rules.outputs.scored_mask(written, task.stop_token, include_eos=config.include_eos)
    return deferral.chow_quantile(written.log_probs, mask, np.array([alpha], np.float32))[:, 0]

  answers = run_cascade(
    task.small,
    task.large,
    [task.prompts[i] for i in parts.test],
    score,
    threshold,
    max_new_tokens=task.max_new_tokens,
    stop_token=task.stop_token,
    batch_size=config.decode_batch,
  )
  rate = answers.deferred.mean()
  if config.quality_file:  # Another scorer's: known for the two models' answers.
    values = np.where(answers.deferred, *(x[parts.test] for x in measured.labels[1::-1]))
  else:
    values = [
      tasks.quality(config.metric, task.decode(text), task.references[i])
      for text, i in zip(answers.texts, parts.test)
    ]
  small, large = (x[parts.test].mean() for x in measured.labels[:2])
  return float(rate), float(np.mean(values)), float(small + rate * (large - small))


def describe(
  name: str, results: list[Result], config: ConfigDict, workdir: pathlib.Path, report: Report
) -> None:
  """One task's tables, figures and claims."""
  report.tables.append(_rules_table(name, results, config))
  report.tables.append(_models_table(name, results))
  report.tables.append(_alpha_table(name, results))
  cost = cost_curves(results[0])
  report.tables.append(_cost_table(name, results))
  report.claims.extend(claims(name, results, config))
  _, test = results[0].qualities, results[0].parts.test
  shown = (rules.SUM, rules.AVERAGE, rules.BEST, rules.QUANTILE, rules.EMBED_12, rules.ORACLE)
  small, large = results[0].qualities
  rate = np.linspace(0, 1, len(small) + 1)
  curves = {
    rule: (rate, np.asarray(deferral.deferral_curve(results[0].scores[rule][0], small, large)))
    for rule in shown
  }
  curves[rules.RANDOM] = ([0, 1], [small.mean(), large.mean()])
  figures = (
    ("deferral", "Deferral curves", curves, "deferral rate", f"quality ({config.metric})"),
    ("cost", "Quality by cost", cost, "FLOPs / large model alone", f"quality ({config.metric})"),
    (
      "length",
      "Scores by length",
      length_curves(results[0].measured, test, config),
      "tokens of the small model's output",
      "mean rank of the score, 0 to 1",
    ),
  )
  for stem, title, series, xlabel, ylabel in figures:
    path = f"{name}_{stem}.png"
    plots.line_plot(workdir / path, series, xlabel=xlabel, ylabel=ylabel, title=f"{title}: {name}")
    report.figures.append(Figure(f"{title}, {name}", path, "First seed, test inputs."))


def _rules_table(name: str, results: list[Result], config: ConfigDict) -> Table:
  order = [rules.SUM, rules.AVERAGE, rules.BEST, rules.LENGTH, rules.MEAN_ENTROPY]
  order += [rules.MAX_ENTROPY, *rules.POST_HOC, rules.ORACLE]
  intervals = []
  for result, seed in zip(results, config.seeds):
    stacked = np.stack([result.scores[rule][0] for rule in order])
    sampled = deferral.bootstrap_gains(
      stacked, *result.qualities, jax.random.key(seed), resamples=config.resamples
    )
    intervals.append(np.percentile(sampled, [2.5, 97.5], axis=0))
  low, high = np.mean(intervals, axis=0)
  rows = [[rules.RANDOM, _mean(_random(r) for r in results), 0.0] + [None] * 6]
  for i, rule in enumerate(order):
    gains = [r.gain(rule) for r in results]
    area = _mean(
      np.mean([deferral.auc_dc(score, *r.qualities) for score in r.scores[rule]]) for r in results
    )
    rows.append(
      [
        rule,
        area,
        np.mean(gains),
        np.std(gains, ddof=1) if len(gains) > 1 else None,
        low[i],
        high[i],
        _mean(length_correlation(r, rule) for r in results),
        _mean(first_deferred_length(r, rule) for r in results),
        _mean(r.calibration_error[rule] for r in results) if rule in rules.POST_HOC else None,
      ]
    )
  columns = ["rule", Column("AUC-DC", ".4f"), Column("over random, %", "+.2f")]
  columns += [Column("sd over seeds", ".2f"), Column("low", "+.2f"), Column("high", "+.2f")]
  columns += [Column("rank correlation with length", "+.2f")]
  columns += [Column("tokens of the first 20%", ".1f"), Column("calibration error", ".4f")]
  note = (
    f"{len(results)} seeds, {len(results[0].parts.test)} test inputs each, {config.runs} runs of "
    "the learned rules. low, high: 95 % of the bootstrap resamples of the inputs, mean over the "
    "seeds, first run. Length is of the small model's output."
  )
  return Table(f"{name}: deferral rules", columns, rows, note)


def _models_table(name: str, results: list[Result]) -> Table:
  rows = []
  for i, model in enumerate(("small", "large")):
    graded, right = ([r.measured.labels[j][r.parts.test] for r in results] for j in (i, 2 + i))
    length = [(r.measured.small, r.measured.large)[i].mask.sum(axis=1).mean() for r in results]
    rows.append([model, _mean(map(np.mean, graded)), _mean(map(np.mean, right)), _mean(length)])
  spread = _mean(np.std(np.subtract(*r.qualities)) for r in results)
  helped = _mean(np.mean(np.subtract(*r.qualities) < 0) for r in results)
  rates = [f"{r.realised[0]:.3f}" for r in results]
  return Table(
    f"{name}: the models alone",
    ["model", Column("quality", ".4f"), Column("exact match", ".4f"), Column("tokens", ".1f")],
    rows,
    note=(
      f"The gain of deferring has standard deviation {spread:.3f} and is positive for "
      f"{100 * helped:.0f} % of the test inputs. The cascade that was run deferred "
      f"{', '.join(rates)}; its quality was {_mean(r.realised[1] for r in results):.4f}, and at "
      f"random it would have been {_mean(r.realised[2] for r in results):.4f}."
    ),
  )


def _alpha_table(name: str, results: list[Result]) -> Table:
  rows = [
    [alpha, _mean(r.gain(rules.quantile_name(alpha)) for r in results)]
    + [_mean(length_correlation(r, rules.quantile_name(alpha)) for r in results)]
    + [sum(r.alpha == alpha for r in results)]
    for alpha in deferral.ALPHAS
  ]
  columns = [Column("alpha", ".1f"), Column("over random, %", "+.2f", "higher")]
  columns += [Column("rank correlation with length", "+.2f"), "seeds that chose it"]
  return Table(f"{name}: Chow-Quantile by alpha", columns, rows)


def _cost_table(name: str, results: list[Result]) -> Table:
  shown = (rules.BEST, rules.EMBED_12)
  rows = []
  for rate in _RATES:
    row = [rate]
    for rule in shown:
      curves = [cost_curves(r)[rule] for r in results]
      at = [round(rate * (len(x) - 1)) for x, _ in curves]
      row += [_mean(x[k] for (x, _), k in zip(curves, at))]
      row += [_mean(y[k] for (_, y), k in zip(curves, at))]
    rows.append(row)
  columns = [Column("deferral rate", ".1f")]
  for rule in shown:
    columns += [Column(f"{rule}: FLOPs / large", ".3f"), Column("quality", ".4f")]
  return Table(f"{name}: quality by cost", columns, rows)


def cost_curves(result: Result) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(FLOPs over those of the large model alone, quality) at every deferral rate, by rule.

  Deferring costs the large model on top of the small one; Embed-1+2 pays for the large model's
  first layers at the first position of every input.
  """
  small, large, intermediate = (x[result.parts.test] for x in result.flops)
  curves = {}
  for rule in (rules.BEST, rules.EMBED_12):
    score = result.scores[rule][0]
    always = small + (intermediate if rule == rules.EMBED_12 else 0.0)
    deferred = np.cumsum(large[np.argsort(score, kind="stable")])
    cost = (always.sum() + np.concatenate([[0.0], deferred])) / large.sum()
    curves[rule] = (cost, np.asarray(deferral.deferral_curve(score, *result.qualities)))
  return curves


def length_curves(measured: Measured, rows: np.ndarray, config: ConfigDict) -> dict:
  """Mean rank of some rules' scores in bins of output length (octiles)."""
  length = measured.mask[rows].sum(axis=1)
  # Equal lengths share a bin: many outputs are as long as they may be.
  edges = np.unique(np.quantile(length, np.linspace(0, 1, 9), method="lower"))
  bins = [
    np.flatnonzero(np.searchsorted(edges, length, side="right") == i + 1) for i in range(len(edges))
  ]
  fixed = rules.fixed_scores(measured)
  names = (rules.SUM, rules.AVERAGE, *(rules.quantile_name(a) for a in (0.0, 0.2, 0.5)))
  curves = {}
  for rule in names:
    rank = np.argsort(np.argsort(fixed[rule][rows], kind="stable")) / (len(rows) - 1)
    curves[rule] = ([length[b].mean() for b in bins], [rank[b].mean() for b in bins])
  return curves


def length_correlation(result: Result, rule: str) -> float:
  """Spearman's rank correlation of the score with the small model's output length."""
  length = result.measured.mask[result.parts.test].sum(axis=1)
  score = result.scores[rule][0]
  if np.ptp(length) == 0 or np.ptp(score) == 0:
    return 0.0
  return float(spearmanr(score, length).statistic)


def first_deferred_length(result: Result, rule: str) -> float:
  """Mean output length, in tokens, of the first fifth that the rule defers."""
  length = result.measured.mask[result.parts.test].sum(axis=1)
  order = np.argsort(result.scores[rule][0], kind="stable")
  return float(length[order[: len(order) // 5]].mean())


def claims(name: str, results: list[Result], config: ConfigDict) -> list[Claim]:
  """What the paper says, for one task."""
  gains = lambda rule: [r.gain(rule) for r in results]
  better = [max(pair) for pair in zip(gains(rules.SUM), gains(rules.AVERAGE))]
  relative = lambda first, second: [
    100 * ((100 + a) / (100 + b) - 1) for a, b in zip(first, second)
  ]
  fixed = {rules.quantile_name(a) for a in deferral.ALPHAS} | {rules.SUM, rules.AVERAGE}
  top = [max(r.gain(rule) for rule in (*fixed, *rules.POST_HOC)) for r in results]
  correlation = lambda rule: [length_correlation(r, rule) for r in results]
  sizes = [len(r.parts.test) for r in results]
  rate = config.deferral_rate
  noise = [3 * (rate * (1 - rate) * 2 / n) ** 0.5 for n in sizes]
  return [
    Claim.greater(
      f"{name}: Chow-Quantile beats both sum and average: its AUC-DC (alpha chosen "
      "on calibration inputs) over the better of the two, percent",
      relative(gains(rules.BEST), better),
      0.5,
    ),
    Claim.greater(
      f"{name}: Post-Hoc-Quantile is as good as Chow-Quantile within 0.2 % of AUC-DC, percent",
      relative(gains(rules.QUANTILE), gains(rules.BEST)),
      -0.2,
    ),
    Claim.greater(
      f"{name}: Post-Hoc-Embed-1+2 is better than Post-Hoc-Quantile, percent of AUC-DC",
      relative(gains(rules.EMBED_12), gains(rules.QUANTILE)),
    ),
    Claim.greater(
      f"{name}: the oracle is above every rule, percent of AUC-DC",
      relative(gains(rules.ORACLE), top),
    ),
    Claim.greater(
      f"{name}: every Chow rule of the paper is above random, the least of sum, average and "
      "Chow-Quantile, percent of AUC-DC",
      [min(r.gain(x) for x in (rules.SUM, rules.AVERAGE, rules.BEST)) for r in results],
    ),
    Claim.less(
      f"{name}: Chow-Sum defers long outputs: its rank correlation with length",
      correlation(rules.SUM),
      -0.5,
    ),
    Claim.less(
      f"{name}: Chow-Average depends less on length: |correlation| of average minus that of sum",
      [abs(a) - abs(b) for a, b in zip(correlation(rules.AVERAGE), correlation(rules.SUM))],
    ),
    Claim.greater(
      f"{name}: what Chow-Sum defers first is longer than what helps most, tokens of the first 20 "
      "% beside the oracle's",
      {
        rule: [first_deferred_length(r, rule) for r in results]
        for rule in (rules.SUM, rules.ORACLE)
      },
    ),
    Claim.less(
      f"{name}: the cascade that is run defers as often as asked, within 3 standard errors of both "
      "sets, largest excess",
      [abs(r.realised[0] - rate) - limit for r, limit in zip(results, noise)],
    ),
  ]


def _random(result: Result) -> float:
  return float(deferral.random_auc_dc(*result.qualities))


def _mean(values) -> float:
  return float(np.mean(list(values)))
