"""Linear layers in few-bit floating point."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.quantization import float_format
from common.quantization.float_format import FloatFormat
from kernels.float_matmul.api import float_matmul

Array = jax.Array


class FloatLinear(nnx.Module):
  """x @ W + bias with weights and activations in few-bit floating point, stored as codes.

  Activations are pre-shifted (LLM-FP4, section 4.2): x 2^o is encoded with the one bias rho. The
  weights are codes, with a bias for each output channel and the power 2^-o_j for each input channel,
  which with `shift_weights=False` the codes hold already.
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
