"""Reference implementation in plain JAX: dequantize, then dot. The CPU path."""

import functools

import jax
import jax.numpy as jnp

from kernels.quantized_matmul.packing import unpack

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("bits", "rows", "dtype"))
def dequantize(
  values: Array,
  scales: Array,
  zero_points: Array | None,
  *,
  bits: int,
  rows: int,
  dtype=jnp.float32,
) -> Array:
  """(code - zero_point) * scale, [rows, columns].

  Args:
    values: packed codes of a [rows, columns] matrix, see `packing`.
    scales: [rows / group, columns], [rows, columns / group] or [1, 1]: one scale per group of
      consecutive rows, of consecutive columns, or for the whole matrix.
    zero_points: unsigned integers shaped like `scales`, or None for symmetric codes.
    bits: 2, 3, 4, 6 or 8.
    rows: number of rows (3-bit codes are padded).
    dtype: of the result; the arithmetic is float32.
  """
  codes = unpack(values, bits, rows, signed=zero_points is None)
  groups = scales.shape
  shape = (groups[0], rows // groups[0], groups[1], codes.shape[1] // groups[1])
  weights = codes.reshape(shape).astype(jnp.float32)
  if zero_points is not None:
    weights = weights - zero_points.astype(jnp.float32)[:, None, :, None]
  weights = weights * scales.astype(jnp.float32)[:, None, :, None]
  return weights.reshape(codes.shape).astype(dtype)


def quantized_matmul(
  x: Array, values: Array, scales: Array, zero_points: Array | None, *, bits: int
) -> Array:
  """x [..., rows] times the dequantized [rows, columns], accumulated in float32."""
  # Dequantize when x is there, not before: a decoding loop's compiler would otherwise move every
  # layer's dequantization out of the loop and hold the whole model in full precision.
  if bits == 2:  # libtpu 0.0.52 aborts on a barrier with 2-bit values.
    x, scales = jax.lax.optimization_barrier((x, scales))
  else:
    x, values, scales = jax.lax.optimization_barrier((x, values, scales))
  weights = dequantize(values, scales, zero_points, bits=bits, rows=x.shape[-1], dtype=x.dtype)
  return jnp.dot(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def transform_input(x: Array, scale: Array | None, shift: Array | None) -> Array:
  """x~ = (x - shift) / scale of x [..., in], scale and shift [in] or None; in x's dtype."""
  if scale is None and shift is None:
    return x
  y = x.astype(jnp.float32)
  if shift is not None:
    y = y - shift.astype(jnp.float32)
  if scale is not None:
    y = y / scale.astype(jnp.float32)
  return y.astype(x.dtype)


def add_low_rank(y: Array, x: Array, a: Array, b: Array) -> Array:
  """y + (x A) B, of y [..., out], x [..., in], A [in, r] and B [r, out]; in y's dtype."""
  dot = lambda x, w: jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
  return (y.astype(jnp.float32) + dot(dot(x, a).astype(x.dtype), b)).astype(y.dtype)
