"""`./run.sh quantize` on a small checkpoint, as its users run it."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from common.checkpoints.huggingface import load_decoder, save_model
from common.data.tokenizer import load_tokenizer
from common.quantization.linear import quantized_weights
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "llama"
  save_model(random_decoder(CONFIG), path)
  load_tokenizer("embedded-512").save(str(path / "tokenizer.json"))
  return path


def quantize(checkpoint, out, *flags):
  command = [sys.executable, "-m", "apps.quantize", f"--model={checkpoint}", f"--out={out}"]
  return subprocess.run(
    [*command, "--group_size=16", "--num_samples=4", "--seq_len=16", *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


def test_a_checkpoint_is_quantized_and_loads(checkpoint, tmp_path):
  out = tmp_path / "quantized"
  flags = ("--method=flexround", "--bits=3", "--steps=4", "--sample_memory=pinned_host")
  result = quantize(checkpoint, out, *flags)
  assert result.returncode == 0, result.stderr
  original, quantized = load_decoder(checkpoint), load_decoder(out)
  for old, new in zip(original.blocks, quantized.blocks):
    weights = quantized_weights(new)
    assert len(weights) == 7 and all(w.format.bits == 3 for w in weights.values())
    kernel = old.mlp.down_proj.kernel[...]
    error = jnp.abs(weights["mlp.down_proj"].dequantize() - kernel)
    # FlexRound moves an integer at most a few steps.
    assert 0 < float(error.max()) < float(jnp.abs(kernel).max())
  again = quantize(checkpoint, out, *flags)
  assert again.returncode == 2 and "exists" in again.stderr and "\n" not in again.stderr.strip()
  assert np.isfinite(quantized(jnp.arange(8)[None])[0]).all()


def test_flags_that_do_not_belong_together(checkpoint, tmp_path):
  result = quantize(checkpoint, tmp_path / "out", "--method=flexround", "--search=found")
  assert result.returncode == 2
  assert "--search belongs to --method=awq, not flexround" in result.stderr
  result = quantize(checkpoint, tmp_path / "out", "--sample_memory=disk")
  assert result.returncode == 2
  assert result.stderr == (
    "error: sample_memory='disk' is not supported; supported: device, pinned_host\n"
  )
  assert not list(tmp_path.iterdir())
