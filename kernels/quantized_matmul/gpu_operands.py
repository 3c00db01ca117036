"""What the products with codes on Hopper share: blocks of them, and their way into shared memory.

The tensor cores multiply bfloat16. Codes are widened in registers, where a 4- or 8-bit code becomes a
bfloat16 integer by a few bitwise operations (Mosaic's casts of int4 and int8), less its zero point
(exact: integers up to 256 are bfloat16), times its scale, and go into shared memory, where the tensor
cores read them in either order. A sub-step is 64 inputs.

Codes of few-bit floating point become float16, which has all their values and subnormal ones of its
own where they have some, but for a power of two, and so float32, times the scale and this power.
Those of 4 bits are taken out of words two at a time, as the halves of a register.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.quantized_matmul.packing import RUN_ROWS, WORD_ROWS

Array = jax.Array

BLOCK_COLUMNS = 128  # Outputs of a block of weights.
SUB_STEP = 64  # Inputs that are widened and multiplied at once: a swizzled row of 128 bytes of x.
_IN_WORD = 8  # 2-bit codes of 16 bits, codes of 32 bits in 4-bit floating point.
_FLOAT16_EXPONENT_BITS = 5
FLOAT16_SCALE = 2.0**15  # Of a code's value over that of the float16 with its exponent.


class FloatCodes(NamedTuple):
  """In place of a number of bits: codes of `float_matmul.xla.decode`, to 4 exponent bits."""

  exponent_bits: int
  mantissa_bits: int

  @property
  def bits(self) -> int:
    """With the sign."""
    return 1 + self.exponent_bits + self.mantissa_bits


def as_stored(values: Array, bits: int | FloatCodes) -> Array:
  """The codes in the type in which the kernel reads them; no bytes move.

  Returns:
    int4 or int8 [inputs, columns]; uint16 [inputs, columns / 8] for 2 bits and uint32 [inputs,
    columns / 8] for floating point of 4, the first code lowest; uint32 for 3 bits, see `packing`.
  """
  if bits == 3:
    return values
  if _in_words(bits):
    inputs, columns = values.shape
    return lax.bitcast_convert_type(
      values.reshape(inputs, columns // _IN_WORD, _IN_WORD),
      jnp.uint16 if bits == 2 else jnp.uint32,
    )
  return lax.bitcast_convert_type(values, jnp.int4 if bits == 4 else jnp.int8)


def _in_words(bits: int | FloatCodes) -> bool:
  """Whether a word's codes are widened one after the other, so that columns change their order."""
  return bits == 2 or (isinstance(bits, FloatCodes) and bits.bits <= 4)


def stored_block(step: int, bits: int | FloatCodes) -> tuple[int, int]:
  """Shape of a block of `as_stored` with `step` inputs."""
  if bits == 3:
    return 3 * step // WORD_ROWS, BLOCK_COLUMNS
  return step, BLOCK_COLUMNS // (_IN_WORD if _in_words(bits) else 1)


