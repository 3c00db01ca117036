"""What is compared: the formats of the paper's settings, the baselines, and the ablations."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
from flax import nnx
from ml_collections import ConfigDict

from common.errors import UserError
from common.quantization.activations import ActivationFormat
from common.quantization.quantized_array import IntegerFormat
from projects.outlier_suppression_plus.outlier_suppression import clipping_quantiles, least_loss
from projects.outlier_suppression_plus.outlier_suppression_plus import Settings, quantize

Array = jax.Array

# (model, calibration inputs) -> quantized model.
Quantize = Callable[[nnx.Module, Array], nnx.Module]


def settings_of(config: ConfigDict, name: str) -> Settings:
  """The paper's quantizers by the name of a setting (section 5.1), with its shift and scale.

  "W8A8" is static per tensor and symmetric on both sides; "W6A6" and other static ones have
  asymmetric activations and a weight range per channel. Both round the operands of attention too.
  "W4A4 per token" is dynamic, asymmetric, weights per channel; "W4A4 per group" has groups of
  `config.group_size` on both sides.

  Raises:
    UserError: the name is of no setting.
  """
  match = re.fullmatch(r"W([23468])A([2-8])( per token| per group)?", name)
  if not match:
    raise UserError(
      f"settings={name!r} is not supported; expected WxAy, or WxAy followed by 'per token' or "
      "'per group', with x of 2, 3, 4, 6, 8 and y of 2 to 8"
    )
  bits, activation_bits, how = int(match[1]), int(match[2]), match[3]
  if how:
    group_size = config.group_size if how == " per group" else -1
    weights = IntegerFormat(bits, group_size)
    activations = ActivationFormat(activation_bits, "per_token", group_size)
  else:
    eight = bits == activation_bits == 8
    weights = IntegerFormat(bits, axis=None, symmetric=True) if eight else IntegerFormat(bits)
    activations = ActivationFormat(activation_bits, "per_tensor", symmetric=eight)
  return Settings(
    weights,
    activations,
    lower_bound=config.lower_bound,
    lower_fraction=config.lower_fraction,
    search_samples=config.search_samples,
    linear_to_linear=config.linear_to_linear,
    observer=config.observer,
    percentile=config.percentile,
    quantize_bmm=not how,
  )


def main_methods(
  config: ConfigDict, settings: Settings, ids: Mapping[str, Array], loss
) -> dict[str, Quantize]:
  """The method, its two halves, and the baselines.

  Args:
    config: the run's.
    settings: of Outlier Suppression+.
    ids: what the calibration inputs have beside tokens, `segment_ids` and `token_types` of `quantize`.
    loss: (original model, quantized model, calibration inputs) -> float, by which the baselines'
      hyper-parameters are chosen.
  """

  def with_changes(**changes) -> Quantize:
    changed = dataclasses.replace(settings, **changes)
    return lambda model, inputs: quantize(model, inputs, changed, **ids)[0]

  def chosen(candidates, changes: Callable[[float], dict]) -> Quantize:
    def run(model, inputs):
      candidate = lambda value: with_changes(**changes(value))(model, inputs)
      return least_loss(candidates, candidate, lambda found: loss(model, found, inputs))[0]

    return run

  plain = {"shift": "none", "scale": "none"}
  smooth = {"shift": "none", "scale": "smoothquant"}
  gamma = {"shift": "none", "scale": "gamma"}
  static = settings.activations.granularity == "per_tensor"
  methods = {}
  if static:
    methods["MinMax"] = with_changes(**plain, observer="min_max")
    methods["AvgMinMax"] = with_changes(**plain, observer="average_min_max")
    methods["percentile"] = with_changes(**plain, observer="percentile")
  else:
    methods["ZeroQuant"] = with_changes(**plain)
  methods["SmoothQuant"] = with_changes(**smooth)
  methods["SmoothQuant, best alpha"] = chosen(
    config.smoothquant_alphas, lambda alpha: smooth | {"alpha": alpha}
  )
  if static:
    steps = config.clipping_steps_8 if settings.activations.bits == 8 else config.clipping_steps
    methods["Outlier Suppression"] = chosen(
      clipping_quantiles(steps),
      lambda q: gamma | {"observer": "token_wise", "percentile": 100 * q},
    )
  else:
    methods["gamma migration"] = with_changes(**gamma)
  methods["OS+, shift only"] = with_changes(scale="none")
  methods["OS+, scale only"] = with_changes(shift="none")
  methods["OS+"] = with_changes()
  return methods


def ablations(settings: Settings) -> dict[str, Settings]:
  """One thing changed at a time."""
  change = lambda **changes: dataclasses.replace(settings, **changes)
  return {
    "OS+": settings,
    "shift by the mean": change(shift="mean"),
    "shift by the median": change(shift="median"),
    "shift, SmoothQuant's scale": change(scale="smoothquant"),
    "loss of the next products": change(objective="linear"),
    "loss of the tensor": change(objective="tensor"),
    "observer min_max": change(observer="min_max"),
    "observer percentile": change(observer="percentile"),
    "observer mse": change(observer="mse"),
    "attention operands not rounded": change(quantize_bmm=False),
    "gamma migration, no clipping": change(shift="none", scale="gamma"),
  }
