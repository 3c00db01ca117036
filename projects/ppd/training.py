"""Students of one frozen teacher: prompt tokens of all kinds and Medusa heads, trained together.

They share every text, cut, rollout and step, so that each has the same budget; their parameters and
their optimizer states have nothing in common.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

from common.decoding.prompt_tokens import PromptTokens
from common.decoding.prompt_tree import ChainMask
from common.models.decoder import Decoder
from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step
from projects.ppd.medusa import initial_heads, initial_matched_heads, medusa_logits
from projects.ppd.ppd import (
  Prefixes,
  distillation_loss,
  greedy_rollout,
  hard_label_loss,
  initial_prompts,
  prompt_guesses,
  random_truncation,
  read_prefixes,
)

Array = jax.Array
Aggregation = Literal["mean", "learned", "hidden"]


class Student(NamedTuple):
  """What learns to guess.

  Attributes:
    kind: prompt tokens, Medusa heads, or Medusa heads of as many parameters as prompt tokens.
    ensemble: EPTs of a prompt token.
    mask: among them.
    aggregation: of their logits: a mean, learned weights, or weights from their hidden states.
    hard_labels: the teacher's tokens in place of its distributions.
  """

  kind: Literal["prompts", "medusa", "matched medusa"] = "prompts"
  ensemble: int = 1
  mask: ChainMask = "ensemble"
  aggregation: Aggregation = "mean"
  hard_labels: bool = False


class TrainSettings(NamedTuple):
  """AdamW without weight decay or warm-up, a cosine to zero.

  Attributes:
    learning_rate, medusa_learning_rate: of prompt tokens and of heads.
    num_steps: of texts_per_step texts each.
    texts_per_step: rows that are read in a step.
    cuts_per_text: prefixes of each; the paper's number is 1.
    distances: m.
  """

  learning_rate: float
  medusa_learning_rate: float
  num_steps: int
  texts_per_step: int
  cuts_per_text: int
  distances: int


class Texts(NamedTuple):
  """What prefixes are cut from.

  Attributes:
    tokens, segment_ids: int32 [texts, seq], padded on the left.
    spans: answers of each text, as slots; a text without a dialogue is one answer.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  spans: list[list[tuple[int, int]]]


def init_student(
  student: Student, model: Decoder, tokenizer: tokenizers.Tokenizer, distances: int
) -> Any:
  """Its parameters before training."""
  if student.kind == "medusa":
    return initial_heads(model, distances)
  if student.kind == "matched medusa":
    return initial_matched_heads(model, distances)
  return initial_prompts(model, tokenizer, distances, student.ensemble)


def num_trained(student: Student, parameters: Any) -> int:
  """How many numbers are trained."""
  return sum(x.size for x in jax.tree.leaves(trained(student, parameters)))


def trained(student: Student, parameters: Any) -> Any:
  """The part of the parameters that the student trains."""
  if student.kind != "prompts":
    return parameters
  unused = {"mean": ("bias", "gate"), "learned": ("gate",), "hidden": ()}[student.aggregation]
  return {name: x for name, x in parameters._asdict().items() if name not in unused}


def guesses(model: Decoder, student: Student, parameters: Any, prefixes: Prefixes) -> Array:
  """Logits of the tokens at distances 2 to m + 1, float32 [rows, m, vocab]."""
  if student.kind != "prompts":
    return medusa_logits(model, parameters, prefixes.hidden, None)
  return prompt_guesses(model, parameters, prefixes, student.mask)


def teach(
  model: Decoder,
  students: Mapping[str, Student],
  parameters: dict[str, Any],
  batch: dict[str, Array],
  distances: int,
) -> dict[str, Array]:
  """The loss of every student on one batch, float32 [rows].

  Args:
    model: the frozen teacher.
    students: by name.
    parameters: of each.
    batch: tokens and segment_ids, int32 [texts, seq], and cuts, int32 [texts, cuts].
    distances: m.
  """
  most = max(s.ensemble for s in students.values())
  room = distances * most + 1
  prefixes = read_prefixes(model, batch["tokens"], batch["segment_ids"], batch["cuts"], room)
  prefixes, labels = jax.lax.stop_gradient((prefixes, greedy_rollout(model, prefixes, distances)))
  losses = {}
  for name, student in students.items():
    logits = guesses(model, student, _freeze(student, parameters[name]), prefixes)
    losses[name] = (
      hard_label_loss(labels.tokens[:, 1:], logits)
      if student.hard_labels
      else distillation_loss(labels.logits, logits)
    )
  return losses


def _freeze(student: Student, parameters: Any) -> Any:
  if not isinstance(parameters, PromptTokens):
    return parameters
  free = trained(student, parameters)
  fixed = {n: jax.lax.stop_gradient(x) for n, x in parameters._asdict().items() if n not in free}
  return parameters._replace(**fixed)


@functools.cache
def training_step(
  graphdef: nnx.GraphDef, students: tuple[tuple[str, Student], ...], settings: TrainSettings
) -> tuple[optax.GradientTransformation, StepFn]:
  """The optimizer and the jitted step(state, batch, model state) that all seeds share."""
  students = dict(students)
  rate = lambda student: (
    settings.learning_rate if student.kind == "prompts" else settings.medusa_learning_rate
  )
  # Without clipping no student's gradient depends on another's.
  optimizer = optax.partition(
    {
      name: make_optimizer(
        learning_rate=rate(student), num_steps=settings.num_steps, b2=0.999, clip_norm=None
      )
      for name, student in students.items()
    },
    {name: name for name in students},
  )

  def loss_fn(parameters, batch, key, state):
    del key  # Nothing is random: cuts are in the batch.
    model = nnx.merge(graphdef, state)
    losses = teach(model, students, parameters, batch, settings.distances)
    rows = jnp.float32(batch["cuts"].size)
    sums = {name: loss.sum() for name, loss in losses.items()}
    return sum(sums.values()), rows, sums

  return optimizer, make_train_step(loss_fn, optimizer)


def train_students(
  model: Decoder,
  students: Mapping[str, Student],
  initial: dict[str, Any],
  texts: Texts,
  settings: TrainSettings,
  seed: int,
) -> dict[str, Any]:
  """Trains all students on the same cuts.

  Args:
    model: the frozen teacher.
    students, initial: by name, with their parameters before training.
    texts: more than are read in a step.
    settings: see `TrainSettings`.
    seed: of the order of the texts and of the cuts.

  Returns:
    The trained parameters by name.
  """
  graphdef, frozen = nnx.split(model)
  optimizer, step = training_step(graphdef, tuple(students.items()), settings)
  state = train(
    init_train_state(initial, optimizer, jax.random.key(seed)),
    lambda state, batch: step(state, batch, frozen),
    batches(texts, settings, seed),
    num_steps=settings.num_steps,
    unit="prefixes",
    description="prompt tokens",
    quiet=True,
  )
  return jax.tree.map(jnp.asarray, state.params)


def batches(texts: Texts, settings: TrainSettings, seed: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of texts and random cuts; every text once an epoch, with new cuts in each."""
  rng = np.random.default_rng(seed)
  size, count = settings.texts_per_step, len(texts.tokens)
  while True:
    order = rng.permutation(count)
    for start in range(0, count - size + 1, size):
      rows = order[start : start + size]
      cut = lambda row: random_truncation(rng, texts.spans[row], settings.distances)
      cuts = [[cut(row) for _ in range(settings.cuts_per_text)] for row in rows]
      yield {
        "tokens": texts.tokens[rows],
        "segment_ids": texts.segment_ids[rows],
        "cuts": np.array(cuts, np.int32),
      }
