"""Multiple choice by log-likelihood, as EleutherAI's harness scores it: no generation."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Array = jax.Array

_LENGTH_BUCKET = 32


class Question(NamedTuple):
  """A context and its possible continuations, as token ids.

  Attributes:
    context: at least one token.
    choices: each at least one token.
    answer: index of the right one.
  """

  context: Sequence[int]
  choices: Sequence[Sequence[int]]
  answer: int


class ChoiceAccuracy(NamedTuple):
  """Share of questions whose right choice has the highest log-likelihood.

  Attributes:
    accuracy: by the sum over the choice's tokens.
    accuracy_norm: by the mean over the choice's tokens.
    num_questions: how many were asked.
  """

  accuracy: float
  accuracy_norm: float
  num_questions: int


def choice_accuracy(
  model: nnx.Module, questions: Sequence[Question], *, batch_size: int = 32
) -> ChoiceAccuracy:
  """Asks the model every question.

  Args:
    model: a decoder; called as model(tokens, segment_ids=...) -> (logits, cache).
    questions: at least one.
    batch_size: (question, choice) rows per forward pass.

  Raises:
    ValueError: there is no question, or a context or choice is empty.
  """
  rows = [(q.context, choice) for q in questions for choice in q.choices]
  if not rows or not all(len(context) and len(choice) for context, choice in rows):
    raise ValueError("choice_accuracy needs questions with non-empty contexts and choices")
  longest = max(len(context) + len(choice) for context, choice in rows)
  # Whole batches of one length: one compilation.
  shape = len(rows) + -len(rows) % batch_size, longest + -longest % _LENGTH_BUCKET
  tokens, segment_ids, scored = (np.zeros(shape, np.int32) for _ in range(3))
  for row, (context, choice) in enumerate(rows):
    end = len(context) + len(choice)
    tokens[row, :end] = [*context, *choice]
    segment_ids[row, :end] = 1
    scored[row, len(context) : end] = 1
  graphdef, state = nnx.split(model)
  batches = [
    x.reshape(-1, batch_size, shape[1]) for x in map(np.asarray, (tokens, segment_ids, scored))
  ]
  totals = np.concatenate([_log_likelihood(graphdef, state, *batch) for batch in zip(*batches)])
  right, right_norm, row = 0, 0, 0
  for question in questions:
    sums = totals[row : row + len(question.choices)]
    means = sums / np.array([len(choice) for choice in question.choices])
    right += int(np.argmax(sums) == question.answer)
    right_norm += int(np.argmax(means) == question.answer)
    row += len(question.choices)
  count = len(questions)
  return ChoiceAccuracy(right / count, right_norm / count, count)


def continuation_questions(
  windows: np.ndarray, *, choice_length: int, num_choices: int, seed: int
) -> list[Question]:
  """Asks which text goes on: the window's own end, or the ends of other windows.

  Args:
    windows: int32 [windows, seq], at least `num_choices`.
    choice_length: tokens at the end of a window that are the choice.
    num_choices: the right one included.
    seed: of the other choices and of the place of the right one.
  """
  rng = np.random.default_rng(seed)
  questions = []
  for i, window in enumerate(windows):
    others = rng.choice(len(windows) - 1, num_choices - 1, replace=False)
    rows = [j + (j >= i) for j in others.tolist()]
    answer = int(rng.integers(num_choices))
    rows.insert(answer, i)
    choices = [windows[row, -choice_length:].tolist() for row in rows]
    questions.append(Question(window[:-choice_length].tolist(), choices, answer))
  return questions


@functools.partial(jax.jit, static_argnums=0)
def _log_likelihood(graphdef, state, tokens, segment_ids, scored) -> Array:
  """Sum of log p over the tokens marked in `scored`, float32 [rows]; all inputs [rows, seq]."""
  logits, _ = nnx.merge(graphdef, state)(tokens, segment_ids=segment_ids)
  log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
  picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
  return jnp.sum(picked * scored[:, 1:], axis=1)
