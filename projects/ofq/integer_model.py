"""Export: the trained model with integer weights, whose products are integer products.

StatsQ's level k is worth s (k + 1/2) / n = (s / 2 n) (2 k + 1): odd integers and one scale per
output channel. With the rounded input x = s_x q_x + c (c: the offset after rounding)

  x W = s_x s_w (q_x q_w) + c W

so that a layer is one integer product (`kernels/integer_matmul`) and a bias.

A saved model is one safetensors file: int8 codes, float32 scales, biases, steps and offsets under
the paths of the model, its config.json and `QATSettings` in the metadata.
"""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from common.checkpoints.huggingface import find_family, hf_config, model_config
from common.checkpoints.shards import save_tensors
from common.errors import UserError
from common.models.surgery import replace_module
from kernels.integer_matmul.api import integer_matmul
from projects.ofq.ofq import (
  ActivationQuantizer,
  QATAttention,
  QATLayer,
  QATSettings,
  QueryKeyProduct,
  WeightQuantizer,
  block_layers,
  prepare,
)

Array = jax.Array


class IntegerWeight(nnx.Variable):
  """int8 codes or float32 scales of a finished weight: no parameter."""


class IntegerLinear(nnx.Module):
  """x W + bias with integer x and W."""

  def __init__(
    self,
    quantizer: WeightQuantizer,
    latent: Array,
    bias: Array | None,
    input_quantizer: ActivationQuantizer,
    quantizes_input: bool,
  ):
    """
    Args:
      quantizer: of the weights.
      latent: trained weights [in, out].
      bias: [out].
      input_quantizer: that of the input.
      quantizes_input: whether the input is still to be rounded, or comes rounded by it already.
    """
    codes, scale = integer_weight(quantizer, latent)
    self.codes, self.scale = IntegerWeight(codes), IntegerWeight(scale)
    self.input_quantizer, self.quantizes_input = input_quantizer, quantizes_input
    after = input_quantizer.offset_after
    constant = 0.0 if after is None else after[...] @ (codes * scale)
    self.bias = IntegerWeight(
      constant + (0.0 if bias is None else bias) + jnp.zeros(codes.shape[1])
    )

  def __call__(self, x: Array) -> Array:
    """[batch, ..., in] -> [batch, ..., out]."""
    quantizer = self.input_quantizer
    if self.quantizes_input:
      x = quantizer(x)
    if quantizer.offset_after is not None:
      x = x - quantizer.offset_after[...]
    step = quantizer.floored_step()
    product = integer_matmul(
      x,
      self.codes[...],
      self.scale[...],
      # x holds few-bit codes already: a wider type rounds them to themselves.
      activation_bits=4 if quantizer.bits <= 4 else 8,
      activation_scales=step,
      activation_zero_points=None if quantizer.signed else jnp.zeros(step.shape, jnp.int32),
    )
    return product + self.bias[...]


def integer_weight(quantizer: WeightQuantizer, latent: Array) -> tuple[Array, Array]:
  """Codes (int8) and scales (float32 [1, out]) whose product is the rounded weight.

  Raises:
    UserError: the weights are not `exportable`.
  """
  if not exportable(quantizer.kind, quantizer.bits):
    raise UserError("8-bit StatsQ has codes up to 255, which int8 does not hold; use 2 to 7 bits")
  codes, scale = quantizer.codes(latent), quantizer.scale(latent)
  if quantizer.kind == "lsq":
    return codes, scale
  return 2 * codes + 1, scale / 2**quantizer.bits


def exportable(weight_quantizer: str, bits: int) -> bool:
  """All but 8-bit StatsQ, whose odd integers do not fit into int8."""
  return weight_quantizer != "statsq" or bits < 8


@nnx.jit
def to_integer(model: nnx.Module) -> nnx.Module:
  """A copy of a trained model whose linear layers are integer products, the patch embedding aside.

  Its outputs are those of the trained model up to float32 rounding.
  """
  model = nnx.clone(model)
  layers = block_layers(model)
  layers |= {
    name: getattr(model, name)
    for name in ("classifier", "class_classifier", "distillation_classifier")
    if isinstance(getattr(model, name, None), QATLayer)
  }
  shared = {
    f"{'.'.join(map(str, path))}.{name}": attention.input_quantizer
    for path, attention in nnx.iter_modules(model)
    if isinstance(attention, QATAttention)
    for name in ("q_proj", "k_proj", "v_proj", "query_key")
  }
  for path, layer in layers.items():
    is_product = isinstance(layer, QueryKeyProduct)
    bias = None if is_product or layer.layer.bias is None else layer.layer.bias[...]
    own = None if is_product else layer.input_quantizer
    integer = IntegerLinear(
      layer.weight_quantizer, layer.latent(), bias, own or shared[path], own is not None
    )
    replace_module(model, path, integer)
  return model


def integer_tensors(model: nnx.Module) -> dict[str, Array]:
  """What is stored of a model of `to_integer`: {path: codes, scales, biases and parameters}."""
  return {".".join(map(str, path)): x[...] for path, x in nnx.state(model).flat_state()}


def save_integer(path: str | os.PathLike, model: nnx.Module, settings: QATSettings) -> None:
  """Writes a model of `to_integer`; the file appears only when complete.

  Args:
    path: of the safetensors file.
    model: has the `config` of a Hugging Face family.
    settings: that the model was quantized with.
  """
  tensors = {name: np.asarray(x, order="C") for name, x in integer_tensors(model).items()}
  metadata = {
    "config": json.dumps(hf_config(model.config)),
    "settings": json.dumps(dataclasses.asdict(settings)),
  }
  save_tensors(pathlib.Path(path), tensors, metadata)


def load_integer(path: str | os.PathLike) -> nnx.Module:
  """The model that `save_integer` wrote.

  Raises:
    UserError: the file is missing, damaged or no integer model.
  """
  path = pathlib.Path(path).expanduser()
  try:
    with safetensors.safe_open(path, framework="np") as f:
      metadata = f.metadata() or {}
      described = json.loads(metadata["config"])
      settings = QATSettings(**json.loads(metadata["settings"]))
      tensors = {name: f.get_tensor(name) for name in f.keys()}
  except FileNotFoundError:
    raise UserError(f"{path} does not exist; expected a file that a training run wrote") from None
  except (safetensors.SafetensorError, OSError, LookupError, ValueError, TypeError) as e:
    raise UserError(f"{path} is not an integer model of this project: {e!r}") from None
  family = find_family(described, path)
  config = model_config(family, described, (), path)
  make = lambda: to_integer(prepare(family.model(config, rngs=nnx.Rngs(0)), settings))
  graphdef, state = nnx.split(nnx.eval_shape(make))
  flat = dict(state.flat_state())
  for key, variable in flat.items():
    name = ".".join(map(str, key))
    found = tensors.get(name)
    if found is None or (found.shape, found.dtype) != (variable.shape, variable.dtype):
      found = "nothing" if found is None else f"{found.dtype} {found.shape}"
      raise UserError(
        f"{path} has {found} for {name}, expected {variable.dtype} {variable.shape}: it is damaged "
        "or of another version"
      )
    flat[key] = variable.replace(jnp.asarray(found))
  return nnx.merge(graphdef, nnx.State.from_flat_path(flat))
