"""Tables, figures and claims of a run."""

import pathlib

import numpy as np
from ml_collections import ConfigDict
from scipy.stats import spearmanr

from common.models.decoder import DecoderConfig
from common.models.llama_sizes import LLAMA_SIZES
from common.reporting.plots import bar_plot, line_plot
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.prepacking.accounting import kv_bytes_per_slot
from projects.prepacking.batching import DATASET, FULL, ORDERED, PREPACKING
from projects.prepacking.measurements import Results

# Sheared-LLaMA 1.3B, MMLU, batches of 64, one A6000 (the official README): seconds per batch, MB.
PAPER = {PREPACKING: (0.441, 4578), FULL: (2.299, 34600), ORDERED: (0.658, 22950)}


def report(
  config: ConfigDict, results: Results, model: DecoderConfig, workdir: pathlib.Path
) -> Report:
  return Report(
    tables=[
      _agreement(results),
      *(_counts(config, results, model, size) for size in config.batch_sizes),
      *(_timed(results, size) for size in config.batch_sizes),
      _feasible(config, results),
      _sweep(config, results),
      *([_sizes(config, results, model)] if config.widths else []),
      _distributions(config, results),
      _packers(config, results),
      _public_sizes(config, results),
    ],
    figures=[
      _cost_figure(config, results, workdir),
      _sweep_figure(results, workdir),
    ],
    claims=_claims(config, results),
  )


def _agreement(results) -> Table:
  rows = [
    ["prepacked, segment ids, a length per row", _worst(results, "logits")],
    ["prepacked, dense mask, left-padded cache", _worst(results, "reference_logits")],
    ["padded batch", _worst(results, "padded_logits")],
  ]
  differ = sum(a.tokens for a in results.agreements)
  compared = sum(a.compared for a in results.agreements)
  return Table(
    "Logits of the first new token, against one prompt at a time",
    ["prefill", Column("largest difference", ".1e")],
    rows,
    f"Greedy tokens after the prepacked prefill that differ: {differ} of {compared}.",
  )


def _worst(results, name: str) -> float:
  return max(getattr(a, name) for a in results.agreements)


def _counts(config, results, model, size: int) -> Table:
  bytes_per_slot = kv_bytes_per_slot(model, 4)
  rows = []
  for name, counts in results.counts[size].items():
    mean = lambda f, counts=counts: float(np.mean([f(c) for c in counts]))
    rows.append(
      [
        name,
        mean(lambda c: c.batches),
        mean(lambda c: c.slots / c.tokens),
        mean(lambda c: 1 - c.tokens / c.slots),
        mean(lambda c: c.dense_flops / 1e9),
        mean(lambda c: c.kernel_flops / 1e9),
        mean(lambda c: c.peak_slots),
        mean(lambda c: c.peak_slots * bytes_per_slot / 1e6),
        mean(lambda c: c.peak_kv_slots * bytes_per_slot / 1e6),
      ]
    )
  columns = [
    "batching",
    Column("batches", ".1f"),
    Column("slots / tokens", ".3f", "lower"),
    Column("padded share", ".3f", "lower"),
    Column("GFLOP, masked", ".1f", "lower"),
    Column("GFLOP, blocks skipped", ".1f", "lower"),
    Column("peak slots", ".0f", "lower"),
    Column("peak KV, MB", ".1f", "lower"),
    Column("and unpacked", ".1f", "lower"),
  ]
  note = (
    f"{config.prompts} prompts of {config.sources[0]}, at most {config.clips[0]} tokens; mean of "
    f"{len(config.seeds)} seeds. Counted, without padding to buckets; slots include the tokens that "
    "are held back."
  )
  return Table(f"Counted costs, batches of {size}", columns, rows, note)


def _timed(results, size: int) -> Table:
  found = results.timed[size]
  median = lambda name, field: float(np.mean([getattr(t, field) for t in found[name]]))
  ours = median(PREPACKING, "prefill")
  rows = []
  for name, runs in found.items():
    paper = PAPER.get(name, (None, None)) if size == 64 else (None, None)
    device = [t.device_peak_bytes / 1e6 for t in runs if t.device_peak_bytes is not None]
    rows.append(
      [
        name,
        1e3 * median(name, "prefill"),
        1e3 * median(name, "first_token"),
        median(name, "prompts_per_second"),
        median(name, "prefill") / ours,
        None if paper[0] is None else paper[0] / PAPER[PREPACKING][0],
        median(name, "peak_bytes") / 1e6,
        max(device, default=None),
        paper[1],
      ]
    )
  columns = [
    "batching",
    Column("prefill, ms/batch", ".1f"),
    Column("TTFT, ms/batch", ".1f"),
    Column("prompts/s", ".0f", "higher"),
    Column("prefill / prepacking", ".2f"),
    Column("paper", ".2f"),
    Column("peak memory, MB", ".0f", "lower"),
    Column("on the device, MB", ".0f"),
    Column("paper, MB", ".0f"),
  ]
  note = (
    "Means over seeds of medians over runs; a batch of dataset prepacking has more prompts than the "
    "others. Memory is the compiler's plan of the largest batch's prefill, without parameters."
  )
  return Table(f"Timed, batches of {size}", columns, rows, note)


