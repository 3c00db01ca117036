"""Samples of the methods under a language model: one round after the other, all tasks in a batch."""

import functools
import hashlib
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict
from rich.progress import track

from common.decoding.constrained import (
  Completion,
  GrammarConstraint,
  Prompts,
  check_vocabulary,
  decode,
  read_prompts,
)
from common.decoding.generation import Sampling
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary, token_bytes
from common.errors import UserError
from common.models.base import BaseModel
from common.models.decoder import Decoder
from projects.gad.asap import asap_sample
from projects.gad.baselines import rejection_sample, unconstrained_sample
from projects.gad.tasks import Task
from projects.gad.trie import Trie

# What each method brings up of a sample; GCD has no trie.
PROPAGATION = {"ASAp": "root", "no propagation": "none", "last level": "last"}
METHODS = ("GCD", *PROPAGATION)


class Row(NamedTuple):
  """One row of the batch: a task under one seed, whose tries are its own."""

  task: Task
  seed: int
  masks: TokenMasks


class Sampled(NamedTuple):
  """What one method sampled.

  Attributes:
    completions: [samples][rows].
    seconds: of each round, float [samples].
    steps: tokens of its longest row, int [samples].
    tries: of each row after the last round; none for GCD.
    success: c~ of the empty prefix, float [samples, rows]; none for GCD.
  """

  completions: list[list[Completion]]
  seconds: np.ndarray
  steps: np.ndarray
  tries: list[Trie]
  success: np.ndarray

  @property
  def seconds_per_token(self) -> np.ndarray:
    """float [samples]: of a step of the whole batch."""
    return self.seconds / self.steps


class Unconstrained(NamedTuple):
  """Texts of the model without a grammar, for one row: drawn, and those of the grammar."""

  drawn: int
  accepted: list[list[int]]


def make_rows(config: ConfigDict, tasks: Sequence[Task], base: BaseModel) -> list[Row]:
  """Masks of every task; rows are task by task, seed by seed.

  Raises:
    UserError: a grammar is wrong or cannot be spelled, or the stop text is no token.
  """
  size = base.model.config.vocab_size
  if config.stop:
    stop = base.tokenizer.encode(config.stop, add_special_tokens=False).ids
    if len(stop) != 1:
      raise UserError(
        f"stop={config.stop!r} is {len(stop)} tokens: expected one; set --config.stop"
      )
    vocabulary = Vocabulary(token_bytes(base.tokenizer), stop[0], size)
  else:
    vocabulary = Vocabulary.of(base.tokenizer, size)
  rows = []
  for task in tasks:
    try:
      masks = TokenMasks(parse_ebnf(task.grammar), vocabulary)
    except UserError as e:
      raise UserError(f"task {task.name}: {e}") from None
    rows += [Row(task, seed, masks) for seed in config.seeds]
  return rows


def sample_rounds(
  config: ConfigDict,
  rows: Sequence[Row],
  base: BaseModel,
  tries: Mapping[str, list[Trie]],
  workdir: pathlib.Path,
) -> dict[str, Sampled]:
  """`config.samples` rounds of every method. Writes ASAp's tries to workdir/tries."""
  check_vocabulary(base.model, [row.masks for row in rows])
  prompts = read_prompts(base.model, token_ids(rows, base.tokenizer), config.new_tokens)
  completions = {method: [] for method in config.methods}
  seconds = {method: [] for method in config.methods}
  success = {method: [] for method in config.methods}
  for i in track(range(config.samples), description="samples", transient=True):
    for method in config.methods:
      # The first samples of all methods draw alike.
      key = jax.random.fold_in(jax.random.key(config.seeds[0]), i)
      begin = time.perf_counter()
      found = one_round(config, base.model, prompts, rows, method, tries.get(method), key)
      seconds[method].append(time.perf_counter() - begin)
      completions[method].append(found)
      success[method].append([np.exp(t.root.log_success) for t in tries.get(method, ())])
  folder = workdir / "tries"
  folder.mkdir(exist_ok=True)
  for row, trie in zip(rows, tries.get("ASAp", ())):
    trie.save(folder / trie_name(row), identity(config, row))
  length = lambda rounds: max(len(c.tokens) + c.complete for c in rounds)
  return {
    method: Sampled(
      completions[method],
      np.array(seconds[method]),
      np.array([length(found) for found in completions[method]]),
      tries.get(method, []),
      np.array(success[method]),
    )
    for method in config.methods
  }


