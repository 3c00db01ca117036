"""Tables, plots and claims of a run."""

import pathlib

import numpy as np
from ml_collections import ConfigDict

from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.specdec_pp.frontier import (
  Rates,
  bootstrap_area,
  compare_frontiers,
  modelled_speedup,
  of_rows,
  rates,
  verification_at,
)
from projects.specdec_pp.mdp import AcceptanceProcess, cost_per_token, solve
from projects.specdec_pp.timing import PassCosts, Timed

# What a frontier may lie above the other by chance, target passes per token.
NOISE = 0.01
# Synthetic processes of the decision problem.
PROCESSES = (
  AcceptanceProcess(1.0, 0.7, 0.7),
  AcceptanceProcess(0.5, 0.9, 0.5),
  AcceptanceProcess(0.6, 0.95, 0.3),
  AcceptanceProcess(0.6, 1.0, 0.1),
)


def report_results(
  config: ConfigDict, results: dict, costs: PassCosts, workdir: pathlib.Path, report: Report
) -> None:
  """Costs of every policy, frontiers per source, and the claims on them."""
  all_costs = {
    kind: _stack([rates(result.statistics[kind]) for result in results.values()])
    for kind in next(iter(results.values())).statistics
  }
  labels = _labels(config)
  speeds = {kind: modelled_speedup(c, config.cost_ratio) for kind, c in all_costs.items()}
  rows = [["target alone", 0.0, 1.0, 0.0, 1.0, None, 1.0]]
  for kind, c in all_costs.items():
    for i, label in enumerate(labels[kind]):
      speed = speeds[kind][:, i]
      rows.append(
        [label, *(float(x[:, i].mean()) for x in c), float(speed.mean())]
        + [float(speed.std(ddof=1)) if len(speed) > 1 else None]
        + [float(modelled_speedup(c, costs.ratio)[:, i].mean())]
      )
  how = "decoded" if config.engine else "replayed on the same decisions"
  report.tables.append(
    Table(
      "Costs of drafting policies, per generated token",
      [
        "policy",
        Column("discard rate", ".3f"),
        Column("verification rate", ".3f"),
        Column("drafts", ".2f"),
        Column(f"speed-up, c2/c1 = {config.cost_ratio:g}", ".3f"),
        Column("sd over seeds", ".3f"),
        Column(f"speed-up, measured c2/c1 = {costs.ratio:.1f}", ".3f"),
      ],
      rows,
      note=(
        f"Mean of {len(results)} seeds, {how}. Discarded drafts and target passes per token; "
        "speed-ups are of the cost model c1 drafts + c2 target passes."
      ),
    )
  )
  by_seed = list(results.values())
  _frontier_claims(config, by_seed, report)
  best = {kind: s.max(axis=1) for kind, s in speeds.items()}
  report.claims.append(
    Claim.greater(
      f"the best SpecDec++ is at least 3 % faster than the best constant length (modelled, c2/c1 = "
      f"{config.cost_ratio:g})",
      best["SpecDec++"] / best["constant"] - 1,
      0.03,
    )
  )
  if "oracle" in best:
    report.claims.append(
      Claim.greater(
        "known accept lengths bound both (modelled speed-up less the better of SpecDec++ and "
        "constant)",
        best["oracle"] - np.maximum(best["SpecDec++"], best["constant"]),
      )
    )
  _plot_frontiers(all_costs, labels, workdir, report)
  _source_table(config, by_seed, report)


