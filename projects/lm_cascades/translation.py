"""A synthetic translation task on which length and difficulty are decoupled, and its two models.

A sentence fills a random subset of grammatical slots, in their order, with one of a few words
each; its length is uniform. Most words have one translation. *Context* words have two, and the
word before decides which: a better model learns the table. *Synonyms* have two at random: no model
knows, and deferring does not help. The number of such hard words is uniform, whatever the length.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from common.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step

PAD, EOS = 0, 1
SLOTS, WORDS_PER_SLOT = 24, 3
WORDS = SLOTS * WORDS_PER_SLOT
CONTEXT_WORDS, SYNONYMS = 14, 8
CLASSES = 4  # Of the word before a context word.
MIN_LENGTH, MOST_HARD = 2, 4
FIRST_WORD = EOS + 1
FIRST_SECOND_SENSE = FIRST_WORD + WORDS
VOCAB_SIZE = FIRST_SECOND_SENSE + CONTEXT_WORDS + SYNONYMS


class Language(NamedTuple):
  """The lexicon.

  Attributes:
    second_sense: int [words], token of a word's second translation, 0 where it has one only.
    synonym: bool [words], the translation is random.
    table: bool [words, classes], whether a context word takes its second sense after this class.
  """

  second_sense: np.ndarray
  synonym: np.ndarray
  table: np.ndarray


def make_language(rng: np.random.Generator) -> Language:
  """Draws which words are hard, and the senses of the context words."""
  hard = rng.permutation(WORDS)[: CONTEXT_WORDS + SYNONYMS]
  second_sense = np.zeros(WORDS, int)
  second_sense[hard] = FIRST_SECOND_SENSE + np.arange(len(hard))
  synonym = np.zeros(WORDS, bool)
  synonym[hard[CONTEXT_WORDS:]] = True
  return Language(second_sense, synonym, rng.random((WORDS, CLASSES)) < 0.5)


def make_pairs(
  language: Language, n: int, longest: int, rng: np.random.Generator
) -> tuple[list[list[int]], list[list[int]]]:
  """Draws sentences of up to `longest` words and their translations, as token ids without EOS."""
  is_hard = (language.second_sense > 0).reshape(SLOTS, WORDS_PER_SLOT)
  sources, targets = [], []
  for _ in range(n):
    length = rng.integers(MIN_LENGTH, longest + 1)
    slots = np.sort(rng.permutation(SLOTS)[:length])
    wanted = np.zeros(length, bool)
    wanted[rng.permutation(length)[: rng.integers(0, MOST_HARD + 1)]] = True
    source, target, before = [], [], 0
    for slot, hard in zip(slots, wanted):
      choices = np.flatnonzero(is_hard[slot] == hard)
      # A slot may have no word of the wanted kind.
      word = slot * WORDS_PER_SLOT + rng.choice(choices if len(choices) else WORDS_PER_SLOT)
      second = language.table[word, before % CLASSES]
      if language.synonym[word]:
        second = rng.random() < 0.5
      source.append(int(FIRST_WORD + word))
      has_second = language.second_sense[word] and second
      target.append(int(language.second_sense[word] if has_second else FIRST_WORD + word))
      before = word
    sources.append(source)
    targets.append(target)
  return sources, targets


def decode(tokens: list[int]) -> str:
  """Token ids as text: one name for each translation."""
  return " ".join(f"w{token}" for token in tokens)


def model_config(dim: int, num_layers: int) -> EncoderDecoderConfig:
  """A T5 v1.1 of `num_layers` layers in either stack, with tied embeddings."""
  return EncoderDecoderConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=dim,
    intermediate_size=2 * dim,
    num_layers=num_layers,
    num_decoder_layers=num_layers,
    num_heads=4,
    head_dim=dim // 4,
    activation="gelu_tanh",
    gated_mlp=True,
  )


def train_model(
  config: EncoderDecoderConfig,
  sources: list[list[int]],
  targets: list[list[int]],
  *,
  learning_rate: float,
  num_steps: int,
  batch_size: int,
  seed: int,
) -> EncoderDecoder:
  """Trains a model by teacher forcing; the same sizes are compiled once for all seeds."""
  longest = max(map(len, sources))
  tokens = np.full((len(sources), longest), PAD, np.int32)
  labels = np.full((len(targets), longest + 1), PAD, np.int32)
  for row, (source, target) in enumerate(zip(sources, targets)):
    tokens[row, longest - len(source) :] = source  # Left, as `generate` pads.
    labels[row, : len(target) + 1] = [*target, EOS]
  graphdef, params = nnx.split(EncoderDecoder(config, rngs=nnx.Rngs(seed)))
  optimizer, step_fn = _training_step(config, learning_rate, num_steps)
  state = train(
    init_train_state(params, optimizer, jax.random.key(seed)),
    step_fn,
    _batches(tokens, labels, batch_size, seed),
    num_steps=num_steps,
    quiet=True,
  )
  return nnx.merge(graphdef, state.params)


def _batches(tokens, labels, batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  while True:
    rows = rng.integers(0, len(tokens), batch_size)
    yield {"tokens": tokens[rows], "labels": labels[rows]}


@functools.cache
def _training_step(
  config: EncoderDecoderConfig, learning_rate: float, num_steps: int
) -> tuple[optax.GradientTransformation, StepFn]:
  optimizer = make_optimizer(
    learning_rate=learning_rate, num_steps=num_steps, warmup_steps=num_steps // 10
  )
  model = nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
  graphdef, _ = nnx.split(model)

  def loss_fn(params, batch, key):
    del key  # No dropout.
    tokens, labels = batch["tokens"], batch["labels"]
    inputs = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=PAD)
    model = nnx.merge(graphdef, params)
    logits = model(tokens, inputs, segment_ids=(tokens != PAD).astype(jnp.int32))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    is_label = labels != PAD
    return jnp.sum(nll, where=is_label), jnp.sum(is_label, dtype=jnp.float32)

  return optimizer, make_train_step(loss_fn, optimizer)
