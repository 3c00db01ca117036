"""Linear layers with few-bit floating-point weights and activations."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from common.quantization import float_format
from common.quantization.float_format import FloatFormat
from kernels.float_matmul.api import float_matmul
from projects.llm_fp4.llm_fp4 import FPQSettings, LinearSearch, quantize, quantized_kernel

Array = jax.Array


class FPQLinear(nnx.Module):
  """Q(x) Q(W) + bias in floating point: a layer as the search sees it.

  The activations' format is a variable, so that models that differ in it share a compilation.
  """

  def __init__(self, linear: nnx.Linear, search: LinearSearch, settings: FPQSettings):
    kernel = linear.kernel[...]
    self.kernel = nnx.Param(_kernel(kernel, search, settings).astype(kernel.dtype))
    self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])
    self.formats = settings.activation_formats
    self.activation_format = nnx.Param(search.activation_format)
    self.activation_bias = nnx.Param(search.activation_bias)

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    rounded = quantize(x, self.formats, self.activation_format[...], self.activation_bias[...])
    y = jnp.matmul(rounded.astype(x.dtype), self.kernel[...])
    return y if self.bias is None else y + self.bias[...]


class FoldedLinear(nnx.Module):
  """The same layer as it is stored: pre-shifted activations of one bias, folded weights in codes.

  x 2^o is encoded with the one bias rho. The weights are codes, with a bias for each output channel
  and the power 2^-o_j for each input channel; with `fold="requantize"` the codes hold it already.
  """

  def __init__(
    self,
    values: Array,
    weight_bias: Array,
    offsets: Array,
    tensor_bias: Array,
    bias: Array | None,
    *,
    weight_format: FloatFormat,
    activation_format: FloatFormat,
    shift_weights: bool = True,
  ):
    """Args: codes [in, out], biases [out], o [in], rho [], the layer's bias [out] or None."""
    self.values = nnx.Param(values)
    self.weight_bias = nnx.Param(weight_bias)
    self.offsets = nnx.Param(offsets.astype(jnp.uint8))
    self.tensor_bias = nnx.Param(tensor_bias)
    self.bias = None if bias is None else nnx.Param(bias)
    self.weight_format, self.activation_format = weight_format, activation_format
    self.shift_weights = shift_weights

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    codes = self.encode_input(x)
    rounded = float_format.decode(codes, self.activation_format, self.tensor_bias[...])
    scales = jnp.exp2(-self.weight_bias[...])[None]
    if self.shift_weights:
      scales = jnp.ldexp(scales, -self.offsets[...].astype(jnp.int32)[:, None])
    y = float_matmul(
      rounded.astype(x.dtype),
      self.values[...],
      scales,
      exponent_bits=self.weight_format.exponent_bits,
      mantissa_bits=self.weight_format.mantissa_bits,
    )
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)

  def encode_input(self, x: Array) -> Array:
    """Codes of the pre-shifted activations, [..., in]."""
    shifted = jnp.ldexp(x.astype(jnp.float32), self.offsets[...].astype(jnp.int32))
    return float_format.encode(shifted, self.activation_format, self.tensor_bias[...])


def fold(linear: nnx.Linear, search: LinearSearch, settings: FPQSettings) -> FoldedLinear:
  """Packs a full-precision linear by what was found for it; the same layer as `FPQLinear`."""
  weight_format = settings.weight_formats[int(search.weight_format)]
  w = linear.kernel[...].astype(jnp.float32)
  if settings.fold == "requantize":
    w = jnp.ldexp(w, -search.offsets[:, None])
  return FoldedLinear(
    _encode(w, weight_format, search.weight_bias),
    search.weight_bias,
    search.offsets,
    search.tensor_bias,
    None if linear.bias is None else linear.bias[...],
    weight_format=weight_format,
    activation_format=settings.activation_formats[int(search.activation_format)],
    shift_weights=settings.fold == "exact",
  )


_kernel = functools.partial(jax.jit, static_argnums=2)(quantized_kernel)
_encode = functools.partial(jax.jit, static_argnums=1)(float_format.encode)