def _frontier_claims(config: ConfigDict, by_seed: list, report: Report) -> None:
  rows, lows, above, calls = [], [], [], []
  kinds = [k for k in ("SpecDec++", "confidence") if k in by_seed[0].statistics]
  for kind in kinds:
    for seed, result in zip(config.seeds, by_seed):
      ours, baseline = result.statistics[kind], result.statistics["constant"]
      costs, constants = rates(ours), rates(baseline)
      comparison = compare_frontiers(costs, constants)
      interval = bootstrap_area(ours, baseline, resamples=config.resamples, seed=seed)
      best = np.argmax(modelled_speedup(constants, config.cost_ratio))
      saved = constants.verification[best] / verification_at(costs, constants.discard[best]) - 1
      rows.append([kind, seed, comparison.area, *interval, comparison.above, float(saved)])
      if kind == "SpecDec++":
        lows.append(interval[0])
        above.append(comparison.above)
        calls.append(float(saved))
  report.tables.append(
    Table(
      "Area between the constant-length frontier and another, target passes per token",
      [
        "policy",
        "seed",
        Column("area", ".4f"),
        Column("95 % low", ".4f"),
        Column("95 % high", ".4f"),
        Column("largest excess", ".4f"),
        Column("calls of the best constant", "+.1%"),
      ],
      rows,
      note=(
        "Bootstrap over prompts. Excess: how far it lies above the constants anywhere. Calls: how many "
        "more target passes the constant length of the greatest modelled speed-up takes than the "
        "other frontier at as many discarded drafts."
      ),
    )
  )
  report.claims.extend(
    [
      Claim.greater(
        "for the same discards SpecDec++ calls the target less often than constant lengths (area "
        "between frontiers, lower end of the 95 % interval)",
        lows,
      ),
      Claim.less(
        "the frontier of SpecDec++ is nowhere above that of constant lengths (largest excess, target "
        f"passes per token; {NOISE:g} is noise)",
        above,
        NOISE,
      ),
      Claim.greater(
        "the best constant length calls the target at least 5 % more often than SpecDec++ at as many "
        "discarded drafts",
        calls,
        0.05,
      ),
    ]
  )


def _source_table(config: ConfigDict, by_seed: list, report: Report) -> None:
  """Modelled speed-up by source of the test prompts, whose rows lie together."""

  def best(result, kind, chosen):
    costs = rates(of_rows(result.statistics[kind], chosen))
    return modelled_speedup(costs, config.cost_ratio).max()

  rows = []
  for i, source in enumerate(config.test_sources):
    chosen = slice(i * config.test_prompts, (i + 1) * config.test_prompts)
    constants = np.array([best(r, "constant", chosen) for r in by_seed])
    adaptive = np.array([best(r, "SpecDec++", chosen) for r in by_seed])
    known = source in config.head_sources
    rows.append(
      [source, "yes" if known else "no", constants.mean(), adaptive.mean()]
      + [float((adaptive / constants - 1).mean())]
    )
  report.tables.append(
    Table(
      f"Modelled speed-up by source, c2/c1 = {config.cost_ratio:g}",
      [
        "source",
        "head trained on it",
        Column("best constant", ".3f"),
        Column("best SpecDec++", ".3f"),
        Column("gain", "+.1%"),
      ],
      rows,
    )
  )


def report_head(
  config: ConfigDict, results: dict, ablated: list, workdir: pathlib.Path, report: Report
) -> None:
  """Quality of the heads, the ablations, and the claims on them."""
  report.tables.append(
    Table(
      "The acceptance head",
      [
        "seed",
        Column("KL, head", ".4f"),
        Column("KL, weight undone", ".4f"),
        Column("KL, constant", ".4f"),
        Column("AUROC of rejection", ".3f"),
        Column("AUROC of the draft's confidence", ".3f"),
        Column("ECE", ".3f"),
        *[Column(f"Var A, {source}", ".3f") for source in config.head_sources],
      ],
      [
        [
          seed,
          *r.divergence,
          r.quality.auroc,
          r.confidence_auroc,
          r.quality.ece,
          *r.variance.values(),
        ]
        for seed, r in results.items()
      ],
      note=(
        "KL in nats, dev texts. AUROC and ECE on "
        + ("dev labels." if config.engine else "the decisions of the test texts.")
      ),
    )
  )
  divergences = [r.divergence for r in results.values()]
  report.claims.extend(
    [
      Claim.greater(
        "the head tells rejected drafts from accepted ones (AUROC)",
        [r.quality.auroc for r in results.values()],
        0.65,
      ),
      Claim.less(
        "the head is closer to the labels than a constant (KL, dev)",
        {"head": [d.head for d in divergences], "constant": [d.constant for d in divergences]},
      ),
    ]
  )
  if ablated:
    report.tables.append(
      Table(
        f"Heads trained otherwise, seed {config.seeds[0]}",
        [
          "head",
          Column("KL, dev", ".4f", "lower"),
          Column("KL, weight undone", ".4f", "lower"),
          Column("AUROC", ".3f", "higher"),
          Column("ECE", ".3f", "lower"),
          Column("best speed-up", ".3f", "higher"),
          "at h",
        ],
        [
          [
            a.name,
            a.divergence.head,
            a.divergence.unweighted,
            a.quality.auroc,
            a.quality.ece,
            *_best(config, a.costs),
          ]
          for a in ablated
        ],
        note="One setting changed at a time. KL on the dev texts of the main head.",
      )
    )
  plots.reliability_plot(
    workdir / "calibration.png",
    {f"seed {seed}": r.quality.bins for seed, r in results.items()},
    title="Predicted and observed acceptance",
  )
  report.figures.append(
    Figure("Calibration of the head", "calibration.png", "15 bins of equal count.")
  )


