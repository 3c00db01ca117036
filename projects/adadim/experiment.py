"""AdaDim against fixed group dimensions: the paper's tables and claims at the config's size."""

import collections
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.errors import UserError
from common.evaluation.multiple_choice import choice_accuracy, continuation_questions
from common.evaluation.perplexity import WindowLosses, paired_difference
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.quantization.linear import bits_per_weight
from common.quantization.quantized_array import IntegerFormat
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.adadim.adadim import PER_IC, PER_OC, check_sizes, module_order, quantize
from projects.adadim.methods import (
  Quantized,
  awq_dequantized,
  calibration,
  load_evaluation,
  losses,
  methods,
  num_weights,
  quantize_dequantized,
  variant,
)
from projects.adadim.sensitivity import ChannelSensitivity, block_sensitivity, top_share
from projects.adadim.tasks import check_tasks, task_score

# Linears whose inputs a variant gives outliers.
OUTLIER_INPUTS = {
  "norm_outliers": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
  "down_outliers": ("down_proj",),
}

# More loss than this is more than noise, nats per token (0.5 % of perplexity).
NOISE = 0.005

# Of all the channels, when the report says how concentrated sensitivity is.
TOP_FRACTION = 0.02

# Columns of the channel maps.
MAP_BINS = 64


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  check_tasks(config)
  base = base_model(config.model)
  check_config(config, base.model)
  windows = load_evaluation(config, base)
  draws = {seed: calibration(config, base, config.calibration, seed) for seed in config.seeds}
  report = Report(tables=[], figures=[], claims=[])
  measurements = Measurements(workdir, config, (WindowLosses, Quantized, ChannelSensitivity))
  setting = (config, base, windows, draws, measurements, report)
  parts = [functools.partial(compare_methods, name, workdir, *setting) for name in config.variants]
  if config.task_domains:
    parts.append(functools.partial(task_calibration, *setting))
  if config.sweep_bits:
    parts.append(functools.partial(sweep, *setting))
  if config.sensitivity_samples:
    parts += [
      functools.partial(sensitivity_maps, name, workdir, *setting) for name in config.variants
    ]
  parts.append(functools.partial(packed_model, *setting))
  for part in track(parts, "AdaDim", console=Console(stderr=True)):
    part()
  return report


def check_config(config: ConfigDict, model: Decoder) -> None:
  """Refuses sizes that do not fit the model before any work."""
  for group_size in {config.group_size, *(config.sweep_group_sizes if config.sweep_bits else ())}:
    for bits in {config.bits, *config.sweep_bits}:
      for settings in methods(config, bits, group_size).values():
        check_sizes(model, settings)
  if config.sensitivity_samples and not 0 <= config.sensitivity_block < len(model.blocks):
    raise UserError(
      f"sensitivity_block={config.sensitivity_block}: expected 0 to {len(model.blocks) - 1}, a "
      "block of the model"
    )


def score(
  quantize: Callable[[Decoder, jax.Array], Quantized],
  model_of: Callable[[], Decoder],
  tokens: jax.Array,
  windows: dict[str, np.ndarray],
  domains,
) -> tuple[WindowLosses, Quantized]:
  """The losses of a quantized model, and what else is known of it, without the model itself.

  Args:
    quantize: (model, calibration tokens) -> quantized.
    model_of: makes the model in full precision, or finds it made.
    tokens: of the calibration, int32 [samples, seq].
    windows, domains: what the losses are of.
  """
  result = quantize(model_of(), tokens)
  return losses(result.model, windows, domains), result._replace(model=None)


