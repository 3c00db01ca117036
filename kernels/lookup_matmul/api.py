"""Matrix product with vector-quantized weights: indices into codebooks of short vectors."""

import jax
import jax.numpy as jnp

from kernels.lookup_matmul import xla
from kernels.lookup_matmul.xla import PLANE_ROWS, index_bits, lookup, pack_indices, unpack_indices

__all__ = ["index_bits", "lookup", "lookup_matmul", "pack_indices", "unpack_indices"]

Array = jax.Array


def lookup_matmul(
  x: Array,
  planes: Array,
  codebooks: Array,
  residual_planes: Array | None = None,
  residual_codebooks: Array | None = None,
  *,
  columns: int,
) -> Array:
  """Computes x @ W for W = codebook[index] (+ residual_codebook[residual_index]).

  Args:
    x: [..., in], float32 or bfloat16.
    planes: packed indices (`pack_indices`), uint32 [ceil(in / 32), log2 k, ceil(out / v)].
    codebooks: [groups, k, v], any float type; groups divides in, k is a power of two.
    residual_planes, residual_codebooks: of the second stage, or None.
    columns: out.

  Returns:
    float32 [..., out], accumulated in float32.

  Raises:
    ValueError: an argument has an unsupported shape or type.
  """
  if x.ndim == 0 or x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 or bfloat16 [..., in]")
  if (residual_planes is None) != (residual_codebooks is None):
    raise ValueError("residual_planes and residual_codebooks go together")
  stages = [("planes", planes, codebooks)]
  if residual_planes is not None:
    stages.append(("residual_planes", residual_planes, residual_codebooks))
  for name, packed, books in stages:
    if books.ndim != 3 or not books.shape[0] or x.shape[-1] % books.shape[0]:
      raise ValueError(f"codebooks {books.shape}, expected [groups, k, v] for {x.shape[-1]} inputs")
    k, v = books.shape[1:]
    if k != 2 ** index_bits(k):
      raise ValueError(f"{k} centroids, expected a power of two")
    expected = (-(-x.shape[-1] // PLANE_ROWS), index_bits(k), -(-columns // v))
    if packed.dtype != jnp.uint32 or packed.shape != expected:
      raise ValueError(f"{name} are {packed.dtype} {packed.shape}, expected uint32 {expected}")
  return xla.lookup_matmul(x, planes, codebooks, residual_planes, residual_codebooks, columns)
