"""Packed weights in safetensors, in the GEMM layout of AutoAWQ that other tools read.

Per linear: `qweight` int32 [in, out * bits / 32], `qzeros` int32 [groups, out * bits / 32] and
`scales` float16 [groups, out]. Eight 4-bit codes share a word in the order 0 2 4 6 1 3 5 7, lowest
bits first. 2 and 8 bits are laid out alike in natural order, 3 bits as bit planes [ceil(in / 32) *
3, out] with one zero point per byte; these three are ours, and marked as such in config.json.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.checkpoints.tensors import tensor_name, to_hf
from common.errors import UserError
from common.models.decoder import DecoderConfig
from common.models.sharding import tensor_parallel
from common.models.surgery import get_module, replace_module
from common.quantization.equivalent import ScaledActivation
from common.quantization.linear import QuantizedLinear
from common.quantization.quantized_array import IntegerFormat, QuantizedArray
from kernels.quantized_matmul.packing import pack, packed_dtype, unpack

if TYPE_CHECKING:
  from common.checkpoints.huggingface import Checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ROWS = np.arange(32, dtype=np.uint32)[:, None]  # Of a word of a bit plane.


def quantization_config(format: IntegerFormat) -> dict[str, Any]:
  """The `quantization_config` entry of config.json.

  Raises:
    UserError: the layout cannot hold the format.
  """
  if format.axis != 0 or format.symmetric or format.scale_dtype != jnp.float16:
    raise UserError(
      "the AutoAWQ layout holds asymmetric weights grouped along the input with float16 scales "
      f"(axis=0, symmetric=False, scale_dtype=float16), not {format}"
    )
  if format.bits == 6:
    raise UserError("the AutoAWQ layout holds 2, 3, 4 or 8 bits, not 6")
  return {
    "quant_method": "awq",
    "version": "gemm" if format.bits == 4 else "flaxworks",
    "bits": format.bits,
    "group_size": format.group_size,
    "zero_point": True,
    "modules_to_not_convert": None,
  }


def holds(config: DecoderConfig, format: IntegerFormat) -> bool:
  """Whether the layout has a place for a decoder whose linears are packed in a format."""
  try:
    _family(config)
    quantization_config(format)
  except UserError:
    return False
  return True


def to_tensors(
  module: nnx.Module, config: DecoderConfig, prefix: tuple = ()
) -> dict[str, np.ndarray]:
  """Tensors of a quantized decoder, or of its part at `prefix`, by Hugging Face name.

  Args:
    module: a `Decoder` or block, its linears packed or not.
    config: the decoder's config.
    prefix: path of `module` in the decoder, such as ("blocks", 3).

  Raises:
    UserError: the layout has no place for something in the model.
  """
  family = _family(config)
  if any(isinstance(layer, ScaledActivation) for _, layer in nnx.iter_modules(module)):
    raise UserError(
      f"the AutoAWQ layout cannot hold the scaled {config.activation} activation of this model; "
      "save the search result and apply it to the checkpoint instead"
    )
  tensors = to_hf(module, config, prefix)
  for path, layer in nnx.iter_modules(module):
    if isinstance(layer, QuantizedLinear):
      name = tensor_name(family, prefix + tuple(path) + ("kernel",)).removesuffix(".weight")
      tensors |= {f"{name}.{k}": v for k, v in _encode(layer.weight.get_value()).items()}
  return tensors


def attach(module: nnx.Module, checkpoint: "Checkpoint", stems: Mapping[str, str]) -> None:
  """Replaces linears of a freshly loaded module by the checkpoint's packed weights, in place.

  Args:
    module: a decoder or block.
    checkpoint: opened, with a `quantization_config`.
    stems: {path of the linear: name of its tensors without the last part}.

  Raises:
    UserError: the quantization method or layout is not supported, or shapes disagree.
  """
  format = read_format(checkpoint.quantization)
  for path, stem in stems.items():
    names = [f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")]
    tensors = checkpoint.read(names)
    layer = get_module(module, path)
    shape = (layer.in_features, layer.out_features)
    weight = _decode(*(tensors[n] for n in names), format, shape, f"{checkpoint.path}: {stem}")
    bias = None if layer.bias is None else layer.bias[...]
    replace_module(module, path, QuantizedLinear(weight, bias, tensor_parallel(path)))


def read_format(config: Mapping[str, Any] | None) -> IntegerFormat:
  """The format that a `quantization_config` describes.

  Raises:
    UserError: it is not an AWQ checkpoint in a layout that is read here.
  """
  if not isinstance(config or {}, Mapping):
    raise UserError(f"quantization_config is {config!r}; expected an object")
  config = config or {}
  method, version = config.get("quant_method"), str(config.get("version", "gemm")).lower()
  if method is None and (config.get("load_in_8bit") or config.get("load_in_4bit")):
    method = "bitsandbytes"  # Its older files do not say so.
  zeros = bool(config.get("zero_point", True))
  if method != "awq" or version not in ("gemm", "flaxworks") or not zeros:
    details = f" with version {version!r} and zero_point={zeros}" if method == "awq" else ""
    raise UserError(
      f"a checkpoint quantized by the method {method!r}{details} is not supported; supported: awq "
      "with version gemm and zero points; or take the full-precision checkpoint, which quantize "
      "packs"
    )
  missing = [key for key in ("bits", "group_size") if not isinstance(config.get(key), int)]
  if missing:
    raise UserError(f"quantization_config lacks the integer {' and '.join(missing)}")
  return IntegerFormat(config["bits"], config["group_size"], scale_dtype=jnp.float16)


def _family(config: DecoderConfig):
  from common.checkpoints.families import FAMILIES

  family = FAMILIES[config.family]
  if family.fused_qkv:
    raise UserError(
      f"{family.architecture} fuses q, k and v in one tensor, which the AutoAWQ layout would have "
      "to quantize as one; save the search result and apply it to the checkpoint instead"
    )
  return family


def _order(bits: int) -> np.ndarray:
  return np.array(AWQ_ORDER if bits == 4 else range(32 // bits))


def _to_words(codes: np.ndarray, bits: int) -> np.ndarray:
  """uint8 [rows, columns] -> int32 [rows, columns * bits / 32]."""
  per_word = 32 // bits
  if codes.shape[1] % per_word:
    raise UserError(
      f"{codes.shape[1]} output channels do not fill whole 32-bit words of {bits}-bit codes; "
      f"the output dimension must be a multiple of {per_word}"
    )
  lanes = codes.reshape(codes.shape[0], -1, per_word)[:, :, _order(bits)].astype(np.uint32)
  shifts = (np.arange(per_word) * bits).astype(np.uint32)
  return np.bitwise_or.reduce(lanes << shifts, axis=-1).view(np.int32)


def _from_words(words: np.ndarray, bits: int) -> np.ndarray:
  """Inverse of `_to_words`."""
  shifts = (np.arange(32 // bits) * bits).astype(np.uint32)
  lanes = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
  codes = np.empty_like(lanes, dtype=np.uint8)
  codes[:, :, _order(bits)] = lanes
  return codes.reshape(words.shape[0], -1)


def _to_planes(codes: np.ndarray) -> np.ndarray:
  """3-bit codes [in, out] -> int32 [ceil(in / 32) * 3, out]: bit b of 32 rows is word b."""
  padded = np.pad(codes, ((0, -len(codes) % 32), (0, 0)))
  bits = padded.reshape(-1, 1, 32, codes.shape[1]) >> np.arange(3)[:, None, None] & 1
  words = np.bitwise_or.reduce(bits.astype(np.uint32) << _ROWS, axis=2)
  return words.reshape(-1, codes.shape[1]).view(np.int32)


def _from_planes(words: np.ndarray) -> np.ndarray:
  """Inverse of `_to_planes`, with the rows of the padding."""
  bits = words.view(np.uint32).reshape(-1, 3, 1, words.shape[1]) >> _ROWS & 1
  codes = np.bitwise_or.reduce(bits.astype(np.uint8) << np.arange(3)[:, None, None], axis=1)
  return codes.reshape(-1, words.shape[1]).astype(np.uint8)


def _encode(weight: QuantizedArray) -> dict[str, np.ndarray]:
  quantization_config(weight.format)
  bits = weight.format.bits
  zeros = np.asarray(weight.zero_points.astype(jnp.uint8))
  codes = np.asarray(unpack(weight.values, bits, weight.shape[0], signed=False))
  if bits == 3:
    qweight, qzeros = _to_planes(codes), _to_words(zeros, 8)
  else:
    qweight, qzeros = _to_words(codes, bits), _to_words(zeros, bits)
  scales = np.asarray(weight.scales.astype(jnp.float16))
  return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def _decode(
  qweight: np.ndarray,
  qzeros: np.ndarray,
  scales: np.ndarray,
  format: IntegerFormat,
  shape: tuple[int, int],
  name: str,
) -> QuantizedArray:
  """The weight [in, out] = `shape`; `name` says in errors what is decoded."""
  (rows, columns), bits = shape, format.bits
  groups, _ = format.num_groups(shape)
  zero_bits = 8 if bits == 3 else bits
  expected = {
    "qweight": (qweight, "int32", (rows, columns * bits // 32)),
    "qzeros": (qzeros, "int32", (groups, columns * zero_bits // 32)),
    "scales": (scales, "float16", (groups, columns)),
  }
  if bits == 3:
    expected["qweight"] = (qweight, "int32", (-(-rows // 32) * 3, columns))
  for part, (tensor, dtype, wanted) in expected.items():
    if str(tensor.dtype) != dtype or tensor.shape != wanted:
      raise UserError(
        f"{name}.{part} is {tensor.dtype} {list(tensor.shape)}; a weight {list(shape)} at {bits} "
        f"bits with group_size {format.group_size} takes {dtype} {list(wanted)}"
      )
  if bits == 3:
    values = pack(_from_planes(qweight)[:rows], bits, signed=False)
    zeros = jnp.asarray(_from_words(qzeros, 8))
  else:
    native = packed_dtype(bits, signed=False)
    values = jnp.asarray(_from_words(qweight, bits)).astype(native)
    zeros = jnp.asarray(_from_words(qzeros, bits)).astype(native)
  return QuantizedArray(values, jnp.asarray(scales), zeros, format, shape)
