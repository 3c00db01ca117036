"""Language models: perplexity and layer errors of every method, ablations, zero-shot accuracy."""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress

from common.data.pipelines import calibration_samples, evaluation_windows
from common.evaluation.harness import require_harness, zero_shot_accuracies
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.models.outliers import inject_outliers
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.llm_fp4 import search_result
from projects.llm_fp4.llm_fp4 import FPQSettings
from projects.llm_fp4.methods import (
  ABLATIONS,
  BASELINE,
  FLOAT_METHODS,
  FPQ,
  MINMAX_FP,
  MINMAX_INT,
  SMOOTHQUANT,
  fpq_settings,
  integer_model,
)
from projects.llm_fp4.models import apply_to_model, search_model

# Zero-shot averages of the paper's Table 1 at 4/4/4 (SmoothQuant: 16/4/4), LLaMA-7B.
PAPER_LLAMA_7B = {
  "full precision": 66.3,
  MINMAX_INT: 38.1,
  MINMAX_FP: 37.4,
  SMOOTHQUANT: 49.1,
  BASELINE: 42.7,
  FPQ: 58.1,
}


class Result(NamedTuple):
  """One method on one model.

  Attributes:
    losses: on the evaluation windows.
    layer_error: mean over linears of sum (Y - Y_hat)^2 / sum Y^2 on the search's tokens, or None.
    seconds: to quantize.
  """

  losses: WindowLosses
  layer_error: float | None
  seconds: float


def compare_on_language_model(
  config: ConfigDict, workdir: pathlib.Path, measurements: Measurements, report: Report
) -> None:
  """Adds the language model's tables, claims and figure."""
  require_harness(config.tasks)
  base = base_model(config.model)
  windows = held_out_windows(config, base)
  draws = {seed: draw(config, base, config.calibration_samples, seed) for seed in config.seeds}
  # {variant: the gain of its outliers}
  variants = {"natural": None} | {f"outliers x{gain:g}": gain for gain in config.outlier_gains}
  last, excess = list(variants)[-1], {}
  with Progress(console=Console(stderr=True)) as progress:
    steps = progress.add_task("language model", total=len(variants) + 2)
    for variant, gain in variants.items():
      seeds = config.seeds[: 1 if gain is None else None]
      # Other widths on the last variant only.
      widths = [b for b in config.other_bits if b != config.bits] if variant == last else ()
      excess[variant] = compare_methods(
        config,
        variant,
        functools.lru_cache(maxsize=1)(functools.partial(outlier_model, base.model, gain)),
        {seed: draws[seed] for seed in seeds},
        windows,
        widths,
        measurements,
        report,
      )
      progress.advance(steps)
    if config.ablations:
      model = outlier_model(base.model, variants[last], config.seeds[0])
      ablate(config, last, model, base, windows, measurements, report)
    progress.advance(steps)
    final_model(config, base, draws[config.seeds[0]], windows, workdir, measurements, report)
    progress.advance(steps)
  plot_methods(config, excess, workdir, report)


def held_out_windows(config: ConfigDict, base: BaseModel) -> np.ndarray:
  """Windows of every domain's test split together, int32 [windows, seq]."""
  windows = evaluation_windows(
    config.domains, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
  )
  return np.concatenate(list(windows.values()))


def draw(config: ConfigDict, base: BaseModel, samples: int, seed: int) -> jax.Array:
  """Calibration text of the training splits, int32 [samples, seq]."""
  tokens = calibration_samples(
    ",".join(config.domains),
    base.tokenizer,
    num_samples=samples,
    seq_len=config.calibration_length,
    seed=seed,
  )
  return jnp.asarray(tokens)


def outlier_model(base: Decoder, gain: float | None, seed: int) -> Decoder:
  """The base model, with outliers of a gain in the seed's channels unless it is None."""
  return base if gain is None else inject_outliers(base, jax.random.key(seed), gain=gain)


def quantize(
  config: ConfigDict, model: Decoder, tokens, method: str, bits: int
) -> tuple[Decoder, float | None]:
  """The model quantized by one of the methods, and its layer error where there is a search."""
  if method in FLOAT_METHODS:
    settings = fpq_settings(config, bits, **FLOAT_METHODS[method])
    return quantize_by_search(model, tokens, settings, bits)
  smoothquant = method == SMOOTHQUANT
  return integer_model(model, tokens, bits, embedding_bits=bits, smoothquant=smoothquant), None


def quantize_by_search(
  model: Decoder, tokens, settings: FPQSettings, bits: int
) -> tuple[Decoder, float]:
  """The model quantized with a search, and its layer error."""
  search = search_model(model, tokens, settings, embedding_bits=bits)
  errors = [float(linear.output_error) for linear in search.linears.values()]
  return apply_to_model(model, search, settings, embedding_bits=bits), float(np.mean(errors))


