"""Transforms of activations at inference, and the quantizers behind them (FlatQuant).

Sun et al., "FlatQuant: Flatness Matters for LLM Quantization" (ICML 2025, arXiv 2410.09426).
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.surgery import get_module, replace_module
from common.quantization.activations import (
  ActivationFormat,
  fake_quantize,
  min_max_range,
  no_integer_product,
  range_to_scale,
)
from common.quantization.linear import QuantizedLinear
from kernels.attention.api import attention
from kernels.integer_matmul.api import integer_matmul, scaled_matmul
from kernels.kronecker_quantize.api import kronecker_quantize, kronecker_transform

Array = jax.Array


class OnlineTransform(nnx.Module):
  """x -> x (P1 (x) P2)."""

  def __init__(self, left: Array, right: Array):
    """P1 [n1, n1] and P2 [n2, n2]."""
    self.left, self.right = nnx.Param(left), nnx.Param(right)

  def __call__(self, x: Array) -> Array:
    """[..., n1 n2] -> [..., n1 n2]."""
    return kronecker_transform(x, self.left[...], self.right[...])


class TransformedNorm(nnx.Module):
  """A norm and the transform of what its readers share: P_a or P_ug."""

  def __init__(self, norm: nnx.Module, transform: OnlineTransform):
    self.norm = norm
    self.transform = transform

  def __call__(self, x: Array) -> Array:
    """[..., dim] -> [..., dim]."""
    return self.transform(self.norm(x))


class TransformedMLP(nnx.Module):
  """A gated MLP with P_d before its last linear."""

  def __init__(
    self,
    gate_proj: nnx.Module,
    up_proj: nnx.Module,
    down_proj: nnx.Module,
    activation: Callable[[Array], Array],
    transform: OnlineTransform | None,
  ):
    self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
    self.activation = activation
    self.transform = transform

  def __call__(self, x: Array) -> Array:
    """x: [batch, seq, dim] -> [batch, seq, dim]."""
    hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(hidden if self.transform is None else self.transform(hidden))


class TransformedAttention(nnx.Module):
  """Takes the place of `attend`: P_h on keys and queries, rounding, P_o over the heads.

  The rotated keys k and queries q become k P_h and q P_h^-T, which leaves their products alone.
  Values come out of v_proj with P_v in them. A cache holds keys and values untransformed and
  unrounded, and both are done whenever it is read.

  Args:
    key_transform: (P_h, P_h^-T), [head_dim, head_dim] each, or stacked; or None.
    head_transform: P_o, [heads, heads], or None.
    formats: {operand: format} of those of "query", "key" and "value" that are rounded, per token
      and head; or the pairs.
    clips: their clipping factors {operand: [2]}.
  """

  def __init__(
    self,
    key_transform: tuple[Array, Array] | Array | None,
    head_transform: Array | None,
    formats: Mapping[str, ActivationFormat] | Iterable[tuple[str, ActivationFormat]],
    clips: Mapping[str, Array],
  ):
    self.key_transform = None if key_transform is None else nnx.Param(jnp.stack(key_transform))
    self.head_transform = None if head_transform is None else nnx.Param(head_transform)
    self.formats = tuple(dict(formats).items())
    self.clips = nnx.data({operand: nnx.Param(clips[operand]) for operand, _ in self.formats})

  def __call__(self, query: Array, key: Array, value: Array, **options) -> Array:
    """As `kernels.attention.api.attention`."""
    operands = {"query": query, "key": key, "value": value}
    if self.key_transform is not None:
      of_key, of_query = self.key_transform[...].astype(key.dtype)
      operands["key"] = jnp.matmul(key, of_key, precision=_precision(key))
      operands["query"] = jnp.matmul(query, of_query, precision=_precision(key))
    for operand, format in self.formats:
      operands[operand] = clipped_fake_quantize(operands[operand], format, self.clips[operand][...])
    out = attention(operands["query"], operands["key"], operands["value"], **options)
    if self.head_transform is None:
      return out
    matrix = self.head_transform[...].astype(out.dtype)
    return jnp.einsum("bhsd,hg->bgsd", out, matrix, precision=_precision(out))


class ClippedInput(nnx.Module):
  """A linear whose input is rounded first, in a range that its two factors shrink."""

  def __init__(self, layer: Callable[[Array], Array], format: ActivationFormat, clip: Array):
    """`clip`: of the smallest and of the largest value of each token, [2]."""
    self.layer = layer
    self.format = format
    self.clip = nnx.Param(clip)

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out]."""
    return self.layer(clipped_fake_quantize(x, self.format, self.clip[...]))


