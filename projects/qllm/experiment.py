"""QLLM beside its baselines on a model with outlier channels: loss, ablations, what was found."""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.data.pipelines import calibration_samples, evaluation_windows
from common.errors import UserError
from common.evaluation.harness import require_harness, zero_shot_accuracies
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.models.outliers import inject_down_outliers, inject_outliers
from common.quantization.reassembly import Reassembly
from common.quantization.reconstruction import ReconstructionLog
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.qllm.channel_reassembly import ThresholdSearch
from projects.qllm.methods import (
  Method,
  Quantized,
  main_methods,
  reassembly_ablations,
  settings_of,
  tuning_ablations,
)
from projects.qllm.qllm import RoundLog, check_model
from projects.qllm.sites import SiteReassembly

Array = jax.Array

EXCESS = Column("nats per token above full precision", ".4f", better="lower")
SPREAD = Column("sd over seeds", ".4f")
# The shortest bar of a plot with a logarithmic axis.
SMALLEST_BAR = 1e-4


class Draw(NamedTuple):
  """One seed: a full-precision model, calibration text, randomness."""

  model: Decoder
  tokens: Array
  key: Array


class Outcome(NamedTuple):
  """What the tables need of a quantized model of one draw.

  Attributes:
    losses: on the evaluation text.
    rounds: of QLLM, else none.
    accuracies: of the config's tasks; None if they were not asked for.
    seconds: to score the evaluation text, {model: seconds}; None if they were not asked for.
  """

  losses: WindowLosses
  rounds: list[RoundLog]
  accuracies: list[float] | None = None
  seconds: dict[str, float] | None = None


# {method: the outcome of every draw}
Measured = dict[str, list[Outcome]]
# `measure` without its first four arguments.
Measure = Callable[..., Measured]

FULL_PRECISION: dict[str, Method] = {
  "full precision": lambda model, tokens, key: Quantized(model, [])
}


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  require_harness(config.tasks)
  if missing := [m for m in ("RTN", "QLLM, no tuning", "QLLM") if m not in config.methods]:
    raise UserError(
      f"methods lacks {', '.join(missing)}, which the others are compared with; add it"
    )
  base = base_model(config.model)
  for name in config.settings:
    check_model(base.model, settings_of(config, name))
  by_domain = evaluation_windows(
    config.eval_domains,
    base.tokenizer,
    seq_len=config.eval_length,
    per_source=config.eval_windows,
  )
  windows = np.concatenate(list(by_domain.values()))
  domains = {name: len(rows) for name, rows in by_domain.items()}
  types = (Outcome, WindowLosses, RoundLog, SiteReassembly, Reassembly, ThresholdSearch)
  measurements = Measurements(workdir, config, (*types, ReconstructionLog))
  run_methods = functools.partial(measure, config, base, windows, measurements)
  report = Report(tables=[], figures=[], claims=[])
  first = config.settings[0]
  original = run_methods("original", FULL_PRECISION, config.seeds, tasks=config.tasks)
  full = original["full precision"]
  main = {}
  for name in config.settings:
    methods = main_methods(config, settings_of(config, name))
    chosen = config.methods if name == first else config.other_methods
    methods = {method: methods[method] for method in chosen}
    measured = run_methods(name, methods, config.seeds, tasks=config.tasks)
    add_methods(config, name, measured, full, domains, workdir, report)
    if config.tasks:
      add_tasks(config, name, original | measured, report)
    if name == first:
      main = measured
  add_sites(config, first, main["QLLM"][0].rounds, workdir, report)
  add_tuning_errors(first, main, report)
  add_overhead(config, main["QLLM"][0].seconds, len(windows), report)
  if config.natural:
    compare_natural(config, run_methods, report)
  if config.ablations:
    compare_reassemblies(config, full, main, run_methods, report)
    compare_tunings(config, full, main, run_methods, report)
  return report


def make_draw(config: ConfigDict, base: BaseModel, seed: int, outliers: bool) -> Draw:
  """Calibration text and, if asked for, outlier channels of a seed."""
  tokens = calibration_samples(
    ",".join(config.domains),
    base.tokenizer,
    num_samples=config.calibration_samples,
    seq_len=config.calibration_length,
    seed=seed,
  )
  model, key = base.model, jax.random.key(seed)
  if outliers:
    how = {"fraction": config.outlier_fraction, "gain": config.outlier_gain}
    model = inject_outliers(model, key, **how)
    model = inject_down_outliers(model, jax.random.fold_in(key, 1), **how)
  return Draw(model, jnp.asarray(tokens), jax.random.fold_in(key, 2))