def measure(quantize: Callable[[], tuple[Decoder, float | None]], windows) -> Result:
  """What becomes of the model that `quantize` returns with its layer error."""
  start = time.perf_counter()
  model, layer_error = quantize()
  jax.block_until_ready(model)
  seconds = time.perf_counter() - start
  return Result(window_losses(model, windows), layer_error, seconds)


def compare_methods(
  config: ConfigDict,
  variant: str,
  model_of: Callable[[int], Decoder],
  draws: Mapping[int, jax.Array],
  windows: np.ndarray,
  other_bits: Sequence[int],
  measurements: Measurements,
  report: Report,
) -> dict[str, list[float]]:
  """The main table of a variant and its claims; returns {method: excess nats by seed}.

  Args:
    config: the run's.
    variant: its name.
    model_of: the variant's full-precision model of a seed.
    draws: {seed: calibration tokens}.
    windows: evaluation text.
    other_bits: further widths, on the first seed.
    measurements: of the run.
    report: gets the table.
  """
  full = {}
  for seed in draws:
    in_full = lambda seed=seed: measure(lambda: (model_of(seed), None), windows)
    full[seed] = measurements.get(f"{variant}, full precision, seed {seed}", in_full)
  perplexity = lambda results: float(np.mean([r.losses.perplexity for r in results]))
  rows = [["full precision", "32/32/32", perplexity(full.values()), None, None, None, None]]
  excess = {}
  for bits in (config.bits, *other_bits):
    results = {}
    for seed in list(draws)[: None if bits == config.bits else 1]:
      for name in (MINMAX_INT, SMOOTHQUANT, *FLOAT_METHODS):

        def quantized(seed=seed, name=name, bits=bits):
          return quantize(config, model_of(seed), draws[seed], name, bits)

        of_method = functools.partial(measure, quantized, windows)
        result = measurements.get(f"{variant}, {bits} bits, {name}, seed {seed}", of_method)
        above = result.losses.nats_per_token - full[seed].losses.nats_per_token
        results.setdefault(name, []).append((result, above))
    for name, of_seeds in results.items():
      found, above = zip(*of_seeds)
      error = found[0].layer_error
      rows.append(
        [
          name,
          f"{bits}/{bits}/{bits}",
          perplexity(found),
          float(np.std([r.losses.perplexity for r in found], ddof=1)) if len(found) > 1 else None,
          float(np.mean(above)),
          None if error is None else float(np.mean([r.layer_error for r in found])),
          min(r.seconds for r in found),
        ]
      )
      excess[name, bits] = list(above)
  report.tables.append(
    Table(
      f"Language model, {variant}",
      [
        "method",
        "bits E/W/A",
        Column("perplexity", ".4g"),
        Column("sd over seeds", ".3g"),
        Column("nats per token above full precision", "+.4f"),
        Column("layer error", ".5f"),
        Column("seconds", ".1f"),
      ],
      rows,
      note=(
        f"{len(draws)} seeds at {config.bits} bits, one at other widths. Layer error: squared error "
        "of a linear's output over its squared norm, mean over linears, on calibration tokens. "
        "Seconds: the fastest seed's; with one seed they may include compilation."
      ),
    )
  )
  if variant != "natural":
    report.claims.extend(claims(config.bits, other_bits, variant, excess))
  return {name: values for (name, bits), values in excess.items() if bits == config.bits}


def claims(bits: int, other_bits, variant: str, excess) -> list[Claim]:
  """The paper's order at 4 bits, and that 8 bits cost next to nothing."""
  setting = f"W{bits}A{bits}, {variant}, nats per token"
  pairs = ((FPQ, BASELINE), (BASELINE, MINMAX_FP), (FPQ, SMOOTHQUANT), (FPQ, MINMAX_INT))
  found = [
    Claim.less(f"{a} loses less than {b} ({setting})", {x: excess[x, bits] for x in (a, b)})
    for a, b in pairs
  ]
  closed = [1 - a / b for a, b in zip(excess[FPQ, bits], excess[BASELINE, bits])]
  found.append(
    Claim.greater(
      f"FPQ closes more than half of the gap between FPQ baseline and full precision (W{bits}A{bits}, "
      f"{variant}, share)",
      closed,
      0.5,
    )
  )
  for other in other_bits:
    for name in (BASELINE, FPQ):
      found.append(
        Claim.less(
          f"{name} costs less than 0.02 nats per token at W{other}A{other} ({variant})",
          excess[name, other],
          0.02,
        )
      )
  return found


