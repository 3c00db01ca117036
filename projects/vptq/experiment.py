"""VPTQ against its baselines on one model: the paper's tables and claims at the config's size."""

import functools
import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.decoding.generation import generate
from common.evaluation.harness import require_harness, zero_shot_accuracies
from common.evaluation.multiple_choice import choice_accuracy, continuation_questions
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel, base_model
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.vptq.blocks import model_hessians
from projects.vptq.methods import (
  Method,
  ablations,
  calibration,
  held_out_windows,
  main_methods,
  quantize_vptq,
)


class Outcome(NamedTuple):
  """What the tables need of a method's result; the bits and proxy errors are `Quantized`'s."""

  index_bits: float
  bits: float
  proxy_errors: dict[str, list[float]] | None
  losses: WindowLosses
  seconds: float


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  require_harness(config.tasks)
  base = base_model(config.model)
  windows = held_out_windows(config, base)
  measurements = Measurements(workdir, config, (Outcome, WindowLosses))
  full = measurements.get("full precision", lambda: window_losses(base.model, windows))
  report = Report(tables=[], figures=[], claims=[])
  results: dict[str, list[Outcome]] = {}
  for seed in track(config.seeds, "VPTQ", console=Console(stderr=True)):
    tokens = calibration(config, base, seed)
    hessians = functools.cache(functools.partial(model_hessians, base.model, tokens))
    key = jax.random.key(seed)
    for method in main_methods(config, base.model, tokens, hessians, key):
      measure = functools.partial(measure_method, method, windows)
      results.setdefault(method.name, []).append(
        measurements.get(f"{method.name}, seed {seed}", measure)
      )
    if seed == config.seeds[0]:
      ablated = measure_ablations(config, base, windows, hessians, key, measurements)
  main_table(config, full, results, workdir, report)
  lengths = ablation_table(config, full, results, ablated, report)
  stage_table(results["VPTQ, residual"][0].proxy_errors, report)
  report.claims.extend(claims(config, full, results, lengths))
  packed_model(config, base, method, results, windows, measurements, report)
  return report


def measure_method(method: Method, windows: np.ndarray) -> Outcome:
  """Quantizes with one method, and scores the windows (int32 [windows, seq])."""
  jax.block_until_ready(method.source())
  start = time.perf_counter()
  quantized = method.make()
  jax.block_until_ready(quantized.model)
  seconds = time.perf_counter() - start
  losses = window_losses(quantized.model, windows)
  return Outcome(quantized.index_bits, quantized.bits, quantized.proxy_errors, losses, seconds)


def measure_ablations(
  config, base: BaseModel, windows, hessians, key, measurements: Measurements
) -> list[tuple[str, str, Outcome]]:
  """(table, row, outcome) of the ablations beyond the main table."""
  rows = []
  for table, name, settings in ablations(config):
    make = lambda settings=settings: quantize_vptq(base.model, hessians(), settings, key)
    measure = functools.partial(measure_method, Method(name, hessians, make), windows)
    rows.append((table, name, measurements.get(f"ablation {len(rows)}, {name}", measure)))
  return rows


def _mean_proxy(outcome: Outcome) -> float | None:
  errors = outcome.proxy_errors
  return None if errors is None else float(np.mean([of[-1] for of in errors.values()]))


