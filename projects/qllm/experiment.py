"""QLLM beside its baselines on a model with outlier channels: loss, ablations, what was found."""

import pathlib
import time
from collections.abc import Mapping
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
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.qllm.methods import (
  Method,
  Quantized,
  main_methods,
  reassembly_ablations,
  settings_of,
  tuning_ablations,
)
from projects.qllm.qllm import check_model
from projects.qllm.sites import SiteReassembly

Array = jax.Array

EXCESS = Column("nats per token above full precision", ".4f", better="lower")
SPREAD = Column("sd over seeds", ".4f")
# The shortest bar of a plot with a logarithmic axis.
SMALLEST_BAR = 1e-4


class Draw(NamedTuple):
  """One seed: a full-precision model, calibration text, randomness, losses on the evaluation text."""

  model: Decoder
  tokens: Array
  key: Array
  full: WindowLosses


# {method: of every draw, (the quantized model's losses, its rounds)}
Measured = dict[str, list[tuple[WindowLosses, Quantized]]]


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
  draws = [make_draw(config, base, windows, seed, config.outliers) for seed in config.seeds]
  report = Report(tables=[], figures=[], claims=[])
  first = config.settings[0]
  main = {}
  for name in config.settings:
    methods = main_methods(config, settings_of(config, name))
    chosen = config.methods if name == first else config.other_methods
    methods = {method: methods[method] for method in chosen}
    measured = measure(methods, draws, windows, name)
    add_methods(config, name, measured, draws, domains, workdir, report)
    if config.tasks:
      add_tasks(config, name, measured, draws[0], base, report)
    if name == first:
      main = measured
  add_sites(config, first, main["QLLM"][0][1], workdir, report)
  add_tuning_errors(first, main, report)
  add_overhead(config, main, draws[0], windows, report)
  if config.natural:
    compare_natural(config, base, windows, report)
  if config.ablations:
    compare_reassemblies(config, draws, windows, main, report)
    compare_tunings(config, draws, windows, main, report)
  return report


def make_draw(
  config: ConfigDict, base: BaseModel, windows: np.ndarray, seed: int, outliers: bool
) -> Draw:
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
  key = jax.random.fold_in(key, 2)
  return Draw(model, jnp.asarray(tokens), key, window_losses(model, windows))


def measure(
  methods: Mapping[str, Method], draws: list[Draw], windows: np.ndarray, title: str
) -> Measured:
  """Every method on every draw."""
  measured: Measured = {name: [] for name in methods}
  for draw in track(draws, f"QLLM, {title}", console=Console(stderr=True)):
    for name, method in methods.items():
      result = method(draw.model, draw.tokens, draw.key)
      measured[name].append((window_losses(result.model, windows), result))
  return measured


def nats(losses: WindowLosses) -> float:
  """Mean negative log-likelihood per token."""
  return float(losses.nll.mean() / losses.tokens)


def losses_of(measured: Measured) -> dict[str, list[float]]:
  """Nats per token of every draw."""
  return {name: [nats(losses) for losses, _ in results] for name, results in measured.items()}


def excess(measured: Measured, draws: list[Draw]) -> dict[str, tuple[float, float | None]]:
  """Loss above full precision, mean and standard deviation over draws."""
  found = {}
  for name, losses in losses_of(measured).items():
    above = [loss - nats(draw.full) for loss, draw in zip(losses, draws)]
    spread = float(np.std(above, ddof=1)) if len(above) > 1 else None
    found[name] = float(np.mean(above)), spread
  return found


