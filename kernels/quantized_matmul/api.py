"""Matrix product with weight-only quantized weights: the one public function."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels.quantized_matmul import xla
from kernels.quantized_matmul.packing import PLANE_ROWS, SUPPORTED_BITS, packed_dtype

Array = jax.Array


def quantized_matmul(
  x: Array,
  values: Array,
  scales: Array,
  zero_points: Array | None = None,
  *,
  bits: int,
  implementation: Literal["xla"] | None = None,
) -> Array:
  """Computes x @ W for W [in, out] stored in low-bit codes.

  Args:
    x: [..., in], float32 or bfloat16.
    values: packed codes of W: [in, out] in a native 2-, 4- or 8-bit type, or uint32
      [ceil(in / 32), 3, out] bit planes for 3 bits (`packing.pack`).
    scales: [in / group, out] (groups along the input), [in, out / group] (along the output) or
      [1, 1] (per tensor), any float type.
    zero_points: unsigned codes of the value 0, shaped like `scales`; None for symmetric codes.
    bits: 2, 3, 4 or 8.
    implementation: "xla"; None picks the best that supports the arguments.

  Returns:
    [..., out] in x's dtype; sums are accumulated in float32.

  Raises:
    ValueError: an argument has an unsupported value, shape or type.
  """
  if implementation not in (None, "xla"):
    raise ValueError(f"implementation {implementation!r} is not supported; supported: xla")
  if bits not in SUPPORTED_BITS:
    raise ValueError(f"{bits} bits are not supported; supported: {SUPPORTED_BITS}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be floating point, got {x.dtype}")
  if x.ndim == 0:
    raise ValueError("x must have at least one dimension")
  rows, columns = x.shape[-1], values.shape[-1]
  expected = (-(-rows // PLANE_ROWS), 3, columns) if bits == 3 else (rows, columns)
  if values.shape != expected:
    raise ValueError(f"values have shape {values.shape}, expected {expected} for x {x.shape}")
  # A signed code read as unsigned, or the other way round, would be silently wrong.
  dtype = packed_dtype(bits, signed=zero_points is None)
  if values.dtype != dtype:
    raise ValueError(f"values are {values.dtype}, expected {jnp.dtype(dtype)}")
  if scales.ndim != 2 or 0 in scales.shape or rows % scales.shape[0] or columns % scales.shape[1]:
    raise ValueError(f"scales {scales.shape} do not divide the weights ({rows}, {columns})")
  if zero_points is not None and zero_points.shape != scales.shape:
    raise ValueError(f"zero_points {zero_points.shape} differ from scales {scales.shape}")
  return xla.quantized_matmul(x, values, scales, zero_points, bits=bits)
