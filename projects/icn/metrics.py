"""Metrics of probed answers, of open-ended texts and of chains of thought."""

import collections
import math
from collections.abc import Hashable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def map_at_k(correct: np.ndarray, k: int) -> np.ndarray:
  """MAP@k: the mean over i <= k of the precision of the first i items.

  Args:
    correct: bool [..., items], in the order of the answers; items >= k.
    k: at least 1.
  """
  counts = np.arange(1, k + 1)
  return np.mean(np.cumsum(correct[..., :k], axis=-1) / counts, axis=-1)


def new_and_correct(answers: Sequence[str], correct: Sequence[bool]) -> np.ndarray:
  """bool [items]: correct answers that did not occur before."""
  first: dict[str, int] = {}
  where = [first.setdefault(answer, i) for i, answer in enumerate(answers)]
  return np.asarray(correct, bool) & (np.array(where) == np.arange(len(answers)))


def distinct_n(texts: Sequence[str], n: int) -> float:
  """Different n-grams of words over all of them (Li et al., 2016); 0 if there are none."""
  grams = [gram for text in texts for gram in _ngrams(text, n)]
  return len(set(grams)) / max(len(grams), 1)


def self_bleu(texts: Sequence[str], max_n: int = 4) -> float:
  """Mean BLEU of each text with all others as its references (Zhu et al., 2018); lower is diverse.

  BLEU-4 with clipped counts and brevity penalty; orders for which a text is too short are left out,
  and no match of an order counts as half a match.

  Args:
    texts: at least two.
    max_n: the largest order.
  """
  counts = [[collections.Counter(_ngrams(text, n)) for text in texts] for n in range(1, max_n + 1)]
  lengths = [len(text.split()) for text in texts]
  return float(np.mean([_bleu(i, counts, lengths) for i in range(len(texts))]))


def _bleu(i: int, counts: list[list[collections.Counter]], lengths: list[int]) -> float:
  """BLEU of text i against all others."""
  if not lengths[i]:
    return 0.0
  logs = []
  for of_order in counts:
    total = sum(of_order[i].values())
    if total:
      others = [c for j, c in enumerate(of_order) if j != i]
      matches = sum(min(c, max(o[gram] for o in others)) for gram, c in of_order[i].items())
      logs.append(math.log(max(matches, 0.5) / total))
  closest = min((abs(n - lengths[i]), n) for j, n in enumerate(lengths) if j != i)[1]
  brevity = min(0.0, 1 - closest / lengths[i])
  return math.exp(np.mean(logs) + brevity)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
  words = text.split()
  return list(zip(*[words[i:] for i in range(n)]))


def zero_gen_accuracy(
  generated: dict[str, Sequence[str]], held_out: dict[str, Sequence[str]]
) -> float:
  """Accuracy on real texts of a classifier of generated ones (ZeroGen, Ye et al., 2022).

  Args:
    generated, held_out: {label: texts}, the same labels. The classifier is a logistic regression on
      TF-IDF weights of characters, 1 to 3 in a row.
  """
  flat = lambda by_label: list(zip(*[(t, label) for label, ts in by_label.items() for t in ts]))
  classifier = make_pipeline(
    TfidfVectorizer(analyzer="char", ngram_range=(1, 3)), LogisticRegression(max_iter=1000)
  )
  classifier.fit(*flat(generated))
  return float(classifier.score(*flat(held_out)))


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
  """The most frequent answer; of equally frequent ones the one that occurs first.

  None stands for no answer, and does not vote.
  """
  votes = collections.Counter(a for a in answers if a is not None)
  return votes.most_common(1)[0][0] if votes else None
