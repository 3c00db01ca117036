"""GPTQ: round one input row at a time and let the rows not yet rounded absorb the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2023), in the blocked Cholesky form of its section 3.3. Weights are [in, out], so
the paper's column of W is a row here.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from common.quantization import rtn
from common.quantization.quantized_array import IntegerFormat, QuantizedArray, from_codes

Array = jax.Array

# Triangular matrices up to this size are inverted by a single solve.
SOLVE_SIZE = 512


def hessian(x: Array) -> Array:
  """Mean of 2 x x^T over tokens, float32 [in, in]: the Hessian of the layer's squared error.

  Args:
    x: inputs of the layer, [..., in].
  """
  x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  return 2.0 / x.shape[0] * jnp.matmul(x.T, x, precision="highest")


def inverse_cholesky(h: Array, damping: float) -> Array:
  """The upper triangular U with inv(H + damping * mean(diag H) * I) = U^T U, [in, in].

  One Cholesky and one triangular inverse: factor the index-reversed matrix as L L^T; reversing
  back gives H = R R^T with R upper triangular, hence inv(H) = R^-T R^-1 and U = R^-1. (The
  reference code factors, inverts and factors again.)
  """
  damped = h + damping * jnp.mean(jnp.diag(h)) * jnp.eye(h.shape[0], dtype=h.dtype)
  lower = jnp.linalg.cholesky(damped[::-1, ::-1])
  return _triangular_inverse(lower)[::-1, ::-1]


@functools.partial(jax.jit, static_argnums=2)
def stable_damping(h: Array, damping: float, act_order: bool) -> Array:
  """The first of damping, 10 damping, ... whose Cholesky factor of inv(H) is finite, float32 [].

  Above max(1, damping) there is none. In float32 a Hessian of few samples may need more than 1 %.

  Args:
    h: float32 [in, in]; inputs that are always 0 are set apart, as `gptq` does.
    damping: to begin with, as a fraction of the mean diagonal.
    act_order: factor the rows in the order in which `gptq` will; near the limit it matters.
  """
  h = h + jnp.diag((jnp.diag(h) == 0).astype(h.dtype))
  order = jnp.argsort(-jnp.diag(h), stable=True) if act_order else jnp.arange(len(h))
  h = h[order][:, order]
  limit = jnp.maximum(1.0, damping)
  singular = lambda d: (d <= limit) & ~jnp.isfinite(inverse_cholesky(h, d)).all()
  return jax.lax.while_loop(singular, lambda d: 10 * d, jnp.float32(damping))


def _triangular_inverse(lower: Array) -> Array:
  """The inverse of a lower triangular matrix, from blocks that double in size, [n, n]:

    inv([[A, 0], [B, C]]) = [[inv(A), 0], [-inv(C) B inv(A), inv(C)]]

  One triangular solve of the whole does the same, but XLA expands it for a TPU into a program with
  temporaries of 40 times the matrix.
  """
  size = lower.shape[0]
  parts = 1
  while parts * SOLVE_SIZE < size:
    parts *= 2
  block = -(-size // parts)
  padded = block * parts
  lower = jnp.pad(lower, ((0, padded - size), (0, padded - size)))
  lower = lower + jnp.diag((jnp.arange(padded) >= size).astype(lower.dtype))
  # Every `step` rows the block [n, n] that lies `below` rows under the diagonal.
  blocks = lambda step, n, below: jnp.stack(
    [lower[i + below : i + below + n, i : i + n] for i in range(0, padded, step)]
  )
  eye = jnp.eye(block, dtype=lower.dtype)
  inverses = jax.vmap(lambda x: solve_triangular(x, eye, lower=True))(blocks(block, block, 0))
  while len(inverses) > 1:
    half = inverses.shape[1]
    first, last = inverses[::2], inverses[1::2]
    # Accelerators would round float32 operands to bfloat16.
    below = jnp.matmul(last, blocks(2 * half, half, half), precision="highest")
    below = -jnp.matmul(below, first, precision="highest")
    inverses = jnp.block([[first, jnp.zeros_like(first)], [below, last]])
  return inverses[0, :size, :size]


@functools.partial(jax.jit, static_argnames=("format", "act_order", "block_size"))
def gptq(
  w: Array,
  h: Array,
  format: IntegerFormat,
  *,
  damping: float = 0.01,
  act_order: bool = False,
  block_size: int = 128,
) -> QuantizedArray:
  """Quantizes weights against the inputs whose Hessian is `h`.

  Ranges always contain 0, as in the reference code. Without `act_order` the scales of a group are
  taken when its first row comes up, from the weights as compensated so far. With `act_order`
  (rows by descending diag(H)) they are taken from the original weights, so that groups stay
  contiguous and inference needs no permutation ("static groups").

  Args:
    w: [in, out].
    h: [in, in], see `hessian`.
    format: integer format, grouped along the input (axis 0).
    damping: added to the diagonal, as a fraction of its mean.
    act_order: quantize the rows with the largest diag(H) first.
    block_size: rows between two updates of the rows behind; raised to the group size.

  Raises:
    UserError: the group size does not divide the input dimension.
    ValueError: the format is not grouped along the input.
  """
  if format.axis != 0:
    raise ValueError("GPTQ takes formats grouped along the input (axis 0)")
  rows, columns = w.shape
  groups = format.num_groups(w.shape)[0]
  group_size = rows // groups
  dead = jnp.diag(h) == 0
  h = h + jnp.diag(dead.astype(h.dtype))
  w = jnp.where(dead[:, None], 0.0, w.astype(jnp.float32))

  def scales_of(part: Array):
    low, high = part.min(axis=0, keepdims=True), part.max(axis=0, keepdims=True)
    scales, zeros = rtn.range_to_scales(jnp.minimum(low, 0), jnp.maximum(high, 0), format)
    zeros = jnp.zeros_like(scales, jnp.float32) if zeros is None else zeros
    return scales.astype(jnp.float32)[0], zeros[0]

  # Scales and zero points per group, [groups, out]; refreshed on the way without `act_order`.
  scales, zeros = jax.vmap(scales_of)(w.reshape(groups, group_size, columns))
  order = jnp.argsort(-jnp.diag(h), stable=True) if act_order else jnp.arange(rows)
  group_of = order // group_size
  w, h = w[order], h[order][:, order]
  u = inverse_cholesky(h, damping)

  # Pad to whole blocks with rows that neither receive nor send any error.
  refresh = not act_order and groups > 1
  block = max(block_size, group_size) if refresh else block_size
  block = block // group_size * group_size if refresh else block
  padded = -rows % block
  w = jnp.pad(w, ((0, padded), (0, 0)))
  u = jnp.pad(u, ((0, padded), (0, padded)))
  u = u + jnp.diag((jnp.arange(rows + padded) >= rows).astype(u.dtype))
  group_of = jnp.pad(group_of, (0, padded), constant_values=groups)
  scales = jnp.pad(scales, ((0, 1), (0, 0)), constant_values=1.0)
  zeros = jnp.pad(zeros, ((0, 1), (0, 0)))

  def quantize_row(i, carry):
    """Rounds row i of the block; the rows behind it in the block take up the error."""
    part, codes, errors, scales, zeros, start, u_block = carry
    g = group_of[start + i]
    if refresh:

      def fresh(tables):
        window = jax.lax.dynamic_slice_in_dim(part, i, group_size)
        s, z = scales_of(window)
        return tables[0].at[g].set(s), tables[1].at[g].set(z)

      scales, zeros = jax.lax.cond(
        (start + i) % group_size == 0, fresh, lambda tables: tables, (scales, zeros)
      )
    row = part[i]
    code = jnp.clip(jnp.round(row / scales[g]) + zeros[g], *format.code_range)
    error = (row - (code - zeros[g]) * scales[g]) / u_block[i, i]
    # U is upper triangular: rows before i get a zero coefficient.
    part = part - u_block[i][:, None] * error[None, :]
    return part, codes.at[i].set(code), errors.at[i].set(error), scales, zeros, start, u_block

  def quantize_block(b, carry):
    w, codes, scales, zeros = carry
    start = b * block
    part = jax.lax.dynamic_slice_in_dim(w, start, block)
    u_rows = jax.lax.dynamic_slice_in_dim(u, start, block)
    u_block = jax.lax.dynamic_slice_in_dim(u_rows, start, block, axis=1)
    empty = jnp.zeros_like(part)
    _, block_codes, errors, scales, zeros, _, _ = jax.lax.fori_loop(
      0, block, quantize_row, (part, empty, empty, scales, zeros, start, u_block)
    )

    def update_behind(k, w):
      u_part = jax.lax.dynamic_slice_in_dim(u_rows, k * block, block, axis=1)
      behind = jax.lax.dynamic_slice_in_dim(w, k * block, block)
      # Accelerators would round float32 operands to bfloat16.
      behind = behind - jnp.matmul(u_part.T, errors, precision="highest")
      return jax.lax.dynamic_update_slice_in_dim(w, behind, k * block, axis=0)

    w = jax.lax.fori_loop(b + 1, (rows + padded) // block, update_behind, w)
    codes = jax.lax.dynamic_update_slice_in_dim(codes, block_codes, start, axis=0)
    return w, codes, scales, zeros

  _, codes, scales, zeros = jax.lax.fori_loop(
    0, (rows + padded) // block, quantize_block, (w, jnp.zeros_like(w), scales, zeros)
  )
  codes = jnp.zeros((rows, columns), jnp.float32).at[order].set(codes[:rows])
  zeros = None if format.symmetric else zeros[:groups]
  return from_codes(codes, scales[:groups], zeros, format)
