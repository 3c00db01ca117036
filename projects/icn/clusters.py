"""Clusters of the vocabulary's keys, and what they say about middle-ranked tokens.

The clusters of the K top-ranked tokens are the *main clusters* of a question. Tokens of ranks K + 1
to N are inside of them or outside; spurious key correlation shows in that those inside are ranked
better and are right less often, also at the same rank.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
from sklearn.cluster import KMeans

from common.errors import UserError


class Split(NamedTuple):
  """Middle-ranked tokens of all questions, [tokens].

  Attributes:
    question: its index.
    rank: from 1.
    inside: whether the token's cluster is a main cluster of its question.
    correct: whether its answer is right.
  """

  question: np.ndarray
  rank: np.ndarray
  inside: np.ndarray
  correct: np.ndarray


class InsideEffect(NamedTuple):
  """Being inside a main cluster, with the rank controlled for.

  Attributes:
    coefficient: of the flag in a logistic regression of correctness on rank and flag, log odds.
    low, high: 95 % bootstrap interval of it over questions.
    matched_gap: precision outside minus inside at the same rank, averaged over ranks by how many
      pairs they have (weights n_in n_out / (n_in + n_out), as Mantel and Haenszel).
  """

  coefficient: float
  low: float
  high: float
  matched_gap: float


def key_clusters(
  keys: np.ndarray, count: int, *, metric: Literal["euclidean", "cosine"] = "euclidean", seed: int
) -> np.ndarray:
  """K-means clusters of the keys from k-means++, int [vocab].

  Args:
    keys: float [vocab, width].
    count: of clusters.
    metric: "cosine" clusters the directions of the keys.
    seed: of the initialization.

  Raises:
    UserError: more clusters than keys.
  """
  if not 1 <= count <= len(keys):
    raise UserError(f"clusters={count}: expected 1 to {len(keys)}, the keys of the model")
  keys = np.asarray(keys, np.float32)
  if metric == "cosine":
    keys = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
  return KMeans(count, init="k-means++", n_init=1, random_state=seed).fit(keys).labels_


def browse(
  labels: np.ndarray, tokenizer: tokenizers.Tokenizer, *, clusters: Sequence[int], show: int
) -> list[tuple[int, int, str]]:
  """(cluster, its size, its first `show` tokens) of each of the `clusters`."""
  found = []
  for cluster in clusters:
    members = np.flatnonzero(labels == cluster)
    texts = " ".join(repr(tokenizer.decode([i]))[1:-1] for i in members[:show].tolist())
    found.append((int(cluster), len(members), texts))
  return found


def split_by_main_clusters(
  tokens: np.ndarray,
  correct: np.ndarray,
  labels: np.ndarray,
  top: int,
  *,
  largest: int | None = None,
) -> Split:
  """Splits ranks top + 1 to N.

  Args:
    tokens: int [questions, N], by rank.
    correct: bool [questions, N].
    labels: int [vocab], the cluster of each token.
    top: K.
    largest: leave out tokens of clusters with more members (rare tokens gather in one). None keeps
      all.
  """
  clusters = labels[tokens]
  inside = (clusters[:, top:, None] == clusters[:, None, :top]).any(axis=-1)
  question, rank = np.indices(inside.shape)
  sizes = np.bincount(labels)
  kept = sizes[clusters[:, top:]] <= (largest or len(labels))
  return Split(
    question[kept], rank[kept] + top + 1, inside[kept], np.asarray(correct)[:, top:][kept]
  )


def inside_effect(split: Split, *, resamples: int, seed: int) -> InsideEffect:
  """Compares the two groups at equal ranks; NaN where one is empty, or all is right or wrong.

  Questions are drawn with replacement, as the tokens of one depend on each other.
  """
  if len(np.unique(split.inside)) < 2 or len(np.unique(split.correct)) < 2:
    return InsideEffect(*[float("nan")] * 3, _matched_gap(split))
  names, question = np.unique(split.question, return_inverse=True)
  share = np.full(len(names), 1 / len(names))
  drawn = np.random.default_rng(seed).multinomial(len(names), share, size=resamples)
  weights = np.concatenate([np.ones((1, len(names))), drawn])[:, question]
  coefficients = _logistic_regression(split, weights)
  low, high = np.quantile(coefficients[1:], [0.025, 0.975])
  return InsideEffect(float(coefficients[0]), float(low), float(high), _matched_gap(split))


def _logistic_regression(split: Split, weights: np.ndarray) -> np.ndarray:
  """The flag's coefficient for each row of weights, [fits], by Newton's method on all fits at once.

  A ridge of 0.01 keeps it finite where a resample has no right answer in a group.

  Args:
    weights: [fits, tokens], how often each token counts.
  """
  rank = (split.rank - split.rank.mean()) / max(split.rank.std(), 1e-12)
  x = np.stack([np.ones(len(rank)), rank, split.inside], axis=1)
  ridge = 0.01 * np.eye(3)
  beta = np.zeros((len(weights), 3))
  for _ in range(25):
    chance = 1 / (1 + np.exp(-(beta @ x.T)))
    gradient = (weights * (split.correct - chance)) @ x - beta @ ridge
    curvature = weights * chance * (1 - chance)
    hessian = np.stack([curvature @ (x * x[:, [j]]) for j in range(3)], axis=2) + ridge
    beta = beta + np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -2, 2)
  return beta[:, 2]


def _matched_gap(split: Split) -> float:
  gaps, weights = [], []
  for rank in np.unique(split.rank):
    at = split.rank == rank
    inside, outside = split.correct[at & split.inside], split.correct[at & ~split.inside]
    if len(inside) and len(outside):
      gaps.append(outside.mean() - inside.mean())
      weights.append(len(inside) * len(outside) / (len(inside) + len(outside)))
  return float(np.average(gaps, weights=weights)) if gaps else float("nan")
