"""How the query moves when explored answers are shown: away from explored keys?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_rel

from projects.icn.icn import Probed


class QueryShift(NamedTuple):
  """Of the first and of the last round's query, [questions, 2], means over explored tokens.

  Attributes:
    dot: query times explored key.
    centred_dot: the same beyond the mean over all keys, which the softmax does not see.
    cosine: of query and explored key.
    rank: of explored tokens among all, from 1.
    repeats: share of questions whose last query ranks an explored token first.
    p_value, centred_p_value: of a paired t-test that `dot`, `centred_dot` do not fall; NaN of a
      single question.
  """

  dot: np.ndarray
  centred_dot: np.ndarray
  cosine: np.ndarray
  rank: np.ndarray
  repeats: float
  p_value: float
  centred_p_value: float


def query_shift(probed: Sequence[Probed], kernel: np.ndarray) -> QueryShift:
  """Compares the query before any answer was shown with that of the last round.

  Args:
    probed: of every question, of at least two rounds.
    kernel: [width, vocab], the keys.
  """
  rounds = len(probed[0].queries)
  shown = len(probed[0].first_tokens) // rounds * (rounds - 1)
  tokens = np.stack([p.first_tokens[:shown] for p in probed])
  queries = np.stack([p.queries[[0, -1]] for p in probed])
  logits = queries @ np.asarray(kernel, np.float32)
  explored = np.take_along_axis(logits, tokens[:, None], axis=2)
  lengths = np.linalg.norm(queries, axis=2)[..., None]
  lengths = lengths * np.linalg.norm(np.asarray(kernel, np.float32), axis=0)[tokens][:, None]
  ranks = 1 + np.sum(logits[:, :, None] > explored[..., None], axis=-1)
  dot = explored.mean(axis=2)
  centred_dot = dot - logits.mean(axis=2)
  best = logits[:, 1].argmax(axis=1)
  return QueryShift(
    dot=dot,
    centred_dot=centred_dot,
    cosine=np.mean(explored / lengths, axis=2),
    rank=ranks.mean(axis=2),
    repeats=float(np.mean(np.any(tokens == best[:, None], axis=1))),
    p_value=_p_of_fall(dot),
    centred_p_value=_p_of_fall(centred_dot),
  )


def _p_of_fall(values: np.ndarray) -> float:
  """Paired t-test of [questions, 2]."""
  if len(values) < 2:
    return float("nan")
  return float(ttest_rel(values[:, 1], values[:, 0], alternative="less").pvalue)
