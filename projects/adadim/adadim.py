"""AdaDim: which dimension should a weight's quantization groups run along?

Heo et al., "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of
Large Language Models" (ICLR 2024, arXiv 2309.15531).

Weight-only quantization usually groups consecutive *input* channels of one output channel (per-OC).
A large activation channel needs its weights exact, yet they share every group with other weights.
Grouping consecutive *output* channels of one input channel (per-IC) confines what an outlier
channel needs to groups of its own. Which is better differs from linear to linear, so AdaDim
measures (section 3.3)

  d* = argmin over d in {OC, IC} of || f(X; W) - f(X; Q_d(W)) ||^2,

with round-to-nearest Q_d, and then quantizes by RTN or by GPTQ along d*. Weights are [in, out]
here, the transpose of the paper's.
"""

import dataclasses
import functools
from collections.abc import Container, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block, Decoder
from common.models.surgery import get_module, linear_paths
from common.quantization import rtn
from common.quantization.awq import unfused
from common.quantization.calibration import (
  GPTQ_STAGES,
  block_hessians,
  block_inputs,
  check_finite,
  gptq_weights,
  passes,
  quantize_model,
  token_mask,
)
from common.quantization.checkpoint import check_format
from common.quantization.gptq import gptq
from common.quantization.linear import get_kernels, pack_linears, set_kernels
from common.quantization.quantized_array import IntegerFormat, QuantizedArray
from projects.adadim.gptq_per_ic import gptq_per_ic

Array = jax.Array

# `IntegerFormat.axis`: groups along the input, groups along the output.
PER_OC, PER_IC = 0, 1

# The module whose output tells an axis's error. Other linears are inspected themselves.
INSPECTED_MODULE = {
  "attention.q_proj": "attention",
  "attention.k_proj": "attention",
  "attention.v_proj": "attention",
  "mlp.gate_proj": "mlp",
  "mlp.up_proj": "mlp",
}

# Linears whose inputs have outliers in large models (the paper's preliminary study).
OUTLIER_LINEARS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.down_proj")


@dataclasses.dataclass(frozen=True)
class AdaDimSettings:
  """How to quantize.

  Attributes:
    format: bits and group size of the weights; its axis is replaced by the chosen one.
    axis: "adaptive" measures both for every linear; "heuristic" is per-IC for q, k, v and down and
      per-OC for the rest; "per_oc" and "per_ic" are the same for all.
    algorithm: "rtn" or "gptq". The choice of the axis is by RTN in either case.
    reference: the output that a choice is compared with, see `axis_errors`.
    act_order: GPTQ takes input channels by descending diag(H). Per-OC groups then have static
      scales; per-IC scales are computed on the fly in any order.
    damping: of GPTQ's Hessian, as a fraction of its mean diagonal; raised where that is singular.

  Raises:
    UserError: a value is unknown.
  """

  format: IntegerFormat
  axis: Literal["adaptive", "heuristic", "per_oc", "per_ic"] = "adaptive"
  algorithm: Literal["rtn", "gptq"] = "rtn"
  reference: Literal["fp", "code"] = "fp"
  act_order: bool = True
  damping: float = 0.01

  def __post_init__(self):
    choices = {
      "axis": ("adaptive", "heuristic", "per_oc", "per_ic"),
      "algorithm": ("rtn", "gptq"),
      "reference": ("fp", "code"),
    }
    for name, supported in choices.items():
      if (value := getattr(self, name)) not in supported:
        raise UserError(f"{name}={value!r} is not supported; supported: {', '.join(supported)}")

  @property
  def stream(self) -> Literal["full_precision", "quantized"]:
    """The calibration stream of `quantize_blocks`."""
    return "quantized" if self.algorithm == "gptq" else "full_precision"


def along(format: IntegerFormat, axis: int) -> IntegerFormat:
  """The format with its groups along `axis`."""
  return dataclasses.replace(format, axis=axis)


def axis_candidates(w: Array, format: IntegerFormat) -> Array:
  """Q_OC(w) and Q_IC(w), float32 [2, in, out]. w: [in, out]."""
  return jnp.stack([rtn.fake_quantize(w, along(format, axis)) for axis in (PER_OC, PER_IC)])


def output_error(change: Array, h: Array) -> Array:
  """Mean of (x change)^2 over tokens and outputs: the linear's own output error.

  Args:
    change: of the weights, [in, out].
    h: the inputs' Hessian 2 mean(x x^T), [in, in]; the error is tr(change^T h change) / (2 out).
  """
  product = unfused(jnp.matmul(h, change, precision="highest"))
  return jnp.sum(change * product) / (2 * change.shape[1])


def axis_errors(
  block: Block,
  x: Array,
  context: AttentionContext,
  format: IntegerFormat,
  *,
  reference: Literal["fp", "code"] = "fp",
) -> dict[str, Array]:
  """Mean squared error of each linear's inspected output with RTN along either axis.

  Args:
    block: full precision, not modified.
    x: the block's inputs, [samples, seq, dim].
    context: of one row, or of every sample.
    format: of the weights.
    reference: "fp" leaves every other linear in full precision (the paper's equation). "code"
      quantizes earlier siblings (q before k before v, gate before up) along their chosen axes
      first, in the reference output too, as the official code does.

  Returns:
    {path: float32 [2]}, per-OC then per-IC.
  """
  return _axis_errors(*nnx.split(block), x, context, format, reference)


def choose_axes(errors: Mapping[str, Array]) -> dict[str, int]:
  """d* of each linear: per-IC where its error is strictly below per-OC's."""
  return {path: PER_IC if e[PER_IC] < e[PER_OC] else PER_OC for path, e in errors.items()}