def _feasible(config, results) -> Table:
  rows = []
  for name, limits in results.feasible.items():
    of_pass, with_unpacked = np.mean(limits, axis=0)
    rows.append([name, float(of_pass), float(with_unpacked)])
  note = (
    f"Prompts of a batch within the token slots of {config.budget_prompts} padded prompts, of a list "
    f"of {config.feasible_prompts} in random order (length-ordered: the longest first)."
  )
  columns = [
    "batching",
    Column("slots of the pass", ".1f", "higher"),
    Column("with the unpacked cache", ".1f", "higher"),
  ]
  return Table("Largest batch", columns, rows, note)


def _sweep(config, results) -> Table:
  rows = []
  for draws in zip(*results.sweep):
    rows.append([float(np.mean(values)) for values in zip(*draws)])
  note = (
    f"Batches of {config.sweep_batch}, of which some are {config.clips[0]} tokens long and the "
    f"others docstrings; means over seeds of full-batching over prepacking."
  )
  return Table("Speed-up by the distribution of lengths", _draw_columns("long"), rows, note)


def _draw_columns(first: str) -> list:
  return [
    Column(first, ".0f"),
    Column("k / B", ".2f"),
    Column("max - mean", ".0f"),
    Column("slots", ".2f"),
    Column("FLOPs", ".2f"),
    Column("prefill time", ".2f"),
    Column("TTFT", ".2f"),
  ]


def _sizes(config, results, model) -> Table:
  base = results.sweep[0][config.sweep_long.index(0)] if 0 in config.sweep_long else None
  found = dict(results.sizes) | ({model.hidden_size: base} if base else {})
  rows = [[width, *draw[1:]] for width, draw in sorted(found.items())]
  note = "The first seed's batch without long prompts; other widths are random models."
  return Table("Speed-up by the width of the model", _draw_columns("width"), rows, note)


def _distributions(config, results) -> Table:
  rows = []
  for (source, clip), methods in results.distributions.items():
    ratio = lambda name, field, methods=methods: float(
      np.mean(_ratios(methods[name], methods[PREPACKING], field))
    )
    ours = [c.slots / c.tokens for c in methods[PREPACKING]]
    rows.append(
      [
        source,
        clip,
        float(np.mean([c.tokens for c in methods[FULL]])) / config.prompts,
        float(np.mean(ours)),
        ratio(FULL, "slots"),
        ratio(ORDERED, "slots"),
        ratio(FULL, "dense_flops"),
        ratio(FULL, "kernel_flops"),
      ]
    )
  columns = [
    "prompts",
    "at most",
    Column("mean tokens", ".0f"),
    Column("slots / tokens, prepacking", ".3f"),
    Column("slots, full", ".2f"),
    Column("slots, length-ordered", ".2f"),
    Column("FLOPs, full", ".2f"),
    Column("FLOPs, full, blocks skipped", ".2f"),
  ]
  note = f"Batches of {config.batch_sizes[0]}; ratios to prepacking, means over seeds."
  return Table("By data set", columns, rows, note)


def _ratios(a, b, field: str) -> list[float]:
  """Of each seed, a / b."""
  return [getattr(x, field) / getattr(y, field) for x, y in zip(a, b)]


def _packers(config, results) -> Table:
  rows = [[name, p.bins, p.slots, p.waste, 1e3 * p.seconds] for name, p in results.packings.items()]
  columns = [
    "packer",
    Column("rows", ".2f", "lower"),
    Column("slots", ".0f", "lower"),
    Column("waste", ".3f", "lower"),
    Column("ms", ".2f", "lower"),
  ]
  note = f"Means over {config.packed_batches} batches of {config.packed_prompts} prompts."
  return Table("Packers", columns, rows, note)