def compare_methods(
  name: str, workdir, config, base: BaseModel, windows, draws, measurements, report: Report
) -> None:
  """The main table of one variant, the axis that each linear chose, and claims 1 to 3."""
  results, quantized = collections.defaultdict(list), collections.defaultdict(list)
  full = measurements.get(
    f"{name}, full precision", lambda: losses(base.model, windows, config.domains)
  )
  compared = {
    method: functools.partial(quantize_dequantized, settings=settings)
    for method, settings in methods(config, config.bits, config.group_size).items()
  }
  format = IntegerFormat(config.bits, config.group_size, scale_dtype=jnp.float16)
  compared["AWQ"] = functools.partial(awq_dequantized, format=format)
  for seed, tokens in draws.items():
    model_of = functools.cache(functools.partial(variant, config, name, base.model, seed))
    for method, of_method in compared.items():
      unit = functools.partial(score, of_method, model_of, tokens, windows, config.domains)
      loss, result = measurements.get(f"{name}, {method}, seed {seed}", unit)
      results[method].append(loss)
      quantized[method].append(result)
  rows = [["full precision", full.perplexity, None, None, None, None, 32.0, None]]
  for method, values in results.items():
    perplexities = [loss.perplexity for loss in values]
    several = len(values) > 1 and np.ptp(perplexities) > 0
    reference = [] if method == "RTN-OC" else zip(values, results["RTN-OC"])
    changes = [paired_difference(a, b) for a, b in reference]
    rows.append(
      [method, float(np.mean(perplexities))]
      + [float(np.std(perplexities, ddof=1)) if several else None]
      + [float(np.mean([c.mean for c in changes])) if changes else None]
      + [float(np.mean([c.high - c.mean for c in changes])) if changes else None]
      + [float(np.mean([q.per_ic for q in quantized[method]]))]
      + [quantized[method][0].bits_per_weight, min(q.seconds for q in quantized[method])]
    )
  report.tables.append(
    Table(
      f"Perplexity, {label(name)} model, INT{config.bits}",
      [
        "method",
        Column("perplexity", ".2f"),
        Column("sd over seeds", ".3f"),
        Column("nats per token against RTN-OC", "+.4f"),
        Column("± 95 %, windows", ".4f"),
        Column("linears per-IC", ".0%"),
        Column("bits per weight", ".2f"),
        Column("seconds", ".2f"),
      ],
      rows,
      note=(
        f"Group size {config.group_size}, scales in float16; mean of {len(draws)} seeds "
        "(calibration draw and outlier channels). Differences are paired by window. Seconds: the "
        "fastest seed's to quantize the model; with one seed they include compilation."
      ),
    )
  )
  decision_report(name, [q.errors for q in quantized["RTN-ada"]], config, workdir, report)
  plot_losses(name, config, full, results, workdir, report)
  report.claims.extend(loss_claims(f"INT{config.bits}, {label(name)} model", results))


def label(name: str) -> str:
  return name.replace("_", "-")


def mean_nll(values: list[WindowLosses]) -> np.ndarray:
  """Nats per token of each seed."""
  return np.array([loss.nats_per_token for loss in values])


def loss_claims(where: str, results) -> list[Claim]:
  """Claims 2 and 3: the adaptive choice is as good as the best fixed one."""
  nll = {method: mean_nll(values) for method, values in results.items()}
  best = np.min([nll[m] for m in ("RTN-OC", "RTN-IC", "RTN-heuristic")], axis=0)
  gptq_oc = np.minimum(nll["GPTQ-OC"], nll["GPTQ-OC static reorder"])
  return [
    Claim.less(
      f"RTN-ada is as good as the best of OC, IC and heuristic within {NOISE} nats ({where}, nats "
      "per token)",
      {"RTN-ada": nll["RTN-ada"], "best fixed": best},
      NOISE,
    ),
    Claim.less(
      f"GPTQ-ada has lower loss than the better GPTQ-OC ({where}, nats per token)",
      {"GPTQ-ada": nll["GPTQ-ada"], "GPTQ-OC": gptq_oc},
    ),
  ]


def decision_report(name: str, errors, config, workdir, report: Report) -> None:
  """Which linear chose per-IC, the ratio of its errors, and claim 1.

  Args:
    errors: per seed and block, {path: [2]}.
  """
  paths = module_order(errors[0][0])
  short = [path.rpartition(".")[2] for path in paths]
  # [seeds, blocks, linears].
  ratios = np.array(
    [[[b[p][PER_IC] / b[p][PER_OC] for p in paths] for b in blocks] for blocks in errors]
  )
  axes = (ratios < 1).astype(int)
  rows = [
    [f"block {i}", *(f"{r:.2f} ({n}/{len(errors)})" for r, n in zip(ratio, chosen))]
    for i, (ratio, chosen) in enumerate(
      zip(np.exp(np.log(ratios).mean(axis=0)).tolist(), axes.sum(axis=0).tolist())
    )
  ]
  report.tables.append(
    Table(
      f"Error of per-IC over per-OC, {label(name)} model, INT{config.bits}",
      ["block", *short],
      rows,
      note=(
        "Geometric mean over seeds of the ratio of mean squared output errors (of the attention "
        "for q, k, v; of the MLP for gate and up); in brackets how many seeds chose per-IC."
      ),
    )
  )
  file = f"decisions_{name}.png"
  plots.heatmap(
    workdir / file,
    np.log2(ratios).mean(axis=0),
    [f"block {i}" for i in range(ratios.shape[1])],
    [s.removesuffix("_proj") for s in short],
    title=f"log2 of error per-IC / per-OC, {label(name)}",
    annotate="+.1f",
  )
  report.figures.append(
    Figure(f"Choices, {label(name)} model", file, "Below 0 the linear chooses per-IC.")
  )
  where = f"INT{config.bits}, {label(name)} model"
  if name in OUTLIER_INPUTS:
    seen = [i for i, s in enumerate(short) if s in OUTLIER_INPUTS[name]]
    report.claims.append(
      Claim.less(
        f"per-IC halves the error of linears that see outliers, at least ({where}, geometric mean "
        "of error per-IC / per-OC)",
        np.exp(np.log(ratios[:, :, seen]).mean(axis=(1, 2))),
        0.5,
      )
    )
  else:
    share = axes.mean(axis=(1, 2))
    report.claims.append(
      Claim.less(
        f"neither dimension is better for nearly all linears ({where}, larger share)",
        np.maximum(share, 1 - share),
        0.9,
      )
    )


