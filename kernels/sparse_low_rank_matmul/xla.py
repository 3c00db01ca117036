"""The product in plain JAX, with the paper's backward pass."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def sparse_low_rank_matmul(
  x: Array, a: Array, b: Array, values: Array, indices: Array, scale: float
) -> Array:
  """As `api.sparse_low_rank_matmul`."""
  w = _weight(x, a, b, values, indices, scale)
  return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _weight(x: Array, a: Array, b: Array, values: Array, indices: Array, scale: float) -> Array:
  """W [in, out] in x's dtype, computed when x is there and not before.

  The compiler would otherwise see that forward and backward compute the same, and keep every
  layer's W from the one to the other.
  """
  _, *floats = jax.lax.optimization_barrier((x, a, b, values))
  a, b, values = (array.astype(x.dtype) for array in floats)
  product = scale * jnp.matmul(a, b, preferred_element_type=jnp.float32)
  return product.astype(x.dtype).ravel().at[indices].add(values).reshape(product.shape)


def _forward(x, a, b, values, indices, scale):
  y = sparse_low_rank_matmul(x, a, b, values, indices, scale)
  return y, (x, a, b, values, indices)


def _backward(scale, residuals, grad):
  x, a, b, values, indices = residuals
  w = _weight(grad, a, b, values, indices, scale)
  dx = jnp.matmul(grad, w.T, preferred_element_type=jnp.float32)
  dw = jnp.matmul(
    x.reshape(-1, x.shape[-1]).T,
    grad.reshape(-1, grad.shape[-1]),
    preferred_element_type=jnp.float32,
  )
  da = scale * jnp.matmul(dw, b.T.astype(jnp.float32))
  db = scale * jnp.matmul(a.T.astype(jnp.float32), dw)
  dvalues = dw.ravel()[indices]
  return (
    dx.astype(x.dtype), da.astype(a.dtype), db.astype(b.dtype), dvalues.astype(values.dtype), None
  )  # fmt: skip


sparse_low_rank_matmul.defvjp(_forward, _backward)
