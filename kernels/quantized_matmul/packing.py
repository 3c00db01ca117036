"""Storage of low-bit integer codes: native 2-, 4- and 8-bit arrays, bit planes for 3 bits.

6-bit codes, which serve integer products, take the bytes of 8-bit ones.

A code is an unsigned integer 0 .. 2^bits - 1 when the array has zero points, else a two's-complement
integer -2^(bits-1) .. 2^(bits-1) - 1.

XLA has no 3-bit type. Three bit planes of 32 consecutive rows make three 32-bit words, so that 3
bits really take 3 bits and unpacking is a shift and a mask for whole vectors, with no value
straddling two words.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

SUPPORTED_BITS = (2, 3, 4, 6, 8)
PLANE_ROWS = 32

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
    [rows, columns] of the native type, or for 3 bits uint32 [ceil(rows / 32), 3, columns].
  """
  if bits != 3:
    return codes.astype(packed_dtype(bits, signed=signed))
  rows, columns = codes.shape
  # By way of int32: a negative float would become 0 in an unsigned type.
  padded = jnp.pad(codes.astype(jnp.int32) & 7, ((0, -rows % PLANE_ROWS), (0, 0)))
  padded = padded.astype(jnp.uint32)
  padded = padded.reshape(-1, PLANE_ROWS, columns)
  shifts = jnp.arange(PLANE_ROWS, dtype=jnp.uint32)[None, :, None]
  planes = [jnp.sum(((padded >> b) & 1) << shifts, axis=1, dtype=jnp.uint32) for b in range(3)]
  return jnp.stack(planes, axis=1)


def unpack(values: Array, bits: int, rows: int, *, signed: bool) -> Array:
  """Inverse of `pack`: int8 (uint8 without sign) codes [rows, columns]."""
  dtype = jnp.int8 if signed else jnp.uint8
  if bits != 3:
    return values.astype(dtype)
  shifts = jnp.arange(PLANE_ROWS, dtype=jnp.uint32)[None, :, None]
  codes = sum(((values[:, b, None, :] >> shifts) & 1) << b for b in range(3))
  if signed:
    codes = (codes ^ 4).astype(jnp.int32) - 4
  return codes.reshape(-1, values.shape[-1])[:rows].astype(dtype)