def plot_losses(name: str, config, full, results, workdir, report: Report) -> None:
  excess = {m: mean_nll(values) - full.nats_per_token for m, values in results.items()}
  file = f"methods_{name}.png"
  plots.bar_plot(
    workdir / file,
    [m.replace("heuristic", "heur.").replace(" static reorder", "+reorder") for m in excess],
    {"excess loss": [float(v.mean()) for v in excess.values()]},
    errors={"excess loss": [float(v.std()) for v in excess.values()]},
    ylabel="excess loss, nats per token",
    title=f"INT{config.bits}, group {config.group_size}, {label(name)} model",
  )
  report.figures.append(
    Figure(
      f"Loss of quantization, {label(name)} model",
      file,
      "Above full precision; mean and standard deviation over seeds.",
    )
  )


def task_calibration(
  config, base: BaseModel, windows, draws, measurements: Measurements, report: Report
) -> None:
  """The choice calibrated on the task's own text against general text (claim 4)."""
  settings = methods(config, config.bits, config.group_size)["RTN-ada"]

  def evaluate(tokens_of, seed) -> dict[str, WindowLosses]:
    model = quantize_dequantized(base.model, tokens_of(seed), settings).model
    return {d: losses(model, windows, [d]) for d in config.task_domains}

  def of_draws(source: str, tokens_of) -> list[dict[str, WindowLosses]]:
    return [
      measurements.get(
        f"calibrated on {source}, seed {seed}", functools.partial(evaluate, tokens_of, seed)
      )
      for seed in draws
    ]

  general = of_draws("general text", draws.__getitem__)
  rows = [["general", *table_row(general, config)]]
  for domain in config.task_domains:
    own = of_draws(domain, functools.partial(calibration, config, base, domain))
    rows.append([domain, *table_row(own, config)])
    report.claims.append(
      Claim.less(
        f"choosing on {domain} is better for it than choosing on general text (RTN-ada, "
        f"INT{config.bits}, natural model, nats per token)",
        {
          "task calibration": mean_nll([r[domain] for r in own]),
          "general calibration": mean_nll([r[domain] for r in general]),
        },
      )
    )
  report.tables.append(
    Table(
      f"RTN-ada by calibration set, INT{config.bits}, natural model",
      ["calibrated on", *[Column(f"nats per token, {d}", ".4f") for d in config.task_domains]],
      rows,
      note=f"Mean of {len(draws)} draws.",
    )
  )


def table_row(results, config) -> list[float]:
  return [float(mean_nll([r[d] for r in results]).mean()) for d in config.task_domains]


def sweep(
  config, base: BaseModel, windows, draws, measurements: Measurements, report: Report
) -> None:
  """Bits and group sizes on the first seed of the first variant with outliers (or the natural)."""
  name = next((v for v in config.variants if v in OUTLIER_INPUTS), config.variants[0])
  seed, tokens = next(iter(draws.items()))
  model_of = functools.cache(functools.partial(variant, config, name, base.model, seed))
  full = measurements.get(
    "sweep, full precision", lambda: losses(model_of(), windows, config.domains)
  )
  shown = ("RTN-OC", "RTN-IC", "RTN-ada", "GPTQ-OC static reorder", "GPTQ-ada")
  rows = []
  for bits in config.sweep_bits:
    for group_size in config.sweep_group_sizes:
      row = [f"INT{bits}", group_size]
      for method in shown:
        settings = methods(config, bits, group_size)[method]
        of_method = functools.partial(quantize_dequantized, settings=settings)
        unit = functools.partial(score, of_method, model_of, tokens, windows, config.domains)
        where = f"sweep, INT{bits}, group size {group_size}"
        loss, result = measurements.get(f"{where}, {method}, seed {seed}", unit)
        row.append(paired_difference(loss, full).mean)
      rows.append([*row, result.bits_per_weight])
  report.tables.append(
    Table(
      f"Bits and group sizes, {label(name)} model",
      [
        "weights",
        "group size",
        *[Column(method, ".4f") for method in shown],
        Column("bits per weight", ".2f"),
      ],
      rows,
      note=(
        "Nats per token above full precision, one seed. A group as large as a dimension is one "
        f"scale per channel (the hidden size is {base.model.config.hidden_size})."
      ),
    )
  )