def _public_sizes(config, results) -> Table:
  rows = []
  for name, methods in results.public_sizes.items():
    full, ours = methods[FULL], methods[PREPACKING]
    per_slot = kv_bytes_per_slot(LLAMA_SIZES[name], 2) / 1e9
    mean = lambda values: float(np.mean(list(values)))
    rows.append(
      [
        name,
        mean(a.dense_flops / b.dense_flops for a, b in zip(full, ours)),
        mean(a.kernel_flops / b.kernel_flops for a, b in zip(full, ours)),
        per_slot * mean(c.peak_slots for c in full),
        per_slot * mean(c.peak_slots for c in ours),
        per_slot * mean(c.peak_kv_slots for c in ours),
      ]
    )
  columns = [
    "model",
    Column("FLOPs, full / prepacking", ".2f"),
    Column("blocks skipped", ".2f"),
    Column("peak KV, full, GB", ".1f"),
    Column("prepacking", ".1f"),
    Column("and unpacked", ".1f"),
  ]
  note = (
    f"Counted on the same tokens, batches of {config.batch_sizes[0]}, keys and values in bfloat16."
  )
  return Table("Public models", columns, rows, note)


def _cost_figure(config, results, workdir) -> Figure:
  names = list(next(iter(results.counts.values())))
  series = {
    f"batches of {size}": [
      float(np.mean([c.slots / c.tokens for c in methods[name]])) for name in names
    ]
    for size, methods in results.counts.items()
  }
  bar_plot(workdir / "slots.png", names, series, ylabel="token slots / tokens")
  return Figure("Token slots per token", "slots.png", "What each way of batching computes.")


def _sweep_figure(results, workdir) -> Figure:
  # Those of each number of long prompts together.
  mean = lambda draws, field: float(np.mean([getattr(d, field) for d in draws]))
  points = sorted(zip(*results.sweep), key=lambda draws: mean(draws, "reduction"))
  line = lambda field: [mean(draws, field) for draws in points]
  x = line("reduction")
  line_plot(
    workdir / "speedup.png",
    {
      "counted FLOPs": (x, line("flops")),
      "prefill time": (x, line("prefill")),
      "time to first token": (x, line("first_token")),
    },
    xlabel="prompts per packed row, k / B",
    ylabel="full-batching / prepacking",
  )
  return Figure("Speed-up", "speedup.png", "The sweep over lengths, means over seeds.")


def _claims(config, results) -> list[Claim]:
  agreements = results.agreements
  claims = [
    Claim.less(
      "first logits are those of each prompt alone (largest difference)",
      [a.logits for a in agreements],
      1e-4,
    ),
    Claim.less(
      "greedy tokens are those of each prompt alone (tokens that differ)",
      [a.tokens for a in agreements],
      1,
    ),
  ]
  for size in config.batch_sizes:
    counts, timed = results.counts[size], results.timed[size]
    ours, full = counts[PREPACKING], counts[FULL]
    ordered, dataset = counts[ORDERED], counts[DATASET]
    padded_peak = [min(a.peak_slots, b.peak_slots) for a, b in zip(full, ordered)]
    of = f"batches of {size}: "
    claims += [
      Claim.less(of + "prepacking's slots / tokens", [c.slots / c.tokens for c in ours], 1.15),
      Claim.greater(of + "slots, full-batching / prepacking", _ratios(full, ours, "slots"), 2),
      Claim.less(
        of + "slots, dataset prepacking / length-ordered", _ratios(dataset, ordered, "slots"), 1
      ),
      Claim.less(
        of + "largest pass, prepacking / the smaller of both padded ones",
        [c.peak_slots / peak for c, peak in zip(ours, padded_peak)],
        0.5,
      ),
      Claim.greater(
        of + "prefill time, full-batching / prepacking",
        _ratios(timed[FULL], timed[PREPACKING], "prefill"),
        1.5,
      ),
    ]
  equal = [next(d for d in draws if d.long == config.sweep_batch) for draws in results.sweep]
  for name, field in (("slots", "slots"), ("prefill time", "prefill")):
    values = [getattr(d, field) for d in equal]
    claims += [
      Claim.greater(f"equal lengths: {name}, full-batching / prepacking, is at least", values, 0.9),
      Claim.less(f"equal lengths: {name}, full-batching / prepacking, is at most", values, 1.15),
    ]
  for name, field in (("counted FLOPs", "flops"), ("prefill time", "prefill")):
    claims.append(
      Claim.greater(
        f"the gain in {name} grows with k / B (rank correlation)",
        [
          spearmanr([d.reduction for d in draws], [getattr(d, field) for d in draws]).statistic
          for draws in results.sweep
        ],
        0.8,
      )
    )
  return claims
