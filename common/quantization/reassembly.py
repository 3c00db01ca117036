"""Channels of activations split and merged, with the rows of the weights that read them (QLLM).

Liu et al. (ICLR 2024, arXiv 2310.08041), section 4.1: a channel becomes several copies of a part of
it, similar channels become their mean, and rows of the weights are repeated or summed to match.
"""

from typing import NamedTuple

import jax
from flax import nnx

Array = jax.Array


class Reassembly(NamedTuple):
  """New channels from old ones.

  Attributes:
    source, target: int32 [max_extra], old channels: sources are added to targets and vanish. A target
      of M (no channel) drops its source; entries that are not needed are M in both.
    copy_of: int32 [width], the old channel (after the merges) that each new one copies.
    scale: float32 [width], factor of the new activations: 1 / (T_j * channels in the mean).
    used: float32 [width], factor of the new rows of W: 1, and 0 for the channels that fill up
      a width which disassembly alone does not need.
  """

  source: Array
  target: Array
  copy_of: Array
  scale: Array
  used: Array


def reassemble_activations(x: Array, reassembly: Reassembly) -> Array:
  """[..., M] -> [..., width] in x's dtype."""
  r = reassembly
  added = x.at[..., r.source].get(mode="fill", fill_value=0)
  merged = x.at[..., r.target].add(added, mode="drop")
  return merged[..., r.copy_of] * r.scale.astype(x.dtype)


def reassemble_weights(w: Array, reassembly: Reassembly) -> Array:
  """[M, out] -> [width, out] in w's dtype."""
  r = reassembly
  added = w.at[r.source].get(mode="fill", fill_value=0)
  merged = w.at[r.target].add(added, mode="drop")
  return merged[r.copy_of] * r.used.astype(w.dtype)[:, None]


class ReassembledInput(nnx.Module):
  """Splits and merges channels: [..., M] -> [..., width]."""

  def __init__(self, reassembly: Reassembly):
    self.reassembly = nnx.data(Reassembly(*map(nnx.Variable, reassembly)))

  def __call__(self, x: Array) -> Array:
    return reassemble_activations(x, Reassembly(*(v[...] for v in self.reassembly)))