def sensitivity_maps(
  name: str, workdir, config, base: BaseModel, windows, draws, measurements, report: Report
) -> None:
  """Where sensitivity lies in one block: along inputs or outputs, and with which activations."""
  del windows
  seed, tokens = next(iter(draws.items()))
  index = config.sensitivity_block

  def measure() -> dict[str, ChannelSensitivity]:
    model = variant(config, name, base.model, seed)
    return block_sensitivity(model, tokens[: config.sensitivity_samples], index)

  maps = measurements.get(f"{name}, sensitivity of block {index}, seed {seed}", measure)
  rows = []
  for path in module_order(maps):
    s = maps[path]
    shares = [s.fisher_in, s.fisher_out, s.saliency_in, s.saliency_out]
    peak = float(s.activation.max() / np.median(s.activation))
    rows.append([path, *(float(top_share(x, TOP_FRACTION)) for x in shares), peak])
  top = f"top {TOP_FRACTION:.0%} of"
  report.tables.append(
    Table(
      f"Concentration of sensitivity, block {index}, {label(name)} model",
      [
        "linear",
        Column(f"Fisher, {top} inputs", ".2f"),
        Column(f"Fisher, {top} outputs", ".2f"),
        Column(f"|g w|, {top} inputs", ".2f"),
        Column(f"|g w|, {top} outputs", ".2f"),
        Column("largest / median activation", ".1f"),
      ],
      rows,
      note=f"Share of the sum; {config.sensitivity_samples} calibration samples.",
    )
  )
  short = [path.rpartition(".")[2].removesuffix("_proj") for path in module_order(maps)]
  for kind, title in (
    ("activation", "largest |x|"),
    ("fisher_in", "Fisher sensitivity"),
    ("fisher_out", "Fisher sensitivity"),
  ):
    channel = "output" if kind.endswith("out") else "input"
    values = [relative(getattr(maps[path], kind)) for path in module_order(maps)]
    file = f"{kind}_{name}.png"
    bins = len(values[0])
    plots.heatmap(
      workdir / file,
      values,
      short,
      [str(i) if i % 16 == 0 else "" for i in range(bins)],
      xlabel=f"{channel} channels, in {bins} bins (maximum)",
      title=f"log10 of {title} / median, {label(name)}",
    )
    report.figures.append(Figure(f"Map of {kind}, block {index}, {label(name)} model", file))


def relative(channels: np.ndarray) -> np.ndarray:
  """log10 of the channels over their median, the largest of each of MAP_BINS bins."""
  ratio = np.maximum(channels, 1e-30) / np.maximum(np.median(channels), 1e-30)
  bins = np.array_split(np.log10(ratio), min(MAP_BINS, len(ratio)))
  return np.array([part.max() for part in bins])


def packed_model(
  config, base: BaseModel, windows, draws, measurements: Measurements, report: Report
) -> None:
  """What a user takes home: the packed model, its size, and its answers."""
  name = next((v for v in config.variants if v in OUTLIER_INPUTS), config.variants[0])
  seed, tokens = next(iter(draws.items()))
  model_of = functools.cache(functools.partial(variant, config, name, base.model, seed))
  joined = np.concatenate([windows[d] for d in config.domains])
  kept = np.linspace(0, len(joined) - 1, min(config.choice_questions, len(joined))).astype(int)
  questions = continuation_questions(joined[kept], choice_length=8, num_choices=4, seed=0)
  settings = methods(config, config.bits, config.group_size)

  def measure(method: str) -> list[float]:
    model = model_of()
    full = method == "full precision"
    candidate = model if full else quantize(model, tokens, settings[method])
    bits = bits_per_weight(candidate.blocks)
    return [
      bits,
      num_weights(model) * bits / 8 / 1e6,
      losses(candidate, windows, config.domains).perplexity,
      choice_accuracy(candidate, questions).accuracy,
      *(task_score(config, task, candidate, base.tokenizer) for task in config.tasks),
    ]

  rows = []
  for method in ("full precision", "RTN-OC", "RTN-ada", "GPTQ-ada"):
    unit = functools.partial(measure, method)
    rows.append([method, *measurements.get(f"packed, {method}, seed {seed}", unit)])
  report.tables.append(
    Table(
      f"The packed model, INT{config.bits}, {label(name)}",
      [
        "model",
        Column("bits per weight", ".2f"),
        Column("MB of block weights", ".3f"),
        Column("perplexity", ".2f"),
        Column("choice accuracy", ".3f"),
        *[Column(task, ".3f") for task in config.tasks],
      ],
      rows,
      note=(
        f"One seed. Choice accuracy: {len(questions)} questions, which of four 8-token endings "
        "belongs to the window (chance: 0.25)."
      ),
    )
  )
