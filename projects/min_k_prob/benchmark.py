"""Benchmarks in the manner of WikiMIA: members and non-members of one length in words.

A split by date (the paper's) takes what is older than a model as members and what is newer as
non-members; a split by inclusion trains a model on some documents and not on others. By date the
two also differ in topic, which a classifier that never saw the model can use: `blind_auc`.
"""

import datetime
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from common.errors import UserError

_WORD = re.compile(r"\S+")
Document = dict[str, str]


class Benchmark(NamedTuple):
  """Texts to tell apart.

  Attributes:
    texts: all of one length in words.
    members: whether a text was in the training data, bool [texts].
    documents: the name of the document that each text is from.
  """

  texts: list[str]
  members: np.ndarray
  documents: list[str]

  def select(self, kept: np.ndarray) -> "Benchmark":
    """Some of the texts, bool or int [rows]."""
    rows = np.arange(len(self.texts))[kept]
    pick = lambda field: [field[i] for i in rows]
    return Benchmark(pick(self.texts), self.members[rows], pick(self.documents))


def join(*benchmarks: Benchmark) -> Benchmark:
  """The texts of all."""
  texts, members, documents = zip(*benchmarks)
  return Benchmark(sum(texts, []), np.concatenate(members), sum(documents, []))


def first_words(text: str, length: int) -> str | None:
  """The first `length` words with the white space between them, or None if there are fewer."""
  words = list(_WORD.finditer(text))
  return text[words[0].start() : words[length - 1].end()] if len(words) >= length else None


def cut_excerpts(text: str, length: int, limit: int) -> list[str]:
  """Up to `limit` consecutive excerpts of `length` words; a shorter rest is dropped."""
  words = list(_WORD.finditer(text))
  starts = range(0, len(words) - length + 1, length)[:limit]
  return [text[words[i].start() : words[i + length - 1].end()] for i in starts]


def split_by_inclusion(
  documents: Sequence[Document], rng: np.random.Generator
) -> tuple[list[Document], list[Document]]:
  """(members, non-members): a random half each, whole documents."""
  order = rng.permutation(len(documents))
  half = len(documents) // 2
  return [documents[i] for i in order[:half]], [documents[i] for i in order[half:]]


def split_by_date(
  documents: Sequence[Document], members_before: str, non_members_from: str
) -> tuple[list[Document], list[Document]]:
  """(members, non-members) by their field "date"; what lies between the two dates is dropped.

  Args:
    documents: each with a "date", such as 2016-11-30.
    members_before: the model's data certainly reach up to here (WikiMIA: 2017-01-01).
    non_members_from: and certainly not beyond this (WikiMIA: 2023-01-01).

  Raises:
    UserError: a date is missing or is none, or the two are in the wrong order.
  """
  before = _date(members_before, "members_before")
  after = _date(non_members_from, "non_members_from")
  if before > after:
    raise UserError(f"members_before={before} is later than non_members_from={after}: swap them")
  dates = [_date(d.get("date"), f"document {d['name']!r}") for d in documents]
  members = [d for d, date in zip(documents, dates) if date < before]
  return members, [d for d, date in zip(documents, dates) if date >= after]


def _date(value: str | None, where: str) -> datetime.date:
  try:
    return datetime.date.fromisoformat(value)
  except (TypeError, ValueError):
    raise UserError(f"{where}: the date is {value!r}, expected YYYY-MM-DD: mend it") from None


def drop_near_duplicates(
  excerpts: Sequence[tuple[str, str]], *, shingle: int = 8, overlap: float = 0.2
) -> list[tuple[str, str]]:
  """Drops excerpts that share text with one before them.

  Args:
    excerpts: (document's name, text) each.
    shingle: consecutive words that count as a copy when they occur twice.
    overlap: share of an excerpt's shingles that occurred before, above which it is dropped.
  """
  seen, kept = set(), []
  for name, text in excerpts:
    words = text.lower().split()
    shingles = {hash(tuple(words[i : i + shingle])) for i in range(len(words) - shingle + 1)}
    if len(shingles & seen) <= overlap * len(shingles):
      kept.append((name, text))
      seen |= shingles
  return kept


def build(
  members: Sequence[Document],
  non_members: Sequence[Document],
  *,
  length: int,
  per_class: int,
  per_document: int = 1,
  fits=lambda text: True,
  rng: np.random.Generator,
) -> Benchmark:
  """A benchmark of distinct excerpts.

  Args:
    members, non_members: documents with "name" and "text".
    length: words of an excerpt; shorter documents are left out, as WikiMIA does.
    per_class: excerpts of each class; 0 takes all.
    per_document: excerpts that one document may give, the first ones.
    fits: leaves out the excerpts for which it is false.
    rng: draws among what there is.

  Raises:
    UserError: a class has too few excerpts.
  """
  found = []
  for is_member, documents in ((True, members), (False, non_members)):
    for document in documents:
      for text in cut_excerpts(document["text"], length, per_document):
        if fits(text):
          found.append((is_member, document["name"], text))
  # In random order, so that of two near-duplicates either class keeps one as often.
  found = [found[i] for i in rng.permutation(len(found))]
  labels = {text: is_member for is_member, _, text in found}
  kept = drop_near_duplicates([(name, text) for _, name, text in found])
  chosen = []
  for is_member in (True, False):
    own = [(name, text) for name, text in kept if labels[text] == is_member]
    if len(own) < max(per_class, 1):
      raise UserError(
        f"there are {len(own)} distinct {'members' if is_member else 'non-members'} of {length} "
        f"words, expected {max(per_class, 1)}: lower per_class or the length, or give more documents"
      )
    chosen += [(is_member, *excerpt) for excerpt in own[: per_class or None]]
  flags, names, texts = zip(*chosen)
  return Benchmark(list(texts), np.array(flags), list(names))


def blind_auc(benchmark: Benchmark, *, folds: int = 5, seed: int = 0) -> float:
  """AUC of a bag-of-words classifier that never asks the model: the distribution shift.

  Logistic regression on tf-idf of words, cross-validated; a document's excerpts are in one fold.
  0.5 is no shift; a benchmark where this is high says little about memorisation.
  """
  classifier = make_pipeline(
    TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, min_df=2),
    LogisticRegression(max_iter=200),
  )
  split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
  predicted = cross_val_predict(
    classifier,
    benchmark.texts,
    benchmark.members,
    groups=benchmark.documents,
    cv=split,
    method="decision_function",
  )
  return float(roc_auc_score(benchmark.members, predicted))
