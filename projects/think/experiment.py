"""ThinK on text and on recall, beside keys' norms, random channels, SnapKV, H2O and KIVI."""

import collections
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decoder_config
from common.data.pipelines import token_windows
from common.data.tokenizer import eos_id
from common.decoding.eviction import snapkv_scores
from common.decoding.pruned_cache import Compression, check_supported, pruned_slots
from common.errors import UserError
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.reporting.measurements import Measurements
from common.reporting.report import Report
from projects.think import analysis, longbench, tables
from projects.think.evaluation import Prompts
from projects.think.recall import recall_rows, recall_size, train_recall
from projects.think.study import (
  RANDOM,
  SCORES,
  Kivi,
  Measured,
  Sizes,
  Study,
  equal_bytes_capacity,
  repeat_kv_heads,
)
from projects.think.think import query_driven_scores
from projects.think.timing import HEAD_DIM, time_decoding

# {what: one measurement per seed}
Results = dict[tuple, list[Measured]]
# (seed, its index) -> prompts
DrawPrompts = Callable[[int, int], Prompts]


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs a preset.

  Raises:
    UserError: sizes that do not fit, a file or model that cannot be read.
  """
  check(config)
  questions = (
    longbench.read_questions(config.longbench, config.longbench_format, config.longbench_rows)
    if config.longbench
    else []
  )
  check_supported(decoder_config(config.model))
  base = base_model(config.model)
  studied = {}
  if config.text_rows:
    studied["text"] = study_text(config, base)
  if config.recall_rows:
    model = train_recall(config)
    studied["recall"] = study_recall(config, model)
    studied["grid"] = needle_grid(config, model)
  timed = {}
  if config.timed_slots:
    for ratio in (0.0, 0.4, 0.6, 0.8):
      timed[ratio] = time_decoding(config.timed_slots, int(ratio * HEAD_DIM))
  answered = {}
  if questions:
    answered = answer_questions(config, base, questions, Measurements(workdir, config))
  return tables.report(config, studied, timed, answered, workdir)


def check(config: ConfigDict) -> None:
  """Raises a UserError for sizes that do not fit, before anything is read or trained."""
  if config.longbench and config.longbench_metric not in longbench.METRICS:
    known = ", ".join(longbench.METRICS)
    raise UserError(f"longbench_metric={config.longbench_metric!r}: expected one of {known}")
  if not (config.text_rows or config.recall_rows or config.longbench):
    raise UserError("nothing to do: set text_rows, recall_rows or longbench")
  for ratio in (*config.ratios, *config.partner_ratios, config.main_ratio, *config.value_ratios):
    if not 0 <= ratio < 1:
      raise UserError(f"pruning ratio {ratio}: expected 0 to below 1")
  prompts = {
    "prompt_length": (config.prompt_length, sizes_of(config)),
    "recall_haystack + recall_asked": (
      config.recall_haystack + config.recall_asked,
      sizes_of(config, "recall_"),
    ),
  }
  for name, (length, sizes) in prompts.items():
    if not max(sizes.recent, sizes.window) <= sizes.capacity <= length:
      raise UserError(
        f"{name} is {length} tokens: expected recent={sizes.recent} and window={sizes.window} to "
        f"fit into capacity={sizes.capacity}, and this into the prompt"
      )
  if config.recall_rows and not (
    config.recall_asked <= config.recall_needles <= config.recall_symbols
    and config.recall_needles <= min(config.recall_haystack, *config.grid_lengths)
    and max(config.grid_lengths) <= config.recall_haystack
  ):
    raise UserError(
      f"recall_asked={config.recall_asked} must be at most recall_needles={config.recall_needles}, "
      f"these at most recall_symbols={config.recall_symbols} and any haystack, and grid_lengths "
      f"at most recall_haystack={config.recall_haystack}"
    )
  for name, (length, sizes) in prompts.items():
    kivi = Compression(query_driven_scores, recent=sizes.recent, **kivi_of(config)._asdict())
    full = length - pruned_slots(length, kivi)
    if full >= config.residual:
      raise UserError(
        f"{full} tokens of {name}={length} are in front of whole groups of {config.group}, expected "
        f"fewer than residual={config.residual}: raise it or lower the group"
      )
  if config.longbench:
    for capacity in config.longbench_capacities:
      longbench_compression(config, capacity, 0.0)


def sizes_of(config: ConfigDict, prefix: str = "") -> Sizes:
  return Sizes(*(config[f"{prefix}{name}"] for name in Sizes._fields))


def kivi_of(config: ConfigDict) -> Kivi:
  return Kivi(*(config[name] for name in Kivi._fields))


def study_text(config: ConfigDict, base: BaseModel) -> dict:
  """Windows of text: prompt and continuation, other windows for every seed."""
  seq = config.prompt_length + config.new_tokens
  windows = token_windows(config.text_source, base.tokenizer, split="test", seq_len=seq).tokens
  rows = config.text_rows
  if len(windows) < rows * len(config.seeds):
    raise UserError(
      f"{config.text_source} has {len(windows)} windows of {seq} tokens, expected text_rows={rows} "
      f"for each of {len(config.seeds)} seeds: lower text_rows"
    )
  order = np.random.default_rng(0).permutation(len(windows))
  scored = np.ones(config.new_tokens, bool)
  scored[-1] = False

  def prompts(seed: int, index: int) -> Prompts:
    del seed  # Seeds take different windows of one order.
    tokens = windows[order[index * rows : (index + 1) * rows]]
    return Prompts(tokens, np.ones_like(tokens), config.prompt_length, scored)

  return study(config, base.model, prompts, sizes_of(config))


def study_recall(config: ConfigDict, model: Decoder) -> dict:
  """Needles at random depths."""

  def prompts(seed: int, index: int) -> Prompts:
    del index
    rng = np.random.default_rng([seed, 1])
    rows = recall_rows(rng, config.recall_rows, **recall_size(config))
    tokens = np.concatenate(rows, axis=1)
    return Prompts(tokens, np.ones_like(tokens), rows.prompt.shape[1], answers_scored(config))

  return study(config, model, prompts, sizes_of(config, "recall_"))


def answers_scored(config: ConfigDict, first: bool = False) -> np.ndarray:
  """Which continuation tokens' successors are asked for: the keys' (the first one's only)."""
  scored = np.arange(2 * config.recall_asked) % 2 == 0
  return scored & (np.arange(len(scored)) == 0) if first else scored


def study(config: ConfigDict, model: Decoder, prompts: DrawPrompts, sizes: Sizes) -> dict:
  """All settings on every seed's prompts.

  Returns:
    results, the studies' kept facts of the first seed, and bytes of each cache.
  """
  kivi = kivi_of(config)
  results: Results = collections.defaultdict(list)
  shares = []
  for index, seed in enumerate(config.seeds):
    s = Study(model, prompts(seed, index), sizes, jax.random.key(seed))
    add = lambda key, measured: results[key].append(measured)
    add(("dense",), s.measure(s.dense))
    for ratio in config.ratios:
      for score in (*SCORES, RANDOM):
        add(("score", score, ratio), s.pruned(ratio, score))
    for name in s.evictions:
      for ratio in (0.0, *config.partner_ratios):
        add((name, ratio), s.evicted(name, ratio))
    for ratio in config.partner_ratios:
      fewer = equal_bytes_capacity(sizes, s.head_dim, ratio)
      add(("fewer tokens", ratio), s.evicted("SnapKV", 0.0, fewer))
    for ratio in (0.0, *config.partner_ratios):
      add(("KIVI", ratio), s.quantized(kivi, ratio))
    for recent in config.ablate_recent:
      add(("recent", recent), s.pruned(config.ablation_ratio, recent=recent))
    for window in config.ablate_window:
      add(("window", window), s.pruned(config.ablation_ratio, window=window))
    for ratio in config.value_ratios:
      add(("values", ratio), s.values_pruned(ratio))
      add(("keys and values", ratio), s.values_pruned(ratio, ratio))
    if model.config.num_heads != model.config.num_kv_heads:
      per_head = Study(repeat_kv_heads(model), s.prompts, sizes, s.key)
      for ratio in config.partner_ratios:
        add(("per head", ratio), per_head.pruned(ratio))
    norms = analysis.channel_norms(s.dense)
    shares.append(analysis.energy_share(norms))
    if index == 0:
      first = s
  facts = {"norms": analysis.channel_norms(first.dense), "energy shares": shares}
  facts["singular values"] = analysis.singular_values(first.dense)
  channels = min(config.exhaustive_channels, first.head_dim)
  facts["exhaustive"] = analysis.exhaustive(first.dense, channels, channels // 2, sizes.window)
  return {"results": dict(results), "facts": facts, "bytes": cache_bytes(config, first, kivi)}


def cache_bytes(config: ConfigDict, s: Study, kivi: Kivi) -> dict[tuple, int]:
  """Bytes of one prompt's cache, {(partner, ratio): bytes}, of the real caches' shapes."""
  found = {}
  evict = {"evict": s.evictions["SnapKV"], "capacity": s.sizes.capacity}
  for ratio in (0.0, *config.partner_ratios):
    found["none", ratio] = s.num_bytes(s.compression(ratio))
    found["SnapKV", ratio] = found["H2O", ratio] = s.num_bytes(s.compression(ratio, **evict))
    fewer = evict | {"capacity": equal_bytes_capacity(s.sizes, s.head_dim, ratio)}
    found["fewer tokens", ratio] = s.num_bytes(s.compression(0.0, **fewer))
    found["KIVI", ratio] = s.num_bytes(s.compression(ratio, **kivi._asdict()))
  return found


def needle_grid(config: ConfigDict, model: Decoder) -> dict[float, np.ndarray]:
  """Accuracy of the first asked needle by its depth and the haystack's length.

  Returns:
    {ratio: [lengths, depths]}, mean over seeds.
  """
  cells = [(length, depth) for length in config.grid_lengths for depth in config.grid_depths]
  rows = max(1, config.recall_rows // len(cells))
  sizes, asked = recall_size(config), config.recall_asked
  ratios = (0.0, *config.ratios)
  found = {ratio: np.zeros(len(cells)) for ratio in ratios}
  for seed in config.seeds:
    rng = np.random.default_rng([seed, 2])
    seq = config.recall_haystack + 3 * asked
    tokens = np.zeros((len(cells) * rows, seq), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, (length, depth) in enumerate(cells):
      drawn = recall_rows(rng, rows, **sizes | {"haystack": length}, depth=depth)
      at = slice(i * rows, (i + 1) * rows), slice(config.recall_haystack - length, None)
      tokens[at], segment_ids[at] = np.concatenate(drawn, axis=1), 1
    length = config.recall_haystack + asked
    prompts = Prompts(tokens, segment_ids, length, answers_scored(config, first=True))
    s = Study(model, prompts, sizes_of(config, "recall_"), jax.random.key(seed))
    for ratio in ratios:
      correct = s.row_accuracy(ratio)
      found[ratio] += correct.reshape(len(cells), rows).mean(axis=1) / len(config.seeds)
  shape = len(config.grid_lengths), len(config.grid_depths)
  return {ratio: cells.reshape(shape) for ratio, cells in found.items()}


def answer_questions(
  config: ConfigDict,
  base: BaseModel,
  questions: Sequence[longbench.Question],
  measurements: Measurements,
) -> dict[tuple, float]:
  """LongBench's score, {(capacity, ratio): score}; (0, 0) is the full cache."""
  stop = eos_id(base.tokenizer)
  compressions: dict[tuple, Compression | None] = {(0, 0.0): None}
  for capacity in config.longbench_capacities:
    for ratio in (0.0, *config.partner_ratios):
      compressions[capacity, ratio] = longbench_compression(config, capacity, ratio)

  def measure(compression: Compression | None) -> float:
    texts = longbench.answer(
      base.model,
      base.tokenizer,
      questions,
      compression,
      prompt_length=config.prompt_length,
      max_new_tokens=config.new_tokens,
      stop_tokens=() if stop is None else (stop,),
    )
    return longbench.score(texts, questions, config.longbench_metric)

  return {
    (capacity, ratio): measurements.get(
      f"LongBench, {capacity or 'all'} tokens kept, ratio {ratio}",
      functools.partial(measure, compression),
    )
    for (capacity, ratio), compression in compressions.items()
  }


def longbench_compression(config: ConfigDict, capacity: int, ratio: float) -> Compression:
  """SnapKV, then ThinK."""
  return Compression(
    query_driven_scores,
    ratio=ratio,
    recent=config.recent,
    window=config.window,
    evict=snapkv_scores,
    capacity=capacity,
  )
