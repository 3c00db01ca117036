"""What was measured as tables, plots and claims."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.gad.independent_parser import independent_parser
from projects.gad.metrics import expected_probability, restricted, total_variation, window_kl
from projects.gad.rounds import Row, Sampled, Unconstrained, observed

# Windows of a curve, of a quarter of the samples each.
_WINDOWS = 20
# ASAp's time per token over GCD's, one value for each part of the run.
_PARTS = 4


class ToyResult(NamedTuple):
  """One sampler on a toy language under one model.

  Attributes:
    samples: texts in the order of sampling.
    q: the exact distribution.
    implied_kl: KL(the sampler's distribution after the last sample || Q), nats.
    success: c~ of the empty prefix; None without a trie.
    grammaticality: c of the empty prefix.
    drawn: texts that were sampled for `samples`.
  """

  samples: list[tuple[int, ...]]
  q: Mapping[tuple[int, ...], float]
  implied_kl: float
  success: float | None
  grammaticality: float
  drawn: int

  @property
  def variation(self) -> float:
    """Total variation of the last quarter of the samples to Q."""
    return total_variation(self.samples[-len(self.samples) // 4 :], self.q)


class RowResult(NamedTuple):
  """One method in one row.

  Attributes:
    kl: of windows that end at `window_ends`, nats.
    mean_log_p: of its texts under the model, the last quarter of the samples.
    log_expected_p: log of their mean probability, the last quarter.
    parsed: share of all samples that an independent parser accepts; None if it cannot read the
      grammar.
    complete: share of all samples that ended.
    correct: share of all samples that solve the task; None if nothing says so.
    explored: mass of its different texts under the model.
    explored_share: mass of its different texts so far over c~ of the empty prefix, which bounds
      that of the whole language, float [samples]; None without a trie.
    texts: number of different texts.
  """

  kl: list[float]
  mean_log_p: float
  log_expected_p: float
  parsed: float | None
  complete: float
  correct: float | None
  explored: float
  explored_share: np.ndarray | None
  texts: int


def report_toy(language: str, runs: Sequence[Mapping[str, ToyResult]], report: Report) -> None:
  mean = lambda method, what: float(np.mean([what(run[method]) for run in runs]))
  rows = []
  for method in runs[0]:
    success = None
    if runs[0][method].success is not None:
      success = mean(method, lambda r: r.success / r.grammaticality)
    rows.append(
      [method, mean(method, lambda r: r.variation), mean(method, lambda r: r.implied_kl), success]
      + [mean(method, lambda r: r.drawn / len(r.samples))]
    )
  first = next(iter(runs[0].values()))
  report.tables.append(
    Table(
      f"Toy language, {language}: {len(first.q)} texts, {len(first.samples)} samples",
      [
        "sampler",
        Column("TV of the last quarter to Q", ".4f", "lower"),
        Column("KL of the sampler to Q", ".2e", "lower"),
        Column("c~ / c of the empty prefix", ".4f"),
        Column("texts drawn per sample", ".1f"),
      ],
      rows,
      note=(
        f"Mean of {len(runs)} random models. The KL is computed from the trie after the last "
        "sample. Rejection sampling is exact: its TV is what so few samples of Q have."
      ),
    )
  )
  values = lambda method, what: [what(run[method]) for run in runs]
  variation = lambda r: r.variation
  report.claims.extend(
    [
      Claim.less(
        f"{language}: ASAp is as close to Q as exact samples are (TV, within 1.5 times)",
        {
          "ASAp": values("ASAp", variation),
          "1.5 rejection": [1.5 * v for v in values("rejection", variation)],
        },
      ),
      Claim.less(
        f"{language}: ASAp is at most half as far from Q as GCD (TV)",
        {
          "ASAp": values("ASAp", variation),
          "half of GCD": [0.5 * v for v in values("GCD", variation)],
        },
      ),
      Claim.less(
        f"{language}: ASAp's distribution becomes Q (KL, nats)",
        values("ASAp", lambda r: r.implied_kl),
        1e-3,
      ),
      Claim.greater(
        f"{language}: GCD's distribution stays away from Q (KL, nats)",
        values("GCD", lambda r: r.implied_kl),
        0.1,
      ),
    ]
  )


def window_ends(samples: int) -> list[int]:
  return np.linspace(samples // 4, samples, min(_WINDOWS, samples)).astype(int).tolist()


def row_results(
  row: Row, index: int, sampled: Mapping[str, Sampled]
) -> tuple[dict[str, RowResult], float]:
  """Every method in one row, and log E_Q[P] with Q estimated from all texts of the row."""
  texts, log_p = observed(sampled, index)
  log_q = restricted(log_p)
  accepts = independent_parser(row.task.grammar)
  vocabulary = row.masks.vocabulary
  written = {text: vocabulary.text(text).decode(errors="replace") for text in log_p}
  parsed = {} if accepts is None else {text: accepts(written[text]) for text in log_p}
  correct = {text: row.task.is_correct(written[text]) for text in log_p}
  share = lambda judged, samples: sum(bool(judged.get(text)) for text in samples) / len(samples)
  results = {}
  for method, samples in texts.items():
    ended = [text for text in samples if text is not None]
    late = [log_p[text] for text in samples[-len(samples) // 4 :] if text is not None]
    masses = _explored(samples, log_p)
    success = sampled[method].success
    results[method] = RowResult(
      kl=window_kl(samples, log_q, window_ends(len(samples))),
      mean_log_p=float(np.mean(late)) if late else np.nan,
      log_expected_p=expected_probability(late) if late else np.nan,
      parsed=None if accepts is None else share(parsed, samples),
      complete=len(ended) / len(samples),
      correct=None if None in correct.values() else share(correct, samples),
      explored=float(masses[-1]),
      explored_share=masses / success[:, index] if success.size else None,
      texts=len(set(ended)),
    )
  ideal = np.logaddexp.reduce([log_q[text] + log_p[text] for text in log_p])
  return results, float(ideal)


def _explored(samples: Sequence, log_p: Mapping) -> np.ndarray:
  """Probability of the different texts among the first 1, 2, ... samples, float [samples]."""
  seen, masses = {None}, []
  for text in samples:
    masses.append(0.0 if text in seen else np.exp(log_p[text]))
    seen.add(text)
  return np.cumsum(masses)


def report_tasks(
  config: ConfigDict,
  rows: Sequence[Row],
  sampled: Mapping[str, Sampled],
  unconstrained: Sequence[Unconstrained],
  workdir: pathlib.Path,
  report: Report,
) -> None:
  by_row = [row_results(row, i, sampled) for i, row in enumerate(rows)]
  tasks = list(dict.fromkeys(row.task.name for row in rows))
  # [tasks, seeds] of a number.
  table = lambda value: np.array([value(i) for i in range(len(rows))], float).reshape(
    len(tasks), len(config.seeds)
  )
  of = lambda method, name: table(lambda i: getattr(by_row[i][0][method], name))
  ideal = table(lambda i: by_row[i][1])
  last_kl = {m: table(lambda i, m=m: by_row[i][0][m].kl[-1]) for m in config.methods}
  _task_table(tasks, sampled, unconstrained, of, ideal, last_kl, table, report)
  _method_table(config, sampled, of, ideal, last_kl, report)
  gcd, asap = (of(m, "mean_log_p") for m in ("GCD", "ASAp"))
  distance = {m: np.abs(of(m, "log_expected_p") - ideal).mean(axis=0) for m in ("ASAp", "GCD")}
  # A grammar that the independent parser cannot read counts by its recogniser only.
  readable = [i for i in range(len(rows)) if by_row[i][0]["GCD"].parsed is not None]
  report.claims.extend(
    [
      Claim.greater(
        "the model finds ASAp's texts likelier than GCD's (mean log P, last quarter)",
        {"ASAp": asap.mean(axis=0), "GCD": gcd.mean(axis=0)},
      ),
      Claim.greater(
        "ASAp is closer to the model's distribution than GCD for at least 80 % of the grammars "
        "(share with the lower KL in the last window)",
        (last_kl["ASAp"] < last_kl["GCD"]).mean(axis=0),
        0.799,
      ),
      Claim.less(
        "the expected probability of ASAp's texts is closer to that under Q (mean distance of "
        "logarithms)",
        distance,
      ),
    ]
  )
  if readable:
    report.claims.append(
      Claim.less(
        "every sample of both methods is grammatical to an independent parser (share that is not, "
        "one value for each method)",
        [1 - float(np.mean([by_row[i][0][m].parsed for i in readable])) for m in ("GCD", "ASAp")],
        1e-9,
      )
    )
  per_token = {m: sampled[m].seconds_per_token for m in ("ASAp", "GCD")}
  medians = {m: [np.median(p) for p in np.array_split(v, _PARTS)] for m, v in per_token.items()}
  report.claims.append(
    Claim.less(
      "a token of ASAp takes at most 1.3 times as long as one of GCD (one value for each quarter of "
      "the run, median over samples)",
      [a / g for a, g in zip(medians["ASAp"], medians["GCD"])],
      1.3,
    )
  )
  _plots(config, tasks, sampled, by_row, of, ideal, workdir, report)


def _task_table(tasks, sampled, unconstrained, of, ideal, last_kl, table, report: Report) -> None:
  grammatical = table(lambda i: len(unconstrained[i].accepted) / unconstrained[i].drawn)
  mean = lambda values: values.mean(axis=1)
  optional = lambda value: None if np.isnan(value) else float(value)
  bound = sampled["ASAp"].success[-1].reshape(len(tasks), -1)
  columns = [
    tasks,
    mean(grammatical),
    mean(last_kl["GCD"]),
    mean(last_kl["ASAp"]),
    mean(of("GCD", "mean_log_p")),
    mean(of("ASAp", "mean_log_p")),
    mean(of("GCD", "log_expected_p")),
    mean(of("ASAp", "log_expected_p")),
    mean(ideal),
    mean(of("GCD", "explored")),
    mean(of("ASAp", "explored")),
    mean(bound),
    [optional(v) for v in mean(of("GCD", "correct"))],
    [optional(v) for v in mean(of("ASAp", "correct"))],
  ]
  report.tables.append(
    Table(
      "Tasks",
      [
        "task",
        Column("grammatical without masks", ".3f"),
        Column("KL, GCD", ".3f"),
        Column("KL, ASAp", ".3f"),
        Column("mean log P, GCD", ".2f"),
        Column("mean log P, ASAp", ".2f"),
        Column("log E[P], GCD", ".2f"),
        Column("log E[P], ASAp", ".2f"),
        Column("log E[P], Q", ".2f"),
        Column("explored, GCD", ".2e"),
        Column("explored, ASAp", ".2e"),
        Column("c~, ASAp", ".2e"),
        Column("correct, GCD", ".3f"),
        Column("correct, ASAp", ".3f"),
      ],
      list(zip(*columns)),
      note=(
        "Mean over seeds, the last quarter of the samples. KL in nats to Q, which is the model's "
        "probabilities normalised over all texts that any method sampled. explored: probability of "
        "the different texts of all samples; c~ of the empty prefix bounds that of the language."
      ),
    )
  )


def _method_table(config, sampled, of, ideal, last_kl, report: Report) -> None:
  rows = []
  for method in config.methods:
    found = sampled[method]
    distance = np.abs(of(method, "log_expected_p") - ideal)
    nodes = [trie.num_nodes for trie in found.tries]
    per_sample = float(np.median(found.seconds)) / len(found.completions[0])
    rows.append(
      [method, float(last_kl[method].mean()), float(of(method, "mean_log_p").mean())]
      + [float(distance.mean()), float(of(method, "texts").mean())]
      + [float(np.mean(nodes)) if nodes else None, float(of(method, "complete").mean())]
      + [1e3 * per_sample, 1e3 * float(np.median(found.seconds_per_token))]
    )
  report.tables.append(
    Table(
      f"Methods, mean over all tasks, {config.samples} samples each",
      [
        "method",
        Column("KL, last window", ".3f", "lower"),
        Column("mean log P", ".2f", "higher"),
        Column("log E[P] to Q's", ".3f", "lower"),
        Column("different texts", ".1f"),
        Column("trie nodes", ".0f"),
        Column("ended", ".4f"),
        Column("ms per sample", ".2f"),
        Column("ms per token of the batch", ".2f"),
      ],
      rows,
      note=f"A batch is {len(sampled['GCD'].completions[0])} rows: every task under every seed.",
    )
  )


def _plots(config, tasks, sampled, by_row, of, ideal, workdir, report: Report) -> None:
  ends = window_ends(config.samples)
  series = {}
  for method in config.methods:
    curves = np.array([results[method].kl for results, _ in by_row])
    series[method] = (ends, np.nanmean(curves, axis=0))
  plots.line_plot(
    workdir / "kl_by_samples.png",
    series,
    xlabel=f"samples (window of {max(1, config.samples // 4)})",
    ylabel="KL to Q, nats",
    title="Mean over tasks and seeds",
  )
  points = {m: (ideal.mean(axis=1), of(m, "log_expected_p").mean(axis=1)) for m in ("GCD", "ASAp")}
  _scatter(workdir / "expected_probability.png", tasks, points)
  shares = np.array([results["ASAp"].explored_share for results, _ in by_row])
  shares = shares.reshape(len(tasks), -1, config.samples).mean(axis=1)
  plots.line_plot(
    workdir / "explored.png",
    {task: (np.arange(1, config.samples + 1), share) for task, share in zip(tasks, shares)},
    xlabel="samples of ASAp",
    ylabel="explored share, at least",
    title="P of the different texts so far / c~",
  )
  report.figures.extend(
    [
      Figure("KL against samples", "kl_by_samples.png"),
      Figure(
        "Expected probability",
        "expected_probability.png",
        "One point for each task, mean over seeds, the last quarter of the samples.",
      ),
      Figure(
        "Explored share",
        "explored.png",
        "What ASAp sampled of the language's probability, at least; mean over seeds.",
      ),
    ]
  )


def _scatter(path: pathlib.Path, tasks: Sequence[str], points: Mapping) -> None:
  """log E[P] of the samples of each task against that under Q; {"GCD": (x, y), "ASAp": (x, y)}."""
  from matplotlib.figure import Figure as Canvas  # Late: it takes a while.

  canvas = Canvas(figsize=(5.6, 4), dpi=180, layout="constrained")
  axes = canvas.subplots()
  for i, task in enumerate(tasks):
    for method, (x, y) in points.items():
      filled = method == "ASAp"
      axes.plot(
        x[i],
        y[i],
        "os^DvPX*"[i % 8],
        color=f"C{i % 10}",
        markersize=8,
        fillstyle="full" if filled else "none",
        label=task if filled else None,
      )
  limits = [min(*axes.get_xlim(), *axes.get_ylim()), max(*axes.get_xlim(), *axes.get_ylim())]
  axes.plot(limits, limits, color="black", linewidth=0.8)
  axes.set(xlabel="log E[P] under Q", ylabel="log E[P] of the samples", xlim=limits, ylim=limits)
  axes.set_title("filled: ASAp; open: GCD")
  axes.grid(alpha=0.3)
  if len(tasks) <= 10:
    canvas.legend(loc="outside right upper", frameon=False)
  canvas.savefig(path, format="png")
