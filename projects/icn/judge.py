"""Who says whether an answer is right: gold answers, or a file of verdicts."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from common.evaluation.items import read_items
from projects.icn.knowledge import Question

_VERDICTS = {"yes": True, "no": False}


class Judge:
  """Exact match with a question's gold answers, or the verdicts of a file where it has none.

  The paper asks a language model for these verdicts, at temperature 0, "Yes" or "No".
  """

  def __init__(self, path: str):
    """Reads verdicts.

    Args:
      path: JSON lines of {"instruction", "answer", "correct": "Yes" or "No"}; empty for no file.

    Raises:
      UserError: the file cannot be read, or a line is not such an object (it is named).
    """
    wrong = lambda item: (
      None
      if item["correct"].lower() in _VERDICTS
      else f"'correct' is {item['correct'][:40]!r}, expected Yes or No"
    )
    items = read_items(path, ("instruction", "answer", "correct"), wrong) if path else []
    self._verdicts = {
      (item["instruction"], item["answer"]): _VERDICTS[item["correct"].lower()] for item in items
    }
    self._missing: dict[tuple[str, str], None] = {}

  def correct(self, question: Question, answers: Sequence[str]) -> np.ndarray:
    """bool [answers]; one without a verdict is remembered, and False, as an empty one is."""
    if question.answers:
      gold = set(question.answers)
      return np.array([answer in gold for answer in answers])
    keys = [(question.instruction, answer) for answer in answers]
    self._missing |= dict.fromkeys(key for key in keys if key[1] and key not in self._verdicts)
    return np.array([self._verdicts.get(key, False) for key in keys])

  def require_verdicts(self, workdir: pathlib.Path) -> None:
    """Writes what lacks a verdict to `to_judge.jsonl` in the workdir.

    Raises:
      UserError: there is any.
    """
    if self._missing:
      path = workdir / "to_judge.jsonl"
      lines = [json.dumps({"instruction": i, "answer": a}) + "\n" for i, a in self._missing]
      path.write_text("".join(lines), encoding="utf-8")
      raise UserError(
        f'{len(lines)} answers have no verdict: add "correct": "Yes" or "No" to each of {path} '
        "and run again with them in --config.judge=FILE (the answers will be the same)"
      )
