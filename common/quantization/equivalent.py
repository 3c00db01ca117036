"""Per-channel scaling and shifting that leave the full-precision function unchanged.

y = W x + b = (W diag(s)) (diag(1/s) (x - z)) + (b + W z). The 1/s is folded into the operation that
produces x: a norm's gain, the columns of a linear, or an explicit division where nothing linear
precedes. The shift z is folded into a norm's bias.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import DecoderConfig
from common.models.surgery import get_module

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ScalingGroup:
  """Linears of a decoder block that share one input, and the operation that produces it.

  Attributes:
    previous: path of the norm, linear or activation that the inverse scale is folded into.
    linears: paths of the linears whose input channels are scaled.
    inspect: path of the module whose output error a scale search measures; it takes the same
      input as the linears (the whole attention for q, k, v).
  """

  previous: str
  linears: tuple[str, ...]
  inspect: str


def scaling_groups(config: DecoderConfig) -> list[ScalingGroup]:
  """The scaling groups of a decoder's block (AWQ, Appendix A, and its reference code).

  With grouped-query attention v -> o is left out: one value channel feeds several query heads, so
  the shapes do not match. Post-norm blocks have no norm whose only consumers are the linears.
  """
  groups = []
  pre_norm = config.norm_placement == "pre"
  if pre_norm:
    qkv = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    groups.append(ScalingGroup("attention_norm", qkv, "attention"))
  if config.num_heads == config.num_kv_heads:
    groups.append(ScalingGroup("attention.v_proj", ("attention.o_proj",), "attention.o_proj"))
  if pre_norm and config.gated_mlp:
    groups.append(ScalingGroup("mlp_norm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"))
  elif pre_norm:
    groups.append(ScalingGroup("mlp_norm", ("mlp.up_proj",), "mlp.up_proj"))
  # The gate multiplies and ReLU is positively homogeneous, so the scale passes to up_proj; any
  # other activation has to be divided explicitly.
  passes = config.gated_mlp or config.activation == "relu"
  previous = "mlp.up_proj" if passes else "mlp.activation"
  groups.append(ScalingGroup(previous, ("mlp.down_proj",), "mlp.down_proj"))
  return groups


class ScaledActivation(nnx.Module):
  """activation(x) / scale, where no preceding operation can take the scale."""

  def __init__(self, activation: Callable[[Array], Array], scale: Array):
    self.activation = activation
    self.scale = nnx.Param(scale)

  def __call__(self, x: Array) -> Array:
    return self.activation(x) / self.scale[...].astype(x.dtype)


def fold_scale(block: nnx.Module, group: ScalingGroup, scale: Array) -> None:
  """Divides the group's input channels by `scale` and multiplies its weights, in place.

  Args:
    block: a decoder block.
    group: which input of the block.
    scale: positive, [in].
  """
  parent, _, name = group.previous.rpartition(".")
  previous = get_module(block, group.previous)
  if isinstance(previous, (nnx.RMSNorm, nnx.LayerNorm)):
    _multiply(previous.scale, 1 / scale)
    _multiply(getattr(previous, "bias", None), 1 / scale)
  elif isinstance(previous, nnx.Linear):
    _multiply(previous.kernel, 1 / scale)
    _multiply(previous.bias, 1 / scale)
  elif isinstance(previous, ScaledActivation):
    _multiply(previous.scale, scale)
  else:
    setattr(get_module(block, parent), name, nnx.data(ScaledActivation(previous, scale)))
  for path in group.linears:
    _multiply(get_module(block, path).kernel, scale[:, None])


def fold_shift(block: nnx.Module, group: ScalingGroup, shift: Array) -> None:
  """Takes `shift` off the group's input channels and makes it good in the biases, in place.

  Args:
    block: a decoder block.
    group: which input of the block; a LayerNorm produces it, and its linears have biases.
    shift: [in].

  Raises:
    UserError: there is no bias to fold the shift into.
  """
  norm = get_module(block, group.previous)
  linears = {path: get_module(block, path) for path in group.linears}
  if not isinstance(norm, nnx.LayerNorm) or norm.bias is None:
    raise UserError(f"{group.previous} has no bias that could take a shift; expected a LayerNorm")
  for path, linear in linears.items():
    if linear.bias is None:
      raise UserError(f"{path} has no bias that could make good a shift of its input")
  norm.bias[...] = (norm.bias[...] - shift).astype(norm.bias.dtype)
  for linear in linears.values():
    kernel = linear.kernel[...].astype(jnp.float32)
    added = jnp.matmul(shift.astype(jnp.float32), kernel, precision="highest")
    linear.bias[...] = (linear.bias[...] + added).astype(linear.bias.dtype)


def _multiply(parameter: nnx.Param | None, factor: Array) -> None:
  """Multiplies in place, in the parameter's own type."""
  if parameter is not None:
    parameter[...] = (parameter[...] * factor).astype(parameter.dtype)


def smoothquant_scale(x_max: Array, kernels: list[Array], alpha: float = 0.5) -> Array:
  """SmoothQuant's per-channel scale max|x|^alpha / max|w|^(1 - alpha), [in].

  Xiao et al. 2023, equation 4. The weights are to be multiplied by it, the inputs divided.

  Args:
    x_max: largest |x| per input channel, [in].
    kernels: weights of the linears that share the input, each [in, out].
    alpha: migration strength; 0.5 shares the difficulty evenly.
  """
  w_max = jnp.stack([jnp.abs(k).max(axis=1) for k in kernels]).max(axis=0)
  scale = jnp.maximum(x_max, 1e-5) ** alpha / jnp.maximum(w_max, 1e-5) ** (1 - alpha)
  return jnp.maximum(scale, 1e-5)
