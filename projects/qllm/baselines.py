"""What QLLM is compared with: RTN, SmoothQuant, Outlier Suppression+ and a learned equivalent scale.

All scale channels equivalently (`common.quantization.equivalent`) and round as QLLM rounds: weights per
output channel, inputs of linears, queries, keys and values per token. A scale goes wherever one can be
folded in: also from up_proj to down_proj. Llamas have RMSNorms and no biases, so that there is no shift
(Outlier Suppression+ and OmniQuant have one for other models).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.decoder import AttentionContext, Block, Decoder, DecoderConfig
from common.models.surgery import get_module
from common.quantization import rtn
from common.quantization.activations import quantize_inputs
from common.quantization.calibration import (
  Streams,
  block_inputs,
  quantize_model,
  run_block,
  token_mask,
)
from common.quantization.equivalent import (
  ScalingGroup,
  fold_scale,
  scaling_groups,
  smoothquant_scale,
)
from common.quantization.linear import get_kernels, pack_linears, set_kernels
from common.quantization.quantized_array import IntegerFormat, QuantizedArray, from_codes
from common.quantization.reconstruction import Learned, ReconstructionSettings, reconstruct
from common.quantization.shift_and_scale import channel_range, group_outputs, search_scale
from common.quantization.straight_through import clip_ste, round_ste
from projects.qllm.error_correction import make_optimizer
from projects.qllm.qllm import quantize_attention
from projects.qllm.settings import Settings
from projects.qllm.sites import sites

Array = jax.Array

# The logit of the share of a weight range that OmniQuant's clipping starts from, 0.982.
CLIPPING_START = 4.0


def round_block(block: Block, settings: Settings) -> Block:
  """The block rounded to nearest."""
  weights = {path: _quantize(w, settings.weights) for path, w in get_kernels(block).items()}
  return pack_block(block, weights, settings)


def pack_block(block: Block, weights: dict[str, QuantizedArray], settings: Settings) -> Block:
  """The block with given packed weights, and rounded inputs and attention operands."""
  block = nnx.clone(block)
  pack_linears(block, weights)
  quantize_inputs(block, list(weights), settings.activations)
  quantize_attention(block, settings.activations)
  return block


def rtn_model(model: Decoder, settings: Settings) -> Decoder:
  """RTN: min-max ranges, no calibration."""
  quantized = nnx.clone(model)
  quantized.blocks = nnx.List([round_block(b, settings) for b in model.blocks])
  return quantized


def smoothquant(
  model: Decoder, tokens: Array, settings: Settings, alphas: Sequence[float]
) -> Decoder:
  """SmoothQuant with the alpha of each block that has the least error of its output.

  Args:
    model: in full precision; not modified.
    tokens: calibration samples, int32 [samples, seq].
    settings: the formats.
    alphas: migration strengths to choose from.
  """
  config = model.config

  def quantize_block(index, block, x: Streams, context):
    inputs = block_inputs(block, x.quantized, context)
    mask, target = token_mask(x.quantized, context), run_block(block, x.full_precision, context)
    candidates, errors = [], []
    for alpha in alphas:
      scaled = nnx.clone(block)
      for site in sites(config):
        kernels = list(get_kernels(block, list(site.linears)).values())
        scale = _smoothquant_scale(inputs[site.linears[0]], mask, kernels, alpha)
        fold_scale(scaled, site, scale)
      candidates.append(round_block(scaled, settings))
      errors.append(_squared_error(run_block(candidates[-1], x.quantized, context), target))
    return candidates[int(np.nanargmin(jax.device_get(errors)))]

  return quantize_model(model, tokens, quantize_block, stream="both")


def outlier_suppression_plus(
  model: Decoder, tokens: Array, settings: Settings, lower_fraction: float
) -> Decoder:
  """Outlier Suppression+: a threshold per site, searched for the least error of the next output.

  Args:
    model, tokens, settings: see `smoothquant`; the search is on `settings.search_samples`.
    lower_fraction: where the search ends, see `search_scale`.
  """
  config = model.config

  def quantize_block(index, block, x, context):
    inputs, scaled = block_inputs(block, x, context), nnx.clone(block)
    few = lambda leaf: leaf[: settings.search_samples]
    cut = lambda leaf: few(leaf) if leaf.ndim and len(leaf) == len(x) else leaf
    for site in sites(config):
      features = inputs[site.linears[0]]
      low, high = _channel_range(features * token_mask(x, context))
      module = nnx.split(get_module(block, site.linears[0].split(".")[0]))
      static = site, settings.weights, settings.activations, lower_fraction
      context_of_few = jax.tree.map(cut, context)
      scale = _searched_scale(*module, few(features), context_of_few, low, high, *static)
      fold_scale(scaled, site, scale)
    return round_block(scaled, settings)

  return quantize_model(model, tokens, quantize_block, stream="quantized")


class OmniQuantBlock(nnx.Module):
  """A block with a learned equivalent scale per input channel and learned clipping of weights.

  Shao et al. 2024: W is rounded in the range (sigmoid(g) max W, sigmoid(b) min W) per output channel,
  and scales are folded in as SmoothQuant's, where they start.
  """

  def __init__(
    self, block: Block, config: DecoderConfig, settings: Settings, scales: Sequence[Array]
  ):
    """scales: positive, [in] for each of `scaling_groups(config)`."""
    self.block = block
    self.groups = tuple(scaling_groups(config))
    self.settings = settings
    self.log_scales = nnx.List([Learned(jnp.log(scale)) for scale in scales])
    start = lambda kernel: jnp.full((2, 1, kernel.shape[1]), CLIPPING_START)
    self.clipping = nnx.List([Learned(start(kernel)) for kernel in get_kernels(block).values()])

  def __call__(self, x: Array, context: AttentionContext) -> tuple[Array, None]:
    """[batch, seq, dim] -> [batch, seq, dim] (and no cache)."""
    block = self.scaled()
    kernels = get_kernels(block)
    for (path, kernel), clipping in zip(kernels.items(), self.clipping):
      codes, scales, zero_points = clipped_codes(kernel, clipping[...], self.settings.weights)
      kernels[path] = rtn.decode(codes, scales, zero_points, self.settings.weights)
    set_kernels(block, kernels)
    quantize_inputs(block, list(kernels), self.settings.activations)
    quantize_attention(block, self.settings.activations)
    return block(x, context)[0], None

  def scaled(self) -> Block:
    """The block in full precision with the scales folded in."""
    block = nnx.clone(self.block)
    for group, log_scale in zip(self.groups, self.log_scales):
      fold_scale(block, group, jnp.exp(log_scale[...]))
    return block

  def packed(self) -> Block:
    """What is left when learning is over: packed linears."""
    block = self.scaled()
    weights = {
      path: _pack_clipped(kernel, clipping[...], self.settings.weights)
      for (path, kernel), clipping in zip(get_kernels(block).items(), self.clipping)
    }
    return pack_block(block, weights, self.settings)


def clipped_codes(w: Array, clipping: Array, format: IntegerFormat) -> tuple[Array, Array, Array]:
  """Codes, scales and zero points of weights in a learned range; gradients pass the rounding.

  Args:
    w: [in, out].
    clipping: logits of the shares of the smallest and of the largest weight, [2, 1, out].
    format: per output channel, asymmetric.
  """
  low, high = rtn.min_max_range(w.astype(jnp.float32), format)
  low_share, high_share = jax.nn.sigmoid(clipping)
  low, high = low_share * low, high_share * high
  scales = jnp.maximum(high - low, 1e-5) / format.code_range[1]
  zero_points = clip_ste(round_ste(-low / scales), *format.code_range)
  codes = clip_ste(round_ste(w / scales) + zero_points, *format.code_range)
  return codes, scales, zero_points


def omniquant(
  model: Decoder,
  tokens: Array,
  settings: Settings,
  reconstruction: ReconstructionSettings,
  learning_rate: float,
  key: Array,
) -> Decoder:
  """OmniQuant's two learned parts, block by block.

  Args:
    model, tokens, settings: see `smoothquant`.
    reconstruction: steps and batches of each block.
    learning_rate: of AdamW, linearly to 0.
    key: of the batches.
  """
  config = model.config
  optimizer = make_optimizer(learning_rate, reconstruction.num_steps)

  def quantize_block(index, block, x: Streams, context):
    inputs, mask = block_inputs(block, x.quantized, context), token_mask(x.quantized, context)
    scales = [
      _smoothquant_scale(
        inputs[group.linears[0]], mask, list(get_kernels(block, list(group.linears)).values()), 0.5
      )
      for group in scaling_groups(config)
    ]
    student = OmniQuantBlock(block, config, settings, scales)
    targets = run_block(block, x.full_precision, context)
    key_of_block = jax.random.fold_in(key, index)
    learned, _ = reconstruct(
      student, x.quantized, targets, context, key_of_block, reconstruction, optimizer
    )
    return learned.packed()

  return quantize_model(model, tokens, quantize_block, stream="both")


@jax.jit
def _smoothquant_scale(x: Array, mask: Array, kernels: list[Array], alpha: Array) -> Array:
  largest = jnp.max(jnp.abs(x.astype(jnp.float32) * mask), axis=(0, 1))
  return smoothquant_scale(largest, kernels, alpha)


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9))
def _searched_scale(
  graphdef, state, x, context, low, high, site: ScalingGroup, weights, activations, lower_fraction
) -> Array:
  outputs, kernels = group_outputs(graphdef, state, site, context)
  mask = token_mask(x, context)
  return search_scale(
    outputs,
    x.astype(jnp.float32),
    kernels,
    mask,
    low,
    high,
    weights,
    activations,
    lower_bound=0.1,
    lower_fraction=lower_fraction,
  ).scale


@functools.partial(jax.jit, static_argnums=2)
def _pack_clipped(kernel: Array, clipping: Array, format: IntegerFormat) -> QuantizedArray:
  return from_codes(*clipped_codes(kernel, clipping, format), format)


_channel_range = jax.jit(channel_range)
_squared_error = jax.jit(lambda y, target: jnp.mean((y - target) ** 2))
_quantize = jax.jit(rtn.quantize, static_argnums=1)
