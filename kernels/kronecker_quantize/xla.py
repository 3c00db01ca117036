"""Reference implementation in plain JAX."""

import jax
import jax.numpy as jnp

Array = jax.Array

# The smallest scale of a token, so that one of zeros stays zero.
SMALLEST_SCALE = 1e-7


def kronecker_transform(x: Array, left: Array, right: Array) -> Array:
  """As `api.kronecker_transform`."""
  left, right = left.astype(x.dtype), right.astype(x.dtype)
  # Accelerators would round float32 operands to bfloat16.
  precision = "highest" if x.dtype == jnp.float32 else None
  matrix = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])
  if right.shape[0] > 1:
    matrix = jnp.matmul(matrix, right, precision=precision)
  if left.shape[0] > 1:
    # A batch of P1^T X takes half the contraction's time on a CPU, which then transposes no X; and
    # twice its cycles on a TPU v5e, which copies P1 for every X (2048 rows of 64 x 64).
    batch = lambda x, p: jnp.matmul(
      jnp.broadcast_to(p.T, (*x.shape[:-2], *p.shape)), x, precision=precision
    )
    contraction = lambda x, p: jnp.einsum("...ij,ik->...kj", x, p, precision=precision)
    matrix = jax.lax.platform_dependent(matrix, left, cpu=batch, default=contraction)
  else:
    matrix = matrix * left[0, 0]
  return (matrix if right.shape[0] > 1 else matrix * right[0, 0]).reshape(x.shape)


def kronecker_quantize(
  x: Array, left: Array, right: Array, clip: Array | None, bits: int
) -> tuple[Array, Array]:
  """As `api.kronecker_quantize`."""
  y = kronecker_transform(x, left, right).astype(jnp.float32)
  clip = jnp.ones(2) if clip is None else clip.astype(jnp.float32)
  ends = jnp.stack([y.min(axis=-1, keepdims=True), y.max(axis=-1, keepdims=True)])
  largest = jnp.abs(ends * clip.reshape(2, *[1] * y.ndim)).max(axis=0)
  limit = 2 ** (bits - 1) - 1
  scales = jnp.maximum(largest, SMALLEST_SCALE) / limit
  codes = jnp.clip(jnp.round(y / scales), -limit - 1, limit)
  return codes.astype(jnp.int8), scales
