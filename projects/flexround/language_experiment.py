"""Part (b): a decoder's perplexity, its zero-shot choices, and where the integers moved."""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import calibration_samples, evaluation_windows
from common.errors import UserError
from common.evaluation.harness import require_harness, zero_shot_accuracies
from common.evaluation.multiple_choice import choice_accuracy, continuation_questions
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.quantization.activations import ActivationFormat
from common.quantization.calibration import quantize_model
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.flexround.flexround import GridShift
from projects.flexround.methods import (
  Protocol,
  QuantizedUnit,
  choose_learning_rate,
  initial_grids,
  quantize_unit,
)

METHODS = ("RTN", "AdaRound", "AdaQuant", "FlexRound")
# Equally many weights in each bin of |W|.
MAGNITUDE_BINS = 8


class Quantized(NamedTuple):
  """A quantized decoder and the results of its blocks."""

  model: Decoder
  blocks: list[QuantizedUnit]


class LanguageResult(NamedTuple):
  """What is measured of a quantized decoder.

  Attributes:
    losses: on held-out windows.
    choice_accuracy: which of four endings belongs to a window; of the last draw only.
    task_accuracies: of the config's benchmarks; of the last draw only.
    shift_shares: see `shift_shares`; None where no integers were moved.
    step_losses: of every reconstruction step of the first blocks, float32 [num_steps] each; empty
      for rounding to nearest and layer by layer.
  """

  losses: WindowLosses
  choice_accuracy: float | None
  task_accuracies: list[float]
  shift_shares: tuple[np.ndarray, np.ndarray] | None
  step_losses: list[np.ndarray]


def integer_format(config: ConfigDict, bits: int) -> IntegerFormat:
  """Asymmetric, one scale per output channel or one per tensor."""
  if config.axis not in ("channel", "tensor"):
    raise UserError(f"axis={config.axis!r} is not supported; supported: channel, tensor")
  return IntegerFormat(bits, axis=0 if config.axis == "channel" else None)


def reconstruction_settings(config: ConfigDict) -> ReconstructionSettings:
  return ReconstructionSettings(config.steps, config.batch_size, sample_memory=config.sample_memory)


