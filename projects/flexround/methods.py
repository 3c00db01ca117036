"""FlexRound and its baselines under one protocol: a unit of a network in, its quantized copy out.

A unit is a transformer block, a residual block, or a single layer. Whatever the method, it starts
from the same scales, sees the same inputs, and is kept only if its error on the calibration set is
below that of rounding to nearest.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.surgery import get_module, record_inputs, replace_module
from common.quantization import rtn
from common.quantization.activations import ActivationFormat
from common.quantization.adaquant import AdaQuant
from common.quantization.adaround import AdaRound, adaround_objective, harden
from common.quantization.calibration import Streams, check_finite, run_block
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import (
  freeze_kernels,
  quantize_kernels,
  quantized_kernels,
)
from common.quantization.reconstruction import (
  OptimizerOfRate,
  ReconstructionSettings,
  Run,
  reconstruct,
  run_transformer_block,
)
from projects.flexround.activation_quantizer import freeze_inputs, learn_inputs
from projects.flexround.flexround import (
  FlexRound,
  FlexRoundSettings,
  GridShift,
  feature_sum,
  grid_shift,
  make_optimizer,
)
from projects.flexround.scale_search import initial_scales

Array = jax.Array

# What FlexRound's ablations leave out.
ABLATIONS = {
  "FlexRound": {},
  "FlexRound, no s3, s4": {"use_s3": False, "use_s4": False},
  "FlexRound, fixed s1": {"learn_s1": False},
}
METHODS = ("RTN", "AdaRound", "AdaQuant", *ABLATIONS)

# {path of a layer: (scales, zero points)}
Grids = dict[str, tuple[Array, Array]]

# How many samples one forward pass of a unit takes: bounds its temporary memory.
ROWS_PER_PASS = 256

# Calibration samples that the range of activations starts from.
RANGE_SAMPLES = 32


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Under which conditions methods are compared.

  Attributes:
    format: of the weights.
    start: of scales and zero points, see `initial_scales`.
    reconstruction: steps and batches; `drop_probability` 0 is BRECQ's protocol, 0.5 QDrop's.
    activations: a per-tensor format whose step is learned with the rounding (LSQ); None leaves
      activations alone.
    layer_wise: reconstruct the layers of a unit one by one instead of the unit's output.
  """

  format: IntegerFormat
  start: Literal["search", "min_max"]
  reconstruction: ReconstructionSettings
  activations: ActivationFormat | None = None
  layer_wise: bool = False


class QuantizedUnit(NamedTuple):
  """A quantized unit and how it came about.

  Attributes:
    unit: with plain layers whose kernels are on the grid.
    rtn_error, error: mean squared error of the output on the calibration set.
    losses: of every step, float32 [num_steps]; None of RTN.
    shifts: {path: grid shift}, of FlexRound only.
  """

  unit: nnx.Module
  rtn_error: float
  error: float
  losses: Array | None = None
  shifts: dict[str, GridShift] = {}


@functools.cache
def optimizer_of(num_steps: int) -> OptimizerOfRate:
  """`make_optimizer` of a rate, the same object for the same steps: a key of compilations."""
  return functools.partial(make_optimizer, num_steps=num_steps)


def choose_learning_rate(
  method: str,
  rates: Sequence[float],
  unit: nnx.Module,
  x: Streams,
  context: Any,
  key: Array,
  protocol: Protocol,
  *,
  run: Run = run_transformer_block,
) -> float:
  """The rate with the least error of one unit on the calibration set; the first of equals.

  The same sweep serves every method, each with its own rates; see `quantize_unit` for the rest.
  """
  if len(rates) == 1 or method == "RTN":
    return rates[0]
  errors = [
    quantize_unit(method, unit, x, context, key, protocol, rate, run=run).error for rate in rates
  ]
  return rates[min(range(len(rates)), key=errors.__getitem__)]


class Layer(nnx.Module):
  """A single layer as a unit."""

  def __init__(self, layer: nnx.Linear | nnx.Conv):
    self.layer = layer


def run_layer(unit: Layer, x: Array, context) -> Array:
  """Output of a `Layer`."""
  del context
  return unit.layer(x)


def kernel_paths(unit: nnx.Module) -> list[str]:
  """Paths of the linears and convolutions below `unit`."""
  kinds = (nnx.Linear, nnx.Conv)
  return [".".join(map(str, p)) for p, m in nnx.iter_modules(unit) if isinstance(m, kinds)]