def measure(
  config: ConfigDict,
  base: BaseModel,
  windows: np.ndarray,
  measurements: Measurements,
  part: str,
  methods: Mapping[str, Method],
  seeds: Sequence[int],
  *,
  outliers: bool | None = None,
  tasks: Sequence[str] = (),
) -> Measured:
  """Every method on every draw.

  Args:
    config, base: of the draws.
    windows: the evaluation text, int32 [windows, seq].
    measurements: of the run.
    part: of the run; at the config's first setting, models of the first draw are timed.
    methods: what is compared.
    seeds: of the draws.
    outliers: None for the config's.
    tasks: on which models of the first draw are scored.
  """
  outliers = config.outliers if outliers is None else outliers

  def outcome(method: str, draw_of: Callable[[], Draw], first: bool) -> Outcome:
    model, tokens, key = draw_of()
    quantized, rounds = methods[method](model, tokens, key)
    losses, accuracies, seconds = window_losses(quantized, windows), None, None
    if first and tasks:
      limit = config.task_limit
      accuracies = zero_shot_accuracies(quantized, base.tokenizer, tasks, limit=limit)
    if first and (part, method) == (config.settings[0], "QLLM"):
      # RTN's model is made again, so that the three are timed one after the other.
      models = {"full precision": model, "RTN": methods["RTN"](model, tokens, key).model}
      models["QLLM"] = quantized
      seconds = {name: scoring_seconds(timed, windows) for name, timed in models.items()}
    return Outcome(losses, rounds, accuracies, seconds)

  measured: Measured = {method: [] for method in methods}
  for seed in track(seeds, f"QLLM, {part}", console=Console(stderr=True)):
    # Made when a measurement that is missing asks for it.
    draw_of = functools.cache(functools.partial(make_draw, config, base, seed, outliers))
    for method, found in measured.items():
      unit = functools.partial(outcome, method, draw_of, seed == seeds[0])
      found.append(measurements.get(f"{part}, {method}, seed {seed}", unit))
  return measured


def scoring_seconds(model: Decoder, windows: np.ndarray) -> float:
  """Time to score the evaluation text, compiled programs, the best of three."""
  times = []
  for _ in range(3):
    start = time.perf_counter()
    window_losses(model, windows)
    times.append(time.perf_counter() - start)
  return min(times)


def losses_of(measured: Measured) -> dict[str, list[float]]:
  """Nats per token of every draw."""
  return {
    name: [found.losses.nats_per_token for found in results] for name, results in measured.items()
  }


def excess(measured: Measured, full: list[Outcome]) -> dict[str, tuple[float, float | None]]:
  """Loss above full precision, mean and standard deviation over draws."""
  found = {}
  for name, losses in losses_of(measured).items():
    above = [loss - original.losses.nats_per_token for loss, original in zip(losses, full)]
    spread = float(np.std(above, ddof=1)) if len(above) > 1 else None
    found[name] = float(np.mean(above)), spread
  return found


