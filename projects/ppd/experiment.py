"""Parallel prompt decoding beside Medusa heads, other trees and speculative decoding."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.decoding.generation import Sampling, generate
from common.decoding.parallel_prompt import Acceptance, Statistics, parallel_prompt_generate
from common.decoding.prompt_tokens import PromptTokens, check_prompt_tokens
from common.decoding.prompt_tree import Trees, load_prompts, save_prompts, tree_tables
from common.decoding.speculative import constant, speculative_generate
from common.errors import UserError
from common.models.base import BaseModel, base_model
from common.models.decoder import Decoder
from common.reporting.report import Report
from projects.ppd import tables
from projects.ppd.accuracy import (
  GreedyTexts,
  continue_prompts,
  guess_ranks,
  rank_frequencies,
  replay,
)
from projects.ppd.compile_steps import bounded_seconds, size_of
from projects.ppd.draft_decoding import draft_and_verify
from projects.ppd.latency import clocked, pass_seconds
from projects.ppd.prompt_lookup import lookup_acceptance_length
from projects.ppd.prompts import load_prompts as draw_prompts
from projects.ppd.prompts import load_texts
from projects.ppd.settings import (
  DYNAMIC,
  MATCHED,
  MEDUSA,
  PPD,
  RANDOM,
  STATIC,
  UNTRAINED,
  ablated_students,
  check_config,
  check_models,
  main_students,
  train_settings,
)
from projects.ppd.sparse_tree import (
  TreeSet,
  best_size,
  head_trees,
  random_trees,
  search,
  static_trees,
)
from projects.ppd.training import Student, Texts, init_student, num_trained, train_students


class Material(NamedTuple):
  """What one seed draws.

  Attributes:
    texts: to train on.
    validation, test: greedy texts, those of the test source by source.
    validation_prompts, prompts: what they continue, token ids.
  """

  texts: Texts
  validation: GreedyTexts
  test: GreedyTexts
  validation_prompts: list[list[int]]
  prompts: list[list[int]]


class SeedResult(NamedTuple):
  """What one seed measured.

  Attributes:
    accuracies: a[i, r] of each student, on the validation texts and on the test's, [m, RANKS].
    trees: {method: {size: TreeSet}}.
    statistics: {method: {size: Statistics}}, on the test's texts.
    lookup: tau of prompt lookup decoding.
    differing: texts of the engine that are not the model's own.
    engine: what the engine counted at the chosen size.
    replayed: what `replay` says of the same.
    trained: numbers that each student trains.
    train_seconds: of all students together.
  """

  accuracies: dict[str, np.ndarray]
  test_accuracies: dict[str, np.ndarray]
  trees: dict[str, dict[int, TreeSet]]
  statistics: dict[str, dict[int, Statistics]]
  lookup: float
  differing: int
  engine: Statistics
  replayed: Statistics
  trained: dict[str, int]
  train_seconds: float


class Timing(NamedTuple):
  """The clock, on the first seed.

  Attributes:
    seconds, again: L(N) of every size, measured twice.
    single: L(1).
    size: N by the hardware-aware rule.
    plain, decoded: tokens per second of `generate` and of the engine, one prompt at a time.
    typical: tau of typical acceptance at the config's temperature.
    table_bytes: of prompt tokens and trees.
    model_bytes: of the model.
  """

  seconds: list[float]
  again: list[float]
  single: float
  size: int
  plain: float
  decoded: float
  typical: float
  table_bytes: int
  model_bytes: int


class Composition(NamedTuple):
  """Speculative decoding with a plain draft model and with one that has prompt tokens.

  Attributes:
    size: inputs of a pass of the draft model.
    passes: {name: (target's and draft's passes of a token)}.
    seconds: L of the draft model with 1 and with `size` inputs, of the target with K + 1.
    differing: texts that are not the target's own.
  """

  size: int
  passes: dict[str, tuple[float, float]]
  seconds: tuple[float, float, float]
  differing: int


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Trains prompt tokens for every seed, builds their trees and decodes."""
  check_config(config)
  base = base_model(config.model)
  draft = base_model(config.draft).model if config.draft else None
  check_models(base.model, draft)
  sizes = [1, *config.sizes]
  clock = lambda: pass_seconds(
    base.model,
    sizes,
    context=config.prompt_length + config.new_tokens,
    repeats=config.latency_repeats,
  )
  seconds, again = clock(), clock()
  # L(1) and L(N) that choose the size: this machine's, or the bound of a chip that is not at hand.
  latencies = seconds
  if config.tpu:
    sizes_of = size_of(config.tpu_model or config.model)
    context = config.prompt_length + config.new_tokens
    latencies = bounded_seconds(sizes_of, config.tpu, sizes, context=context)
  results, size, first = {}, None, None
  for seed in track(config.seeds, "PPD", console=Console(stderr=True)):
    material = draw(config, base, seed)
    parameters, trained, spent = train_seed(config, base, material, seed)
    measured = measure_trees(config, base.model, material, parameters, seed)
    if size is None:
      size = chosen_size(config, measured[2], latencies[1:])
    trees = tables_of(config, measured[2][DYNAMIC][size], size)
    save_prompts(workdir / f"prompts_{seed}.safetensors", parameters[PPD], trees)
    decoded = decode(config, base.model, material, parameters[PPD], trees)
    results[seed] = SeedResult(
      *measured,
      lookup=lookup_acceptance_length(
        material.test.tokens[:, : -config.distances],
        material.test.segment_ids[:, : -config.distances],
        config.new_tokens + 1,
      ),
      differing=decoded.differing,
      engine=decoded.statistics,
      replayed=measured[3][DYNAMIC][size],
      trained=trained,
      train_seconds=spent,
    )
    if first is None:
      first = material
      timing = Timing(
        seconds[1:],
        again[1:],
        seconds[0],
        size,
        decoded.plain,
        decoded.prompted,
        typical_acceptance(config, base.model, material, parameters[PPD], trees),
        sum(x.nbytes for x in jax.tree.leaves((parameters[PPD], trees))),
        sum(x.nbytes for x in jax.tree.leaves(nnx.state(base.model))),
      )
  report = Report(tables=[], figures=[], claims=[])
  tables.report_accuracies(config, results, workdir, report)
  tables.report_trees(config, results, timing, workdir, report)
  if config.tpu:
    tables.report_bound(config, results[config.seeds[0]].trees[DYNAMIC], latencies, report)
  tables.report_cost(config, results, timing, report)
  if config.ablation_steps:
    tables.report_ablations(config, ablations(config, base, first, config.seeds[0]), report)
  if draft is not None:
    tables.report_composition(config, compose(config, base, draft, first), report)
  tables.report_claims(config, results, timing, report)
  return report


