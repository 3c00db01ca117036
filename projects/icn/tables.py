"""What the seeds measured, as tables, figures and claims."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from common.reporting.plots import line_plot
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.icn.clusters import InsideEffect, Split
from projects.icn.cot import CotResult
from projects.icn.metrics import map_at_k
from projects.icn.query_shift import QueryShift

ICN, PLAIN = "ICN", "plain ranking"
ICN_FREE, WRONG = "ICN, completed in context", "ICN, wrong answers shown"
SAMPLING = "sampling"


class Probing(NamedTuple):
  """Answers of one method to one kind of question.

  Attributes:
    correct: bool [questions, items], right and not given before.
    repeated: share of answers given before.
    gold: how many right answers there are, [questions]; 0 where unknown.
  """

  correct: np.ndarray
  repeated: float
  gold: np.ndarray


class ClusterRow(NamedTuple):
  """Middle-ranked tokens inside and outside of the main clusters, under one clustering."""

  name: str
  split: Split
  effect: InsideEffect


class Texts(NamedTuple):
  """Open-ended texts of one method: means over domains, and the zero-gen accuracy."""

  distinct_1: float
  distinct_2: float
  self_bleu: float
  accuracy: float


class SeedResult(NamedTuple):
  """What one seed measured: by kind of question or task, and by method."""

  clusters: dict[str, list[ClusterRow]]
  browsed: list[tuple[int, int, str]]
  probing: dict[str, dict[str, Probing]]
  shifts: dict[str, QueryShift]
  texts: dict[str, Texts]
  cot: dict[str, dict[str, CotResult]]
  completed: int
  hits: int


def report(config: ConfigDict, results: Sequence[SeedResult], workdir: pathlib.Path) -> Report:
  """Tables of means over seeds, the figures and the claims."""
  kinds = list(results[0].probing)
  tables = [cluster_table(kind, config, results) for kind in kinds]
  tables += [probing_table(kind, config, results) for kind in kinds]
  tables.append(shift_table(kinds, results))
  if results[0].texts:
    tables.append(text_table(config, results))
  if results[0].cot:
    tables.append(cot_table(config, results))
  tables.append(browser(results[0]))
  figures = [f for kind in kinds for f in draw(kind, config, results, workdir)]
  return Report(tables=tables, figures=figures, claims=claims(kinds[0], results))


def mean(values: Sequence[float]) -> float:
  return float(np.mean(values))


def coverage(probing: Probing) -> float:
  """Right answers found, of those there are; mean over questions. NaN where they are unknown."""
  if not probing.gold.all():
    return float("nan")
  return float(np.mean(probing.correct.sum(axis=1) / probing.gold))


def mean_average_precision(probing: Probing) -> float:
  """MAP@k of all items, mean over questions."""
  return float(np.mean(map_at_k(probing.correct, probing.correct.shape[1])))


def group_mean(values: np.ndarray, group: np.ndarray) -> float:
  return float(values[group].mean()) if group.any() else float("nan")


def cluster_table(kind: str, config: ConfigDict, results: Sequence[SeedResult]) -> Table:
  rows = []
  for variants in zip(*[r.clusters[kind] for r in results]):
    splits, effects = [v.split for v in variants], [v.effect for v in variants]
    rows.append(
      [
        variants[0].name,
        mean([s.inside.mean() for s in splits]),
        mean([group_mean(s.rank, s.inside) for s in splits]),
        mean([group_mean(s.rank, ~s.inside) for s in splits]),
        mean([group_mean(s.correct, s.inside) for s in splits]),
        mean([group_mean(s.correct, ~s.inside) for s in splits]),
        mean([e.matched_gap for e in effects]),
        mean([e.coefficient for e in effects]),
        mean([e.low for e in effects]),
        mean([e.high for e in effects]),
      ]
    )
  names = ("mean rank", "precision")
  columns = ["clusters of keys", Column("share inside", ".2f")]
  columns += [Column(f"{n} {g}", ".3f") for n in names for g in ("inside", "outside")]
  columns += [Column("outside - inside at equal rank", "+.3f"), Column("coefficient", "+.2f")]
  columns += [Column("low", "+.2f"), Column("high", "+.2f")]
  return Table(
    f"{kind}: ranks {config.top + 1} to {config.ranks}, inside the top {config.top}'s clusters or "
    "not",
    columns,
    rows,
    "Coefficient of being inside in a logistic regression of correctness on rank and flag; 95 % "
    "bootstrap interval over questions. Means over seeds.",
  )


def probing_table(kind: str, config: ConfigDict, results: Sequence[SeedResult]) -> Table:
  items = config.rounds * config.per_round
  rows = []
  for name in results[0].probing[kind]:
    seeds = [r.probing[kind][name] for r in results if name in r.probing[kind]]
    precisions = [p.correct.mean() for p in seeds]
    rows.append(
      [
        name,
        mean(precisions),
        float(np.std(precisions)) if len(seeds) > 1 else None,
        mean([p.correct.sum(axis=1).mean() for p in seeds]),
        mean([coverage(p) for p in seeds]),
        mean([mean_average_precision(p) for p in seeds]),
        mean([p.repeated for p in seeds]),
        len(seeds),
      ]
    )
  columns = [
    "method",
    Column("precision", ".3f", "higher"),
    Column("sd over seeds", ".3f"),
    Column("right answers", ".2f", "higher"),
    Column("coverage", ".3f", "higher"),
    Column(f"MAP@{items}", ".3f", "higher"),
    Column("repeated", ".2f"),
    "seeds",
  ]
  return Table(
    f"{kind}: {items} completions of every question",
    columns,
    rows,
    "A right answer counts once. Means over seeds; the ablations are of the first seed only.",
  )


def shift_table(kinds: Sequence[str], results: Sequence[SeedResult]) -> Table:
  fields = {
    "dot product with explored keys": "dot",
    "the same, beyond the mean key": "centred_dot",
    "cosine with explored keys": "cosine",
    "mean rank of explored tokens": "rank",
  }
  rows = []
  for kind in kinds:
    for title, field in fields.items():
      before, after = np.mean([getattr(r.shifts[kind], field).mean(0) for r in results], axis=0)
      rows.append([kind, title, before, after])
    for title, field in (("the dot products'", "p_value"), ("the second's", "centred_p_value")):
      largest = max(getattr(r.shifts[kind], field) for r in results)
      rows.append([kind, f"p of {title} fall, largest of the seeds", None, largest])
    repeats = mean([r.shifts[kind].repeats for r in results])
    rows.append([kind, "an explored token is ranked first", None, repeats])
  return Table(
    "The query before and after answers are shown",
    ["questions", "measure", Column("first round", ".3g"), Column("last round", ".3g")],
    rows,
  )


def text_table(config: ConfigDict, results: Sequence[SeedResult]) -> Table:
  rows = [[name, *np.mean([r.texts[name] for r in results], axis=0)] for name in results[0].texts]
  columns = ["method", Column("distinct-1", ".3f", "higher"), Column("distinct-2", ".3f", "higher")]
  columns += [Column("self-BLEU", ".3f", "lower"), Column("zero-gen accuracy", ".3f", "higher")]
  items = config.text_rounds * config.text_per_round
  return Table(f"Open-ended: {items} lines of {', '.join(config.domains)} each", columns, rows)


def cot_table(config: ConfigDict, results: Sequence[SeedResult]) -> Table:
  rows = []
  for task, methods in results[0].cot.items():
    for name in methods:
      found = [r.cot[task][name] for r in results]
      rows.append([task, name, mean([c.vote for c in found]), mean([c.path for c in found])])
  columns = ["task", "ways", Column("vote accuracy", ".3f"), Column("path accuracy", ".3f")]
  return Table(f"Chain of thought: {config.cot_ways} ways", columns, rows)


def browser(result: SeedResult) -> Table:
  return Table(
    "Clusters of keys: the main ones of one question, and the largest",
    ["cluster", "tokens", "some of them"],
    [list(row) for row in result.browsed],
    f"First seed. It completed {result.completed} prompts with a first token, and had "
    f"{result.hits} more from before.",
  )


def draw(kind: str, config: ConfigDict, results: Sequence[SeedResult], workdir) -> list[Figure]:
  """Right answers by completions, and precision by rank inside and outside of the main clusters."""
  items = np.arange(1, config.rounds * config.per_round + 1)
  found = results[0].probing[kind]
  shown = [PLAIN, ICN, WRONG, *[n for n in found if n.startswith(SAMPLING)]]
  curves = {
    name: (items, np.mean([r.probing[kind][name].correct.cumsum(1).mean(0) for r in results], 0))
    for name in shown
  }
  by_rank = {}
  edges = np.linspace(config.top, config.ranks, 7).astype(int)
  for label, flag in (("inside", True), ("outside", False)):
    splits = [r.clusters[kind][0].split for r in results]
    rank, inside, correct = (
      np.concatenate([getattr(s, f) for s in splits]) for f in ("rank", "inside", "correct")
    )
    at = [(rank > a) & (rank <= b) & (inside == flag) for a, b in zip(edges[:-1], edges[1:])]
    middles = [(a + 1 + b) / 2 for a, b in zip(edges[:-1], edges[1:])]
    points = [(m, correct[rows].mean()) for m, rows in zip(middles, at) if rows.any()]
    by_rank[f"{label} main clusters"] = tuple(zip(*points)) or ((), ())
  paths = f"{kind}_answers.png", f"{kind}_ranks.png"
  line_plot(workdir / paths[0], curves, xlabel="completions", ylabel="right answers", title=kind)
  line_plot(workdir / paths[1], by_rank, xlabel="rank", ylabel="precision", title=kind)
  return [
    Figure(f"{kind}: right answers", paths[0], "Mean over questions and seeds."),
    Figure(f"{kind}: precision by rank", paths[1], "Euclidean clusters, all seeds together."),
  ]


def claims(kind: str, results: Sequence[SeedResult]) -> list[Claim]:
  """The claims of the paper, on questions of one kind."""
  euclidean = [r.clusters[kind][0] for r in results]
  probing = lambda name, measure: [measure(r.probing[kind][name]) for r in results]
  precision = lambda p: float(p.correct.mean())
  samplings = [n for n in results[0].probing[kind] if n.startswith(SAMPLING)]
  best = max(samplings, key=lambda n: np.mean(probing(n, precision)))
  # Right answers of a fixed number: coverage, and precision where not all answers are known.
  measure, what = (precision, "precision") if not results[0].probing[kind][ICN].gold.all() else (
    coverage, "coverage")  # fmt: skip
  ranks = lambda group: [group_mean(c.split.rank, group(c.split.inside)) for c in euclidean]
  against = lambda name, measure: {
    "ICN": probing(ICN, measure), name: probing(name, measure)
  }  # fmt: skip
  found = [
    Claim.less(
      "Middle-ranked tokens inside the main clusters rank better than those outside",
      {"inside": ranks(lambda x: x), "outside": ranks(lambda x: ~x)},
    ),
    Claim.less(
      "At equal rank they are right less often: upper end of the coefficient's 95 % interval",
      [c.effect.high for c in euclidean],
    ),
    Claim.less(
      "Showing explored answers lowers the query's product with their keys: p of a paired t-test",
      [r.shifts[kind].p_value for r in results],
      0.01,
    ),
    Claim.less(
      "Also beyond the product with the mean key, which changes no ranking: p of the same test",
      [r.shifts[kind].centred_p_value for r in results],
      0.01,
    ),
    Claim.less(
      "The model knows that lists do not repeat: share of questions with an explored token on top",
      [r.shifts[kind].repeats for r in results],
      0.1,
    ),
  ]
  for name in (PLAIN, best):
    found.append(Claim.greater(f"ICN has a higher {what} than {name}", against(name, measure)))
    found.append(
      Claim.greater(f"ICN has a higher MAP than {name}", against(name, mean_average_precision))
    )
  found.append(
    Claim.less(
      f"Answers of another question in the prompt gain no {what} over the plain ranking",
      {"wrong answers": probing(WRONG, measure), "plain": probing(PLAIN, measure)},
    )
  )
  return found
