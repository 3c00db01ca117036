"""Shifted and scaled inputs in post-norm blocks (BERT, OPT-350M).

There a norm's output is read by linears and by the residual branch. If the norm takes the shift and
the scale, the residual branch has to undo them: x = x~ s + z (Appendix of the paper; its code has an
identity module with a scale and a bias in that place). `plain_block` is the form of a checkpoint of
quantized blocks: the norms are as they were, and the linears make x~.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import AttentionContext, Block, Decoder
from common.models.encoder import Encoder
from common.models.surgery import get_module, replace_module
from common.quantization.calibration import GPTQ_STAGES
from common.quantization.shift_and_scale import ShiftScale

Array = jax.Array


class PostNormBlock(nnx.Module):
  """A post-norm `Block` whose linears read shifted and scaled inputs.

  Attributes:
    attention_input: of the block's input, which q, k and v read.
    input_folded: whether the norm before the block gives x~ already; else the block makes it.
    mlp_input: of the output of `attention_norm`, which has taken it.
  """

  def __init__(self, block: Block):
    dim = block.attention_norm.num_features
    self.attention, self.attention_norm = block.attention, block.attention_norm
    self.mlp, self.mlp_norm = block.mlp, block.mlp_norm
    self.attention_input, self.mlp_input = (
      ShiftScale(jnp.zeros(dim), jnp.ones(dim)) for _ in range(2)
    )
    self.input_folded = False

  def __call__(self, x: Array, context: AttentionContext, kv=None):
    """As `Block`; x is x~ if the input is folded."""
    if self.input_folded:
      scaled, x = x, self.attention_input.undo(x)
    else:
      scaled = self.attention_input(x)
    attended, kv = self.attention(scaled, context, kv)
    scaled = self.attention_norm(x + attended)
    return self.mlp_norm(self.mlp_input.undo(scaled) + self.mlp(scaled)), kv


def plain_block(block: PostNormBlock, original: Block) -> Block:
  """The same function as a post-norm `Block`, whose linears make their x~ from what they read.

  Args:
    block: its input not folded; its attention and MLP are taken over.
    original: has the norms as they were before they took a shift and a scale; not modified.
  """
  plain = nnx.clone(original)
  plain.attention, plain.mlp = block.attention, block.mlp
  for made, paths in ((block.attention_input, GPTQ_STAGES[0]), (block.mlp_input, ("mlp.up_proj",))):
    for path in paths:
      before = ShiftScale(made.shift[...], made.scale[...])
      replace_module(plain, path, nnx.Sequential(before, get_module(plain, path)))
  return plain


def fold_inputs(model: Decoder | Encoder) -> None:
  """Lets the norm before each `PostNormBlock` make its x~, in place.

  The last norm of a block belongs to the next one, so this waits until all blocks are through. The
  first block keeps its own where no norm comes before it.
  """
  norm = model.embed_norm
  for block in model.blocks:
    if norm is not None and not block.input_folded:
      shift, scale = block.attention_input.shift[...], block.attention_input.scale[...]
      norm.bias[...] = ((norm.bias[...] - shift) / scale).astype(norm.bias.dtype)
      norm.scale[...] = (norm.scale[...] / scale).astype(norm.scale.dtype)
      block.input_folded = True
    norm = block.mlp_norm
