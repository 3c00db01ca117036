"""VPTQ of a decoder's block and of a whole model: Hessians, quantized linears, stored or dense."""

import jax
from flax import nnx

from common.models.decoder import AttentionContext, Block, Decoder
from common.models.surgery import get_module, linear_paths, replace_module
from common.quantization.calibration import block_hessians, check_finite, quantize_model
from common.quantization.linear import get_kernels
from common.quantization.vector_quantized import VectorQuantizedArray, VectorQuantizedLinear
from projects.vptq.finetune import Finetuning, finetune_block
from projects.vptq.vptq import ProxyErrors, VPTQSettings, vptq

Array = jax.Array


def check_block(block: Block, settings: VPTQSettings, x: Array | None = None) -> None:
  """Checks every linear of a block, and its inputs, before any work.

  Raises:
    UserError: one cannot be quantized so, or has NaN or infinities; it is named.
  """
  for path, kernel in get_kernels(block).items():
    settings.check(kernel.shape, path)
  check_finite(block, x)


def hessians_of_block(block: Block, x: Array, context: AttentionContext) -> dict[str, Array]:
  """E[x x^T] (times 2) of the inputs of every linear, {path: float32 [in, in]}.

  Args:
    x: the block's inputs, [samples, seq, dim].
    context: see `common.quantization.calibration.quantize_blocks`.
  """
  return block_hessians(block, x, context, linear_paths(block))


def quantize_kernels(
  kernels: dict[str, Array], hessians: dict[str, Array], settings: VPTQSettings, key: Array
) -> tuple[dict[str, VectorQuantizedArray], dict[str, ProxyErrors]]:
  """VPTQ of every kernel [in, out] against the Hessian of the same path; a key of its own each."""
  keys = dict(zip(kernels, jax.random.split(key, len(kernels))))
  results = {p: vptq(w, hessians[p], keys[p], settings) for p, w in kernels.items()}
  return {p: r[0] for p, r in results.items()}, {p: r[1] for p, r in results.items()}


def replace_linears(block: Block, weights: dict[str, VectorQuantizedArray]) -> Block:
  """A copy of the block with a `VectorQuantizedLinear` (and the bias that was there) at each path."""
  block = nnx.clone(block)
  for path, weight in weights.items():
    bias = get_module(block, path).bias
    replace_module(block, path, VectorQuantizedLinear(weight, None if bias is None else bias[...]))
  return block


def quantize_block(
  index: int,
  block: Block,
  x: Array,
  context: AttentionContext,
  *,
  settings: VPTQSettings,
  key: Array,
  finetuning: Finetuning | None = None,
) -> Block:
  """The block with every linear vector-quantized: `functools.partial` of it is a `QuantizeBlock`.

  Args:
    index: of the block; its k-means start from a key of their own.
    block: full precision, not modified.
    x: its inputs, [samples, seq, dim].
    context: see `common.quantization.calibration.quantize_blocks`.
    settings: see there.
    key: of all randomness.
    finetuning: layer-wise, of the quantized block; None leaves it out.

  Raises:
    UserError: see `check_block`.
  """
  check_block(block, settings, x)
  hessians = hessians_of_block(block, x, context)
  key, finetuning_key = jax.random.split(jax.random.fold_in(key, index))
  weights, _ = quantize_kernels(get_kernels(block), hessians, settings, key)
  quantized = replace_linears(block, weights)
  if finetuning is not None:
    quantized, _ = finetune_block(quantized, block, x, context, finetuning_key, finetuning)
  return quantized


def model_hessians(model: Decoder, tokens: Array) -> list[dict[str, Array]]:
  """Hessians of every block on the full-precision stream, as the published code collects them.

  Args:
    tokens: int32 [samples, seq].
  """
  hessians = []

  def collect(index, block, x, context):
    del index
    check_finite(block, x)
    hessians.append(hessians_of_block(block, x, context))
    return block

  quantize_model(model, tokens, collect, stream="full_precision")
  return hessians


def quantize_with_hessians(
  model: Decoder, hessians: list[dict[str, Array]], settings: VPTQSettings, key: Array
) -> tuple[Decoder, dict[str, ProxyErrors]]:
  """A copy of an in-memory model with every block quantized, and {path: its errors}."""
  quantized, errors, blocks = nnx.clone(model), {}, []
  for i, (block, h) in enumerate(zip(model.blocks, hessians, strict=True)):
    check_block(block, settings)
    kernels = get_kernels(block)
    weights, block_errors = quantize_kernels(kernels, h, settings, jax.random.fold_in(key, i))
    blocks.append(replace_linears(block, weights))
    errors |= {f"blocks.{i}.{path}": e for path, e in block_errors.items()}
  quantized.blocks = nnx.List(blocks)
  return quantized, errors


def dense(model: Decoder, original: Decoder) -> Decoder:
  """`model` with plain linears, whose kernels are what its indices stand for.

  The same numbers as `model`, what was tuned beside the linears included, in the program of
  `original`: no new compilation to evaluate it.
  """
  result = nnx.clone(model)
  for path, layer in list(nnx.iter_modules(model)):
    if isinstance(layer, VectorQuantizedLinear):
      name = ".".join(map(str, path))
      linear = nnx.clone(get_module(original, name))
      linear.kernel[...] = _dequantize(layer.weight)
      if linear.bias is not None:
        linear.bias[...] = layer.bias[...]
      replace_module(result, name, linear)
  return result


_dequantize = jax.jit(VectorQuantizedArray.dequantize)


def finetune_blocks(
  quantized: Decoder, model: Decoder, tokens: Array, key: Array, finetuning: Finetuning
) -> Decoder:
  """Layer-wise fine-tuning of every block of a quantized model, on the full-precision stream."""

  def tune(index, block, x, context):
    use = jax.random.fold_in(key, index)
    return finetune_block(quantized.blocks[index], block, x, context, use, finetuning)[0]

  return quantize_model(model, tokens, tune, stream="full_precision")
