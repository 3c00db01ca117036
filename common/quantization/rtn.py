"""Round-to-nearest (RTN) quantization with min-max ranges.

The asymmetric quantizer is the one of the AWQ reference code: the range is that of the group's
weights and need not contain 0, and the zero point is clamped to the code range. A group whose
weights are all positive therefore saturates; this is the published behaviour, kept on purpose.
"""

import math

import jax
import jax.numpy as jnp

from common.quantization.quantized_array import IntegerFormat, QuantizedArray, from_codes

Array = jax.Array


def group(w: Array, format: IntegerFormat) -> Array:
  """[in, out] -> [groups_in, in / groups_in, groups_out, out / groups_out]."""
  rows, columns = format.num_groups(w.shape)
  return w.reshape(rows, w.shape[0] // rows, columns, w.shape[1] // columns)


def min_max_range(
  w: Array, format: IntegerFormat, *, include_zero: bool = False
) -> tuple[Array, Array]:
  """Smallest and largest weight per group, [groups_in, groups_out].

  Args:
    w: [in, out].
    format: the integer format.
    include_zero: widen the ranges so that they contain 0, which is then exact.
  """
  grouped = group(w, format)
  low, high = grouped.min(axis=(1, 3)), grouped.max(axis=(1, 3))
  return (jnp.minimum(low, 0), jnp.maximum(high, 0)) if include_zero else (low, high)


def spread(per_group: Array, shape: tuple[int, ...]) -> Array:
  """One value per weight from one per group, in the kernel's shape.

  Args:
    per_group: [groups_in, groups_out].
    shape: of the kernel, [..., in, out]; the axes before the last are one input axis here.
  """
  rows, columns = math.prod(shape[:-1]), shape[-1]
  groups = per_group.shape
  grouped = (groups[0], rows // groups[0], groups[1], columns // groups[1])
  return jnp.broadcast_to(per_group[:, None, :, None], grouped).reshape(shape)


def range_to_scales(low: Array, high: Array, format: IntegerFormat) -> tuple[Array, Array | None]:
  """Scales (in `format.scale_dtype`) and zero points (integers as float32; None if symmetric).

  Asymmetric: scale = max(high - low, 1e-5) / (2^bits - 1), zero = clip(-round(low / scale)).
  Symmetric: scale = max(|low|, |high|, 1e-5) / (2^(bits - 1) - 1).

  Args:
    low, high: ends of the range that the codes cover, [groups_in, groups_out].
    format: the integer format.
  """
  smallest, largest = format.code_range
  if format.symmetric:
    magnitude = jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)), 1e-5)
    return (magnitude / max(largest, 1)).astype(format.scale_dtype), None
  # In a range clipped on both sides low / scale is always a tie, so the quotients must be the true
  # ones: XLA would rewrite x / c as x * (1 / c) (see `encode`) and a / (b / c) as (a * c) / b.
  levels = largest + 0 * high
  scales = (jnp.maximum(high - low, 1e-5) / levels).astype(format.scale_dtype)
  scales = jax.lax.optimization_barrier(scales)
  zero_points = -jnp.round(low / scales.astype(jnp.float32))
  return scales, jnp.clip(zero_points, smallest, largest)


def encode(w: Array, scales: Array, zero_points: Array | None, format: IntegerFormat) -> Array:
  """clip(round(w / scale) + zero_point), integer-valued float32 [in, out]."""
  grouped = group(w, format)
  # XLA turns a division by a broadcast array into a product with its rounded reciprocal, which
  # moves ties; the term 0 * w keeps the true quotient (and costs nothing: it is fused).
  codes = jnp.round(grouped / (_spread(scales) + 0 * grouped))
  if zero_points is not None:
    codes = codes + _spread(zero_points)
  return jnp.clip(codes, *format.code_range).reshape(w.shape)


def decode(codes: Array, scales: Array, zero_points: Array | None, format: IntegerFormat) -> Array:
  """(code - zero_point) * scale, float32 [in, out]."""
  grouped = group(codes, format)
  if zero_points is not None:
    grouped = grouped - _spread(zero_points)
  return (grouped * _spread(scales)).reshape(codes.shape)


def quantize(w: Array, format: IntegerFormat) -> QuantizedArray:
  """Quantizes weights [in, out] by rounding to nearest.

  Raises:
    UserError: the group size does not divide the grouped dimension.
  """
  w = w.astype(jnp.float32)
  scales, zero_points = range_to_scales(*min_max_range(w, format), format)
  return from_codes(encode(w, scales, zero_points, format), scales, zero_points, format)


def fake_quantize(w: Array, format: IntegerFormat) -> Array:
  """quantize(w).dequantize() without packing, float32 [in, out]."""
  w = w.astype(jnp.float32)
  scales, zero_points = range_to_scales(*min_max_range(w, format), format)
  codes = encode(w, scales, zero_points, format)
  return decode(codes, scales, zero_points, format)


def _spread(per_group: Array) -> Array:
  return per_group.astype(jnp.float32)[:, None, :, None]