def ablate(
  config: ConfigDict, variant, model, base, windows, measurements: Measurements, report: Report
) -> None:
  """FPQ with one thing changed, on the first seed."""
  seed, bits = config.seeds[0], config.bits
  tokens = draw(config, base, config.calibration_samples, seed)
  runs = {FPQ: (tokens, {}), BASELINE: (tokens, {"pre_shifted": False})}
  runs |= {name: (tokens, changes) for name, changes in ABLATIONS.items()}
  runs[f"{config.few_samples} calibration samples"] = (
    draw(config, base, config.few_samples, seed),
    {},
  )
  full = measure(lambda: (model, None), windows).losses.nats_per_token
  rows, found = [], {}
  for name, (calibration, changes) in runs.items():
    settings = fpq_settings(config, bits, **changes)
    changed = functools.partial(quantize_by_search, model, calibration, settings, bits)
    of_change = functools.partial(measure, changed, windows)
    result = measurements.get(f"one thing changed, {name}", of_change)
    found[name] = result.losses.nats_per_token - full
    rows.append([name, result.losses.perplexity, found[name], result.layer_error])
  report.tables.append(
    Table(
      f"FPQ with one thing changed, {bits}/{bits}/{bits}, {variant}, one seed",
      [
        "change",
        Column("perplexity", ".4g"),
        Column("nats per token above full precision", "+.4f"),
        Column("layer error", ".5f"),
      ],
      rows,
    )
  )


def final_model(
  config: ConfigDict,
  base: BaseModel,
  tokens,
  windows,
  workdir,
  measurements: Measurements,
  report: Report,
) -> None:
  """What a user takes home: the saved search, the folded 4-bit model, zero-shot accuracy."""
  bits = config.bits
  settings = fpq_settings(config, bits)

  def measure() -> dict[str, str]:
    search = search_model(base.model, tokens, settings, embedding_bits=bits)
    search_result.save(workdir / "search.safetensors", search, settings)
    make = lambda packed: apply_to_model(
      base.model, search, settings, embedding_bits=bits, packed=packed
    )
    folded, simulated = make(True), make(False)
    text = jnp.asarray(windows[:1])
    expected, found = (np.asarray(_logits(model, text)) for model in (simulated, folded))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    linears = search.linears.values()
    chosen = lambda formats, field: ", ".join(
      f"{format} {sum(int(getattr(s, field)) == i for s in linears)}"
      for i, format in enumerate(formats)
    )
    offsets = np.concatenate([np.asarray(s.offsets) for s in linears])
    return {
      "linears by weight format": chosen(settings.weight_formats, "weight_format"),
      "linears by activation format": chosen(settings.activation_formats, "activation_format"),
      "channels with an offset above 0": f"{np.mean(offsets > 0):.1%}",
      "largest difference of folded and simulated logits, relative": f"{float(difference):.2e}",
    }

  report.tables.append(
    Table(
      f"The folded model, natural, {bits}/{bits}/{bits}",
      ["quantity", "value"],
      [list(row) for row in measurements.get("folded model", measure).items()],
      note="Pre-shifted activation codes times folded weight codes, against Q(x) Q(W).",
    )
  )
  if config.tasks:
    tasks = list(config.tasks)
    rows = []
    for name in ("full precision", FPQ, MINMAX_FP, BASELINE, MINMAX_INT, SMOOTHQUANT):

      def accuracies(name=name):
        model = base.model
        if name != "full precision":
          model, _ = quantize(config, model, tokens, name, bits)
        return zero_shot_accuracies(model, base.tokenizer, tasks, normalized=True)

      scores = [100 * share for share in measurements.get(f"zero-shot, {name}", accuracies)]
      rows.append([name, *scores, float(np.mean(scores)), PAPER_LLAMA_7B[name]])
    columns = [Column(name, ".1f") for name in (*tasks, "average", "paper, LLaMA-7B")]
    report.tables.append(
      Table(f"Zero-shot accuracy, {bits}/{bits}/{bits}", ["method", *columns], rows)
    )


@nnx.jit
def _logits(model: Decoder, tokens: jax.Array) -> jax.Array:
  return model(tokens)[0]


def plot_methods(config: ConfigDict, excess, workdir: pathlib.Path, report: Report) -> None:
  methods = list(next(iter(excess.values())))
  plots.bar_plot(
    workdir / "methods.png",
    methods,
    {variant: [float(np.mean(of[m])) for m in methods] for variant, of in excess.items()},
    ylabel="excess loss, nats per token",
    title=f"{config.bits}/{config.bits}/{config.bits} bits (embeddings/weights/activations)",
    log=True,
  )
  report.figures.append(
    Figure(
      "Loss of quantization",
      "methods.png",
      "Nats per token above full precision, mean over seeds; logarithmic.",
    )
  )