def compare_on_language_model(
  config: ConfigDict, workdir: pathlib.Path, measurements: Measurements, report: Report
) -> None:
  """Adds the table, the figures and the claims of the language model to the report."""
  formats = {
    bits: integer_format(config, bits) for bits in (config.model_bits, *config.model_other_bits)
  }
  require_harness(config.tasks)
  base = base_model(config.model)
  windows = held_out_windows(config, base)
  draw = functools.cache(functools.partial(calibration, config, base))
  count = min(config.choice_questions, len(windows))
  questions = continuation_questions(windows[:count], choice_length=8, num_choices=4, seed=0)
  protocols = {
    f"W{bits} per {config.axis}": Protocol(
      format, config.start, reconstruction_settings(config), layer_wise=config.layer_wise
    )
    for bits, format in formats.items()
  }
  w8a8 = "W8A8 per tensor"
  if config.w8a8:
    protocols[w8a8] = w8a8_protocol(config)
  main = next(iter(protocols))
  rates = measurements.get(
    "language model, rates",
    lambda: sweep(config, base.model, draw(config.model_seeds[0]), protocols[main]),
  )
  grids_of = functools.lru_cache(maxsize=1)(
    lambda protocol: [initial_grids(block, protocol) for block in base.model.blocks]
  )

  def score(model: Decoder, blocks: list[QuantizedUnit] = (), *, last: bool = True):
    shifts = [shift for block in blocks for shift in block.shifts.values()]
    return LanguageResult(
      window_losses(model, windows),
      choice_accuracy(model, questions).accuracy if last else None,
      zero_shot_accuracies(model, base.tokenizer, config.tasks, limit=config.task_limit)
      if last
      else [],
      shift_shares(shifts) if shifts else None,
      [np.asarray(block.losses) for block in blocks[:4] if block.losses is not None],
    )

  def result(setting: str, method: str, seed: int, last: bool) -> LanguageResult:
    def measure():
      protocol = protocols[setting]
      grids = grids_of(protocol)
      quantized = quantize(method, base.model, draw(seed), seed, protocol, rates, grids)
      return score(*quantized, last=last)

    return measurements.get(f"language model, {setting}, {method}, seed {seed}", measure)

  full = measurements.get("language model, full precision", lambda: score(base.model))
  rows = [["full precision", None, full.losses.perplexity, None, None, full.choice_accuracy]]
  on_tasks = [["full precision", None, *full.task_accuracies]]
  results: dict[tuple[str, str], list[LanguageResult]] = {}
  for setting in protocols:
    seeds = config.model_seeds[: None if setting == main else 1]
    for method in METHODS if setting != w8a8 else ("RTN", "FlexRound"):
      found = [result(setting, method, seed, seed == seeds[-1]) for seed in seeds]
      results[setting, method] = found
      perplexities = [r.losses.perplexity for r in found]
      spread = float(np.std(perplexities, ddof=1)) if len(seeds) > 1 else None
      excess = np.mean([r.losses.nats_per_token - full.losses.nats_per_token for r in found])
      last = found[-1]
      row = [method, setting, np.mean(perplexities), spread, excess, last.choice_accuracy]
      rows.append(row)
      on_tasks.append([method, setting, *last.task_accuracies])
  chosen = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
  report.tables.append(
    Table(
      f"Perplexity of {config.model}",
      [
        "method",
        "format",
        Column("perplexity", ".2f"),
        Column("sd over draws", ".2f"),
        Column("nats per token above full precision", ".4f"),
        Column("choice accuracy", ".3f"),
      ],
      rows,
      note=(
        f"{len(config.model_seeds)} calibration draws at {config.model_bits} bits, one elsewhere. "
        f"Choices: {len(questions)} questions, which of four endings (chance 0.25), last draw. Rates chosen "
        f"on the first block's calibration error: {chosen}."
      ),
    )
  )
  if config.tasks:
    columns = [Column(task, ".4f", better="higher") for task in config.tasks]
    title = f"Zero-shot accuracy of {config.model}, last draw"
    report.tables.append(Table(title, ["method", "format", *columns], on_tasks))
  report.claims.extend(claims(config, main, results))
  learned = results[main, "FlexRound"]
  if all(r.shift_shares for r in learned):
    add_grid_shift(config, learned, workdir, report)
  if learned[0].step_losses:
    add_block_losses(learned[0], workdir, report)


def held_out_windows(config: ConfigDict, base: BaseModel) -> np.ndarray:
  """Windows of every domain's test split together, int32 [windows, seq]."""
  windows = evaluation_windows(
    config.domains, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
  )
  return np.concatenate(list(windows.values()))


def calibration(config: ConfigDict, base: BaseModel, seed: int) -> jax.Array:
  """int32 [samples, seq], of all domains together."""
  samples = calibration_samples(
    ",".join(config.domains),
    base.tokenizer,
    num_samples=config.calibration_samples,
    seq_len=config.calibration_length,
    seed=seed,
  )
  return jnp.asarray(samples)


def sweep(config: ConfigDict, model: Decoder, tokens, protocol: Protocol) -> dict[str, float]:
  """The rate of every learning method, chosen on the first block."""
  rates = {}

  def at_first_block(index, block, x, context):
    for method, candidates in config.learning_rates.items():
      key = jax.random.key(0)
      rates[method] = choose_learning_rate(method, candidates, block, x, context, key, protocol)
    return block

  first = nnx.clone(model)
  first.blocks = nnx.List([model.blocks[0]])
  quantize_model(first, tokens, at_first_block, stream="both")
  return rates


def quantize(method, model: Decoder, tokens, seed, protocol: Protocol, rates, grids) -> Quantized:
  """A copy of the decoder quantized block by block by one of the methods."""
  results, rate = [], rates.get(method)

  def block(index, block, x, context):
    key = jax.random.fold_in(jax.random.key(seed), index)
    result = quantize_unit(method, block, x, context, key, protocol, rate, grids=grids[index])
    results.append(result)
    return result.unit

  return Quantized(quantize_model(model, tokens, block, stream="both"), results)


