"""Uniform quantization of activations: per token as they come, or in a range from calibration.

`fake_quantize` rounds values and keeps them in floating point, with straight-through gradients: what
calibration, training and the evaluation of a method need. `integer_linears` turns the layers of a
finished model into integer products.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.surgery import get_module, replace_module
from common.quantization.linear import QuantizedLinear
from common.quantization.quantized_array import QuantizedArray
from common.quantization.straight_through import round_ste
from kernels.integer_matmul.api import ACTIVATION_BITS, integer_matmul

Array = jax.Array

# A range below this is taken for it: a token of zeros stays zero.
SMALLEST_RANGE = 1e-7


@dataclasses.dataclass(frozen=True)
class ActivationFormat:
  """A uniform integer format for activations [..., channels].

  Attributes:
    bits: of a code, 2 to 8.
    granularity: "per_token", a scale for every token from its own values ("dynamic"), or
      "per_tensor", one scale for all from calibration ("static").
    group_size: channels of a token that share a scale; -1 for all of them.
    symmetric: codes are signed and have no zero point.
    include_zero: widen an asymmetric range so that it contains 0, which is then exact.

  Raises:
    UserError: a value is outside the supported set.
  """

  bits: int
  granularity: Literal["per_token", "per_tensor"] = "per_token"
  group_size: int = -1
  symmetric: bool = False
  include_zero: bool = True

  def __post_init__(self):
    if not 2 <= self.bits <= 8:
      raise UserError(f"activations of {self.bits} bits are not supported; supported: 2 to 8")
    if self.granularity not in ("per_token", "per_tensor"):
      raise UserError(f"granularity={self.granularity!r}; supported: per_token, per_tensor")
    if self.granularity == "per_tensor" and self.group_size != -1:
      raise UserError("groups of channels are for per_token scales")

  @property
  def code_range(self) -> tuple[int, int]:
    """Smallest and largest code."""
    half = 2 ** (self.bits - 1)
    return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)


def min_max_range(x: Array, format: ActivationFormat) -> tuple[Array, Array]:
  """Smallest and largest value that share a scale: [..., groups, 1] per token, else [].

  Args:
    x: [..., channels].
    format: the integer format.
  """
  if format.granularity == "per_tensor":
    return x.min(), x.max()
  grouped = _group(x, format)
  return grouped.min(axis=-1, keepdims=True), grouped.max(axis=-1, keepdims=True)


def range_to_scale(low: Array, high: Array, format: ActivationFormat) -> tuple[Array, Array]:
  """Scale and zero point of a range, float32.

  Asymmetric: scale = (high - low) / (2^bits - 1), zero = round(-low / scale); symmetric: scale =
  max(|low|, |high|) / (2^(bits - 1) - 1), zero = 0.

  Args:
    low, high: any shape.
    format: the integer format.
  """
  low, high = low.astype(jnp.float32), high.astype(jnp.float32)
  if format.symmetric:
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    scale = jnp.maximum(largest, SMALLEST_RANGE) / format.code_range[1]
    return scale, jnp.zeros_like(scale)
  if format.include_zero:
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  scale = jnp.maximum(high - low, SMALLEST_RANGE) / format.code_range[1]
  return scale, round_ste(-low / scale)


def fake_quantize(
  x: Array,
  format: ActivationFormat,
  *,
  low: Array | None = None,
  high: Array | None = None,
) -> Array:
  """scale (clip(round(x / scale) + zero, codes) - zero), in x's dtype and shape.

  Gradients pass the rounding; they stop where x is clipped, and reach the range.

  Args:
    x: [..., channels].
    format: the integer format.
    low, high: the range, broadcastable to `min_max_range`'s; by default that of x itself.

  Raises:
    UserError: the group size does not divide the channels.
  """
  if low is None or high is None:
    low, high = min_max_range(x, format)
  scale, zero = range_to_scale(low, high, format)
  grouped = _group(x, format).astype(jnp.float32)
  scale, zero = (jnp.broadcast_to(v, grouped.shape) for v in (scale, zero))
  rounded = _round_to_codes(grouped, scale, zero, format.code_range)
  return rounded.reshape(x.shape).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _round_to_codes(x: Array, scale: Array, zero: Array, code_range: tuple[int, int]) -> Array:
  """scale (clip(round(x / scale) + zero, codes) - zero), all of one shape; see `fake_quantize`."""
  return (jnp.clip(jnp.round(x / scale) + zero, *code_range) - zero) * scale


def _round_to_codes_forward(x, scale, zero, code_range):
  return _round_to_codes(x, scale, zero, code_range), (x, scale, zero)


def _round_to_codes_backward(code_range, arrays, dy):
  # What JAX derives from `straight_through` keeps every intermediate array: ten times the time.
  x, scale, zero = arrays
  quotient = x / scale
  rounded = jnp.round(quotient) + zero
  codes = jnp.clip(rounded, *code_range)
  inside = rounded == codes
  d_scale = dy * (codes - zero - jnp.where(inside, quotient, 0))
  return jnp.where(inside, dy, 0), d_scale, jnp.where(inside, 0, -dy * scale)


_round_to_codes.defvjp(_round_to_codes_forward, _round_to_codes_backward)


@functools.partial(jax.jit, static_argnames=("format", "observer", "percentile", "steps"))
def static_range(
  batches: Array,
  format: ActivationFormat,
  observer: Literal["min_max", "average_min_max", "percentile", "mse"] = "min_max",
  *,
  percentile: float = 99.99,
  steps: int = 100,
) -> tuple[Array, Array]:
  """The range of a per-tensor format from calibration activations, float32 [] and [].

  Args:
    batches: [batches, ..., channels].
    format: the integer format.
    observer: "min_max" over all values; "average_min_max", the mean over batches of each one's
      range; "percentile", that of the values at both ends; "mse", the share 1/steps, 2/steps, ...,
      1 of the whole range with the least squared error.
    percentile: of observer "percentile", in percent.
    steps: of observer "mse".

  Raises:
    UserError: the observer is unknown.
  """
  batches = batches.astype(jnp.float32)
  low, high = batches.min(), batches.max()
  if observer == "average_min_max":
    flat = batches.reshape(batches.shape[0], -1)
    return flat.min(axis=1).mean(), flat.max(axis=1).mean()
  if observer == "percentile":
    ends = jnp.percentile(batches, jnp.array([100 - percentile, percentile]))
    return ends[0], ends[1]
  if observer == "mse":

    def loss(share):
      rounded = fake_quantize(batches, format, low=low * share, high=high * share)
      return jnp.mean((rounded - batches) ** 2)

    shares = jnp.arange(1, steps + 1) / steps
    best = shares[jnp.argmin(jax.lax.map(loss, shares))]
    return low * best, high * best
  if observer != "min_max":
    raise UserError(f"observer={observer!r}; supported: min_max, average_min_max, percentile, mse")
  return low, high


class QuantizedInput(nnx.Module):
  """A layer whose input is rounded first, in floating point."""

  def __init__(
    self,
    layer: nnx.Module,
    format: ActivationFormat,
    low: Array | None = None,
    high: Array | None = None,
  ):
    self.layer = layer
    self.format = format
    self.low = None if low is None else nnx.Param(low)
    self.high = None if high is None else nnx.Param(high)

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    low, high = (None if v is None else v[...] for v in (self.low, self.high))
    return self.layer(fake_quantize(x, self.format, low=low, high=high))


class IntegerLinear(nnx.Module):
  """x @ W + bias in integers: x is rounded per token, or in a static range, and W is packed."""

  def __init__(
    self,
    weight: QuantizedArray,
    format: ActivationFormat,
    bias: Array | None = None,
    scale: Array | None = None,
    zero_point: Array | None = None,
  ):
    scales = jnp.broadcast_to(weight.scales, (weight.scales.shape[0], weight.shape[1]))
    self.values, self.scales = nnx.Param(weight.values), nnx.Param(scales)
    self.bits = format.bits
    self.bias = None if bias is None else nnx.Param(bias)
    self.scale = None if scale is None else nnx.Param(scale)
    self.zero_point = None if zero_point is None else nnx.Param(zero_point)

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out] in x's dtype."""
    y = integer_matmul(
      x,
      self.values[...],
      self.scales[...],
      activation_bits=self.bits,
      activation_scales=None if self.scale is None else self.scale[...],
      activation_zero_points=None if self.zero_point is None else self.zero_point[...],
    )
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def quantize_inputs(
  module: nnx.Module,
  paths: list[str],
  format: ActivationFormat,
  ranges: Mapping[str, tuple[Array, Array]] | None = None,
) -> None:
  """Rounds the inputs of the layers at `paths`, in place.

  The last step of a method: the layers are then below a `QuantizedInput`, no longer at `paths`.

  Args:
    module: a block or model.
    paths: its layers, packed or not.
    format: the integer format.
    ranges: {path: (low, high)} of a per-tensor format, see `static_range`.
  """
  for path in paths:
    low, high = (None, None) if ranges is None else ranges[path]
    layer = QuantizedInput(get_module(module, path), format, low, high)
    replace_module(module, path, layer)


