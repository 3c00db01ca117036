"""GPTQ with groups along the output: each input channel has its own scales (section 4 of AdaDim).

Weights are [in, out]; GPTQ takes one input channel, a row, at a time. With groups inside a row the
scales of a row depend on no other row, so they are computed when the row comes up, from the weights
that carry the error of the rows before. Any order of the rows is then free: nothing has to be fixed
in advance ("static groups") or permuted at inference.
"""

import functools

import jax
import jax.numpy as jnp

from common.quantization import rtn
from common.quantization.gptq import inverse_cholesky
from common.quantization.quantized_array import IntegerFormat, QuantizedArray, from_codes

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("format", "act_order", "block_size"))
def gptq_per_ic(
  w: Array,
  h: Array,
  format: IntegerFormat,
  *,
  damping: Array | float = 0.01,
  act_order: bool = True,
  block_size: int = 128,
) -> QuantizedArray:
  """Quantizes weights against the inputs whose Hessian is `h`.

  Row i is rounded as RTN would round it; its error e = (w_i - q_i) / U_ii goes to the rows behind,
  w_j -= U_ij e, with U the upper Cholesky factor of inv(H). Ranges are RTN's: they need not
  contain 0.

  Args:
    w: [in, out].
    h: float32 [in, in], see `common.quantization.gptq.hessian`.
    format: integer format, grouped along the output (axis 1).
    damping: added to the diagonal, as a fraction of its mean.
    act_order: quantize the rows with the largest diag(H) first.
    block_size: rows between two updates of the rows behind.

  Raises:
    UserError: the group size does not divide the output dimension.
    ValueError: the format is not grouped along the output.
  """
  if format.axis != 1:
    raise ValueError("per-IC GPTQ takes formats grouped along the output (axis 1)")
  rows, columns = w.shape
  groups = format.num_groups(w.shape)[1]
  dead = jnp.diag(h) == 0
  h = h + jnp.diag(dead.astype(h.dtype))
  w = jnp.where(dead[:, None], 0.0, w.astype(jnp.float32))
  order = jnp.argsort(-jnp.diag(h), stable=True) if act_order else jnp.arange(rows)
  w, h = w[order], h[order][:, order]
  u = inverse_cholesky(h, damping)

  # Pad to whole blocks with rows that neither receive nor send any error.
  block = min(block_size, rows)
  padded = -rows % block
  w = jnp.pad(w, ((0, padded), (0, 0)))
  u = jnp.pad(u, ((0, padded), (0, padded)))
  u = u + jnp.diag((jnp.arange(rows + padded) >= rows).astype(u.dtype))

  def quantize_row(part, row):
    """part: the block's rows [block, out]; row: its index i and U_i's columns of the block."""
    i, u_row = row
    current = part[i][None]
    scales, zeros = rtn.range_to_scales(*rtn.min_max_range(current, format), format)
    codes = rtn.encode(current, scales, zeros, format)
    error = (current - rtn.decode(codes, scales, zeros, format))[0] / u_row[i]
    zeros = jnp.zeros(groups) if zeros is None else zeros[0]
    # U is upper triangular: the rows before i get a zero coefficient.
    return part - u_row[:, None] * error, (codes[0], scales[0], zeros, error)

  def quantize_block(w, start):
    part = jax.lax.dynamic_slice_in_dim(w, start, block)
    u_rows = jax.lax.dynamic_slice_in_dim(u, start, block)
    u_block = jax.lax.dynamic_slice_in_dim(u_rows, start, block, axis=1)
    _, (*quantized, errors) = jax.lax.scan(quantize_row, part, (jnp.arange(block), u_block))
    # The rows of this block are not read again. Accelerators would round float32 to bfloat16.
    return w - jnp.matmul(u_rows.T, errors, precision="highest"), quantized

  _, quantized = jax.lax.scan(quantize_block, w, jnp.arange(0, rows + padded, block))
  undo = lambda x: (
    jnp.zeros((rows, x.shape[-1]), x.dtype).at[order].set(x.reshape(rows + padded, -1)[:rows])
  )
  codes, scales, zeros = map(undo, quantized)
  return from_codes(codes, scales, None if format.symmetric else zeros, format)