def quantize_unit(
  method: str,
  unit: nnx.Module,
  x: Streams,
  context: Any,
  key: Array,
  protocol: Protocol,
  learning_rate: float | None,
  *,
  run: Run = run_transformer_block,
  grids: Grids | None = None,
) -> QuantizedUnit:
  """Quantizes one unit by any of `METHODS`.

  Args:
    method: of `METHODS`.
    unit: in full precision; not modified.
    x: its inputs in the original and in the quantized network.
    context: passed to `run`.
    key: of the batches and of QDrop.
    protocol: the conditions.
    learning_rate: of what is learned; not used by RTN.
    run: how the unit is called.
    grids: of the unit, by default `initial_grids` of it. (The search does not depend on the
      method.)

  Raises:
    UserError: the method is unknown, or a weight or an input is NaN or infinite.
  """
  if method not in METHODS:
    raise UserError(f"method={method!r} is not supported; supported: {', '.join(METHODS)}")
  check_finite(unit, x.quantized)
  grids = initial_grids(unit, protocol) if grids is None else grids
  if protocol.layer_wise:
    return _layer_by_layer(method, unit, x, context, key, protocol, learning_rate, run, grids)
  targets = run_unit(unit, x.full_precision, context, run)
  rounded = _student("RTN", unit, x, context, protocol, run, grids)
  freeze_inputs(rounded)
  rtn_error = _error(rounded, x, context, targets, run)
  if method == "RTN":
    return QuantizedUnit(rounded, rtn_error, rtn_error)
  student = _student(method, unit, x, context, protocol, run, grids)
  # Before it is hard, AdaRound's kernel is nearly the original: its error says nothing.
  soft = method == "AdaRound"
  learned, log = reconstruct(
    student,
    x.quantized,
    targets,
    context,
    key,
    dataclasses.replace(protocol.reconstruction, keep_best=not soft),
    optimizer_of(protocol.reconstruction.num_steps),
    learning_rate=learning_rate,
    full_precision_inputs=x.full_precision,
    objective=adaround_objective if soft else feature_sum,
    run=run,
  )
  shifts = _grid_shifts(*nnx.split(learned)) if method in ABLATIONS else {}
  freeze(learned)
  error = _error(learned, x, context, targets, run)
  if not error <= rtn_error:
    return QuantizedUnit(rounded, rtn_error, rtn_error, log.losses)
  return QuantizedUnit(learned, rtn_error, error, log.losses, shifts)


def freeze(unit: nnx.Module) -> None:
  """Puts plain layers with rounded kernels and fixed input ranges in place of learned ones."""
  harden(unit)
  freeze_kernels(unit)
  freeze_inputs(unit)


def run_unit(unit: nnx.Module, x: Array, context: Any, run: Run) -> Array:
  """The unit's output on all samples, at most `ROWS_PER_PASS` at a time."""
  if run is run_transformer_block:
    return run_block(unit, x, context)
  return _run_unit(*nnx.split(unit), x, context, run)


def unit_inputs(
  unit: nnx.Module, x: Array, context: Any, run: Run, paths: list[str]
) -> dict[str, Array]:
  """Inputs of the unit's layers at `paths`."""
  return _unit_inputs(*nnx.split(unit), x, context, run, tuple(paths))


def initial_grids(unit: nnx.Module, protocol: Protocol) -> Grids:
  """Scales and zero points that every method starts from, {path of a layer: both}."""
  kernels = {path: get_module(unit, path).kernel[...] for path in kernel_paths(unit)}
  return {p: initial_scales(k, protocol.format, protocol.start) for p, k in kernels.items()}


def _weight(method: str, kernel: Array, grid: tuple[Array, Array], protocol: Protocol):
  """The module that computes a layer's kernel under a method."""
  scales, zero_points = grid
  if method == "AdaRound":
    return AdaRound(kernel, scales, zero_points, protocol.format)
  if method == "AdaQuant":
    return AdaQuant(kernel, scales, zero_points, protocol.format)
  settings = FlexRoundSettings(protocol.format, protocol.start, **ABLATIONS[method])
  return FlexRound(kernel, scales, zero_points, settings)


