"""Part (b): a decoder's perplexity, its zero-shot choices, and where the integers moved."""

import collections
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


def integer_format(config: ConfigDict, bits: int) -> IntegerFormat:
  """Asymmetric, one scale per output channel or one per tensor."""
  if config.axis not in ("channel", "tensor"):
    raise UserError(f"axis={config.axis!r} is not supported; supported: channel, tensor")
  return IntegerFormat(bits, axis=0 if config.axis == "channel" else None)


def reconstruction_settings(config: ConfigDict) -> ReconstructionSettings:
  return ReconstructionSettings(config.steps, config.batch_size, sample_memory=config.sample_memory)


def compare_on_language_model(config: ConfigDict, workdir, report: Report) -> None:
  """Adds the table, the figures and the claims of the language model to the report."""
  formats = {
    bits: integer_format(config, bits) for bits in (config.model_bits, *config.model_other_bits)
  }
  require_harness(config.tasks)
  base = base_model(config.model)
  windows = held_out_windows(config, base)
  draws = {seed: calibration(config, base, seed) for seed in config.model_seeds}
  full = window_losses(base.model, windows)
  count = min(config.choice_questions, len(windows))
  questions = continuation_questions(windows[:count], choice_length=8, num_choices=4, seed=0)
  score = lambda model: choice_accuracy(model, questions).accuracy
  tasks = lambda model: zero_shot_accuracies(
    model, base.tokenizer, config.tasks, limit=config.task_limit
  )
  rows = [["full precision", None, full.perplexity, None, None, score(base.model)]]
  on_tasks = [["full precision", None, *tasks(base.model)]]
  losses: dict[tuple, list[WindowLosses]] = collections.defaultdict(list)
  shifts, rates = [], None
  for bits, format in formats.items():
    main = bits == config.model_bits
    protocol = Protocol(
      format, config.start, reconstruction_settings(config), layer_wise=config.layer_wise
    )
    grids = [initial_grids(block, protocol) for block in base.model.blocks]
    used = list(draws.items())[: None if main else 1]
    if rates is None:
      rates = sweep(config, base.model, used[0][1], protocol)
    for method in METHODS:
      for seed, tokens in used:
        result = quantize(method, base.model, tokens, seed, protocol, rates, grids)
        losses[bits, method].append(window_losses(result.model, windows))
        if method == "FlexRound" and main:
          shifts.append(result)
      perplexities = [loss.perplexity for loss in losses[bits, method]]
      spread = float(np.std(perplexities, ddof=1)) if len(used) > 1 else None
      excess = np.mean([nats(loss) - nats(full) for loss in losses[bits, method]])
      name = f"W{bits} per {config.axis}"
      rows.append([method, name, np.mean(perplexities), spread, excess, score(result.model)])
      on_tasks.append([method, name, *tasks(result.model)])
  if config.w8a8:
    rows += w8a8_rows(config, base.model, draws, full, windows, rates, score)
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
        f"{len(draws)} calibration draws at {config.model_bits} bits, one elsewhere. Choices: "
        f"{len(questions)} questions, which of four endings (chance 0.25), last draw. Rates chosen "
        f"on the first block's calibration error: {chosen}."
      ),
    )
  )
  if config.tasks:
    columns = [Column(task, ".4f", better="higher") for task in config.tasks]
    title = f"Zero-shot accuracy of {config.model}, last draw"
    report.tables.append(Table(title, ["method", "format", *columns], on_tasks))
  report.claims.extend(claims(config, losses))
  if any(block.shifts for result in shifts for block in result.blocks):
    add_grid_shift(config, shifts, workdir, report)
  if not config.layer_wise:
    add_block_losses(shifts[0], workdir, report)


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


def w8a8_rows(config, model, draws, full, windows, rates, score) -> list[list]:
  """W8A8 per tensor, static activations: the paper's LLaMA setting."""
  protocol = Protocol(
    IntegerFormat(8, axis=None),
    "min_max",
    reconstruction_settings(config),
    ActivationFormat(8, "per_tensor"),
    config.layer_wise,
  )
  grids = [initial_grids(block, protocol) for block in model.blocks]
  seed, tokens = next(iter(draws.items()))
  rows = []
  for method in ("RTN", "FlexRound"):
    result = quantize(method, model, tokens, seed, protocol, rates, grids)
    losses = window_losses(result.model, windows)
    excess = nats(losses) - nats(full)
    rows.append([method, "W8A8 per tensor", losses.perplexity, None, excess, score(result.model)])
  return rows


def nats(losses: WindowLosses) -> float:
  """Mean negative log-likelihood per token."""
  return float(losses.nll.mean() / losses.tokens)


def claims(config: ConfigDict, losses) -> list[Claim]:
  """RTN > AdaRound >= FlexRound in loss."""
  bits = config.model_bits
  of = lambda method: [nats(loss) for loss in losses[bits, method]]
  where = f"{config.model}, W{bits} per {config.axis}, nats per token"
  pairs = (("AdaRound", "RTN"), ("FlexRound", "AdaRound"), ("FlexRound", "AdaQuant"))
  return [
    Claim.less(f"{a} has lower loss than {b} ({where})", {a: of(a), b: of(b)}) for a, b in pairs
  ]


def shift_shares(blocks: list[QuantizedUnit]) -> tuple[np.ndarray, np.ndarray]:
  """How often integers move by at least 1, 2 and 3, by bins of |W| / s1 with equally many weights.

  Returns:
    (median |W| / s1 of each bin [bins], shares [3, bins]).
  """
  shifts: list[GridShift] = [shift for block in blocks for shift in block.shifts.values()]
  moved = np.concatenate([np.abs(np.asarray(s.shift)).ravel() for s in shifts])
  magnitude = np.concatenate([np.asarray(s.magnitude).ravel() for s in shifts])
  order = np.array_split(np.argsort(magnitude), MAGNITUDE_BINS)
  shares = [[float(np.mean(moved[rows] >= least)) for rows in order] for least in (1, 2, 3)]
  return np.array([np.median(magnitude[rows]) for rows in order]), np.array(shares)


def add_grid_shift(config, results: list[Quantized], workdir, report: Report) -> None:
  """The paper's figure: learned minus nearest integer, against |W|."""
  found = [shift_shares(result.blocks) for result in results]
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


def add_block_losses(result: Quantized, workdir, report: Report) -> None:
  """The loss of every reconstruction step, averaged over windows of steps."""
  series = {}
  for i, block in enumerate(result.blocks[:4]):
    losses = np.asarray(block.losses)
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