def w8a8_protocol(config: ConfigDict) -> Protocol:
  """W8A8 per tensor, static activations: the paper's LLaMA setting."""
  return Protocol(
    IntegerFormat(8, axis=None),
    "min_max",
    reconstruction_settings(config),
    ActivationFormat(8, "per_tensor"),
    config.layer_wise,
  )


def claims(config: ConfigDict, setting: str, results) -> list[Claim]:
  """RTN > AdaRound >= FlexRound in loss."""
  of = lambda method: [result.losses.nats_per_token for result in results[setting, method]]
  where = f"{config.model}, {setting}, nats per token"
  pairs = (("AdaRound", "RTN"), ("FlexRound", "AdaRound"), ("FlexRound", "AdaQuant"))
  return [
    Claim.less(f"{a} has lower loss than {b} ({where})", {a: of(a), b: of(b)}) for a, b in pairs
  ]


def shift_shares(shifts: list[GridShift]) -> tuple[np.ndarray, np.ndarray]:
  """How often integers move by at least 1, 2 and 3, by bins of |W| / s1 with equally many weights.

  Returns:
    (median |W| / s1 of each bin [bins], shares [3, bins]).
  """
  moved = np.concatenate([np.abs(np.asarray(s.shift)).ravel() for s in shifts])
  magnitude = np.concatenate([np.asarray(s.magnitude).ravel() for s in shifts])
  order = np.array_split(np.argsort(magnitude), MAGNITUDE_BINS)
  shares = [[float(np.mean(moved[rows] >= least)) for rows in order] for least in (1, 2, 3)]
  return np.array([np.median(magnitude[rows]) for rows in order]), np.array(shares)


def add_grid_shift(config, results: list[LanguageResult], workdir, report: Report) -> None:
  """The paper's figure: learned minus nearest integer, against |W|."""
  found = [result.shift_shares for result in results]
  magnitude = np.mean([m for m, _ in found], axis=0)
  shares = np.array([s for _, s in found])
  plots.line_plot(
    workdir / "grid_shift.png",
    {f"|shift| >= {i + 1}": (magnitude, shares[:, i].mean(axis=0)) for i in range(3)},
    xlabel="|W| / s1, median of the bin",
    ylabel="share of weights",
    title=f"Integers moved from the nearest, W{config.model_bits}",
  )
  report.figures.append(
    Figure("Grid shift", "grid_shift.png", "FlexRound, all linears; bins of equally many weights.")
  )
  rows = [[m, *shares.mean(axis=0)[:, i].tolist()] for i, m in enumerate(magnitude.tolist())]
  report.tables.append(
    Table(
      f"Grid shift of FlexRound, {config.model}, W{config.model_bits}",
      [Column("|W| / s1", ".2f"), *[Column(f"|shift| >= {i}", ".5f") for i in (1, 2, 3)]],
      rows,
    )
  )
  report.claims.append(
    Claim.greater(
      f"some integers move by two or more (share, W{config.model_bits})",
      shares[:, 1].mean(axis=1).tolist(),
    )
  )
  half = MAGNITUDE_BINS // 2
  report.claims.append(
    Claim.greater(
      f"moves of two or more are more frequent for large |W| (share, W{config.model_bits})",
      {
        "larger half": shares[:, 1, half:].mean(axis=1).tolist(),
        "smaller half": shares[:, 1, :half].mean(axis=1).tolist(),
      },
    )
  )


def add_block_losses(result: LanguageResult, workdir, report: Report) -> None:
  """The loss of every reconstruction step, averaged over windows of steps."""
  series = {}
  for i, losses in enumerate(result.step_losses):
    window = max(1, len(losses) // 20)
    losses = losses[: len(losses) // window * window].reshape(-1, window).mean(axis=1)
    series[f"block {i}"] = (np.arange(len(losses)) * window, losses)
  plots.line_plot(
    workdir / "block_losses.png",
    series,
    xlabel="step",
    ylabel="squared error per token",
    title="Reconstruction by FlexRound",
    log="y",
  )
  report.figures.append(
    Figure("Reconstruction losses", "block_losses.png", "FlexRound, first draw, first blocks.")
  )