def _student(method, unit, x: Streams, context, protocol: Protocol, run, grids) -> nnx.Module:
  student = nnx.clone(unit)
  paths = list(grids)
  kernels = {path: get_module(unit, path).kernel[...] for path in paths}
  if method == "RTN":
    for path, kernel in kernels.items():
      rounded = round_to_nearest(kernel, *grids[path], protocol.format)
      get_module(student, path).kernel = nnx.Param(rounded)
  else:
    weights = {p: _weight(method, k, grids[p], protocol) for p, k in kernels.items()}
    quantize_kernels(student, weights)
  if protocol.activations is not None:
    few = jax.tree.map(
      lambda leaf: (
        leaf[:RANGE_SAMPLES] if jnp.ndim(leaf) and leaf.shape[0] == len(x.quantized) else leaf
      ),
      (x.quantized, context),
    )
    learn_inputs(student, unit_inputs(unit, *few, run, paths), protocol.activations)
  return student


@functools.partial(jax.jit, static_argnums=3)
def round_to_nearest(
  kernel: Array, scales: Array, zero_points: Array, format: IntegerFormat
) -> Array:
  """RTN with given scales, in the kernel's shape [..., in, out] and dtype."""
  w = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
  codes = rtn.encode(w, scales, zero_points, format)
  return rtn.decode(codes, scales, zero_points, format).reshape(kernel.shape).astype(kernel.dtype)


def _layer_by_layer(
  method, unit, x, context, key, protocol, learning_rate, run, grids
) -> QuantizedUnit:
  """Every layer as a unit of its own, in the order in which they are called."""
  targets = run_unit(unit, x.full_precision, context, run)
  protocol = dataclasses.replace(protocol, layer_wise=False)
  rtn_unit = _student("RTN", unit, x, context, protocol, run, grids)
  freeze_inputs(rtn_unit)
  rtn_error = _error(rtn_unit, x, context, targets, run)
  quantized, shifts = nnx.clone(unit), {}
  for i, path in enumerate(_call_order(unit, x.full_precision, context, run)):
    streams = Streams(
      unit_inputs(unit, x.full_precision, context, run, [path])[path],
      # Quantized activations lie inside the layer before: what it is given is not yet rounded.
      unit_inputs(quantized, x.quantized, context, run, [path])[path],
    )
    layer = Layer(get_module(unit, path))
    result = quantize_unit(
      method,
      layer,
      streams,
      None,
      jax.random.fold_in(key, i),
      protocol,
      learning_rate,
      run=run_layer,
      grids={"layer": grids[path]},
    )
    replace_module(quantized, path, result.unit.layer)
    if result.shifts:
      shifts[path] = result.shifts["layer"]
  error = _error(quantized, x, context, targets, run)
  return QuantizedUnit(quantized, rtn_error, error, None, shifts)


def _call_order(unit: nnx.Module, x: Array, context, run: Run) -> list[str]:
  order = []

  def note(state):
    merged = nnx.merge(graphdef, state)
    order.extend(record_inputs(merged, kernel_paths(merged), lambda m: run(m, x, context))[1])

  graphdef, state = nnx.split(unit)
  jax.eval_shape(note, state)
  return order


def _error(unit, x: Streams, context, targets: Array, run: Run) -> float:
  return float(_mean_square(run_unit(unit, x.quantized, context, run), targets))


@jax.jit
def _mean_square(output, targets):
  return jnp.mean((output - targets).astype(jnp.float32) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def _grid_shifts(graphdef, state):
  """{path: grid shift} of FlexRound's kernels."""
  weights = quantized_kernels(nnx.merge(graphdef, state))
  return {path: grid_shift(weight) for path, weight in weights.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run_unit(graphdef, state, x, context, run):
  samples = x.shape[0]
  if samples <= ROWS_PER_PASS or jax.tree.leaves(context):
    return run(nnx.merge(graphdef, state), x, context)
  rows = next(r for r in range(ROWS_PER_PASS, 0, -1) if samples % r == 0)
  one = lambda x: run(nnx.merge(graphdef, state), x, context)
  output = jax.lax.map(one, x.reshape(-1, rows, *x.shape[1:]))
  return output.reshape(samples, *output.shape[2:])


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _unit_inputs(graphdef, state, x, context, run, paths):
  unit = nnx.merge(graphdef, state)
  return record_inputs(unit, list(paths), lambda unit: run(unit, x, context))[1]