def in_order_of_inputs(x: Array, bits: int | FloatCodes) -> Array:
  """x [rows, inputs] in the order of the inputs in which 3-bit codes are widened."""
  if bits != 3:
    return x
  # A unit's input 32 i + 4 w + b is code i of byte b of word w; see `packing`.
  split = x.reshape(len(x), -1, RUN_ROWS // WORD_ROWS, WORD_ROWS // 4, 4)
  return split.swapaxes(3, 4).reshape(x.shape)


def in_order_of_columns(numbers: Array, bits: int | FloatCodes) -> Array:
  """Numbers of columns [..., columns] in the order in which codes in words are widened."""
  if not _in_words(bits):
    return numbers
  split = numbers.reshape(*numbers.shape[:-1], -1, BLOCK_COLUMNS // _IN_WORD, _IN_WORD)
  return split.swapaxes(-1, -2).reshape(numbers.shape)


def out_of_order_of_columns(numbers: Array, bits: int | FloatCodes) -> Array:
  """Inverse of `in_order_of_columns`."""
  if not _in_words(bits):
    return numbers
  split = numbers.reshape(*numbers.shape[:-1], -1, _IN_WORD, BLOCK_COLUMNS // _IN_WORD)
  return split.swapaxes(-1, -2).reshape(numbers.shape)


def tiles(bits: int | FloatCodes):
  """How the matrices of bfloat16 lie in shared memory for the tensor cores."""
  # A store is of whole tiles, and codes in words are stored 16 columns at a time.
  swizzle = 32 if _in_words(bits) else 128  # Bytes of a row of a tile.
  return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def widen(
  target, values, scales, zero_points, start: int, *, bits: int | FloatCodes, group: int
) -> None:
  """Writes (code - zero point) * scale of a sub-step.

  Args:
    target: reference, bfloat16 [64, 128].
    values: reference, a step's `stored_block`.
    scales: reference, [groups of the step, 128], bfloat16 or float32; for floating point times
      `FLOAT16_SCALE`.
    zero_points: None, or reference, like `scales`: stored like codes for 4 and 8 bits, bfloat16 for
      2 and 3.
    start: first input of the sub-step in the step.
    bits: 2, 3, 4 or 8, or codes of floating point (without zero points).
    group: inputs that share a scale, at most those of the step.
  """
  signed = zero_points is None
  # 3-bit codes come out 32 at a time, of which 8 rows follow one another.
  part = min(group, WORD_ROWS if bits == 3 else SUB_STEP)
  for first in range(0, SUB_STEP, part):
    of_group = (start + first) // group
    scale = scales[of_group]
    zero = None if signed else zero_points[of_group]
    if isinstance(bits, FloatCodes):
      widen_floats = _widen_floats_in_words if _in_words(bits) else _widen_floats
      widen_floats(target, values, scales, start, first, part, of_group, bits)
    elif bits in (4, 8):
      rows = slice(start + first, start + first + part)
      layout = register_layout(BLOCK_COLUMNS, 8 if scale.dtype == jnp.bfloat16 else 4)
      codes = _integers(plgpu.layout_cast(values[rows, :], layout), signed)
      zero = None if signed else _integers(zero, signed)
      target[slice(first, first + part), :] = _scaled(codes, zero, scale)
    elif bits == 2:
      _widen_two(target, values, scales, zero_points, start, first, part, of_group)
    else:
      _widen_three(target, values, scale, zero, start, first)


def _integers(codes: Array, signed: bool) -> Array:
  """bfloat16 codes of a native type; unsigned ones, read as signed, less 2^(bits - 1)."""
  if not signed:
    codes ^= jnp.array(jnp.iinfo(codes.dtype).min, codes.dtype)
  return codes.astype(jnp.bfloat16)


def _scaled(codes: Array, zero: Array | None, scale: Array) -> Array:
  """(codes - zero) * scale in bfloat16: one rounding, as in the reference."""
  across = lambda v: lax.broadcast_in_dim(v, codes.shape, [1])
  if zero is not None:
    codes = codes - across(zero)
  return (codes.astype(scale.dtype) * across(scale)).astype(jnp.bfloat16)


def _widen_floats(target, values, scales, start, first, part, of_group, of: FloatCodes) -> None:
  """Codes of 8 bits, [part, 128]."""
  codes = values[slice(start + first, start + first + part), :]
  codes = plgpu.layout_cast(codes, register_layout(BLOCK_COLUMNS, 4))
  # The sign becomes the first bit, and the exponent ends where a float16's does.
  codes = codes.astype(jnp.int16) << jnp.int16(16 - of.bits)
  shift = _FLOAT16_EXPONENT_BITS - of.exponent_bits
  codes = codes >> jnp.int16(shift) & jnp.int16(0x7FFF >> shift | -0x8000)
  target[slice(first, first + part), :] = _scaled_float16(codes, scales[of_group])


def _widen_floats_in_words(
  target, values, scales, start, first, part, of_group, of: FloatCodes
) -> None:
  """Codes of at most 4 bits, [part, 128]: those of the two halves of a word at once."""
  words = values[slice(start + first, start + first + part), :]
  words = plgpu.layout_cast(words, register_layout(BLOCK_COLUMNS // _IN_WORD, 4))
  shift = _FLOAT16_EXPONENT_BITS - of.exponent_bits
  magnitude = (2 ** (of.bits - 1) - 1) << (16 - of.bits)  # Of a code behind its sign, in 16 bits.
  in_halves = lambda bits: jnp.uint32(bits * 0x10001)
  for code in range(_IN_WORD // 2):
    # As above.
    left = words << jnp.uint32(16 - of.bits - 4 * code)
    halves = left & in_halves(0x8000) | (left >> jnp.uint32(shift)) & in_halves(magnitude >> shift)
    for half in range(2):
      place = code + half * _IN_WORD // 2
      columns = slice(place * words.shape[1], (place + 1) * words.shape[1])
      found = (halves >> jnp.uint32(16) if half else halves).astype(jnp.uint16)
      weights = _scaled_float16(found, scales[of_group, columns])
      target[slice(first, first + part), columns] = weights


def _scaled_float16(bits: Array, scale: Array) -> Array:
  """The float16 numbers that 16 bits stand for, times a scale, rounded to bfloat16 once."""
  return _scaled(lax.bitcast_convert_type(bits, jnp.float16), None, scale.astype(jnp.float32))


def _widen_two(target, values, scales, zero_points, start, first, part, of_group) -> None:
  """Codes of 2 bits, [part, 128]: a code anywhere in a bfloat16's mantissa is a multiple of it."""
  words = values[slice(start + first, start + first + part), :]
  words = plgpu.layout_cast(words, register_layout(BLOCK_COLUMNS // _IN_WORD, 4))
  if zero_points is None:
    words ^= jnp.uint16(0xAAAA)  # Two's complement: 2 more, and unsigned.
  for code in range(_IN_WORD):
    columns = slice(code * words.shape[1], (code + 1) * words.shape[1])
    place = code % 3  # Three codes fit the seven bits of the mantissa.
    bits = (words >> jnp.uint16(2 * (code - place))) if code >= 3 else words
    bits = bits & jnp.uint16(3 << 2 * place) | jnp.uint16(0x4300)  # 128 + 4^place code.
    found = lax.bitcast_convert_type(bits, jnp.bfloat16)
    if zero_points is None:
      found = found - jnp.bfloat16(128 + 2 * 4**place)
      zero = None
    else:
      zero = zero_points[of_group, columns] * jnp.bfloat16(4**place) + jnp.bfloat16(128)
    scale = scales[of_group, columns]
    scale = scale * jnp.array(0.25**place, scale.dtype)
    target[slice(first, first + part), columns] = _scaled(found, zero, scale)


def _widen_three(target, values, scale, zero, start, first) -> None:
  """Codes of 3 bits, [32, 128]: the one of every byte of eight words."""
  code = (start + first) // WORD_ROWS
  run = RUN_ROWS // WORD_ROWS
  word = lambda i: plgpu.layout_cast(
    values[slice(i * run, (i + 1) * run), :], register_layout(BLOCK_COLUMNS, 4)
  )
  lowest = 1 - code % 2 << 2  # Bit of a code in a byte.
  if code < 6:
    words, lowest = word(code // 2), lowest + 1
  else:
    a, b, c = (word(i) & jnp.uint32(0x11111111) for i in range(3))
    words = a << jnp.uint32(2) | b << jnp.uint32(1) | c
  # A code less 4 in two's complement is the code with its upper bit turned.
  offset = jnp.float32(4) if zero is None else zero.astype(jnp.float32)
  offset = offset + jnp.float32(2**23)
  for byte in range(4):
    found = words >> jnp.uint32(8 * byte + lowest) & jnp.uint32(7)
    # An integer in a float32's mantissa, with the exponent of 2^23.
    found = lax.bitcast_convert_type(found ^ jnp.uint32(0x4B000004), jnp.float32)
    if zero is None:
      found = found - offset
    rows = slice(first + byte * run, first + (byte + 1) * run)
    target[rows, :] = _scaled(found, None if zero is None else offset, scale.astype(jnp.float32))


def register_layout(columns: int, vector: int):
  """Registers of a warpgroup for [rows, columns]: consecutive threads hold consecutive vectors.

  A thread has the same columns in all its rows, so that it holds one vector of scales.
  """
  per_row = columns // vector  # Threads.
  if per_row == 32:
    return plgpu.Layout.TILED(
      plgpu.Tiling(((4, columns), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
  rows = 32 // per_row  # Of a warp.
  return plgpu.Layout.TILED(
    plgpu.Tiling(((4 * rows, columns), (rows, columns), (vector,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
  )
