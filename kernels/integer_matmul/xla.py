"""Integer products through XLA, which uses the integer matrix units where there are any."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def quantize_activations(
  x: Array, scales: Array | None, zero_points: Array | None, bits: int
) -> tuple[Array, Array]:
  """int8 codes [..., in] and scales, so that x ~ scales * (codes - zero).

  Unsigned codes of 8 bits do not fit into int8: with zero points 2^(bits-1) is taken off the codes,
  and off the zero points, see `_signed`.
  """
  x = x.astype(jnp.float32)
  if scales is None:
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # A token of zeros has codes of 0 with any scale.
    scales = jnp.where(largest == 0, 1, largest) / (2 ** (bits - 1) - 1)
  zero = 0 if zero_points is None else _signed(zero_points, bits)
  codes = jnp.round(x / scales) + zero
  codes = jnp.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
  return codes.astype(jnp.int8), scales


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def integer_matmul(
  x: Array,
  values: Array,
  scales: Array,
  activation_scales: Array | None,
  activation_zero_points: Array | None,
  activation_bits: int,
  quantize: Callable[..., tuple[Array, Array]] = quantize_activations,
) -> Array:
  """As `api.integer_matmul`; quantize: as `quantize_activations`."""
  codes, x_scales = quantize(x, activation_scales, activation_zero_points, activation_bits)
  if activation_bits == 4 and values.dtype == jnp.int4:
    codes = codes.astype(jnp.int4)
  zero = (
    None if activation_zero_points is None else _signed(activation_zero_points, activation_bits)
  )
  return scaled_matmul(codes, x_scales, values, scales, zero, x.dtype)


def scaled_matmul(
  codes: Array, code_scales: Array, values: Array, scales: Array, zero: Array | None, dtype
) -> Array:
  """As `api.scaled_matmul`; zero: the code of the value 0 of each token, int32, or None for 0."""
  both_narrow = codes.dtype == values.dtype == jnp.int4
  operand = jnp.int4 if both_narrow else jnp.int8
  codes, w = codes.astype(operand), values.astype(operand)
  groups = scales.shape[0]
  if groups == 1 and operand == jnp.int8:
    # Not a batch of one product, for which TPUs copy the operands. (Of int4 XLA's CPU backend does
    # not compile a plain product.)
    sums = jnp.dot(codes, w, preferred_element_type=jnp.int32)[..., None, :]
  else:
    by_group = codes.reshape(*codes.shape[:-1], groups, -1)
    weights = w.reshape(groups, -1, w.shape[1])
    sums = jnp.einsum("...gi,gio->...go", by_group, weights, preferred_element_type=jnp.int32)
  if zero is not None:
    of_groups = w.reshape(groups, -1, w.shape[1])
    sums = sums - zero[..., None] * jnp.sum(of_groups, axis=1, dtype=jnp.int32)
  y = jnp.sum(sums.astype(jnp.float32) * scales.astype(jnp.float32), axis=-2)
  return (y * code_scales).astype(dtype)


def _forward(
  x, values, scales, activation_scales, activation_zero_points, activation_bits, quantize
):
  arrays = (x, values, scales, activation_scales, activation_zero_points)
  return integer_matmul(*arrays, activation_bits, quantize), arrays


def _backward(activation_bits, quantize, arrays, dy):
  x, values, scales, activation_scales, zero_points = arrays
  weights = values.astype(jnp.float32).reshape(scales.shape[0], -1, scales.shape[1])
  weights = (weights * scales.astype(jnp.float32)[:, None]).reshape(values.shape)
  dx = jnp.matmul(dy.astype(jnp.float32), weights.T)
  if activation_scales is not None:
    zero = 0 if zero_points is None else _signed(zero_points, activation_bits)
    codes = jnp.round(x.astype(jnp.float32) / activation_scales) + zero
    half = 2 ** (activation_bits - 1)
    dx = jnp.where((codes >= -half) & (codes < half), dx, 0)
  return dx.astype(x.dtype), None, None, None, None


integer_matmul.defvjp(_forward, _backward)


def _signed(zero_points: Array, bits: int) -> Array:
  return jnp.asarray(zero_points).astype(jnp.int32) - 2 ** (bits - 1)