def add_methods(
  config: ConfigDict,
  name: str,
  measured: Measured,
  draws: list[Draw],
  domains: dict[str, int],
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """One setting's table, figure and claims."""
  rows = [["full precision", *perplexities([d.full for d in draws], domains), None, None]]
  above = excess(measured, draws)
  for method, results in measured.items():
    by_domain = perplexities([losses for losses, _ in results], domains)
    rows.append([method, *by_domain, *above[method]])
  columns = [Column(f"ppl {d.rpartition(':')[2]}", ".2f", better="lower") for d in domains]
  report.tables.append(
    Table(
      f"{name}, {kind(config)}",
      ["method", *columns, EXCESS, SPREAD],
      rows,
      note=f"Mean of {len(draws)} seeds: calibration text and, if any, outlier channels.",
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
  loss = losses_of(measured) | {"full precision": [nats(draw.full) for draw in draws]}
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


def perplexities(losses: list[WindowLosses], domains: dict[str, int]) -> list[float]:
  """Of each domain, mean over draws."""
  ends = np.cumsum(list(domains.values()))[:-1]
  parts = [[WindowLosses(n, loss.tokens) for n in np.split(loss.nll, ends)] for loss in losses]
  return np.mean([[part.perplexity for part in of_draw] for of_draw in parts], axis=0).tolist()


def kind(config: ConfigDict) -> str:
  return f"{config.model} with outliers" if config.outliers else config.model


def found_sites(result: Quantized) -> list[tuple[int, str, SiteReassembly]]:
  """(block, path before the site, what was found) of all blocks."""
  blocks = [of_block for log in result.rounds for of_block in log.sites]
  return [(i, path, site) for i, found in enumerate(blocks) for path, site in found.items()]


def add_sites(
  config: ConfigDict, name: str, result: Quantized, workdir: pathlib.Path, report: Report
) -> None:
  """What was found at every site of the first draw."""
  rows, shares = [], {}
  for block, path, site in found_sites(result):
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
    for i, log in enumerate(results[0][1].rounds):
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
  config: ConfigDict, measured: Measured, draw: Draw, windows: np.ndarray, report: Report
) -> None:
  """Time to score the evaluation text, compiled programs, the best of three."""

  def seconds(model: Decoder) -> float:
    times = []
    for _ in range(3):
      start = time.perf_counter()
      window_losses(model, windows)
      times.append(time.perf_counter() - start)
    return min(times)

  models = {"full precision": draw.model} | {m: measured[m][0][1].model for m in ("RTN", "QLLM")}
  found = {label: seconds(model) for label, model in models.items()}
  report.tables.append(
    Table(
      f"Time to score {len(windows)} x {config.eval_length} tokens",
      ["model", Column("seconds", ".3f"), Column("relative to RTN", ".2f")],
      [[label, value, value / found["RTN"]] for label, value in found.items()],
      note="Rounded activations are emulated in floating point; of interest is QLLM beside RTN.",
    )
  )


def compare_natural(
  config: ConfigDict, base: BaseModel, windows: np.ndarray, report: Report
) -> None:
  """The model as it is: is reassembly left out where there are no outliers?"""
  name = config.settings[0]
  draws = [make_draw(config, base, windows, seed, False) for seed in config.seeds]
  methods = main_methods(config, settings_of(config, name))
  chosen = ("RTN", "QLLM, no tuning")
  measured = measure({m: methods[m] for m in chosen}, draws, windows, "natural")
  shares = []
  for _, result in measured["QLLM, no tuning"]:
    shares.append(float(np.mean([int(site.extra) == 0 for _, _, site in found_sites(result)])))
  report.tables.append(
    Table(
      f"{name}, {config.model} without outliers",
      ["method", EXCESS, SPREAD],
      [[method, *values] for method, values in excess(measured, draws).items()],
      note=f"Mean of {len(draws)} seeds. Sites left unchanged: {np.mean(shares):.0%}.",
    )
  )
  statement = f"without outliers most sites are left unchanged ({name}, {config.model}, share)"
  report.claims.append(Claim.greater(statement, shares, 0.5))


def compare_reassemblies(
  config: ConfigDict, draws: list[Draw], windows: np.ndarray, main: Measured, report: Report
) -> None:
  """Other reassemblies and thresholds, without tuning."""
  name = config.settings[0]
  methods = reassembly_ablations(config, settings_of(config, name))
  measured = {"QLLM, no tuning": main["QLLM, no tuning"], "RTN": main["RTN"]}
  measured |= measure(methods, draws, windows, "reassembly")
  rows = []
  for method, values in excess(measured, draws).items():
    sites = found_sites(measured[method][0][1])
    extra = sum(int(site.extra) for _, _, site in sites) if sites else None
    error = float(np.mean([float(site.error) for _, _, site in sites])) if sites else None
    rows.append([method, *values, extra, error])
  report.tables.append(
    Table(
      f"Reassembly without tuning, {name}, {kind(config)}",
      ["method", EXCESS, SPREAD, "extra channels", Column("mean reassembly error", ".2e")],
      rows,
      note=f"Loss: mean of {len(draws)} seeds; channels and error: first seed, all sites.",
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
  config: ConfigDict, draws: list[Draw], windows: np.ndarray, main: Measured, report: Report
) -> None:
  """Other ways of tuning."""
  name, draws = config.settings[0], draws[: config.tuning_ablation_seeds]
  methods = tuning_ablations(config, settings_of(config, name))
  measured = {m: main[m][: len(draws)] for m in ("QLLM", "QLLM, no tuning")}
  measured |= measure(methods, draws, windows, "tuning")
  rows = []
  for method, values in excess(measured, draws).items():
    last = measured[method][0][1].rounds[-1]
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
      note=f"{len(draws)} seed(s). Mean squared error of the last round's output: "
      f"QLLM has rank {config.rank} and {config.blocks_per_round} blocks per round.",
    )
  )


def add_tasks(
  config: ConfigDict,
  name: str,
  measured: Measured,
  draw: Draw,
  base: BaseModel,
  report: Report,
) -> None:
  """Zero-shot accuracies by EleutherAI's harness, first draw."""
  rows = []
  models = {"full precision": draw.model} | {m: r[0][1].model for m, r in measured.items()}
  for label, model in models.items():
    accuracies = zero_shot_accuracies(model, base.tokenizer, config.tasks, limit=config.task_limit)
    rows.append([label, *accuracies, float(np.mean(accuracies))])
  columns = [Column(task, ".4f", better="higher") for task in (*config.tasks, "mean")]
  report.tables.append(Table(f"Zero-shot accuracy, {name}", ["method", *columns], rows))
