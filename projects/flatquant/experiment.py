"""FlatQuant against its baselines on one model: the paper's tables and claims at the config's size."""

import collections
import functools
import pathlib
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
from common.reporting.report import Claim, Column, Report, Table
from projects.flatquant import methods, saved, views
from projects.flatquant.flat_block import SITES
from projects.flatquant.flatness import error_landscape
from projects.flatquant.flatquant import check_block, reparametrize
from projects.flatquant.methods import PARTS, settings_of
from projects.flatquant.rotation import fold_gains

Array = jax.Array

PERPLEXITY = Column("perplexity", ".2f", better="lower")
EXCESS = Column("nats per token above full precision", ".4f", better="lower")


class Draw(NamedTuple):
  """One seed: a full-precision model, calibration text, and its losses on the evaluation windows."""

  seed: int
  model: Decoder
  tokens: Array
  full: WindowLosses


class Result(NamedTuple):
  """A quantized model of one draw, and how well it does on held-out text.

  `reference` is the same model in full precision, with its residual stream in the same basis.
  """

  model: Decoder
  reference: Decoder
  losses: WindowLosses
  block_error: float


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
  common = (config, base, windows, workdir, report)
  parts = []
  for outliers, settings in ((False, config.natural_settings), (True, config.outlier_settings)):
    parts += [functools.partial(compare_methods, outliers, name, *common) for name in settings]
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


def make_draw(config, base: BaseModel, windows: np.ndarray, seed: int, outliers: bool) -> Draw:
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
  return Draw(seed, model, jnp.asarray(tokens), window_losses(model, windows))


def evaluate(model: Decoder, reference: Decoder, windows: np.ndarray) -> Result:
  """Losses of the whole model, and the mean error of its blocks on full-precision inputs."""
  sample = jnp.asarray(windows[:16])
  error = error_landscape(reference, model, sample, propagate=False).mean()
  return Result(model, reference, window_losses(model, windows), float(error))


def compare_methods(
  outliers: bool, name: str, config, base, windows, workdir, report: Report
) -> None:
  """The main table of one setting, with the ablation where the config asks for it."""
  draws = [make_draw(config, base, windows, seed, outliers) for seed in config.seeds]
  settings = settings_of(config, name)
  ablation = config.ablation and outliers and name == config.outlier_settings[0]
  parts = list(PARTS) if ablation else ["FlatQuant", "learned rotation"]
  results = collections.defaultdict(list)
  flat_blocks = {}
  for draw in draws:
    model, tokens = draw.model, draw.tokens
    rotated = methods.rotate(model, draw.seed)

    def keep(method, quantized, reference=model):
      results[method].append(evaluate(quantized, reference, windows))

    keep("RTN", methods.rtn(model, tokens, settings))
    if config.gptq:
      keep("GPTQ", methods.gptq(model, tokens, settings))
    keep("SmoothQuant", methods.smoothquant(model, tokens, settings, config.smoothquant_alphas))
    finishers = {"": "rtn", " + GPTQ": "gptq"} if config.gptq else {"": "rtn"}
    for suffix, finisher in finishers.items():
      ratios = config.quarot_clip_ratios
      keep(f"QuaRot{suffix}", methods.quarot(rotated, tokens, settings, ratios, finisher), rotated)
    for part in reversed(parts):
      changed = settings_of(config, name, **PARTS[part])
      # As SpinQuant, and QuaRot: a gain that makes outliers is not the rotation's to undo.
      start = fold_gains(model) if part == "learned rotation" else model
      learned = methods.learn_model(config, start, tokens, changed, draw.seed)
      keep(part, methods.finish_model(start, learned, changed, "rtn", tokens), start)
      if draw is draws[0]:
        flat_blocks[part] = learned
      if part == "FlatQuant" and config.gptq:
        keep("FlatQuant + GPTQ", methods.finish_model(model, learned, changed, "gptq", tokens))
  variant = "outlier" if outliers else "natural"
  report.tables.append(method_table(f"{name}, {variant} model", draws, results))
  report.claims.extend(method_claims(f"{name}, {variant} model", draws, results, ablation))
  views.plot_methods(f"{name}_{variant}", excess(draws, results), workdir, report)
  views.compare_flatness(f"{name}_{variant}", settings, draws[0], flat_blocks, workdir, report)
  first = {method: found[0] for method, found in results.items()}
  views.plot_landscape(f"{name}_{variant}", first, windows, workdir, report)
  learned = flat_blocks["FlatQuant"]
  saved.save_learned(workdir / f"{name}_{variant}_learned.safetensors", learned)
  folded = [reparametrize(flat, settings) for flat in learned]
  saved.save_folded(workdir / f"{name}_{variant}_folded.safetensors", folded)
  if config.tasks:
    report.tables.append(compare_tasks(config, base, f"{name}, {variant} model", first))


def nats(losses: WindowLosses) -> float:
  return float(losses.nll.mean() / losses.tokens)