def draw(config: ConfigDict, base: BaseModel, seed: int) -> Material:
  """Texts and prompts of a seed; validation and test come from splits that are not trained on."""
  tokenizer = base.tokenizer
  texts = load_texts(
    config.train_source,
    tokenizer,
    count=config.train_texts,
    length=config.text_length,
    shortest=config.shortest_prefix,
    distances=config.distances,
    seed=seed,
  )
  if len(texts.tokens) < config.texts_per_step:
    raise UserError(
      f"{config.train_source} has {len(texts.tokens)} texts, fewer than "
      f"texts_per_step={config.texts_per_step}: take fewer or another source"
    )
  options = {"length": config.prompt_length, "seed": seed}
  validation = draw_prompts(
    config.validation_source,
    tokenizer,
    split="validation",
    count=config.validation_prompts,
    **options,
  )
  test = [
    prompt
    for source in config.test_sources
    for prompt in draw_prompts(
      source, tokenizer, split="test", count=config.test_prompts, **options
    )
  ]
  # One token more is the root of the last round, and m are what it guesses.
  count = config.new_tokens + config.distances
  write = lambda prompts: continue_prompts(base.model, prompts, count, config.generate_batch)
  return Material(texts, write(validation), write(test), validation, test)


def train_seed(
  config: ConfigDict, base: BaseModel, material: Material, seed: int
) -> tuple[dict[str, Any], dict[str, int], float]:
  """Parameters of all students and of the untrained prompt tokens, their sizes, seconds."""
  students = main_students(config)
  initial = {
    name: init_student(student, base.model, base.tokenizer, config.distances)
    for name, student in students.items()
  }
  start = time.perf_counter()
  if config.prompt_tokens:
    found = initial | {PPD: read_prompt_tokens(config, base.model)}
  else:
    settings = train_settings(config, config.num_steps)
    found = train_students(base.model, students, initial, material.texts, settings, seed)
    jax.block_until_ready(found)
  spent = time.perf_counter() - start
  trained = {name: num_trained(students[name], found[name]) for name in students}
  return found | {UNTRAINED: initial[PPD]}, trained, spent


