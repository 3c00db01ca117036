"""Quantizes a checkpoint directory into another one, block by block; goes on after a kill."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.checkpoints.shards import CheckpointWriter, check_target, open_file, save_tensors
from common.checkpoints.tensors import to_hf
from common.errors import UserError
from common.models.decoder import Block, DecoderConfig
from common.models.surgery import get_module, linear_paths
from common.quantization import autoawq, packed_layout
from common.quantization.calibration import QuantizeBlock, Streams, check_finite, quantize_blocks
from common.quantization.linear import quantized_weights
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import SampleMemory, check_sample_memory


def quantize_checkpoint(
  source: Checkpoint,
  out: str | os.PathLike,
  tokens: jax.Array,
  quantize_block: QuantizeBlock,
  *,
  settings: Mapping[str, Any],
  format: IntegerFormat | None = None,
  stream: str = "full_precision",
  sample_memory: SampleMemory = "device",
  overwrite: bool = False,
  track: Callable[[Iterable[Block]], Iterable[Block]] = iter,
) -> None:
  """Streams `source` through `quantize_block` into a packed checkpoint at `out`.

  Memory holds one block, the calibration activations and the embeddings, however deep the model.
  `out` appears only when complete. Until then finished blocks are in `out` with the ending
  ".partial"; the same call finds them there after a kill and begins with the first that is missing.

  Args:
    source: full-precision checkpoint.
    out: directory to create.
    tokens: calibration samples, int32 [samples, seq].
    quantize_block: returns the block with its linears packed, see `quantize_blocks`. It must be
      deterministic, or a resumed run differs from one that was never interrupted.
    settings: the method and whatever changes its result, as JSON; "method" is its name.
    format: of weights that are written in the AutoAWQ layout (`autoawq`), which other tools read;
      None writes the layout that holds any block (`packed_layout`).
    stream, sample_memory: see `quantize_blocks`. An unfinished run goes on with either memory.
    overwrite: replace `out` if it exists, and what another run left unfinished.
    track: wraps the stream of quantized blocks, to show progress.

  Raises:
    UserError: `source` is not a decoder or is quantized already, `out` exists or cannot be
      written, another run was left unfinished there, the layout cannot hold the format or the
      model, a weight or calibration activation is not finite (it is named), or there is no such
      `sample_memory`.
    ValueError: `quantize_block` packs weights in another format.
  """
  check_sample_memory(sample_memory)
  source.require_decoder()
  if source.quantization:
    raise UserError(f"{source.path} is quantized already; start from the full-precision checkpoint")
  if format is not None:
    autoawq.quantization_config(format)
    check_format(source.config, format)
  out = pathlib.Path(out).expanduser()
  check_target(out, overwrite)
  outer = source.load_outer()
  outer_tensors = (to_hf if format is None else autoawq.to_tensors)(outer, source.config)
  partial = _open_partial(out, _fingerprint(source, tokens, settings, stream), overwrite)

  def resume(index: int, block: Block, x, context) -> Block:
    file = _block_file(partial, index)
    if not file.exists():
      for inputs in x if isinstance(x, Streams) else (x,):
        check_finite(block, inputs)
      quantized = quantize_block(index, block, x, context)
      if format is not None:
        _check_autoawq(index, quantized, source.config, format)
      tensors, layers = packed_layout.to_tensors(quantized)
      save_tensors(file, tensors, {"layers": json.dumps(layers)})
    # What is read back goes on, so that a resumed run sees the same.
    return _load_block(file, block)

  blocks = (source.load_block(i) for i in range(source.config.num_layers))
  quantized = quantize_blocks(
    outer, blocks, tokens, resume, stream=stream, sample_memory=sample_memory
  )
  try:
    for _ in track(quantized):
      pass
  except BaseException:
    if not _block_file(partial, 0).exists():
      shutil.rmtree(partial)  # Nothing to go on from.
    raise
  _assemble(source, outer_tensors, partial, out, settings["method"], format, overwrite)
  shutil.rmtree(partial)


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


def _fingerprint(
  source: Checkpoint, tokens: jax.Array, settings: Mapping[str, Any], stream: str
) -> dict[str, Any]:
  """What the result depends on."""
  files = sorted(set(source.files.values()))
  return {
    "source": str(source.path.resolve()),
    "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    "tokens": hashlib.sha256(np.asarray(tokens).tobytes()).hexdigest(),
    "stream": stream,
    "settings": dict(settings),
    "version": packed_layout.VERSION,
  }


def _open_partial(
  out: pathlib.Path, fingerprint: Mapping[str, Any], overwrite: bool
) -> pathlib.Path:
  """The directory of finished blocks: that of the same run, or a new one."""
  partial, run = out.with_name(f"{out.name}.partial"), "run.json"
  if partial.exists():
    try:
      same = json.loads((partial / run).read_text()) == json.loads(json.dumps(fingerprint))
    except (OSError, ValueError):
      same = False
    if same:
      return partial
    if not overwrite:
      raise UserError(
        f"{partial} is what a run with other settings left unfinished; remove it, finish that run, "
        "or ask to overwrite it"
      )
    if not (partial / run).is_file():
      raise UserError(f"{partial} is not of an unfinished run and is not overwritten")
    shutil.rmtree(partial)
  try:
    partial.mkdir(parents=True)
    (partial / run).write_text(json.dumps(fingerprint, indent=2) + "\n")
  except OSError as e:
    raise UserError(f"cannot write to {out.parent}: {e.strerror}") from None
  return partial


def _block_file(partial: pathlib.Path, index: int) -> pathlib.Path:
  return partial / f"block-{index:05d}.safetensors"


def _read(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The tensors and the layers of a finished block, see `packed_layout.to_tensors`."""
  with open_file(file) as f:
    return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["layers"])


