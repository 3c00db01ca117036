"""Weight-only product for few rows on TPU: the packed codes go straight to the matrix unit.

Decoding is bound by the bytes of the weights, if only unpacking keeps up. Here it costs three vector
operations for two registers of 8-bit operands:

- The matrix unit multiplies 8-bit integers. A 4-bit code in the upper half of a byte is 16 times the
  code, so that a shift and two masks turn a word of eight codes into two words of four operands
  each. The codes come out in another order of the input dimension; x is put in the same order.
- x is split into two 8-bit digits, x = (256 high + low) step, with a power of two `step` for each
  row and block of up to 512 inputs. That keeps 14 bits of the block's largest value; bfloat16 has 8.
  The digits are rows of one product: for a few rows the matrix unit takes them for free.
- A group's sum is an exact int32 and is scaled once. Zero points come off by a second, small
  product: (x's sums over the groups) @ (scales * zero points).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.quantized_matmul import xla

Array = jax.Array

LANES = 128  # Columns of a register, and inputs of the matrix unit.
MAX_ROWS = 64
_ROW_TILE = 16  # Two digits of it fill an 8-bit tile.
_ACTIVATION_BLOCK = 512  # At most; sums over it fit into int32.
_BLOCK_INPUTS = 6144  # At most.
_BLOCK_COLUMNS = (512, 256, 128)
_VMEM_BYTES = 64 * 2**20


def unsupported(x: Array, values: Array, scales: Array, *, bits: int) -> str | None:
  """Why these arguments of `api.quantized_matmul` have no kernel here, or None."""
  inputs, columns = x.shape[-1], values.shape[-1]
  rows = math.prod(x.shape[:-1])
  if bits == 3:
    return "3 bits, expected 2, 4 or 8"
  if not 1 <= rows <= MAX_ROWS:
    return f"{rows} rows, expected 1 to {MAX_ROWS}"
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"x of {x.dtype}, expected bfloat16 or float32"
  if inputs % LANES or columns % LANES:
    return f"weights [{inputs}, {columns}], expected multiples of {LANES}"
  group = inputs // scales.shape[0]
  if scales.shape[1] != columns or group % LANES:
    return (
      f"scales {list(scales.shape)}, expected one for each column and group of inputs, the groups "
      f"of a multiple of {LANES}"
    )
  return None


def quantized_matmul(
  x: Array,
  values: Array,
  scales: Array,
  zero_points: Array | None,
  *,
  bits: int,
) -> Array:
  """As `api.quantized_matmul`, for arguments that `unsupported` has nothing against.

  A row with a value that is not finite has no finite result. Gradients are those of the reference.
  """
  return _with_gradient(x, values, scales, zero_points, bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _with_gradient(x, values, scales, zero_points, bits):
  return _quantized_matmul(x, values, scales, zero_points, bits)


def _forward(x, values, scales, zero_points, bits):
  y = _quantized_matmul(x, values, scales, zero_points, bits)
  return y, (x, values, scales, zero_points)


def _backward(bits, residuals, grad):
  x, values, scales, zero_points = residuals
  reference = lambda x, scales: xla.quantized_matmul(x, values, scales, zero_points, bits=bits)
  x_grad, scales_grad = jax.vjp(reference, x, scales)[1](grad)
  return x_grad, None, scales_grad, None


_with_gradient.defvjp(_forward, _backward)


def _quantized_matmul(x, values, scales, zero_points, bits: int) -> Array:
  *leading, inputs = x.shape
  columns, rows = values.shape[-1], math.prod(leading)
  padded = -(-rows // _ROW_TILE) * _ROW_TILE
  x = jnp.pad(x.reshape(rows, inputs), ((0, padded - rows), (0, 0)))
  # Long groups are summed in parts.
  group = math.gcd(inputs // scales.shape[0], _ACTIVATION_BLOCK)
  groups = inputs // group
  scales = jnp.repeat(scales, groups // scales.shape[0], axis=0)
  if scales.dtype == jnp.float16:
    scales = scales.astype(jnp.float32)  # TPUs have no float16.
  block = block_inputs(inputs, group)
  activation_block = _largest_divisor(block, group, _ACTIVATION_BLOCK)
  blocks = inputs // block
  block_columns = next(n for n in _BLOCK_COLUMNS if columns % n == 0)
  # The cores of a chip share the columns; each splits the activations once, in its first column.
  cores = math.gcd(columns // block_columns, 2)
  per_core = columns // block_columns // cores
  x_index = lambda c, n, k: (0, jnp.where(n == 0, k, blocks - 1))  # And is not read again.
  of_columns = pl.BlockSpec((groups, block_columns), lambda c, n, k: (0, c * per_core + n))
  arguments = [x, values, scales]
  in_specs = [
    pl.BlockSpec((padded, block), x_index),
    pl.BlockSpec((block, block_columns), lambda c, n, k: (k, c * per_core + n)),
    of_columns,
  ]
  if zero_points is not None:
    zero_points = jnp.repeat(zero_points, groups // len(zero_points), axis=0)
    # Unsigned codes are read as signed ones, which are 2^(bits - 1) less.
    arguments.append(zero_points.astype(jnp.int8) - 2 ** (bits - 1))
    in_specs.append(of_columns)
  out = pl.pallas_call(
    functools.partial(_kernel, bits=bits, group=group, activation_block=activation_block),
    grid=(cores, per_core, blocks),
    in_specs=in_specs,
    out_specs=pl.BlockSpec((padded, block_columns), lambda c, n, k: (0, c * per_core + n)),
    out_shape=jax.ShapeDtypeStruct((padded, columns), x.dtype),
    scratch_shapes=[
      pltpu.VMEM((padded, block_columns), jnp.float32),
      pltpu.VMEM((groups, block_columns), jnp.float32),
      pltpu.VMEM((blocks, 2 * padded, block), jnp.int8),
      pltpu.VMEM((inputs // activation_block, padded, LANES), jnp.float32),
      pltpu.VMEM((padded, -(-groups // LANES) * LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    ),
    name=f"quantized_matmul_w{bits}",
  )(*arguments)
  return out[:rows].reshape(*leading, columns)


def block_inputs(inputs: int, group: int) -> int:
  """Inputs that one step of the grid reads; the loop over their groups is unrolled."""
  return _largest_divisor(inputs, group, _BLOCK_INPUTS)


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
    words ^= _every(bits, 1 << bits - 1)
  top = _every(8, 256 - (1 << 8 - bits))
  parts = [(words << shift if shift else words) & top for shift in range(8 - bits, -1, -bits)]
  return jnp.concatenate([pltpu.bitcast(part, jnp.int8) for part in parts], axis=0)


def _kernel(x, values, scales, *rest, bits: int, group: int, activation_block: int):
  *zero_points, out, total, float_scales, digits, steps, sums = rest
  rows, inputs = x.shape
  column, block, blocks = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  first_group = block * (inputs // group)
  first_step = block * (inputs // activation_block)

  @pl.when((column == 0) & (block == 0))
  def _():
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

  @pl.when(column == 0)
  def _():
    order = _unpacked_order(bits)
    for i, start in enumerate(range(0, inputs, activation_block)):
      high, low, step = split_activations(x[:, start : start + activation_block])
      both = jnp.concatenate([high, low]).astype(jnp.int8)
      for at in range(0, activation_block, LANES):
        chunk = both[:, at : at + LANES]
        ordered = jnp.dot(chunk, order, preferred_element_type=jnp.int32)
        digits[block, :, start + at : start + at + LANES] = ordered.astype(jnp.int8)
        if zero_points:
          is_group = jax.lax.broadcasted_iota(jnp.int32, (LANES, sums.shape[1]), 1) == (
            first_group + (start + at) // group
          )
          of_group = jnp.dot(chunk, is_group.astype(jnp.int8), preferred_element_type=jnp.int32)
          sums[...] += ((of_group[:rows] << 8) + of_group[rows:]).astype(jnp.float32) * step
      steps[first_step + i] = jnp.broadcast_to(step * 2.0 ** (bits - 8), (rows, LANES))

  @pl.when(block == 0)
  def _():
    float_scales[...] = scales[...].astype(jnp.float32)
    total[...] = jnp.zeros(total.shape, total.dtype)

  for i, start in enumerate(range(0, inputs, activation_block)):
    part = jnp.zeros(out.shape, jnp.float32)
    for at in range(start, start + activation_block, group):
      chunks = [unpack(values[j : j + LANES], bits) for j in range(at, at + group, LANES)]
      codes = jnp.concatenate(chunks)
      product = jnp.dot(digits[block, :, at : at + group], codes, preferred_element_type=jnp.int32)
      product = (product[:rows] << 8) + product[rows:]
      part += product.astype(jnp.float32) * float_scales[pl.ds(first_group + at // group, 1)]
    total[...] += part * jnp.tile(steps[first_step + i], (1, out.shape[1] // LANES))

  @pl.when(block == blocks - 1)
  def _():
    y = total[...]
    if zero_points:
      offsets = float_scales[...] * zero_points[0][...].astype(jnp.float32)
      y -= jnp.dot(
        sums[:, : scales.shape[0]],
        offsets,
        precision="highest",
        preferred_element_type=jnp.float32,
      )
    out[...] = y.astype(out.dtype)


def _unpacked_order(bits: int) -> Array:
  """The permutation int8 [128, 128] that puts inputs in the order of `unpack`."""
  source = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
  target = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
  per_byte, stride = 8 // bits, LANES * bits // 8
  shift = stride.bit_length() - 1
  return (source == (target & (stride - 1)) * per_byte + (target >> shift)).astype(jnp.int8)


def _every(bits: int, pattern: int) -> Array:
  """A word that repeats a pattern of `bits` bits."""
  word = sum(pattern << i for i in range(0, 32, bits))
  return jnp.int32(word - (1 << 32) if word >> 31 else word)


def _largest_divisor(number: int, multiple_of: int, at_most: int) -> int:
  """The largest divisor that is a multiple and not too large, or else `multiple_of`."""
  found = [n for n in range(multiple_of, at_most + 1, multiple_of) if number % n == 0]
  return max(found, default=multiple_of)
