"""What the weight-only products on TPU share: operands, digits of x, unpacked codes, sizes of blocks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.platform import tpu_chip
from kernels.quantized_matmul.packing import RUN_ROWS, WORD_ROWS

Array = jax.Array

LANES = 128  # Columns of a register, and inputs of the matrix unit.
ROW_TILE = 16  # Two digits of it fill an 8-bit tile.
ACTIVATION_BLOCK = 512  # At most; sums over it fit into int32.
BLOCK_COLUMNS = (512, 256, 128)
# Fewer operations go around the products of wider blocks, but nothing is computed while the first is
# read, nor read while the last is computed: they pay where a core has so many steps.
_WIDE_BLOCK, _WIDE_STEPS = 1024, 8
_PADDING = 1 / 20  # Of the columns, at most, that a last block may have beyond them.
VMEM_BYTES = 64 * 2**20
_BLOCK_INPUTS = 6144  # At most, if not too few are left.


def block_inputs(inputs: int, group: int, bits: int) -> int:
  """Inputs that a step of the grid reads, whose loop is unrolled: a multiple of `group`."""
  unit = math.lcm(group, RUN_ROWS) if bits == 3 else group
  block = largest_divisor(inputs, unit, _BLOCK_INPUTS)
  # Too little work for a step: 3-bit codes of 11008 = 43 x 256 inputs.
  return block if block > _BLOCK_INPUTS // 8 else largest_divisor(inputs, unit, 2 * _BLOCK_INPUTS)


def largest_divisor(number: int, multiple_of: int, at_most: int) -> int:
  """The largest divisor that is a multiple and not too large, or else `multiple_of`."""
  found = [n for n in range(multiple_of, at_most + 1, multiple_of) if number % n == 0]
  return max(found, default=multiple_of)


class Weights(NamedTuple):
  """Weights [inputs, columns] with scales along the input, as operands of a kernel.

  Attributes:
    grid: cores, blocks of columns of each and blocks of inputs.
    block, block_columns: inputs and columns of a step.
    arguments, specs: values, scales and zero points, which may be None.
    activations, out: specs of all rows of x, which a core reads in its first columns and not again,
      and of the result.
  """

  grid: tuple[int, int, int]
  block: int
  block_columns: int
  arguments: list[Array | None]
  specs: list[pl.BlockSpec | None]
  activations: pl.BlockSpec
  out: pl.BlockSpec


def grid(shape: tuple[int, int], group: int, bits: int) -> tuple[int, int, int, int]:
  """Cores, blocks of columns of each, blocks of inputs of weights [inputs, columns]; a block's columns.

  The groups are of a multiple of 128 inputs, or, if they are smaller, taken together. The last block of
  columns may reach beyond the weights: Llama-2-7B's 11008 are 43 x 256, and 22 blocks of 512.
  """
  inputs, columns = shape
  blocks = inputs // block_inputs(inputs, group, bits)
  # The cores of a chip share the columns. Of an unknown one, there may be two.
  most = 1 if (info := tpu_chip()) and not info.is_megacore else 2
  for block_columns in (_WIDE_BLOCK, *BLOCK_COLUMNS):
    count = -(-columns // block_columns)
    steps = count * blocks // most
    padded = count * block_columns <= columns * (1 + _PADDING)
    if padded and count % most == 0 and (block_columns < _WIDE_BLOCK or steps >= _WIDE_STEPS):
      return most, count // most, blocks, block_columns
  block_columns = next(n for n in BLOCK_COLUMNS if columns % n == 0)
  return 1, columns // block_columns, blocks, block_columns


def weights(
  values: Array,
  scales: Array,
  zero_points: Array | None,
  *,
  bits: int,
  inputs: int,
  group: int,
  rows: int,
  out_rows: int,
) -> Weights:
  """Operands over `grid`.

  Args:
    values, scales, zero_points: as of `api.quantized_matmul`; scales [groups, columns].
    group: inputs that are summed before they are scaled; divides the scales' groups.
    rows, out_rows: of x and of the result.
  """
  columns = values.shape[1]
  cores, per_core, blocks, block_columns = grid((inputs, columns), max(group, LANES), bits)
  block = inputs // blocks
  of_columns = lambda rows: pl.BlockSpec(
    (rows, block_columns), lambda c, n, k: (0, c * per_core + n)
  )
  of_values = pl.BlockSpec(
    (len(values) * block // inputs, block_columns), lambda c, n, k: (k, c * per_core + n)
  )
  if scales.dtype == jnp.float16:
    scales = scales.astype(jnp.float32)  # TPUs have no float16.
  of_groups = of_columns(len(scales))
  activations = pl.BlockSpec((rows, block), lambda c, n, k: (0, jnp.where(n == 0, k, blocks - 1)))
  return Weights(
    (cores, per_core, blocks),
    block,
    block_columns,
    # XLA's compiler aborts where it converts 2-bit zero points of few groups: the kernels do.
    [values, scales, zero_points],
    [of_values, of_groups, None if zero_points is None else of_groups],
    activations,
    of_columns(out_rows),
  )


def float32_dot(a: Array, b: Array) -> Array:
  """a @ b of float32 [rows, n] and [n, columns] for few n.

  As precision "highest" it sums six products of bfloat16 parts. Each of them would take the matrix
  unit as long as one of 128 or more n: they are laid on end and summed as one.
  """
  (a1, a2, a3), (b1, b2, b3) = _bfloat16_parts(a), _bfloat16_parts(b)
  a = jnp.concatenate([a1, a1, a1, a2, a2, a3], axis=1)
  b = jnp.concatenate([b1, b2, b3, b1, b2, b1], axis=0)
  return jnp.dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _bfloat16_parts(x: Array) -> list[Array]:
  """Three float32 arrays of bfloat16's precision whose sum is x: 8 of its 24 bits each."""
  parts = []
  for _ in range(3):
    # Not by a conversion and back, which XLA may leave out.
    upper = jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
    parts.append(jax.lax.bitcast_convert_type(upper, jnp.float32))
    x = x - parts[-1]
  return parts


