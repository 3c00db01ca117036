"""What is compared, and on what: quantization modes, model variants, calibration and evaluation."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import calibration_samples, evaluation_windows
from common.errors import UserError
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel
from common.models.decoder import AttentionContext, Block, Decoder
from common.models.outliers import inject_down_outliers, inject_outliers
from common.quantization import rtn
from common.quantization.awq import AWQSettings, apply_search, search_block
from common.quantization.calibration import quantize_model
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.quantized_array import IntegerFormat, QuantizedArray
from projects.adadim.adadim import AdaDimSettings, quantize_weights

Array = jax.Array


class Quantized(NamedTuple):
  """A quantized model as the experiment uses it.

  Attributes:
    model: its linears hold the dequantized weights, so that models compile alike whatever their
      axes. None of one that was scored.
    per_ic: share of its linears that are per-IC.
    bits_per_weight: stored bits, scales and zero points included.
    errors: of the adaptive choice, per block {path: [2]}.
    seconds: to quantize it; with compilation where it was the first of its kind.
  """

  model: Decoder | None
  per_ic: float
  bits_per_weight: float
  errors: list[dict[str, np.ndarray]]
  seconds: float


def methods(config: ConfigDict, bits: int, group_size: int) -> dict[str, AdaDimSettings]:
  """The modes of the main table; scales are stored, and evaluated, in float16."""
  rtn = AdaDimSettings(
    IntegerFormat(bits, group_size, scale_dtype=jnp.float16),
    reference=config.reference,
    damping=config.damping,
  )
  gptq = dataclasses.replace(rtn, algorithm="gptq")
  change = dataclasses.replace
  return {
    "RTN-OC": change(rtn, axis="per_oc"),
    "RTN-IC": change(rtn, axis="per_ic"),
    "RTN-heuristic": change(rtn, axis="heuristic"),
    "RTN-ada": rtn,
    "GPTQ-OC": change(gptq, axis="per_oc", act_order=False),
    "GPTQ-OC static reorder": change(gptq, axis="per_oc"),
    "GPTQ-IC": change(gptq, axis="per_ic"),
    "GPTQ-ada": gptq,
  }


# (full-precision block, its inputs, context) -> (block to take the weights, packed weights by path,
# errors of an adaptive choice or None)
Weights = Callable[
  [Block, Array, AttentionContext],
  tuple[Block, dict[str, QuantizedArray], dict[str, Array] | None],
]


def quantize_dequantized(model: Decoder, tokens: Array, settings: AdaDimSettings) -> Quantized:
  """Quantizes a model. tokens: calibration samples, int32 [samples, seq]."""
  weights = lambda block, x, context: (block, *quantize_weights(block, x, context, settings))
  return _quantized(model, tokens, weights, settings.stream)


def awq_dequantized(model: Decoder, tokens: Array, format: IntegerFormat) -> Quantized:
  """The baseline AWQ: scales and clipping searched, then groups along the input rounded."""
  settings = AWQSettings(format)

  def weights(block, x, context):
    search = search_block(block, x, context, model.config, settings)
    block = apply_search(block, search, model.config)
    return block, {p: _rtn(w, format) for p, w in get_kernels(block).items()}, None

  return _quantized(model, tokens, weights, "full_precision")


def _quantized(model: Decoder, tokens: Array, weights_of: Weights, stream: str) -> Quantized:
  packed, errors = [], []

  def quantize_block(index, block, x, context):
    block, weights, block_errors = weights_of(block, x, context)
    packed.extend(weights.values())
    if block_errors is not None:
      errors.append(block_errors)
    block = nnx.clone(block)
    set_kernels(block, {path: _dequantize(w) for path, w in weights.items()})
    return block

  start = time.perf_counter()
  quantized = quantize_model(model, tokens, quantize_block, stream=stream)
  quantized, errors = jax.block_until_ready((quantized, errors))
  seconds = time.perf_counter() - start
  size = lambda w: w.shape[0] * w.shape[1]
  return Quantized(
    quantized,
    float(np.mean([w.format.axis for w in packed])),
    sum(size(w) * w.bits_per_weight() for w in packed) / sum(map(size, packed)),
    jax.device_get(errors),
    seconds,
  )


def variant(config: ConfigDict, name: str, model: Decoder, seed: int) -> Decoder:
  """The model, or one that computes the same with outlier activations.

  Raises:
    UserError: no such variant.
  """
  outliers = {"fraction": config.outlier_fraction, "gain": config.outlier_gain}
  if name == "natural":
    return model
  if name == "norm_outliers":
    return inject_outliers(model, jax.random.key(seed), **outliers)
  if name == "down_outliers":
    return inject_down_outliers(model, jax.random.key(seed), **outliers)
  supported = "natural, norm_outliers, down_outliers"
  raise UserError(f"variant {name!r} is not supported; supported: {supported}")


def load_evaluation(config: ConfigDict, base: BaseModel) -> dict[str, np.ndarray]:
  """Windows of every domain, {domain: int32 [windows, seq]}."""
  domains = dict.fromkeys((*config.domains, *config.task_domains))
  return evaluation_windows(
    domains, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
  )


def losses(model: Decoder, windows: dict[str, np.ndarray], domains) -> WindowLosses:
  """Losses on several domains together."""
  return window_losses(model, np.concatenate([windows[domain] for domain in domains]))


def calibration(config: ConfigDict, base: BaseModel, source: str, seed: int) -> Array:
  """A draw of calibration samples, int32 [samples, seq]."""
  samples = calibration_samples(
    source,
    base.tokenizer,
    num_samples=config.calibration_samples,
    seq_len=config.calibration_length,
    seed=seed,
    max_document_tokens=config.max_document_tokens or None,
  )
  return jnp.asarray(samples)


def num_weights(model: Decoder) -> int:
  """Number of weights in the linears of all blocks."""
  return sum(w.size for block in model.blocks for w in get_kernels(block).values())


_dequantize = jax.jit(lambda weight: weight.dequantize())
_rtn = jax.jit(rtn.quantize, static_argnums=1)