def read_prompt_tokens(config: ConfigDict, model: Decoder) -> PromptTokens:
  """Those of an earlier run; raises UserError if they are not of the config's kind."""
  prompt_tokens = PromptTokens(**load_prompts(config.prompt_tokens)[0])
  check_prompt_tokens(model, prompt_tokens)
  found, expected = prompt_tokens.bias.shape, (config.distances, config.ensemble)
  if found != expected:
    raise UserError(
      f"{config.prompt_tokens} has {found} prompt tokens and EPTs, expected {expected}: set "
      "--config.distances and --config.ensemble"
    )
  return prompt_tokens


def measure_trees(
  config: ConfigDict, model: Decoder, material: Material, parameters: dict[str, Any], seed: int
):
  """The first four fields of `SeedResult`."""
  students = main_students(config)
  ranks = lambda texts: _ranks(model, students, parameters, texts)
  validation, test = ranks(material.validation), ranks(material.test)
  accuracies = {name: rank_frequencies(x) for name, x in validation.items()}
  trees = {size: trees_of_size(accuracies, size, config.ensemble, seed) for size in config.sizes}
  by_method = {name: {n: trees[n][name] for n in config.sizes} for name in trees[config.sizes[0]]}
  rank_of = {DYNAMIC: PPD, STATIC: PPD, RANDOM: PPD}
  statistics = {}
  for name, sets in by_method.items():
    found = replay(
      test[rank_of.get(name, name)],
      [tree_set.trees for tree_set in sets.values()],
      nodes=max(config.sizes),
    )
    statistics[name] = dict(zip(sets, found))
  test_accuracies = {name: rank_frequencies(x) for name, x in test.items()}
  return accuracies, test_accuracies, by_method, statistics


def _ranks(
  model: Decoder, students: Mapping[str, Student], parameters: dict[str, Any], texts: GreedyTexts
) -> dict[str, np.ndarray]:
  """Of the students and of the untrained prompt tokens."""
  everyone = dict(students) | {UNTRAINED: students[PPD]}
  return guess_ranks(model, everyone, parameters, texts)


def trees_of_size(
  accuracies: dict[str, np.ndarray], size: int, ensemble: int, seed: int
) -> dict[str, TreeSet]:
  """Every method's trees, each from its own accuracies."""
  dynamic = search(accuracies[PPD], size, ensemble=ensemble)
  found = {
    DYNAMIC: dynamic,
    STATIC: static_trees(accuracies[PPD], size, ensemble=ensemble),
    RANDOM: random_trees(accuracies[PPD], dynamic, size, seed, ensemble=ensemble),
    UNTRAINED: search(accuracies[UNTRAINED], size, ensemble=ensemble),
  }
  heads = [name for name in (MEDUSA, MATCHED) if name in accuracies]
  return found | {name: head_trees(accuracies[name], size) for name in heads}


def chosen_size(config: ConfigDict, trees, seconds: list[float]) -> int:
  """N by the hardware-aware rule, from what the dynamic trees promise."""
  promised = lambda size: trees[DYNAMIC][size].tokens_per_pass
  return best_size(list(config.sizes), promised, seconds)


def tables_of(config: ConfigDict, trees: TreeSet, size: int) -> Trees:
  """Gather tables that all seeds share the shape of."""
  most = 1 + (size - 1 - config.distances * config.ensemble) // (1 + config.ensemble)
  return tree_tables(trees.trees, ensemble=config.ensemble, kind=config.mask, size=size, nodes=most)


class Decoded(NamedTuple):
  """statistics of the engine; tokens per second without and with prompt tokens."""

  statistics: Statistics
  differing: int
  plain: float
  prompted: float


