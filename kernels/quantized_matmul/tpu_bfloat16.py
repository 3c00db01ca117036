"""Weight-only product of many rows of bfloat16, up to 64, on TPU.

Two 8-bit digits of so many rows are twice the work for the matrix unit: they are multiplied as they
are, by codes that are exact in bfloat16. How codes become bfloat16 depends on the chip:

- A v6e converts 4- and 8-bit integers by one vector operation for each register of bfloat16. 2- and
  3-bit codes become 4-bit ones by masks.
- A v5e and a v5p go by way of int32 and float32, five for two registers. But b bits at the top of a
  mantissa beside a constant exponent are 2^b + code: a shift and two bit operations make a register of
  a word's codes. The 2^b come off with the zero points,

    y = sum over groups of s (x @ (2^b + code)) - (x's sums over the groups) @ (s (2^b + zero)).

Where the codes come out in another order of the input dimension, x is put in the same order. Groups
are along the input, of a multiple of 128; the rest is as in `mosaic_tpu`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.platform import tpu_chip
from kernels.quantized_matmul.packing import RUN_ROWS
from kernels.quantized_matmul.tpu_operands import (
  ACTIVATION_BLOCK,
  LANES,
  ROW_TILE,
  VMEM_BYTES,
  every,
  float32_dot,
  unpacked_codes,
  weights,
  words_of_three,
)

Array = jax.Array

_MANTISSA = 7  # Bits of bfloat16's.


def supported(x: Array, values: Array, scales: Array) -> bool:
  """Of the arguments that `mosaic_tpu` supports, those that are multiplied here."""
  along_input = scales.shape[1] == values.shape[1]
  whole = along_input and x.shape[-1] // scales.shape[0] % LANES == 0
  # Fewer rows are faster as digits.
  enough = math.prod(x.shape[:-1]) > (16 if converts_integers() else 32)
  return x.dtype == jnp.bfloat16 and enough and whole


def quantized_matmul(
  x: Array, values: Array, scales: Array, zero_points: Array | None, *, bits: int
) -> Array:
  """As `api.quantized_matmul`; scales [groups, columns]."""
  *leading, inputs = x.shape
  columns, rows, groups = values.shape[1], math.prod(leading), len(scales)
  padded = -(-rows // ROW_TILE) * ROW_TILE
  x = jnp.pad(x.reshape(rows, inputs), ((0, padded - rows), (0, 0)))
  # Long groups are summed in parts.
  summed = math.gcd(inputs // groups, ACTIVATION_BLOCK)
  sizes = {"bits": bits, "inputs": inputs, "group": summed, "rows": padded, "out_rows": padded}
  w = weights(values, scales, zero_points, **sizes)
  in_mantissas = bits < 8 and not converts_integers()
  reorders = in_mantissas or bits in (2, 3)
  out = pl.pallas_call(
    functools.partial(_kernel, bits=bits, in_mantissas=in_mantissas, inputs=w.block, summed=summed),
    grid=w.grid,
    # All of x is on the chip, where the operation before mostly leaves it.
    in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), *w.specs],
    out_specs=w.out,
    out_shape=jax.ShapeDtypeStruct((padded, columns), x.dtype),
    scratch_shapes={
      "total": pltpu.VMEM((padded, w.block_columns), jnp.float32),
      "float_scales": pltpu.VMEM((groups, w.block_columns), jnp.float32),
      "sums": pltpu.VMEM((padded, -(-groups // LANES) * LANES), jnp.float32),
      "ordered": pltpu.VMEM((w.grid[2], padded // 2, w.block), jnp.int32) if reorders else None,
    },
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    name=f"quantized_matmul_w{bits}_bfloat16",
  )(x, *w.arguments)
  return out[:rows].reshape(*leading, columns)


def converts_integers() -> bool:
  """Whether the chip makes bfloat16 of integers by one operation; not if JAX knows of no chip."""
  info = tpu_chip()
  return info is not None and info.generation >= 6


def _kernel(
  x,
  values,
  scales,
  zero_points,
  out,
  *,
  total,
  float_scales,
  sums,
  ordered,
  bits: int,
  in_mantissas: bool,
  inputs: int,
  summed: int,
):
  column, block, blocks = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  group, signed = x.shape[1] // len(scales), zero_points is None
  group_at = lambda at: jax.lax.div(block * inputs + at, group)
  x_at = lambda at, size: x[:, pl.ds(pl.multiple_of(block * inputs + at, LANES), size)]
  unit, offset = _unit_and_offset(bits, signed=signed, in_mantissas=in_mantissas)
  has_offsets = offset != 0 or not signed

  @pl.when((column == 0) & (block == 0))
  def _():
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

  @pl.when(column == 0)
  def _():
    lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, sums.shape[1]), 1)
    x_sums = jnp.zeros(sums.shape, sums.dtype)
    for start in range(0, inputs, ACTIVATION_BLOCK):
      chunks = range(start, min(start + ACTIVATION_BLOCK, inputs), LANES)
      if ordered is not None:
        source = _source((len(x) // 2, LANES), bits, in_mantissas=in_mantissas)
        for at in chunks:
          words = pltpu.bitcast(x_at(at, LANES), jnp.int32)  # Of two rows.
          ordered[block, :, at : at + LANES] = jnp.take_along_axis(
            words, source, axis=1, mode="promise_in_bounds"
          )
      if has_offsets:
        is_group = jnp.concatenate([lane == group_at(at) for at in chunks]).astype(x.dtype)
        of_group = x_at(start, len(is_group))
        x_sums += jnp.dot(of_group, is_group, preferred_element_type=jnp.float32)
    sums[...] += x_sums

  @pl.when(block == 0)
  def _():
    float_scales[...] = scales[...].astype(jnp.float32)
    total[...] = jnp.zeros(total.shape, total.dtype)

  part = total[...]
  for at in range(0, inputs, summed):
    chunks = range(at, at + summed, LANES)
    unpack = _in_mantissas if in_mantissas else _converted
    codes = [unpack(values, j, bits, signed=signed) for j in chunks]
    if ordered is None:
      in_order = x_at(at, summed)
    else:
      in_order = pltpu.bitcast(ordered[block, :, at : at + summed], x.dtype)
    product = jnp.dot(in_order, jnp.concatenate(codes), preferred_element_type=jnp.float32)
    part += product * float_scales[pl.ds(group_at(at), 1)]
  total[...] = part

  @pl.when(block == blocks - 1)
  def _():
    y = total[...] * unit
    if has_offsets:
      zeros = 0.0 if signed else zero_points[...].astype(jnp.int32).astype(jnp.float32)
      y -= float32_dot(sums[:, : len(scales)], float_scales[...] * (zeros + offset))
    out[...] = y.astype(out.dtype)


def _unit_and_offset(bits: int, *, signed: bool, in_mantissas: bool) -> tuple[float, float]:
  """What x is multiplied by: (code + offset) / unit."""
  half = 2.0 ** (bits - 1)  # Signed codes that are read as unsigned ones are so much more.
  if in_mantissas:
    return 1.0, 2.0**bits + (half if signed else 0.0)
  if bits == 2:
    return 0.25 if signed else 1.0, 0.0
  if bits == 4:
    return 1.0, 0.0
  return 0.5 if bits == 3 else 1.0, 0.0 if signed else -half


def _converted(values, at: int, bits: int, *, signed: bool) -> Array:
  """The numbers of `_unit_and_offset` of 128 inputs, bfloat16 [128, columns], by conversion."""
  if bits == 4:
    return values[at : at + LANES].astype(jnp.bfloat16)
  if bits == 2:  # There is no conversion: pairs of bits become 4-bit codes.
    words = pltpu.bitcast(values[at : at + LANES], jnp.int32)
    if signed:  # With their sign, and so four times as large.
      pairs = jnp.concatenate([words << 2 & every(4, 12), words & every(4, 12)])
      return pltpu.bitcast(pairs, jnp.int4).astype(jnp.bfloat16)
    pairs = jnp.concatenate([words & every(4, 3), words >> 2 & every(4, 3)])
    return pltpu.bitcast(pairs, jnp.uint4).astype(jnp.bfloat16)
  if bits == 3:  # Likewise, twice as large.
    first, second = words_of_three(values, at)
    if at % RUN_ROWS == 0:  # Else there is nothing but codes in the second.
      second &= every(4, 14)
    twice = jnp.concatenate([first & every(4, 14), second])
    return pltpu.bitcast(twice, jnp.int4).astype(jnp.bfloat16)
  return unpacked_codes(values, at, bits).astype(jnp.bfloat16)


def _in_mantissas(values, at: int, bits: int, *, signed: bool) -> Array:
  """The numbers of `_unit_and_offset` of 128 inputs, bfloat16 [128, columns], by bit operations."""
  exponent = (127 + bits) << _MANTISSA
  if signed or bits == 3:  # Turns the sign over: that adds 2^(bits - 1).
    exponent |= 1 << _MANTISSA - 1
  top = _in_both_halves((1 << bits) - 1 << _MANTISSA - bits)
  parts = []
  for words, first in _words(values, at, bits):
    shift = _MANTISSA - bits - first
    words = words << shift if shift > 0 else words >> -shift
    parts.append(pltpu.bitcast((words & top) ^ _in_both_halves(exponent), jnp.bfloat16))
  return jnp.concatenate(parts)


def _words(values, at: int, bits: int) -> list[tuple[Array, int]]:
  """Words of the codes of 128 inputs, by parts, and the bit of both halves at which a code starts."""
  if bits != 3:
    words = pltpu.bitcast(values[at : at + LANES], jnp.int32)
    return [(words, first) for first in range(0, 16, bits)]
  return [
    (words, first + byte)
    for words in words_of_three(values, at)
    for first in (5, 1)
    for byte in (0, 8)
  ]


def _source(shape: tuple[int, int], bits: int, *, in_mantissas: bool) -> Array:
  """The input, of 128, that each lane has in the order of the codes, int32 of a shape."""
  target = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  half = target & 1
  if not in_mantissas and bits == 2:  # The first of all pairs of codes, then the second.
    return (target & LANES // 2 - 1) * 2 + (target >> 6)
  if not in_mantissas:  # A byte has codes of two 32 inputs, the second first; see `packing`.
    return (target & LANES // 2) + (1 - half) * 32 + (target >> 1 & 31)
  if bits == 3:  # Parts of the even bytes and of the odd ones, by turns; see `packing`.
    word, byte = target >> 5 << 3 | (target & 15) >> 1, half << 1 | target >> 4 & 1
    return word * 4 + byte
  # A word has the codes of 32 / bits inputs on end, of which each part has one of either half.
  per_part, per_half = LANES * bits // 16, 16 // bits
  part, word = target >> per_part.bit_length() - 1, (target & per_part - 1) >> 1
  return (2 * word + half) * per_half + part


def _in_both_halves(pattern: int) -> Array:
  return jnp.int32(pattern << 16 | pattern)
