"""GSM8K: grade-school word problems, answered after a few-shot chain of thought.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168; prompt and answer
extraction as in the task `gsm8k` of EleutherAI's harness. Files are the official ones: JSON lines
with `question` and `answer`; an answer computes in `<<3*14=42>>` marks and ends with `#### 42`.
"""

import decimal
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import tokenizers

from common.decoding.generation import Sampling
from common.errors import UserError
from common.evaluation.items import read_items
from common.evaluation.text_model import Generation, TextModel
from common.models.decoder import Decoder

# A model that goes on after its answer asks itself the next question.
STOPS = ("Question:",)

_NUMBER = r"-?\$?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Problem(NamedTuple):
  """A question and its worked answer, which ends with `#### NUMBER`."""

  question: str
  answer: str


class Gsm8kAccuracy(NamedTuple):
  """Share of problems solved.

  Attributes:
    strict: by the number after `####`.
    flexible: by the last number of the text.
    strict_error: standard error of `strict`, binomial: sqrt(p (1 - p) / n).
    flexible_error: of `flexible`.
    completions: what the model wrote, one per problem.
  """

  strict: float
  flexible: float
  strict_error: float
  flexible_error: float
  completions: list[str]


def load_problems(path: str | os.PathLike) -> list[Problem]:
  """Reads the official file.

  Raises:
    UserError: it cannot be read; a line is no problem, or its answer has no `#### NUMBER` (the
      line is named).
  """
  items = read_items(path, Problem._fields, lambda item: _wrong(item["answer"]))
  return [Problem(**item) for item in items]


def _wrong(answer: str) -> str | None:
  if strict_answer(answer) is None:
    return f"the answer ends in {answer[-40:]!r}, expected '#### NUMBER' at its end"
  return None


def prompt(shots: Sequence[Problem], question: str, *, calculator_marks: bool = True) -> str:
  """The text that the model continues.

  Args:
    shots: worked examples, in order.
    question: to be answered.
    calculator_marks: leave `<<...>>` in the examples, as the harness does.
  """
  clean = (lambda text: text) if calculator_marks else (lambda text: _CALCULATOR.sub("", text))
  examples = [f"Question: {q}\nAnswer: {clean(answer)}\n\n" for q, answer in shots]
  return "".join(examples) + f"Question: {question}\nAnswer:"


def strict_answer(text: str) -> decimal.Decimal | None:
  """The number after the first `####`, or None."""
  match = _MARKED.search(text)
  return _value(match[1]) if match else None


def flexible_answer(text: str) -> decimal.Decimal | None:
  """The last number of the text, or None.

  A minus sign counts where no digit, letter or bracket stands before it: "12-5" ends in 5.
  """
  matches = list(_ANY.finditer(text))
  if not matches:
    return None
  number, start = matches[-1][0], matches[-1].start()
  subtracts = number[0] == "-" and re.search(r"[\w)\]]$", text[:start])
  return _value(number[1:] if subtracts else number)


def _value(number: str) -> decimal.Decimal:
  # As a number, so that 42, 42.00 and $42 are the same.
  return decimal.Decimal(number.replace(",", "").replace("$", ""))


def gsm8k_accuracy(
  model: Decoder,
  tokenizer: tokenizers.Tokenizer,
  problems: Sequence[Problem],
  shots: Sequence[Problem],
  *,
  max_new_tokens: int = 256,
  batch_size: int = 8,
  sampling: Sampling | None = None,
  key: jax.Array | None = None,
  calculator_marks: bool = True,
) -> Gsm8kAccuracy:
  """Lets the model answer every problem.

  The answers are compared as numbers (the harness compares their text: there 42.00 is not 42).

  Args:
    model: a decoder.
    tokenizer: its tokenizer.
    problems: at least one.
    shots: worked examples for the prompt; usually eight of the train split.
    max_new_tokens: of each answer.
    batch_size: problems at once.
    sampling: greedy by default.
    key: for sampling.
    calculator_marks: see `prompt`.

  Raises:
    UserError: there is no problem, or one without a number for an answer, or no room for a prompt
      beside `max_new_tokens`.
  """
  if not problems:
    raise UserError("there is no problem to answer: expected at least one; pass more problems")
  for i, problem in enumerate(problems):
    if wrong := _wrong(problem.answer):
      raise UserError(f"problem {i}: {wrong}: mend or drop it")
  wanted = Generation(STOPS, max_new_tokens, sampling or Sampling())
  text_model = TextModel(model, tokenizer, batch_size=batch_size, key=key)
  completions = text_model.generate_until(
    [(prompt(shots, p.question, calculator_marks=calculator_marks), wanted) for p in problems]
  )
  return score(problems, completions)


def score(problems: Sequence[Problem], completions: Sequence[str]) -> Gsm8kAccuracy:
  """Compares the answers in completions with those of the problems."""
  right = [strict_answer(p.answer) for p in problems]
  strict, flexible = (
    sum(extract(text) == number for text, number in zip(completions, right)) / len(problems)
    for extract in (strict_answer, flexible_answer)
  )
  error = lambda p: math.sqrt(p * (1 - p) / len(problems))
  return Gsm8kAccuracy(strict, flexible, error(strict), error(flexible), list(completions))
