"""The baseline that VPTQ's channel independence is measured against: v input channels at once.

After GPTVQ (van Baalen et al. 2024): a vector is v consecutive input channels of one output. The
channels of a vector are quantized together, and the channels behind take up the joint error,

  assignment  argmin_c (w - c)^T inv(inv(H)_PP) (w - c),   inv(H)_PP = U_PP^T U_PP
  feedback    W_F <- W_F - U_PF^T E,   E = inv(U_PP)^T (W_P - Q_P)

with P the v channels and F those behind. Codebooks, normalisation and order are VPTQ's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from projects.vptq.kmeans import nearest_centroid, weighted_kmeans
from projects.vptq.vptq import VPTQSettings, inverse_factor, prepare, proxy_error, restore

Array = jax.Array


@jax.jit
def joint_pass(w: Array, u: Array, codebook: Array) -> tuple[Array, Array]:
  """Quantizes v input channels at a time.

  Args:
    w: [in, out].
    u: upper triangular with inv(H) = U^T U, [in, in].
    codebook: [k, v].

  Returns:
    (indices int32 [ceil(in / v), out], quantized float32 [in, out]).
  """
  rows, columns = w.shape
  v = codebook.shape[1]
  padded = -rows % v
  w = jnp.pad(w.astype(jnp.float32), ((0, padded), (0, 0)))
  u = jnp.pad(u, ((0, padded), (0, padded)))
  present = jnp.arange(rows + padded) < rows
  u = u + jnp.diag((~present).astype(u.dtype))

  def step(w, start):
    channels = lambda a: jax.lax.dynamic_slice_in_dim(a, start, v)
    current, u_rows = channels(w), channels(u)
    mask = channels(present).astype(jnp.float32)
    u_block = jax.lax.dynamic_slice_in_dim(u_rows, start, v, axis=1)
    # In the coordinates E the metric is Euclidean.
    whiten = lambda a: solve_triangular(u_block, a, trans=1)
    centroids = codebook * mask  # What pads the last vector costs nothing.
    index = nearest_centroid(whiten(current).T, jnp.ones((columns, v)), whiten(centroids.T).T)
    quantized = centroids[index].T
    w = w - jnp.matmul(u_rows.T, whiten(current - quantized), precision="highest")
    return w, (index, quantized)

  _, (indices, quantized) = jax.lax.scan(step, w, jnp.arange(0, rows + padded, v))
  return indices, quantized.reshape(-1, columns)[:rows]


def gptvq(w: Array, h: Array, key: Array, settings: VPTQSettings) -> tuple[Array, Array]:
  """Quantizes a weight [in, out] with VPTQ's settings (one group, no outliers, no residual).

  Returns:
    (the quantized weight float32 [in, out], its proxy error).

  Raises:
    ValueError: the settings ask for groups, outliers or a residual.
  """
  if settings.num_groups > 1 or settings.outlier_fraction or settings.num_residual_centroids:
    raise ValueError("GPTVQ has neither groups nor outliers nor a residual codebook here")
  original, hessian = w.astype(jnp.float32), h
  w, h, importance, scale, bias, order = prepare(
    w,
    h,
    permute=settings.permute,
    normalize=settings.normalize,
    norm_hessian=settings.norm_hessian,
  )
  u = inverse_factor(h, settings.damping)
  codebook = _fit_codebook(
    w,
    importance,
    key,
    settings.kmeans_iterations,
    v=settings.vector_length,
    k=settings.num_centroids,
  )
  _, quantized = joint_pass(w, u, codebook)
  quantized = restore(quantized, order, scale, bias)
  return quantized, proxy_error(original, quantized, hessian)


@functools.partial(jax.jit, static_argnames=("v", "k"))
def _fit_codebook(
  w: Array, importance: Array, key: Array, max_iterations: int | Array, *, v: int, k: int
) -> Array:
  """k-means of all vectors, each channel with its weight; float16 values as float32 [k, v]."""
  rows, columns = w.shape
  vectors = lambda a: jnp.pad(a, ((0, -rows % v), (0, 0))).reshape(-1, v, columns)
  weights = jnp.broadcast_to((importance / importance.mean())[:, None], w.shape)
  swap = lambda a: vectors(a).transpose(0, 2, 1).reshape(-1, v)
  codebook, _ = weighted_kmeans(swap(w), swap(weights), k, key, max_iterations=max_iterations)
  return codebook.astype(jnp.float16).astype(jnp.float32)