def split_activations(x: Array) -> tuple[Array, Array, Array]:
  """x = (256 high + low) step, [rows, inputs], with one step for all inputs of a row.

  Returns:
    high and low digits, int32 [rows, inputs] in int8's range, and step, float32 [rows, 1].
  """
  x = x.astype(jnp.float32)
  magnitude = jnp.abs(x)
  # A maximum may drop NaN, a comparison does not.
  magnitude = jnp.where(magnitude < jnp.inf, magnitude, jnp.inf)
  largest = jnp.max(magnitude, axis=-1, keepdims=True)
  # A float's exponent alone is the power of two below it: at most 2^14 steps make up a value.
  exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
  step = jax.lax.bitcast_convert_type(exponent, jnp.float32) * 2.0**-13
  step = jnp.where(step == 0, 1.0, step)
  q = jnp.round(x / step).astype(jnp.int32)
  low = ((q + 128) & 255) - 128
  return (q - low) >> 8, low, step


def unpack(values: Array, bits: int) -> Array:
  """2^(8 - bits) times the codes as int8, every (8 / bits)-th row first, then those after them.

  Args:
    values: packed codes [inputs, columns]; unsigned ones are read as signed, less 2^(bits - 1).
    bits: 2, 4 or 8.
  """
  words = pltpu.bitcast(values, jnp.int32)
  if jnp.issubdtype(values.dtype, jnp.unsignedinteger):
    words ^= every(bits, 1 << bits - 1)
  top = every(8, 256 - (1 << 8 - bits))
  parts = [(words << shift if shift else words) & top for shift in range(8 - bits, -1, -bits)]
  return jnp.concatenate([pltpu.bitcast(part, jnp.int8) for part in parts], axis=0)


def words_of_three(values, at: int) -> tuple[Array, Array]:
  """Words int32 [8, columns] whose every four bits have a 3-bit code at the top; see `packing`.

  Returns:
    Those of 64 inputs twice: of the 128 inputs from `at` on in a block.
  """
  run = RUN_ROWS // WORD_ROWS
  start = at // RUN_ROWS * 3 * run
  a, b, c = (
    pltpu.bitcast(values[start + i * run : start + (i + 1) * run], jnp.int32) for i in range(3)
  )
  if at % RUN_ROWS == 0:
    return a, b
  bit = every(4, 1)
  return c, (a & bit) << 3 | (b & bit) << 2 | (c & bit) << 1


def unpacked_codes(values, at: int, bits: int) -> Array:
  """2^(8 - bits) times the codes of 128 inputs in a block, int8 [128, columns]."""
  if bits != 3:
    return unpack(values[at : at + LANES], bits)
  top = every(8, 0xE0)
  codes = [code & top for words in words_of_three(values, at) for code in (words, words << 4)]
  return jnp.concatenate([pltpu.bitcast(code, jnp.int8) for code in codes])


def in_order_of_codes(x: Array, bits: int) -> Array:
  """x, or digits of it, bfloat16 or int8 [rows, 128], in the order of `unpacked_codes`' inputs."""
  if bits in (3, 8):
    return x
  sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
  order = _unpacked_order(bits).astype(x.dtype)
  return jnp.dot(x, order, preferred_element_type=sums).astype(x.dtype)


def _unpacked_order(bits: int) -> Array:
  """The permutation [128, 128] that puts inputs in the order of `unpack`."""
  source = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
  target = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
  per_byte, stride = 8 // bits, LANES * bits // 8
  shift = stride.bit_length() - 1
  return source == (target & (stride - 1)) * per_byte + (target >> shift)


def every(bits: int, pattern: int) -> Array:
  """A word that repeats a pattern of `bits` bits."""
  word = sum(pattern << i for i in range(0, 32, bits))
  return jnp.int32(word - (1 << 32) if word >> 31 else word)
