"""Operators that uncross quantiles: sort, PAVA, the sweep from the median, soft sort (section 4).

All map [..., m] quantiles at increasing levels to [..., m], keep the dtype and are differentiable.
Sorting and PAVA never increase the pinball loss summed over the levels, whatever the outcome.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.jit
def sort(z: jax.Array) -> jax.Array:
  """The values in increasing order; the gradient follows the permutation."""
  return jnp.sort(z, axis=-1)


@jax.jit
def pava(z: jax.Array) -> jax.Array:
  """Isotonic regression: the increasing vector nearest to z in squares.

  The min-max formula max_{i<=k} min_{j>=k} mean(z_i ... z_j) finds the blocks: O(m^2) memory per
  row, but no data-dependent loop. The result is the average in each block with the blocks held
  constant, so that the gradient is averaged in them as well.
  """
  return _average(_blocks(z), z)


@jax.jit
def median_outwards(z: jax.Array) -> jax.Array:
  """A running maximum upwards and a running minimum downwards, both from the middle level."""
  middle = z.shape[-1] // 2
  below = jax.lax.cummin(z[..., : middle + 1], axis=z.ndim - 1, reverse=True)
  above = jax.lax.cummax(z[..., middle:], axis=z.ndim - 1)
  return jnp.concatenate([below[..., :-1], above], axis=-1)


@jax.jit
def soft_sort(z: jax.Array, strength: float = 0.1) -> jax.Array:
  """Sorting with a gradient for every pair that is nearly tied (Blondel et al., 2020).

  The projection, in squares, of (1 ... m) / strength onto the permutahedron of z. It keeps the sum
  and tends to `sort` as strength -> 0.
  """
  increasing = jnp.sort(z, axis=-1)
  anchors = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype) / strength
  blocks = _blocks(anchors - increasing)
  return (
    anchors - _average(blocks, jnp.broadcast_to(anchors, z.shape)) + _average(blocks, increasing)
  )


def _identity(z: jax.Array) -> jax.Array:
  return z


ISOTONISERS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "none": _identity,
  "sort": sort,
  "pava": pava,
  "median_outwards": median_outwards,
  "soft_sort": soft_sort,
}


def _blocks(z: jax.Array) -> jax.Array:
  """[..., m, m], row k averages over the block of k in the isotonic regression of z."""
  z = jax.lax.stop_gradient(z)
  m = z.shape[-1]
  i, j = jnp.arange(m)[:, None], jnp.arange(m)[None, :]
  inside = j >= i
  # Sums that start anew at every i, so that the mean of one value is that value exactly.
  sums = jnp.cumsum(jnp.where(inside, z[..., None, :], 0), axis=-1)
  means = jnp.where(inside, sums / jnp.maximum(j - i + 1, 1), jnp.inf)
  smallest = jax.lax.cummin(means, axis=means.ndim - 1, reverse=True)  # Over j >= k, [..., i, k].
  fitted = jnp.max(jnp.where(inside, smallest, -jnp.inf), axis=-2)
  same = (fitted[..., :, None] == fitted[..., None, :]).astype(z.dtype)
  return same / same.sum(axis=-1, keepdims=True)


def _average(blocks: jax.Array, z: jax.Array) -> jax.Array:
  return jnp.einsum("...kj,...j->...k", blocks, z, precision="highest")