def excess(draws: list[Draw], results: dict[str, list[Result]]) -> dict[str, list[float]]:
  """Nats per token above full precision, {method: one per draw}."""
  return {
    method: [nats(r.losses) - nats(draw.full) for r, draw in zip(found, draws)]
    for method, found in results.items()
  }


def method_table(title: str, draws: list[Draw], results: dict[str, list[Result]]) -> Table:
  mean = lambda values: float(np.mean(values))
  above = excess(draws, results)
  rows = [["full precision", mean([d.full.perplexity for d in draws]), None, None, None]]
  for method, found in results.items():
    spread = float(np.std(above[method], ddof=1)) if len(draws) > 1 else None
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
    f"Means over {len(draws)} seeds. Weights per output channel, activations per token, keys and "
    "values per token and head. Block error: mean squared error of a block's output on "
    "full-precision inputs, relative to the output's mean square."
  )
  return Table(f"Methods, {title}", columns, rows, note)


def method_claims(where: str, draws: list[Draw], results, ablation: bool) -> list[Claim]:
  """The paper's order of methods, and its ablation; losses in nats per token."""
  loss = {method: [nats(r.losses) for r in found] for method, found in results.items()}
  loss["full precision"] = [nats(draw.full) for draw in draws]

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


def learned_loss(config, draw: Draw, windows: np.ndarray, name: str, **changes) -> list:
  """[perplexity, nats above full precision, held-out block error] of one learned model."""
  settings = settings_of(config, name, **changes)
  learned = methods.learn_model(config, draw.model, draw.tokens, settings, draw.seed)
  model = methods.finish_model(draw.model, learned, settings, "rtn", draw.tokens)
  return result_cells(draw, evaluate(model, draw.model, windows))


def result_cells(draw: Draw, result: Result) -> list:
  return [result.losses.perplexity, nats(result.losses) - nats(draw.full), result.block_error]


RESULT_COLUMNS = (PERPLEXITY, EXCESS, Column("held-out block error", ".5f", better="lower"))


def compare_locations(config, base, windows, workdir, report: Report) -> None:
  """Each transform left out (the paper's ablation of locations)."""
  del workdir
  name = config.outlier_settings[0]
  draw = make_draw(config, base, windows, config.seeds[0], True)
  rows = [["all", *learned_loss(config, draw, windows, name)]]
  for site in SITES:
    sites = tuple(s for s in SITES if s != site)
    rows.append([f"without {site}", *learned_loss(config, draw, windows, name, sites=sites)])
  title = f"Transforms left out, {name}, outlier model"
  report.tables.append(Table(title, ["transforms", *RESULT_COLUMNS], rows, "One seed."))


def compare_sizes(config, base, windows, workdir, report: Report) -> None:
  """The size n1 of the left factors, and the parametrization by raw matrices."""
  del workdir
  name = config.outlier_settings[0]
  draw = make_draw(config, base, windows, config.seeds[0], True)
  rows = [["closest factors", *learned_loss(config, draw, windows, name)]]
  for size in config.left_sizes:
    rows.append([f"n1 = {size}", *learned_loss(config, draw, windows, name, left_size=size)])
  if config.inverse:
    found = learned_loss(config, draw, windows, name, matrices="inverse")
    rows.append(["closest factors, raw matrices inverted", *found])
  title = f"Sizes of the Kronecker factors, {name}, outlier model"
  report.tables.append(Table(title, ["left factor", *RESULT_COLUMNS], rows, "One seed."))


def compare_settings(config, base, windows, workdir, report: Report) -> None:
  """Weight-only and cache-only settings."""
  del workdir
  draw = make_draw(config, base, windows, config.seeds[0], True)
  rows = []
  for name in config.other_settings:
    settings = settings_of(config, name)
    compared = {"RTN": methods.rtn(draw.model, draw.tokens, settings)}
    if settings.weights is not None:
      compared["GPTQ"] = methods.gptq(draw.model, draw.tokens, settings)
    for method, model in compared.items():
      rows.append([name, method, *result_cells(draw, evaluate(model, draw.model, windows))])
    rows.append([name, "FlatQuant", *learned_loss(config, draw, windows, name)])
  columns = ["setting", "method", *RESULT_COLUMNS]
  report.tables.append(Table("Other settings, outlier model", columns, rows, "One seed."))


def compare_tasks(config, base: BaseModel, title: str, results: dict[str, Result]) -> Table:
  """Zero-shot accuracies by EleutherAI's harness."""
  rows = []
  for method, result in results.items():
    accuracies = zero_shot_accuracies(
      result.model, base.tokenizer, config.tasks, limit=config.task_limit
    )
    rows.append([method, *accuracies, float(np.mean(accuracies))])
  columns = [Column(task, ".4f", better="higher") for task in (*config.tasks, "mean")]
  return Table(f"Zero-shot accuracy, {title}", ["method", *columns], rows)
