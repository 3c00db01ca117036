"""FlatQuant against its baselines on one model: the paper's tables and claims at the config's size."""

import collections
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.data.pipelines import calibration_samples, evaluation_windows
from common.evaluation.harness import require_harness, zero_shot_accuracies
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.models.outliers import inject_outliers
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Report, Table
from projects.flatquant import methods, saved, views
from projects.flatquant.flat_block import SITES, FlatQuantSettings
from projects.flatquant.flatness import error_landscape
from projects.flatquant.flatquant import check_block, reparametrize
from projects.flatquant.methods import PARTS, settings_of
from projects.flatquant.rotation import fold_gains

Array = jax.Array

PERPLEXITY = Column("perplexity", ".2f", better="lower")
EXCESS = Column("nats per token above full precision", ".4f", better="lower")


class Draw(NamedTuple):
  """One seed: a full-precision model, and calibration text."""

  seed: int
  model: Decoder
  tokens: Array


class Result(NamedTuple):
  """How well a quantized model of one draw does on held-out text.

  Of the first seed of a methods' table also the blocks' errors, float32 [layers, seq], and, if the
  config has tasks, their accuracies.
  """

  losses: WindowLosses
  block_error: float
  landscape: np.ndarray | None = None
  accuracies: list[float] | None = None


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  require_harness(config.tasks)
  base = base_model(config.model)
  names = (*config.natural_settings, *config.outlier_settings, *config.other_settings)
  for name in names:
    check_block(base.model.blocks[0], settings_of(config, name))
  windows = np.concatenate(
    list(
      evaluation_windows(
        config.domains, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
      ).values()
    )
  )
  report = Report(tables=[], figures=[], claims=[])
  measurements = Measurements(workdir, config, (WindowLosses, Result))
  common = (config, base, windows, measurements, report)
  parts = []
  for outliers, settings in ((False, config.natural_settings), (True, config.outlier_settings)):
    parts += [
      functools.partial(compare_methods, outliers, name, workdir, *common) for name in settings
    ]
  if config.locations:
    parts.append(functools.partial(compare_locations, *common))
  if config.left_sizes:
    parts.append(functools.partial(compare_sizes, *common))
  if config.other_settings:
    parts.append(functools.partial(compare_settings, *common))
  for part in track(parts, "FlatQuant", console=Console(stderr=True)):
    part()
  report.tables.append(views.online_cost(base.model.config))
  return report


def make_draw(config, base: BaseModel, seed: int, outliers: bool) -> Draw:
  """Calibration text and, if asked for, outlier channels of a seed."""
  tokens = calibration_samples(
    ",".join(config.domains),
    base.tokenizer,
    num_samples=config.calibration_samples,
    seq_len=config.calibration_length,
    seed=seed,
  )
  model = base.model
  if outliers:
    model = inject_outliers(
      model,
      jax.random.key(seed),
      fraction=config.outlier_fraction,
      gain=config.outlier_gain,
    )
  return Draw(seed, model, jnp.asarray(tokens))


def evaluate(model: Decoder, reference: Decoder, windows: np.ndarray) -> Result:
  """Losses of the whole model, and the mean error of its blocks on full-precision inputs.

  Args:
    model: quantized.
    reference: the same model in full precision, with its residual stream in the same basis.
    windows: held-out text, int32 [windows, seq].
  """
  sample = jnp.asarray(windows[:16])
  error = error_landscape(reference, model, sample, propagate=False).mean()
  return Result(window_losses(model, windows), float(error))


