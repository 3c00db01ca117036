"""usage: ./run.sh quantize --model=DIR --out=DIR [flags]

Quantizes a Hugging Face checkpoint into a packed one, one block at a time: memory holds one block
and the calibration activations, however deep the model. 4-bit results are in AutoAWQ's layout.

  --model=DIR           full-precision checkpoint (config.json, safetensors, tokenizer.json)
  --out=DIR             directory to create; it appears only when complete
  --method=awq          awq, gptq, flexround or rtn
  --bits=4              2, 3, 4 or 8
  --group_size=128      weights along the input that share a scale; -1 for all
  --calibration=SOURCE  calibration text (default: embedded:prose; see common/data/sources.py)
  --num_samples=128     calibration sequences
  --seq_len=512         tokens in each
  --seed=42             of the calibration draw
  --search=FILE         AWQ's search result: read if the file exists, else searched and written
  --steps=5000          FlexRound's per block
  --learning_rate=3e-3  FlexRound's
  --overwrite           replace --out if it exists
"""

import pathlib

from absl import flags

from common import cli
from common.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "full-precision checkpoint", required=True)
_OUT = flags.DEFINE_string("out", None, "directory to create", required=True)
_METHOD = flags.DEFINE_enum("method", "awq", ["awq", "gptq", "flexround", "rtn"], "method")
_BITS = flags.DEFINE_integer("bits", 4, "2, 3, 4 or 8")
_GROUP_SIZE = flags.DEFINE_integer("group_size", 128, "weights that share a scale")
_CALIBRATION = flags.DEFINE_string("calibration", "embedded:prose", "calibration text")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 128, "calibration sequences", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "tokens in each sequence", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 42, "of the calibration draw")
_SEARCH = flags.DEFINE_string("search", None, "AWQ's search result")
_STEPS = flags.DEFINE_integer("steps", 5000, "FlexRound's per block", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "FlexRound's")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace --out")


def awq(config, format):
  """AWQ's `quantize_block`, and what to do once every block is through."""
  from common.quantization.awq import AWQSettings, quantize_block, search_block
  from projects.awq import search_result

  settings = AWQSettings(format=format)
  path = pathlib.Path(_SEARCH.value) if _SEARCH.value else None
  found = None
  if path and path.exists():
    found, settings = search_result.load(path)
    if settings.format != format or len(found) != config.num_layers:
      raise UserError(
        f"{path} is the search result of {len(found)} blocks with {settings.format}, not of "
        f"{config.num_layers} with {format}; use its --bits and --group_size, or another file"
      )
  searches = []

  def block(index, block, x, context):
    search = found[index] if found else search_block(block, x, context, config, settings)
    searches.append(search)
    return quantize_block(block, search, config, format)

  def finish():
    if path and not found:
      search_result.save(path, searches, settings)

  return block, finish


def flexround(format):
  """FlexRound's `quantize_block`, as the official scripts quantize a 4-bit Llama-2-7B."""
  import functools

  import jax

  from common.quantization.reconstruction import ReconstructionSettings
  from projects.flexround.flexround import FlexRoundSettings, make_optimizer, quantize_block

  return functools.partial(
    quantize_block,
    settings=FlexRoundSettings(format, start="min_max"),
    reconstruction=ReconstructionSettings(_STEPS.value, batch_size=2),
    optimizer=make_optimizer(_LEARNING_RATE.value, _STEPS.value),
    key=jax.random.key(_SEED.value),
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
  if _SEARCH.value and _METHOD.value != "awq":
    raise UserError(f"--search belongs to --method=awq, not {_METHOD.value}")
  cli.prepare_jax()
  import jax.numpy as jnp
  from rich.progress import track

  from common.checkpoints.huggingface import Checkpoint
  from common.data.pipelines import calibration_samples
  from common.data.tokenizer import load_tokenizer
  from common.quantization import calibration
  from common.quantization.checkpoint import quantize_checkpoint
  from common.quantization.quantized_array import IntegerFormat

  source = Checkpoint(_MODEL.value)
  format = IntegerFormat(_BITS.value, _GROUP_SIZE.value, scale_dtype=jnp.float16)
  finish, stream = lambda: None, "full_precision"
  if _METHOD.value == "awq":
    quantize_block, finish = awq(source.config, format)
  elif _METHOD.value == "gptq":
    stream = "quantized"
    quantize_block = lambda i, block, x, context: calibration.gptq_block(block, x, context, format)
  elif _METHOD.value == "flexround":
    stream, quantize_block = "both", flexround(format)
  else:
    quantize_block = lambda i, block, x, context: calibration.rtn_block(block, format)
  tokens = calibration_samples(
    _CALIBRATION.value,
    load_tokenizer(_MODEL.value),
    num_samples=_NUM_SAMPLES.value,
    seq_len=_SEQ_LEN.value,
    seed=_SEED.value,
  )
  quantize_checkpoint(
    source,
    _OUT.value,
    jnp.asarray(tokens),
    quantize_block,
    format,
    stream=stream,
    overwrite=_OVERWRITE.value,
    track=lambda blocks: track(blocks, "blocks", total=source.config.num_layers),
  )
  finish()
  print(f"written to {_OUT.value}")


if __name__ == "__main__":
  cli.run_app(main)
