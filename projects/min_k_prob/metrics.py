"""How well scores tell members from non-members: AUC, TPR at a low FPR, accuracy, bootstrap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from common.errors import UserError


class Detection(NamedTuple):
  """Quality of a membership score.

  Attributes:
    auc: area under the ROC curve; ties count half.
    accuracy: the best balanced accuracy over thresholds, 1 - (FPR + 1 - TPR) / 2. Its threshold is
      chosen on the texts that it is measured on: it is optimistic.
    tpr_at_5: TPR at the largest FPR below 5 %.
    tpr_at_1: at the largest FPR below 1 %.
  """

  auc: float
  accuracy: float
  tpr_at_5: float
  tpr_at_1: float


def detection(scores: np.ndarray, members: np.ndarray) -> Detection:
  """Measures scores (higher: member), float [texts], against bool [texts].

  Raises:
    UserError: there are no members, or no non-members.
  """
  members = np.asarray(members, bool)
  if members.all() or not members.any():
    raise UserError(
      f"{members.sum()} of {len(members)} texts are members: expected both members and non-members"
    )
  fpr, tpr, _ = roc_curve(members, scores)
  below = lambda limit: float(tpr[np.flatnonzero(fpr < limit)[-1]])
  accuracy = float(np.max(1 - (fpr + 1 - tpr) / 2))
  return Detection(float(roc_auc_score(members, scores)), accuracy, below(0.05), below(0.01))


def best_threshold(scores: np.ndarray, members: np.ndarray) -> float:
  """The threshold of the best balanced accuracy: texts with scores of at least it are members."""
  fpr, tpr, thresholds = roc_curve(members, scores)
  return float(thresholds[np.argmax(tpr - fpr)])


def weighted_auc(scores: np.ndarray, members: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """AUC of weighted texts, for many weightings at once.

  Args:
    scores: [texts].
    members: bool [texts].
    weights: not negative, [weightings, texts].

  Returns:
    float64 [weightings]; NaN where all weight is on one class.
  """
  order = np.argsort(scores, kind="stable")
  _, starts = np.unique(scores[order], return_index=True)
  level = lambda x: np.add.reduceat(x, starts, axis=1)  # Sums over ties.
  member, other = (level(weights[:, order] * kept[order]) for kept in (members, ~members))
  below = np.cumsum(other, axis=1) - other / 2
  with np.errstate(invalid="ignore"):
    return (member * below).sum(axis=1) / (member.sum(axis=1) * other.sum(axis=1))


def bootstrap_weights(
  members: np.ndarray, documents: Sequence[str], samples: int, rng: np.random.Generator
) -> np.ndarray:
  """How often every text is drawn, int [samples, texts]: whole documents, within each class.

  Excerpts of one document are alike; drawing them one by one would make intervals too short.
  """
  _, index = np.unique(np.asarray(documents), return_inverse=True)
  weights = np.zeros((samples, len(members)), np.int64)
  for group in (members, ~np.asarray(members)):
    inside = np.unique(index[group])
    draws = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=samples)
    counts = np.zeros((samples, index.max() + 1), np.int64)
    counts[:, inside] = draws
    weights[:, group] = counts[:, index[group]]
  return weights


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """(low, high) of bootstrap values."""
  tail = 100 * (1 - level) / 2
  low, high = np.nanpercentile(values, [tail, 100 - tail])
  return float(low), float(high)