def compare_methods(
  outliers: bool,
  name: str,
  workdir: pathlib.Path,
  config,
  base,
  windows,
  measurements: Measurements,
  report: Report,
) -> None:
  """The main table of one setting, with the ablation where the config asks for it."""
  variant = "outlier" if outliers else "natural"
  where, file = f"{name}, {variant} model", f"{name}_{variant}"
  settings = settings_of(config, name)
  ablation = config.ablation and outliers and name == config.outlier_settings[0]
  parts = list(PARTS) if ablation else ["FlatQuant", "learned rotation"]
  finishers = {"": "rtn", " + GPTQ": "gptq"} if config.gptq else {"": "rtn"}
  full, results, flatness = [], collections.defaultdict(list), {}

  def score(model: Decoder, reference: Decoder, first: bool) -> Result:
    result = evaluate(model, reference, windows)
    if not first:
      return result
    landscape = error_landscape(reference, model, windows[:16], propagate=True)
    accuracies = None
    if config.tasks:
      limit = config.task_limit
      accuracies = zero_shot_accuracies(model, base.tokenizer, config.tasks, limit=limit)
    return result._replace(landscape=landscape, accuracies=accuracies)

  def measure_rounding(quantize: Callable[..., Decoder], draw: Draw, first: bool) -> Result:
    return score(quantize(draw.model, draw.tokens, settings), draw.model, first)

  def measure_quarot(finisher: str, draw: Draw, first: bool) -> Result:
    rotated = methods.rotate(draw.model, draw.seed)
    ratios = config.quarot_clip_ratios
    return score(methods.quarot(rotated, draw.tokens, settings, ratios, finisher), rotated, first)

  def measure_part(part: str, draw: Draw, first: bool) -> tuple[dict[str, Result], dict]:
    """The results with each finisher; of the first seed's FlatQuant also files and the flatness."""
    changed = settings_of(config, name, **PARTS[part])
    # As SpinQuant, and QuaRot: a gain that makes outliers is not the rotation's to undo.
    start = fold_gains(draw.model) if part == "learned rotation" else draw.model
    learned = methods.learn_model(config, start, draw.tokens, changed, draw.seed)
    found = {}
    for suffix, finisher in finishers.items():
      if part == "FlatQuant" or finisher == "rtn":
        model = methods.finish_model(start, learned, changed, finisher, draw.tokens)
        found[part + suffix] = score(model, start, first)
    if part != "FlatQuant" or not first:
      return found, {}
    saved.save_learned(workdir / f"{file}_learned.safetensors", learned)
    folded = (reparametrize(flat, settings) for flat in learned)
    saved.save_folded(workdir / f"{file}_folded.safetensors", folded)
    return found, views.measure_flatness(settings, draw, learned)

  baselines = {"RTN": functools.partial(measure_rounding, methods.rtn)}
  if config.gptq:
    baselines["GPTQ"] = functools.partial(measure_rounding, methods.gptq)
  smoothquant = functools.partial(methods.smoothquant, alphas=config.smoothquant_alphas)
  baselines["SmoothQuant"] = functools.partial(measure_rounding, smoothquant)
  for suffix, finisher in finishers.items():
    baselines[f"QuaRot{suffix}"] = functools.partial(measure_quarot, finisher)
  for seed in config.seeds:
    draw = make_draw(config, base, seed, outliers)
    first = seed == config.seeds[0]
    measure = functools.partial(window_losses, draw.model, windows)
    full.append(measurements.get(f"{where}, full precision, seed {seed}", measure))
    for method, of_draw in baselines.items():
      measure = functools.partial(of_draw, draw, first)
      results[method].append(measurements.get(f"{where}, {method}, seed {seed}", measure))
    for part in reversed(parts):
      measure = functools.partial(measure_part, part, draw, first)
      found, of_first = measurements.get(f"{where}, {part}, seed {seed}", measure)
      flatness |= of_first
      for method, result in found.items():
        results[method].append(result)
  report.tables.append(method_table(where, full, results))
  report.claims.extend(method_claims(where, full, results, ablation))
  views.plot_methods(file, excess(full, results), workdir, report)
  views.compare_flatness(file, flatness, workdir, report)
  views.plot_landscape(file, {m: f[0].landscape for m, f in results.items()}, workdir, report)
  if config.tasks:
    report.tables.append(task_table(config.tasks, where, results))


