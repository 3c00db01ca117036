"""Language models: tables of the methods, of their parts, and of what happens to the ranges."""

import collections
import functools
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.checkpoints.huggingface import load_decoder, save_model
from common.evaluation.harness import require_harness, zero_shot_accuracies
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.quantization.calibration import block_inputs, run_block
from common.quantization.shift_and_scale import channel_range
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.outlier_suppression_plus.draws import (
  Draw,
  held_out_windows,
  make_draws,
  score_method,
  shift_of,
  unchanged,
)
from projects.outlier_suppression_plus.methods import ablations, main_methods, settings_of
from projects.outlier_suppression_plus.outlier_suppression_plus import (
  check_model,
  fold_model,
  quantize,
)
from projects.outlier_suppression_plus.sites import sites

Array = jax.Array

PERPLEXITY = Column("perplexity", ".2f", better="lower")
EXCESS = Column("nats per token above full precision", ".4f", better="lower")

# The shortest bar of a plot with a logarithmic axis.
SMALLEST_BAR = 1e-4


def compare_on_decoders(
  config: ConfigDict, measurements: Measurements, workdir: pathlib.Path, report: Report
) -> None:
  """Fills the report with every part that the config asks for."""
  require_harness(config.tasks)
  base = base_model(config.model)
  for name in (*config.settings, *config.other_settings, *config.ablation_settings):
    check_model(base.model, settings_of(config, name))
  windows = held_out_windows(config, base)
  shift = shift_of(config, base)
  score = functools.partial(score_method, windows, measurements)
  draws = make_draws(config, base, shift, "decoder", score)
  parts = []
  for name in config.settings:
    parts.append(functools.partial(compare_methods, config, name, draws, score, workdir, report))
    if config.tasks:
      part = functools.partial(compare_tasks, config, base, name, draws[0], measurements, report)
      parts.append(part)
  if config.outliers and shift:
    parts.append(functools.partial(without_asymmetry, config, base, score, report))
  for name in config.ablation_settings:
    parts.append(functools.partial(compare_ablations, config, name, draws, score, report))
  for name in config.other_models:
    parts.append(functools.partial(compare_families, config, name, measurements, report))
  if config.sample_sizes:
    parts.append(functools.partial(sample_efficiency, config, base, score, workdir, report))
  parts.append(functools.partial(folded_model, config, draws[0], windows, workdir, report))
  for part in track(parts, "Outlier Suppression+", console=Console(stderr=True)):
    part()


def calibration_loss(model: Decoder, quantized: Decoder, tokens: Array) -> float:
  """Language-model loss of the quantized model on its calibration text, in nats per sample."""
  del model
  return float(window_losses(quantized, np.asarray(tokens)).nll.mean())


def measure(what: str, methods, draws: list[Draw], score) -> dict[str, list[WindowLosses]]:
  """Losses of every method on every draw.

  Args:
    what: begins the names of the measurements.
    methods: {name: method}, see `main_methods`.
    draws: of one model.
    score: see `draws.score_method`.
  """
  measured = collections.defaultdict(list)
  for draw in draws:
    model = functools.cache(draw.model)
    for name, method in methods.items():
      losses = score(f"{what}, {name}, seed {draw.seed}", method, model, draw.tokens)
      measured[name].append(losses)
  return measured


def loss_rows(measured: dict[str, list[WindowLosses]], draws: list[Draw]) -> list[list]:
  """[method, mean perplexity, mean and spread over draws of the loss above full precision]."""
  rows = []
  for name, losses in measured.items():
    excess = [loss.nats_per_token - draw.full.nats_per_token for loss, draw in zip(losses, draws)]
    spread = float(np.std(excess, ddof=1)) if len(draws) > 1 else None
    perplexity = float(np.mean([loss.perplexity for loss in losses]))
    rows.append([name, perplexity, float(np.mean(excess)), spread])
  return rows


