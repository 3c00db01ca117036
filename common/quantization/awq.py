"""AWQ: activation-aware weight quantization (Lin et al., MLSys 2024, arXiv 2306.00978).

Weights that meet large activations matter most. AWQ multiplies the input channels of a linear by
s = s_X^r (s_X: mean activation magnitude), rounds the weights group by group, and divides the
inputs by s, which the preceding operation absorbs (section 3.2). Two grid searches, no gradients:

  scale  r* = argmin_r || f(x; W) - f(x; Q(W diag(s)) diag(1/s)) ||^2     over r = 0, 1/20, ..., 19/20
  clip   m* = argmin_m || x W - x Q(clip(W, -m, m)) ||^2                  per group and output channel

Weights are [in, out] here: the paper's input channels are rows. Everything that looks at a whole
block is jitted once per block shape.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block, Decoder, DecoderConfig
from common.models.surgery import get_module
from common.quantization import rtn
from common.quantization.calibration import (
  block_inputs,
  check_finite,
  quantize_model,
  rtn_block,
)
from common.quantization.equivalent import ScalingGroup, fold_scale, scaling_groups
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.quantized_array import IntegerFormat

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AWQSettings:
  """What to search and how finely.

  Attributes:
    format: the weights' integer format, asymmetric and grouped along the input in the paper.
    auto_scale: search the scales; False leaves them at 1.
    mse_range: search the clipping range; False keeps min-max.
    scale_grid: number of exponents r, 0, 1/n, ..., (n-1)/n.
    fixed_ratio: use this exponent r instead of searching it.
    scale_stat: activation statistic per channel, mean |x| (the paper) or max |x|.
    clip_grid: the range shrinks in steps of 1/n.
    max_shrink: the most that the range shrinks, as a fraction.
    clip_tokens: about how many tokens the clip search looks at (a stride through all of them).

  Raises:
    UserError: the format is not grouped along the input, or the statistic is unknown.
  """

  format: IntegerFormat
  auto_scale: bool = True
  mse_range: bool = True
  scale_grid: int = 20
  fixed_ratio: float | None = None
  scale_stat: Literal["mean", "max"] = "mean"
  clip_grid: int = 20
  max_shrink: float = 0.5
  clip_tokens: int = 512

  def __post_init__(self):
    if self.format.axis != 0:
      raise UserError(f"AWQ takes formats grouped along the input (axis=0), not {self.format}")
    if self.scale_stat not in ("mean", "max"):
      raise UserError(f"scale_stat={self.scale_stat!r} is not supported; supported: mean, max")


@dataclasses.dataclass
class BlockSearch:
  """The search's result for one block.

  Attributes:
    scales: {path of the operation that absorbs it: s, [in]}.
    clips: {path of a linear: largest |w| kept, [groups, out]}.
  """

  scales: dict[str, Array]
  clips: dict[str, Array]


def activation_statistic(x: Array, stat: str = "mean") -> Array:
  """s_X: mean (or max) of |x| over all tokens, float32 [in]. x: [..., in]."""
  magnitude = jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1])
  return magnitude.mean(axis=0) if stat == "mean" else magnitude.max(axis=0)


def channel_scale(s_x: Array, ratio: Array | float) -> Array:
  """s = s_X^r, normalised to sqrt(max(s) min(s)) = 1, [in].

  The floor of 1e-4 comes before the normalisation: a dead channel would otherwise send s to
  infinity.
  """
  scale = jnp.maximum(s_x.astype(jnp.float32) ** ratio, 1e-4)
  return scale / jnp.sqrt(scale.max() * scale.min())


def scaled_fake_quantize(w: Array, scale: Array, format: IntegerFormat) -> Array:
  """Q(W diag(s)) diag(1/s): what the scaled layer computes, seen from the unscaled input."""
  return rtn.fake_quantize(w * scale[:, None], format) / scale[:, None]


def search_scale(forward, kernels: dict[str, Array], s_x: Array, settings: AWQSettings):
  """Grid search of the exponent r (equations 4 and 5 of the paper).

  Args:
    forward: {path: kernel} -> mean squared error of the inspected module's output.
    kernels: full-precision kernels of the linears that share the input, each [in, out].
    s_x: activation statistic of that input, [in].
    settings: grid and format.

  Returns:
    (scale [in], loss of every exponent on the grid [scale_grid]). r = 0 is plain rounding, so the
    chosen loss is never above it; ties go to the smaller r.
  """

  def loss(ratio):
    scale = channel_scale(s_x, ratio)
    return forward({p: scaled_fake_quantize(w, scale, settings.format) for p, w in kernels.items()})

  ratios = jnp.arange(settings.scale_grid, dtype=jnp.float32) / settings.scale_grid
  losses = jax.lax.map(loss, ratios)
  best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
  return channel_scale(s_x, ratios[best]), losses


def search_clip(w: Array, x: Array, settings: AWQSettings) -> Array:
  """Grid search of the clipping range of each group and output channel (section 3.2).

  The error of a group is the mean over tokens of (sum_i x_i e_i)^2 with e = Q(clip(w)) - w. As a
  quadratic form e^T G e in the group's Gram matrix G = mean x x^T it costs the same for any number
  of tokens.

  Args:
    w: [in, out], scaled already.
    x: the linear's inputs [..., in], divided by the scale already.
    settings: grid and format.

  Returns:
    The largest |w| to keep, [groups, out].
  """
  x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  x = x[:: max(1, x.shape[0] // settings.clip_tokens)]
  groups = settings.format.num_groups(w.shape)[0]
  x = x.reshape(x.shape[0], groups, -1)
  gram = jnp.einsum("tgi,tgj->gij", x, x, precision="highest") / x.shape[0]
  w = w.astype(jnp.float32).reshape(groups, -1, w.shape[1])
  steps = int(settings.max_shrink * settings.clip_grid)
  shrinks = jnp.array([1 - i / settings.clip_grid for i in range(steps)], jnp.float32)

  def search_group(gram, w):
    """gram: [group, group], w: [group, out] -> [out]."""
    largest = jnp.abs(w).max(axis=0)

    def step(best, shrink):
      limit = largest * shrink
      error = rtn.fake_quantize(jnp.clip(w, -limit, limit), settings.format) - w
      loss = jnp.sum(error * _product(gram, error), axis=0)
      better = loss < best[0]
      return (jnp.where(better, loss, best[0]), jnp.where(better, limit, best[1])), None

    start = (jnp.full(largest.shape, jnp.inf), largest)
    return jax.lax.scan(step, start, shrinks)[0][1]

  # Group by group: a group's weights stay in the cache for all steps.
  return jax.lax.map(lambda group: search_group(*group), (gram, w))


def search_block(
  block: Block, x: Array, context: AttentionContext, config: DecoderConfig, settings: AWQSettings
) -> BlockSearch:
  """Searches scales, then clipping ranges, of one full-precision block.

  Args:
    block: not modified.
    x: the block's inputs in full precision, [samples, seq, dim].
    context: of one row; it serves every sample.
    config: the decoder's.
    settings: what to search.

  Raises:
    UserError: a weight or an input is NaN or infinite (it is named).
  """
  check_finite(block, x)
  inputs = block_inputs(block, x, context)
  graphdef, state = nnx.split(block)
  groups = scaling_groups(config)
  # What a search does not read is left at its default: ablations then share its program.
  of_scales = AWQSettings(
    settings.format,
    scale_grid=settings.scale_grid,
    fixed_ratio=settings.fixed_ratio,
    scale_stat=settings.scale_stat,
  )
  of_clips = AWQSettings(
    settings.format,
    clip_grid=settings.clip_grid,
    max_shrink=settings.max_shrink,
    clip_tokens=settings.clip_tokens,
  )
  scales = {}
  if settings.auto_scale or settings.fixed_ratio is not None:
    for group in groups:
      features = inputs[group.linears[0]]
      scales[group.previous] = search_group_scale(
        graphdef, state, features, context, group, of_scales
      )[0]
  clips = {}
  if settings.mse_range:
    scaled = apply_search(block, BlockSearch(scales, {}), config)
    for group in groups:
      if group.previous in scales:
        # The clip search must see the scaled problem: its inputs are divided by s too.
        for path in group.linears:
          inputs[path] = inputs[path] / scales[group.previous]
    for path, kernel in get_kernels(scaled).items():
      # Clipping q or k changes attention logits, whose error a per-linear loss cannot see.
      if not path.endswith(("q_proj", "k_proj")):
        clips[path] = _search_clip(kernel, inputs[path], of_clips)
  return BlockSearch(scales, clips)


def apply_search(block: Block, search: BlockSearch, config: DecoderConfig) -> Block:
  """A copy of the block with scales folded in and weights clamped; still in full precision.

  Raises:
    UserError: the search result is another model's.
  """
  block = nnx.clone(block)
  groups = scaling_groups(config)
  _check_fits(block, search, groups)
  for group in groups:
    if group.previous in search.scales:
      fold_scale(block, group, search.scales[group.previous])
  kernels = get_kernels(block, list(search.clips))
  set_kernels(block, {path: clamp(w, search.clips[path]) for path, w in kernels.items()})
  return block


def _check_fits(block: Block, search: BlockSearch, groups: list[ScalingGroup]) -> None:
  kernels = get_kernels(block)
  inputs = {g.previous: (kernels[g.linears[0]].shape[0],) for g in groups}
  for name, scale in search.scales.items():
    if inputs.get(name) != scale.shape:
      raise UserError(f"the search result's scale of {name}, {scale.shape}, is not of this model")
  for path, limit in search.clips.items():
    rows, columns = kernels[path].shape if path in kernels else (0, 0)
    if limit.ndim != 2 or not limit.size or limit.shape[1] != columns or rows % limit.shape[0]:
      raise UserError(f"the search result's clip of {path}, {limit.shape}, is not of this model")


def clamp(w: Array, limit: Array) -> Array:
  """clip(w, -limit, limit) per group. w: [in, out], limit: [groups, out]."""
  grouped = w.reshape(limit.shape[0], -1, w.shape[1])
  return jnp.clip(grouped, -limit[:, None], limit[:, None]).reshape(w.shape)


def quantize_block(
  block: Block, search: BlockSearch, config: DecoderConfig, format: IntegerFormat
) -> Block:
  """Applies a search result to a full-precision block, then rounds and packs every linear."""
  return rtn_block(apply_search(block, search, config), format)


def search_model(model: Decoder, tokens: Array, settings: AWQSettings) -> list[BlockSearch]:
  """Searches every block on the full-precision stream. tokens: int32 [samples, seq]."""
  searches = []

  def search(index, block, x, context):
    searches.append(search_block(block, x, context, model.config, settings))
    return block

  quantize_model(model, tokens, search, stream="full_precision")
  return searches


def apply_to_model(model: Decoder, searches: list[BlockSearch], format: IntegerFormat) -> Decoder:
  """A copy of a full-precision model with the search results applied and every linear packed."""
  quantized = nnx.clone(model)
  quantized.blocks = nnx.List(
    [
      quantize_block(b, s, model.config, format)
      for b, s in zip(model.blocks, searches, strict=True)
    ]
  )
  return quantized


def linear_error(w: Array, x: Array):
  """mean((x (new - w))^2) as a function of `new`: the output error of a single linear.

  With more tokens than channels it is evaluated as the quadratic form of the inputs' Gram matrix,
  whose cost does not depend on the number of tokens.

  Args:
    w: [in, out].
    x: [..., in].
  """
  x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  if x.shape[0] <= x.shape[1]:
    return lambda new: jnp.mean(_product(x, new - w) ** 2)
  gram = _product(x.T, x) / (x.shape[0] * w.shape[1])
  return lambda new: jnp.sum((new - w) * _product(gram, new - w))


def unfused(x: Array) -> Array:
  """x (float32) as it is, but computed before what consumes it.

  Fused with a sum over its result, a matrix product is several times slower on the CPU.
  """
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


def _product(a: Array, b: Array) -> Array:
  """a @ b in float32 (accelerators would round the operands to bfloat16), unfused."""
  return unfused(jnp.matmul(a, b, precision="highest"))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def search_group_scale(graphdef, state, x, context, group: ScalingGroup, settings: AWQSettings):
  """`search_scale` of one group of a block that is split into `graphdef` and `state`.

  Args:
    x: the inputs of the group's linears, [samples, seq, in].
    context: of one row; it serves every sample.
  """
  s_x = activation_statistic(x, settings.scale_stat)
  if settings.fixed_ratio is not None:
    return channel_scale(s_x, settings.fixed_ratio), None
  kernels = get_kernels(nnx.merge(graphdef, state), list(group.linears))
  if group.linears == (group.inspect,):
    error = linear_error(kernels[group.inspect], x)
    return search_scale(lambda new: error(new[group.inspect]), kernels, s_x, settings)

  def inspected(kernels):
    block = nnx.merge(graphdef, state)
    set_kernels(block, kernels)
    module = get_module(block, group.inspect)
    return module(x, context)[0] if group.inspect == "attention" else module(x)

  target = inspected(kernels)
  error = lambda new: unfused((inspected(new) - target).astype(jnp.float32))
  mean_squared_error = lambda new: jnp.mean(error(new) ** 2)
  return search_scale(mean_squared_error, kernels, s_x, settings)


_search_clip = functools.partial(jax.jit, static_argnums=2)(search_clip)
