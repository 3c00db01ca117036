"""Medusa heads (Cai et al. 2024), the baseline: guesses from the last hidden state alone.

Head i guesses the token at distance i + 1 from the state h that predicts the next one,

  logits_i = W_i (h + SiLU(A_i h + b_i)),

W_i from the model's own head and A_i = b_i = 0 at first. The matched heads have as many parameters
as one prompt token: A_i is diagonal, b_i = 0 and W_i the frozen head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.models.decoder import Decoder

Array = jax.Array


class MedusaHeads(NamedTuple):
  """One head for each distance.

  Attributes:
    kernels: A, [m, width, width] (in, out).
    biases: b, [m, width].
    out_kernels: W, [m, width, vocab].
  """

  kernels: Array
  biases: Array
  out_kernels: Array


class MatchedHeads(NamedTuple):
  """Heads with a diagonal A and the model's W. diagonals: [m, width]."""

  diagonals: Array


def initial_heads(model: Decoder, distances: int) -> MedusaHeads:
  """Heads that guess as the model's own does."""
  kernel = model.head_kernel.astype(jnp.float32)
  width = len(kernel)
  return MedusaHeads(
    kernels=jnp.zeros((distances, width, width)),
    biases=jnp.zeros((distances, width)),
    out_kernels=jnp.broadcast_to(kernel, (distances, *kernel.shape)),
  )


def initial_matched_heads(model: Decoder, distances: int) -> MatchedHeads:
  """As `initial_heads`: the heads guess as the model's own does."""
  return MatchedHeads(jnp.zeros((distances, len(model.head_kernel))))


def medusa_logits(
  model: Decoder, heads: MedusaHeads | MatchedHeads, text_hidden: Array, prompt_hidden: Array
) -> Array:
  """Guesses at distances 2 to m + 1, float32 [batch, m, vocab]; a `parallel_prompt.Propose`.

  Args:
    model: whose head the matched heads share.
    heads: trained.
    text_hidden: behind the final norm, [batch, width].
    prompt_hidden: not looked at.
  """
  del prompt_hidden
  h = text_hidden[:, None]
  if isinstance(heads, MatchedHeads):
    return model.logits(h + jax.nn.silu(h * heads.diagonals))
  h = h + jax.nn.silu(jnp.einsum("bxw,mwv->bmv", h, heads.kernels) + heads.biases)
  return jnp.einsum("bmw,mwv->bmv", h, heads.out_kernels)
