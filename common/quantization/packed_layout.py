"""Quantized blocks of any method as tensors and JSON: a checkpoint layout of our own.

A block is the plain block of its config with other layers in some places: packed linears, rounded
inputs, a scaled activation. Its tensors are named by their paths; JSON describes the layers, each by
its class and the arguments of its constructor, which it keeps as attributes of the same names. Only
the classes below are ever built: nothing in a file is executed.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from common.errors import UserError
from common.models.activations import ACTIVATIONS
from common.models.decoder import Block
from common.models.surgery import replace_module
from common.quantization.activations import ActivationFormat, QuantizedInput
from common.quantization.attention import QuantizedAttention
from common.quantization.equivalent import ScaledActivation
from common.quantization.float_format import FloatFormat
from common.quantization.float_linear import FloatLinear
from common.quantization.linear import QuantizedLinear
from common.quantization.low_rank import CompensatedLinear, LowRank
from common.quantization.online_transforms import (
  ClippedInput,
  OnlineTransform,
  TransformedAttention,
  TransformedMLP,
  TransformedNorm,
)
from common.quantization.quantized_array import IntegerFormat, QuantizedArray
from common.quantization.reassembly import ReassembledInput
from common.quantization.shift_and_scale import ShiftScale
from common.quantization.vector_quantized import VectorQuantizedArray, VectorQuantizedLinear

QUANT_METHOD = "flaxworks"
# Of the layout and of how codes are packed (`kernels.quantized_matmul.packing`): raised by what would
# read older files wrongly. Version 1 named none and packed 3-bit codes otherwise.
VERSION = 2

LAYERS = {
  c.__name__: c
  for c in (
    ClippedInput,
    CompensatedLinear,
    FloatLinear,
    OnlineTransform,
    QuantizedAttention,
    QuantizedInput,
    QuantizedLinear,
    ReassembledInput,
    ScaledActivation,
    ShiftScale,
    TransformedAttention,
    TransformedMLP,
    TransformedNorm,
    VectorQuantizedLinear,
  )
}
VALUES = {
  c.__name__: c
  for c in (
    ActivationFormat,
    FloatFormat,
    IntegerFormat,
    LowRank,
    QuantizedArray,
    VectorQuantizedArray,
  )
}

# Plain layers that may be within one of the others.
NORMS = {"RMSNorm": nnx.RMSNorm, "LayerNorm": nnx.LayerNorm}

# Types narrower than a byte, which safetensors has not: two or four codes are put in one.
_NARROW = {
  str(np.dtype(d)): (np.dtype(d), bits)
  for d, bits in (
    (ml_dtypes.int2, 2),
    (ml_dtypes.uint2, 2),
    (ml_dtypes.int4, 4),
    (ml_dtypes.uint4, 4),
  )
}

Tensors = dict[str, np.ndarray]


def quantization_config(method: str, blocks: list[Mapping[str, Any]]) -> dict[str, Any]:
  """The `quantization_config` entry of config.json.

  Args:
    method: that quantized, for people to read.
    blocks: the descriptions of every block's layers, see `to_tensors`.
  """
  return {"quant_method": QUANT_METHOD, "version": VERSION, "method": method, "blocks": blocks}


def read_config(config: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
  """The `blocks` of a `quantization_config`; None if it is of another layout.

  Raises:
    UserError: it is damaged, or of another version.
  """
  if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
    return None
  if (version := config.get("version", 1)) != VERSION:
    raise UserError(
      f"quantization_config has version {version}, expected {VERSION}; quantize the original "
      "checkpoint again"
    )
  blocks = config.get("blocks")
  if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
    raise UserError("quantization_config has no list of blocks; expected a description of each")
  return blocks


def tensor_prefix(index: int) -> str:
  """What the names of the tensors of block `index` begin with."""
  return f"blocks.{index}."


def to_tensors(block: Block) -> tuple[Tensors, dict[str, Any]]:
  """A block's tensors by path, and what describes its layers, {path: JSON}.

  Raises:
    UserError: a layer has no place in the layout.
  """
  tensors, layers = {}, {}
  for path, layer in _outermost_layers(block):
    layers[path] = _describe(layer, path, tensors)
  for path, variable in nnx.to_flat_state(nnx.state(block)):
    name = ".".join(map(str, path))
    if not any(name.startswith(f"{layer}.") for layer in layers):
      if not isinstance(variable, nnx.Param):
        raise UserError(f"{name}: the layout has no place for a {type(variable).__name__}")
      tensors[name] = np.asarray(variable[...])
  return tensors, layers


def from_tensors(
  block: Block, tensors: Mapping[str, np.ndarray], layers: Mapping[str, Any], dtype=jnp.float32
) -> Block:
  """Inverse of `to_tensors`.

  Args:
    block: abstract, of the same config; layers are put into it.
    tensors: by path.
    layers: their descriptions.
    dtype: of the parameters outside of the layers; None keeps the file's.

  Raises:
    UserError: a description is damaged or names what does not exist, or tensors are missing, left
      over, or of another shape (they are named).
  """
  rest = dict(tensors)
  for path, described in layers.items():
    try:
      replace_module(block, path, _build(described, rest))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
      raise UserError(f"the description of the layer {path} is damaged: {e!r}") from None
  graphdef, state = nnx.split(block)
  flat = dict(state.flat_state())
  for path, variable in flat.items():
    name = ".".join(map(str, path))
    if any(name.startswith(f"{layer}.") for layer in layers):
      continue
    value = rest.pop(name, None)
    if value is None or value.shape != variable.shape:
      found = "is missing" if value is None else f"has shape {value.shape}"
      raise UserError(f"tensor {name} {found}, expected {variable.shape}")
    flat[path] = variable.replace(jax.device_put(np.asarray(value, dtype)))
  if rest:
    raise UserError(f"unexpected tensors: {', '.join(sorted(rest))}")
  return nnx.merge(graphdef, nnx.State.from_flat_path(flat))


def _outermost_layers(block: Block) -> list[tuple[str, nnx.Module]]:
  found = []
  # Parents come after their children: a longer path may lie within a shorter one.
  modules = [(".".join(map(str, path)), m) for path, m in nnx.iter_modules(block)]
  for path, module in sorted(modules, key=lambda pair: len(pair[0])):
    replaced = type(module).__name__ in LAYERS or isinstance(module, nnx.Sequential)
    if replaced and not any(path.startswith(f"{p}.") for p, _ in found):
      found.append((path, module))
  return found


def _describe(value: Any, name: str, tensors: Tensors) -> Any:
  """JSON for a value; its arrays are added to `tensors` under names that begin with `name`."""
  if isinstance(value, nnx.Variable):
    value = value.get_value()
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, (jax.Array, np.ndarray)):
    array = np.asarray(value)
    described = {"$tensor": name}
    if str(array.dtype) in _NARROW:
      described |= {"dtype": str(array.dtype), "shape": list(array.shape)}
      array = _pack_bytes(array)
    tensors[name] = array
    return described
  if isinstance(value, np.dtype):
    return {"$dtype": str(value)}
  if isinstance(value, nnx.Sequential):
    return {"$sequence": _describe(list(value.layers), name, tensors)}
  if type(value).__name__ in NORMS:
    described = {"$norm": type(value).__name__, "epsilon": value.epsilon}
    parts = {part: getattr(value, part, None) for part in ("scale", "bias")}
    return described | {k: _describe(v, f"{name}.{k}", tensors) for k, v in parts.items()}
  if type(value).__name__ in LAYERS:
    fields = list(inspect.signature(type(value).__init__).parameters)[1:]
  elif type(value).__name__ in VALUES:
    fields = [field.name for field in dataclasses.fields(value)]
  elif isinstance(value, Mapping):
    return {"$items": {k: _describe(v, f"{name}.{k}", tensors) for k, v in value.items()}}
  elif isinstance(value, (list, tuple)):
    return [_describe(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
  elif value in ACTIVATIONS.values():
    return {"$activation": next(k for k, v in ACTIVATIONS.items() if v is value)}
  else:
    raise UserError(f"{name}: the layout has no place for a {type(value).__name__}")
  arguments = {f: _describe(getattr(value, f), f"{name}.{f}", tensors) for f in fields}
  return {"$class": type(value).__name__} | arguments


def _build(described: Any, tensors: Tensors) -> Any:
  """Inverse of `_describe`; takes the arrays out of `tensors`."""
  if isinstance(described, list):
    return tuple(_build(v, tensors) for v in described)
  if not isinstance(described, Mapping):
    return described
  if "$tensor" in described:
    array = tensors.pop(described["$tensor"])
    if "dtype" in described:
      array = _unpack_bytes(array, described["dtype"], tuple(described["shape"]))
    return jax.device_put(array)  # `jnp.asarray` would compile a program for each shape.
  if "$dtype" in described:
    return jnp.dtype(described["$dtype"])
  if "$activation" in described:
    return ACTIVATIONS[described["$activation"]]
  if "$items" in described:
    return {k: _build(v, tensors) for k, v in described["$items"].items()}
  if "$sequence" in described:
    return nnx.Sequential(*_build(described["$sequence"], tensors))
  if "$norm" in described:
    return _build_norm(described, tensors)
  make = (LAYERS | VALUES)[described["$class"]]
  return make(**{k: _build(v, tensors) for k, v in described.items() if k != "$class"})


def _build_norm(described: Mapping[str, Any], tensors: Tensors) -> nnx.Module:
  scale, bias = (_build(described[part], tensors) for part in ("scale", "bias"))
  options = {"epsilon": described["epsilon"], "rngs": nnx.Rngs(0)}
  if described["$norm"] == "LayerNorm":
    options |= {"use_fast_variance": False, "use_bias": bias is not None}  # As in a decoder.
  norm = NORMS[described["$norm"]](len(scale), **options)
  norm.scale[...] = scale
  if bias is not None:
    norm.bias[...] = bias
  return norm


def _pack_bytes(array: np.ndarray) -> np.ndarray:
  """Codes of 2 or 4 bits, any shape -> uint8 [ceil(size * bits / 8)], lowest bits first."""
  _, bits = _NARROW[str(array.dtype)]
  per_byte = 8 // bits
  codes = array.astype(np.int8).reshape(-1).view(np.uint8) & np.uint8(2**bits - 1)
  codes = np.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte)
  return np.bitwise_or.reduce(codes << (np.arange(per_byte) * bits).astype(np.uint8), axis=1)


def _unpack_bytes(packed: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
  """Inverse of `_pack_bytes`."""
  narrow, bits = _NARROW[dtype]
  shifts = (np.arange(8 // bits) * bits).astype(np.uint8)
  codes = ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)[: np.prod(shape)]
  if dtype.startswith("int"):
    # The sign is the highest of the bits.
    codes = (codes << (8 - bits)).view(np.int8) >> (8 - bits)
  return codes.astype(narrow).reshape(shape)