def _best(config: ConfigDict, costs: Rates) -> tuple[float, float]:
  speed = modelled_speedup(costs, config.cost_ratio)
  return float(speed.max()), config.thresholds[int(np.argmax(speed))]


def report_mdp(config: ConfigDict, report: Report) -> None:
  """Optimal thresholds of synthetic processes, beside the best constant length."""
  lengths = np.arange(1, config.max_drafts + 1)
  rows = []
  for process in PROCESSES:
    best = solve(process, 1.0, config.cost_ratio, max_drafts=config.max_drafts)
    mean = process.easy_share * process.alpha_easy + (1 - process.easy_share) * process.alpha_hard
    # The kinds are independent: to a constant length acceptance is i.i.d.
    constants = cost_per_token(mean, lengths, 1.0, config.cost_ratio)
    rows.append(
      [f"{process.easy_share:.0%}", process.alpha_easy, process.alpha_hard, float(best.threshold)]
      + [config.cost_ratio / float(best.cost), config.cost_ratio / float(constants.min())]
      + [int(lengths[np.argmin(constants)]), float(constants.min() / best.cost - 1)]
    )
  report.tables.append(
    Table(
      f"Optimum of synthetic processes, c2/c1 = {config.cost_ratio:g}",
      [
        "easy tokens",
        Column("accepted, easy", ".2f"),
        Column("accepted, hard", ".2f"),
        Column("optimal h", ".3f"),
        Column("speed-up", ".3f"),
        Column("best constant", ".3f"),
        "at K",
        Column("gain", "+.1%"),
      ],
      rows,
      note="By dynamic programming; the kind of each drafted token is known, its fate is not.",
    )
  )


def report_timing(timed: list[Timed], report: Report) -> None:
  """Tokens per second of the engine."""
  alone = timed[0].tokens_per_second
  report.tables.append(
    Table(
      "Decoded with the clock running",
      [
        "way",
        Column("tokens per second", ".0f"),
        Column("of the target alone", ".2f"),
        Column("discard rate", ".3f"),
        Column("verification rate", ".3f"),
      ],
      [
        [t.name, t.tokens_per_second, t.tokens_per_second / alone]
        + (
          [None, None] if t.costs is None else [float(t.costs.discard), float(t.costs.verification)]
        )
        for t in timed
      ],
      note="All prompts in one batch, first seed.",
    )
  )


def _plot_frontiers(all_costs: dict, labels: dict, workdir: pathlib.Path, report: Report) -> None:
  series = {}
  for kind in ("constant", "SpecDec++", "confidence", "random", "heuristic"):
    if kind in all_costs:
      mean = Rates(*(x.mean(axis=0) for x in all_costs[kind]))
      order = np.argsort(mean.discard)
      # A logarithmic axis of less than two decades would label its minor ticks over each other.
      series[kind] = (np.log2(mean.discard[order]), mean.verification[order])
  plots.line_plot(
    workdir / "frontier.png",
    series,
    xlabel="log2 of discarded drafts per token",
    ylabel="target passes per token",
    title="Lower left is better",
  )
  report.figures.append(
    Figure(
      "Frontiers",
      "frontier.png",
      "Over K for constant lengths, over h for SpecDec++; mean of seeds.",
    )
  )


def _labels(config: ConfigDict) -> dict[str, list[str]]:
  return {
    "constant": [f"constant K={k}" for k in config.constants],
    "SpecDec++": [f"SpecDec++ h={h:g}" for h in config.thresholds],
    "heuristic": ["heuristic (+2 / -1)"],
    "current token": ["current token (argmax of the head)"],
    "confidence": [f"draft confidence {c:g}" for c in config.confidences],
    "random": [f"random 1 to {k}" for k in config.random_lengths],
    "oracle": ["oracle"],
  }


def _stack(costs: list[Rates]) -> Rates:
  """[seeds, policies] each."""
  return Rates(*(np.stack(values) for values in zip(*costs)))
