"""Storage of low-bit integer codes: native 2-, 4- and 8-bit arrays, words of three bytes for 3 bits.

6-bit codes, which serve integer products, take the bytes of 8-bit ones.

A code is an unsigned integer 0 .. 2^bits - 1 when the array has zero points, else a two's-complement
integer -2^(bits-1) .. 2^(bits-1) - 1.

XLA has no 3-bit type. Three bytes A, B and C hold eight codes c0 .. c7, so that 3 bits really take 3
bits, and that masks alone make twice 4-bit codes of six of them:

  bits     7 6 5      4       3 2 1      0
  A         c0    c6's upper   c1    c7's upper
  B         c2    c6's middle  c3    c7's middle
  C         c4    c6's lower   c5    c7's lower

An unsigned code is stored as the two's complement of the code less 4. Four bytes of four consecutive
rows make a word, and the words of A, B and C follow one another, in runs of eight where the rows are a
multiple of 256: 8 x 4 x 8 rows are then three runs, and a code's byte is that of its row.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SUPPORTED_BITS = (2, 3, 4, 6, 8)
WORD_ROWS = 32  # Rows whose 3-bit codes fill three 32-bit words.
RUN_ROWS = 256  # Rows whose 3-bit codes fill three runs of eight words, a register's.

_BYTES = np.arange(0, 32, 8, dtype=np.uint32)[:, None]
_UNSIGNED = {2: jnp.uint2, 4: jnp.uint4, 6: jnp.uint8, 8: jnp.uint8}
_SIGNED = {2: jnp.int2, 4: jnp.int4, 6: jnp.int8, 8: jnp.int8}


def packed_dtype(bits: int, *, signed: bool):
  """Type of the array that `pack` returns."""
  return jnp.uint32 if bits == 3 else (_SIGNED if signed else _UNSIGNED)[bits]


def pack(codes: Array, bits: int, *, signed: bool) -> Array:
  """Packs codes.

  Args:
    codes: integers (of any type, floating included) [rows, columns] in the range that `bits` and
      `signed` give.
    bits: 2, 3, 4, 6 or 8.
    signed: two's complement (arrays without zero points).

  Returns:
    [rows, columns] of the native type, or for 3 bits uint32 [3 ceil(rows / 32), columns].
  """
  if bits != 3:
    return codes.astype(packed_dtype(bits, signed=signed))
  rows, columns = codes.shape
  # By way of int32: a negative float would become 0 in an unsigned type.
  padded = jnp.pad(codes.astype(jnp.int32) & 7, ((0, -rows % WORD_ROWS), (0, 0)))
  c = (padded ^ (0 if signed else 4)).astype(jnp.uint32)
  c = c.reshape(-1, 8, _run(rows), 4, columns)
  c = [c[:, i] for i in range(8)]
  last = c[6] << 4 | c[7]
  in_bytes = [
    c[2 * i] << 5 | c[2 * i + 1] << 1 | last >> shift & 0x11 for i, shift in enumerate((2, 1, 0))
  ]
  in_bytes = jnp.stack(in_bytes, axis=1)  # [units, 3, run, 4, columns]
  words = jnp.sum(in_bytes << _BYTES, axis=3, dtype=jnp.uint32)
  return words.reshape(-1, columns)


def unpack(values: Array, bits: int, rows: int, *, signed: bool) -> Array:
  """Inverse of `pack`: int8 (uint8 without sign) codes [rows, columns]."""
  dtype = jnp.int8 if signed else jnp.uint8
  if bits != 3:
    return values.astype(dtype)
  columns = values.shape[-1]
  in_bytes = values.reshape(-1, 3, _run(rows), 1, columns) >> _BYTES
  a, b, c = (in_bytes[:, i] for i in range(3))
  last = (a & 0x11) << 2 | (b & 0x11) << 1 | c & 0x11
  codes = [byte >> shift for byte in (a, b, c) for shift in (5, 1)] + [last >> 4, last]
  codes = (jnp.stack(codes, axis=1) & 7 ^ 4).astype(jnp.int32) - (4 if signed else 0)
  return codes.reshape(-1, columns)[:rows].astype(dtype)


def _run(rows: int) -> int:
  """Consecutive words of A, of B and of C, that is, rows of a unit over 32."""
  return RUN_ROWS // WORD_ROWS if rows % RUN_ROWS == 0 else 1
