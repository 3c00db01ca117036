import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from common.checkpoints.huggingface import Checkpoint, load_decoder, save_model
from common.errors import UserError
from common.quantization.calibration import gptq_block, quantize_model, rtn_block
from common.quantization.checkpoint import check_format, quantize_checkpoint
from common.quantization.linear import quantized_weights
from common.quantization.quantized_array import IntegerFormat
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

CONFIG = dataclasses.replace(ARCHITECTURES["llama"], num_layers=3)
FORMAT = IntegerFormat(4, 16, scale_dtype=jnp.float16)
SETTINGS = {"method": "rtn"}
AUTOAWQ = {"settings": SETTINGS, "format": FORMAT}


def rtn(index, block, x, context):
  return rtn_block(block, FORMAT)


def gptq(index, block, x, context):
  return gptq_block(block, x, context, FORMAT)


@pytest.fixture(scope="module")
def model():
  return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def tokens():
  return jnp.asarray(random_tokens(CONFIG, 10))


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("source") / "model"
  save_model(model, path)
  (path / "tokenizer.json").write_text('{"made": "up"}')
  return Checkpoint(path)


def folders(path):
  return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize(
  "quantize_block, stream, sample_memory",
  ((rtn, "full_precision", "device"), (gptq, "quantized", "pinned_host")),
  ids=("rtn", "gptq, from the host's memory"),
)
def test_equals_quantizing_the_model_in_memory(
  quantize_block, stream, sample_memory, model, source, tokens, tmp_path
):
  out = tmp_path / "out"
  options = AUTOAWQ | {"stream": stream, "sample_memory": sample_memory}
  quantize_checkpoint(source, out, tokens, quantize_block, **options)
  assert folders(tmp_path) == ["out"]
  loaded = load_decoder(tmp_path / "out")
  expected = quantize_model(model, tokens, quantize_block, stream=stream)
  assert len(quantized_weights(loaded)) == 3 * 7
  # The same computation on the same weights.
  np.testing.assert_array_equal(logits(loaded, tokens), logits(expected, tokens))
  # Not the full-precision model in disguise.
  assert np.abs(logits(loaded, tokens) - logits(model, tokens)).max() > 0.01


def test_every_block_is_a_shard_and_the_tokenizer_comes_along(source, tokens, tmp_path):
  out = tmp_path / "out"
  seen = []
  track = lambda blocks: (seen.append(block) or block for block in blocks)
  quantize_checkpoint(source, out, tokens, rtn, track=track, **AUTOAWQ)
  assert len(seen) == 3
  shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
  rest = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
  assert folders(out) == sorted(shards + rest)
  assert (out / "tokenizer.json").read_text() == '{"made": "up"}'
  for i, shard in enumerate(shards):
    with safetensors.safe_open(out / shard, framework="np") as f:
      of_blocks = {name.split(".")[2] for name in f.keys() if name.startswith("model.layers.")}
    assert of_blocks == (set() if i == 0 else {str(i - 1)})
  config = json.loads((out / "config.json").read_text())
  assert config.pop("quantization_config")["bits"] == 4
  assert config == source.hf_config


class Interrupted(BaseException):
  """Like Ctrl-C, no `Exception`."""


@pytest.mark.parametrize("layout", (AUTOAWQ, {"settings": SETTINGS}), ids=("autoawq", "packed"))
def test_an_interrupted_run_goes_on(layout, source, tokens, tmp_path):
  """From the block where it was interrupted, to the same files."""
  quantized, fails_at = [], 2

  def quantize_block(index, block, x, context):
    if index == fails_at:
      raise Interrupted
    quantized.append(index)
    return gptq_block(block, x, context, FORMAT)

  run = lambda out, **options: quantize_checkpoint(
    source, tmp_path / out, tokens, quantize_block, stream="quantized", **(layout | options)
  )
  with pytest.raises(Interrupted):
    run("out")
  assert folders(tmp_path) == ["out.partial"] and quantized == [0, 1]
  with pytest.raises(UserError, match="out.partial is what a run with other settings left"):
    run("out", settings={"method": "gptq"})
  fails_at = None
  run("out")
  assert folders(tmp_path) == ["out"] and quantized == [0, 1, 2]
  run("again")
  for name in folders(tmp_path / "out"):
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_nothing_is_left_if_no_block_was_done(source, tokens, tmp_path):
  def quantize_block(index, block, x, context):
    raise Interrupted

  with pytest.raises(Interrupted):
    quantize_checkpoint(source, tmp_path / "out", tokens, quantize_block, **AUTOAWQ)
  assert folders(tmp_path) == []


