"""Products with low-bit floating-point weights in plain JAX."""

import jax
import jax.numpy as jnp

Array = jax.Array


def decode(codes: Array, exponent_bits: int, mantissa_bits: int) -> Array:
  """Values of codes with the exponent bias 0, float32.

  A code is sign, exponent p, mantissa k from the highest bit down; there is no infinity and no NaN:

    (-1)^sign 2^p (1 + k / 2^m)   for p >= 1,      (-1)^sign 2 k / 2^m   for p = 0 (subnormal)

  Args:
    codes: unsigned integers of 1 + exponent_bits + mantissa_bits bits.
  """
  codes = codes.astype(jnp.int32)
  mantissa = codes & (2**mantissa_bits - 1)
  exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
  normal = exponent > 0
  significand = mantissa + jnp.where(normal, 2**mantissa_bits, 0)
  # 2^p in float32's own representation: exact, and a shift where a power would be a table.
  power = jax.lax.bitcast_convert_type(
    (jnp.maximum(exponent, 1) + 127 - mantissa_bits) << 23, jnp.float32
  )
  value = significand.astype(jnp.float32) * power
  return jnp.where(codes >> (exponent_bits + mantissa_bits), -value, value)


def float_matmul(
  x: Array, values: Array, scales: Array, exponent_bits: int, mantissa_bits: int
) -> Array:
  """As `api.float_matmul`."""
  # Decode when x is there: see quantized_matmul/xla.py.
  x, values, scales = jax.lax.optimization_barrier((x, values, scales))
  weights = decode(values, exponent_bits, mantissa_bits)
  groups = weights.reshape(scales.shape[0], -1, weights.shape[1])
  weights = (groups * scales.astype(jnp.float32)[:, None]).reshape(weights.shape).astype(x.dtype)
  return jnp.dot(x, weights, preferred_element_type=jnp.float32).astype(x.dtype)
