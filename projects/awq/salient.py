"""The paper's motivation (section 3.1 and 3.2): which input channels matter, and why scaling helps.

`keep_salient` leaves the chosen channels in full precision (Table 1); `scale_salient` multiplies
them by a fixed s before rounding instead (Table 2).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import AttentionContext, Block
from common.quantization import rtn
from common.quantization.awq import activation_statistic, scaled_fake_quantize
from common.quantization.calibration import block_inputs
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.quantized_array import IntegerFormat

Array = jax.Array

Criterion = Literal["activation", "weight", "random"]


def salient_channels(score: Array, fraction: float) -> Array:
  """Marks the highest `fraction` of channels (at least one): [in] -> bool [in]."""
  count = max(1, round(fraction * score.size))
  return jnp.zeros(score.size, bool).at[jax.lax.top_k(score, count)[1]].set(True)


def channel_scores(kernel: Array, x: Array, criterion: Criterion, key: Array) -> Array:
  """Importance of each input channel, [in].

  Args:
    kernel: [in, out].
    x: the linear's inputs, [..., in].
    criterion: mean |x|, the L2 norm of the channel's weights, or a random score.
    key: for the random score.
  """
  if criterion == "activation":
    return activation_statistic(x)
  if criterion == "weight":
    return jnp.linalg.norm(kernel, axis=1)
  return jax.random.uniform(key, (kernel.shape[0],))


def keep_salient(
  block: Block,
  x: Array,
  context: AttentionContext,
  format: IntegerFormat,
  *,
  fraction: float,
  criterion: Criterion,
  key: Array,
) -> Block:
  """Rounds every linear except its salient channels. Weights stay unpacked."""

  def mixed_precision(kernel, inputs, key):
    return _mixed_precision(kernel, inputs, key, format, fraction, criterion)

  return _map_kernels(block, x, context, mixed_precision, key)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _mixed_precision(kernel, inputs, key, format: IntegerFormat, fraction: float, criterion):
  salient = salient_channels(channel_scores(kernel, inputs, criterion, key), fraction)
  return jnp.where(salient[:, None], kernel, rtn.fake_quantize(kernel, format))


def scale_salient(
  block: Block,
  x: Array,
  context: AttentionContext,
  format: IntegerFormat,
  *,
  fraction: float,
  scale: float,
) -> Block:
  """Q(W diag(s)) diag(1/s) with s = `scale` on the channels with the largest mean |x|, else 1."""

  def scaled(kernel, inputs, _):
    return _scaled(kernel, inputs, scale, format, fraction)

  return _map_kernels(block, x, context, scaled, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _scaled(kernel, inputs, scale, format: IntegerFormat, fraction: float):
  salient = salient_channels(activation_statistic(inputs), fraction)
  return scaled_fake_quantize(kernel, jnp.where(salient, scale, 1.0), format)


def _map_kernels(block: Block, x: Array, context: AttentionContext, change, key: Array) -> Block:
  inputs = block_inputs(block, x, context)
  kernels = get_kernels(block)
  keys = jax.random.split(key, len(kernels))
  block = nnx.clone(block)
  set_kernels(block, {p: change(w, inputs[p], k) for (p, w), k in zip(kernels.items(), keys)})
  return block
