"""Tables, plots and claims of a run."""

import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from common.decoding.parallel_prompt import Statistics
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.ppd.settings import DYNAMIC, MATCHED, MEDUSA, PPD, RANDOM, STATIC, UNTRAINED
from projects.ppd.sparse_tree import TreeSet, best_size

# What the paper reports of Vicuna-7B (accuracies of the published trees) and in its tables.
PAPER_TOP1 = 0.483
PAPER_TRAINABLE, PAPER_MEMORY = 0.0002, 0.0004  # %.
# By rounding alone a tie of two means may come out below 0.
TIE = 1e-9


def report_accuracies(
  config: ConfigDict, results: dict, workdir: pathlib.Path, report: Report
) -> None:
  """Top-n accuracies of each student by distance, on the test's texts."""
  names = list(next(iter(results.values())).test_accuracies)
  mean = {n: np.mean([r.test_accuracies[n] for r in results.values()], axis=0) for n in names}
  tops = (1, 2, 3, 5, 10)
  trained = next(iter(results.values())).trained
  rows = [
    [
      name,
      trained.get(name, 0),
      distance + 2,
      *mean[name][distance].cumsum()[[n - 1 for n in tops]],
    ]
    for name in names
    for distance in range(config.distances)
  ]
  columns = ["guesses", Column("trained numbers", ","), "distance"]
  report.tables.append(
    Table(
      "Accuracy of guesses on greedy texts",
      [*columns, *(Column(f"top-{n}", ".3f") for n in tops)],
      [[cell.item() if hasattr(cell, "item") else cell for cell in row] for row in rows],
      "Distance 1 is the model's own next token. The paper's 7B model: top-1 at distance 2 is "
      f"{PAPER_TOP1}.",
    )
  )
  shown = {PPD: "PPD", UNTRAINED: "untrained"}
  plots.line_plot(
    workdir / "accuracy.png",
    {
      f"{label}, {distance + 2}": (tops, mean[name][distance].cumsum()[[n - 1 for n in tops]])
      for name, label in shown.items()
      for distance in (0, config.distances - 1)
    },
    xlabel="candidates n",
    ylabel="true token among them",
    title="Top-n accuracy by distance",
  )
  report.figures.append(Figure("accuracy", "accuracy.png", "Mean over seeds, test texts."))


def report_trees(
  config: ConfigDict, results: dict, timing, workdir: pathlib.Path, report: Report
) -> None:
  """tau of every sort of tree and guess by size."""
  methods = list(next(iter(results.values())).statistics)
  tau = {m: _taus(config, results, m) for m in methods}  # [seeds, sizes]
  rows = [
    [method, n, float(tau[method][:, i].mean()), _deviation(tau[method][:, i])]
    + [float(np.mean([r.trees[method][n].tokens_per_pass for r in results.values()]))]
    + [_by_source(config, results, method, n, s) for s in range(len(config.test_sources))]
    for method in methods
    for i, n in enumerate(config.sizes)
  ]
  lookup = np.array([r.lookup for r in results.values()])
  rows.append(
    ["prompt lookup, 10 drafts", 11, float(lookup.mean()), _deviation(lookup), None]
    + [None] * len(config.test_sources)
  )
  rows.append(["autoregressive", 1, 1.0, None, 1.0, *[1.0] * len(config.test_sources)])
  report.tables.append(
    Table(
      "Tokens per pass (tau), greedy",
      [
        "method",
        "inputs N",
        Column("tau", ".3f"),
        Column("sd over seeds", ".3f"),
        Column("promised by validation", ".3f"),
        *(Column(source, ".3f") for source in config.test_sources),
      ],
      rows,
    )
  )
  shown = {DYNAMIC: "dynamic", STATIC: "static", RANDOM: "random", UNTRAINED: "untrained"}
  plots.line_plot(
    workdir / "trees.png",
    {label: (list(config.sizes), tau[m].mean(0)) for m, label in shown.items()},
    xlabel="inputs of a pass, N",
    ylabel="tokens per pass, tau",
    title="Trees by size",
  )
  report.figures.append(Figure("trees", "trees.png", "Mean over seeds, all test texts."))
  promised = np.mean(
    [[r.trees[DYNAMIC][n].tokens_per_pass for n in config.sizes] for r in results.values()], axis=0
  )
  speed = lambda tau, seconds: [float(t * timing.single / s) for t, s in zip(tau, seconds)]
  expected = speed(promised, timing.seconds)
  measured = speed(tau[DYNAMIC].mean(0), timing.again)
  report.tables.append(
    Table(
      "Size of a pass by measured latency",
      [
        "inputs N",
        Column("L(N), ms", ".2f"),
        Column("L(N) / L(1)", ".2f"),
        Column("speed-up, promised", ".3f", "higher"),
        Column("speed-up, tau of the test", ".3f", "higher"),
        f"chosen for {config.tpu}" if config.tpu else "chosen",
      ],
      [
        [n, 1e3 * s, s / timing.single, e, m, "yes" if n == timing.size else ""]
        for n, s, e, m in zip(config.sizes, timing.seconds, expected, measured)
      ],
      f"One row on this device; L(1) = {1e3 * timing.single:.2f} ms. The test's column takes "
      "latencies that were measured again.",
    )
  )


