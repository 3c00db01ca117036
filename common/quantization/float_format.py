"""Floating-point formats of few bits with a real-valued exponent bias: FP(e, m, b).

With e exponent and m mantissa bits, without infinities and NaN, and with subnormals, the values are

    +-2^(p - b) (1 + k / 2^m),  p = 1 ... 2^e - 1,        +-2^(1 - b) k / 2^m,        k = 0 ... 2^m - 1

Liu et al., "LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (2023), section 3. A bias of its
own for each channel is an array that broadcasts against the values.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.float_matmul import xla

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FloatFormat:
  """E{exponent_bits}M{mantissa_bits}, such as E2M1."""

  exponent_bits: int
  mantissa_bits: int

  def __post_init__(self):
    if not 1 <= self.exponent_bits <= 5 or self.mantissa_bits < 0 or self.bits > 8:
      raise ValueError(f"{self} needs 1 to 5 exponent bits, and at most 8 bits with the sign")

  def __str__(self) -> str:
    return f"E{self.exponent_bits}M{self.mantissa_bits}"

  @property
  def bits(self) -> int:
    """Sign, exponent and mantissa."""
    return 1 + self.exponent_bits + self.mantissa_bits

  @property
  def dtype(self):
    """Of stored codes."""
    return jnp.uint4 if self.bits <= 4 else jnp.uint8


def max_value(format: FloatFormat, bias: Array) -> Array:
  """The largest value, (2 - 2^-m) 2^(2^e - 1 - b)."""
  return (2 - 2.0**-format.mantissa_bits) * jnp.exp2(2**format.exponent_bits - 1 - bias)


def bias_for(format: FloatFormat, maximum: Array) -> Array:
  """The bias at which `maximum` is the largest value."""
  top = jnp.log2(2 - 2.0**-format.mantissa_bits)
  return 2**format.exponent_bits - 1 - jnp.log2(maximum) + top


def fake_quantize(x: Array, format: FloatFormat, bias: Array) -> Array:
  """The nearest value of the format, ties to even, clipped at +-`max_value`; float32.

  Args:
    x: any shape.
    bias: broadcastable to it.
  """
  rounded, _, step = _rounded(x, format, bias)
  return rounded * step


def encode(x: Array, format: FloatFormat, bias: Array) -> Array:
  """Codes of the nearest values: sign, exponent, mantissa from the highest bit down; `format.dtype`.

  Args:
    x: any shape.
    bias: broadcastable to it.
  """
  rounded, exponent, _ = _rounded(x, format, bias)
  # |rounded| is k (subnormal) or 2^m + k, but 2^(m+1) where it was rounded up to the next power of
  # two: the sum carries into the exponent.
  magnitude = jnp.abs(rounded).astype(jnp.int32) + ((exponent - 1) << format.mantissa_bits)
  sign = (rounded < 0).astype(jnp.int32) << (format.bits - 1)
  return (magnitude | sign).astype(format.dtype)


def decode(codes: Array, format: FloatFormat, bias: Array) -> Array:
  """The values of codes, float32."""
  return xla.decode(codes, format.exponent_bits, format.mantissa_bits) * jnp.exp2(-bias)


def _rounded(x: Array, format: FloatFormat, bias: Array) -> tuple[Array, Array, Array]:
  """Integers, int32 exponents p >= 1, and steps 2^(p - m - b): the value is integer * step."""
  largest = max_value(format, bias)
  x = jnp.clip(x.astype(jnp.float32), -largest, largest)
  # log2 of 0 is -inf: the lowest exponent.
  exponent = jnp.maximum(jnp.floor(jnp.log2(jnp.abs(x)) + bias), 1)
  step = jnp.exp2(exponent - format.mantissa_bits - bias)
  return jnp.round(x / step), exponent.astype(jnp.int32), step
