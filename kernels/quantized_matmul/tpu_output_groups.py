"""Weight-only product on TPU with scales along the output: [in, out / group].

  y[:, g] = (x * s[:, g]) @ (codes - zero)

x is scaled and split into digits once for each group of columns; zero points are taken off as the sum
of x * s * zero over the inputs, a number for each row and group. All else is as in `mosaic_tpu`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.quantized_matmul.tpu_operands import (
  ACTIVATION_BLOCK,
  BLOCK_COLUMNS,
  LANES,
  ROW_TILE,
  VMEM_BYTES,
  block_inputs,
  in_order_of_codes,
  largest_divisor,
  split_activations,
  unpacked_codes,
)

Array = jax.Array


def quantized_matmul(
  x: Array, values: Array, scales: Array, zero_points: Array | None, *, bits: int
) -> Array:
  """As `api.quantized_matmul`; scales [inputs, groups], each of a multiple of 128 columns."""
  *leading, inputs = x.shape
  columns, rows, groups = values.shape[-1], math.prod(leading), scales.shape[1]
  padded = -(-rows // ROW_TILE) * ROW_TILE
  x = jnp.pad(x.reshape(rows, inputs), ((0, padded - rows), (0, 0)))
  cores = math.gcd(groups, 2)
  block_columns = next(n for n in BLOCK_COLUMNS if columns // groups % n == 0)
  per_group = columns // groups // block_columns
  per_core = columns // block_columns // cores
  block = block_inputs(inputs, LANES, bits)
  activation_block = largest_divisor(block, LANES, ACTIVATION_BLOCK)
  blocks = inputs // block
  # Read in the first columns of a group, and not again.
  read = lambda n, k: jnp.where(jax.lax.rem(n, per_group) == 0, k, blocks - 1)
  of_group = pl.BlockSpec(
    (None, 1, block), lambda c, n, k: (jax.lax.div(c * per_core + n, per_group), 0, read(n, k))
  )
  in_rows = lambda array: array.astype(jnp.float32).T[:, None]
  arguments = [x, values, in_rows(scales)]
  in_specs = [
    pl.BlockSpec((padded, block), lambda c, n, k: (0, read(n, k))),
    pl.BlockSpec(
      (len(values) * block // inputs, block_columns), lambda c, n, k: (k, c * per_core + n)
    ),
    of_group,
  ]
  if zero_points is not None:
    # Unsigned codes are read as signed ones, which are 2^(bits - 1) less.
    arguments.append(in_rows(zero_points) - 2.0 ** (bits - 1))
    in_specs.append(of_group)
  out = pl.pallas_call(
    functools.partial(
      _kernel, bits=bits, activation_block=activation_block, columns_per_group=per_group
    ),
    grid=(cores, per_core, blocks),
    in_specs=in_specs,
    out_specs=pl.BlockSpec((padded, block_columns), lambda c, n, k: (0, c * per_core + n)),
    out_shape=jax.ShapeDtypeStruct((padded, columns), x.dtype),
    scratch_shapes=[
      pltpu.VMEM((padded, block_columns), jnp.float32),
      pltpu.VMEM((blocks, 2 * padded, block), jnp.int8),
      pltpu.VMEM((inputs // activation_block, padded, LANES), jnp.float32),
      pltpu.VMEM((padded, LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    name=f"quantized_matmul_w{bits}_output_groups",
  )(*arguments)
  return out[:rows].reshape(*leading, columns)


def _kernel(x, values, scales, *rest, bits: int, activation_block: int, columns_per_group: int):
  *zero_points, out, total, digits, steps, sums = rest
  rows, inputs = x.shape
  column, block, blocks = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  first_step = block * (inputs // activation_block)
  starts = range(0, inputs, activation_block)
  of_group = jax.lax.rem(column, columns_per_group)

  @pl.when((of_group == 0) & (block == 0))
  def _():
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

  @pl.when(of_group == 0)
  def _():
    for i, start in enumerate(starts):
      inside = slice(start, start + activation_block)
      scaled = x[:, inside].astype(jnp.float32) * scales[:, inside]
      high, low, step = split_activations(scaled)
      both = jnp.concatenate([high, low]).astype(jnp.int8)
      for at in range(0, activation_block, LANES):
        ordered = in_order_of_codes(both[:, at : at + LANES], bits)
        digits[block, :, start + at : start + at + LANES] = ordered
      steps[first_step + i] = jnp.broadcast_to(step * 2.0 ** (bits - 8), (rows, LANES))
      if zero_points:
        offset = jnp.sum(scaled * zero_points[0][:, inside], axis=-1, keepdims=True)
        sums[...] += jnp.broadcast_to(offset, sums.shape)

  @pl.when(block == 0)
  def _():
    total[...] = jnp.zeros(total.shape, total.dtype)

  tiles = out.shape[1] // LANES
  for i, start in enumerate(starts):
    stop = start + activation_block
    codes = jnp.concatenate([unpacked_codes(values, j, bits) for j in range(start, stop, LANES)])
    product = jnp.dot(digits[block, :, start:stop], codes, preferred_element_type=jnp.int32)
    product = (product[:rows] << 8) + product[rows:]
    total[...] += product.astype(jnp.float32) * jnp.tile(steps[first_step + i], (1, tiles))

  @pl.when(block == blocks - 1)
  def _():
    y = total[...]
    if zero_points:
      y -= jnp.tile(sums[...], (1, tiles))
    out[...] = y.astype(out.dtype)
