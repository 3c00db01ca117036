"""AWQ against its baselines on one model: the paper's tables and claims at the config's size."""

import collections
import functools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.decoding.generation import generate
from common.evaluation.multiple_choice import choice_accuracy, continuation_questions
from common.evaluation.perplexity import WindowLosses, paired_difference
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.models.outliers import inject_outliers
from common.quantization.awq import apply_to_model, search_model
from common.quantization.calibration import quantize_model
from common.quantization.linear import bits_per_weight
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.awq import salient, search_result
from projects.awq.calibration_study import calibration_robustness, sample_efficiency
from projects.awq.methods import (
  awq_settings,
  compared_methods,
  integer_format,
  load_evaluation,
  mixed_calibration,
  rtn,
)


class Outcome(NamedTuple):
  """What the main table needs of a quantized model; `bits` are stored per weight."""

  losses: WindowLosses
  bits: float
  seconds: float


class PackedOutcome(NamedTuple):
  """What the last table shows of a model that is taken home; `bits` as above."""

  bits: float
  accuracy: float
  continuation: str


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  base = base_model(config.model)
  evaluation = load_evaluation(config, base)
  draws = {seed: mixed_calibration(config, base, seed) for seed in config.seeds}
  # The copy with outliers is made by each part that needs it: a part has one model at a time.
  variants = {"natural": lambda: base.model}
  if config.outlier_variant:
    variants["outlier"] = lambda: inject_outliers(base.model, jax.random.key(0))

  measurements = Measurements(workdir, config, (Outcome, PackedOutcome, WindowLosses))
  report = Report(tables=[], figures=[], claims=[])
  setting = (config, evaluation, measurements, report)
  parts = []
  for variant, model in variants.items():
    parts.append(functools.partial(compare_methods, variant, model, draws, workdir, *setting))
  for variant, model in variants.items():
    parts.append(functools.partial(salient_channels, variant, model, draws, *setting))
  if config.matrix_draws:
    parts.append(functools.partial(calibration_robustness, base, workdir, *setting))
  if config.sample_sizes:
    parts.append(functools.partial(sample_efficiency, base, variants, workdir, *setting))
  tokens = draws[config.seeds[0]]
  parts.append(functools.partial(final_model, base, tokens, workdir, *setting))
  for part in track(parts, "AWQ", console=Console(stderr=True)):
    part()
  return report


def compare_methods(
  variant: str,
  model: Callable[[], Decoder],
  draws,
  workdir,
  config,
  evaluation,
  measurements: Measurements,
  report: Report,
) -> None:
  """The main table: perplexity per method and width, and claims 1 and 4 of the paper."""
  model = functools.cache(model)

  def measure(quantize: Callable[[Decoder], Decoder]) -> Outcome:
    original = jax.block_until_ready(model())
    start = time.perf_counter()
    quantized = jax.block_until_ready(quantize(original))
    seconds = time.perf_counter() - start
    return Outcome(evaluation.losses(quantized), bits_per_weight(quantized.blocks), seconds)

  full = measurements.get(f"methods, {variant}, full precision", lambda: evaluation.losses(model()))
  rows, nll = [["full precision", None, full.perplexity, None, None, 32.0, None]], {}
  for bits in dict.fromkeys((config.bits, *config.other_bits)):
    main = bits == config.bits
    of_width = integer_format(config, bits)
    round_all = functools.partial(rtn, format=of_width)
    rounded = measurements.get(
      f"methods, {variant}, INT{bits}, RTN", functools.partial(measure, round_all)
    )
    # Rounding to nearest does not look at the calibration set: one draw is all draws.
    used = list(draws.items())[: None if main else 1]
    results = collections.defaultdict(list, {"RTN": [rounded] * len(used)})
    for seed, tokens in used:
      for name, quantize in compared_methods(config, tokens, of_width, main).items():
        outcome = measurements.get(
          f"methods, {variant}, INT{bits}, {name}, seed {seed}",
          functools.partial(measure, quantize),
        )
        results[name].append(outcome)
    for name, outcomes in results.items():
      losses = tuple(outcome.losses for outcome in outcomes)
      perplexities = [loss.perplexity for loss in losses]
      change = np.mean([paired_difference(loss, rounded.losses).mean for loss in losses])
      spread = float(np.std(perplexities, ddof=1)) if main and name != "RTN" else None
      rows.append(
        [name, f"INT{bits}", float(np.mean(perplexities)), spread]
        + [None if name == "RTN" else float(change), rounded.bits]
        + [min(outcome.seconds for outcome in outcomes)]
      )
      if main:
        nll[name] = losses
  report.tables.append(
    Table(
      f"Perplexity, {variant} model",
      [
        "method",
        "weights",
        Column("perplexity", ".2f"),
        Column("sd over draws", ".3f"),
        Column("nats per token against RTN", "+.4f"),
        Column("bits per weight", ".2f"),
        Column("seconds", ".2f"),
      ],
      rows,
      note=(
        f"Group size {config.group_size}, scales in float16; {len(draws)} calibration draws at "
        f"INT{config.bits}, one at other widths. Seconds: the fastest draw's to quantize the "
        "model; with one draw they include compilation."
      ),
    )
  )
  plot_methods(config, variant, full, nll, workdir, report)
  report.claims.extend(method_claims(f"INT{config.bits}, {variant} model", variant, full, nll))


