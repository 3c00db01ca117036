"""The shift and the scale of Outlier Suppression+ (Wei et al., EMNLP 2023, arXiv 2304.09145).

Activations X [tokens, in] that a norm produces have a few channels that are large, and lie to one
side of zero. With a shift z and a scale s per channel,

  X W + b = X~ (diag(s) W) + (b + z W),     X~ = (X - z) / s        (section 4.1)
  z_j = (max X_j + min X_j) / 2                                     (section 4.2)
  s_j = max(1, max X_j / t, min X_j / -t)     of the shifted X      (section 4.2)
  t*  = argmin_t  mean over tokens of || f(Q(X~), Q(diag(s) W)) - f(X, W) ||^2

so that the shift is in closed form and a single threshold t decides the scales of all channels. f is
what the next modules compute: attention for q, k, v, a product or a gated product otherwise.

Pure functions of arrays: kernels are [in, out], the transpose of the paper's.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext
from common.models.surgery import record_inputs
from common.quantization import rtn
from common.quantization.activations import SMALLEST_RANGE, ActivationFormat, fake_quantize
from common.quantization.equivalent import ScalingGroup
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.quantized_array import IntegerFormat, QuantizedArray, from_codes

Array = jax.Array

# (x [..., in], {path: kernel [in, out]}) -> the next modules' output [..., features].
Outputs = Callable[[Array, dict[str, Array]], Array]

# The paper's grid of thresholds: at least 100, and finer than 0.5.
MIN_CANDIDATES, LARGEST_STEP = 100, 0.5

# In an asymmetric range (-t, t) the zero point and the codes of -t and t are ties, at half of
# 2^bits - 1. Exact arithmetic rounds them to the even side, away from 0; a compiler's reordering of
# t / (2 t / (2^bits - 1)) goes either way from one threshold to the next, and the loss with it. A
# hair less on the right settles all of them.
TIE_BREAK = 1 - 2.0**-20


class ShiftScale(nnx.Module):
  """x~ = (x - z) / s, and back, where no norm can take them.

  Attributes:
    shift, scale: z and s, [in].
  """

  def __init__(self, shift: Array, scale: Array):
    self.shift, self.scale = nnx.Param(shift), nnx.Param(scale)

  def __call__(self, x: Array) -> Array:
    """x: [..., in] -> x~ in x's dtype."""
    return ((x - self.shift[...]) / self.scale[...]).astype(x.dtype)

  def undo(self, x: Array) -> Array:
    """x~: [..., in] -> x in x~'s dtype."""
    return (x * self.scale[...] + self.shift[...]).astype(x.dtype)


class ScaleSearch(NamedTuple):
  """The best threshold.

  Attributes:
    scale: s of every channel, float32 [in]; at least 1.
    threshold: t, float32 [].
    loss: of that threshold, [].
    loss_unscaled: of the largest threshold, which scales nothing, [].
  """

  scale: Array
  threshold: Array
  loss: Array
  loss_unscaled: Array


def channel_range(x: Array) -> tuple[Array, Array]:
  """Smallest and largest value of each channel, float32 [in] each. x: [..., in]."""
  x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
  return x.min(axis=0), x.max(axis=0)


def channel_shift(x: Array, statistic: Literal["center", "mean", "median"] = "center") -> Array:
  """z, float32 [in]: the centre of each channel's range, or another centre to compare with it.

  Args:
    x: [..., in].
    statistic: which centre.

  Raises:
    UserError: there is no such statistic.
  """
  if statistic == "center":
    low, high = channel_range(x)
    return (low + high) / 2
  x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
  if statistic == "mean":
    return x.mean(axis=0)
  if statistic == "median":
    return jnp.median(x, axis=0)
  raise UserError(f"shift={statistic!r} is not supported; supported: center, mean, median, none")


def threshold_scale(low: Array, high: Array, threshold: Array) -> Array:
  """s [in]: channels that leave [-t, t] are shrunk until they touch it, the others keep s = 1.

  Args:
    low, high: the range of each (shifted) channel, [in].
    threshold: t > 0, [].
  """
  return jnp.maximum(1.0, jnp.maximum(high / threshold, low / -threshold))


def quantization_loss(
  outputs: Outputs,
  target: Array,
  x: Array,
  kernels: dict[str, Array],
  mask: Array,
  scale: Array,
  threshold: Array,
  weights: IntegerFormat,
  activations: ActivationFormat,
) -> Array:
  """Mean over tokens of the squared change of the next modules' output, [].

  Both quantized operands are scaled back, so that `outputs` sees the unscaled problem.

  Args:
    outputs: f.
    target: f(x, kernels), [..., features].
    x: shifted activations, [..., in].
    kernels: of the linears that read x.
    mask: 1 for tokens that count and 0 for padding, [..., 1].
    scale: s, [in].
    threshold: t, [], the range of static quantizers: that of X~ with this scale.
    weights, activations: the final formats.
  """
  static = {}
  if activations.granularity == "per_tensor":
    static = {"low": -threshold, "high": TIE_BREAK * threshold}
  rounded = fake_quantize(x / scale, activations, **static) * scale
  column = scale[:, None]
  rounded_kernels = {
    p: fake_quantize_weights(w * column, weights) / column for p, w in kernels.items()
  }
  error = (outputs(rounded, rounded_kernels) - target).astype(jnp.float32)
  return jnp.sum(jnp.sum(error**2, axis=-1, keepdims=True) * mask) / mask.sum()