def report_bound(
  config: ConfigDict, trees: Mapping[int, TreeSet], seconds: list[float], report: Report
) -> None:
  """The size by the static bound of a chip.

  Args:
    trees: dynamic, of every size.
    seconds: at least L(1), and L(N) of every size.
  """
  single, *each = seconds
  tau = [trees[size].tokens_per_pass for size in config.sizes]
  chosen = best_size(list(config.sizes), lambda size: trees[size].tokens_per_pass, each)
  report.tables.append(
    Table(
      f"Size of the tree for {config.tpu}, by the compiler's static bound",
      [
        "inputs N",
        Column("L(N) at least, ms", ".4f", "lower"),
        Column("L(N) / L(1)", ".3f", "lower"),
        Column("tau, promised", ".3f", "higher"),
        Column("speed-up, expected", ".3f", "higher"),
        "candidates by state",
        "chosen",
      ],
      [
        [n, 1e3 * s, s / single, t, t * single / s, f"{trees[n].counts[1:]}"]
        + ["yes" if n == chosen else ""]
        for n, s, t in zip(config.sizes, each, tau)
      ],
      f"Passes of {config.tpu_model or config.model} in bfloat16 over a cache of "
      f"{config.prompt_length + config.new_tokens}; L(1) at least {1e3 * single:.4f} ms. tau is of "
      f"{config.model}'s prompt tokens, first seed.",
    )
  )


def report_cost(config: ConfigDict, results: dict, timing, report: Report) -> None:
  """Decoding by the engine with the clock running, and what the method costs."""
  first = next(iter(results.values()))
  rates = np.mean([r.engine.acceptance_rates for r in results.values()], axis=0)
  tau = np.mean([r.engine.acceptance_length for r in results.values()])
  states = np.mean([np.asarray(r.engine.states).sum(0) for r in results.values()], axis=0)
  promised = np.mean([r.trees[DYNAMIC][timing.size].stationary for r in results.values()], axis=0)
  model = timing.model_bytes
  own = first.trained[PPD]
  report.tables.append(
    Table(
      f"The engine at N = {timing.size}",
      ["quantity", Column("here", ".4g"), "paper"],
      [
        ["acceptance length tau", float(tau), None],
        *[[f"acceptance rate at depth {i + 1}", float(x), None] for i, x in enumerate(rates)],
        *[
          [f"rounds in state {k}, share", float(states[k] / states.sum()), None]
          for k in range(len(states))
        ],
        *[[f"state {k}, promised", float(x), None] for k, x in enumerate(promised)],
        [f"tau of typical acceptance, T = {config.temperature:g}", timing.typical, None],
        ["tokens/s, generate", timing.plain, None],
        ["tokens/s, PPD", timing.decoded, None],
        ["speed-up, measured", timing.decoded / timing.plain, "up to 2.49"],
        ["trained numbers", own, None],
        ["trained, % of the model", 100 * own * 4 / model, f"{PAPER_TRAINABLE}"],
        ["prompt tokens and trees in memory, % of the model", 100 * timing.table_bytes / model]
        + [f"{PAPER_MEMORY}"],
        [
          "training hours, all students of a seed",
          float(np.mean([r.train_seconds for r in results.values()])) / 3600,
          "16 (A100)",
        ],
      ],
      "One prompt at a time. Speed and typical acceptance are of the first seed.",
    )
  )


def report_ablations(config: ConfigDict, found: dict, report: Report) -> None:
  """Kinds of prompt tokens, of the first seed."""
  rows = [
    [name, count, *(float(x) for x in a[:, 0]), *(float(x) for x in a.sum(1))]
    for name, (count, a) in found.items()
  ]
  distances = range(2, config.distances + 2)
  report.tables.append(
    Table(
      f"Kinds of prompt tokens, {config.ablation_steps} steps",
      [
        "prompt tokens",
        Column("trained numbers", ","),
        *(Column(f"top-1, distance {d}", ".3f", "higher") for d in distances),
        *(Column(f"top-10, distance {d}", ".3f", "higher") for d in distances),
      ],
      rows,
      "One seed; all kinds were trained on the same cuts and measured on the same test texts.",
    )
  )