def method_claims(width: str, variant: str, full, nll) -> list[Claim]:
  """Claims 1 and 4 of the paper, on the mean loss in nats per token of each calibration draw."""
  mean_nll = lambda name: [loss.nats_per_token for loss in nll[name]]
  seeds = len(nll["AWQ"])
  rtn = mean_nll("RTN")
  base_nll = full.nats_per_token
  claims = []
  claims.append(
    Claim.less(
      f"AWQ has lower loss than RTN ({width}, nats per token)",
      {"AWQ": mean_nll("AWQ"), "RTN": rtn},
    )
  )
  claims.append(
    Claim.greater(
      f"AWQ stays above full precision ({width}, nats per token)",
      {"AWQ": mean_nll("AWQ"), "full precision": [base_nll] * seeds},
    )
  )
  if variant == "outlier":
    claims.append(
      Claim.greater(
        f"AWQ closes at least half of the gap that RTN opens ({width}, share of the gap)",
        [(rtn[0] - x) / (rtn[0] - base_nll) for x in mean_nll("AWQ")],
        0.5,
      )
    )
  claims.append(
    Claim.less(
      f"searching the exponent is no worse than r = 0.5 ({width}, nats per token)",
      {
        "scale search": mean_nll("AWQ, no clip"),
        "r = 0.5": mean_nll("AWQ r=0.5, no clip"),
      },
    )
  )
  claims.append(
    Claim.less(
      f"r = 0.5 is no worse than r = 0 ({width}, nats per token)",
      {"r = 0.5": mean_nll("AWQ r=0.5, no clip"), "r = 0 (RTN)": rtn},
    )
  )
  return claims


def plot_methods(config, variant, full, nll, workdir, report: Report) -> None:
  excess = {
    name: [loss.nats_per_token - full.nats_per_token for loss in losses]
    for name, losses in nll.items()
  }
  file = f"methods_{variant}.png"
  plots.bar_plot(
    workdir / file,
    list(excess),
    {"excess loss": [float(np.mean(v)) for v in excess.values()]},
    errors={"excess loss": [float(np.std(v)) for v in excess.values()]},
    ylabel="excess loss, nats per token",
    title=f"INT{config.bits}, group {config.group_size}, {variant} model",
  )
  report.figures.append(
    Figure(
      f"Loss of quantization, {variant} model",
      file,
      "Above full precision; mean and standard deviation over calibration draws.",
    )
  )


