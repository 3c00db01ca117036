"""What is compared: settings of FPQ and its ablations, and the integer baselines."""

import functools

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.quantization import calibration, rtn
from common.quantization.activations import ActivationFormat, min_max_range, quantize_inputs
from common.quantization.attention import QuantizedAttention
from common.quantization.calibration import rtn_block, token_mask
from common.quantization.linear import get_kernels, pack_linears
from common.quantization.quantized_array import IntegerFormat
from projects.llm_fp4.llm_fp4 import FPQSettings
from projects.llm_fp4.models import Model, outer_inputs, untie
from projects.llm_fp4.products import real_operands

Array = jax.Array

MINMAX_INT, SMOOTHQUANT = "MinMax INT", "SmoothQuant INT"
MINMAX_FP, BASELINE, FPQ = "MinMax FP", "FPQ baseline", "FPQ"

# What the floating-point methods leave out of FPQ. Without a search there is no metric.
FLOAT_METHODS = {
  MINMAX_FP: {
    "pre_shifted": False,
    "format_search": False,
    "max_search": False,
    "metric": "l2",
  },
  BASELINE: {"pre_shifted": False},
  FPQ: {},
}

ABLATIONS = {
  "formats fixed (E2M1)": {"format_search": False},
  "no search of the maximum": {"max_search": False},
  "1 round": {"rounds": 1},
  "gamma multiplies the maximum": {"param": "maxval_gamma"},
  "metric: mean absolute error": {"metric": "l1"},
  "offsets round the difference": {"offset_rounding": "difference"},
  "folded, then rounded": {"fold": "requantize"},
}


def fpq_settings(config: ConfigDict, bits: int, **changes) -> FPQSettings:
  """The config's search at W{bits}A{bits}."""
  options = {
    "weight_bits": bits,
    "activation_bits": bits,
    "rounds": config.rounds,
    "grid_size": config.grid_size,
    "param": config.param,
    "metric": config.metric,
    "offset_rounding": config.offset_rounding,
    "fold": config.fold,
    "tokens": config.search_tokens or None,
  }
  return FPQSettings(**options | changes)


def classifier_settings(config: ConfigDict) -> dict[str, object]:
  """Changes of `fpq_settings` for encoders and vision transformers with a classifier."""
  return {"metric": config.classifier_metric, "attention_products": config.attention_products}


def integer_model(
  model: Model,
  inputs: Array,
  bits: int,
  *,
  embedding_bits: int | None,
  segment_ids: Array | None = None,
  token_types: Array | None = None,
  smoothquant: bool = False,
  attention_products: bool = False,
) -> Model:
  """Rounded to nearest in integers: the same layers as FPQ's, ranges from the largest values.

  Weights per output channel and activations per tensor, both asymmetric; embeddings per tensor.

  Args:
    model: in full precision; not modified.
    inputs: calibration samples, int32 [samples, seq], or images.
    bits: of weights and activations.
    embedding_bits: of the table of tokens; None leaves it.
    segment_ids: int32 [samples, seq], 0 for padding.
    token_types: of an encoder, int32 [samples, seq], 1 for the second text of a pair.
    smoothquant: scale a decoder's channels by SmoothQuant's rule first.
    attention_products: round the operands of Q K^T and P V too, per tensor and asymmetric.
  """
  format, activation_format = IntegerFormat(bits), ActivationFormat(bits, "per_tensor")

  def quantize_block(index, block, x, context):
    rows = np.flatnonzero(np.asarray(token_mask(x, context)))
    scaled = calibration.smoothed_block(block, x, context, model.config) if smoothquant else block
    recorded = calibration.block_inputs(scaled, x, context)
    ranges = _ranges(recorded, dict.fromkeys(recorded, rows), activation_format)
    quantized = rtn_block(scaled, format)
    quantize_inputs(quantized, list(recorded), activation_format, ranges)
    if attention_products:
      operands = real_operands(scaled, x, context)
      formats = dict.fromkeys(operands, activation_format)
      attend = QuantizedAttention(formats, _operand_ranges(operands, activation_format))
      quantized.attention.attend = nnx.data(attend)
    return quantized

  model = untie(model)
  ids = {"segment_ids": segment_ids, "token_types": token_types}
  outer = outer_inputs(model, inputs, **ids)
  recorded, rows = ({path: pair[i] for path, pair in outer.items()} for i in (0, 1))
  ranges = _ranges(recorded, rows, activation_format)
  quantized = calibration.quantize_model(
    model, inputs, quantize_block, stream="full_precision", **ids
  )
  kernels = get_kernels(quantized, list(outer))
  pack_linears(quantized, {path: _rtn(kernel, format) for path, kernel in kernels.items()})
  quantize_inputs(quantized, list(outer), activation_format, ranges)
  if embedding_bits is not None and hasattr(quantized, "embed_tokens"):
    table = quantized.embed_tokens.embedding
    table[...] = _rounded_table(table[...], IntegerFormat(embedding_bits, axis=None))
  return quantized


@functools.partial(jax.jit, static_argnums=2)
def _ranges(recorded, rows, format):
  """Of inputs {path: [..., in]}, of the rows {path: [rows]} that count."""
  used = {path: x.reshape(-1, x.shape[-1])[rows[path]] for path, x in recorded.items()}
  return {path: min_max_range(x, format) for path, x in used.items()}


@functools.partial(jax.jit, static_argnums=1)
def _operand_ranges(operands, format):
  # The zeros of padding change no range: all contain 0.
  return {name: min_max_range(x, format) for name, x in operands.items()}


_rounded_table = jax.jit(rtn.fake_quantize, static_argnums=1)
_rtn = jax.jit(rtn.quantize, static_argnums=1)