def add_methods(
  config: ConfigDict,
  name: str,
  measured: Measured,
  full: list[Outcome],
  domains: dict[str, int],
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """One setting's table, figure and claims."""
  rows = [["full precision", *perplexities(full, domains), None, None]]
  above = excess(measured, full)
  for method, results in measured.items():
    rows.append([method, *perplexities(results, domains), *above[method]])
  columns = [Column(f"ppl {d.rpartition(':')[2]}", ".2f", better="lower") for d in domains]
  report.tables.append(
    Table(
      f"{name}, {kind(config)}",
      ["method", *columns, EXCESS, SPREAD],
      rows,
      note=f"Mean of {len(full)} seeds: calibration text and, if any, outlier channels.",
    )
  )
  file = f"methods_{name}.png"
  plots.bar_plot(
    workdir / file,
    [method.replace("QLLM, no", "QLLM,\nno") for method in above],
    {"loss": [max(mean, SMALLEST_BAR) for mean, _ in above.values()]},
    ylabel="nats per token above\nfull precision",
    title=f"{name}, {kind(config)}",
    log=True,
  )
  report.figures.append(Figure(f"Loss of quantization, {name}", file, "Mean over seeds."))
  if not config.outliers:
    return
  loss = losses_of(measured | {"full precision": full})
  pairs = [
    ("full precision", "QLLM"),
    ("QLLM", "QLLM, no tuning"),
    ("QLLM, no tuning", "RTN"),
    ("SmoothQuant", "RTN"),
    ("QLLM", "SmoothQuant"),
    ("QLLM", "OS+"),
    ("QLLM", "OmniQuant"),
    ("QLLM", "EEC only"),
  ]
  for a, b in pairs:
    if a in loss and b in loss:
      report.claims.append(less(a, b, loss, f"{name}, outlier model"))


def less(a: str, b: str, loss: dict[str, list[float]], where: str) -> Claim:
  statement = f"{a} has lower loss than {b} ({where}, nats per token)"
  return Claim.less(statement, {a: loss[a], b: loss[b]})


def perplexities(outcomes: list[Outcome], domains: dict[str, int]) -> list[float]:
  """Of each domain, mean over draws."""
  ends = np.cumsum(list(domains.values()))[:-1]
  losses = [outcome.losses for outcome in outcomes]
  parts = [[WindowLosses(n, loss.tokens) for n in np.split(loss.nll, ends)] for loss in losses]
  return np.mean([[part.perplexity for part in of_draw] for of_draw in parts], axis=0).tolist()


def kind(config: ConfigDict) -> str:
  return f"{config.model} with outliers" if config.outliers else config.model


def found_sites(rounds: list[RoundLog]) -> list[tuple[int, str, SiteReassembly]]:
  """(block, path before the site, what was found) of all blocks."""
  blocks = [of_block for log in rounds for of_block in log.sites]
  return [(i, path, site) for i, found in enumerate(blocks) for path, site in found.items()]


def add_sites(
  config: ConfigDict, name: str, rounds: list[RoundLog], workdir: pathlib.Path, report: Report
) -> None:
  """What was found at every site of the first draw."""
  rows, shares = [], {}
  for block, path, site in found_sites(rounds):
    width = site.reassembly.copy_of.size
    extra, ratio = int(site.extra), float(site.search.loss / site.search.loss_unchanged)
    shares.setdefault(path, []).append(extra / width)
    rows.append([block, path, width, extra, float(site.threshold), float(site.error), ratio])
  report.tables.append(
    Table(
      f"Reassembly of every site, {name}, {kind(config)}",
      [
        "block",
        "behind",
        Column("channels", "d"),
        Column("extra", "d"),
        Column("threshold", ".2f"),
        Column("reassembly error", ".2e"),
        Column("quantized loss / unchanged", ".3f"),
      ],
      rows,
      note="First seed. The error is of the next output without rounding, relative to its mean square.",
    )
  )
  plots.heatmap(
    workdir / "extra_channels.png",
    list(shares.values()),
    [f"behind {path}" for path in shares],
    [str(i) for i in range(len(next(iter(shares.values()))))],
    xlabel="block",
    title=f"Channels added and merged, {name}",
    annotate=".3f",
  )
  report.figures.append(
    Figure(
      "Extra channels",
      "extra_channels.png",
      "Share of the channels, first seed; the limit is channel_ratio.",
    )
  )


def add_tuning_errors(name: str, measured: Measured, report: Report) -> None:
  """Error of each round before and after tuning, and after the merge has rounded again."""
  rows = []
  for method, results in measured.items():
    for i, log in enumerate(results[0].rounds):
      if log.tuning is not None:
        errors = log.tuning.before, log.tuning.after, log.merged_error
        rows.append([method, i, *map(float, errors)])
  report.tables.append(
    Table(
      f"Mean squared error of a round's output, {name}",
      ["method", "round", *[Column(c, ".4f") for c in ("before", "tuned", "merged and rounded")]],
      rows,
      note="First seed, on the calibration text.",
    )
  )


def add_overhead(
  config: ConfigDict, seconds: dict[str, float], num_windows: int, report: Report
) -> None:
  """Time to score the evaluation text, of the first draw's models."""
  report.tables.append(
    Table(
      f"Time to score {num_windows} x {config.eval_length} tokens",
      ["model", Column("seconds", ".3f"), Column("relative to RTN", ".2f")],
      [[label, value, value / seconds["RTN"]] for label, value in seconds.items()],
      note="Rounded activations are emulated in floating point; of interest is QLLM beside RTN.",
    )
  )


def compare_natural(config: ConfigDict, run_methods: Measure, report: Report) -> None:
  """The model as it is: is reassembly left out where there are no outliers?"""
  name = config.settings[0]
  methods = main_methods(config, settings_of(config, name))
  chosen = FULL_PRECISION | {m: methods[m] for m in ("RTN", "QLLM, no tuning")}
  measured = run_methods("natural", chosen, config.seeds, outliers=False)
  full = measured.pop("full precision")
  shares = []
  for found in measured["QLLM, no tuning"]:
    unchanged = [int(site.extra) == 0 for _, _, site in found_sites(found.rounds)]
    shares.append(float(np.mean(unchanged)))
  report.tables.append(
    Table(
      f"{name}, {config.model} without outliers",
      ["method", EXCESS, SPREAD],
      [[method, *values] for method, values in excess(measured, full).items()],
      note=f"Mean of {len(full)} seeds. Sites left unchanged: {np.mean(shares):.0%}.",
    )
  )
  statement = f"without outliers most sites are left unchanged ({name}, {config.model}, share)"
  report.claims.append(Claim.greater(statement, shares, 0.5))


def compare_reassemblies(
  config: ConfigDict,
  full: list[Outcome],
  main: Measured,
  run_methods: Measure,
  report: Report,
) -> None:
  """Other reassemblies and thresholds, without tuning."""
  name = config.settings[0]
  methods = reassembly_ablations(config, settings_of(config, name))
  measured = {"QLLM, no tuning": main["QLLM, no tuning"], "RTN": main["RTN"]}
  measured |= run_methods("reassembly", methods, config.seeds)
  rows = []
  for method, values in excess(measured, full).items():
    sites = found_sites(measured[method][0].rounds)
    extra = sum(int(site.extra) for _, _, site in sites) if sites else None
    error = float(np.mean([float(site.error) for _, _, site in sites])) if sites else None
    rows.append([method, *values, extra, error])
  report.tables.append(
    Table(
      f"Reassembly without tuning, {name}, {kind(config)}",
      ["method", EXCESS, SPREAD, "extra channels", Column("mean reassembly error", ".2e")],
      rows,
      note=f"Loss: mean of {len(full)} seeds; channels and error: first seed, all sites.",
    )
  )
  loss, where = losses_of(measured), f"{name}, outlier model, no tuning"
  ours = "QLLM, no tuning"
  pairs = [
    ("disassembly only (wider)", ours),
    (ours, "disassembly, pruning"),
    ("exact score of pairs", "disassembly, pruning"),
    (ours, "fixed threshold"),
    (ours, "fixed ratio"),
  ]
  report.claims.extend(less(a, b, loss, where) for a, b in pairs)


def compare_tunings(
  config: ConfigDict,
  full: list[Outcome],
  main: Measured,
  run_methods: Measure,
  report: Report,
) -> None:
  """Other ways of tuning."""
  name, seeds = config.settings[0], config.seeds[: config.tuning_ablation_seeds]
  methods = tuning_ablations(config, settings_of(config, name))
  measured = {m: main[m][: len(seeds)] for m in ("QLLM", "QLLM, no tuning")}
  measured |= run_methods("tuning", methods, seeds)
  rows = []
  for method, values in excess(measured, full).items():
    last = measured[method][0].rounds[-1]
    tuned = None if last.tuning is None else float(last.tuning.after)
    rows.append([method, *values, tuned, float(last.merged_error)])
  report.tables.append(
    Table(
      f"Tuning, {name}, {kind(config)}",
      [
        "method",
        EXCESS,
        SPREAD,
        Column("error, tuned", ".4f"),
        Column("error, merged", ".4f"),
      ],
      rows,
      note=f"{len(seeds)} seed(s). Mean squared error of the last round's output: "
      f"QLLM has rank {config.rank} and {config.blocks_per_round} blocks per round.",
    )
  )


def add_tasks(config: ConfigDict, name: str, measured: Measured, report: Report) -> None:
  """Zero-shot accuracies by EleutherAI's harness, first draw."""
  rows = []
  for label, results in measured.items():
    accuracies = results[0].accuracies
    rows.append([label, *accuracies, float(np.mean(accuracies))])
  columns = [Column(task, ".4f", better="higher") for task in (*config.tasks, "mean")]
  report.tables.append(Table(f"Zero-shot accuracy, {name}", ["method", *columns], rows))