def excess(full: list[WindowLosses], results: dict[str, list[Result]]) -> dict[str, list[float]]:
  """Nats per token above full precision, {method: one per draw}."""
  return {
    method: [r.losses.nats_per_token - losses.nats_per_token for r, losses in zip(found, full)]
    for method, found in results.items()
  }


def method_table(title: str, full: list[WindowLosses], results: dict[str, list[Result]]) -> Table:
  mean = lambda values: float(np.mean(values))
  above = excess(full, results)
  rows = [["full precision", mean([f.perplexity for f in full]), None, None, None]]
  for method, found in results.items():
    spread = float(np.std(above[method], ddof=1)) if len(full) > 1 else None
    rows.append(
      [
        method,
        mean([r.losses.perplexity for r in found]),
        mean(above[method]),
        spread,
        mean([r.block_error for r in found]),
      ]
    )
  columns = ["method", PERPLEXITY, EXCESS, Column("sd over seeds", ".4f")]
  columns.append(Column("held-out block error", ".5f", better="lower"))
  note = (
    f"Means over {len(full)} seeds. Weights per output channel, activations per token, keys and "
    "values per token and head. Block error: mean squared error of a block's output on "
    "full-precision inputs, relative to the output's mean square."
  )
  return Table(f"Methods, {title}", columns, rows, note)


def method_claims(
  where: str, full: list[WindowLosses], results: dict[str, list[Result]], ablation: bool
) -> list[Claim]:
  """The paper's order of methods, and its ablation; losses in nats per token."""
  loss = {method: [r.losses.nats_per_token for r in found] for method, found in results.items()}
  loss["full precision"] = [losses.nats_per_token for losses in full]

  def lower(statement, first, second):
    measured = {first: loss[first], second: loss[second]}
    return Claim.less(f"{statement} ({where}, nats per token)", measured)

  claims = [
    lower("FlatQuant has lower loss than a learned rotation", "FlatQuant", "learned rotation"),
    lower("FlatQuant has lower loss than QuaRot", "FlatQuant", "QuaRot"),
    lower("a learned rotation is no worse than random Hadamards", "learned rotation", "QuaRot"),
    lower("QuaRot has lower loss than SmoothQuant", "QuaRot", "SmoothQuant"),
    lower("SmoothQuant has lower loss than RTN", "SmoothQuant", "RTN"),
  ]
  if "FlatQuant + GPTQ" in results:
    claims += [
      lower("FlatQuant has lower loss than QuaRot with GPTQ", "FlatQuant", "QuaRot + GPTQ"),
      lower("GPTQ improves on FlatQuant's rounding to nearest", "FlatQuant + GPTQ", "FlatQuant"),
    ]
  block_errors = {m: [r.block_error for r in results[m]] for m in ("FlatQuant", "learned rotation")}
  claims.append(Claim.less(f"FlatQuant has the lower held-out block error ({where})", block_errors))
  gap = lambda method: np.subtract(loss[method], loss["full precision"])
  claims.append(
    Claim.less(
      f"FlatQuant loses less than a tenth of what RTN loses ({where}, share of RTN's gap)",
      (gap("FlatQuant") / gap("RTN")).tolist(),
      0.1,
    )
  )
  if ablation:
    claims.append(lower("LT improves on RTN", "LT", "RTN"))
    claims.append(lower("PS on top of LT is not worse", "LT + PS", "LT"))
    claims.append(lower("LCT on top of LT and PS is not worse", "FlatQuant", "LT + PS"))
    first, rest = gap("RTN") - gap("LT"), gap("LT") - gap("FlatQuant")
    claims.append(
      Claim.less(
        f"LT gains more than PS and LCT together ({where}, nats per token)",
        {"gain of PS and LCT": rest.tolist(), "gain of LT": first.tolist()},
      )
    )
  return claims


RESULT_COLUMNS = (PERPLEXITY, EXCESS, Column("held-out block error", ".5f", better="lower"))


