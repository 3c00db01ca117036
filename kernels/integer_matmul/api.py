"""Matrix products of quantized activations and weights in integers."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.integer_matmul import mosaic_tpu, xla
from kernels.partitioning import of_rows, on_parts, part, tensor_size
from kernels.platform import has_tpu

Array = jax.Array

ACTIVATION_BITS = (4, 6, 8)
# Where the kernel's program has fewer cycles than XLA's.
_MOSAIC_TPU_KINDS = ("TPU v5", "TPU v5p")
_MOSAIC_TPU_ROWS = 2048
_IMPLEMENTATIONS = {"xla": xla, "mosaic_tpu": mosaic_tpu}


def integer_matmul(
  x: Array,
  values: Array,
  scales: Array,
  *,
  activation_bits: int,
  activation_scales: Array | None = None,
  activation_zero_points: Array | None = None,
  implementation: Literal["xla", "mosaic_tpu"] | None = None,
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
    implementation: "xla" for any arguments and platform; "mosaic_tpu" quantizes x in a kernel (see
      its `unsupported`), and leaves the product to XLA. None picks mosaic_tpu for 2048 rows or more
      on each TPU v5p: of one, or of a mesh of them (`jax.set_mesh`) without a tensor axis, which
      cuts x's first dimension (`kernels/partitioning.py`).

  Returns:
    [..., out] in x's dtype. Differentiable by x, straight through the rounding: the gradient is that
    of x (s_w q_w), and 0 where a static scale clips x.

  Raises:
    ValueError: an argument has an unsupported value, shape or type, or the implementation that is
      named does not support them.
  """
  if implementation is not None and implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"implementation {implementation!r} is not supported; supported: {', '.join(_IMPLEMENTATIONS)}"
    )
  if activation_bits not in ACTIVATION_BITS:
    raise ValueError(f"activation_bits={activation_bits}; supported: {ACTIVATION_BITS}")
  if x.ndim == 0 or x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 or bfloat16 [..., in]")
  _check_weights(x, values, scales)
  if activation_zero_points is not None and activation_scales is None:
    raise ValueError("zero points need static activation_scales")
  for name, array in (("scales", activation_scales), ("zero_points", activation_zero_points)):
    if array is not None:
      token = (*x.shape[:-1], 1)
      if jnp.broadcast_shapes(jnp.shape(array), token) != token:
        raise ValueError(f"activation_{name} {jnp.shape(array)} do not broadcast to {token}")
  rows = of_rows(x)
  on_device = part(x, rows)
  problem = mosaic_tpu.unsupported(on_device, activation_scales)
  if problem and implementation == "mosaic_tpu":
    raise ValueError(f"mosaic_tpu does not support {problem}; implementation=None or 'xla' does")
  if implementation is None:
    many = math.prod(on_device.shape[:-1]) >= _MOSAIC_TPU_ROWS
    # The channels of x may be cut, and XLA then takes the largest value of the parts' largest.
    pays = many and not problem and tensor_size() == 1 and has_tpu(_MOSAIC_TPU_KINDS)
    implementation = "mosaic_tpu" if pays else "xla"
  function = functools.partial(
    _IMPLEMENTATIONS[implementation].integer_matmul, activation_bits=activation_bits
  )
  if implementation == "mosaic_tpu":
    function = on_parts(function, (rows, *(PartitionSpec(),) * 4), rows)
  return function(x, values, scales, activation_scales, activation_zero_points)


def scaled_matmul(
  codes: Array, code_scales: Array, values: Array, scales: Array, *, dtype=jnp.float32
) -> Array:
  """`integer_matmul` of activations that are symmetric codes already: s_x s_w (q_x q_w).

  Args:
    codes: q_x, int8, or int4 for the product of two int4 operands where W is int4 too; [..., in].
    code_scales: s_x, [..., 1], any float type.
    values, scales: as in `integer_matmul`.
    dtype: of the result.

  Returns:
    [..., out].

  Raises:
    ValueError: an argument has an unsupported shape or type.
  """
  if codes.ndim == 0 or codes.dtype not in (jnp.int8, jnp.int4):
    raise ValueError(f"codes are {codes.dtype} {codes.shape}, expected int8 or int4 [..., in]")
  if code_scales.shape != (*codes.shape[:-1], 1):
    raise ValueError(f"code_scales {code_scales.shape}, expected {(*codes.shape[:-1], 1)}")
  _check_weights(codes, values, scales)
  return xla.scaled_matmul(codes, code_scales, values, scales, None, dtype)


def _check_weights(x: Array, values: Array, scales: Array) -> None:
  if values.dtype not in (jnp.int8, jnp.int4) or values.ndim != 2:
    raise ValueError(f"values are {values.dtype} {values.shape}, expected int8 or int4 [in, out]")
  inputs, columns = values.shape
  if x.shape[-1] != inputs:
    raise ValueError(f"x {x.shape} and values {values.shape} do not match")
  if scales.ndim != 2 or scales.shape[1] != columns or not scales.shape[0]:
    raise ValueError(f"scales {scales.shape}, expected [groups, {columns}]")
  if inputs % scales.shape[0]:
    raise ValueError(f"{scales.shape[0]} groups do not divide {inputs} inputs")
