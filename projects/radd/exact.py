"""Small sources whose every conditional distribution is known by enumeration (NumPy, float64).

All (V + 1)^length partly masked sequences are one table: axis i is position i, and index V of it
means masked. Summing the source over a position fills in its index V:

  marginals[z] = p_0(x_UM = z_UM),    p_0(x_i = a | z_UM) = marginals[z with z_i := a] / marginals[z]
"""

import itertools

import numpy as np
from scipy.special import comb, xlogy


def markov_chain(vocab_size: int, length: int, rng: np.random.Generator) -> np.ndarray:
  """p_0(x) of a stationary Markov chain with random transitions, [V] * length, positive."""
  transitions = rng.dirichlet(np.full(vocab_size, 0.5), size=vocab_size) + 0.02
  transitions /= transitions.sum(axis=1, keepdims=True)
  p = np.linalg.matrix_power(transitions, 200)[0]  # The stationary distribution.
  for _ in range(length - 1):
    p = p[..., None] * transitions
  return p


def marginals(p: np.ndarray) -> np.ndarray:
  """p_0(x_UM) of every partly masked sequence, [V + 1] * length."""
  for axis in range(p.ndim):
    p = np.concatenate([p, p.sum(axis=axis, keepdims=True)], axis=axis)
  return p


def entropy(p: np.ndarray) -> float:
  """Nats per sequence: the least value of the bound."""
  return float(-xlogy(p, p).sum())


def partly_masked(vocab_size: int, length: int) -> np.ndarray:
  """All z, int32 [(V + 1)^length, length], in the order of a raveled `marginals`."""
  return np.array(list(itertools.product(range(vocab_size + 1), repeat=length)), np.int32)


def joint(p: np.ndarray) -> np.ndarray:
  """p_0(x_UM = z_UM, x_i = a) for every z, masked i and a, [(V + 1)^length, length, V].

  Divided by its sum over a, this is the conditional distribution c(z)[i, a]. Zero where z_i is not
  masked.
  """
  table, vocab_size, length = marginals(p), p.shape[0], p.ndim
  z = partly_masked(vocab_size, length)
  result = np.zeros((len(z), length, vocab_size))
  for i, a in itertools.product(range(length), range(vocab_size)):
    filled = z.copy()
    filled[:, i] = a
    result[:, i, a] = np.where(z[:, i] == vocab_size, table[tuple(filled.T)], 0)
  return result


def mask_weights(z: np.ndarray, vocab_size: int) -> np.ndarray:
  """1 / (k C(length, k)): what all four losses give each set of k masked positions, [len(z)]."""
  length = z.shape[1]
  k = (z == vocab_size).sum(axis=1)
  return np.where(k > 0, 1 / (np.maximum(k, 1) * comb(length, k)), 0)


def expected_bound(p: np.ndarray, log_c: np.ndarray) -> float:
  """The losses' expectation over x ~ p, masks and times without sampling, nats per sequence.

  Args:
    p: of `markov_chain`.
    log_c: of every partly masked sequence, [(V + 1)^length, length, V].
  """
  z = partly_masked(p.shape[0], p.ndim)
  cross_entropies = -(joint(p) * log_c).sum(axis=(1, 2))
  return float(mask_weights(z, p.shape[0]) @ cross_entropies)