def fixed_axes(block: Block, axis: Literal["heuristic", "per_oc", "per_ic"]) -> dict[str, int]:
  """The axes that need no calibration."""
  per_ic = {"heuristic": OUTLIER_LINEARS, "per_oc": (), "per_ic": linear_paths(block)}[axis]
  return {path: PER_IC if path in per_ic else PER_OC for path in linear_paths(block)}


def module_order(paths: Container[str]) -> list[str]:
  """The linears in the order in which a block runs them."""
  return [path for stage in GPTQ_STAGES for path in stage if path in paths]


def rtn_weights(
  block: Block, axes: Mapping[str, int], format: IntegerFormat
) -> dict[str, QuantizedArray]:
  """Every linear rounded to nearest along its axis, by path."""
  return {p: _rtn(kernel, along(format, axes[p])) for p, kernel in get_kernels(block).items()}


def quantize_weights(
  block: Block, x: Array, context: AttentionContext, settings: AdaDimSettings
) -> tuple[dict[str, QuantizedArray], dict[str, Array] | None]:
  """The block's packed weights, and the `axis_errors` of an adaptive choice (None of another).

  Raises:
    UserError: a weight or the calibration inputs have a NaN or infinity (the tensor is named), or
      the group size does not divide a dimension.
  """
  check_finite(block, x)
  errors = None
  if settings.axis == "adaptive":
    errors = axis_errors(block, x, context, settings.format, reference=settings.reference)
    axes = choose_axes(jax.device_get(errors))
  else:
    axes = fixed_axes(block, settings.axis)
  if settings.algorithm == "rtn":
    return rtn_weights(block, axes, settings.format), errors

  def solve(path, kernel, h, damping):
    algorithm = gptq_per_ic if axes[path] == PER_IC else gptq
    format = along(settings.format, axes[path])
    return algorithm(kernel, h, format, damping=damping, act_order=settings.act_order)

  options = {"damping": settings.damping, "act_order": settings.act_order}
  return gptq_weights(block, x, context, solve, **options), errors


def quantize_block(
  block: Block, x: Array, context: AttentionContext, settings: AdaDimSettings
) -> Block:
  """The block with its linears packed: what `quantize_blocks` needs, one block at a time."""
  weights, _ = quantize_weights(block, x, context, settings)
  block = nnx.clone(block)
  pack_linears(block, weights)
  return block


def quantize(model: Decoder, tokens: Array, settings: AdaDimSettings) -> Decoder:
  """A copy of an in-memory model with every linear of its blocks packed.

  Args:
    model: full precision, not modified.
    tokens: calibration samples, int32 [samples, seq].
    settings: how.

  Raises:
    UserError: the group size does not divide a dimension that may be grouped, or what
      `quantize_weights` raises.
  """
  check_sizes(model, settings)
  block = lambda index, block, x, context: quantize_block(block, x, context, settings)
  return quantize_model(model, tokens, block, stream=settings.stream)


def check_sizes(model: Decoder, settings: AdaDimSettings) -> None:
  """Checks that the group size divides the dimensions that may be grouped, before any work.

  Raises:
    UserError: it does not (the linear is named).
  """
  axes = {"per_oc": (PER_OC,), "per_ic": (PER_IC,)}.get(settings.axis, (PER_OC, PER_IC))
  for axis in axes:
    check_format(model.config, along(settings.format, axis))


def _module_errors(graphdef, state, kernels, path, candidates, features, context) -> Array:
  """Mean squared error of the inspected module with each candidate kernel, [candidates].

  Args:
    kernels: of the block's linears in the reference.
    features: the inspected module's inputs, [samples, seq, dim].
  """
  name = INSPECTED_MODULE[path]

  def inspected(kernel, x, context):
    block = nnx.merge(graphdef, state)
    set_kernels(block, kernels | {path: kernel})
    module = get_module(block, name)
    return module(x, context)[0] if name == "attention" else module(x)

  def add(total, rows):
    target = inspected(kernels[path], *rows).astype(jnp.float32)
    squares = lambda kernel: (inspected(kernel, *rows) - target) ** 2 * token_mask(*rows)
    # A module's outputs are as wide as its inputs.
    return total + jax.lax.map(lambda kernel: jnp.sum(squares(kernel)), candidates), None

  zeros = jnp.zeros(len(candidates), jnp.float32)
  total, _ = jax.lax.scan(add, zeros, passes(features, context))
  return total / (token_mask(features, context).sum() * features.shape[-1])


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _axis_errors(graphdef, state, x, context, format, reference):
  block = nnx.merge(graphdef, state)
  kernels = get_kernels(block)
  order = module_order(kernels)
  inputs = block_inputs(block, x, context)
  own_output = [path for path in order if path not in INSPECTED_MODULE]
  hessians = block_hessians(block, x, context, own_output)
  errors, in_reference = {}, dict(kernels)
  for path in order:
    candidates = axis_candidates(kernels[path], format)
    if path in own_output:
      changes, h = candidates - kernels[path].astype(jnp.float32), hessians[path]
      errors[path] = jax.lax.map(functools.partial(output_error, h=h), changes)
    else:
      candidates = candidates.astype(kernels[path].dtype)
      errors[path] = _module_errors(
        graphdef, state, in_reference, path, candidates, inputs[path], context
      )
    if reference == "code":
      chosen = (errors[path][PER_IC] < errors[path][PER_OC]).astype(int)
      in_reference[path] = candidates[chosen]
  return errors


_rtn = jax.jit(rtn.quantize, static_argnums=1)
