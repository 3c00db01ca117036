"""Chain of thought: different ways to a solution by navigation, and their vote."""

import decimal
import json
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.decoding.generation import generate
from common.errors import UserError
from common.evaluation.gsm8k import load_problems, strict_answer
from common.evaluation.log_likelihood import whole_batches
from common.paths import data_dir
from projects.icn.icn import Navigation, Prober, navigate
from projects.icn.metrics import majority_vote

TASKS = ("gsm8k", "svamp", "aqua_rat")
# Ends a way: the next one begins with it.
WAY_ENDS = "#"
ANSWER_TOKENS = 8

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTER = re.compile(r"[A-E]")


class Problem(NamedTuple):
  """A question and its answer.

  Attributes:
    question: with its options, if it has any.
    answer: a number, or a letter from A to E.
    options: whether it is a letter.
  """

  question: str
  answer: decimal.Decimal | str
  options: bool


class CotResult(NamedTuple):
  """Accuracy of self-consistency.

  Attributes:
    vote: share of problems whose majority of ways is right.
    path: share of ways that are right, mean over problems.
    answers: of every way, [problems][ways]; None where no answer was found.
  """

  vote: float
  path: float
  answers: list[list[decimal.Decimal | str | None]]


def load_cot_problems(task: str, limit: int | None = None) -> list[Problem]:
  """Problems of "gsm8k" (test), "svamp" (all) or "aqua_rat" (test), from FLAXWORKS_DATA.

  Raises:
    UserError: there is no such task, its file is missing, or a problem lacks a field (it is named).
  """
  if task == "gsm8k":
    problems = load_problems(_only_file(data_dir(task), "test.jsonl*"))
    found = [Problem(p.question, strict_answer(p.answer), False) for p in problems]
  elif task == "svamp":
    path = data_dir(task) / "SVAMP.json"
    items = _items(path, _read(path))
    found = [
      Problem(
        f"{_field(p, 'Body', path, i)} {_field(p, 'Question', path, i)}",
        _number(_field(p, "Answer", path, i), path, i),
        False,
      )
      for i, p in enumerate(items)
    ]
  elif task == "aqua_rat":
    path = data_dir(task) / "test.json"
    items = _items(path, "[" + ",".join(line for line in _read(path).split("\n") if line) + "]")
    found = []
    for i, p in enumerate(items):
      options = "\n".join(_field(p, "options", path, i))
      text = f"{_field(p, 'question', path, i)}\nOptions:\n{options}"
      found.append(Problem(text, _field(p, "correct", path, i), True))
  else:
    raise UserError(f"unknown chain-of-thought task {task!r}: expected one of {', '.join(TASKS)}")
  return found[:limit]


def way_prompt(question: str, ways: Sequence[str]) -> str:
  """The question, the ways found so far, and the opening of the next one."""
  blocks = "".join(f"### Way {i}:\nStep 1: {way}\n\n" for i, way in enumerate(ways, 1))
  return (
    f"Question: {question}\nShow different ways to solve it, step by step.\n\n"
    f"{blocks}### Way {len(ways) + 1}:\nStep 1:"
  )


def answer_prompt(problem: Problem, way: str) -> str:
  """Asks for the answer of one way."""
  kind = "the letter of the right option" if problem.options else "a number"
  return f"{way_prompt(problem.question, [])} {way}\n\nTherefore, the answer as {kind} is"


def extract_answer(problem: Problem, text: str) -> decimal.Decimal | str | None:
  """The first number, or the first letter from A to E; None if there is none."""
  match = (_LETTER if problem.options else _NUMBER).search(text)
  if not match:
    return None
  return match[0] if problem.options else decimal.Decimal(match[0].replace(",", ""))


def self_consistency(
  prober: Prober,
  problems: Sequence[Problem],
  ways: int,
  groups: np.ndarray,
  *,
  navigates: bool,
  batch: int = 8,
) -> CotResult:
  """Finds ways, reads an answer off each by a second greedy call, and votes.

  Args:
    prober: completes ways; its answers end at `WAY_ENDS`.
    problems: at least one.
    ways: n_cot.
    groups: see `navigate`.
    navigates: each way begins with the best first token behind the prompt that shows the ways so
      far; else with the next best one behind the question alone.
    batch: answers read at once.
  """
  prompt = lambda i, found: way_prompt(problems[i].question, found)
  how = Navigation(ways, 1) if navigates else Navigation(1, ways, context="none")
  found = navigate(prober, prompt, len(problems), how, groups)
  asked = [answer_prompt(p, way) for p, probed in zip(problems, found) for way in probed.answers]
  new = [
    tokens
    for rows in whole_batches(prober.encode(asked), min(batch, len(asked)))
    for tokens in generate(prober.model, rows, max_new_tokens=ANSWER_TOKENS)
  ]
  texts = iter(prober.tokenizer.decode_batch(new))
  answers = [[extract_answer(p, next(texts)) for _ in range(ways)] for p in problems]
  return score(problems, answers)


def score(problems, answers) -> CotResult:
  """Vote and path accuracy. answers: [problems][ways], see `CotResult`."""
  right = [[a == p.answer for a in row] for p, row in zip(problems, answers)]
  votes = [majority_vote(row) == p.answer for p, row in zip(problems, answers)]
  return CotResult(float(np.mean(votes)), float(np.mean(right)), answers)


def _only_file(folder: pathlib.Path, pattern: str) -> pathlib.Path:
  found = sorted(folder.glob(pattern))
  if not found:
    raise UserError(f"{folder} has no file {pattern}: expected the official test file")
  return found[0]


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except OSError as e:
    raise UserError(f"cannot read {path}: {e.strerror}; expected the official file") from None


def _items(path: pathlib.Path, text: str) -> list:
  try:
    return json.loads(text)
  except ValueError as e:
    raise UserError(f"{path} is not JSON: {e}; expected the official file") from None


def _field(item: dict, name: str, path: pathlib.Path, index: int):
  if not isinstance(item, dict) or not item.get(name) and item.get(name) != 0:
    raise UserError(f"{path}: problem {index} has no {name!r}: expected the official file")
  return item[name]


def _number(value, path: pathlib.Path, index: int) -> decimal.Decimal:
  try:
    return decimal.Decimal(str(value))
  except decimal.InvalidOperation:
    raise UserError(f"{path}: the answer of problem {index} is no number: {value!r}") from None
