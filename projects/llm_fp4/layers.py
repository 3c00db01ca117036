"""Linear layers and attention with few-bit floating-point weights and activations."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from common.quantization import float_format
from common.quantization.attention import OPERANDS, attention_operands
from common.quantization.float_linear import FloatLinear
from projects.llm_fp4.llm_fp4 import (
  FPQSettings,
  LinearSearch,
  format_bits,
  quantize_to,
  quantized_kernel,
)
from projects.llm_fp4.products import AttentionSearch

Array = jax.Array


class FPQLinear(nnx.Module):
  """Q(x) Q(W) + bias in floating point: a layer as the search sees it.

  The activations' format is a variable, so that models that differ in it, or in the formats that
  they chose from, share a compilation.
  """

  def __init__(self, linear: nnx.Linear, search: LinearSearch, settings: FPQSettings):
    kernel = linear.kernel[...]
    bits = _format_bits(settings.weight_formats, search.weight_format)
    rounded = _kernel(kernel, bits, search.weight_bias, search.offsets, settings.fold)
    self.kernel = nnx.Param(rounded.astype(kernel.dtype))
    self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])
    bits = _format_bits(settings.activation_formats, search.activation_format)
    self.activation_format = nnx.Param(bits)
    self.activation_bias = nnx.Param(search.activation_bias)

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    rounded = quantize_to(x, self.activation_format[...], self.activation_bias[...])
    y = jnp.matmul(rounded.astype(x.dtype), self.kernel[...])
    return y if self.bias is None else y + self.bias[...]


class FPQAttention(nnx.Module):
  """Q(Q) Q(K)^T and Q(P) Q(V) in floating point; takes the place of `attend` in `Attention`."""

  def __init__(self, search: AttentionSearch, settings: FPQSettings):
    self.formats = nnx.Param(_format_bits(settings.activation_formats, search.formats))
    self.biases = nnx.Param(search.biases)

  def __call__(self, query: Array, key: Array, value: Array, **options) -> Array:
    """As `kernels.attention.api.attention`, with as many heads of keys as of queries."""
    query, key, value = map(self._round, ("query", "key", "value"), (query, key, value))
    probabilities = attention_operands(query, key, value, **options)["probabilities"]
    probabilities = self._round("probabilities", probabilities)
    precision = "highest" if value.dtype == jnp.float32 else None
    return jnp.matmul(probabilities, value, precision=precision)

  def _round(self, operand: str, x: Array) -> Array:
    i = OPERANDS.index(operand)
    return quantize_to(x, self.formats[...][i], self.biases[...][i]).astype(x.dtype)


def fold(linear: nnx.Linear, search: LinearSearch, settings: FPQSettings) -> FloatLinear:
  """Packs a full-precision linear by what was found for it; the same function as `FPQLinear`."""
  weight_format = settings.weight_formats[int(search.weight_format)]
  w = linear.kernel[...].astype(jnp.float32)
  if settings.fold == "requantize":
    w = jnp.ldexp(w, -search.offsets[:, None])
  return FloatLinear(
    _encode(w, weight_format, search.weight_bias),
    search.weight_bias,
    search.offsets,
    search.tensor_bias,
    None if linear.bias is None else linear.bias[...],
    weight_format=weight_format,
    activation_format=settings.activation_formats[int(search.activation_format)],
    shift_weights=settings.fold == "exact",
  )


_kernel = functools.partial(jax.jit, static_argnums=4)(quantized_kernel)
_format_bits = functools.partial(jax.jit, static_argnums=0)(format_bits)
_encode = functools.partial(jax.jit, static_argnums=1)(float_format.encode)
