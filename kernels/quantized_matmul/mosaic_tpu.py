"""Weight-only product for few rows on TPU: the packed codes go straight to the matrix unit.

Decoding is bound by the bytes of the weights, if only unpacking keeps up. Here it costs three vector
operations for two registers of 8-bit operands (20 for eight registers of 3-bit codes):

- The matrix unit multiplies 8-bit integers. A 4-bit code in the upper half of a byte is 16 times the
  code, so that a shift and two masks turn a word of eight codes into two words of four operands
  each. The codes come out in another order of the input dimension; x is put in the same order.
- x is split into two 8-bit digits, x = (256 high + low) step, with a power of two `step` for each
  row and block of up to 512 inputs. That keeps 14 bits of the block's largest value; bfloat16 has 8.
  The digits are rows of one product: for a few rows the matrix unit takes them for free.
- A group's sum is an exact int32 and is scaled once. The matrix unit sums 128 inputs: of groups of 32
  or 64 each has rows of digits of its own, zero outside of the group. Zero points come off by a
  second, small product: (x's sums over the groups) @ (scales * zero points).

Scales along the output are in `tpu_output_groups`, many rows of bfloat16 in `tpu_bfloat16`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.quantized_matmul import tpu_bfloat16, tpu_output_groups
from kernels.quantized_matmul.gradient import with_reference_gradient
from kernels.quantized_matmul.packing import RUN_ROWS
from kernels.quantized_matmul.tpu_operands import (
  ACTIVATION_BLOCK,
  LANES,
  ROW_TILE,
  VMEM_BYTES,
  float32_dot,
  in_order_of_codes,
  largest_divisor,
  split_activations,
  unpacked_codes,
  weights,
)

Array = jax.Array

MAX_ROWS = 64
_SMALL_GROUPS = (32, 64)  # Inputs, fewer than the matrix unit's.


def unsupported(x: Array, values: Array, scales: Array, *, bits: int) -> str | None:
  """Why these arguments of `api.quantized_matmul` have no kernel here, or None."""
  inputs, columns = x.shape[-1], values.shape[-1]
  rows = math.prod(x.shape[:-1])
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"x of {x.dtype}, expected bfloat16 or float32"
  if inputs % LANES or columns % LANES:
    return f"weights [{inputs}, {columns}], expected multiples of {LANES}"
  if bits == 3 and inputs % RUN_ROWS:
    return f"{inputs} inputs of 3 bits, expected a multiple of {RUN_ROWS}"
  group = inputs // scales.shape[0]
  along_output = group == 1 and (columns // scales.shape[1]) % LANES == 0
  along_input = scales.shape[1] == columns and (group % LANES == 0 or group in _SMALL_GROUPS)
  if not along_input and not along_output:
    return (
      f"scales {list(scales.shape)}, expected one for each column and group of inputs, the groups "
      f"of 32, 64 or a multiple of {LANES}, or one for each input and group of columns, the groups "
      f"of a multiple of {LANES}"
    )
  if along_output:
    group = LANES
  most = MAX_ROWS * min(group, LANES) // LANES
  if not 1 <= rows <= most:
    return f"{rows} rows, expected 1 to {most} for groups of {group} inputs"
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
  return _quantized_matmul(x, values, scales, zero_points, bits)


@with_reference_gradient
def _quantized_matmul(x, values, scales, zero_points, bits: int) -> Array:
  if scales.shape[1] != values.shape[1]:
    return tpu_output_groups.quantized_matmul(x, values, scales, zero_points, bits=bits)
  if tpu_bfloat16.supported(x, values, scales):
    return tpu_bfloat16.quantized_matmul(x, values, scales, zero_points, bits=bits)
  *leading, inputs = x.shape
  columns, rows = values.shape[-1], math.prod(leading)
  # Long groups are summed in parts.
  group = math.gcd(inputs // scales.shape[0], ACTIVATION_BLOCK)
  copies = max(LANES // group, 1)  # Of the rows, one for each group of the same 128 inputs.
  tile = ROW_TILE // copies if rows * copies <= ROW_TILE else max(ROW_TILE // copies, 8)
  of_rows = -(-rows // tile) * tile
  padded = of_rows * copies
  x = jnp.pad(x.reshape(rows, inputs), ((0, of_rows - rows), (0, 0)))
  x = jnp.tile(x, (copies, 1))
  groups = len(scales)
  parts = inputs // groups // group
  sizes = {"bits": bits, "inputs": inputs, "group": group, "rows": padded, "out_rows": of_rows}
  w = weights(values, scales, zero_points, **sizes)
  blocks = w.grid[2]
  activation_block = largest_divisor(w.block, max(group, LANES), ACTIVATION_BLOCK)
  out = pl.pallas_call(
    functools.partial(
      _kernel, bits=bits, group=group, parts=parts, activation_block=activation_block
    ),
    grid=w.grid,
    in_specs=[w.activations, *w.specs],
    out_specs=w.out,
    out_shape=jax.ShapeDtypeStruct((of_rows, columns), x.dtype),
    scratch_shapes=[
      pltpu.VMEM((padded, w.block_columns), jnp.float32),
      pltpu.VMEM((groups, w.block_columns), jnp.float32),
      pltpu.VMEM((blocks, 2 * padded, w.block), jnp.int8),
      pltpu.VMEM((inputs // activation_block, padded, LANES), jnp.float32),
      pltpu.VMEM((padded, -(-groups // LANES) * LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    name=f"quantized_matmul_w{bits}",
  )(x, *w.arguments)
  return out[:rows].reshape(*leading, columns)


def _kernel(
  x,
  values,
  scales,
  zero_points,
  out,
  total,
  float_scales,
  digits,
  steps,
  sums,
  *,
  bits: int,
  group: int,
  parts: int,
  activation_block: int,
):
  rows, inputs = x.shape
  column, block, blocks = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  group_at = lambda at: jax.lax.div(block * (inputs // group) + at // group, parts)
  first_step = block * (inputs // activation_block)

  @pl.when((column == 0) & (block == 0))
  def _():
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

  @pl.when(column == 0)
  def _():
    for i, start in enumerate(range(0, inputs, activation_block)):
      high, low, step = split_activations(x[:, start : start + activation_block])
      if group < LANES:
        high, low = (jnp.where(_own_group(high.shape, group), d, 0) for d in (high, low))
      both = jnp.concatenate([high, low]).astype(jnp.int8)
      for at in range(0, activation_block, LANES):
        chunk = both[:, at : at + LANES]
        digits[block, :, start + at : start + at + LANES] = in_order_of_codes(chunk, bits)
        if zero_points is not None:
          input, of = (
            jax.lax.broadcasted_iota(jnp.int32, (LANES, sums.shape[1]), axis) for axis in (0, 1)
          )
          group_of_input = input >> group.bit_length() - 1 if group < LANES else 0
          is_group = of == group_at(start + at) + group_of_input
          of_group = jnp.dot(chunk, is_group.astype(jnp.int8), preferred_element_type=jnp.int32)
          sums[...] += ((of_group[:rows] << 8) + of_group[rows:]).astype(jnp.float32) * step
      steps[first_step + i] = jnp.broadcast_to(step * 2.0 ** (bits - 8), (rows, LANES))

  @pl.when(block == 0)
  def _():
    float_scales[...] = scales[...].astype(jnp.float32)
    total[...] = jnp.zeros(total.shape, total.dtype)

  for i, start in enumerate(range(0, inputs, activation_block)):
    part = jnp.zeros(total.shape, jnp.float32)
    summed = max(group, LANES)
    for at in range(start, start + activation_block, summed):
      codes = jnp.concatenate(
        [unpacked_codes(values, j, bits) for j in range(at, at + summed, LANES)]
      )
      product = jnp.dot(digits[block, :, at : at + summed], codes, preferred_element_type=jnp.int32)
      product = (product[:rows] << 8) + product[rows:]
      by_copy = [float_scales[pl.ds(group_at(at) + i, 1)] for i in range(summed // group)]
      part += product.astype(jnp.float32) * _of_rows(by_copy, rows)
    total[...] += part * jnp.tile(steps[first_step + i], (1, out.shape[1] // LANES))

  @pl.when(block == blocks - 1)
  def _():
    y = total[...]
    if zero_points is not None:
      # Unsigned codes are read as signed ones, which are 2^(bits - 1) less.
      zeros = zero_points[...].astype(jnp.int32) - 2 ** (bits - 1)
      offsets = float_scales[...] * zeros.astype(jnp.float32)
      y -= float32_dot(sums[:, : len(offsets)], offsets)
    of_rows = len(out)
    y = sum(y[start : start + of_rows] for start in range(0, rows, of_rows))
    out[...] = y.astype(out.dtype)


def _own_group(shape: tuple[int, int], group: int) -> Array:
  """Whether an input is in a row's group: the first rows have the first group of 128 inputs, ..."""
  row, input = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
  copies = LANES // group
  of_row = sum((row >= copy * (shape[0] // copies)).astype(jnp.int32) for copy in range(1, copies))
  return of_row == (input & LANES - 1) >> group.bit_length() - 1


def _of_rows(scales: list[Array], rows: int) -> Array:
  """Scales [1, columns], each for as many of the rows: what [rows, columns] are multiplied by."""
  if len(scales) == 1:
    return scales[0]
  columns, each = scales[0].shape[1], rows // len(scales)
  spread = lambda scale, rows: jnp.broadcast_to(scale, (rows, columns))
  if each >= 8:
    return jnp.concatenate([spread(scale, each) for scale in scales])
  # Two share the 8 rows of a register.
  row = jax.lax.broadcasted_iota(jnp.int32, (8, columns), 0)
  pairs = zip(scales[::2], scales[1::2], strict=True)
  return jnp.concatenate([jnp.where(row < each, spread(a, 8), spread(b, 8)) for a, b in pairs])
