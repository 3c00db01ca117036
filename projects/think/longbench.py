"""LongBench: prompts cut in the middle, answers by the compressed cache, and their scores.

A file has a JSON object a line with "context", "input" and "answers" (a list), as LongBench's own; a
classification task has "all_classes" too. Scores are the best over the answers, 0 to 100.
"""

import collections
import difflib
import json
import pathlib
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tokenizers

from common.decoding.generation import generate
from common.decoding.pruned_cache import Compression, generate_pruned
from common.errors import UserError
from common.models.decoder import Decoder


class Question(NamedTuple):
  """Attributes: prompt, text; answers, any of which is right; classes, of a classification."""

  prompt: str
  answers: tuple[str, ...]
  classes: tuple[str, ...]


def read_questions(path: str, prompt_format: str, limit: int) -> list[Question]:
  """Reads a LongBench file.

  Args:
    path: of the JSON lines.
    prompt_format: with {context} and {input}.
    limit: the largest number of questions; 0 takes all.

  Raises:
    UserError: there is no such file, a line lacks a field, or the format names another.
  """
  try:
    lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
  except OSError as e:
    raise UserError(f"cannot read {path}: {e.strerror}; give a LongBench .jsonl file") from None
  questions = []
  for number, line in enumerate(filter(str.strip, lines), 1):
    if limit and len(questions) == limit:
      break
    try:
      record = json.loads(line)
      prompt = prompt_format.format(context=record["context"], input=record["input"])
      answers = tuple(record["answers"])
      classes = tuple(record.get("all_classes") or ())
    except (ValueError, KeyError, TypeError, IndexError) as e:
      raise UserError(
        f'{path}, line {number}: expected an object with "context", "input" and a list "answers", '
        f"and a format of context and input only ({type(e).__name__}: {e})"
      ) from None
    if not answers or not all(isinstance(a, str) for a in answers):
      raise UserError(f'{path}, line {number}: "answers" must be strings, at least one')
    questions.append(Question(prompt, answers, classes))
  if not questions:
    raise UserError(f"{path} has no question")
  return questions


def truncate_middle(tokens: Sequence[int], length: int) -> list[int]:
  """The first and the last half of `length` tokens, where there are more."""
  if len(tokens) <= length:
    return list(tokens)
  first = length // 2
  return [*tokens[:first], *tokens[len(tokens) - (length - first) :]]


def answer(
  model: Decoder,
  tokenizer: tokenizers.Tokenizer,
  questions: Sequence[Question],
  compression: Compression | None,
  *,
  prompt_length: int,
  max_new_tokens: int,
  stop_tokens: Sequence[int] = (),
) -> list[str]:
  """Greedy answers; with the full cache where there is no compression. One prompt at a time."""
  texts = []
  for question in questions:
    prompts = [truncate_middle(tokenizer.encode(question.prompt).ids, prompt_length)]
    options = {"max_new_tokens": max_new_tokens, "stop_tokens": list(stop_tokens)}
    if compression is None:
      (new,) = generate(model, prompts, **options)
    else:
      (new,) = generate_pruned(model, prompts, compression, **options)
    texts.append(tokenizer.decode(new))
  return texts


def f1(text: str, reference: str, classes: Sequence[str] = ()) -> float:
  """Harmonic mean of precision and recall of words, without articles and punctuation."""
  del classes
  found, wanted = _words(text), _words(reference)
  common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
  return 2 * common / (len(found) + len(wanted)) if common else 0.0


def rouge_l(text: str, reference: str, classes: Sequence[str] = ()) -> float:
  """F measure of the longest common subsequence of words (Lin 2004)."""
  del classes
  found, wanted = text.lower().split(), reference.lower().split()
  row = [0] * (len(wanted) + 1)
  for word in found:
    before = 0
    for j, other in enumerate(wanted, 1):
      above = row[j]
      row[j] = before + 1 if word == other else max(above, row[j - 1])
      before = above
  return 2 * row[-1] / (len(found) + len(wanted)) if row[-1] else 0.0


def accuracy(text: str, reference: str, classes: Sequence[str] = ()) -> float:
  """Whether the text names the right class; shared with the other classes that it names."""
  named = [c for c in classes or [reference] if c in text]
  # A class that is part of another one's name is not named by it.
  named = [c for c in named if c == reference or c not in reference]
  return 1 / len(named) if reference in named else 0.0


def edit_similarity(text: str, reference: str, classes: Sequence[str] = ()) -> float:
  """Similarity of the first line that is no comment to a line of code (difflib's ratio)."""
  del classes
  lines = (x for x in text.lstrip("\n").split("\n") if not x.lstrip().startswith(("#", "//", "`")))
  return difflib.SequenceMatcher(None, next(lines, ""), reference, autojunk=False).ratio()


METRICS: dict[str, Callable[..., float]] = {
  "f1": f1,
  "rouge_l": rouge_l,
  "accuracy": accuracy,
  "edit_similarity": edit_similarity,
}


def score(texts: Sequence[str], questions: Sequence[Question], metric: str) -> float:
  """Mean over questions of the best answer's score, 0 to 100."""
  measure = METRICS[metric]
  best = [
    max(measure(text, a, question.classes) for a in question.answers)
    for text, question in zip(texts, questions, strict=True)
  ]
  return 100 * sum(best) / len(best)


def _words(text: str) -> list[str]:
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r"\b(a|an|the)\b", " ", text).split()