def report_composition(config: ConfigDict, found, report: Report) -> None:
  """Speculative decoding, and the claim that prompt tokens on its draft model add to it."""
  single, tree, verify = found.seconds
  cost = {"draft model": single, "draft model with PPD": tree}
  plain = None
  rows = []
  for name, (target, draft) in found.passes.items():
    seconds = target * verify + draft * cost[name]
    plain = plain or seconds
    rows.append([name, target, draft, 1e3 * seconds, plain / seconds])
  report.tables.append(
    Table(
      f"Speculative decoding, {config.drafts} drafts ({config.draft} for {config.model})",
      [
        "drafts from",
        Column("target passes per token", ".3f"),
        Column("draft passes per token", ".3f"),
        Column("ms per token, modelled", ".3f", "lower"),
        Column("over plain speculative decoding", ".3f", "higher"),
      ],
      rows,
      f"Measured: a pass of the draft model {1e3 * single:.2f} ms, with {found.size} inputs "
      f"{1e3 * tree:.2f} ms, of the target with {config.drafts + 1} {1e3 * verify:.2f} ms. "
      f"{found.differing} texts differ from the target's own. The paper: up to 1.22.",
    )
  )
  passes = [p[1] for p in found.passes.values()]
  report.claims.append(
    Claim.less(
      "Prompt tokens on the draft model: fewer draft passes for a token (ratio; first seed)",
      [passes[1] / passes[0]],
      1.0,
    )
  )
  report.claims.append(
    Claim.greater(
      "Prompt tokens on the draft model: faster than plain speculative decoding (modelled)",
      [rows[1][4]],
      1.0,
    )
  )


def report_claims(config: ConfigDict, results: dict, timing, report: Report) -> None:
  """The claims of all seeds."""
  n, first = config.compared_size, config.sizes.index(config.compared_size)
  tau = {m: _taus(config, results, m) for m in next(iter(results.values())).statistics}
  source = config.test_sources[0]
  on_first = [_of_source(config, r.statistics[DYNAMIC][n], 0) for r in results.values()]
  untrained = [_of_source(config, r.statistics[UNTRAINED][n], 0) for r in results.values()]
  at_size = lambda method: tau[method][:, first].tolist()
  claims = [
    Claim.less(
      "Greedy text is the model's own: prompts whose text differs",
      [r.differing for r in results.values()],
      0.5,
    ),
    Claim.greater(f"tau with the dynamic tree, N = {n}, on {source}", on_first, 1.3),
    Claim.greater(
      f"Trained prompt tokens against untrained ones: tau, N = {n}, on {source}",
      {"trained": on_first, "untrained": untrained},
      0.15,
    ),
    Claim.greater(
      f"The dynamic tree is no worse than the static one: tau, N = {n}",
      {"dynamic": at_size(DYNAMIC), "static": at_size(STATIC)},
      -TIE,
    ),
    Claim.greater(
      f"The static tree is better than a random one: tau, N = {n}",
      {"static": at_size(STATIC), "random": at_size(RANDOM)},
    ),
    Claim.greater(
      "The hardware-aware size against the best one: speed by the test's tau",
      [_share_of_best(config, r, timing) for r in results.values()],
      0.97,
    ),
  ]
  if config.medusa_heads:
    per_number = lambda r, name: r.test_accuracies[name][:, 0].mean() / r.trained[name]
    claims.append(
      Claim.greater(
        "Top-1 accuracy of a trained number, prompt tokens over Medusa heads (ratio)",
        [per_number(r, PPD) / per_number(r, MEDUSA) for r in results.values()],
        1.0,
      )
    )
    claims.append(
      Claim.greater(
        "Top-1 accuracy, mean over distances, against Medusa heads of as many numbers",
        {
          name: [r.test_accuracies[name][:, 0].mean() for r in results.values()]
          for name in (PPD, MATCHED)
        },
      )
    )
  report.claims[:0] = claims


def _share_of_best(config: ConfigDict, result, timing) -> float:
  """Speed at the size that the seed's validation promises most of, over the best of the test."""
  promised = [result.trees[DYNAMIC][n].tokens_per_pass for n in config.sizes]
  chosen = int(np.argmax(np.array(promised) / timing.seconds))
  tau = [result.statistics[DYNAMIC][n].acceptance_length for n in config.sizes]
  speed = np.array(tau) / timing.again
  return float(speed[chosen] / speed.max())


def _taus(config: ConfigDict, results: dict, method: str) -> np.ndarray:
  """[seeds, sizes]."""
  return np.array(
    [[r.statistics[method][n].acceptance_length for n in config.sizes] for r in results.values()]
  )


def _by_source(config: ConfigDict, results: dict, method: str, size: int, source: int) -> float:
  of = [_of_source(config, r.statistics[method][size], source) for r in results.values()]
  return float(np.mean(of))


def _of_source(config: ConfigDict, statistics: Statistics, source: int) -> float:
  """tau on the texts of one source; rows are source by source, as many of each."""
  rows = np.array_split(np.arange(len(statistics.accepted)), len(config.test_sources))[source]
  return Statistics(*(x[rows] for x in statistics)).acceptance_length


def _deviation(values: np.ndarray) -> float | None:
  return float(values.std(ddof=1)) if len(values) > 1 else None
