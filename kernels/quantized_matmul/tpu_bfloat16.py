"""Weight-only product of 33 to 64 rows of bfloat16 on TPU.

Two 8-bit digits of so many rows are twice the work for the matrix unit: they are multiplied as they
are, by codes that the same unpacking gives and that are exact in bfloat16. Groups are along the
input, of a multiple of 128; the rest is as in `mosaic_tpu`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.quantized_matmul.tpu_operands import (
  ACTIVATION_BLOCK,
  LANES,
  ROW_TILE,
  VMEM_BYTES,
  float32_dot,
  in_order_of_codes,
  unpacked_codes,
  weights,
)

Array = jax.Array

_FEWEST_ROWS = 33  # Fewer are faster as digits.


def supported(x: Array, values: Array, scales: Array) -> bool:
  """Of the arguments that `mosaic_tpu` supports, those that are multiplied here."""
  along_input = scales.shape[1] == values.shape[1]
  whole = along_input and x.shape[-1] // scales.shape[0] % LANES == 0
  rows = math.prod(x.shape[:-1])
  return x.dtype == jnp.bfloat16 and rows >= _FEWEST_ROWS and whole


def quantized_matmul(
  x: Array, values: Array, scales: Array, zero_points: Array | None, *, bits: int
) -> Array:
  """As `api.quantized_matmul`; scales [groups, columns]."""
  *leading, inputs = x.shape
  columns, rows = values.shape[1], math.prod(leading)
  padded = -(-rows // ROW_TILE) * ROW_TILE
  x = jnp.pad(x.reshape(rows, inputs), ((0, padded - rows), (0, 0)))
  # Long groups are summed in parts.
  group = math.gcd(inputs // len(scales), ACTIVATION_BLOCK)
  groups = inputs // group
  sizes = {"bits": bits, "inputs": inputs, "group": group, "rows": padded, "out_rows": padded}
  w = weights(values, scales, zero_points, **sizes)
  blocks = w.grid[2]
  out = pl.pallas_call(
    functools.partial(_kernel, bits=bits, group=group),
    grid=w.grid,
    in_specs=[w.activations, *w.specs],
    out_specs=w.out,
    out_shape=jax.ShapeDtypeStruct((padded, columns), x.dtype),
    scratch_shapes=[
      pltpu.VMEM((padded, w.block_columns), jnp.float32),
      pltpu.VMEM((groups, w.block_columns), jnp.float32),
      pltpu.VMEM((blocks, padded, w.block), jnp.bfloat16),
      pltpu.VMEM((padded, -(-groups // LANES) * LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    name=f"quantized_matmul_w{bits}_bfloat16",
  )(x, *w.arguments)
  return out[:rows].reshape(*leading, columns)


def _kernel(x, values, scales, *rest, bits: int, group: int):
  *zero_points, out, total, float_scales, ordered, sums = rest
  inputs = x.shape[1]
  column, block, blocks = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  first_group = block * (inputs // group)

  @pl.when((column == 0) & (block == 0))
  def _():
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

  @pl.when(column == 0)
  def _():
    group_of_lane = jax.lax.broadcasted_iota(jnp.int32, (1, sums.shape[1]), 1)
    x_sums = jnp.zeros(sums.shape, sums.dtype)
    for at in range(0, inputs, LANES):
      chunk = x[:, at : at + LANES]
      ordered[block, :, at : at + LANES] = in_order_of_codes(chunk, bits)
      if zero_points:
        is_group = (group_of_lane == first_group + at // group).astype(x.dtype)
        is_group = jnp.broadcast_to(is_group, (LANES, sums.shape[1]))
        x_sums += jnp.dot(chunk, is_group, preferred_element_type=jnp.float32)
    if zero_points:
      sums[...] += x_sums

  @pl.when(block == 0)
  def _():
    float_scales[...] = scales[...].astype(jnp.float32)
    total[...] = jnp.zeros(total.shape, total.dtype)

  part = total[...]
  for at in range(0, inputs, group):
    codes = jnp.concatenate(
      [unpacked_codes(values, j, bits) for j in range(at, at + group, LANES)]
    ).astype(x.dtype)
    product = jnp.dot(ordered[block, :, at : at + group], codes, preferred_element_type=jnp.float32)
    part += product * float_scales[pl.ds(first_group + at // group, 1)]
  total[...] = part

  @pl.when(block == blocks - 1)
  def _():
    y = total[...] * 2.0 ** (bits - 8)
    if zero_points:
      offsets = float_scales[...] * zero_points[0][...].astype(jnp.float32)
      y -= float32_dot(sums[:, : len(offsets)], offsets)
    out[...] = y.astype(out.dtype)
