"""Products with few-bit floating-point weights on Hopper: the kernels of `quantized_matmul`."""

import functools

import jax
import jax.numpy as jnp

from kernels.float_matmul import xla
from kernels.quantized_matmul import mosaic_gpu
from kernels.quantized_matmul.gpu_operands import (
  FLOAT16_SCALE,
  FloatCodes,
  in_order_of_columns,
)

Array = jax.Array

_MAX_EXPONENT_BITS = 4  # With 5 the largest exponent is float16's infinity.


def unsupported(
  x: Array, values: Array, scales: Array, exponent_bits: int, mantissa_bits: int
) -> str | None:
  """Why these arguments of `api.float_matmul` have no kernel here, or None."""
  if exponent_bits > _MAX_EXPONENT_BITS:
    return f"E{exponent_bits}M{mantissa_bits}, expected at most {_MAX_EXPONENT_BITS} exponent bits"
  return mosaic_gpu.unsupported(x, values, scales, bits=_stored_bits(values))


def float_matmul(
  x: Array, values: Array, scales: Array, exponent_bits: int, mantissa_bits: int
) -> Array:
  """As `api.float_matmul`, for arguments that `unsupported` has nothing against.

  Weights are rounded to bfloat16 as in the reference, whose gradients are used.
  """
  return _float_matmul(x, values, scales, FloatCodes(exponent_bits, mantissa_bits))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _float_matmul(x: Array, values: Array, scales: Array, codes: FloatCodes) -> Array:
  if scales.dtype != jnp.bfloat16:
    scales = scales.astype(jnp.float32)
  numbers = [in_order_of_columns(scales * jnp.array(FLOAT16_SCALE, scales.dtype), codes)]
  name = f"float_matmul_e{codes.exponent_bits}m{codes.mantissa_bits}"
  stored = _stored_bits(values)
  return mosaic_gpu.multiply_codes(x, values, numbers, codes, stored_bits=stored, name=name)


def _float_matmul_forward(x: Array, values: Array, scales: Array, codes: FloatCodes):
  return _float_matmul(x, values, scales, codes), (x, values, scales)


def _float_matmul_backward(codes: FloatCodes, residuals, d_y: Array):
  x, values, scales = residuals
  reference = lambda x, scales: xla.float_matmul(x, values, scales, *codes)
  d_x, d_scales = jax.vjp(reference, x, scales)[1](d_y)
  return d_x, None, d_scales


_float_matmul.defvjp(_float_matmul_forward, _float_matmul_backward)


def _stored_bits(values: Array) -> int:
  return 4 if values.dtype == jnp.uint4 else 8
