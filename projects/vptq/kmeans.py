"""Weighted k-means on many short vectors: Lloyd's algorithm, jitted, a chunk of vectors at a time."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

# Distances of one chunk, chunk x num_centroids: bounds the temporary memory to some tens of MB.
CHUNK_DISTANCES = 2**22


def nearest_centroid(x: Array, weights: Array, centroids: Array) -> Array:
  """argmin_c sum_j weights_j (x_j - c_j)^2, int32 [n]; of equals the first.

  Args:
    x: [n, v].
    weights: [n, v]; 0 takes a coordinate out.
    centroids: [k, v].
  """
  return jnp.argmin(_distances(x, weights, centroids), axis=-1)


def _distances(x: Array, weights: Array, centroids: Array) -> Array:
  """Weighted squared distances less sum_j w_j x_j^2, which no choice depends on, [n, k].

  Expanded into two matrix products, w @ (c^2)^T - 2 (w x) @ c^T.
  """
  squares = jnp.matmul(weights, (centroids**2).T, precision="highest")
  return squares - 2 * jnp.matmul(weights * x, centroids.T, precision="highest")


@functools.partial(jax.jit, static_argnames="num_centroids")
def weighted_kmeans(
  x: Array,
  weights: Array,
  num_centroids: int,
  key: Array,
  *,
  max_iterations: int | Array = 100,
  tolerance: float = 1e-5,
) -> tuple[Array, Array]:
  """k-means from `num_centroids` distinct vectors drawn at random; see `lloyd`."""
  chosen = jax.random.choice(key, x.shape[0], (num_centroids,), replace=False)
  return lloyd(x, weights, x[chosen], max_iterations=max_iterations, tolerance=tolerance)


@jax.jit
def lloyd(
  x: Array,
  weights: Array,
  centroids: Array,
  *,
  max_iterations: int | Array = 100,
  tolerance: float = 1e-5,
) -> tuple[Array, Array]:
  """Lloyd's iterations from given centroids.

  Minimizes sum_i sum_j weights_ij (x_ij - c_j)^2. A centroid without vectors stays where it is.
  Stops when the centroids' squared shift is at most `tolerance` times the mean variance of x's
  coordinates (scikit-learn's rule).

  Args:
    x: [n, v].
    weights: non-negative [n, v].
    centroids: to start from, [k, v].

  Returns:
    (centroids float32 [k, v], inertia before the last update).
  """
  n, v = x.shape
  k = centroids.shape[0]
  chunk = min(n, max(1, CHUNK_DISTANCES // k))
  pad = lambda a: jnp.pad(a.astype(jnp.float32), ((0, -n % chunk), (0, 0))).reshape(-1, chunk, v)
  chunks = pad(x), pad(weights)  # What pads has weight 0.
  threshold = tolerance * jnp.var(x.astype(jnp.float32), axis=0).mean()

  def step(carry):
    iteration, centroids, _, _ = carry

    def add(totals, chunk):
      x, weights = chunk
      distances = _distances(x, weights, centroids)
      member = jax.nn.one_hot(jnp.argmin(distances, axis=-1), k, dtype=jnp.float32)
      sums = jnp.matmul(
        member.T, jnp.concatenate([weights * x, weights], axis=1), precision="highest"
      )
      inertia = jnp.sum(jnp.min(distances, axis=-1)) + jnp.sum(weights * x**2)
      return (totals[0] + sums, totals[1] + inertia), None

    start = jnp.zeros((k, 2 * v)), jnp.zeros(())
    (sums, inertia), _ = jax.lax.scan(add, start, chunks)
    total = sums[:, v:]
    moved = jnp.where(total > 0, sums[:, :v] / jnp.where(total > 0, total, 1), centroids)
    return iteration + 1, moved, jnp.sum((moved - centroids) ** 2), inertia

  def unfinished(carry):
    iteration, _, shift, _ = carry
    return (iteration < max_iterations) & (shift > threshold)

  start = (0, centroids.astype(jnp.float32), jnp.float32(jnp.inf), jnp.float32(jnp.inf))
  _, centroids, _, inertia = jax.lax.while_loop(unfinished, step, start)
  return centroids, inertia
