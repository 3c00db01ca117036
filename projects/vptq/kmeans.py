"""Weighted k-means on many short vectors: Lloyd's algorithm, jitted, a chunk of vectors at a time."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

# Distances of one chunk, chunk x num_centroids: bounds the temporary memory to some tens of MB.
CHUNK_DISTANCES = 2**22

# Centroids that `_argmin` looks at together on the CPU.
TILE = 64


def nearest_centroid(x: Array, weights: Array, centroids: Array) -> Array:
  """argmin_c sum_j weights_j (x_j - c_j)^2, int32 [n]; of equals the first.

  Args:
    x: [n, v].
    weights: [n, v]; 0 takes a coordinate out.
    centroids: [k, v].
  """
  return _argmin(_distances(x, weights, centroids))


def _distances(x: Array, weights: Array, centroids: Array) -> Array:
  """Weighted squared distances less sum_j w_j x_j^2, which no choice depends on, [n, k].

  Expanded, w @ (c^2)^T - 2 (w x) @ c^T, and taken as one product of twice as many columns: at a few
  columns the time goes into writing the distances.
  """
  vectors = jnp.concatenate([weights, weights * x], axis=1)
  targets = jnp.concatenate([centroids**2, -2 * centroids], axis=1)
  return jnp.matmul(vectors, targets.T, precision="highest")


def _argmin(distances: Array) -> Array:
  """jnp.argmin over the last axis, int32 [n]; of equals the first.

  On the CPU XLA compiles argmin to scalar code, and min to vector code which is ten times faster:
  there the least tile is found first, by its min, and argmin looks at that tile only.
  """

  def by_tiles(distances):
    n, k = distances.shape
    tile = min(TILE, k)
    padded = jnp.pad(distances, ((0, 0), (0, -k % tile)), constant_values=jnp.inf)
    tiles = padded.reshape(n, -1, tile)
    best = jnp.argmin(tiles.min(axis=-1), axis=-1)
    nearest = jnp.take_along_axis(tiles, best[:, None, None], axis=1)[:, 0]
    return best * tile + jnp.argmin(nearest, axis=-1)

  whole = functools.partial(jnp.argmin, axis=-1)
  return jax.lax.platform_dependent(distances, cpu=by_tiles, default=whole)


def _sums(x: Array, index: Array, k: int) -> Array:
  """The sum of the rows with each index, [n, m] -> [k, m].

  A scatter on the CPU. Accelerators run one row by row or in no fixed order: they multiply by the
  matrix of memberships.
  """

  def product(x, index):
    return jnp.matmul(jax.nn.one_hot(index, k, dtype=x.dtype).T, x, precision="highest")

  scatter = functools.partial(jax.ops.segment_sum, num_segments=k)
  return jax.lax.platform_dependent(x, index, cpu=scatter, default=product)


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
      sums = _sums(jnp.concatenate([weights * x, weights], axis=1), _argmin(distances), k)
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
