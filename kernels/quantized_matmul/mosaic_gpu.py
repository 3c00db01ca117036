"""Weight-only product on Hopper GPUs: codes stay packed until they are in a multiprocessor.

TMA brings blocks of codes into shared memory, several steps ahead; they are widened in registers (see
`gpu_operands`) and multiplied by the tensor cores, while the next 64 inputs are widened.

- Up to 64 rows (decoding) it is y^T = W^T x^T: the tensor cores take tiles of 64 rows, which are output
  channels here, and any multiple of 8 columns, which are the rows of x. Decoding is bound by the bytes
  of the weights if all multiprocessors read them: the inputs are split among blocks until there are
  enough, and XLA sums the parts.
- More rows (prefill) are y = x W with tiles of 128 rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.quantized_matmul.gpu_operands import (
  BLOCK_COLUMNS,
  SUB_STEP,
  FloatCodes,
  as_stored,
  in_order_of_columns,
  in_order_of_inputs,
  out_of_order_of_columns,
  stored_block,
  tiles,
  widen,
)
from kernels.quantized_matmul.gradient import with_reference_gradient
from kernels.quantized_matmul.packing import RUN_ROWS

Array = jax.Array

MAX_DECODE_ROWS = 64
_BLOCKS = 2 * 132  # At least, if there are enough inputs: two for each multiprocessor of an H100.
_MIN_STEPS = 4  # Of a block, so that reading ahead pays.
_STAGES = 4  # Steps in shared memory, at most.
_SHARED_BYTES = 225 * 2**10  # Of a multiprocessor, less what the compiler and the system take.


def unsupported(x: Array, values: Array, scales: Array, *, bits: int) -> str | None:
  """Why these arguments of `api.quantized_matmul` have no kernel here, or None."""
  inputs, columns = x.shape[-1], values.shape[-1]
  if x.dtype != jnp.bfloat16:
    return f"x of {x.dtype}, expected bfloat16"
  unit = RUN_ROWS if bits == 3 else 2 * SUB_STEP
  if inputs % unit or columns % BLOCK_COLUMNS:
    return (
      f"weights [{inputs}, {columns}] of {bits} bits, expected multiples of "
      f"[{unit}, {BLOCK_COLUMNS}]"
    )
  if 0 in x.shape:
    return f"x {list(x.shape)}, expected at least one row"
  group = inputs // scales.shape[0]
  of_columns = scales.shape[1] == columns or scales.shape == (1, 1)
  if not of_columns or group < 32 or (unit % group and group % unit):
    return (
      f"scales {list(scales.shape)}, expected one for each column and group of 32, 64, ... or a "
      f"multiple of {unit} inputs, or one for all"
    )
  return None


class Plan(NamedTuple):
  """How a product is cut.

  Attributes:
    rows: of x that a block multiplies.
    step: inputs that a step of a block reads.
    steps: of a block.
    parts: blocks that share the inputs.
    stages: steps in shared memory.
  """

  rows: int
  step: int
  steps: int
  parts: int
  stages: int


def plan(rows: int, inputs: int, columns: int, groups: int, bits: int, number_bytes: int) -> Plan:
  """The plan of a product of x [rows, inputs]; `number_bytes` are those of a group's scale and zero."""
  decode = rows <= MAX_DECODE_ROWS
  if decode:
    tile, step = -(-rows // 8) * 8, 2 * SUB_STEP
  else:
    tile, step = 2 * SUB_STEP, SUB_STEP
  if bits == 3:
    tile, step = min(tile, 64), RUN_ROWS
  parts = 1
  if decode:
    at_most = max(inputs // step // _MIN_STEPS, 1)
    possible = [n for n in range(1, at_most + 1) if inputs // step % n == 0]
    enough = (n for n in possible if n * columns >= BLOCK_COLUMNS * _BLOCKS)
    parts = next(enough, possible[-1])
  fixed = 2 * SUB_STEP * BLOCK_COLUMNS * 2 + (BLOCK_COLUMNS * tile * 4 if decode else 0)
  of_step = step * (tile * 2 + BLOCK_COLUMNS * bits // 8)
  of_step += max(step * groups // inputs, 1) * BLOCK_COLUMNS * number_bytes
  # Two blocks on a multiprocessor, of which one widens while the other multiplies, if that leaves a
  # step to be read ahead, one to be widened and one that is still multiplied.
  stages = (_SHARED_BYTES // 2 - fixed) // of_step
  if stages < 3:
    stages = (_SHARED_BYTES - fixed) // of_step
  return Plan(tile, step, inputs // step // parts, parts, min(stages, _STAGES))


def quantized_matmul(
  x: Array,
  values: Array,
  scales: Array,
  zero_points: Array | None,
  *,
  bits: int,
) -> Array:
  """As `api.quantized_matmul`, for arguments that `unsupported` has nothing against.

  Weights are rounded to bfloat16 as in the reference, whose gradients are used.
  """
  return _quantized_matmul(x, values, scales, zero_points, bits)


@with_reference_gradient
def _quantized_matmul(x, values, scales, zero_points, bits: int) -> Array:
  columns = values.shape[-1]
  if scales.dtype != jnp.bfloat16:
    scales = scales.astype(jnp.float32)
  if scales.shape[1] != columns:
    scales = jnp.broadcast_to(scales, (1, columns))
    zero_points = None if zero_points is None else jnp.broadcast_to(zero_points, (1, columns))
  numbers = [in_order_of_columns(scales, bits)]
  if zero_points is not None:
    if bits in (4, 8):
      numbers.append(as_stored(zero_points, bits))
    else:
      numbers.append(in_order_of_columns(zero_points.astype(jnp.bfloat16), bits))
  name = f"quantized_matmul_w{bits}"
  return multiply_codes(x, values, numbers, bits, stored_bits=bits, name=name)


def multiply_codes(
  x: Array,
  values: Array,
  numbers: list[Array],
  bits: int | FloatCodes,
  *,
  stored_bits: int,
  name: str,
) -> Array:
  """x @ W of codes that `gpu_operands.widen` widens.

  Args:
    x: bfloat16 [..., inputs].
    values: codes, as the public functions take them.
    numbers: scales and, if there are any, zero points, [groups, columns] as `widen` takes them.
    bits: 2, 3, 4 or 8, or codes of floating point.
    stored_bits: of a code.
    name: of the kernel, for profiles.

  Returns:
    [..., columns] in x's dtype.
  """
  *leading, inputs = x.shape
  rows, columns = math.prod(leading), values.shape[-1]
  number_bytes = sum(n.dtype.itemsize for n in numbers)
  cut = plan(rows, inputs, columns, len(numbers[0]), stored_bits, number_bytes)
  x = jnp.pad(x.reshape(rows, inputs), ((0, -rows % cut.rows), (0, 0)))
  arrays = [in_order_of_inputs(x, bits), as_stored(values, bits), *numbers]
  decode = rows <= MAX_DECODE_ROWS
  if decode:
    out = jax.ShapeDtypeStruct((cut.parts, columns, cut.rows), jnp.float32)
    results = [plgpu.SMEM((BLOCK_COLUMNS, cut.rows), jnp.float32)]
  else:
    out, results = jax.ShapeDtypeStruct((len(x), columns), jnp.bfloat16), []
  y = plgpu.kernel(
    functools.partial(_decode_kernel if decode else _prefill_kernel, bits=bits, cut=cut),
    out_type=out,
    grid=(columns // BLOCK_COLUMNS, cut.parts if decode else len(x) // cut.rows),
    grid_names=("column", "other"),
    scratch_types=[
      # One is multiplied while the other is written.
      plgpu.SMEM((2, SUB_STEP, BLOCK_COLUMNS), jnp.bfloat16, transforms=tiles(bits)),
      *results,
    ],
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    kernel_name=f"{name}_{'decode' if decode else 'prefill'}",
  )(*arrays)
  if decode:
    y = y.sum(axis=0).T
  return out_of_order_of_columns(y, bits)[:rows].astype(x.dtype).reshape(*leading, columns)


def _decode_kernel(*refs, bits: int | FloatCodes, cut: Plan):
  *arrays, y, weights, result = refs
  column, part = lax.axis_index("column"), lax.axis_index("other")

  def accumulate(total):
    def multiply(x, weights):
      # W^T x^T.
      plgpu.wgmma(total, weights.T, x.T)

    _over_inputs(arrays, weights, multiply, (0, part, column), bits, cut)
    return total[...]

  result[...] = pl.run_scoped(accumulate, plgpu.ACC((BLOCK_COLUMNS, cut.rows), jnp.float32))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(result, y.at[part, pl.ds(column * BLOCK_COLUMNS, BLOCK_COLUMNS)])
  plgpu.wait_smem_to_gmem(0)


def _prefill_kernel(*refs, bits: int | FloatCodes, cut: Plan):
  *arrays, y, weights = refs
  column, row = lax.axis_index("column"), lax.axis_index("other")

  def accumulate(total):
    multiply = functools.partial(plgpu.wgmma, total)
    _over_inputs(arrays, weights, multiply, (row, 0, column), bits, cut)
    return total[...]

  total = pl.run_scoped(accumulate, plgpu.ACC((cut.rows, BLOCK_COLUMNS), jnp.float32))
  total = total.astype(jnp.bfloat16)
  columns = pl.ds(column * BLOCK_COLUMNS, BLOCK_COLUMNS)
  # All weights have been multiplied: the result takes their place.
  for i in range(cut.rows // SUB_STEP):
    weights[i] = total[i * SUB_STEP : (i + 1) * SUB_STEP]
  plgpu.commit_smem()
  for i in range(cut.rows // SUB_STEP):
    rows = pl.ds(row * cut.rows + i * SUB_STEP, SUB_STEP)
    plgpu.copy_smem_to_gmem(weights.at[i], y.at[rows, columns])
  plgpu.wait_smem_to_gmem(0)


def _over_inputs(arrays, weights, multiply, block, bits: int | FloatCodes, cut: Plan) -> None:
  """Calls multiply(x [rows, 64], widened weights [64, 128]) for the inputs of a block.

  Args:
    arrays: references to x, codes, scales and, if there are any, zero points.
    weights: reference to shared memory, bfloat16 [2, 64, 128].
    multiply: starts a product of references.
    block: of rows, of inputs (see `Plan.parts`) and of columns.
    bits: 2, 3, 4 or 8, or codes of floating point.
    cut: the plan.
  """
  x, values, scales, *zero_points = arrays
  row, part, column = block
  step = cut.step
  group = x.shape[1] // scales.shape[0]
  steps_per_group = max(group // step, 1)
  at = lambda k: part * cut.steps + k
  sub_steps = step // SUB_STEP

  def body(indices, x, values, scales, *zero_points):
    for i in range(sub_steps):
      slot = i % 2 if sub_steps % 2 == 0 else lax.rem(indices[0], 2)
      target, start = weights.at[slot], i * SUB_STEP
      zero = zero_points[0] if zero_points else None
      widen(target, values, scales, zero, start, bits=bits, group=min(group, step))
      plgpu.commit_smem()
      multiply(x.at[:, pl.ds(start, SUB_STEP)], target)
      # The product before has ended, and its weights may be written over.
      plgpu.wgmma_wait(1)

  of_group = plgpu.BlockSpec(
    (max(step // group, 1), BLOCK_COLUMNS), lambda k: (lax.div(at(k), steps_per_group), column)
  )
  plgpu.emit_pipeline(
    body,
    grid=(cut.steps,),
    in_specs=[
      # Read by a product that ends in the next step.
      plgpu.BlockSpec(
        (cut.rows, step), lambda k: (row, at(k)), transforms=tiles(bits), delay_release=1
      ),
      plgpu.BlockSpec(stored_block(step, bits), lambda k: (at(k), column)),
      of_group,
      *([of_group] if zero_points else []),
    ],
    max_concurrent_steps=cut.stages,
  )(x, values, scales, *zero_points)
