"""Attention whose operands are rounded: queries, keys, values (the KV cache) and probabilities."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from common.quantization.activations import ActivationFormat, fake_quantize
from kernels.attention.api import attention

Array = jax.Array

OPERANDS = ("query", "key", "value", "probabilities")


class QuantizedAttention(nnx.Module):
  """Takes the place of `attend` in a decoder's `Attention`.

  "per_token" is one scale for each token and head. Keys and queries are rounded after their
  rotation; a cache holds them unrounded, and they are rounded whenever it is read.

  Args:
    formats: {operand: format} of those to round, of `OPERANDS`; or the pairs.
    ranges: {operand: (low, high)} of per-tensor formats.

  Raises:
    ValueError: an operand that does not exist.
  """

  def __init__(
    self,
    formats: Mapping[str, ActivationFormat] | Iterable[tuple[str, ActivationFormat]],
    ranges: Mapping[str, tuple[Array, Array] | Array] | None = None,
  ):
    formats = dict(formats)
    if unknown := set(formats) - set(OPERANDS):
      raise ValueError(f"no operand {sorted(unknown)}; there are {OPERANDS}")
    self.formats = tuple(formats.items())
    self.ranges = nnx.data({k: nnx.Param(jnp.stack(v)) for k, v in (ranges or {}).items()})

  def __call__(self, query: Array, key: Array, value: Array, **options) -> Array:
    """As `kernels.attention.api.attention`."""
    query, key = self._round("query", query), self._round("key", key)
    value = self._round("value", value)
    if "probabilities" not in dict(self.formats):
      return attention(query, key, value, **options)
    probabilities = attention(query, key, _identity(key), **options)
    probabilities = self._round("probabilities", probabilities)
    batch, heads, seq, keys = probabilities.shape
    grouped = probabilities.reshape(batch, key.shape[1], -1, keys)
    out = jnp.matmul(grouped, value, precision="highest" if value.dtype == jnp.float32 else None)
    return out.reshape(batch, heads, seq, -1)

  def _round(self, operand: str, x: Array) -> Array:
    format = dict(self.formats).get(operand)
    if format is None:
      return x
    low, high = self.ranges[operand][...] if operand in self.ranges else (None, None)
    return fake_quantize(x, format, low=low, high=high)


def attention_operands(query: Array, key: Array, value: Array, **options) -> dict[str, Array]:
  """What `QuantizedAttention` rounds, in full precision: for calibration of static ranges.

  Args: as `kernels.attention.api.attention`.
  """
  identity = _identity(key)
  probabilities = attention(query, key, identity, **options)
  return dict(zip(OPERANDS, (query, key, value, probabilities)))


def _identity(key: Array) -> Array:
  """Values whose weighted sums are the weights, [batch, kv_heads, keys, keys]."""
  keys = key.shape[2]
  return jnp.broadcast_to(jnp.eye(keys, dtype=key.dtype), (*key.shape[:3], keys))
