"""Quantization of activations per token on TPU, one pass over them.

XLA reads x twice, for the largest values and for the codes, and on v5p keeps the codes in the
chip's own memory: the integer product of 2048 rows that follows then takes more cycles than one of
codes in HBM, where they go here. The product remains XLA's.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.integer_matmul import xla

Array = jax.Array

LANES = 128

_BLOCK_BYTES = 2 * 2**20  # Of x that is on the chip at once; twice that is in use.
_ROWS = 32  # Of a register of codes.


def unsupported(x: Array, activation_scales: Array | None) -> str | None:
  """Why these arguments of `api.integer_matmul` have no kernel here, or None."""
  if activation_scales is not None:
    return "static activation_scales"
  *leading, inputs = x.shape
  rows = math.prod(leading)
  if rows % _ROWS or inputs % LANES or not rows:
    return f"{rows} rows of {inputs} inputs, expected multiples of {_ROWS} and {LANES}"
  if _ROWS * inputs * x.dtype.itemsize > _BLOCK_BYTES:
    most = _BLOCK_BYTES // (_ROWS * x.dtype.itemsize)
    return f"{inputs} inputs of {x.dtype}, expected at most {most}"
  return None


def integer_matmul(
  x: Array,
  values: Array,
  scales: Array,
  activation_scales: None,
  activation_zero_points: None,
  activation_bits: int,
) -> Array:
  """As `api.integer_matmul`, for arguments that `unsupported` has nothing against."""
  return xla.integer_matmul(x, values, scales, None, None, activation_bits, quantize_activations)


def quantize_activations(x: Array, scales: None, zero_points: None, bits: int):
  """As `xla.quantize_activations`, with each token's own scale."""
  *leading, inputs = x.shape
  rows = math.prod(leading)
  most = _BLOCK_BYTES // (inputs * x.dtype.itemsize)
  block = max(n for n in range(_ROWS, most + 1, _ROWS) if rows % n == 0)
  of_rows = lambda columns: pl.BlockSpec((block, columns), lambda i: (i, 0))
  codes, scales = pl.pallas_call(
    functools.partial(_kernel, bits=bits),
    grid=(rows // block,),
    in_specs=[of_rows(inputs)],
    out_specs=[of_rows(inputs), of_rows(1)],
    out_shape=[pltpu.HBM((rows, inputs), jnp.int8), jax.ShapeDtypeStruct((rows, 1), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    name="quantize_activations",
  )(x.reshape(rows, inputs))
  return codes.reshape(x.shape), scales.reshape(*leading, 1)


def _kernel(x, codes, scales, *, bits: int):
  codes[...], scales[...] = xla.quantize_activations(x[...], None, None, bits)
