"""ZeroQuant-V2: post-training quantization of language models (Yao et al., arXiv 2303.08302).

Four ways to round a block's weights, from the cheapest to the dearest (section 4):

  RTN        round to nearest
  GPTQ       a linear at a time; what is not yet rounded absorbs the error (Frantar et al. 2023)
  ZQ-Local   a linear at a time; its weights are trained, through the rounding, to reproduce the
             output of the original linear
  ZQ-Global  the same for a whole block (ZeroQuant's layer-by-layer knowledge distillation)

      min over W'  || f(x; W) - f(x; Q(W')) ||^2,    W' = W at the start,    dQ/dW' = 1

with x the input after the blocks and linears that are quantized already. Weights have a scale per
output channel, or per block of inputs (fine-grained quantization, FGQ: `format.group_size`);
activations are rounded per token. LoRC (`low_rank.py`) adds a matrix of rank m to any of them.

Kernels are [in, out], the transpose of the paper's.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block
from common.models.surgery import get_module
from common.quantization import rtn
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.calibration import (
  GPTQ_STAGES,
  block_hessians,
  block_inputs,
  check_finite,
  run_block,
)
from common.quantization.gptq import gptq, stable_damping
from common.quantization.linear import get_kernels, pack_linears, set_kernels
from common.quantization.low_rank import (
  LowRank,
  check_rank,
  compensate_linears,
  low_rank,
  quantize_factors,
)
from common.quantization.quantized_array import IntegerFormat, QuantizedArray, from_codes
from common.quantization.quantized_kernel import QuantizedKernel, quantize_kernels
from common.quantization.reconstruction import (
  Learned,
  ReconstructionSettings,
  Run,
  reconstruct,
  run_transformer_block,
)
from common.quantization.straight_through import straight_through

Array = jax.Array

METHODS = ("RTN", "GPTQ", "ZQ-Local", "ZQ-Global")
SCALE_RULES = ("standard", "deepspeed")


@dataclasses.dataclass(frozen=True)
class ZeroQuantSettings:
  """How a block is quantized.

  Attributes:
    method: of `METHODS`.
    format: of the weights; `group_size` -1 is one scale per output channel ("row"), else FGQ.
    scale_rule: "standard", or the ranges of DeepSpeed's ZeroQuant-V1 code (see `weight_scales`).
    activations: format of the linears' inputs; None leaves them alone.
    inputs: what GPTQ and ZQ-* see: the blocks' inputs after the quantized blocks, or the original
      model's. Its name is that of the stream of `quantize_blocks`.
    damping: GPTQ's, as a fraction of the Hessian's mean diagonal.
    learning_rates: ZQ-*'s sweep; of every unit the rate with the least error is kept.
    distillation: ZQ-*'s steps and batches.
    rank: LoRC's m; 0 leaves it out.
    factor_bits: of LoRC's factors, 16 (floating point) or 8 (integers).

  Raises:
    UserError: a value is outside the supported set.
  """

  method: str
  format: IntegerFormat
  scale_rule: str = "standard"
  activations: ActivationFormat | None = None
  inputs: Literal["quantized", "full_precision"] = "quantized"
  damping: float = 0.01
  learning_rates: tuple[float, ...] = (1e-3,)
  distillation: ReconstructionSettings = ReconstructionSettings(100, 4)
  rank: int = 0
  factor_bits: int = 16

  def __post_init__(self):
    def check(name, supported):
      if getattr(self, name) not in supported:
        expected = ", ".join(map(str, supported))
        raise UserError(f"{name}={getattr(self, name)!r} is not supported; supported: {expected}")

    check("method", METHODS)
    check("scale_rule", SCALE_RULES)
    check("inputs", ("quantized", "full_precision"))
    check("factor_bits", (8, 16))
    if self.format.axis != 0:
      raise UserError(f"{self.format} is not grouped along the input; use axis=0")
    if self.method == "GPTQ" and self.scale_rule != "standard":
      raise UserError("GPTQ has scale_rule='standard' only; use RTN, ZQ-Local or ZQ-Global")
    if self.method.startswith("ZQ") and not self.learning_rates:
      raise UserError(f"{self.method} needs at least one learning rate; learning_rates is empty")


def weight_scales(
  w: Array, format: IntegerFormat, scale_rule: str = "standard"
) -> tuple[Array, Array | None]:
  """Scales and zero points, [groups, out]; see `rtn.range_to_scales` for the standard rule.

  DeepSpeed's divides by 2^bits where the standard one divides by 2^bits - 1:
    symmetric   scale = 2 max|w| / 2^bits
    asymmetric  scale = (max w - min w) / 2^bits,  zero = -round(min w / scale)
  so its largest weights are clipped.

  Args:
    w: float32 [in, out].
    format: the integer format.
    scale_rule: "standard" or "deepspeed".

  Raises:
    UserError: the group size does not divide the input dimension.
  """
  low, high = rtn.min_max_range(w, format)
  if scale_rule == "standard":
    return rtn.range_to_scales(low, high, format)
  if format.symmetric:
    reach = 2 * jnp.maximum(jnp.abs(low), jnp.abs(high))
  else:
    reach = high - low
  # A power of two: exact, however the compiler divides.
  scales = (jnp.maximum(reach, 1e-5) * 2.0**-format.bits).astype(format.scale_dtype)
  if format.symmetric:
    return scales, None
  return scales, jnp.clip(-jnp.round(low / scales.astype(jnp.float32)), *format.code_range)


def quantize_weight(
  w: Array, format: IntegerFormat, scale_rule: str = "standard"
) -> QuantizedArray:
  """Rounds a weight [in, out] to nearest and packs it."""
  w = w.astype(jnp.float32)
  scales, zero_points = weight_scales(w, format, scale_rule)
  return from_codes(rtn.encode(w, scales, zero_points, format), scales, zero_points, format)


def fake_quantize_weight(w: Array, format: IntegerFormat, scale_rule: str = "standard") -> Array:
  """quantize_weight(w).dequantize() without packing, float32 [in, out]."""
  w = w.astype(jnp.float32)
  scales, zero_points = weight_scales(w, format, scale_rule)
  codes = rtn.encode(w, scales, zero_points, format)
  return rtn.decode(codes, scales, zero_points, format)


class StraightThroughKernel(nnx.Module):
  """Q(W'), W' = W + learning_rate * change; the gradient by W' is that of the rounded kernel.

  Adam's steps do not depend on the size of the gradient: with the rate in front of `change`, Adam
  of rate 1 does what Adam of that rate does to W', and one compilation serves a sweep.
  """

  def __init__(self, kernel: Array, learning_rate: Array, format: IntegerFormat, scale_rule: str):
    self.kernel, self.learning_rate = nnx.Param(kernel), nnx.Param(learning_rate)
    self.change = Learned(jnp.zeros(kernel.shape, jnp.float32))
    self.format, self.scale_rule = format, scale_rule

  def trained(self) -> Array:
    """W', float32 [in, out]."""
    return self.kernel[...].astype(jnp.float32) + self.learning_rate[...] * self.change[...]

  def __call__(self) -> Array:
    w = self.trained()
    return straight_through(w, fake_quantize_weight(w, self.format, self.scale_rule))


@functools.cache
def optimizer_of(num_steps: int) -> optax.GradientTransformation:
  """Adam with the rate 1, falling linearly to 0, for `StraightThroughKernel.change`.

  The same object for the same number of steps: a key of compilations. Its epsilon meets gradients
  that carry the learning rate as a factor, so it is smaller than usual.
  """
  return optax.adam(optax.linear_schedule(1.0, 0.0, num_steps), eps=1e-12)


class SingleLinear(nnx.Module):
  """ZQ-Local's unit: a linear by itself."""

  def __init__(self, linear: nnx.Linear):
    self.linear = linear


def run_single_linear(unit: SingleLinear, x: Array, context) -> Array:
  """Output of a `SingleLinear`."""
  del context
  return unit.linear(x)


def distill(
  unit: nnx.Module,
  x: Array,
  targets: Array,
  context,
  key: Array,
  settings: ZeroQuantSettings,
  *,
  run: Run = run_transformer_block,
) -> tuple[dict[str, QuantizedArray], Array]:
  """Trains a unit's weights through their rounding until its output is the target.

  Every learning rate starts from the original weights and sees the same batches. A run that ends
  above the error of rounding to nearest counts as not run.

  Args:
    unit: a block, or a `SingleLinear`; in full precision.
    x: its inputs, [samples, seq, in].
    targets: the original unit's outputs on x, [samples, seq, out].
    context: passed to `run`.
    key: of the batches.
    settings: rates, steps and formats.
    run: how the unit is called.

  Returns:
    ({path: packed weight}, mean squared error of every rate [1 + rates], that of RTN first).
  """
  rates = jnp.asarray(settings.learning_rates, jnp.float32)
  # Not all settings: a program serves every rank and rate.
  formats = settings.format, settings.scale_rule, settings.activations
  arguments = *nnx.split(unit), x, targets, context, key, rates
  return _distill(*arguments, *formats, settings.distillation, run)


@functools.partial(jax.jit, static_argnums=(0, 7, 8, 9, 10, 11))
def _distill(
  graphdef,
  state,
  x,
  targets,
  context,
  key,
  rates,
  format,
  scale_rule,
  activations,
  distillation,
  run,
):
  kernels = get_kernels(nnx.merge(graphdef, state))

  def train(rate):
    student = nnx.merge(graphdef, state)
    kernel = lambda w: StraightThroughKernel(w, rate, format, scale_rule)
    quantize_kernels(student, {path: kernel(w) for path, w in kernels.items()})
    if activations is not None:
      quantize_inputs(student, list(kernels), activations)
    optimizer = optimizer_of(distillation.num_steps)
    student, log = reconstruct(student, x, targets, context, key, distillation, optimizer, run=run)
    layers = {path: get_module(student, path) for path in kernels}
    rounded = lambda layer: layer if isinstance(layer, QuantizedKernel) else layer.layer
    return {path: rounded(layer).weight.trained() for path, layer in layers.items()}, log

  trained, log = jax.lax.map(train, rates)
  best = jnp.argmin(log.after)
  errors = jnp.concatenate([log.before[:1], log.after])
  return {p: quantize_weight(w[best], format, scale_rule) for p, w in trained.items()}, errors


def quantize_weights(
  index: int,
  block: Block,
  x: Array | None,
  context: AttentionContext | None,
  key: Array | None,
  settings: ZeroQuantSettings,
) -> dict[str, QuantizedArray]:
  """Packed weights of a block's linears by any of `METHODS`, {path: [in, out]}.

  Args:
    index: of the block in the model; every block draws its own batches.
    block: in full precision; not modified.
    x: its inputs, [samples, seq, dim], of the stream `settings.inputs`.
    context: of one row; it serves every sample.
    key: of the batches of ZQ-*, for the whole model. RTN takes None for all three.
    settings: how.

  Raises:
    UserError: a weight or an input is not finite, a size does not divide, or the block has linears
      that GPTQ and ZQ-Local do not know.
  """
  kernels = get_kernels(block)
  if not kernels:
    raise UserError(f"block {index} has no full-precision linears; start from the original model")
  check_finite(block, x)
  for kernel in kernels.values():
    check_rank(settings.rank, kernel.shape)
    settings.format.num_groups(kernel.shape)
  if settings.method == "RTN":
    return _round_to_nearest(kernels, settings.format, settings.scale_rule)
  key = jax.random.fold_in(key, index)
  if settings.method == "ZQ-Global":
    return distill(block, x, run_block(block, x, context), context, key, settings)[0]
  return _stage_by_stage(block, x, context, key, settings)


def _stage_by_stage(block, x, context, key, settings) -> dict[str, QuantizedArray]:
  """GPTQ and ZQ-Local: a linear sees what those before it in the block do to its input."""
  kernels = get_kernels(block)
  if unknown := sorted(set(kernels) - {path for stage in GPTQ_STAGES for path in stage}):
    raise UserError(
      f"{settings.method} does not know the linears {', '.join(unknown)}; supported are those of "
      "the decoder's blocks (use RTN or ZQ-Global)"
    )
  student, weights = nnx.clone(block), {}
  for stage in GPTQ_STAGES:
    paths = [path for path in stage if path in kernels]
    seen = student if settings.inputs == "quantized" else block
    if settings.method == "GPTQ":
      for path, hessian in block_hessians(seen, x, context, paths).items():
        damping = stable_damping(hessian, settings.damping, False)
        weights[path] = gptq(kernels[path], hessian, settings.format, damping=damping)
    else:
      inputs = block_inputs(seen, x, context)
      for path in paths:
        key, use = jax.random.split(key)
        unit = SingleLinear(get_module(block, path))
        targets = _run_single_linear(*nnx.split(unit), inputs[path])
        trained, _ = distill(
          unit, inputs[path], targets, None, use, settings, run=run_single_linear
        )
        weights[path] = trained["linear"]
    set_kernels(student, {p: weights[p].dequantize(kernels[p].dtype) for p in paths})
  return weights


def compensate(
  kernels: dict[str, Array], weights: dict[str, QuantizedArray], rank: int, factor_bits: int = 16
) -> dict[str, LowRank]:
  """LoRC's factors of every linear, {path: factors of E = W - W_q}.

  Args:
    kernels: original weights, [in, out].
    weights: the same, quantized by any method.
    rank: m.
    factor_bits: 16, float16 factors, or 8, integer codes.
  """
  return _compensate(kernels, weights, rank, factor_bits)


def quantize_block(
  index: int,
  block: Block,
  x: Array,
  context: AttentionContext,
  *,
  key: Array,
  settings: ZeroQuantSettings,
) -> Block:
  """The block quantized, packed and compensated: a `quantize_block` of `quantize_blocks`.

  The stream to calibrate on is `settings.inputs`; see `quantize_weights` for the rest. With LoRC,
  the next block sees the compensated output.
  """
  weights = quantize_weights(index, block, x, context, key, settings)
  return pack_block(block, weights, settings)


def pack_block(
  block: Block, weights: dict[str, QuantizedArray], settings: ZeroQuantSettings
) -> Block:
  """The block with packed weights, LoRC's second paths and rounded inputs, as `settings` say."""
  packed, kernels = nnx.clone(block), get_kernels(block)
  pack_linears(packed, weights)
  if settings.rank:
    compensate_linears(packed, compensate(kernels, weights, settings.rank, settings.factor_bits))
  if settings.activations is not None:
    quantize_inputs(packed, list(kernels), settings.activations)
  return packed


@functools.partial(jax.jit, static_argnums=(1, 2))
def _round_to_nearest(kernels, format, scale_rule):
  return {path: quantize_weight(w, format, scale_rule) for path, w in kernels.items()}


@functools.partial(jax.jit, static_argnums=0)
def _run_single_linear(graphdef, state, x):
  return run_single_linear(nnx.merge(graphdef, state), x, None)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compensate(kernels, weights, rank, factor_bits):
  factors = {}
  for path, kernel in kernels.items():
    found = low_rank(kernel.astype(jnp.float32) - weights[path].dequantize(), rank)
    half = LowRank(found.a.astype(jnp.float16), found.b.astype(jnp.float16))
    factors[path] = quantize_factors(found) if factor_bits == 8 else half
  return factors
