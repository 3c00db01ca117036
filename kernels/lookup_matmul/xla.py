"""The reference implementation in plain JAX: look up, then dot."""

import functools

import jax
import jax.numpy as jnp

from kernels.lookup_matmul.packing import packed_shape, unpack_indices

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def lookup(packed: Array, codebooks: Array, rows: int, columns: int) -> Array:
  """The matrix that packed indices stand for, [rows, columns] in the codebooks' dtype.

  Row n of it is ceil(columns / v) vectors of v consecutive outputs; each is a centroid of its row's
  codebook.

  Args:
    packed: of `pack_indices`.
    codebooks: [groups, num_centroids, v]; consecutive rows / groups rows share one.
    rows, columns: of the result; what pads the last vector of a row is dropped.

  Raises:
    ValueError: the indices have another shape, such as those of another layout.
  """
  groups, k, v = codebooks.shape
  expected = packed_shape(rows, k, -(-columns // v))
  if packed.shape != expected:
    raise ValueError(f"packed indices have shape {packed.shape}, expected {expected}")
  indices = unpack_indices(packed, rows).reshape(groups, rows // groups, -1)
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