def one_round(
  config: ConfigDict,
  model: Decoder,
  prompts: Prompts,
  rows: Sequence[Row],
  method: str,
  tries: Sequence[Trie] | None,
  key: jax.Array,
) -> list[Completion]:
  masks = [row.masks for row in rows]
  if method == "GCD":
    constraints = [GrammarConstraint(m) for m in masks]
    return decode(model, prompts, constraints, key=key, sampling=Sampling(config.temperature))
  return asap_sample(
    model,
    prompts,
    masks,
    tries,
    key=key,
    temperature=config.temperature,
    propagation=PROPAGATION[method],
  )


def token_ids(rows: Sequence[Row], tokenizer: tokenizers.Tokenizer) -> list[list[int]]:
  """The rows' prompts, with the special tokens of the tokenizer's own template."""
  return [tokenizer.encode(row.task.prompt).ids for row in rows]


def starting_tries(config: ConfigDict, rows: Sequence[Row]) -> dict[str, list[Trie]]:
  """The tries of every method that has them: empty, or for ASAp those of an earlier run.

  Raises:
    UserError: of `Trie.load`.
  """
  tries = {
    method: [Trie(row.masks.vocabulary.eos, config.max_nodes) for row in rows]
    for method in config.methods
    if method in PROPAGATION
  }
  if config.tries:
    folder = pathlib.Path(config.tries).expanduser()
    tries["ASAp"] = [Trie.load(folder / trie_name(row), identity(config, row)) for row in rows]
  return tries


def trie_name(row: Row) -> str:
  return f"{row.task.name}-{row.seed}.npz"


def identity(config: ConfigDict, row: Row) -> str:
  """What the tries of a row depend on."""
  text = "\0".join([row.task.prompt, row.task.grammar, config.stop])
  digest = hashlib.sha256(text.encode()).hexdigest()[:12]
  return (
    f"{config.model}, task {row.task.name} ({digest}), {config.new_tokens} tokens, temperature "
    f"{config.temperature:g}"
  )


def sample_unconstrained(
  config: ConfigDict, rows: Sequence[Row], base: BaseModel
) -> list[Unconstrained]:
  """The model's own texts for every row, and rejection sampling from them."""
  prompts = token_ids(rows, base.tokenizer)
  eos = rows[0].masks.vocabulary.eos
  count = config.unconstrained_samples

  @functools.cache
  def texts(batch: int) -> list[list[int] | None]:
    key = jax.random.fold_in(jax.random.key(config.seeds[0]), config.samples + batch)
    options = {"max_new_tokens": config.new_tokens, "temperature": config.temperature}
    return unconstrained_sample(base.model, prompts, eos, key=key, **options)

  found = []
  for i, row in enumerate(rows):
    draw = lambda batch, i=i: texts(batch)[i : i + 1]
    accepts = lambda tokens, masks=row.masks: is_text(masks, tokens)
    found.append(Unconstrained(count, rejection_sample(draw, accepts, count, count)[0]))
  return found


def is_text(masks: TokenMasks, tokens: list[int]) -> bool:
  """Whether tokens are a text of the grammar."""
  state = masks.read(tokens)
  return state is not None and masks.accepts(state)


def observed(
  sampled: Mapping[str, Sampled], row: int
) -> tuple[dict[str, list[tuple[int, ...] | None]], dict[tuple[int, ...], float]]:
  """Of one row: each method's texts in order (None: cut off), and log P of all of them."""
  texts, log_p = {}, {}
  for method, found in sampled.items():
    texts[method] = []
    for completion in (round_[row] for round_ in found.completions):
      text = tuple(completion.tokens) if completion.complete else None
      texts[method].append(text)
      if text is not None:
        log_p[text] = completion.log_p
  return texts, log_p
