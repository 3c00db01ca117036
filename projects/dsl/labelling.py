"""Surrogate labels from a language model: which of two answers to a prompt is likelier?"""

from collections.abc import Mapping

import numpy as np

from common.errors import UserError
from common.evaluation.text_model import TextModel
from common.models.base import base_model

ANSWERS = (" no", " yes")


def prompt(text: str, question: str, examples: list[tuple[str, int]]) -> str:
  """The question about a text, after examples (text, 0 or 1) with their answers."""
  ask = lambda text: f"Document: {' '.join(text.split())}\nQuestion: {question}\nAnswer:"
  shown = [f"{ask(text)}{ANSWERS[label]}\n\n" for text, label in examples]
  return "".join([*shown, ask(text)])


def label_documents(
  table: Mapping[str, np.ndarray],
  model: str | TextModel,
  *,
  shots: int = 0,
  seed: int = 0,
  question: str = "Does this document belong to the category?",
) -> np.ndarray:
  """Labels every document by the likelier of `ANSWERS`.

  Args:
    table: columns `text` (str) and, for examples, `label` (0 or 1).
    model: name or directory of a base model, or a `TextModel`.
    shots: examples in the prompt, drawn from the table and equally many of both labels as far as
      possible; a document is never its own example.
    seed: of the examples.
    question: a yes-no question.

  Returns:
    float64 [rows] of 0 and 1.

  Raises:
    UserError: fewer labelled documents than `shots` + 1.
  """
  if isinstance(model, str):
    base = base_model(model)
    model = TextModel(base.model, base.tokenizer)
  texts = [str(text) for text in table["text"]]
  examples = []
  if shots:
    labels = np.asarray(table["label"], np.float64)
    known = np.random.default_rng(seed).permutation(np.flatnonzero(~np.isnan(labels)))
    if len(known) <= shots:
      raise UserError(f"{shots} examples need more than {len(known)} labelled documents")
    # Of both labels in turn; one more than needed, in the place of a document's own.
    ranks = {label: list(known[labels[known] == label]) for label in (1, 0)}
    turns = [rank[i] for i in range(len(known)) for rank in ranks.values() if i < len(rank)]
    examples = [(int(i), int(labels[i])) for i in turns[: shots + 1]]
  pairs = []
  for row, text in enumerate(texts):
    shown = [(texts[i], label) for i, label in examples if i != row][:shots]
    pairs += [(prompt(text, question, shown), answer) for answer in ANSWERS]
  scores = np.array([score for score, _ in model.log_likelihoods(pairs)]).reshape(-1, 2)
  return scores.argmax(axis=1).astype(np.float64)
