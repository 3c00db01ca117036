"""Matrix product of quantized activations and weights in integers: the one public function."""

import jax
import jax.numpy as jnp

from kernels.integer_matmul import xla

Array = jax.Array

ACTIVATION_BITS = (4, 6, 8)


def integer_matmul(
  x: Array,
  values: Array,
  scales: Array,
  *,
  activation_bits: int,
  activation_scales: Array | None = None,
  activation_zero_points: Array | None = None,
) -> Array:
  """Quantizes x, multiplies integers, and scales the int32 sums: W8A8, W6A6, W4A8, W4A4.

    x ~ s_x (q_x - z_x),   W = s_w q_w,   x W ~ s_x s_w (q_x q_w - z_x sum_in q_w)

  XLA gives the products to the integer matrix units of chips that have them: two int4 operands
  where both are 4-bit, int8 otherwise.

  Args:
    x: [..., in], float32 or bfloat16.
    values: symmetric codes of W, int8 or int4, [in, out]; 6-bit codes are int8.
    scales: [in / group, out], any float type: one row for a scale per output channel, more for
      groups of inputs, whose sums are scaled apart.
    activation_bits: 4, 6 or 8.
    activation_scales: static scales of x, [] or broadcastable to [..., 1]; None takes each token's
      own, max |x| / (2^(bits-1) - 1) ("dynamic per token").
    activation_zero_points: integers shaped like `activation_scales`; codes are then unsigned, 0 to
      2^bits - 1. None for symmetric codes, -2^(bits-1) to 2^(bits-1) - 1.

  Returns:
    [..., out] in x's dtype. Differentiable by x, straight through the rounding: the gradient is that
    of x (s_w q_w), and 0 where a static scale clips x.

  Raises:
    ValueError: an argument has an unsupported value, shape or type.
  """
  if activation_bits not in ACTIVATION_BITS:
    raise ValueError(f"activation_bits={activation_bits}; supported: {ACTIVATION_BITS}")
  if x.ndim == 0 or x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 or bfloat16 [..., in]")
  if values.dtype not in (jnp.int8, jnp.int4) or values.ndim != 2:
    raise ValueError(f"values are {values.dtype} {values.shape}, expected int8 or int4 [in, out]")
  inputs, columns = values.shape
  if x.shape[-1] != inputs:
    raise ValueError(f"x {x.shape} and values {values.shape} do not match")
  if scales.ndim != 2 or scales.shape[1] != columns or not scales.shape[0]:
    raise ValueError(f"scales {scales.shape}, expected [groups, {columns}]")
  if inputs % scales.shape[0]:
    raise ValueError(f"{scales.shape[0]} groups do not divide {inputs} inputs")
  if activation_zero_points is not None and activation_scales is None:
    raise ValueError("zero points need static activation_scales")
  for name, array in (("scales", activation_scales), ("zero_points", activation_zero_points)):
    if array is not None:
      token = (*x.shape[:-1], 1)
      if jnp.broadcast_shapes(jnp.shape(array), token) != token:
        raise ValueError(f"activation_{name} {jnp.shape(array)} do not broadcast to {token}")
  return xla.integer_matmul(
    x, values, scales, activation_scales, activation_zero_points, activation_bits
  )
