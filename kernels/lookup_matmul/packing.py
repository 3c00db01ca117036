"""How the indices of vectors are packed into 32-bit words. Only this file knows the layout.

Rows of indices are taken in groups of 256, or of fewer where padding to 256 would cost much
(`group_rows`). An index of b bits is cut into fields of 16, 8, 4, 2 or 1 bits, one for each bit set in b: 12 bits are
the 8 low ones and the 4 high ones. A field of f bits of a group of G rows takes G f / 32 words of each
column, after those of the fields before it, so that no bit is lost: word w has rows w, w + G f / 32,
w + 2 G f / 32, ..., the first one in its lowest bits. One shift and one mask take a field of as many
rows out of the words.

Before that the even ones of every 16 rows are put before the odd ones: 16-bit values looked up for eight
rows and for the next eight, in the lower and in the upper halves of words, are in the order of a TPU's
registers.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

GROUP_ROWS = 256  # Of the groups that the kernel reads as they are.
_WORD_BITS = 32


def index_bits(num_centroids: int) -> int:
  """log2 of the number of centroids, which is a power of two."""
  return (num_centroids - 1).bit_length()


def index_fields(bits: int) -> list[int]:
  """The widths that an index is cut into, from its lowest bits on."""
  return [1 << i for i in reversed(range(bits.bit_length())) if bits >> i & 1]


def group_rows(rows: int) -> int:
  """Rows of a group: 256 if they pad by a sixteenth at most, as they do any large number of rows.

  Otherwise the multiple of 32 up to 256 that pads least, the largest of those: 192 for 384 rows.
  """
  padding = lambda group: max(-(-rows // group), 1) * group - rows
  if 16 * padding(GROUP_ROWS) <= rows:
    return GROUP_ROWS
  return min(range(GROUP_ROWS, 0, -_WORD_BITS), key=padding)


def packed_shape(rows: int, num_centroids: int, vectors: int) -> tuple[int, int, int]:
  """Of the packed indices [rows, vectors]: groups, words of a group, vectors."""
  group = group_rows(rows)
  return -(-rows // group), group // _WORD_BITS * index_bits(num_centroids), vectors


@functools.partial(jax.jit, static_argnames="num_centroids")
def pack_indices(indices: Array, num_centroids: int) -> Array:
  """[rows, vectors] -> uint32 [groups, words, vectors] (`packed_shape`)."""
  rows, vectors = indices.shape
  group = group_rows(rows)
  padded = jnp.pad(indices.astype(jnp.uint32), ((0, -rows % group), (0, 0)))
  ordered = padded.reshape(-1, group // 16, 8, 2, vectors).swapaxes(2, 3)
  packed, at = [], 0
  for field in index_fields(index_bits(num_centroids)):
    places = _WORD_BITS // field
    values = ((ordered >> at) & ((1 << field) - 1)).reshape(-1, places, group // places, vectors)
    shifts = field * jnp.arange(places, dtype=jnp.uint32)[:, None, None]
    packed.append(jnp.sum(values << shifts, axis=1, dtype=jnp.uint32))
    at += field
  return jnp.concatenate(packed, axis=1)


def unpack_indices(packed: Array, rows: int) -> Array:
  """Inverse of `pack_indices`: uint16 [rows, vectors]."""
  groups, words, vectors = packed.shape
  group = group_rows(rows)
  indices, start, at = jnp.zeros((groups, group, vectors), jnp.uint32), 0, 0
  for field in index_fields(words * _WORD_BITS // group):
    places = _WORD_BITS // field
    shifts = field * jnp.arange(places, dtype=jnp.uint32)[:, None, None]
    values = packed[:, None, start : start + group // places] >> shifts
    indices |= (values & ((1 << field) - 1)).reshape(groups, group, vectors) << at
    start, at = start + group // places, at + field
  rows_of_16 = indices.reshape(groups, group // 16, 2, 8, vectors).swapaxes(2, 3)
  return rows_of_16.reshape(-1, vectors)[:rows].astype(jnp.uint16)
