"""How flat activations and weights are, and where quantization errors are (sections 2 and 4.4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.decoder import Decoder
from common.quantization.calibration import block_inputs, run_block
from common.quantization.linear import get_kernels
from projects.flatquant.flat_block import LINEARS, FlatBlock

Array = jax.Array


def channel_magnitudes(x: Array) -> Array:
  """Frobenius norm of each channel, the largest first, float32 [channels].

  Args:
    x: activations [..., channels], or a kernel's transpose [out, in].
  """
  norms = jnp.linalg.norm(x.astype(jnp.float32).reshape(-1, x.shape[-1]), axis=0)
  return jnp.sort(norms, descending=True)


@jax.jit
def flatness_gap(magnitudes: Array) -> Array:
  """|| s - flat || / || s ||, [] in [0, 1): flat is the line of equal norm. 0 is entirely flat.

  Args:
    magnitudes: s, of `channel_magnitudes`, [channels].
  """
  norm = jnp.linalg.norm(magnitudes)
  return jnp.linalg.norm(magnitudes - norm / jnp.sqrt(magnitudes.shape[0])) / norm


def block_magnitudes(flat: FlatBlock, x: Array, context) -> dict[str, tuple[Array, Array]]:
  """{site: magnitudes of the transformed inputs and of the transformed kernels} of a block.

  Args:
    flat: with the transforms; those that are not used are the identity.
    x, context: the original block's inputs.
  """
  return _block_magnitudes(*nnx.split(flat), block_inputs(flat.block, x, context))


@functools.partial(jax.jit, static_argnums=0)
def _block_magnitudes(graphdef, state, inputs: dict[str, Array]):
  flat = nnx.merge(graphdef, state)
  kernels, found = get_kernels(flat.block), {}
  for site, paths in LINEARS.items():
    factors = flat.transforms[site].factors()
    weights = jnp.concatenate([factors.apply_inverse(kernels[path]) for path in paths], axis=1)
    activations = channel_magnitudes(factors.apply(inputs[paths[0]]))
    found[site] = activations, channel_magnitudes(weights.T)
  return found


def error_landscape(
  model: Decoder, quantized: Decoder, tokens: Array, *, propagate: bool
) -> np.ndarray:
  """Mean squared error of every block's output at every token, relative to the output's own mean
  square, float32 [layers, seq].

  Args:
    model: in full precision.
    quantized: the same model, quantized.
    tokens: int32 [samples, seq].
    propagate: a quantized block sees the errors of the blocks before it; otherwise its inputs are
      those of the full-precision model.
  """
  x, context = model.stem(tokens)
  x_quantized = quantized.stem(tokens)[0] if propagate else x
  rows = []
  for block, quantized_block in zip(model.blocks, quantized.blocks):
    target = run_block(block, x, context)
    output = run_block(quantized_block, x_quantized if propagate else x, context)
    rows.append(_relative_errors(output, target))
    x, x_quantized = target, output
  return np.stack(rows)


@jax.jit
def _relative_errors(output: Array, target: Array) -> Array:
  """[samples, seq, dim] each -> float32 [seq]."""
  return jnp.mean((output - target) ** 2, axis=(0, 2)) / jnp.mean(target**2)
