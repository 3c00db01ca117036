"""What the layers of a block meet on the calibration samples, and the ranges that follow.

Recording takes a pass of one sample at a time, from wherever it lies. Padding must not widen a range:
real tokens take its place. Of each sample only the smallest and the largest value of every channel
are kept where that is enough: as if it had these two tokens.
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
from common.quantization.reconstruction import on_device
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
  return static_range(x, format, observer, percentile=percentile)


def needs_all_tokens(observer: Observer) -> bool:
  """Whether `observed_range` is not that of each sample's smallest and largest values.

  Percentiles and quantiles are of all values or tokens in order, the error of "mse" of every value.
  """
  return observer not in ("min_max", "average_min_max")


def attention_ranges(
  block: Block,
  x: Array,
  context: AttentionContext,
  format: ActivationFormat,
  observer: Observer,
  percentile: float,
) -> dict[str, tuple[Array, Array]]:
  """Static ranges of the operands of the block's attention, {name: (low, high)}."""
  seen = operands(*nnx.split(block), x, context, needs_all_tokens(observer))
  return {name: observed_range(v, format, observer, percentile) for name, v in seen.items()}


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


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def stage_inputs(graphdef, state, x, context, path, samples, all_tokens):
  """Inputs of the linear at `path`: of the first samples, and what ranges are of.

  Returns:
    (the first `samples`' inputs as they are, [samples, seq, in]; `real_tokens` of all samples).
  """

  def inputs(rows):
    block, x = nnx.merge(graphdef, state), on_device(rows[0])
    return record_inputs(block, [path], lambda block: block(x, rows[1]))[1][path]

  def step(first, numbered):
    i, rows = numbered
    value = inputs(rows)
    # Nothing is written behind the end.
    return first.at[i].set(value[0], mode="drop"), real_tokens(value, token_mask(*rows), all_tokens)

  rows = _rows(x, context)
  of_first = lambda rows: inputs(jax.tree.map(lambda leaf: leaf[0], rows))[0]
  shape = jax.eval_shape(of_first, rows)
  first = jnp.zeros((samples, *shape.shape), shape.dtype)
  return jax.lax.scan(step, first, (jnp.arange(len(x)), rows))


@functools.partial(jax.jit, static_argnums=(0, 4))
def operands(graphdef, state, x, context, all_tokens):
  """`real_tokens` of the operands of the block's attention, {name: [samples, heads, ...]}."""

  def record(rows):
    block, noted = nnx.merge(graphdef, state), {}
    block.attention.attend = nnx.data(_OperandRecorder(noted.update))
    block(on_device(rows[0]), rows[1])
    # Keys of padding have no probability, but its queries are there.
    return {name: real_tokens(v, token_mask(*rows), all_tokens) for name, v in noted.items()}

  return jax.lax.map(record, _rows(x, context))


def real_tokens(x: Array, mask: Array, all_tokens: bool) -> Array:
  """The real tokens of one sample, or the smallest and the largest value of each of their channels.

  Args:
    x: [1, ..., seq, channels].
    mask: 1 for a token and 0 for padding, [1, seq, 1].
    all_tokens: all, over and over in the place of padding: [..., seq, channels]; else
      [..., 2, channels].
  """
  real = mask[0, :, 0] != 0
  order = jnp.argsort(~real, stable=True)
  tokens = jnp.take(x[0], order[jnp.arange(real.size) % jnp.maximum(real.sum(), 1)], axis=-2)
  if all_tokens:
    return tokens
  return jnp.stack([tokens.min(axis=-2), tokens.max(axis=-2)], axis=-2)