def main_table(
  config, full: WindowLosses, results: dict[str, list[Outcome]], workdir, report: Report
) -> None:
  rows = [["full precision", 32.0, 32.0, None, full.perplexity, None, None, None]]
  excess = {}
  for name, values in results.items():
    perplexities = [outcome.losses.perplexity for outcome in values]
    excess[name] = [outcome.losses.nats_per_token - full.nats_per_token for outcome in values]
    proxies = [_mean_proxy(outcome) for outcome in values]
    rows.append(
      [name, values[0].index_bits, values[0].bits]
      + [None if None in proxies else float(np.mean(proxies)), float(np.mean(perplexities))]
      + [float(np.std(perplexities, ddof=1)) if len(values) > 1 else None]
      + [float(np.mean(excess[name])), min(outcome.seconds for outcome in values)]
    )
  report.tables.append(
    Table(
      "About 2 bits per weight",
      [
        "method",
        Column("index bits", ".2f"),
        Column("stored bits", ".2f"),
        Column("proxy error", ".4f"),
        Column("perplexity", ".2f"),
        Column("sd over seeds", ".2f"),
        Column("nats per token above full precision", "+.4f"),
        Column("seconds", ".1f"),
      ],
      rows,
      note=(
        f"{len(config.seeds)} seeds: calibration draws and k-means starts. VPTQ: "
        f"v={config.vector_length}, k={config.num_centroids}; residual (v, k1, k2) = "
        f"{tuple(config.residual)}; outliers (fraction, v0, k0) = {tuple(config.outliers)}; RTN and "
        f"GPTQ INT{config.bits} in groups of {config.group_size}. Proxy error: mean over linears "
        "of tr(dW^T H dW) / tr(W^T H W), H of the full-precision stream (GPTQ calibrates on the "
        "quantized one; tuning aims at outputs, not at it). Seconds: the fastest seed's; with one "
        "seed they include compilation. Those of tuning come on top of VPTQ's."
      ),
    )
  )
  plots.bar_plot(
    workdir / "methods.png",
    [name.replace("VPTQ, ", "+ ") for name in excess],
    {"excess loss": [float(np.mean(v)) for v in excess.values()]},
    errors={"excess loss": [float(np.std(v)) for v in excess.values()]},
    ylabel="excess loss, nats per token",
    title="About 2 bits per weight",
  )
  report.figures.append(
    Figure(
      "Loss of quantization",
      "methods.png",
      "Above full precision; mean and standard deviation over seeds.",
    )
  )


def ablation_table(
  config,
  full: WindowLosses,
  results: dict[str, list[Outcome]],
  ablated: list[tuple[str, str, Outcome]],
  report: Report,
) -> dict[str, float]:
  """One table of all ablations on the first seed; returns {row: nats per token}."""
  label = f"v={config.vector_length}, k={config.num_centroids}"
  outcomes = [("main", label, results["VPTQ"][0])]
  if config.outliers:
    outliers = results["VPTQ, outliers"][0]
    outcomes.append(("outliers", f"{config.outliers[0]:.0%} outliers", outliers))
  outcomes += ablated
  rows = [
    [
      table,
      name,
      outcome.index_bits,
      outcome.bits,
      _mean_proxy(outcome),
      outcome.losses.perplexity,
      outcome.losses.nats_per_token - full.nats_per_token,
    ]
    for table, name, outcome in outcomes
  ]
  rows.sort(key=lambda r: ("main", "length", "outliers", "groups", "switches").index(r[0]))
  report.tables.append(
    Table(
      "Ablations of VPTQ, first seed",
      [
        "ablation",
        "setting",
        Column("index bits", ".2f"),
        Column("stored bits", ".2f"),
        Column("proxy error", ".4f"),
        Column("perplexity", ".2f"),
        Column("nats per token above full precision", "+.4f"),
      ],
      rows,
      note=(
        "The feedback, the weights of k-means and the joint channels of GPTVQ are ablated in the "
        "main table."
      ),
    )
  )
  return {name: outcome.losses.nats_per_token for _, name, outcome in outcomes}


def stage_table(errors: dict[str, list[float]], report: Report) -> None:
  """The proxy error after each stage of the two-stage variant, per kind of linear."""
  kinds: dict[str, list] = {}
  for path, error in errors.items():
    kinds.setdefault(path.split(".", 2)[2], []).append(error)
  rows = [[kind, *np.mean(values, axis=0).tolist()] for kind, values in kinds.items()]
  report.tables.append(
    Table(
      "Proxy error after each stage, two-stage variant, first seed",
      [
        "linear",
        Column("k-means", ".4f"),
        Column("pass", ".4f"),
        Column("pass with residual", ".4f"),
      ],
      rows,
      note="Mean over blocks.",
    )
  )


