"""Packed indices, and the reference implementation in plain JAX: look up, then dot.

Row n of a weight [in, out] is ceil(out / v) vectors of v consecutive outputs; each is a centroid
of its row's codebook. Indices of b bits are stored as bit planes: 32 consecutive rows make b words
of 32 bits, so that 12 bits take 12 and none straddles two words.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

PLANE_ROWS = 32


def index_bits(num_centroids: int) -> int:
  """log2 of the number of centroids, which is a power of two."""
  return (num_centroids - 1).bit_length()


@functools.partial(jax.jit, static_argnames="num_centroids")
def pack_indices(indices: Array, num_centroids: int) -> Array:
  """[rows, vectors] -> bit planes, uint32 [ceil(rows / 32), log2 num_centroids, vectors]."""
  rows, vectors = indices.shape
  padded = jnp.pad(indices.astype(jnp.uint32), ((0, -rows % PLANE_ROWS), (0, 0)))
  padded = padded.reshape(-1, 1, PLANE_ROWS, vectors)
  bits = jnp.arange(index_bits(num_centroids), dtype=jnp.uint32)[:, None, None]
  lanes = jnp.arange(PLANE_ROWS, dtype=jnp.uint32)[:, None]
  return jnp.sum(((padded >> bits) & 1) << lanes, axis=2, dtype=jnp.uint32)


def unpack_indices(planes: Array, rows: int) -> Array:
  """Inverse of `pack_indices`: uint16 [rows, vectors]."""
  lanes = jnp.arange(PLANE_ROWS, dtype=jnp.uint32)[:, None]
  bits = jnp.arange(planes.shape[1], dtype=jnp.uint32)[:, None, None]
  indices = jnp.sum(((planes[:, :, None] >> lanes) & 1) << bits, axis=1, dtype=jnp.uint32)
  return indices.reshape(-1, planes.shape[-1])[:rows].astype(jnp.uint16)


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def lookup(planes: Array, codebooks: Array, rows: int, columns: int) -> Array:
  """The matrix that packed indices stand for, [rows, columns] in the codebooks' dtype.

  Args:
    planes: of `pack_indices`.
    codebooks: [groups, num_centroids, v]; consecutive rows / groups rows share one.
    rows, columns: of the result; what pads the last vector of a row is dropped.
  """
  groups, _, v = codebooks.shape
  indices = unpack_indices(planes, rows).reshape(groups, rows // groups, -1)
  vectors = jax.vmap(lambda codebook, index: codebook[index])(codebooks, indices)
  return vectors.reshape(rows, indices.shape[-1] * v)[:, :columns]


def lookup_matmul(
  x: Array,
  planes: Array,
  codebooks: Array,
  residual_planes: Array | None,
  residual_codebooks: Array | None,
  columns: int,
) -> Array:
  """As `api.lookup_matmul`, in float32."""
  # Look up when x is there, not before: a decoding loop's compiler would otherwise move every
  # layer's lookup out of the loop and hold the whole model in full precision.
  x, planes, residual_planes = jax.lax.optimization_barrier((x, planes, residual_planes))
  rows = x.shape[-1]
  weights = lookup(planes, codebooks.astype(jnp.float32), rows, columns)
  if residual_planes is not None:
    weights += lookup(residual_planes, residual_codebooks.astype(jnp.float32), rows, columns)
  return jnp.dot(x, weights.astype(x.dtype), preferred_element_type=jnp.float32)