def _load_block(file: pathlib.Path, like: Block) -> Block:
  """A finished block. like: the plain one, perhaps abstract."""
  abstract = nnx.eval_shape(lambda: nnx.clone(like))
  return packed_layout.from_tensors(abstract, *_read(file), dtype=None)


def _check_autoawq(index: int, block: Block, config: DecoderConfig, format: IntegerFormat) -> None:
  """Checks that the AutoAWQ layout holds a block, while little is lost if it does not."""
  for path, weight in quantized_weights(block).items():
    if weight.format != format:
      raise ValueError(f"block {index}: {path} was given {weight.format}, not {format}")
  autoawq.to_tensors(block, config, ("blocks", index))


def _assemble(
  source: Checkpoint,
  outer: Mapping[str, np.ndarray],
  partial: pathlib.Path,
  out: pathlib.Path,
  method: str,
  format: IntegerFormat | None,
  overwrite: bool,
) -> None:
  """Writes the checkpoint from the finished blocks, a shard each. outer: all other tensors."""
  files = [_block_file(partial, i) for i in range(source.config.num_layers)]
  if format is None:
    quantization = packed_layout.quantization_config(method, [_read(file)[1] for file in files])
  else:
    quantization = autoawq.quantization_config(format)
  abstract = nnx.eval_shape(lambda: Block(source.config, nnx.Rngs(0)))
  with CheckpointWriter(
    out,
    dict(source.hf_config) | {"quantization_config": quantization},
    tokenizer_from=source.path,
    overwrite=overwrite,
  ) as writer:
    writer.add(outer)
    writer.flush()
    for i, file in enumerate(files):
      if format is None:
        prefix = packed_layout.tensor_prefix(i)
        writer.add({f"{prefix}{name}": value for name, value in _read(file)[0].items()})
      else:
        block = _load_block(file, abstract)
        writer.add(autoawq.to_tensors(block, source.config, ("blocks", i)))
      writer.flush()