class TransformedIntegerLinear(nnx.Module):
  """A packed `ClippedInput` in integers: x P is rounded to codes in one kernel where there is one.

  Its values are those of `ClippedInput` behind `transform`, but for sums in another order, and for a
  code where a value lies at the middle of two.
  """

  def __init__(self, clipped: ClippedInput, transform: OnlineTransform | None):
    """transform: P, shared by the linears that read it; None where x comes transformed."""
    self.layer = clipped.layer
    self.transform = transform
    self.format = clipped.format
    self.clip = clipped.clip

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out] in x's dtype."""
    weight, clip, bits = self.layer.weight.get_value(), self.clip[...], self.format.bits
    scales = jnp.broadcast_to(weight.scales, (weight.scales.shape[0], weight.shape[1]))
    if self.transform is None:
      low, high = min_max_range(x, self.format)
      scale, _ = range_to_scale(low * clip[0], high * clip[1], self.format)
      scale = scale[..., 0]  # Of the one group, [..., 1, 1].
      y = integer_matmul(x, weight.values, scales, activation_bits=bits, activation_scales=scale)
    else:
      factors = self.transform.left[...], self.transform.right[...]
      codes, scale = kronecker_quantize(x, *factors, clip, bits=bits)
      codes = codes.astype(jnp.int4) if bits == 4 else codes
      y = scaled_matmul(codes, scale, weight.values, scales, dtype=x.dtype)
    bias = self.layer.bias
    return y if bias is None else y + bias[...].astype(y.dtype)


def integer_transformed_linears(block: nnx.Module) -> None:
  """Turns the packed linears of a finished block into integer products, in place.

  A transform goes from the norm, or from the MLP, into the linears that read it, each of which has a
  clip of its own. (Where no kernel joins it to the rounding, XLA computes it once for all.) Linears
  that have no integer product (`activations.no_integer_product`) stay as they are.

  Args:
    block: with a `ClippedInput` around each of its linears.
  """
  paths = [
    ".".join(map(str, path))
    for path, layer in nnx.iter_modules(block)
    if isinstance(layer, ClippedInput)
    and isinstance(layer.layer, QuantizedLinear)
    and not no_integer_product(layer.layer.weight.get_value(), layer.format)
  ]
  transforms = {}
  for norm, readers in (
    ("attention_norm", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("mlp_norm", ("mlp.gate_proj", "mlp.up_proj")),
  ):
    transformed = getattr(block, norm)
    if isinstance(transformed, TransformedNorm) and set(readers) <= set(paths):
      transforms |= dict.fromkeys(readers, transformed.transform)
      setattr(block, norm, transformed.norm)
  if isinstance(block.mlp, TransformedMLP) and "mlp.down_proj" in paths:
    transforms["mlp.down_proj"] = block.mlp.transform
    block.mlp.transform = None
  for path in paths:
    layer = TransformedIntegerLinear(get_module(block, path), transforms.get(path))
    replace_module(block, path, layer)


def clipped_fake_quantize(x: Array, format: ActivationFormat, clip: Array) -> Array:
  """x rounded in the range (clip[0] min, clip[1] max) of every token, in x's dtype and shape.

  Gradients pass the rounding and reach `clip` through the scale.

  Args:
    x: [..., channels].
    format: per token.
    clip: [2], in (0, 1].
  """
  low, high = min_max_range(x, format)
  return fake_quantize(x, format, low=low * clip[0], high=high * clip[1])


def _precision(x: Array) -> str | None:
  """Accelerators would round float32 operands to bfloat16."""
  return "highest" if x.dtype == jnp.float32 else None
