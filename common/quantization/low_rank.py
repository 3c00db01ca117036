"""LoRC, low rank compensation of a weight's rounding error (section 5 of ZeroQuant-V2).

    E = W - W_q = U S V^T,    A = U_m S_m^(1/2),    B = S_m^(1/2) V_m^T,    y = x W_q + (x A) B

A B is the best approximation of E of rank m in the Frobenius norm (Eckart and Young, 1936):
||E - A B||^2 is the sum of the squared singular values from the (m + 1)-th on. It needs neither data
nor training, and does not ask how W_q came about.

Weights are [in, out] here, the transpose of the paper's: its V is A, its U is B.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.surgery import get_module, replace_module
from common.quantization import rtn
from common.quantization.linear import QuantizedLinear
from common.quantization.quantized_array import IntegerFormat, QuantizedArray
from kernels.quantized_matmul.api import quantized_matmul

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A matrix [in, out] as the product of two factors. A pytree.

  Attributes:
    a: [in, m].
    b: [m, out]; floating point, or both are 8-bit codes with a scale per component.
  """

  a: Array | QuantizedArray
  b: Array | QuantizedArray

  def product(self) -> Array:
    """A B, float32 [in, out]."""
    return jnp.matmul(_dense(self.a), _dense(self.b), precision="highest")

  def apply(self, x: Array) -> Array:
    """(x A) B in x's dtype: [..., in] -> [..., out], without the product of the factors."""
    return _matmul(_matmul(x, self.a), self.b)

  def truncated(self, rank: int) -> "LowRank":
    """The first `rank` components of floating-point factors, the largest ones."""
    return LowRank(self.a[:, :rank], self.b[:rank])

  def stored_bits(self) -> float:
    """Bits of both factors: codes with their scales, or 16 a value."""
    return sum(
      f.bits_per_weight() * f.shape[0] * f.shape[1]
      if isinstance(f, QuantizedArray)
      else 16 * f.size
      for f in (self.a, self.b)
    )


def low_rank(error: Array, rank: int) -> LowRank:
  """The best approximation of rank m of an error, with balanced factors: A^T A = B B^T = S_m.

  V_m is the last m eigenvectors of E^T E, and U_m S_m = E V_m; of E E^T where that is smaller. The
  eigenvectors cost a third of an SVD, and A B = E V_m V_m^T is a projection whatever their error.

  Args:
    error: E = W - W_q, [in, out].
    rank: m.

  Returns:
    Factors in float32; the components are in descending order of their singular values. Squared,
    those below 3e-4 of the largest drown in float32's rounding of E^T E: ||E - A B||^2 exceeds the
    least by up to about 1e-6 m times the largest squared singular value.

  Raises:
    UserError: the matrix has no such rank.
  """
  check_rank(rank, error.shape)
  error = error.astype(jnp.float32)
  if error.shape[0] < error.shape[1]:
    transposed = low_rank(error.T, rank)
    return LowRank(transposed.b.T, transposed.a.T)
  _, vectors = jnp.linalg.eigh(jnp.matmul(error.T, error, precision="highest"))
  v = vectors[:, ::-1][:, :rank]
  us = jnp.matmul(error, v, precision="highest")
  root = jnp.sqrt(jnp.linalg.norm(us, axis=0))
  return LowRank(us / jnp.where(root > 0, root, 1), root[:, None] * v.T)


def check_rank(rank: int, shape: tuple[int, int]) -> None:
  """Checks that a matrix [in, out] has the rank.

  Raises:
    UserError: it has not.
  """
  if not 0 <= rank <= min(shape):
    raise UserError(f"rank={rank} of a weight {tuple(shape)}; expected 0 to {min(shape)}")


def quantize_factors(factors: LowRank, scale_dtype=jnp.float16) -> LowRank:
  """Both factors rounded to symmetric 8-bit codes, a scale per component (column of A, row of B)."""
  by_column = IntegerFormat(8, symmetric=True, scale_dtype=scale_dtype)
  by_row = dataclasses.replace(by_column, axis=1)
  return LowRank(rtn.quantize(factors.a, by_column), rtn.quantize(factors.b, by_row))


def residual_energy(error: Array) -> Array:
  """||E - A B||_F^2 / ||E||_F^2 at every rank m = 0, 1, ..., min(in, out), in closed form.

  Args:
    error: [in, out].

  Returns:
    float32 [min(in, out) + 1], from 1 down to 0.
  """
  energy = jnp.linalg.svd(error.astype(jnp.float32), compute_uv=False) ** 2
  # Summed from the small end: the difference of two large sums would have no digits left.
  tail = jnp.append(jnp.cumsum(energy[::-1])[::-1], 0.0)
  return tail / tail[0]


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


def _dense(factor: Array | QuantizedArray) -> Array:
  quantized = isinstance(factor, QuantizedArray)
  return factor.dequantize() if quantized else factor.astype(jnp.float32)


def _matmul(x: Array, factor: Array | QuantizedArray) -> Array:
  if isinstance(factor, QuantizedArray):
    return quantized_matmul(x, factor.values, factor.scales, bits=factor.format.bits)
  return jnp.matmul(x, factor.astype(x.dtype))
