"""AWQ against its baselines on one model: the paper's tables and claims at the config's size."""

import collections
import functools
import pathlib
import time

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
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.awq import salient, search_result
from projects.awq.methods import (
  awq,
  awq_settings,
  calibration,
  gptq,
  integer_format,
  load_evaluation,
  mixed_calibration,
  quantize_all,
  rtn,
)


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  base = base_model(config.model)
  format = integer_format(config, config.bits)
  evaluation = load_evaluation(config, base)
  draws = {seed: mixed_calibration(config, base, seed) for seed in config.seeds}
  variants = {"natural": base.model}
  if config.outlier_variant:
    variants["outlier"] = inject_outliers(base.model, jax.random.key(0))

  report = Report(tables=[], figures=[], claims=[])
  setting = (config, evaluation, draws, format, workdir, report)
  parts = []
  for variant, model in variants.items():
    parts.append(functools.partial(compare_methods, variant, model, *setting))
  for variant, model in variants.items():
    parts.append(functools.partial(salient_channels, variant, model, *setting))
  if config.matrix_draws:
    parts.append(functools.partial(calibration_robustness, base, *setting))
  if config.sample_sizes:
    parts.append(functools.partial(sample_efficiency, base, variants, *setting))
  parts.append(functools.partial(final_model, base, *setting))
  for part in track(parts, "AWQ", console=Console(stderr=True)):
    part()
  return report


