"""Packed linear layers with LoRC's second path, how they are put into a block, and their size."""

from collections.abc import Iterable, Mapping

import jax
from flax import nnx

from common.models.surgery import get_module, replace_module
from common.quantization.linear import QuantizedLinear
from common.quantization.quantized_array import QuantizedArray
from projects.zeroquant_v2.low_rank import LowRank

Array = jax.Array


class LowRankFactors(nnx.Variable):
  """An NNX variable that holds a `LowRank`."""


class CompensatedLinear(nnx.Module):
  """x W_q + (x A) B + bias."""

  def __init__(self, quantized: QuantizedLinear, factors: LowRank):
    self.quantized = quantized
    self.factors = LowRankFactors(factors)

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out] in x's dtype."""
    return self.quantized(x) + self.factors.get_value().apply(x)


def compensate_linears(module: nnx.Module, factors: Mapping[str, LowRank]) -> None:
  """Gives the packed linear at each path its second path, in place."""
  for path, low_rank in factors.items():
    replace_module(module, path, CompensatedLinear(get_module(module, path), low_rank))


def bits_per_weight(weights: Iterable[QuantizedArray], factors: Iterable[LowRank] = ()) -> float:
  """Mean stored bits of weights: codes, scales, zero points and LoRC's factors."""
  sizes = [(w.bits_per_weight(), w.shape[0] * w.shape[1]) for w in weights]
  bits = sum(b * n for b, n in sizes) + sum(f.stored_bits() for f in factors)
  return bits / sum(n for _, n in sizes)