def decode(
  config: ConfigDict, model: Decoder, material: Material, prompt_tokens: PromptTokens, trees: Trees
) -> Decoded:
  """The test's prompts one at a time, by `generate` and by the engine."""
  count = config.new_tokens + 1
  plain = lambda prompts: generate(model, prompts, max_new_tokens=count)
  prompted = lambda prompts: parallel_prompt_generate(
    model, prompt_tokens, trees, prompts, max_new_tokens=count
  )
  texts, plain_seconds = clocked(plain, material.prompts)
  found, prompted_seconds = clocked(prompted, material.prompts)
  differing = sum(a != b for a, (b, _) in zip(texts, found))
  statistics = jax.tree.map(lambda *rows: jnp.concatenate(rows), *[s for _, s in found])
  tokens = count * len(texts)
  return Decoded(statistics, differing, tokens / plain_seconds, tokens / prompted_seconds)


def typical_acceptance(
  config: ConfigDict, model: Decoder, material: Material, prompt_tokens: PromptTokens, trees: Trees
) -> float:
  """tau at the config's temperature, all prompts in a batch."""
  _, statistics = parallel_prompt_generate(
    model,
    prompt_tokens,
    trees,
    material.prompts,
    max_new_tokens=config.new_tokens + 1,
    sampling=Sampling(config.temperature),
    acceptance=Acceptance(config.epsilon, config.alpha),
    key=jax.random.key(0),
  )
  return statistics.acceptance_length


def ablations(
  config: ConfigDict, base: BaseModel, material: Material, seed: int
) -> dict[str, tuple[int, np.ndarray]]:
  """Trained numbers and test accuracies of every kind of prompt tokens, trained together."""
  students = ablated_students(config)
  initial = {
    name: init_student(student, base.model, base.tokenizer, config.distances)
    for name, student in students.items()
  }
  settings = train_settings(config, config.ablation_steps)
  parameters = train_students(base.model, students, initial, material.texts, settings, seed)
  ranks = guess_ranks(base.model, students, parameters, material.test)
  return {
    name: (num_trained(student, parameters[name]), rank_frequencies(ranks[name]))
    for name, student in students.items()
  }


def compose(config: ConfigDict, base: BaseModel, draft: Decoder, material: Material) -> Composition:
  """Speculative decoding with and without prompt tokens on the draft model; the first seed."""
  seed, count = config.seeds[0], config.new_tokens
  students = {PPD: main_students(config)[PPD]}
  initial = {PPD: init_student(students[PPD], draft, base.tokenizer, config.distances)}
  settings = train_settings(config, config.num_steps)
  parameters = train_students(draft, students, initial, material.texts, settings, seed)
  written = continue_prompts(
    draft, material.validation_prompts, count + config.distances, config.generate_batch
  )
  accuracies = rank_frequencies(guess_ranks(draft, students, parameters, written)[PPD])
  context = config.prompt_length + config.new_tokens
  options = {"context": context, "repeats": config.latency_repeats}
  single, *seconds = pass_seconds(draft, [1, *config.draft_sizes], **options)
  found = {n: search(accuracies, n, ensemble=config.ensemble) for n in config.draft_sizes}
  size = best_size(list(found), lambda n: found[n].tokens_per_pass, seconds)
  (verify,) = pass_seconds(base.model, [config.drafts + 1], **options)
  trees = tables_of(config, found[size], size)
  first = material.test.tokens.shape[1] - material.test.new_tokens
  expected = material.test.tokens[:, first : first + count].tolist()
  plain_texts, plain = speculative_generate(
    base.model,
    draft,
    material.prompts,
    max_new_tokens=count,
    policy=constant(config.drafts),
    max_drafts=config.drafts,
  )
  texts, prompted = draft_and_verify(
    base.model,
    draft,
    parameters[PPD],
    trees,
    material.prompts,
    max_new_tokens=count,
    drafts=config.drafts,
  )
  total = len(texts) * count
  passes = {
    "draft model": (int(plain.target_calls.sum()) / total, int(plain.drafted.sum()) / total),
    "draft model with PPD": (
      int(prompted.target_calls.sum()) / total,
      int(prompted.draft_calls.sum()) / total,
    ),
  }
  differing = sum(a != b for a, b in zip([*plain_texts, *texts], expected * 2))
  draft_seconds = seconds[list(found).index(size)]
  return Composition(size, passes, (single, draft_seconds, verify), differing)
