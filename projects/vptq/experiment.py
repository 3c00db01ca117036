"""VPTQ against its baselines on one model: the paper's tables and claims at the config's size."""

import pathlib
import time

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
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.vptq.blocks import model_hessians, quantize_with_hessians
from projects.vptq.methods import (
  Quantized,
  ablations,
  calibration,
  held_out_windows,
  main_methods,
  quantize_vptq,
  residual_settings,
)


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every part that the config asks for."""
  require_harness(config.tasks)
  base = base_model(config.model)
  windows = held_out_windows(config, base)
  full = window_losses(base.model, windows)
  report = Report(tables=[], figures=[], claims=[])
  results: dict[str, list[tuple[Quantized, WindowLosses, float]]] = {}
  last = None
  for seed in track(config.seeds, "VPTQ", console=Console(stderr=True)):
    tokens = calibration(config, base, seed)
    hessians = model_hessians(base.model, tokens)
    key = jax.random.key(seed)
    for name, make in main_methods(config, base.model, tokens, hessians, key):
      start = time.perf_counter()
      quantized = make()
      jax.block_until_ready(quantized.model)
      seconds = time.perf_counter() - start
      losses = window_losses(quantized.model, windows)
      # Models are large: of all seeds only the last model that is shown is kept.
      if quantized.packed is not None:
        last = quantized._replace(model=None)
      results.setdefault(name, []).append(
        (quantized._replace(model=None, packed=None), losses, seconds)
      )
    if seed == config.seeds[0]:
      first = hessians, key
  main_table(config, full, results, workdir, report)
  lengths = ablation_tables(config, base, windows, full, results, *first, report)
  stage_table(config, base, *first, report)
  report.claims.extend(claims(config, full, results, lengths))
  packed_model(config, base, last, windows, report)
  return report


def _mean_nll(losses: WindowLosses) -> float:
  return float(losses.nll.mean() / losses.tokens)


def _mean_proxy(quantized: Quantized) -> float | None:
  proxies = quantized.proxy_errors
  return None if proxies is None else float(np.mean(list(proxies.values())))


def main_table(config, full: WindowLosses, results, workdir, report: Report) -> None:
  rows = [["full precision", 32.0, 32.0, None, full.perplexity, None, None, None]]
  excess = {}
  for name, values in results.items():
    quantized = values[0][0]
    perplexities = [losses.perplexity for _, losses, _ in values]
    excess[name] = [_mean_nll(losses) - _mean_nll(full) for _, losses, _ in values]
    proxies = [_mean_proxy(q) for q, _, _ in values]
    rows.append(
      [name, quantized.index_bits, quantized.bits]
      + [None if None in proxies else float(np.mean(proxies)), float(np.mean(perplexities))]
      + [float(np.std(perplexities, ddof=1)) if len(values) > 1 else None]
      + [float(np.mean(excess[name])), min(seconds for _, _, seconds in values)]
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


def ablation_tables(
  config, base: BaseModel, windows, full, results, hessians, key, report: Report
) -> dict[str, float]:
  """One table of all ablations on the first seed; returns {row: nats per token}."""
  reference, reference_losses, _ = results["VPTQ"][0]
  row = lambda table, name, quantized, losses: [
    table,
    name,
    quantized.index_bits,
    quantized.bits,
    _mean_proxy(quantized),
    losses.perplexity,
    _mean_nll(losses) - _mean_nll(full),
  ]
  label = f"v={config.vector_length}, k={config.num_centroids}"
  rows = [row("main", label, reference, reference_losses)]
  if config.outliers:
    outliers, losses, _ = results["VPTQ, outliers"][0]
    rows.append(row("outliers", f"{config.outliers[0]:.0%} outliers", outliers, losses))
  nll = {label: _mean_nll(reference_losses)}
  for table, name, method in ablations(config):
    quantized = quantize_vptq(name, base.model, hessians, method, key)
    losses = window_losses(quantized.model, windows)
    nll[name] = _mean_nll(losses)
    rows.append(row(table, name, quantized, losses))
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
  return nll


def stage_table(config, base: BaseModel, hessians, key, report: Report) -> None:
  """The proxy error after each stage of the two-stage variant, per kind of linear."""
  _, errors = quantize_with_hessians(base.model, hessians, residual_settings(config), key)
  kinds: dict[str, list] = {}
  for path, error in errors.items():
    kinds.setdefault(path.split(".", 2)[2], []).append([float(e) for e in error])
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


def claims(config, full: WindowLosses, results, lengths: dict[str, float]) -> list[Claim]:
  """The paper's statements, one number per seed."""
  nll = {name: [_mean_nll(losses) for _, losses, _ in v] for name, v in results.items()}
  proxy = {name: [q.proxy_errors for q, _, _ in v] for name, v in results.items()}
  mean = lambda name: [float(np.mean(list(errors.values()))) for errors in proxy[name]]
  pair = lambda values, a, b: {a: values(a), b: values(b)}

  def worst_ratio(a: str, b: str) -> list[float]:
    return [max(x[path] / y[path] for path in x) for x, y in zip(proxy[a], proxy[b], strict=True)]

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
      [value - _mean_nll(full) for value in loss("VPTQ")],
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


def packed_model(config, base: BaseModel, last: Quantized, windows, report: Report) -> None:
  """What a user takes home: the last tuned model with packed indices, its speed and its answers."""
  questions = continuation_questions(
    windows[: config.choice_questions], choice_length=8, num_choices=4, seed=0
  )
  prompt = windows[0][:24].tolist()
  rows = []
  for name, model, bits in (
    ("full precision", base.model, 32.0),
    (f"{last.name}, packed", last.packed, last.bits),
  ):
    losses = window_losses(model, windows)  # The first call compiles.
    start = time.perf_counter()
    window_losses(model, windows)
    scoring = windows.size / (time.perf_counter() - start)
    generate(model, [prompt], max_new_tokens=24)
    start = time.perf_counter()
    (continuation,) = generate(model, [prompt], max_new_tokens=24)
    decoding = len(continuation) / (time.perf_counter() - start)
    accuracy = choice_accuracy(model, questions).accuracy
    rows.append([name, bits, losses.perplexity, scoring, decoding, accuracy])
    rows[-1] += zero_shot_accuracies(model, base.tokenizer, config.tasks)
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
