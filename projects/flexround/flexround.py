"""FlexRound: learnable rounding by element-wise division (Lee et al., ICML 2023, arXiv 2306.00317).

    W_hat = s1 (clip(round(W / S) + z, codes) - z),    S = s1 * S2 * s3 * s4               (eq. 2)

Only s1, the grid's step, multiplies: the other factors decide which integer a weight becomes. S2
has one factor per weight, s3 one per output channel, s4 (convolutions) one per input channel. All
start at 1, which is rounding to nearest, and are learned with s1 by reconstructing a block's
output. As d W_hat / d S' = -W / S'^2, a large weight moves further than a small one, and
may move by several integers.

Kernels are [..., in, out] here, the transpose of the paper's.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block
from common.models.surgery import get_module, replace_module
from common.quantization.calibration import Streams, check_finite, run_block
from common.quantization.linear import get_kernels, pack_linears
from common.quantization.quantized_array import IntegerFormat, QuantizedArray, from_codes
from common.quantization.quantized_kernel import quantize_kernels, quantized_kernels
from common.quantization.reconstruction import (
  Learned,
  ReconstructionLog,
  ReconstructionSettings,
  reconstruct,
)
from common.quantization.rtn import spread
from common.quantization.straight_through import clip_ste, round_ste
from projects.flexround.scale_search import initial_scales

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FlexRoundSettings:
  """What is learned, and where it starts.

  Attributes:
    format: the weights' integer format; per tensor (axis=None) or per channel in the paper.
    start: s1 and z from the |err|^2.4 search, or from min-max.
    learn_s1: learn the step (fixed in the paper's first ablation).
    use_s2, use_s3, use_s4: learn these factors; without, they stay 1.
    parametrization: "log" learns the logarithms of the factors, as the official code does, which
      keeps them positive; "linear" the factors themselves, as the paper writes it.

  Raises:
    UserError: nothing is learned, or the parametrization is unknown.
  """

  format: IntegerFormat
  start: Literal["search", "min_max"] = "search"
  learn_s1: bool = True
  use_s2: bool = True
  use_s3: bool = True
  use_s4: bool = True
  parametrization: Literal["log", "linear"] = "log"

  def __post_init__(self):
    if not (self.learn_s1 or self.use_s2 or self.use_s3 or self.use_s4):
      raise UserError(
        "FlexRound has nothing to learn: switch on learn_s1, use_s2, use_s3 or use_s4"
      )
    if self.parametrization not in ("log", "linear"):
      raise UserError(
        f"parametrization={self.parametrization!r} is not supported; supported: log, linear"
      )


class FlexRound(nnx.Module):
  """A kernel rounded by FlexRound; a `weight` of `QuantizedKernel`.

  The step is s1 = s1_initial * factor, so that at the start it is exactly s1_initial.
  """

  def __init__(self, kernel: Array, scales: Array, zero_points: Array, settings: FlexRoundSettings):
    """A kernel [..., in, out] with s1 and z [groups_in, groups_out] to start from."""
    self.kernel = nnx.Param(kernel.astype(jnp.float32))
    self.initial_s1 = nnx.Param(scales.astype(jnp.float32))
    self.zero_points = nnx.Param(zero_points.astype(jnp.float32))
    # An array: kernels of all widths then share compilations.
    self.code_range = nnx.Param(jnp.asarray(settings.format.code_range, jnp.float32))
    self.log = settings.parametrization == "log"
    one = jnp.zeros if self.log else jnp.ones
    factor = lambda used, shape: Learned(one(shape, jnp.float32)) if used else None
    ndim, convolution = kernel.ndim, kernel.ndim > 2
    self.s1 = factor(settings.learn_s1, scales.shape)
    self.s2 = factor(settings.use_s2, kernel.shape)
    self.s3 = factor(settings.use_s3, (1,) * (ndim - 1) + kernel.shape[-1:])
    input_shape = (1,) * (ndim - 2) + (kernel.shape[-2], 1)
    self.s4 = factor(settings.use_s4 and convolution, input_shape)

  def step(self) -> Array:
    """s1, float32 [groups_in, groups_out]."""
    return self.initial_s1[...] * self._product([self.s1])

  def codes(self) -> Array:
    """Codes with the zero point added: integers as float32, in the kernel's shape."""
    w = self.kernel[...]
    division = spread(self.step(), w.shape) * self._product([self.s2, self.s3, self.s4])
    # Adding 0 * W keeps the true quotient where every factor is broadcast, see `rtn.encode`.
    rounded = round_ste(w / (division + 0 * w))
    low, high = self.code_range[...]
    return clip_ste(rounded + spread(self.zero_points[...], w.shape), low, high)

  def __call__(self) -> Array:
    """W_hat, float32 [..., in, out]."""
    shape = self.kernel.shape
    return (self.codes() - spread(self.zero_points[...], shape)) * spread(self.step(), shape)

  def _product(self, factors: list[Learned | None]) -> Array | float:
    used = [factor[...] for factor in factors if factor is not None]
    if self.log:
      return jnp.exp(sum(used)) if used else 1.0
    product = 1.0
    for factor in used:
      product = product * factor
    return product


def pack(weight: FlexRound, format: IntegerFormat) -> QuantizedArray:
  """The plain integer weights of a linear: codes, s1 and z. The division factors are gone."""
  zero_points = None if format.symmetric else weight.zero_points[...]
  return from_codes(weight.codes(), weight.step(), zero_points, format)


class GridShift(NamedTuple):
  """How far learning moved the integers of a kernel away from rounding to nearest.

  Attributes:
    shift: learned minus rounded integers, in the kernel's shape.
    magnitude: |W| in units of the initial s1.
  """

  shift: Array
  magnitude: Array


def grid_shift(weight: FlexRound) -> GridShift:
  """The paper's Figure: which weights moved, and by how many grid steps."""
  w = weight.kernel[...]
  steps = w / (spread(weight.initial_s1[...], w.shape) + 0 * w)
  low, high = weight.code_range[...]
  nearest = jnp.clip(jnp.round(steps) + spread(weight.zero_points[...], w.shape), low, high)
  return GridShift(weight.codes() - nearest, jnp.abs(steps))


def make_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
  """Adam with a cosine to 0, one rate for all factors. Make it once: it is a key of compilations."""
  return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


def feature_sum(student: nnx.Module, output: Array, target: Array, progress: Array) -> Array:
  """The objective || f(X) - f_q(X_q) ||^2, float32 []: summed over features, averaged over the rest.

  (The official code sums over tokens instead: a constant factor, to which Adam is indifferent.)
  """
  del student, progress
  error = output.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.mean(jnp.sum(error**2, axis=-1))


def learn_block(
  block: Block,
  x: Streams,
  context: AttentionContext,
  key: Array,
  settings: FlexRoundSettings,
  reconstruction: ReconstructionSettings,
  optimizer: optax.GradientTransformation,
) -> tuple[Block, ReconstructionLog]:
  """A copy of a transformer block whose linears have learned `FlexRound` kernels.

  Args:
    block: in full precision; not modified.
    x: its inputs in the original and in the quantized model, [samples, seq, dim].
    context: of the block, see `quantize_blocks`.
    key: of the batches and of QDrop.
    settings: what is learned.
    reconstruction: how long; `drop_probability` is QDrop's.
    optimizer: see `make_optimizer`.

  Raises:
    UserError: a weight or an input is NaN or infinite, or the group size does not divide.
  """
  check_finite(block, x.quantized)
  student = nnx.clone(block)
  weights = {}
  for path, kernel in get_kernels(block).items():
    scales, zero_points = initial_scales(kernel, settings.format, settings.start)
    weights[path] = FlexRound(kernel, scales, zero_points, settings)
  quantize_kernels(student, weights)
  targets = run_block(block, x.full_precision, context)
  return reconstruct(
    student,
    x.quantized,
    targets,
    context,
    key,
    reconstruction,
    optimizer,
    full_precision_inputs=x.full_precision,
    objective=feature_sum,
  )


def quantize_block(
  index: int,
  block: Block,
  x: Streams,
  context: AttentionContext,
  *,
  settings: FlexRoundSettings,
  reconstruction: ReconstructionSettings,
  optimizer: optax.GradientTransformation,
  key: Array,
) -> Block:
  """`learn_block`, then packed: the function that `quantize_blocks(..., stream="both")` takes.

  Memory is that of one block: its weights, as many factors S2 and Adam's two moments of them.

  Args:
    index: of the block; every block has its own batches.
    block, x, context, settings, reconstruction, optimizer: see `learn_block`.
    key: of the whole model.
  """
  key = jax.random.fold_in(key, index)
  learned, _ = learn_block(block, x, context, key, settings, reconstruction, optimizer)
  return pack_block(learned, settings.format)


def pack_block(learned: Block, format: IntegerFormat) -> Block:
  """A block with plain packed linears in place of its learned `FlexRound` kernels."""
  packed = nnx.clone(learned)
  weights = _packed_weights(*nnx.split(packed), format)
  for path in weights:
    replace_module(packed, path, get_module(packed, path).layer)
  pack_linears(packed, weights)
  return packed


@functools.partial(jax.jit, static_argnums=(0, 2))
def _packed_weights(graphdef, state, format: IntegerFormat) -> dict[str, QuantizedArray]:
  weights = quantized_kernels(nnx.merge(graphdef, state))
  return {path: pack(weight, format) for path, weight in weights.items()}
