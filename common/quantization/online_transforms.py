"""Transforms of activations at inference, and the quantizers behind them (FlatQuant).

Sun et al., "FlatQuant: Flatness Matters for LLM Quantization" (ICML 2025, arXiv 2410.09426).
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from common.quantization.activations import ActivationFormat, fake_quantize, min_max_range
from kernels.attention.api import attention
from kernels.kronecker_quantize.api import kronecker_transform

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
