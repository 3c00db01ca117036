"""Kronecker-factored transforms of activations, with quantization: what precedes an integer product.

A matrix P = P1 (x) P2 with P1 [n1, n1], P2 [n2, n2], n1 n2 = n, acts on a row vector x [n], seen as
X [n1, n2] in row-major order, by

    x P = vec(P1^T X P2)

with n (n1 + n2) multiplications instead of n^2 (Sun et al., "FlatQuant", 2024, equations 3 and 4).
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.kronecker_quantize import mosaic_tpu, xla
from kernels.partitioning import of_rows, on_parts, part
from kernels.platform import has_tpu

Array = jax.Array

# Of fewer rows XLA's program is shorter (benchmarks/kernels/fused_tpu).
_FEWEST_ROWS_IN_KERNEL = 16


def kronecker_transform(x: Array, left: Array, right: Array) -> Array:
  """x (P1 (x) P2), in x's dtype and shape.

  Args:
    x: [..., n].
    left: P1, [n1, n1].
    right: P2, [n2, n2]; n1 n2 = n.

  Raises:
    ValueError: an argument has an unsupported shape or type.
  """
  _check(x, left, right)
  return xla.kronecker_transform(x, left, right)


def kronecker_quantize(
  x: Array,
  left: Array,
  right: Array,
  clip: Array | None = None,
  *,
  bits: int,
  implementation: Literal["xla", "mosaic_tpu"] | None = None,
) -> tuple[Array, Array]:
  """x (P1 (x) P2), quantized symmetrically per token.

    y = x (P1 (x) P2),   s = max(|c0 min y|, |c1 max y|) / (2^(bits-1) - 1),   q = round(y / s)

  Args:
    x: [..., n], float32 or bfloat16.
    left: P1, [n1, n1].
    right: P2, [n2, n2]; n1 n2 = n.
    clip: factors of the smallest and of the largest value of every token, [2]; by default 1.
    bits: of a code, 2 to 8.
    implementation: "xla" for any arguments and platform; "mosaic_tpu", which reads x and writes the
      codes once (see its `unsupported`), and may round a value differently that lies at the middle
      of two codes but for the products' rounding. None picks mosaic_tpu where it supports the
      arguments, of 16 rows or more on each TPU: of one, or of a mesh of them (`jax.set_mesh`), which
      cuts x's first dimension (`kernels/partitioning.py`).

  Returns:
    codes int8 [..., n] and their scales float32 [..., 1]; the transformed x is about codes * scales.

  Raises:
    ValueError: an argument has an unsupported value, shape or type, or the implementation that is
      named does not support them.
  """
  if implementation not in (None, "xla", "mosaic_tpu"):
    raise ValueError(
      f"implementation {implementation!r} is not supported; supported: xla, mosaic_tpu"
    )
  _check(x, left, right)
  if not 2 <= bits <= 8:
    raise ValueError(f"{bits} bits are not supported; supported: 2 to 8")
  if clip is not None and clip.shape != (2,):
    raise ValueError(f"clip has shape {clip.shape}, expected (2,)")
  rows = of_rows(x)
  on_device = part(x, rows)
  problem = mosaic_tpu.unsupported(on_device, left, right)
  if implementation == "mosaic_tpu" and problem:
    raise ValueError(f"mosaic_tpu does not support {problem}; implementation=None or 'xla' does")
  many = math.prod(on_device.shape[:-1]) >= _FEWEST_ROWS_IN_KERNEL
  if implementation == "mosaic_tpu" or (
    implementation is None and not problem and many and has_tpu()
  ):
    kernel = functools.partial(mosaic_tpu.kronecker_quantize, bits=bits)
    whole = PartitionSpec()
    return on_parts(kernel, (rows, whole, whole, whole), rows)(x, left, right, clip)
  return xla.kronecker_quantize(x, left, right, clip, bits)


def _check(x: Array, left: Array, right: Array) -> None:
  if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x is {x.dtype} {x.shape}, expected floating point [..., n]")
  for name, matrix in (("left", left), ("right", right)):
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
      raise ValueError(f"{name} has shape {matrix.shape}, expected a square matrix")
  if len(left) * len(right) != x.shape[-1]:
    raise ValueError(
      f"factors of {len(left)} and {len(right)} do not make up the {x.shape[-1]} channels of x"
    )