def search_scale(
  outputs: Outputs,
  x: Array,
  kernels: dict[str, Array],
  mask: Array,
  low: Array,
  high: Array,
  weights: IntegerFormat,
  activations: ActivationFormat,
  *,
  lower_bound: float = 1.0,
  lower_fraction: float = 1.0,
) -> ScaleSearch:
  """Grid search of the threshold, from the largest activation U downwards (section 4.3).

  max(100, U / 0.5) equal steps lead to the lower end, min(lower_bound, lower_fraction U). The first
  of equal losses wins, and so the larger threshold; a loss that is no number never does.

  Args:
    outputs, x, kernels, mask, weights, activations: as of `quantization_loss`.
    low, high: range of each shifted channel over all calibration tokens, [in]; x may be a part.
    lower_bound: 1.0 for OPT and BLOOM and 0.1 for Llama in the paper.
    lower_fraction: lets the search of a model with small activations end below `lower_bound`.
  """
  target = outputs(x, kernels)
  largest = jnp.maximum(jnp.maximum(high.max(), -low.min()), SMALLEST_RANGE)
  lowest = jnp.minimum(lower_bound, lower_fraction * largest)
  count = jnp.maximum(MIN_CANDIDATES, jnp.floor(largest / LARGEST_STEP).astype(jnp.int32))
  step = (largest - lowest) / count

  def loss_of(threshold):
    scale = threshold_scale(low, high, threshold)
    return quantization_loss(
      outputs, target, x, kernels, mask, scale, threshold, weights, activations
    )

  def try_threshold(i, best):
    threshold = largest - i * step
    loss = loss_of(threshold)
    # A NaN compares false.
    better = loss < best[0]
    return jnp.where(better, loss, best[0]), jnp.where(better, threshold, best[1])

  unscaled = loss_of(largest)
  # The number of candidates depends on the data: a loop, compiled once.
  loss, threshold = jax.lax.fori_loop(1, count + 1, try_threshold, (unscaled, largest))
  return ScaleSearch(threshold_scale(low, high, threshold), threshold, loss, unscaled)


def linear_outputs(x: Array, kernels: dict[str, Array]) -> Array:
  """The products of all linears side by side: biases cancel in the loss."""
  products = [jnp.matmul(x, w, precision="highest") for w in kernels.values()]
  return jnp.concatenate(products, axis=-1)


def tensor_outputs(x: Array, kernels: dict[str, Array]) -> Array:
  """The tensor itself: a loss that does not look at what reads it (an ablation of the paper)."""
  del kernels
  return x


def group_outputs(
  graphdef, state, group: ScalingGroup, context: AttentionContext
) -> tuple[Outputs, dict[str, Array]]:
  """What a search's loss looks at, and the kernels of the group's linears.

  Of q, k and v it is attention before o_proj; of gate and up act(gate) up; the product otherwise.

  Args:
    graphdef, state: of the block's attention or MLP.
    group: which.
    context: of the samples.
  """
  names = {path: path.partition(".")[2] for path in group.linears}
  found = get_kernels(nnx.merge(graphdef, state), list(names.values()))
  kernels = {path: found[name].astype(jnp.float32) for path, name in names.items()}
  if group.inspect in group.linears:
    return linear_outputs, kernels
  attention = group.inspect == "attention"
  last = "o_proj" if attention else "down_proj"

  def module_outputs(x, kernels):
    module = nnx.merge(graphdef, state)
    set_kernels(module, {names[path]: kernel for path, kernel in kernels.items()})
    run = lambda module: module(x, context) if attention else module(x)
    return record_inputs(module, [last], run)[1][last]

  return module_outputs, kernels


def weight_codes(w: Array, format: IntegerFormat) -> tuple[Array, Array, Array | None]:
  """Codes, scales and zero points of weights [in, out] in a min-max range that contains 0."""
  w = w.astype(jnp.float32)
  ends = rtn.min_max_range(w, format, include_zero=True)
  scales, zero_points = rtn.range_to_scales(*ends, format)
  return rtn.encode(w, scales, zero_points, format), scales, zero_points


def quantize_weights(w: Array, format: IntegerFormat) -> QuantizedArray:
  """Weights [in, out], packed."""
  return from_codes(*weight_codes(w, format), format)


def fake_quantize_weights(w: Array, format: IntegerFormat) -> Array:
  """quantize_weights(w).dequantize() without packing, float32 [in, out]."""
  return rtn.decode(*weight_codes(w, format), format)
