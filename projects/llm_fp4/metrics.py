"""How far a quantized layer's output is from the full-precision one."""

import jax
import jax.numpy as jnp

Array = jax.Array


def l2(y, y_hat):
  """Mean squared error."""
  return jnp.mean((y - y_hat) ** 2, axis=0)


def l1(y, y_hat):
  """Mean absolute error."""
  return jnp.mean(jnp.abs(y - y_hat), axis=0)


def cosine(y, y_hat):
  """1 - cosine similarity."""
  norms = jnp.linalg.norm(y, axis=0) * jnp.linalg.norm(y_hat, axis=0)
  return 1 - jnp.sum(y * y_hat, axis=0) / jnp.maximum(norms, 1e-12)


def pearson(y, y_hat):
  """1 - Pearson's correlation."""
  return cosine(y - y.mean(axis=0), y_hat - y_hat.mean(axis=0))


# Distances of outputs [tokens, out] -> [out]. For "hessian" they are multiplied by the gradients first.
METRICS = {"l2": l2, "l1": l1, "cosine": cosine, "pearson": pearson, "hessian": l2}


def scaled_gradients(gradients: Array) -> Array:
  """Gradients of the loss over their root mean square, so that their squares do not underflow.

  Where all are 0 they become 1: a layer without influence on the loss is searched by its plain error.

  Args:
    gradients: by a layer's output, in any shape.
  """
  gradients = gradients.astype(jnp.float32)
  largest = jnp.abs(gradients).max()
  shares = gradients / jnp.where(largest > 0, largest, 1)
  return jnp.where(largest > 0, shares / jnp.sqrt(jnp.mean(shares**2)), 1)