def learned_result(config, draw: Draw, windows: np.ndarray, name: str, **changes) -> Result:
  """FlatQuant with changed settings."""
  settings = settings_of(config, name, **changes)
  learned = methods.learn_model(config, draw.model, draw.tokens, settings, draw.seed)
  model = methods.finish_model(draw.model, learned, settings, "rtn", draw.tokens)
  return evaluate(model, draw.model, windows)


def one_seed_table(
  title: str,
  labels: list[str],
  units: dict[tuple[str, ...], Callable[[], Result]],
  draw: Draw,
  windows: np.ndarray,
  measurements: Measurements,
) -> Table:
  """A row for each of `units`, {what stands in the columns `labels`: measures the rest}."""
  full = measurements.get(f"{title}, full precision", lambda: window_losses(draw.model, windows))
  rows = []
  for row, measure in units.items():
    result = measurements.get(", ".join((title, *row)), measure)
    above = result.losses.nats_per_token - full.nats_per_token
    rows.append([*row, result.losses.perplexity, above, result.block_error])
  return Table(title, [*labels, *RESULT_COLUMNS], rows, "One seed.")


def compare_locations(config, base, windows, measurements: Measurements, report: Report) -> None:
  """Each transform left out (the paper's ablation of locations)."""
  name = config.outlier_settings[0]
  draw = make_draw(config, base, config.seeds[0], True)
  learn = functools.partial(learned_result, config, draw, windows, name)
  units = {("all",): learn}
  for site in SITES:
    sites = tuple(s for s in SITES if s != site)
    units[f"without {site}",] = functools.partial(learn, sites=sites)
  title = f"Transforms left out, {name}, outlier model"
  report.tables.append(one_seed_table(title, ["transforms"], units, draw, windows, measurements))


def compare_sizes(config, base, windows, measurements: Measurements, report: Report) -> None:
  """The size n1 of the left factors, and the parametrization by raw matrices."""
  name = config.outlier_settings[0]
  draw = make_draw(config, base, config.seeds[0], True)
  learn = functools.partial(learned_result, config, draw, windows, name)
  units = {("closest factors",): learn}
  for size in config.left_sizes:
    units[f"n1 = {size}",] = functools.partial(learn, left_size=size)
  if config.inverse:
    units["closest factors, raw matrices inverted",] = functools.partial(learn, matrices="inverse")
  title = f"Sizes of the Kronecker factors, {name}, outlier model"
  report.tables.append(one_seed_table(title, ["left factor"], units, draw, windows, measurements))


def compare_settings(config, base, windows, measurements: Measurements, report: Report) -> None:
  """Weight-only and cache-only settings."""
  draw = make_draw(config, base, config.seeds[0], True)

  def round_model(quantize: Callable[..., Decoder], settings: FlatQuantSettings) -> Result:
    return evaluate(quantize(draw.model, draw.tokens, settings), draw.model, windows)

  units = {}
  for name in config.other_settings:
    settings = settings_of(config, name)
    units[name, "RTN"] = functools.partial(round_model, methods.rtn, settings)
    if settings.weights is not None:
      units[name, "GPTQ"] = functools.partial(round_model, methods.gptq, settings)
    units[name, "FlatQuant"] = functools.partial(learned_result, config, draw, windows, name)
  title = "Other settings, outlier model"
  report.tables.append(
    one_seed_table(title, ["setting", "method"], units, draw, windows, measurements)
  )


def task_table(tasks: tuple[str, ...], title: str, results: dict[str, list[Result]]) -> Table:
  """Zero-shot accuracies by EleutherAI's harness, with the first seed."""
  rows = []
  for method, found in results.items():
    accuracies = found[0].accuracies
    rows.append([method, *accuracies, float(np.mean(accuracies))])
  columns = [Column(task, ".4f", better="higher") for task in (*tasks, "mean")]
  return Table(f"Zero-shot accuracy, {title}", ["method", *columns], rows)
