"""Quantizes a checkpoint directory into another one, block by block."""

import os
from collections.abc import Callable, Iterable

import jax
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.checkpoints.shards import CheckpointWriter
from common.errors import UserError
from common.models.decoder import Block, DecoderConfig
from common.models.surgery import get_module, linear_paths
from common.quantization import autoawq
from common.quantization.calibration import QuantizeBlock, quantize_blocks
from common.quantization.linear import quantized_weights
from common.quantization.quantized_array import IntegerFormat


def quantize_checkpoint(
  source: Checkpoint,
  out: str | os.PathLike,
  tokens: jax.Array,
  quantize_block: QuantizeBlock,
  format: IntegerFormat,
  *,
  stream: str = "full_precision",
  overwrite: bool = False,
  track: Callable[[Iterable[Block]], Iterable[Block]] = iter,
) -> None:
  """Streams `source` through `quantize_block` into a packed checkpoint at `out`.

  Memory holds one block, the calibration activations and the embeddings, however deep the model.
  Each block is a shard of its own; `out` appears only when complete.

  Args:
    source: full-precision checkpoint.
    out: directory to create, in the AutoAWQ layout (`autoawq`).
    tokens: calibration samples, int32 [samples, seq].
    quantize_block: returns the block with its linears packed, see `quantize_blocks`.
    format: of the packed weights, written to config.json.
    stream: see `quantize_blocks`.
    overwrite: replace `out` if it exists.
    track: wraps the stream of quantized blocks, to show progress.

  Raises:
    UserError: `source` is not a decoder or is quantized already, `out` exists or cannot be
      written, or the layout cannot hold the format or the model.
    ValueError: `quantize_block` packs weights in another format.
  """
  source.require_decoder()
  if source.quantization:
    raise UserError(f"{source.path} is quantized already; start from the full-precision checkpoint")
  check_format(source.config, format)
  config = dict(source.hf_config) | {"quantization_config": autoawq.quantization_config(format)}
  with CheckpointWriter(out, config, tokenizer_from=source.path, overwrite=overwrite) as writer:
    outer = source.load_outer()
    writer.add(autoawq.to_tensors(outer, source.config))
    writer.flush()
    blocks = (source.load_block(i) for i in range(source.config.num_layers))
    quantized = quantize_blocks(outer, blocks, tokens, quantize_block, stream=stream)
    for i, block in enumerate(track(quantized)):
      for path, weight in quantized_weights(block).items():
        if weight.format != format:
          raise ValueError(f"block {i}: {path} was given {weight.format}, not {format}")
      writer.add(autoawq.to_tensors(block, source.config, ("blocks", i)))
      writer.flush()


def check_format(config: DecoderConfig, format: IntegerFormat) -> None:
  """Checks, before any work, that the format fits every linear of a decoder's block.

  Raises:
    UserError: the group size does not divide a dimension (the linear is named).
  """
  block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))
  for path in linear_paths(block):
    linear = get_module(block, path)
    try:
      format.num_groups((linear.in_features, linear.out_features))
    except UserError as e:
      raise UserError(f"{path}: {e}") from None
