"""The weight-only products that are counted on TPU: shapes, arguments, and how often regions run."""

from benchmarks.kernels.tpu_schedule import on_chip  # isort: skip

import jax
import jax.numpy as jnp

from kernels.quantized_matmul import tpu_operands
from kernels.quantized_matmul.packing import pack, packed_dtype

# Inputs and outputs of Llama-2-7B's and Llama-2-70B's projections.
SQUARE, DOWN, UP = (4096, 4096), (11008, 4096), (4096, 11008)
SQUARE_70B, DOWN_70B, UP_70B = (8192, 8192), (28672, 8192), (8192, 28672)
DECODING = [  # Shape, bits, rows, and how many inputs and outputs share a scale.
  *((SQUARE, 4, rows, (128, 1)) for rows in (1, 16, 32, 64)),
  *((SQUARE, 2, rows, (128, 1)) for rows in (16, 32, 64)),
  *((SQUARE, 3, rows, (128, 1)) for rows in (1, 16, 32, 64)),
  *((SQUARE, 8, rows, (128, 1)) for rows in (16, 64)),
  (DOWN, 4, 16, (128, 1)),
  (DOWN, 3, 16, (128, 1)),
  *((UP, 4, rows, (128, 1)) for rows in (1, 16, 32, 64)),
  *((shape, 4, rows, (128, 1)) for shape in (SQUARE_70B, UP_70B, DOWN_70B) for rows in (16, 64)),
  *((SQUARE, 4, rows, (32, 1)) for rows in (4, 16)),
  *((SQUARE, 4, rows, (64, 1)) for rows in (8, 16)),
]
PREFILL = [(shape, 2048) for shape in (SQUARE, UP)]
# More than the pipeline's own conditions within a step have, less than the kernel's.
SMALL_REGION = 24


def arguments(shape, bits, rows, group=(128, 1), *, symmetric=False):
  """x in bfloat16 [rows, inputs], packed codes, bfloat16 scales and zero points, all abstract.

  Symmetric codes have no zero points.
  """
  inputs, columns = shape
  groups = (inputs // group[0], columns // group[1])
  array = jax.ShapeDtypeStruct
  zeros = array(groups, packed_dtype(8 if bits == 3 else bits, signed=False))
  return [
    array((rows, inputs), jnp.bfloat16),
    jax.eval_shape(lambda codes: pack(codes, bits, signed=symmetric), array(shape, jnp.int32)),
    array(groups, jnp.bfloat16),
    *([] if symmetric else [zeros]),
  ]


def packed_bytes(arrays, bits) -> float:
  """What must be read and written: codes, scales, zero points, x and the result."""
  x, _, scales, zeros = arrays
  (rows, inputs), columns = x.shape, arrays[1].shape[-1]
  per_group = 2 + jnp.iinfo(zeros.dtype).bits / 8
  return inputs * columns * bits / 8 + scales.size * per_group + rows * (inputs + columns) * 2


def regions(chip, shape, bits) -> list[int]:
  """How often one core splits activations, starts a sum and ends it (the kernels' `_kernel`)."""
  with on_chip(chip):
    _, columns, blocks, _ = tpu_operands.grid(shape, 128, bits)
  return [1] if blocks == 1 else [blocks, columns, columns]