def integer_linears(module: nnx.Module) -> None:
  """Turns packed layers with a rounded input into `IntegerLinear`s, in place.

  Those that have no integer product (`no_integer_product`) stay as they are.
  """
  found = [
    (".".join(map(str, path)), layer)
    for path, layer in nnx.iter_modules(module)
    if isinstance(layer, QuantizedInput)
    and isinstance(layer.layer, QuantizedLinear)
    and not no_integer_product(layer.layer.weight.get_value(), layer.format)
  ]
  for path, layer in found:
    weight, format = layer.layer.weight.get_value(), layer.format
    scale = zero = None
    if format.granularity == "per_tensor":
      scale, zero = range_to_scale(layer.low[...], layer.high[...], format)
      zero = None if format.symmetric else zero.astype(jnp.int32)
    bias = layer.layer.bias
    bias = None if bias is None else bias[...]
    replace_module(module, path, IntegerLinear(weight, format, bias, scale, zero))


def no_integer_product(weight: QuantizedArray, format: ActivationFormat) -> str | None:
  """Why `kernels/integer_matmul` cannot multiply these formats; None if it can."""
  if not weight.format.symmetric or weight.format.axis == 1 or weight.format.bits not in (4, 6, 8):
    return f"weights are {weight.format}; symmetric ones of 4, 6 or 8 bits, not grouped by output"
  if format.bits not in ACTIVATION_BITS:
    return f"activations have {format.bits} bits; supported: {ACTIVATION_BITS}"
  if format.group_size != -1:
    return "activations are quantized in groups"
  if format.granularity == "per_token" and not format.symmetric:
    return "activations are asymmetric per token; symmetric ones are supported"
  return None


def _group(x: Array, format: ActivationFormat) -> Array:
  """[..., channels] -> [..., groups, group]; as it is for a per-tensor format."""
  if format.granularity == "per_tensor":
    return x
  size = x.shape[-1] if format.group_size == -1 else format.group_size
  if x.shape[-1] % size:
    raise UserError(f"group_size={size} does not divide {x.shape[-1]} channels of activations")
  return x.reshape(*x.shape[:-1], -1, size)
