"""Matrix product with weights of few-bit floating point (E2M1, E1M2, E3M0, E4M3, ...)."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels.float_matmul import mosaic_gpu, xla

Array = jax.Array

_IMPLEMENTATIONS = {"xla": xla, "mosaic_gpu": mosaic_gpu}


def float_matmul(
  x: Array,
  values: Array,
  scales: Array,
  *,
  exponent_bits: int,
  mantissa_bits: int,
  implementation: Literal["xla", "mosaic_gpu"] | None = None,
) -> Array:
  """Computes x @ W for W = scales * decoded codes.

  An exponent bias b of a channel, real or integer, is its scale 2^-b.

  Args:
    x: [..., in], float32 or bfloat16.
    values: codes as of `xla.decode`, uint4 (formats of 4 bits) or uint8, [in, out].
    scales: [in / group, out], any float type; one row for a scale per channel.
    exponent_bits, mantissa_bits: of the format; with the sign at most 4 or 8 bits.
    implementation: "xla" for any arguments and platform, which None takes too; "mosaic_gpu" for
      bfloat16 x on Hopper GPUs (see its `unsupported`), which has not run on a GPU yet.

  Returns:
    [..., out] in x's dtype; sums are accumulated in float32. Differentiable by x and scales.

  Raises:
    ValueError: an argument has an unsupported value, shape or type, or the implementation that is
      named does not support them.
  """
  if implementation is not None and implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"implementation {implementation!r} is not supported; supported: {', '.join(_IMPLEMENTATIONS)}"
    )
  bits = 1 + exponent_bits + mantissa_bits
  if not (1 <= exponent_bits <= 5 and 0 <= mantissa_bits and bits <= 8):
    raise ValueError(
      f"E{exponent_bits}M{mantissa_bits} is not supported: expected 1 to 5 exponent bits and at most "
      "8 bits in all"
    )
  if x.ndim == 0 or x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 or bfloat16 [..., in]")
  expected = jnp.dtype(jnp.uint4 if bits <= 4 else jnp.uint8)
  if values.dtype != expected or values.ndim != 2 or values.shape[0] != x.shape[-1]:
    raise ValueError(
      f"values are {values.dtype} {values.shape}, expected {expected} [{x.shape[-1]}, out]"
    )
  inputs, columns = values.shape
  if scales.ndim != 2 or not scales.shape[0] or scales.shape[1] != columns:
    raise ValueError(f"scales {scales.shape}, expected [groups, {columns}]")
  if inputs % scales.shape[0]:
    raise ValueError(f"{scales.shape[0]} groups do not divide {inputs} inputs")
  if implementation == "mosaic_gpu":
    problem = mosaic_gpu.unsupported(x, values, scales, exponent_bits, mantissa_bits)
    if problem:
      raise ValueError(f"mosaic_gpu does not support {problem}; implementation=None or 'xla' does")
  chosen = _IMPLEMENTATIONS[implementation or "xla"]
  return chosen.float_matmul(x, values, scales, exponent_bits, mantissa_bits)
