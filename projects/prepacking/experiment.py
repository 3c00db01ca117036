"""Prepacking beside padded batches: agreement, counted costs, time, and where the gain comes from."""

import dataclasses
import functools
import pathlib
import time

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.decoding.bin_packing import best_fit_decreasing, fewest_bins, one_per_bin
from common.decoding.prepacking import check_model
from common.errors import UserError
from common.models.base import base_model
from common.models.decoder import Decoder, DecoderConfig
from common.models.llama_sizes import LLAMA_SIZES
from common.reporting.report import Report
from projects.prepacking import tables
from projects.prepacking.accounting import flops, kv_slots, largest_batch, slots
from projects.prepacking.agreement import agreement
from projects.prepacking.batching import (
  FULL,
  ORDERED,
  PREPACKING,
  Batch,
  Prompts,
  batchings,
  full_batching,
  pack_batch,
)
from projects.prepacking.measurements import Counts, Draw, Packing, Results
from projects.prepacking.prompts import draw, encode, equal_prompts, load_texts
from projects.prepacking.timing import Programs, time_methods


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Draws prompts for every seed, and counts and times every way of batching them."""
  check_config(config)
  base = base_model(config.model)
  check_model(base.model)
  texts = {source: load_texts(source, config.split) for source in dict.fromkeys(config.sources)}
  pools = [
    encode(texts[source], base.tokenizer, clip)
    for source, clip in zip(config.sources, config.clips)
  ]
  equal = equal_prompts(config.equal_source, base.tokenizer, config.split, config.clips[0])
  check_sizes(config, base.model.config, pools, equal)
  programs = Programs(base.model)
  agreements, timed, sweep = [], {size: [] for size in config.batch_sizes}, []
  for seed in track(config.seeds, "prepacking", console=Console(stderr=True)):
    prompts = draw(pools[0], config.prompts, seed)
    agreements.append(agreement(base.model, prompts[: config.checked_prompts], config.new_tokens))
    for size in config.batch_sizes:
      methods = batchings(prompts, size, seed)
      for name in (PREPACKING, FULL):
        methods[name] = methods[name][: config.timed_batches]
      if size != config.batch_sizes[0]:
        methods = {name: methods[name] for name in (PREPACKING, FULL)}
      timed[size].append(time_methods(programs, methods, config.new_tokens, config.repeats))
    sweep.append(sweep_lengths(config, programs, base.model.config, pools[0], equal, seed))
  by_method = lambda runs: {name: [one[name] for one in runs] for name in runs[0]}
  results = Results(
    agreements=agreements,
    counts={
      size: count_methods(config, pools[0], size, base.model.config) for size in config.batch_sizes
    },
    timed={size: by_method(runs) for size, runs in timed.items()},
    sweep=sweep,
    feasible=feasible_batches(config, pools[0]),
    packings=packings(config, pools[0]),
    distributions={
      (source, clip): count_methods(config, pool, config.batch_sizes[0], base.model.config)
      for source, clip, pool in zip(config.sources, config.clips, pools)
    },
    sizes=sweep_sizes(config, base.model.config, pools[0], equal),
    public_sizes={
      name: count_methods(config, pools[0], config.batch_sizes[0], size)
      for name, size in LLAMA_SIZES.items()
    },
  )
  return tables.report(config, results, base.model.config, workdir)


def check_config(config: ConfigDict) -> None:
  """Raises UserError for a value that cannot work."""
  positive = (
    "prompts", "checked_prompts", "new_tokens", "repeats", "timed_batches", "sweep_batch",
    "sweep_repeats", "packed_batches", "packed_prompts", "budget_prompts",
  )  # fmt: skip
  checks = [(config[name] > 0, name, "a positive number") for name in positive]
  checks += [
    (len(config.sources) > 0, "sources", "at least one"),
    (len(config.clips) == len(config.sources), "clips", "one for each of sources"),
    (all(clip > 1 for clip in config.clips), "clips", "at least 2 tokens each"),
    (len(config.seeds) > 0, "seeds", "at least one"),
    (
      len(config.batch_sizes) > 0 and all(0 < k <= config.prompts for k in config.batch_sizes),
      "batch_sizes",
      f"at least one, from 1 to prompts={config.prompts}",
    ),
    (
      len(config.sweep_long) > 2 and all(0 <= n <= config.sweep_batch for n in config.sweep_long),
      "sweep_long",
      f"at least three numbers from 0 to sweep_batch={config.sweep_batch}",
    ),
    (config.sweep_batch in config.sweep_long, "sweep_long", "with sweep_batch among them"),
    (config.checked_prompts <= config.prompts, "checked_prompts", "at most prompts"),
    (config.packed_prompts <= config.prompts, "packed_prompts", "at most prompts"),
    (config.budget_prompts <= config.feasible_prompts, "budget_prompts", "up to feasible_prompts"),
    (all(w > 0 and w % 32 == 0 for w in config.widths), "widths", "multiples of 32"),
  ]
  for holds, name, expected in checks:
    if not holds:
      raise UserError(f"{name}={config[name]}: expected {expected}; set --config.{name}")


def check_sizes(
  config: ConfigDict, model: DecoderConfig, pools: list[Prompts], equal: Prompts
) -> None:
  """Raises UserError for too few prompts, or longer ones than the model reads."""
  wanted = max(config.prompts, config.packed_batches * config.packed_prompts)
  for source, pool in zip(config.sources, pools):
    needed = wanted if pool is pools[0] else config.prompts
    if len(pool) < needed:
      raise UserError(
        f"{source} has {len(pool)} prompts, expected {needed}: lower --config.prompts and "
        "--config.packed_batches, or take another source"
      )
  if len(equal) < config.sweep_batch:
    raise UserError(
      f"{config.equal_source} has {len(equal)} windows of {config.clips[0]} tokens, expected "
      f"{config.sweep_batch}: lower --config.sweep_batch or the first of --config.clips"
    )
  longest = max(config.clips) + config.new_tokens
  if longest > model.max_position_embeddings:
    raise UserError(
      f"prompts of {max(config.clips)} tokens and {config.new_tokens} new ones take {longest} "
      f"positions, the model has {model.max_position_embeddings}: lower --config.clips"
    )


def count_methods(
  config: ConfigDict, pool: Prompts, batch_size: int, model: DecoderConfig
) -> dict[str, list[Counts]]:
  """{method: counts of each seed's prompts}."""
  found = {}
  for seed in config.seeds:
    methods = batchings(draw(pool, config.prompts, seed), batch_size, seed)
    for name, batches in methods.items():
      found.setdefault(name, []).append(count(batches, model))
  return found


def count(batches: list[Batch], model: DecoderConfig) -> Counts:
  each = [slots(batch) for batch in batches]
  return Counts(
    batches=len(batches),
    slots=sum(s.total for s in each),
    tokens=sum(s.tokens for s in each),
    dense_flops=sum(flops(batch, model) for batch in batches),
    kernel_flops=sum(flops(batch, model, "kernel") for batch in batches),
    peak_slots=max(s.in_pass for s in each),
    peak_kv_slots=max(kv_slots(batch)[1] for batch in batches),
  )


def sweep_lengths(
  config: ConfigDict,
  programs: Programs,
  model: DecoderConfig,
  pool: Prompts,
  equal: Prompts,
  seed: int,
) -> list[Draw]:
  """Batches of which more and more prompts are equally long: from heavy-tailed to equal lengths."""
  return [
    measured_draw(config, programs, model, mixed_batch(config, pool, equal, long, seed), long)
    for long in config.sweep_long
  ]


def mixed_batch(config: ConfigDict, pool: Prompts, equal: Prompts, long: int, seed: int) -> Prompts:
  """`long` prompts of the full length, and others from the pool."""
  short = draw(pool, config.sweep_batch, seed)[long:]
  return [*draw(equal, config.sweep_batch, seed)[:long], *short]


def measured_draw(
  config: ConfigDict, programs: Programs, model: DecoderConfig, prompts: Prompts, long: int
) -> Draw:
  packed, padded = pack_batch(prompts), Batch(prompts)
  methods = {PREPACKING: [packed], FULL: [padded]}
  timed = time_methods(programs, methods, config.new_tokens, config.sweep_repeats)
  new, old = timed[PREPACKING], timed[FULL]
  lengths = padded.lengths
  return Draw(
    long=long,
    reduction=len(prompts) / len(packed.bins),
    spread=max(lengths) - float(np.mean(lengths)),
    slots=slots(padded).total / slots(packed).total,
    flops=flops(padded, model) / flops(packed, model),
    prefill=old.prefill / new.prefill,
    first_token=old.first_token / new.first_token,
  )


def sweep_sizes(
  config: ConfigDict, model: DecoderConfig, pool: Prompts, equal: Prompts
) -> dict[int, Draw]:
  """The batch without long prompts of the first seed, on random models of other widths."""
  found = {}
  for width in config.widths:
    size = dataclasses.replace(
      model,
      hidden_size=width,
      intermediate_size=3 * width,
      num_heads=width // 32,
      num_kv_heads=width // 32,
      head_dim=32,
    )
    programs = Programs(Decoder(size, rngs=nnx.Rngs(config.seeds[0])))
    prompts = mixed_batch(config, pool, equal, 0, config.seeds[0])
    found[width] = measured_draw(config, programs, size, prompts, 0)
  return found


def feasible_batches(config: ConfigDict, pool: Prompts) -> dict[str, list[tuple[int, int]]]:
  """The largest batch within the slots that `budget_prompts` padded prompts take."""
  found = {PREPACKING: [], ORDERED: [], FULL: []}
  for seed in config.seeds:
    prompts = draw(pool, min(config.feasible_prompts, len(pool)), seed)
    budget = kv_slots(Batch(prompts[: config.budget_prompts]))[0]
    # The batch that must fit is the one with the longest prompts.
    longest_first = sorted(prompts, key=len, reverse=True)
    for name, ordered, make in (
      (PREPACKING, prompts, pack_batch),
      (ORDERED, longest_first, Batch),
      (FULL, prompts, Batch),
    ):
      cost = lambda some, which, make=make: kv_slots(make(some))[which]
      limits = [
        largest_batch(ordered, budget, functools.partial(cost, which=which)) for which in (0, 1)
      ]
      found[name].append(tuple(limits))
  return found


def packings(config: ConfigDict, pool: Prompts) -> dict[str, Packing]:
  """Greedy, exact and no packing on the same small batches."""
  wanted = config.packed_batches * config.packed_prompts
  prompts = draw(pool, wanted, config.seeds[0])
  batches = full_batching(prompts, config.packed_prompts)
  packers = {
    "best-fit decreasing": best_fit_decreasing,
    "integer program": fewest_bins,
    "no packing": one_per_bin,
  }
  found = {}
  for name, packer in packers.items():
    start = time.perf_counter()
    packed = [pack_batch(batch.prompts, packer) for batch in batches]
    seconds = (time.perf_counter() - start) / len(batches)
    each = [slots(batch) for batch in packed]
    mean = lambda values: float(np.mean(list(values)))
    found[name] = Packing(
      bins=mean(s.rows for s in each),
      slots=mean(s.in_pass for s in each),
      waste=mean(s.waste / s.in_pass for s in each),
      seconds=seconds,
    )
  return found
