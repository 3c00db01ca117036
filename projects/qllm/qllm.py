"""QLLM on decoders: where channels are reassembled, and how blocks are tuned, a round at a time.

A round is a few consecutive blocks. Its blocks are walked in order: at each site (the inputs of q, k
and v, of gate and up, and of down) the threshold is searched on the quantized stream and the
channels are reassembled, then weights, linears' inputs and attention's operands are rounded. The
blocks of the round are then tuned jointly (`error_correction`). Memory holds one round.

`quantize_block` fits `common.quantization.calibration.quantize_blocks` (stream="both") with rounds of
one block, whose inputs may lie in the host's memory: the search and the scores hold those of
`search_samples` samples, all else is a maximum, a sum or a batch. `quantize` takes a whole decoder
and also tunes its final norm.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block, Decoder, DecoderConfig
from common.models.surgery import get_module, replace_module
from common.quantization import rtn
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.attention import QuantizedAttention
from common.quantization.calibration import Streams, check_finite, passes, run_block, token_mask
from common.quantization.linear import get_kernels, pack_linears
from common.quantization.quantized_kernel import quantize_kernels
from common.quantization.reassembly import ReassembledInput, reassemble_weights
from common.quantization.reconstruction import ReconstructionLog, on_device, reconstruct
from projects.qllm.error_correction import (
  BiasedNorm,
  BlockGroup,
  LowRankKernel,
  TunedKernel,
  learn_norms_and_biases,
  make_optimizer,
  merge_correction,
  run_norm,
)
from projects.qllm.settings import Settings, Tuning
from projects.qllm.sites import SiteReassembly, find_reassemblies, sites

Array = jax.Array


class RoundLog(NamedTuple):
  """What happened in a round.

  Attributes:
    sites: of every block, {path before which channels are reassembled: what was found}.
    tuning: None without tuning.
    merged_error: mean squared error of the round's output on the calibration set as it is used,
      after the merge, float32 [].
  """

  sites: list[dict[str, SiteReassembly]]
  tuning: ReconstructionLog | None
  merged_error: Array


def quantize_block(
  index: int,
  block: Block,
  x: Streams,
  context: AttentionContext,
  *,
  config: DecoderConfig,
  settings: Settings,
  key: Array,
) -> Block:
  """A round of one block: what `quantize_blocks(..., stream="both")` takes.

  Args:
    index: of the block; every block has its own randomness.
    block, x, context: see `quantize_blocks`.
    config, settings: see `quantize_round`.
    key: of the whole model.
  """
  key = jax.random.fold_in(key, index)
  (quantized,), _, _ = quantize_round([block], x, context, config, settings, key)
  return quantized


def quantize_round(
  blocks: Sequence[Block],
  x: Streams,
  context: AttentionContext,
  config: DecoderConfig,
  settings: Settings,
  key: Array,
) -> tuple[list[Block], Streams, RoundLog]:
  """Consecutive blocks, reassembled, rounded and tuned jointly; their outputs; what happened.

  Args:
    blocks: in full precision; not modified.
    x: inputs of the first in the original and in the quantized model, [samples, seq, dim].
    context: of one row for all samples, or of every sample.
    config: the decoder's.
    settings: what to do.
    key: of the low-rank terms and of the batches.

  Raises:
    UserError: see `check_block`.
  """
  for block in blocks:
    check_block(block, config, settings, x.quantized)
  targets, features = x
  students, found = [], []
  batch_key, *block_keys = jax.random.split(key, len(blocks) + 1)
  for block, block_key in zip(blocks, block_keys):
    student, of_block = student_block(block, features, context, config, settings, block_key)
    students.append(student)
    found.append(of_block)
    targets = run_block(block, targets, context)
    features = run_block(merge_correction(student), features, context)
  if settings.tuning is None:
    quantized, log = students, None
  else:
    tuned, log = tune(
      BlockGroup(students),
      x.quantized,
      targets,
      context,
      batch_key,
      settings.tuning,
    )
    quantized = [merge_correction(block, settings.tuning.merge) for block in tuned.unstack()]
    features = x.quantized
    for block in quantized:
      features = run_block(block, features, context)
  error = _error(features, targets, context)
  return quantized, Streams(targets, features), RoundLog(found, log, error)


def student_block(
  block: Block,
  x: Array,
  context: AttentionContext,
  config: DecoderConfig,
  settings: Settings,
  key: Array,
) -> tuple[Block, dict[str, SiteReassembly]]:
  """A block with reassembled channels, rounded inputs and operands, and weights to learn.

  Without tuning its weights are packed, and it is what is used.

  Args:
    x: its inputs in the quantized model, [samples, seq, dim].
    key: of the low-rank terms.
    block, context, config, settings: see `quantize_round`.
  """
  found = find_reassemblies(block, x, context, config, settings)
  return assemble_student(block, found, config, settings, key), found


def assemble_student(
  block: Block,
  found: dict[str, SiteReassembly],
  config: DecoderConfig,
  settings: Settings,
  key: Array,
) -> Block:
  """`student_block` with channels that were found already."""
  student = nnx.clone(block)
  kernels = get_kernels(student)
  for site in sites(config):
    if site.previous in found:
      for path in site.linears:
        kernels[path] = _reassemble_weights(kernels[path], found[site.previous].reassembly)
  tuning = settings.tuning
  if tuning is None:
    pack_linears(student, {p: _quantize(w, settings.weights) for p, w in kernels.items()})
  elif tuning.learn == "all_weights":
    quantize_kernels(student, {p: TunedKernel(w, settings.weights) for p, w in kernels.items()})
    learn_norms_and_biases(student)
  else:
    keys = dict(zip(kernels, jax.random.split(key, len(kernels))))
    low_rank = {
      p: LowRankKernel(w, settings.weights, tuning.rank, keys[p]) for p, w in kernels.items()
    }
    quantize_kernels(student, low_rank)
    learn_norms_and_biases(student)
  quantize_inputs(student, list(kernels), settings.activations)
  quantize_attention(student, settings.activations)
  for site in sites(config):
    if site.previous in found:
      reassembled = ReassembledInput(found[site.previous].reassembly)
      if site.linears == ("mlp.down_proj",):
        student.mlp.down_proj = nnx.Sequential(reassembled, student.mlp.down_proj)
      else:
        norm = get_module(student, site.previous)
        replace_module(student, site.previous, nnx.Sequential(norm, reassembled))
  return student


def quantize_attention(block: Block, format: ActivationFormat) -> None:
  """Rounds queries, keys and values (not the probabilities) per token and head, in place."""
  formats = dict.fromkeys(("query", "key", "value"), format)
  block.attention.attend = nnx.data(QuantizedAttention(formats))


def tune(
  student: BlockGroup,
  inputs: Array,
  targets: Array,
  context: AttentionContext,
  key: Array,
  tuning: Tuning,
) -> tuple[BlockGroup, ReconstructionLog]:
  """Trains a round; see `reconstruct`."""
  settings = tuning.reconstruction(len(inputs))
  optimizer = make_optimizer(tuning.learning_rate, settings.num_steps)
  return reconstruct(student, inputs, targets, context, key, settings, optimizer)


def tune_final_norm(
  norm: nnx.Module, streams: Streams, key: Array, tuning: Tuning
) -> tuple[BiasedNorm, ReconstructionLog]:
  """The final norm with a bias, tuned to give on the quantized what it gives on the original stream.

  Args:
    norm: not modified.
    streams: the last block's outputs, [samples, seq, dim].
    key: of the batches.
    tuning: steps and rate.
  """
  student = BiasedNorm(nnx.clone(norm))
  learn_norms_and_biases(student)
  settings = tuning.reconstruction(len(streams.quantized))
  optimizer = make_optimizer(tuning.learning_rate, settings.num_steps)
  targets = norm(streams.full_precision)
  student, log = reconstruct(
    student, streams.quantized, targets, None, key, settings, optimizer, run=run_norm
  )
  learn_norms_and_biases(student, False)
  return student, log


def quantize(
  model: Decoder, tokens: Array, settings: Settings, key: Array
) -> tuple[Decoder, list[RoundLog]]:
  """A quantized copy of an in-memory decoder, and what happened in every round.

  Args:
    model: full precision, not modified.
    tokens: calibration samples, int32 [samples, seq].
    settings: what to do.
    key: of the low-rank terms and of the batches.

  Raises:
    UserError: see `check_model`.
  """
  check_model(model, settings)
  tuning = settings.tuning
  size = 1 if tuning is None else tuning.blocks_per_round
  x, context = model.stem(tokens)
  streams, quantized, logs = Streams(x, x), [], []
  for start in range(0, len(model.blocks), size):
    blocks = list(model.blocks[start : start + size])
    done, streams, log = quantize_round(
      blocks, streams, context, model.config, settings, jax.random.fold_in(key, start)
    )
    quantized += done
    logs.append(log)
  result = nnx.clone(model)
  result.blocks = nnx.List(quantized)
  if tuning is not None and tuning.final_norm and model.final_norm is not None:
    norm_key = jax.random.fold_in(key, len(model.blocks))
    result.final_norm, _ = tune_final_norm(model.final_norm, streams, norm_key, tuning)
  return result, logs


def check_model(model: Decoder, settings: Settings) -> None:
  """Checks a model before any work.

  Raises:
    UserError: the architecture is not supported, the blocks do not divide into rounds, a weight is
      NaN or infinite (it is named), or a group size does not divide.
  """
  if not isinstance(model, Decoder):
    raise UserError(f"QLLM does not support {type(model).__name__}; supported: decoders")
  if settings.tuning is not None and len(model.blocks) % settings.tuning.blocks_per_round:
    raise UserError(
      f"blocks_per_round={settings.tuning.blocks_per_round} does not divide the model's "
      f"{len(model.blocks)} blocks; expected a divisor, so that none is left out"
    )
  check_finite(model)
  check_block(model.blocks[0], model.config, settings)


def check_block(
  block: Block, config: DecoderConfig, settings: Settings, x: Array | None = None
) -> None:
  """Checks a block, and its inputs if they are given, before any work.

  Raises:
    UserError: see `check_model`.
  """
  if config.norm_placement != "pre":
    raise UserError(
      f"QLLM does not support norm_placement={config.norm_placement!r}: its norms feed the residual "
      "stream as well as the linears; supported: norm_placement='pre' (Llama, OPT, ...)"
    )
  for path, kernel in get_kernels(block).items():
    for group_size, name in (
      (settings.weights.group_size, "weights"),
      (settings.activations.group_size, "activations"),
    ):
      if group_size > 0 and kernel.shape[0] % group_size:
        raise UserError(
          f"{path}: group_size={group_size} of {name} does not divide its {kernel.shape[0]} inputs"
        )
  check_finite(block, x)


@jax.jit
def _error(output: Array, target: Array, context: AttentionContext) -> Array:
  """Mean squared error of real tokens, float32 []; of a few rows at a time, wherever they lie."""

  def of_rows(rows):
    (output, context), target = rows
    error = on_device(output).astype(jnp.float32) - on_device(target).astype(jnp.float32)
    return jnp.sum(error**2 * token_mask(output, context))

  squares = jax.lax.map(of_rows, (passes(output, context), passes(target, context)[0]))
  return squares.sum() / (token_mask(output, context).sum() * output.shape[-1])


_reassemble_weights = jax.jit(reassemble_weights)
_quantize = jax.jit(rtn.quantize, static_argnums=1)
