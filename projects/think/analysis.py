"""Why few channels suffice: their magnitudes, the rank of the logits, and how good greedy is."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from projects.think.evaluation import Prefill
from projects.think.think import best_selection, channel_gram, kept_mask, query_driven_scores

Array = jax.Array


def channel_norms(prefill: Prefill) -> np.ndarray:
  """l2 norms of key channels over the prompts' tokens, [blocks, kv_heads, head_dim]; mean of rows."""
  keys = jnp.where(prefill.valid[:, None, :, None], prefill.keys, 0)
  return np.asarray(jnp.linalg.norm(keys, axis=3).mean(axis=1))


def energy_share(norms: np.ndarray, share: float = 0.1) -> float:
  """Share of a head's energy in its largest `share` of channels, mean over heads and blocks."""
  energy = np.sort(norms**2, axis=-1)[..., ::-1]
  top = max(1, round(share * norms.shape[-1]))
  return float((energy[..., :top].sum(-1) / energy.sum(-1)).mean())


def singular_values(prefill: Prefill, rows: int = 2) -> np.ndarray:
  """Of the logits Q K^T / sqrt(D) of prompts without causal mask, [matrices, head_dim], falling.

  Q = U R and K = W S (QR) have the logits' singular values in the small R S^T.
  """
  prompt = prefill.prompt_valid.shape[1]
  query, keys = (np.asarray(x[:, :rows, :, :prompt]) for x in (prefill.query, prefill.keys))
  keys = np.repeat(keys, query.shape[2] // keys.shape[2], axis=2)
  factors = (np.linalg.qr(x, mode="r") for x in (query, keys))
  left, right = factors
  small = left @ right.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
  values = np.linalg.svd(small, compute_uv=False)
  return values.reshape(-1, values.shape[-1])


def rank_for(values: np.ndarray, share: float = 0.9) -> float:
  """Singular values that hold a share of the energy, mean over matrices."""
  energy = np.cumsum(values**2, axis=-1)
  return float((np.argmax(energy >= share * energy[:, -1:], axis=-1) + 1).mean())


class Exhaustive(NamedTuple):
  """Greedy scores against every selection, over heads.

  Attributes:
    matrices: heads of blocks and rows.
    optimal: share of them whose greedy selection is the best one.
    error_ratio: mean of greedy's relative error over the best, ||.||_F each.
  """

  matrices: int
  optimal: float
  error_ratio: float


def exhaustive(
  prefill: Prefill, channels: int, kept: int, window: int, rows: int = 2
) -> Exhaustive:
  """The leading channels of each head, and the window's queries: all selections are tried."""
  prompt = prefill.prompt_valid.shape[1]
  query = prefill.query[:, :rows, :, prompt - window : prompt, :channels]
  keys = prefill.keys[:, :rows, ..., :channels]
  keys = jnp.repeat(keys, query.shape[2] // keys.shape[2], axis=2)
  flat = lambda x: x.reshape(-1, 1, *x.shape[3:])
  query, keys = flat(query), flat(keys)
  ones = lambda x: jnp.ones((len(x), x.shape[2]), bool)
  greedy = kept_mask(query_driven_scores(query, keys, ones(query), ones(keys)), kept)[:, 0]
  picked = list(itertools.combinations(range(channels), kept))
  selections = np.zeros((len(picked), channels), bool)
  np.put_along_axis(selections, np.array(picked), True, axis=1)

  @jax.jit
  def compare(query, keys, greedy):
    gram = channel_gram(query, keys)
    _, best = best_selection(gram, jnp.asarray(selections))
    _, chosen = best_selection(gram, greedy[None])
    return best, chosen

  best, chosen = jax.vmap(compare)(query[:, 0], keys[:, 0], greedy)
  ratio = np.sqrt(np.asarray(chosen) / np.asarray(best))
  return Exhaustive(len(ratio), float((ratio < 1 + 1e-5).mean()), float(ratio.mean()))
