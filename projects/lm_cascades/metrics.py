"""Quality of an output beside its reference: exact match, token F1, chrF."""

import collections
from collections.abc import Hashable, Sequence


def exact_match(output: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
  """1 if both are the same, else 0."""
  return float(list(output) == list(reference))


def token_f1(output: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
  """Harmonic mean of precision and recall of the bag of tokens, as of SQuAD; 1 if both are empty.

  Args:
    output, reference: words, or token ids.
  """
  if not output or not reference:
    return float(len(output) == len(reference))
  common = sum((collections.Counter(output) & collections.Counter(reference)).values())
  return 2 * common / (len(output) + len(reference))


def chrf(output: str, reference: str, *, order: int = 6, beta: float = 2.0) -> float:
  """chrF (Popovic, 2015) of one sentence, in [0, 1], without white space.

    chrF = (1 + beta^2) P R / (beta^2 P + R)

  with P and R the mean precision and recall of character n-grams, over the n from 1 to `order` of
  which both texts have some.
  """
  texts = ["".join(text.split()) for text in (output, reference)]
  precisions, recalls = [], []
  for n in range(1, order + 1):
    grams = [collections.Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in texts]
    sizes = [g.total() for g in grams]
    if all(sizes):
      common = (grams[0] & grams[1]).total()
      precisions.append(common / sizes[0])
      recalls.append(common / sizes[1])
  if not precisions:
    return float(texts[0] == texts[1])
  precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
  if precision + recall == 0:
    return 0.0
  return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
