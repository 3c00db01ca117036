"""Where weights matter: sensitivities by input and output channel, and activation outliers.

The paper's motivation (section 3.1): sensitive weights lie along input channels, those that see
activation outliers, so that groups along the output isolate them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import Decoder
from common.models.surgery import linear_paths, record_inputs
from common.quantization.linear import get_kernels, set_kernels
from common.training.losses import next_token_loss

Array = jax.Array


class ChannelSensitivity(NamedTuple):
  """Of one linear, summed over the other dimension of its weights, mean over samples.

  Attributes:
    saliency_in, saliency_out: |gradient * weight|, the first-order change of the loss if the weight
      were dropped, [in] and [out].
    fisher_in, fisher_out: squared gradient, the empirical Fisher information's diagonal.
    activation: largest |x| of the linear's inputs, [in].
  """

  saliency_in: Array
  saliency_out: Array
  fisher_in: Array
  fisher_out: Array
  activation: Array


def block_sensitivity(model: Decoder, tokens: Array, index: int) -> dict[str, ChannelSensitivity]:
  """Sensitivities of the linears of block `index`, {path in the block: ...}.

  Args:
    model: full precision.
    tokens: int32 [samples, seq]; gradients are taken sample by sample.
    index: of the block; memory holds the gradients of this one only.
  """
  return _block_sensitivity(*nnx.split(model), tokens, index)


def top_share(x: Array, fraction: float) -> Array:
  """Share of the sum that the largest `fraction` of channels (at least one) has. x: [channels]."""
  count = max(1, round(fraction * x.size))
  return jax.lax.top_k(x, count)[0].sum() / x.sum()


@functools.partial(jax.jit, static_argnums=(0, 3))
def _block_sensitivity(graphdef, state, tokens, index):
  block = lambda model: model.blocks[index]
  paths = linear_paths(block(nnx.merge(graphdef, state)))
  kernels = get_kernels(block(nnx.merge(graphdef, state)))

  def loss(kernels, row):
    model = nnx.merge(graphdef, state)
    set_kernels(block(model), kernels)
    run = lambda _: model(row[None])[0]
    logits, inputs = record_inputs(block(model), paths, run)
    return next_token_loss(logits, row[None], jnp.ones_like(row[None]))[0], inputs

  def sensitivity(w, gradient, x):
    saliency, fisher = jnp.abs(w * gradient), gradient**2
    return ChannelSensitivity(
      saliency_in=saliency.sum(axis=1),
      saliency_out=saliency.sum(axis=0),
      fisher_in=fisher.sum(axis=1),
      fisher_out=fisher.sum(axis=0),
      activation=jnp.abs(x).max(axis=(0, 1)),
    )

  def of_sample(row):
    gradients, inputs = jax.grad(loss, has_aux=True)(kernels, row)
    return {path: sensitivity(kernels[path], gradients[path], inputs[path]) for path in paths}

  samples = jax.lax.map(of_sample, tokens)
  return {
    path: ChannelSensitivity(*(v.mean(axis=0) for v in s[:-1]), s.activation.max(axis=0))
    for path, s in samples.items()
  }