def compare_methods(
  config: ConfigDict,
  name: str,
  draws: list[Draw],
  score,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """One setting's table, figure and claims."""
  settings = settings_of(config, name)
  methods = main_methods(config, settings, {}, calibration_loss)
  measured = measure(f"decoder, {name}", methods, draws, score)
  measured = {"full precision": [draw.full for draw in draws]} | measured
  rows = loss_rows(measured, draws)
  report.tables.append(
    Table(
      f"{name}, {kind(config)}",
      ["method", PERPLEXITY, EXCESS, Column("sd over seeds", ".4f")],
      rows,
      note=f"Mean of {len(draws)} seeds: calibration text and, if any, outlier channels.",
    )
  )
  file = f"methods_{name.replace(' ', '_')}.png"
  plot_losses(workdir / file, rows[1:], f"{name}, {config.model}")
  report.figures.append(
    Figure(
      f"Loss of quantization, {name}",
      file,
      f"Mean over seeds; bars end at {SMALLEST_BAR:g} where the loss is lower or below full precision.",
    )
  )
  if config.outliers:
    report.claims.extend(
      method_claims(name, {m: [v.nats_per_token for v in vs] for m, vs in measured.items()})
    )


def plot_losses(path: pathlib.Path, rows: list[list], title: str) -> None:
  """Bars of the losses of `loss_rows`, which differ by orders of magnitude."""
  plots.bar_plot(
    path,
    [row[0].replace("SmoothQuant, best alpha", "SmoothQuant, best") for row in rows],
    {"loss": [max(row[2], SMALLEST_BAR) for row in rows]},
    ylabel="nats per token above\nfull precision",
    title=title,
    log=True,
  )


def kind(config: ConfigDict) -> str:
  return f"{config.model} with outliers" if config.outliers else config.model


def method_claims(name: str, loss: dict[str, list[float]]) -> list[Claim]:
  """The paper's order, on losses in nats per token of each seed."""
  unit = f"({name}, outlier model, nats per token)"
  less = lambda a, b: Claim.less(f"{a} has lower loss than {b} {unit}", {a: loss[a], b: loss[b]})
  nothing = "MinMax" if "MinMax" in loss else "ZeroQuant"
  claims = [
    less("OS+", "OS+, scale only"),
    less("OS+, scale only", "OS+, shift only"),
    less("OS+, shift only", nothing),
    less("OS+", "SmoothQuant"),
    less("OS+", "SmoothQuant, best alpha"),
  ]
  if "Outlier Suppression" in loss:
    claims.append(less("OS+", "Outlier Suppression"))
    limit = 0.01 if name == "W8A8" else 0.05
    over = [a - b for a, b in zip(loss["OS+"], loss["full precision"])]
    claims.append(Claim.less(f"OS+ is near full precision {unit}", over, limit))
  return claims


def without_asymmetry(config: ConfigDict, base: BaseModel, score, report: Report) -> None:
  """The natural model, and outliers that lie on both sides of zero: what is left to the shift?"""
  natural = config.copy_and_resolve_references()
  natural.outliers = False
  variants = {
    variant: make_draws(changed, base, 0.0, variant, score)
    for variant, changed in {"natural model": natural, "symmetric outliers": config}.items()
  }
  chosen = ("MinMax", "ZeroQuant", "OS+, scale only", "OS+")
  rows = []
  for name in config.settings[:2]:
    methods = main_methods(config, settings_of(config, name), {}, calibration_loss)
    methods = {method: methods[method] for method in chosen if method in methods}
    for variant, draws in variants.items():
      measured = measure(f"{variant}, {name}", methods, draws, score)
      rows += [[variant, name, *row] for row in loss_rows(measured, draws)]
      loss = {method: [v.nats_per_token for v in values] for method, values in measured.items()}
      unit = f"({name}, {variant}, absolute difference in nats per token)"
      if variant == "natural model" and name == "W8A8":
        distance = [abs(a - b) for a, b in zip(loss["OS+"], loss["MinMax"])]
        report.claims.append(Claim.less(f"OS+ and MinMax are as good {unit}", distance, 0.01))
      if variant == "symmetric outliers":
        distance = [abs(a - b) for a, b in zip(loss["OS+"], loss["OS+, scale only"])]
        report.claims.append(Claim.less(f"the shift brings next to nothing {unit}", distance, 0.01))
  report.tables.append(
    Table(
      f"Without asymmetric outliers, {config.model}",
      ["variant", "setting", "method", PERPLEXITY, EXCESS, Column("sd over seeds", ".4f")],
      rows,
      note=f"Mean of {len(config.seeds)} seeds.",
    )
  )


def compare_ablations(
  config: ConfigDict, name: str, draws: list[Draw], score, report: Report
) -> None:
  """One thing changed at a time."""
  methods = {
    label: lambda model, tokens, changed=changed: quantize(model, tokens, changed)[0]
    for label, changed in ablations(settings_of(config, name)).items()
  }
  measured = measure(f"ablations, {name}", methods, draws, score)
  report.tables.append(
    Table(
      f"Ablations, {name}, {kind(config)}",
      ["changed", PERPLEXITY, EXCESS, Column("sd over seeds", ".4f")],
      loss_rows(measured, draws),
      note=f"Mean of {len(draws)} seeds.",
    )
  )
  loss = {label: [v.nats_per_token for v in values] for label, values in measured.items()}
  for other in ("loss of the next products", "loss of the tensor"):
    report.claims.append(
      Claim.less(
        f"the loss of the next modules' output is no worse than the {other} "
        f"({name}, {kind(config)}, nats per token)",
        {"OS+": loss["OS+"], other: loss[other]},
        0.001,
      )
    )


def compare_families(
  config: ConfigDict, name: str, measurements: Measurements, report: Report
) -> None:
  """The same on another family of decoders."""
  base = base_model(name)
  windows = held_out_windows(config, base)
  shift = shift_of(config, base)
  score = functools.partial(score_method, windows, measurements)
  draws = make_draws(config, base, shift, f"other model {name}", score)
  chosen = ("MinMax", "ZeroQuant", "SmoothQuant", "OS+")
  rows = []
  for setting in config.other_settings:
    methods = main_methods(config, settings_of(config, setting), {}, calibration_loss)
    methods = {m: methods[m] for m in chosen if m in methods}
    what = f"other model {name}, {setting}"
    measured = measure(what, methods, draws, score)
    rows += [[setting, *row] for row in loss_rows(measured, draws)]
    nothing = "MinMax" if "MinMax" in measured else "ZeroQuant"
    for other in (nothing, "SmoothQuant"):
      loss = {method: [v.nats_per_token for v in measured[method]] for method in ("OS+", other)}
      statement = f"OS+ has lower loss than {other} ({setting}, {name}, nats per token)"
      report.claims.append(Claim.less(statement, loss))
  report.tables.append(
    Table(
      f"{name} with {'asymmetric' if shift else 'symmetric'} outliers",
      ["setting", "method", PERPLEXITY, EXCESS, Column("sd over seeds", ".4f")],
      rows,
      note=f"Mean of {len(draws)} seeds.",
    )
  )


def sample_efficiency(
  config: ConfigDict,
  base: BaseModel,
  score,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """Loss against the number of calibration sequences: both halves depend on extremes."""
  name = config.settings[min(1, len(config.settings) - 1)]
  settings = settings_of(config, name)
  shift = shift_of(config, base)
  curves = collections.defaultdict(list)
  for size in config.sample_sizes:
    changed = config.copy_and_resolve_references()
    changed.calibration_samples = size
    what = f"{size} sequences"
    draws = make_draws(changed, base, shift, what, score)
    methods = main_methods(config, settings, {}, calibration_loss)
    methods = {m: methods[m] for m in ("SmoothQuant", "OS+, scale only", "OS+")}
    measured = measure(what, methods, draws, score)
    for row in loss_rows(measured, draws):
      curves[row[0]].append((row[2], row[3] or 0.0))
  sizes = list(config.sample_sizes)
  plots.line_plot(
    workdir / "sample_efficiency.png",
    {m: (sizes, *np.transpose(values)) for m, values in curves.items()},
    xlabel=f"calibration sequences of {config.calibration_length} tokens",
    ylabel="nats per token above\nfull precision",
    title=f"{name}, {config.model}",
  )
  report.figures.append(
    Figure("Sample efficiency", "sample_efficiency.png", "Mean and standard deviation over seeds.")
  )
  report.tables.append(
    Table(
      f"Calibration set size, {name}, {kind(config)}",
      ["sequences", *[Column(method, ".4f", better="lower") for method in curves]],
      [[size, *[values[i][0] for values in curves.values()]] for i, size in enumerate(sizes)],
      note="Nats per token above full precision, mean over seeds.",
    )
  )


def folded_model(
  config: ConfigDict,
  draw: Draw,
  windows: np.ndarray,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """What a user takes home: the folded checkpoint; and what the shift and scale do to ranges."""
  name = config.settings[min(1, len(config.settings) - 1)]
  model = draw.model()
  _, found = quantize(model, draw.tokens, settings_of(config, name))
  folded = fold_model(model, found)
  # A norm of a post-norm block is also read by the residual branch, which a checkpoint of the plain
  # architecture has no place to undo it in.
  if folded.config.norm_placement == "pre":
    save_model(folded, workdir / "folded", overwrite=True)
    loaded = window_losses(load_decoder(workdir / "folded"), windows)
    report.tables.append(
      Table(
        f"The folded full-precision checkpoint, {name}, {kind(config)}",
        ["model", Column("perplexity", ".4f")],
        [["original", draw.full.perplexity], ["folded, saved and loaded", loaded.perplexity]],
      )
    )
  index = len(folded.blocks) // 2
  shapes, channels = site_ranges(model, draw.tokens, found, index)
  report.tables.append(
    Table(
      f"Ranges of activations (max - min), block {index}, {kind(config)}",
      [
        "input of",
        Column("tensor", ".1f"),
        Column("shifted", ".1f"),
        Column("largest channel", ".1f"),
        Column("shifted and scaled", ".1f"),
        Column("threshold", ".2f"),
        Column("scaled channels", "d"),
      ],
      shapes,
      note="Of the calibration text in full precision; found for " + name + ".",
    )
  )
  plots.line_plot(
    workdir / "channels.png",
    channels,
    xlabel="channels, by their largest value",
    ylabel="smallest and largest value",
    title=f"input of the MLP, block {index}, {config.model}",
  )
  report.figures.append(
    Figure("Range of each channel", "channels.png", "Before and after the shift and the scale.")
  )


def site_ranges(model: Decoder, tokens: Array, found, index: int) -> tuple[list[list], dict]:
  """Rows of the table of ranges, and the curves of the figure, of one block."""
  x, context = model.stem(tokens)
  for block in model.blocks[:index]:
    x = run_block(block, x, context)
  inputs = block_inputs(model.blocks[index], x, context)
  rows, curves = [], {}
  width = lambda low, high: float(high.max() - low.min())
  for site in sites(model.config):
    if site.previous not in found[index]:
      continue
    shift, scale, search = found[index][site.previous]
    before, shifted, after = _ranges_on_the_way(inputs[site.linears[0]], shift, scale)
    largest_channel = float((before[1] - before[0]).max())
    rows.append(
      [" + ".join(path.rpartition(".")[2] for path in site.linears)]
      + [width(*before), width(*shifted), largest_channel, width(*after)]
      + [float(search.threshold), int((scale > 1).sum())]
    )
    if site.previous == "mlp_norm":
      order = np.argsort(before[1])
      for label, (low, high) in {"before": before, "after": after}.items():
        ranked = range(len(order))
        curves[f"{label}, largest"] = (ranked, np.asarray(high)[order])
        curves[f"{label}, smallest"] = (ranked, np.asarray(low)[order])
  return rows, curves


@jax.jit
def _ranges_on_the_way(x: Array, shift: Array, scale: Array):
  """Channel ranges of x, of the shifted x, and of the shifted and scaled one."""
  return channel_range(x), channel_range(x - shift), channel_range((x - shift) / scale)


def compare_tasks(
  config: ConfigDict,
  base: BaseModel,
  name: str,
  draw: Draw,
  measurements: Measurements,
  report: Report,
) -> None:
  """Zero-shot accuracies by EleutherAI's harness."""
  methods = main_methods(config, settings_of(config, name), {}, calibration_loss)
  original = functools.cache(draw.model)

  def measure(method) -> list[float]:
    model = method(original(), draw.tokens)
    return zero_shot_accuracies(model, base.tokenizer, config.tasks, limit=config.task_limit)

  rows = []
  for label, method in {"full precision": unchanged, **methods}.items():
    of_method = functools.partial(measure, method)
    accuracies = measurements.get(f"tasks, {name}, {label}", of_method)
    rows.append([label, *accuracies, float(np.mean(accuracies))])
  columns = [Column(task, ".4f", better="higher") for task in (*config.tasks, "mean")]
  report.tables.append(Table(f"Zero-shot accuracy, {name}", ["method", *columns], rows))
