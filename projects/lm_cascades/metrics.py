"""Quality of an output beside its reference: exact match, token F1."""

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