def salient_channels(
  variant: str,
  model: Callable[[], Decoder],
  draws,
  config,
  evaluation,
  measurements: Measurements,
  report: Report,
) -> None:
  """Tables 1 and 2 of the paper: which channels matter, and what scaling them does."""
  format = integer_format(config, config.bits)
  model = functools.cache(model)
  get = lambda name, measure: measurements.get(f"salient channels, {variant}, {name}", measure)
  full = get("full precision", lambda: evaluation.losses(model()))
  rounded = get("RTN", lambda: evaluation.losses(rtn(model(), format)))

  def score(tokens, block) -> WindowLosses:
    return evaluation.losses(quantize_model(model(), tokens, block, stream="full_precision"))

  def keep(tokens, seed, fraction, criterion) -> WindowLosses:
    block = lambda i, block, x, context: salient.keep_salient(
      block,
      x,
      context,
      format,
      fraction=fraction,
      criterion=criterion,
      key=jax.random.fold_in(jax.random.key(seed), i),
    )
    return score(tokens, block)

  def scale_chosen(tokens, scale) -> WindowLosses:
    block = lambda i, block, x, context: salient.scale_salient(
      block, x, context, format, fraction=0.01, scale=scale
    )
    return score(tokens, block)

  rows, closed = [["none (RTN)", rounded.perplexity, 0.0]], {}
  middle = sorted(config.salient_fractions)[len(config.salient_fractions) // 2]
  for fraction in config.salient_fractions:
    for criterion in ("activation", "weight", "random"):
      # All draws at the fraction that the claim is about, one at the others; the norm of the weights
      # does not depend on the draw.
      every = fraction == middle and criterion != "weight"
      used = list(draws.items())[: None if every else 1]
      losses = [
        get(
          f"{fraction} by {criterion}, seed {seed}",
          functools.partial(keep, tokens, seed, fraction, criterion),
        )
        for seed, tokens in used
      ]
      shares = [gap_closed(loss, rounded, full) for loss in losses]
      if fraction == middle:
        closed[criterion] = shares
      perplexity = float(np.mean([loss.perplexity for loss in losses]))
      rows.append([f"{fraction:.1%} by {criterion}", perplexity, float(np.mean(shares))])
  shown = [Column("perplexity", ".2f"), Column("share of RTN's gap closed", ".2f")]
  report.tables.append(
    Table(
      f"Salient channels kept, INT{format.bits}, {variant} model (the paper's Table 1)",
      ["kept in full precision", *shown],
      rows,
      note=(
        f"At {middle:.1%}: mean of {len(draws)} draws (weight: no draw). At least one channel per linear is kept, so "
        "0.1 % of a small layer is one channel."
      ),
    )
  )
  kept = f"{middle:.1%} of channels kept, INT{format.bits}, {variant} model, share of RTN's gap"
  report.claims.append(
    Claim.greater(f"chosen by activation they close most of it ({kept})", closed["activation"], 0.5)
  )
  for criterion in ("weight", "random"):
    report.claims.append(
      Claim.less(f"chosen by {criterion} they do not ({kept})", closed[criterion], 0.5)
    )

  rows = []
  for scale in config.salient_scales:
    tokens = next(iter(draws.values()))
    loss = get(f"scale {scale}", functools.partial(scale_chosen, tokens, scale))
    rows.append([scale, loss.perplexity, gap_closed(loss, rounded, full)])
  report.tables.append(
    Table(
      f"Fixed scale on 1 % of channels, INT{format.bits}, {variant} model (the paper's Table 2)",
      [Column("s", ".2f"), *shown],
      rows,
    )
  )


def gap_closed(loss: WindowLosses, rtn: WindowLosses, full: WindowLosses) -> float:
  """(RTN - method) / (RTN - full precision), in mean loss."""
  return float((rtn.nll.mean() - loss.nll.mean()) / (rtn.nll.mean() - full.nll.mean()))


def final_model(
  base: BaseModel,
  tokens,
  workdir,
  config,
  evaluation,
  measurements: Measurements,
  report: Report,
) -> None:
  """What a user takes home: the packed model's size, choices and text, and the search result."""
  format = integer_format(config, config.bits)
  model, settings = base.model, awq_settings(config, format)

  def searched() -> Decoder:
    searches = search_model(model, tokens, settings)
    search_result.save(workdir / "search.safetensors", searches, settings)
    return apply_to_model(model, searches, format)

  windows = np.concatenate(list(evaluation.windows.values()))
  questions = continuation_questions(
    windows[: config.choice_questions], choice_length=8, num_choices=4, seed=0
  )
  prompt = windows[0][:24].tolist()

  def measure(make: Callable[[], Decoder]) -> PackedOutcome:
    candidate = make()
    bits = 32.0 if candidate is model else bits_per_weight(candidate.blocks)
    (continuation,) = generate(candidate, [prompt], max_new_tokens=24)
    accuracy = choice_accuracy(candidate, questions).accuracy
    return PackedOutcome(bits, accuracy, base.tokenizer.decode(continuation))

  rows = []
  candidates = {"full precision": lambda: model, "RTN": lambda: rtn(model, format), "AWQ": searched}
  for name, make in candidates.items():
    found = measurements.get(f"packed model, {name}", functools.partial(measure, make))
    megabytes = block_parameters(model) * found.bits / 8 / 1e6
    rows.append([name, found.bits, megabytes, found.accuracy, repr(found.continuation)])
  report.tables.append(
    Table(
      f"The packed model, INT{format.bits}",
      [
        "model",
        Column("bits per weight", ".2f"),
        Column("MB of block weights", ".3f"),
        Column("choice accuracy", ".3f"),
        "greedy continuation",
      ],
      rows,
      note=(
        f"{len(questions)} questions: which of four 8-token endings belongs to the window "
        f"(chance: 0.25). The continuation is of {base.tokenizer.decode(prompt)!r}."
      ),
    )
  )


def block_parameters(model: Decoder) -> int:
  """Number of weights in the linears of all blocks."""
  return sum(
    layer.kernel[...].size
    for _, layer in nnx.iter_modules(model.blocks)
    if isinstance(layer, nnx.Linear)
  )
