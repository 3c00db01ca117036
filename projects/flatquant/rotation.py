"""QuaRot's rotation of the residual stream: a baseline (Ashkboos et al., NeurIPS 2024).

Once the gains of the norms are folded into the linears that read them, an RMSNorm commutes with a
rotation, so that the whole model can be computed in a rotated basis, without any cost.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from common.models.decoder import Decoder
from common.models.surgery import get_module

Array = jax.Array

# The linears that read each norm, and those that write into the residual stream.
READERS = {
  "attention_norm": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  "mlp_norm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("attention.o_proj", "mlp.down_proj")


def fold_gains(model: Decoder) -> Decoder:
  """A copy of a model whose norms have gain 1, the gains in the linears that read them.

  Args:
    model: with RMSNorm before its linears; not modified.

  Raises:
    UserError: the norms do not commute with a rotation afterwards.
  """
  config = model.config
  if config.norm != "rms" or config.norm_placement != "pre" or config.embedding_norm:
    raise UserError(
      f"QuaRot rotates models with RMSNorm before their linears; this one has norm={config.norm!r}, "
      f"norm_placement={config.norm_placement!r}, embedding_norm={config.embedding_norm}"
    )
  model = nnx.clone(model)
  for block in model.blocks:
    for norm, paths in READERS.items():
      gain = get_module(block, norm).scale
      for path in paths:
        kernel = get_module(block, path).kernel
        kernel[...] = gain[...][:, None] * kernel[...]
      gain[...] = jnp.ones_like(gain[...])
  head = model.final_norm.scale[...][:, None] * model.head_kernel
  # The head has the last norm's gain in it, so that it is no longer the embedding.
  model.config = dataclasses.replace(config, tie_word_embeddings=False)
  linear = nnx.eval_shape(lambda: nnx.Linear(*head.shape, use_bias=False, rngs=nnx.Rngs(0)))
  linear.kernel = nnx.Param(head)
  model.lm_head = nnx.data(linear)
  model.final_norm.scale[...] = jnp.ones_like(model.final_norm.scale[...])
  return model


def rotate_residual(model: Decoder, rotation: np.ndarray) -> Decoder:
  """A copy of a model whose residual stream is x R; its outputs are the same up to rounding.

  Args:
    model: with RMSNorm before its linears; not modified.
    rotation: R, orthogonal [dim, dim].

  Raises:
    UserError: see `fold_gains`.
  """
  model = fold_gains(model)
  product = lambda a, b: jnp.matmul(a, b, precision="highest")
  for block in model.blocks:
    for path in (path for paths in READERS.values() for path in paths):
      kernel = get_module(block, path).kernel
      kernel[...] = product(rotation.T, kernel[...])
    for path in WRITERS:
      linear = get_module(block, path)
      linear.kernel[...] = product(linear.kernel[...], rotation)
      if linear.bias is not None:
        linear.bias[...] = product(linear.bias[...], rotation)
  model.lm_head.kernel[...] = product(rotation.T, model.lm_head.kernel[...])
  model.embed_tokens.embedding[...] = product(model.embed_tokens.embedding[...], rotation)
  return model