def test_an_existing_directory_is_refused_unless_asked(source, tokens, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "config.json").write_text("mine")
  with pytest.raises(UserError, match="out exists; choose another directory"):
    quantize_checkpoint(source, tmp_path / "out", tokens, rtn, **AUTOAWQ)
  assert folders(tmp_path / "out") == ["config.json"]

  def fails(index, block, x, context):
    raise RuntimeError

  with pytest.raises(RuntimeError):
    quantize_checkpoint(source, tmp_path / "out", tokens, fails, overwrite=True, **AUTOAWQ)
  assert (tmp_path / "out" / "config.json").read_text() == "mine"
  quantize_checkpoint(source, tmp_path / "out", tokens, rtn, overwrite=True, **AUTOAWQ)
  assert len(quantized_weights(load_decoder(tmp_path / "out"))) == 3 * 7
  assert folders(tmp_path) == ["out"]


def refused(source, tokens, format, error, message, out, quantize_block=rtn):
  with pytest.raises(error, match=message):
    quantize_checkpoint(source, out, tokens, quantize_block, settings=SETTINGS, format=format)
  assert folders(out.parent) == []


def test_unsuitable_formats_are_refused_before_any_work(source, tokens, tmp_path):
  def never(*_):
    raise AssertionError("must not be reached")

  for changes, message in (
    ({"symmetric": True}, "AutoAWQ layout holds asymmetric"),
    ({"group_size": 24}, "attention.k_proj: group_size=24 does not divide the input dimension 32"),
    # Divides the hidden size, not the MLP's.
    ({"group_size": 64}, "group_size=64 does not divide the input dimension 32"),
  ):
    format = dataclasses.replace(FORMAT, **changes)
    refused(source, tokens, format, UserError, message, tmp_path / "out", never)
  with pytest.raises(UserError, match="mlp.down_proj: group_size=32 .*input dimension 48"):
    check_format(
      dataclasses.replace(CONFIG, intermediate_size=48), dataclasses.replace(FORMAT, group_size=32)
    )


def test_weights_in_another_format_are_refused(source, tokens, tmp_path):
  """config.json would lie about them."""
  format = dataclasses.replace(FORMAT, group_size=8)
  message = "block 0: .* was given .*group_size=16.*, not .*group_size=8"
  refused(source, tokens, format, ValueError, message, tmp_path / "out")


def test_a_quantized_source_is_refused(source, tokens, tmp_path):
  quantize_checkpoint(source, tmp_path / "once", tokens, rtn, **AUTOAWQ)
  with pytest.raises(UserError, match="is quantized already; start from the full-precision"):
    quantize_checkpoint(Checkpoint(tmp_path / "once"), tmp_path / "twice", tokens, rtn, **AUTOAWQ)
  assert folders(tmp_path) == ["once"]


PEAK_MEMORY = """
import sys
import jax.numpy as jnp
from common.checkpoints.huggingface import Checkpoint
from common.quantization.calibration import rtn_block
from common.quantization.checkpoint import quantize_checkpoint
from common.quantization.quantized_array import IntegerFormat

source, out = sys.argv[1:]
format = IntegerFormat(4, 128, scale_dtype=jnp.float16)
quantize_checkpoint(
  Checkpoint(source),
  out,
  jnp.zeros((2, 8), jnp.int32),
  lambda i, block, x, context: rtn_block(block, format),
  settings={"method": "rtn"},
  format=format,
)
# Not `getrusage`: there a new process starts at the size of the one that made it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_depth(tmp_path):
  """Four times the blocks, of 13 MB each, in a process of its own: the same peak."""
  peaks = {}
  for depth in (4, 16):
    config = dataclasses.replace(
      CONFIG, hidden_size=512, head_dim=128, intermediate_size=1536, num_layers=depth
    )
    save_model(random_decoder(config), tmp_path / str(depth))
    arguments = [sys.executable, "-c", PEAK_MEMORY, tmp_path / str(depth), tmp_path / f"out{depth}"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    peaks[depth] = int(run.stdout.split()[-1])
  # In kB. Keeping the 12 further blocks would take 160 MB more, their packed weights 40 MB; the peak
  # itself varies by 10 MB from run to run.
  assert peaks[16] - peaks[4] < 30_000, peaks