def compare_methods(
  variant: str, model: Decoder, config, evaluation, draws, format, workdir, report: Report
) -> None:
  """The main table: perplexity per method and width, and claims 1 and 4 of the paper."""
  full = evaluation.losses(model)
  rows, nll = [["full precision", None, full.perplexity, None, None, 32.0, None]], {}
  for bits in (config.bits, *config.other_bits):
    main = bits == config.bits
    of_width = integer_format(config, bits)
    start = time.perf_counter()
    rounded = jax.block_until_ready(rtn(model, of_width))
    seconds = time.perf_counter() - start
    reference = evaluation.losses(rounded)
    stored = bits_per_weight(rounded.blocks)
    # Rounding to nearest does not look at the calibration set: one draw is all draws.
    used = list(draws.values())[: None if main else 1]
    results = collections.defaultdict(list, {"RTN": [(reference, seconds)] * len(used)})
    for tokens in used:
      for name, quantized, seconds in quantize_all(config, model, tokens, of_width, main):
        results[name].append((evaluation.losses(quantized), seconds))
    for name, values in results.items():
      losses, seconds = zip(*values)
      perplexities = [loss.perplexity for loss in losses]
      change = np.mean([paired_difference(loss, reference).mean for loss in losses])
      spread = float(np.std(perplexities, ddof=1)) if main and name != "RTN" else None
      rows.append(
        [name, f"INT{bits}", float(np.mean(perplexities)), spread]
        + [None if name == "RTN" else float(change), stored, min(seconds)]
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
  mean_nll = lambda name: [loss.nll.mean() / loss.tokens for loss in nll[name]]
  seeds = len(nll["AWQ"])
  rtn = mean_nll("RTN")
  base_nll = full.nll.mean() / full.tokens
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
    name: [loss.nll.mean() / loss.tokens - full.nll.mean() / full.tokens for loss in losses]
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
  variant: str, model: Decoder, config, evaluation, draws, format, workdir, report: Report
) -> None:
  """Tables 1 and 2 of the paper: which channels matter, and what scaling them does."""
  del workdir
  full, rounded = evaluation.losses(model), evaluation.losses(rtn(model, format))

  def keep(tokens, seed, fraction, criterion):
    block = lambda i, block, x, context: salient.keep_salient(
      block,
      x,
      context,
      format,
      fraction=fraction,
      criterion=criterion,
      key=jax.random.fold_in(jax.random.key(seed), i),
    )
    return evaluation.losses(quantize_model(model, tokens, block, stream="full_precision"))

  rows, closed = [["none (RTN)", rounded.perplexity, 0.0]], {}
  middle = sorted(config.salient_fractions)[len(config.salient_fractions) // 2]
  for fraction in config.salient_fractions:
    for criterion in ("activation", "weight", "random"):
      # All draws at the fraction that the claim is about, one at the others; the norm of the weights
      # does not depend on the draw.
      every = fraction == middle and criterion != "weight"
      used = list(draws.items())[: None if every else 1]
      losses = [keep(tokens, seed, fraction, criterion) for seed, tokens in used]
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
    block = lambda i, block, x, context, scale=scale: salient.scale_salient(
      block, x, context, format, fraction=0.01, scale=scale
    )
    tokens = next(iter(draws.values()))
    loss = evaluation.losses(quantize_model(model, tokens, block, stream="full_precision"))
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


def calibration_robustness(
  base: BaseModel, config, evaluation, draws, format, workdir, report: Report
) -> None:
  """Loss when the calibration domain is not the evaluation domain (the paper's Figure 8b)."""
  del draws  # Each domain gives its own.
  model = base.model
  names = [domain.split(":")[-1] for domain in config.domains]
  full = evaluation.losses_by_domain(model)
  compared = {
    "AWQ": lambda tokens: awq(model, tokens, awq_settings(config, format)),
    "GPTQ": lambda tokens: gptq(model, tokens, format),
  }
  penalties, rows = {}, []
  for name, quantize in compared.items():
    matrix = np.zeros((config.matrix_draws, len(names), len(names)))
    for draw in range(config.matrix_draws):
      for i, source in enumerate(config.domains):
        tokens = calibration(config, base, source, config.calibration_samples, draw)
        losses = evaluation.losses_by_domain(quantize(tokens))
        for j, domain in enumerate(config.domains):
          matrix[draw, i, j] = paired_difference(losses[domain], full[domain]).mean
    # For each evaluation domain: calibrated elsewhere, minus calibrated on it.
    own = np.diagonal(matrix, axis1=1, axis2=2)
    elsewhere = (matrix.sum(axis=1) - own) / (len(names) - 1)
    penalties[name] = (elsewhere - own).mean(axis=1).tolist()
    for source, row in zip(names, matrix.mean(axis=0).tolist()):
      rows.append([name, source, *row])
    file = f"robustness_{name.lower()}.png"
    plots.heatmap(
      workdir / file,
      matrix.mean(axis=0),
      names,
      names,
      xlabel="evaluated on",
      ylabel="calibrated on",
      title=f"{name}, INT{format.bits}: nats per token above full precision",
      annotate=".3f",
    )
    report.figures.append(Figure(f"Calibration robustness of {name}", file))
  report.tables.append(
    Table(
      f"Calibrated on one domain, evaluated on another, INT{format.bits}, natural model",
      ["method", "calibrated on", *[Column(f"on {n}", ".4f") for n in names]],
      rows,
      note=f"Nats per token above full precision, mean of {config.matrix_draws} draws.",
    )
  )
  report.claims.append(
    Claim.less(
      "AWQ loses less than GPTQ when calibrated on another domain "
      f"(INT{format.bits}, natural model, nats per token off-domain minus on-domain)",
      {"AWQ": penalties["AWQ"], "GPTQ": penalties["GPTQ"]},
    )
  )


def sample_efficiency(
  base: BaseModel, variants, config, evaluation, draws, format, workdir, report: Report
) -> None:
  """Loss against the number of calibration sequences (the paper's Figure 8a)."""
  del draws  # Each size gives its own.
  variant, model = list(variants.items())[-1]
  full = evaluation.losses(model)
  source = ",".join(config.domains)
  compared = {
    "AWQ": lambda tokens: awq(model, tokens, awq_settings(config, format)),
    "GPTQ": lambda tokens: gptq(model, tokens, format),
  }
  sizes, seeds = list(config.sample_sizes), config.seeds[: config.sample_draws]
  excess = {name: np.zeros((len(sizes), len(seeds))) for name in compared}
  for i, size in enumerate(sizes):
    for j, seed in enumerate(seeds):
      tokens = calibration(config, base, source, size, seed)
      for name, quantize in compared.items():
        loss = evaluation.losses(quantize(tokens))
        excess[name][i, j] = paired_difference(loss, full).mean
  plots.line_plot(
    workdir / "sample_efficiency.png",
    {name: (sizes, values.mean(axis=1), values.std(axis=1)) for name, values in excess.items()},
    xlabel=f"calibration sequences of {config.calibration_length} tokens",
    ylabel="excess loss, nats per token",
    title=f"INT{format.bits}, {variant} model",
    log="x",
  )
  report.figures.append(
    Figure(
      "Sample efficiency",
      "sample_efficiency.png",
      f"Above full precision; mean and standard deviation of {len(seeds)} calibration draws.",
    )
  )
  means = [values.mean(axis=1).tolist() for values in excess.values()]
  report.tables.append(
    Table(
      f"Calibration set size, INT{format.bits}, {variant} model",
      ["sequences", *[Column(name, ".4f") for name in excess]],
      [list(row) for row in zip(sizes, *means)],
      note=f"Nats per token above full precision, mean of {len(seeds)} draws.",
    )
  )


def final_model(
  base: BaseModel, config, evaluation, draws, format, workdir, report: Report
) -> None:
  """What a user takes home: the packed model's size, choices and text, and the search result."""
  model, settings = base.model, awq_settings(config, format)
  searches = search_model(model, draws[config.seeds[0]], settings)
  candidates = {
    "full precision": model,
    "RTN": rtn(model, format),
    "AWQ": apply_to_model(model, searches, format),
  }
  search_result.save(workdir / "search.safetensors", searches, settings)
  windows = np.concatenate(list(evaluation.windows.values()))
  questions = continuation_questions(
    windows[: config.choice_questions], choice_length=8, num_choices=4, seed=0
  )
  prompt = windows[0][:24].tolist()
  rows = []
  for name, candidate in candidates.items():
    bits = 32.0 if name == "full precision" else bits_per_weight(candidate.blocks)
    (continuation,) = generate(candidate, [prompt], max_new_tokens=24)
    rows.append(
      [
        name,
        bits,
        block_parameters(model) * bits / 8 / 1e6,
        choice_accuracy(candidate, questions).accuracy,
        repr(base.tokenizer.decode(continuation)),
      ]
    )
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
