"""Min-K% Prob (Shi et al. 2024, section 3) and the attacks that it is compared with.

A text x has tokens x_1 ... x_N and s_i = log p(x_i | x_1 ... x_{i-1}), natural logarithms, for its n
scored tokens. With E the int(k n) tokens (at least one) of smallest s_i,

  Min-K% Prob(x) = 1 / |E| * sum over E of s_i

and a text is called a member of the pretraining data when the score is above a threshold: a text
that was not seen has a few words that the model finds very unlikely, a member has fewer of them.

Every score here is higher for likelier members. Scores of texts of different lengths do not compare.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

MIN_K, PPL, ZLIB, LOWERCASE = "Min-K% Prob", "PPL", "Zlib", "Lowercase"
REFERENCE, NEIGHBOUR = "Smaller Ref", "Neighbour"
MAX_K, RANDOM_K, ALL_TOKENS = "Max-K% Prob", "Random-K% Prob", "K = 100%"


class TokenLogProbs(NamedTuple):
  """What a model says of texts.

  Attributes:
    values: log p of every scored token in nats, float32 [texts, length], 0 behind a text's end.
    num_tokens: n, scored tokens of each text, int [texts], at least 1.
    tokens: ids of the scored tokens, int32 [texts, length].
  """

  values: np.ndarray
  num_tokens: np.ndarray
  tokens: np.ndarray

  def prefix(self, num_tokens: np.ndarray) -> "TokenLogProbs":
    """Of the first tokens of every text, int [texts]: a causal model scores them all the same."""
    kept = np.arange(self.values.shape[1]) < np.asarray(num_tokens)[:, None]
    return TokenLogProbs(self.values * kept, np.asarray(num_tokens), self.tokens * kept)

  def select(self, rows: np.ndarray) -> "TokenLogProbs":
    """Of some of the texts, bool or int [rows]."""
    return TokenLogProbs(*(field[rows] for field in self))


def subset_size(num_tokens: np.ndarray, k: float) -> np.ndarray:
  """|E| = int(k n), at least 1, int32 [texts]; in float64, as Python counts. k in (0, 1]."""
  if not 0 < k <= 1:
    raise ValueError(f"k={k} must be in (0, 1]")
  return np.maximum((np.asarray(num_tokens) * float(k)).astype(np.int32), 1)


def min_k_prob(log_probs: TokenLogProbs, k: float = 0.2) -> np.ndarray:
  """Mean of the int(k n) smallest log-probabilities, float32 [texts]. k in (0, 1]; 1: the mean."""
  return _subset_mean(log_probs, log_probs.values, k)


def max_k_prob(log_probs: TokenLogProbs, k: float = 0.2) -> np.ndarray:
  """The ablation with the largest log-probabilities instead, float32 [texts]."""
  return _subset_mean(log_probs, -log_probs.values, k)


def random_k_prob(log_probs: TokenLogProbs, key: Array, k: float = 0.2) -> np.ndarray:
  """The ablation with equally many tokens drawn at random, float32 [texts]."""
  return _subset_mean(log_probs, jax.random.uniform(key, log_probs.values.shape), k)


def _subset_mean(log_probs: TokenLogProbs, rank_by: Array, k: float) -> np.ndarray:
  n = np.asarray(log_probs.num_tokens, np.int32)
  return np.asarray(mean_of_first(log_probs.values, rank_by, n, subset_size(n, k)))


@jax.jit
def mean_of_first(log_probs: Array, rank_by: Array, num_tokens: Array, size: Array) -> Array:
  """Mean log-probability of the `size` tokens of smallest `rank_by`, one row per text.

  Padding sorts to the end, and one prefix sum serves a different number in every row. In float32:
  float16 log-probabilities would tie.
  """
  scored = jnp.arange(log_probs.shape[1]) < num_tokens[:, None]
  order = jnp.argsort(jnp.where(scored, rank_by.astype(jnp.float32), jnp.inf), axis=1)
  ranked = jnp.take_along_axis(log_probs.astype(jnp.float32), order, axis=1)
  total = jnp.take_along_axis(jnp.cumsum(ranked, axis=1), size[:, None] - 1, axis=1)[:, 0]
  return total / size


def loss(log_probs: TokenLogProbs) -> np.ndarray:
  """Mean negative log-likelihood per token, log perplexity, float64 [texts]."""
  return -log_probs.values.sum(axis=1, dtype=np.float64) / log_probs.num_tokens


def perplexity(log_probs: TokenLogProbs) -> np.ndarray:
  """exp of the loss, float64 [texts]."""
  return np.exp(loss(log_probs))


def zlib_bytes(texts: Sequence[str]) -> np.ndarray:
  """Bytes of zlib's compression of every text, int [texts]."""
  return np.array([len(zlib.compress(text.encode("utf-8"))) for text in texts])


def attack_scores(
  texts: Sequence[str],
  target: TokenLogProbs,
  *,
  k: float = 0.2,
  lowercase: TokenLogProbs | None = None,
  reference: TokenLogProbs | None = None,
  neighbours: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Min-K% Prob and the baselines of section 4.2, higher for likelier members.

    PPL          -perplexity(x)                        (Yeom et al. 2018: the loss attack)
    Zlib         -log perplexity(x) / zlib bytes of x  (Carlini et al. 2021, as the next two)
    Lowercase    log perplexity(lower-cased x) / log perplexity(x)
    Smaller Ref  loss of the reference(x) - loss(x)
    Neighbour    mean loss of the neighbours of x - loss(x)   (Mattern et al. 2023)

  Args:
    texts: the texts.
    target: of the model under attack on the texts.
    k: share of tokens of Min-K% Prob.
    lowercase: of the same model on the lower-cased texts.
    reference: of a smaller model of the same family on the texts.
    neighbours: loss of the model under attack on every neighbour, [texts, neighbours].

  Returns:
    {attack: [texts]}; of an attack whose input is None there is none.
  """
  x = loss(target)
  scores = {MIN_K: min_k_prob(target, k), PPL: -np.exp(x), ZLIB: -x / zlib_bytes(texts)}
  if lowercase is not None:
    scores[LOWERCASE] = loss(lowercase) / x
  if reference is not None:
    scores[REFERENCE] = loss(reference) - x
  if neighbours is not None:
    scores[NEIGHBOUR] = np.mean(neighbours, axis=1) - x
  return scores


def ablation_scores(log_probs: TokenLogProbs, key: Array, k: float = 0.2) -> dict[str, np.ndarray]:
  """Which tokens matter: the least likely, the most likely, any, or all of them."""
  return {
    MIN_K: min_k_prob(log_probs, k),
    MAX_K: max_k_prob(log_probs, k),
    RANDOM_K: random_k_prob(log_probs, key, k),
    ALL_TOKENS: min_k_prob(log_probs, 1.0),
  }


@functools.partial(jax.jit, static_argnums=2)
def _smallest(log_probs: Array, num_tokens: Array, count: int) -> tuple[Array, Array]:
  scored = jnp.arange(log_probs.shape[1]) < num_tokens[:, None]
  values, places = jax.lax.top_k(-jnp.where(scored, log_probs, jnp.inf), count)
  return -values, places


def outlier_tokens(log_probs: TokenLogProbs, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The tokens that Min-K% Prob looks at.

  Args:
    log_probs: of the texts.
    count: tokens to show of every text, at most its length.

  Returns:
    (log-probabilities, ascending, and places among the scored tokens), [texts, count]; +inf where a
    text has fewer tokens.
  """
  n = np.asarray(log_probs.num_tokens, np.int32)
  return tuple(map(np.asarray, _smallest(log_probs.values, n, count)))
