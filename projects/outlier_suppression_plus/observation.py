"""What the layers of a block meet on the calibration samples, and the ranges that follow.

Recording takes a pass of one sample at a time. Padding must not widen a range: real tokens take its
place.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import AttentionContext, Block
from common.models.surgery import record_inputs
from common.quantization.activations import ActivationFormat, static_range
from common.quantization.attention import attention_operands
from common.quantization.calibration import token_mask
from kernels.attention.api import attention
from projects.outlier_suppression_plus.outlier_suppression import token_wise_range

Array = jax.Array
Observer = Literal["min_max", "average_min_max", "percentile", "mse", "token_wise"]


def observed_range(
  x: Array, format: ActivationFormat, observer: Observer, percentile: float
) -> tuple[Array, Array]:
  """The static range of activations, float32 [] and [].

  Args:
    x: [samples, ..., channels]; a sample is a batch of "average_min_max".
    format: per tensor.
    observer: of `static_range`, or "token_wise", see `outlier_suppression`.
    percentile: of the observers "percentile" and "token_wise", in percent.
  """
  if observer == "token_wise":
    return token_wise_range(x, percentile / 100)
  return _static_range(x, format, observer, percentile=percentile)


def attention_ranges(
  block: Block,
  x: Array,
  context: AttentionContext,
  format: ActivationFormat,
  observer: Observer,
  percentile: float,
) -> dict[str, tuple[Array, Array]]:
  """Static ranges of the operands of the block's attention, {name: (low, high)}."""
  mask = token_mask(x, context)
  # Keys of padding have no probability, but its queries are there.
  return {
    name: observed_range(repeat_real_tokens(value, mask), format, observer, percentile)
    for name, value in operands(*nnx.split(block), x, context).items()
  }


class _OperandRecorder(nnx.Module):
  """Attention that notes its operands."""

  def __init__(self, record: Callable[[dict[str, Array]], None]):
    self.record = record

  def __call__(self, query: Array, key: Array, value: Array, **options) -> Array:
    self.record(attention_operands(query, key, value, **options))
    return attention(query, key, value, **options)


def _rows(x: Array, context: AttentionContext) -> tuple[Array, AttentionContext]:
  """Both with a leading axis of samples, whose entries are passes of one row."""

  def rows(leaf):
    if leaf.ndim and leaf.shape[0] == x.shape[0]:
      return leaf[:, None]
    return jnp.broadcast_to(leaf, (x.shape[0], *leaf.shape))

  return x[:, None], jax.tree.map(rows, context)


@functools.partial(jax.jit, static_argnums=(0, 4))
def stage_inputs(graphdef, state, x, context, path):
  """Inputs of the linear at `path`, [samples, seq, in]."""

  def record(rows):
    block = nnx.merge(graphdef, state)
    return record_inputs(block, [path], lambda block: block(*rows))[1][path][0]

  return jax.lax.map(record, _rows(x, context))


@functools.partial(jax.jit, static_argnums=0)
def operands(graphdef, state, x, context):
  """Operands of the block's attention, {name: [samples, heads, seq, ...]}."""

  def record(rows):
    block, noted = nnx.merge(graphdef, state), {}
    block.attention.attend = nnx.data(_OperandRecorder(noted.update))
    block(*rows)
    return {name: value[0] for name, value in noted.items()}

  return jax.lax.map(record, _rows(x, context))


@jax.jit
def repeat_real_tokens(x: Array, mask: Array) -> Array:
  """x with each row's real tokens over and over in the place of its padding.

  Args:
    x: [samples, ..., seq, channels].
    mask: 1 for a token and 0 for padding, [samples, seq, 1].
  """
  real = mask[..., 0] != 0
  order = jnp.argsort(~real, axis=1, stable=True)
  count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
  index = jnp.take_along_axis(order, jnp.arange(real.shape[1])[None] % count, axis=1)
  index = index.reshape(index.shape[0], *(1,) * (x.ndim - 3), index.shape[1], 1)
  return jnp.take_along_axis(x, index, axis=-2)


_static_range = jax.jit(static_range, static_argnums=(1, 2), static_argnames="percentile")
