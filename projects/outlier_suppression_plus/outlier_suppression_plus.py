"""Outlier Suppression+ on models: where the shift and the scale go, one block at a time.

A block is walked in the order of its forward pass. At each site (a norm and the linears that read
it) the shift and the scale are found on what the linears meet with everything before them quantized
already (the paper's code does so in one forward pass), folded into the norm and the linears, and
the linears are packed with rounded inputs. Nothing is left to compute at inference, but for the
residual branch of post-norm blocks (`post_norm`).

`quantize_block` fits `common.quantization.calibration.quantize_blocks` (stream="quantized"): memory
holds one block, and its inputs may lie in the host's (see `Settings.all_tokens`). `quantize` takes a
whole decoder or encoder.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block, Decoder, DecoderConfig
from common.models.encoder import Encoder
from common.models.surgery import get_module, linear_paths
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.attention import OPERANDS, QuantizedAttention
from common.quantization.calibration import (
  GPTQ_STAGES,
  check_finite,
  quantize_model,
  token_mask,
)
from common.quantization.equivalent import ScalingGroup, smoothquant_scale
from common.quantization.linear import get_kernels, pack_linears
from common.quantization.quantized_array import IntegerFormat
from common.quantization.shift_and_scale import (
  Outputs,
  ScaleSearch,
  channel_range,
  channel_shift,
  group_outputs,
  linear_outputs,
  quantize_weights,
  search_scale,
  tensor_outputs,
)
from projects.outlier_suppression_plus.observation import (
  Observer,
  attention_ranges,
  needs_all_tokens,
  observed_range,
  stage_inputs,
)
from projects.outlier_suppression_plus.post_norm import PostNormBlock, fold_inputs, plain_block
from projects.outlier_suppression_plus.sites import (
  ShiftAndScale,
  add_to_biases,
  fold,
  sites,
  takes_shift,
)

Array = jax.Array

SHIFTS = ("center", "mean", "median", "none")
SCALES = ("threshold", "smoothquant", "gamma", "none")
OBJECTIVES = ("output", "linear", "tensor")
OBSERVERS = ("min_max", "average_min_max", "percentile", "mse", "token_wise")


@dataclasses.dataclass(frozen=True)
class Settings:
  """The formats, and which shift and scale. The defaults are Outlier Suppression+.

  Attributes:
    weights: every linear's format.
    activations: of every linear's input.
    shift: "center" of the channel's range; "mean" or "median"; "none".
    scale: "threshold", the search; "smoothquant", its rule; "gamma", the norm's gain (Outlier
      Suppression); "none".
    objective: what the search looks at: the next modules' "output" (attention for q, k, v); the
      next "linear" products; the rounded "tensor" itself.
    alpha: SmoothQuant's.
    lower_bound, lower_fraction: where the search ends, see `search_scale`.
    search_samples: calibration samples that the search's loss is of (the paper: the first batch).
      Shifts and ranges are of all.
    linear_to_linear: also scale a gated MLP's up_proj -> down_proj.
    observer: of static ranges, see `static_range`; or "token_wise", see `outlier_suppression`.
    percentile: of the observers "percentile" and "token_wise", in percent.
    quantize_bmm: also round queries, keys, values and attention probabilities.

  Raises:
    UserError: a value is outside the supported set.
  """

  weights: IntegerFormat
  activations: ActivationFormat
  shift: Literal["center", "mean", "median", "none"] = "center"
  scale: Literal["threshold", "smoothquant", "gamma", "none"] = "threshold"
  objective: Literal["output", "linear", "tensor"] = "output"
  alpha: float = 0.5
  lower_bound: float = 1.0
  lower_fraction: float = 1.0
  search_samples: int = 1
  linear_to_linear: bool = True
  observer: Observer = "min_max"
  percentile: float = 99.99
  quantize_bmm: bool = False

  def __post_init__(self):
    for name, supported in (
      ("shift", SHIFTS),
      ("scale", SCALES),
      ("objective", OBJECTIVES),
      ("observer", OBSERVERS),
    ):
      if (value := getattr(self, name)) not in supported:
        raise UserError(f"{name}={value!r} is not supported; supported: {', '.join(supported)}")
    if self.search_samples < 1 or not 0 < self.lower_bound or not 0 < self.lower_fraction <= 1:
      raise UserError(
        f"search_samples={self.search_samples}, lower_bound={self.lower_bound}, "
        f"lower_fraction={self.lower_fraction}; expected at least 1, positive, and in (0, 1]"
      )

  @property
  def all_tokens(self) -> bool:
    """Whether the inputs of a stage are looked at all at once, on the device.

    A mean, a median and some static ranges are of all tokens. Otherwise samples come one at a time,
    from wherever they lie, and the smallest and the largest value of each channel are kept.
    """
    static = self.activations.granularity == "per_tensor"
    return self.shift in ("mean", "median") or (static and needs_all_tokens(self.observer))


def quantize_block(
  index: int,
  block: Block,
  x: Array,
  context: AttentionContext,
  *,
  config: DecoderConfig,
  settings: Settings,
  input_gain: Array | None = None,
) -> Block:
  """The block with packed linears and rounded inputs, shifted and scaled.

  Args: as of `calibrate_block`; `index` is not used.
  """
  del index
  quantized = calibrate_block(block, x, context, config, settings, input_gain)[0]
  if isinstance(quantized, PostNormBlock):
    return plain_block(quantized, block)
  return quantized


def calibrate_block(
  block: Block,
  x: Array,
  context: AttentionContext,
  config: DecoderConfig,
  settings: Settings,
  input_gain: Array | None = None,
) -> tuple[Block, dict[str, ShiftAndScale]]:
  """The quantized block, and what was found: {path of the norm or linear: shift and scale}.

  Args:
    block: in full precision; not modified.
    x: its inputs after the quantized blocks, [samples, seq, dim].
    context: of one row for all samples, or of every sample.
    config: the decoder's, or an encoder's `config.block`.
    settings: formats and method.
    input_gain: gain of the norm before a post-norm block, for scale="gamma".

  Raises:
    UserError: see `check_block`.
  """
  check_block(block, config, settings, x)
  block = nnx.clone(block)
  if config.norm_placement == "post":
    block = PostNormBlock(block)
  by_linear = {site.linears[0]: site for site in sites(config, settings.linear_to_linear)}
  every, found = linear_paths(block), {}
  static = settings.activations.granularity == "per_tensor"
  observation = settings.activations, settings.observer, settings.percentile
  for stage in GPTQ_STAGES:
    paths = [path for path in stage if path in every]
    site, ranges = by_linear.get(paths[0]), None
    if site or static:
      arguments = paths[0], min(settings.search_samples, len(x)), settings.all_tokens
      features, real = stage_inputs(*nnx.split(block), x, context, *arguments)
    if site:
      gain = input_gain if site.previous == "attention_input" else _gain(block, site)
      found[site.previous] = find(block, site, features, real, context, settings, gain)
      fold(block, site, found[site.previous])
      real = _shift_and_scale(real, *found[site.previous][:2])
    if static:
      ranges = dict.fromkeys(paths, observed_range(real, *observation))
    pack_linears(
      block,
      {p: _quantize_weights(w, settings.weights) for p, w in get_kernels(block, paths).items()},
    )
    quantize_inputs(block, paths, settings.activations, ranges)
    if stage == GPTQ_STAGES[0] and settings.quantize_bmm:
      ranges = attention_ranges(block, x, context, *observation) if static else None
      formats = dict.fromkeys(OPERANDS, settings.activations)
      block.attention.attend = nnx.data(QuantizedAttention(formats, ranges))
  return block, found


def find(
  block: Block,
  site: ScalingGroup,
  features: Array,
  real: Array,
  context: AttentionContext,
  settings: Settings,
  gain: Array | None,
) -> ShiftAndScale:
  """Shift and scale of one site of a block whose linears there are in full precision.

  Args:
    block: not modified.
    site: which.
    features: inputs of the site's linears, of the search's samples, [search_samples, seq, in].
    real: those of all samples, as `real_tokens` gives them.
    context: the block's.
    settings: formats and method.
    gain: of the norm, [in], or None.
  """
  shift = jnp.zeros(features.shape[-1])
  if settings.shift != "none" and takes_shift(block, site):
    shift = _channel_shift(real, settings.shift)
  low, high = _shifted_range(real, shift)
  if settings.scale == "smoothquant":
    kernels = list(get_kernels(block, list(site.linears)).values())
    largest = jnp.maximum(high, -low)
    return ShiftAndScale(shift, smoothquant_scale(largest, kernels, settings.alpha), None)
  if settings.scale == "threshold":
    cut = lambda leaf: leaf[: len(features)] if leaf.ndim and len(leaf) == len(real) else leaf
    module = nnx.clone(get_module(block, site.linears[0].split(".")[0]))
    add_to_biases(module, site, shift)
    search = search_site(
      *nnx.split(module),
      features - shift,
      jax.tree.map(cut, context),
      low,
      high,
      site,
      settings.objective,
      settings.weights,
      settings.activations,
      settings.lower_bound,
      settings.lower_fraction,
    )
    return ShiftAndScale(shift, search.scale, search)
  scale = jnp.ones_like(shift)
  if settings.scale == "gamma" and gain is not None:
    # The norm then has gain 1. A gain of 0 has no inverse; its channel is nothing but its bias.
    scale = jnp.where(jnp.abs(gain) < 1e-3, 1.0, gain.astype(jnp.float32))
  return ShiftAndScale(shift, scale, None)


def quantize(
  model: Decoder | Encoder,
  inputs: Array,
  settings: Settings,
  *,
  segment_ids: Array | None = None,
  token_types: Array | None = None,
) -> tuple[Decoder | Encoder, list[dict[str, ShiftAndScale]]]:
  """A quantized copy of the model, and the shifts and scales of every block.

  Args:
    model: a decoder or an encoder in full precision; not modified.
    inputs: calibration tokens, int32 [samples, seq].
    settings: formats and method.
    segment_ids: int32 [samples, seq], 0 for padding.
    token_types: of an encoder, int32 [samples, seq], 1 for the second text of a pair.

  Raises:
    UserError: see `check_model`.
  """
  check_model(model, settings)
  config, found, norm = block_config(model), [], model.embed_norm

  def block(index, block, x, context):
    nonlocal norm
    gain = None if norm is None else norm.scale[...]
    quantized, of_block = calibrate_block(block, x, context, config, settings, gain)
    found.append(of_block)
    norm = block.mlp_norm
    return quantized

  ids = {"segment_ids": segment_ids, "token_types": token_types}
  quantized = quantize_model(model, inputs, block, stream="quantized", **ids)
  if config.norm_placement == "post":
    fold_inputs(quantized)
  return quantized, found


def fold_model(
  model: Decoder | Encoder, found: list[dict[str, ShiftAndScale]]
) -> Decoder | Encoder:
  """A copy in full precision with the shifts and scales folded in: the same function.

  Of a pre-norm model it is a plain model, which `save_model` writes as a Hugging Face checkpoint for
  any other quantizer; a post-norm model has `PostNormBlock`s, which no such checkpoint has.
  """
  config, model = block_config(model), nnx.clone(model)
  post = config.norm_placement == "post"
  if post:
    model.blocks = nnx.List([PostNormBlock(block) for block in model.blocks])
  for block, of_block in zip(model.blocks, found, strict=True):
    for site in sites(config):
      if site.previous in of_block:
        fold(block, site, of_block[site.previous])
  if post:
    fold_inputs(model)
  return model


def block_config(model: Decoder | Encoder) -> DecoderConfig:
  """What the model's blocks are.

  Raises:
    UserError: the model is neither a decoder nor an encoder.
  """
  if isinstance(model, Encoder):
    return model.config.block
  if isinstance(model, Decoder):
    return model.config
  raise UserError(
    f"Outlier Suppression+ does not support {type(model).__name__}; supported: decoders (OPT, BLOOM, "
    "Llama, ...) and encoders (BERT, RoBERTa)"
  )


def check_model(model: Decoder | Encoder, settings: Settings) -> None:
  """Checks a model before any work.

  Raises:
    UserError: the architecture is not supported, a weight is NaN or infinite (it is named), or a
      group size does not divide.
  """
  config = block_config(model)
  check_finite(model)
  check_block(model.blocks[0], config, settings)


def check_block(
  block: Block, config: DecoderConfig, settings: Settings, x: Array | None = None
) -> None:
  """Checks a block, and its inputs if they are given, before any work.

  Raises:
    UserError: see `check_model`.
  """
  sites(config, settings.linear_to_linear)
  for path, kernel in get_kernels(block).items():
    try:
      settings.weights.num_groups(kernel.shape)
    except UserError as e:
      raise UserError(f"{path}: {e}") from None
    if settings.activations.group_size > 0 and kernel.shape[0] % settings.activations.group_size:
      raise UserError(
        f"{path}: group_size={settings.activations.group_size} of activations does not divide its "
        f"{kernel.shape[0]} inputs"
      )
  check_finite(block, x)


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9))
def search_site(
  graphdef,
  state,
  x: Array,
  context: AttentionContext,
  low: Array,
  high: Array,
  site: ScalingGroup,
  objective: str,
  weights: IntegerFormat,
  activations: ActivationFormat,
  lower_bound: float,
  lower_fraction: float,
) -> ScaleSearch:
  """`search_scale` at one site; `graphdef` and `state` are its attention or MLP, biases shifted.

  Args:
    x: shifted inputs, [samples, seq, in].
    low, high: range of the shifted channels, [in].
  """
  outputs, kernels = site_outputs(graphdef, state, context, site, objective)
  return search_scale(
    outputs,
    x.astype(jnp.float32),
    kernels,
    token_mask(x, context),
    low,
    high,
    weights,
    activations,
    lower_bound=lower_bound,
    lower_fraction=lower_fraction,
  )


def site_outputs(
  graphdef, state, context: AttentionContext, site: ScalingGroup, objective: str
) -> tuple[Outputs, dict[str, Array]]:
  """What the search's loss looks at, and the kernels that it depends on.

  "output" is that of `group_outputs`; "linear" the products of the site's linears; "tensor" what
  they read.
  """
  outputs, kernels = group_outputs(graphdef, state, site, context)
  return {"output": outputs, "linear": linear_outputs, "tensor": tensor_outputs}[objective], kernels


def _gain(block: Block, site: ScalingGroup) -> Array | None:
  previous = get_module(block, site.previous)
  return previous.scale[...] if isinstance(previous, nnx.LayerNorm | nnx.RMSNorm) else None


@jax.jit
def _shifted_range(x: Array, shift: Array) -> tuple[Array, Array]:
  return channel_range(x - shift)


@jax.jit
def _shift_and_scale(x: Array, shift: Array, scale: Array) -> Array:
  return (x - shift) / scale


_quantize_weights = jax.jit(quantize_weights, static_argnums=1)
_channel_shift = jax.jit(channel_shift, static_argnums=1)
