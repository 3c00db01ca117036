"""The sites of a block: norms (or linears) and the linears that read them, and folding there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import Block, DecoderConfig
from common.models.surgery import get_module
from common.quantization.calibration import GPTQ_STAGES
from common.quantization.equivalent import ScalingGroup, fold_scale, fold_shift, scaling_groups
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.shift_and_scale import ScaleSearch
from projects.outlier_suppression_plus.post_norm import PostNormBlock

Array = jax.Array


class ShiftAndScale(NamedTuple):
  """What was found at a site.

  Attributes:
    shift: z, float32 [in].
    scale: s, float32 [in].
    search: the scale's, None without one.
  """

  shift: Array
  scale: Array
  search: ScaleSearch | None


def sites(config: DecoderConfig, linear_to_linear: bool = True) -> list[ScalingGroup]:
  """Where a block's activations are shifted and scaled (section 4.1).

  The norms before q, k, v and before the MLP, and up_proj -> down_proj of a gated MLP. In post-norm
  blocks the first is "attention_input", the block's input, see `PostNormBlock`.

  Raises:
    UserError: post-norm blocks without LayerNorm.
  """
  if config.norm_placement == "pre":
    norms = ("attention_norm", "mlp_norm")
    linear = ("mlp.up_proj",) if config.gated_mlp and linear_to_linear else ()
    return [group for group in scaling_groups(config) if group.previous in norms + linear]
  if config.norm != "layer" or config.gated_mlp:
    raise UserError(
      f"post-norm blocks with norm={config.norm!r}, gated_mlp={config.gated_mlp} are not supported; "
      "supported: norm='layer' with a plain MLP (BERT, OPT-350M)"
    )
  return [
    ScalingGroup("attention_input", GPTQ_STAGES[0], "attention"),
    ScalingGroup("attention_norm", ("mlp.up_proj",), "mlp.up_proj"),
  ]


def takes_shift(block: Block, site: ScalingGroup) -> bool:
  """Whether there are biases to fold a shift into: not behind RMSNorm or a linear."""
  norm = block.attention_norm if site.previous == "attention_input" else None
  norm = get_module(block, site.previous) if norm is None else norm
  biases = [get_module(block, path).bias for path in site.linears]
  return isinstance(norm, nnx.LayerNorm) and norm.bias is not None and None not in biases


def fold(block: Block | PostNormBlock, site: ScalingGroup, found: ShiftAndScale) -> None:
  """Folds a shift and a scale into the block, in place; its function stays the same."""
  if site.previous == "attention_input":
    add_to_biases(block.attention, site, found.shift)
    set_kernels(
      block,
      {
        path: (kernel * found.scale[:, None]).astype(kernel.dtype)
        for path, kernel in get_kernels(block, list(site.linears)).items()
      },
    )
  else:
    if takes_shift(block, site):
      fold_shift(block, site, found.shift)
    fold_scale(block, site, found.scale)
  if isinstance(block, PostNormBlock):
    first = site.previous == "attention_input"
    undone = block.attention_input if first else block.mlp_input
    undone.shift[...], undone.scale[...] = found.shift, found.scale


def add_to_biases(module: nnx.Module, site: ScalingGroup, shift: Array) -> None:
  """b + z W of the site's linears below its attention or MLP, in place."""
  for path in site.linears:
    linear = get_module(module, path.partition(".")[2])
    if linear.bias is not None:
      added = jnp.matmul(shift, linear.kernel[...].astype(jnp.float32), precision="highest")
      linear.bias[...] = (linear.bias[...] + added).astype(linear.bias.dtype)