def claims(
  config,
  full: WindowLosses,
  results: dict[str, list[Outcome]],
  lengths: dict[str, float],
) -> list[Claim]:
  """The paper's statements, one number per seed."""
  nll = {name: [outcome.losses.nats_per_token for outcome in v] for name, v in results.items()}
  proxy = {name: [outcome.proxy_errors for outcome in v] for name, v in results.items()}
  mean = lambda name: list(map(_mean_proxy, results[name]))
  pair = lambda values, a, b: {a: values(a), b: values(b)}

  def worst_ratio(a: str, b: str) -> list[float]:
    return [max(x[p][-1] / y[p][-1] for p in x) for x, y in zip(proxy[a], proxy[b], strict=True)]

  loss = nll.__getitem__
  less = lambda statement, values, a, b: Claim.less(statement, pair(values, a, b))
  found = [
    less(
      "Hessian weights lower the proxy error of k-means (mean over linears)",
      mean,
      "weighted k-means",
      "k-means",
    ),
    less(
      "feedback lowers the proxy error of weighted k-means (mean over linears)",
      mean,
      "VPTQ",
      "weighted k-means",
    ),
    Claim.less(
      "feedback lowers it on every linear (worst ratio of VPTQ to weighted k-means)",
      worst_ratio("VPTQ", "weighted k-means"),
      1.0,
    ),
    less("VPTQ has lower loss than GPTQ (nats per token)", loss, "VPTQ", "GPTQ"),
    less("VPTQ has lower loss than weighted k-means", loss, "VPTQ", "weighted k-means"),
    less("one channel at a time beats v at once (nats per token)", loss, "VPTQ", "GPTVQ-like"),
    less(
      "one channel at a time beats v at once (proxy error, mean over linears)",
      mean,
      "VPTQ",
      "GPTVQ-like",
    ),
    less(
      "layer-wise tuning lowers the loss (nats per token)", loss, "VPTQ, layer-wise tuned", "VPTQ"
    ),
    less(
      "tuning end to end lowers it further (nats per token)",
      loss,
      "VPTQ, tuned end to end",
      "VPTQ, layer-wise tuned",
    ),
    Claim.greater(
      "VPTQ stays above full precision (nats per token)",
      [value - full.nats_per_token for value in loss("VPTQ")],
    ),
  ]
  if config.outliers:
    found.append(
      less("outlier channels lower the loss (nats per token)", loss, "VPTQ, outliers", "VPTQ")
    )
  if config.vector_lengths:
    ordered = [f"v={v}, k={k}" for v, k in sorted(config.vector_lengths)]
    longest, shortest = ordered[-1], ordered[0]
    found.append(
      Claim.less(
        "longer vectors lose less at equal index bits (nats per token, first seed)",
        {longest: [lengths[longest]], shortest: [lengths[shortest]]},
      )
    )
  return found


def packed_model(
  config,
  base: BaseModel,
  last: Method,
  results: dict[str, list[Outcome]],
  windows,
  measurements: Measurements,
  report: Report,
) -> None:
  """What a user takes home: the last tuned model with packed indices, its speed and its answers."""
  questions = continuation_questions(
    windows[: config.choice_questions], choice_length=8, num_choices=4, seed=0
  )
  prompt = windows[0][:24].tolist()

  def use(model) -> list[float]:
    losses = window_losses(model, windows)  # The first call compiles.
    start = time.perf_counter()
    window_losses(model, windows)
    scoring = windows.size / (time.perf_counter() - start)
    generate(model, [prompt], max_new_tokens=24)
    start = time.perf_counter()
    (continuation,) = generate(model, [prompt], max_new_tokens=24)
    decoding = len(continuation) / (time.perf_counter() - start)
    accuracy = choice_accuracy(model, questions).accuracy
    tasks = zero_shot_accuracies(model, base.tokenizer, config.tasks)
    return [losses.perplexity, scoring, decoding, accuracy, *tasks]

  rows = [
    ["full precision", 32.0, *measurements.get("full precision, use", lambda: use(base.model))],
    [
      f"{last.name}, packed",
      results[last.name][-1].bits,
      *measurements.get(f"{last.name}, use", lambda: use(last.make().packed)),
    ],
  ]
  report.tables.append(
    Table(
      "The packed model",
      [
        "model",
        Column("stored bits", ".2f"),
        Column("perplexity", ".2f"),
        Column("scored tokens/s", ".0f"),
        Column("decoded tokens/s", ".0f"),
        Column("choice accuracy", ".3f"),
        *[Column(task, ".3f") for task in config.tasks],
      ],
      rows,
      note=(
        f"Of the last seed. {len(questions)} questions: which of four 8-token endings belongs to "
        "the window (chance: 0.25). Speeds are of this machine, as busy as it was."
      ),
    )
  )
