"""Peak memory of quantizing a checkpoint of 16 blocks beside one of 4 blocks of the same width.

  .venv/bin/python -m benchmarks.quantization.streaming_memory

Each measurement is the largest resident set of a process that runs `./run.sh quantize`'s code with
AWQ, so it includes Python and XLA; blocks of 25 MB make the weights count.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import app, flags

from common import cli
from common.reporting.report import environment

_OUT = flags.DEFINE_string("out", "benchmarks/quantization/streaming_memory.json", "result")
_CHILD = flags.DEFINE_list("child", None, "source and target of one measurement (internal)")

NUM_BLOCKS = (4, 16)


def config(num_layers: int):
  from common.models.decoder import DecoderConfig

  return DecoderConfig(
    vocab_size=512,
    hidden_size=768,
    intermediate_size=1792,
    num_layers=num_layers,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    max_position_embeddings=256,
  )


def quantize(source: str, target: str) -> None:
  """Quantizes in this process and prints its largest resident set, in MB."""
  import jax.numpy as jnp
  import numpy as np

  from common.checkpoints.huggingface import Checkpoint
  from common.quantization.awq import AWQSettings, quantize_block, search_block
  from common.quantization.checkpoint import quantize_checkpoint
  from common.quantization.quantized_array import IntegerFormat

  checkpoint = Checkpoint(source)
  format = IntegerFormat(4, 128, scale_dtype=jnp.float16)
  settings = AWQSettings(format)

  def block(index, block, x, context):
    search = search_block(block, x, context, checkpoint.config, settings)
    return quantize_block(block, search, checkpoint.config, format)

  tokens = np.random.default_rng(0).integers(0, 512, (4, 64)).astype(np.int32)
  quantize_checkpoint(
    checkpoint, target, jnp.asarray(tokens), block, settings={"method": "awq"}, format=format
  )
  # Not getrusage: a process inherits its ru_maxrss from the one that started it.
  status = pathlib.Path("/proc/self/status").read_text()
  print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def main(_) -> None:
  cli.prepare_jax()
  if _CHILD.value:
    quantize(*_CHILD.value)
    return
  from flax import nnx

  from common.checkpoints.huggingface import save_model
  from common.models.decoder import Decoder

  peak = {}
  with tempfile.TemporaryDirectory() as folder:
    for num_blocks in NUM_BLOCKS:
      source = pathlib.Path(folder) / f"source-{num_blocks}"
      save_model(Decoder(config(num_blocks), rngs=nnx.Rngs(0)), source)
      target = pathlib.Path(folder) / f"target-{num_blocks}"
      command = [sys.executable, "-m", "benchmarks.quantization.streaming_memory"]
      done = subprocess.run(
        [*command, f"--child={source},{target}"], check=True, capture_output=True, text=True
      )
      peak[f"{num_blocks} blocks"] = float(done.stdout.split()[-1])
  four, sixteen = peak.values()
  result = {
    "peak_megabytes": peak,
    "ratio": sixteen / four,
    "block_megabytes": (4 * 768 * 768 + 3 * 768 * 1792) * 4 / 2**20,
    "environment": environment(),
  }
  pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  app.run(main)
