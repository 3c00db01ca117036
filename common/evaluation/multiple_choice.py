"""Multiple choice by log-likelihood, as EleutherAI's harness scores it: no generation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from common.evaluation.log_likelihood import log_likelihoods


class Question(NamedTuple):
  """A context and its possible continuations, as token ids.

  Attributes:
    context: at least one token.
    choices: each at least one token.
    answer: index of the right one.
    num_chars: characters of each choice's text, by which `accuracy_norm` divides, as the harness
      does. None divides by tokens, which depends on the tokenizer.
  """

  context: Sequence[int]
  choices: Sequence[Sequence[int]]
  answer: int
  num_chars: Sequence[int] | None = None


class ChoiceAccuracy(NamedTuple):
  """Share of questions whose right choice has the highest log-likelihood.

  Attributes:
    accuracy: by the sum over the choice's tokens.
    accuracy_norm: by the sum over the choice's tokens divided by its length, see `Question`.
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
    ValueError: there is no question, or a context or choice is empty, or `num_chars` is not one
      positive number per choice.
  """
  rows = [(q.context, choice) for q in questions for choice in q.choices]
  if not rows:
    raise ValueError("choice_accuracy needs questions with choices")
  for q in questions:
    if q.num_chars is not None and (len(q.num_chars) != len(q.choices) or min(q.num_chars) < 1):
      raise ValueError(f"num_chars={q.num_chars}: expected {len(q.choices)} positive numbers")
  totals = [total for total, _ in log_likelihoods(model, rows, batch_size=batch_size)]
  right, right_norm, row = 0, 0, 0
  for question in questions:
    sums = totals[row : row + len(question.choices)]
    sizes = question.num_chars or [len(choice) for choice in question.choices]
    means = np.divide(sums, sizes)
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
