"""`./run.sh serve` on a small checkpoint, as its users run it."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from apps.quantization.methods import Options, make_method
from common.checkpoints.huggingface import Checkpoint, load_decoder, save_model
from common.data.tokenizer import load_tokenizer
from common.quantization.checkpoint import quantize_checkpoint
from projects.specdec_pp.head_training import save_head
from projects.specdec_pp.specdec_pp import init_head
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder, random_tokens

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "llama"
  save_model(random_decoder(CONFIG), path)
  load_tokenizer("embedded-512").save(str(path / "tokenizer.json"))
  (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
  (path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
  save_head(path / "head.safetensors", init_head(jax.random.key(0), CONFIG.hidden_size, 1))
  return path


@pytest.fixture(scope="module")
def integer_checkpoint(checkpoint, tmp_path_factory):
  """The same with symmetric weights and inputs of 8 bits, as `./run.sh quantize` makes it."""
  path, source = tmp_path_factory.mktemp("quantized") / "llama", Checkpoint(checkpoint)
  options = Options(bits=8, group_size=16, activation_bits=8, symmetric=True)
  method = make_method("rtn", source.config, options)
  tokens = jnp.asarray(random_tokens(source.config, 2))
  settings = {"method": "rtn"}
  quantize_checkpoint(source, path, tokens, method.quantize_block, settings=settings)
  return path


@contextlib.contextmanager
def serve(*flags, **environment):
  process = subprocess.Popen(
    [sys.executable, "-m", "apps.serve", *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def test_a_server_answers_and_ends_what_it_began(checkpoint):
  flags = (f"--model={checkpoint}", f"--draft={checkpoint}", "--port=0")
  flags += (f"--acceptance_head={checkpoint}/head.safetensors", "--rejection_threshold=0.5")
  with serve(*flags, "--slots=2", "--max_length=64", "--num_drafts=2") as process:
    found = re.fullmatch(r"llama is at (http://127.0.0.1:\d+/v1)\n", process.stdout.readline())
    assert found, process.stderr.read()
    with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0) as client:
      messages = [{"role": "user", "content": "import"}]
      reply = client.chat.completions.create(model="llama", messages=messages, max_tokens=3)
      assert reply.choices[0].finish_reason in ("length", "stop")
      # Any of the checkpoint's stop tokens ends a text.
      forced = {"model": "llama", "prompt": "a", "max_tokens": 3}
      for token, reason in ((2, "stop"), (3, "stop"), (4, "length")):
        reply = client.completions.create(**forced, logit_bias={token: 100})
        assert reply.choices[0].finish_reason == reason
      stream = client.completions.create(
        model="llama", prompt="a", max_tokens=60, stream=True, logit_bias={2: -100, 3: -100}
      )
      next(stream)
      process.send_signal(signal.SIGTERM)
      # The text goes on to its end.
      assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    # Uvicorn ends by the signal that it was sent, once all is done.
    assert process.wait(30) == -signal.SIGTERM
    assert "Traceback" not in process.stderr.read()


def greedy(served, *flags, **environment):
  """A short text's tokens and their log-probabilities, by a server and by the checkpoint itself."""
  flags = (f"--model={served}", "--port=0", "--slots=2", "--max_length=32", *flags)
  with serve(*flags, **environment) as process:
    found = re.fullmatch(r"llama is at (http://127.0.0.1:\d+/v1)\n", process.stdout.readline())
    assert found, process.stderr.read()
    with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0) as client:
      request = {"model": "llama", "prompt": "import", "max_tokens": 4, "temperature": 0}
      (choice,) = client.completions.create(**request, logprobs=1).choices
  model, tokenizer = load_decoder(served), load_tokenizer(str(served))
  tokens, expected = tokenizer.encode("import").ids, []
  for _ in choice.logprobs.tokens:
    log_probs = jax.nn.log_softmax(model(jnp.array([tokens]))[0][0, -1])
    tokens.append(int(log_probs.argmax()))
    expected.append(log_probs[tokens[-1]])
  return choice.logprobs.token_logprobs, expected


def test_integer_products_serve_the_same_model(integer_checkpoint, tmp_path):
  """The likeliest tokens are as likely as by the rounded weights and inputs in floating point."""
  found, expected = greedy(integer_checkpoint, "--integer_products", JAX_DUMP_IR_TO=str(tmp_path))
  # What the server has lowered: int8 products with int32 sums.
  programs = [file.read_text() for file in tmp_path.glob("*.mlir")]
  assert any(re.search(r"dot_general.*xi8>, .*xi8>\) -> .*xi32>", text) for text in programs)
  # Sums in another order, and now and then a code on the other side of a tie.
  np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_model_on_a_mesh_is_the_same(checkpoint):
  environment = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
  }
  found, expected = greedy(checkpoint, "--mesh=tensor=-1", **environment)
  np.testing.assert_allclose(found, expected, atol=1e-4)  # Sums in another order.


def test_flags_that_cannot_be(checkpoint, tmp_path):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    for flags, says in (
      ((f"--model={checkpoint}", f"--port={port}"), "cannot listen on 127.0.0.1"),
      ((f"--model={checkpoint}", f"--chat_template={tmp_path}/none"), "chat template"),
      ((f"--model={checkpoint}", "--draft_confidence=0.1"), "give --draft=DIR too"),
    ):
      with serve(*flags) as process:
        error = process.stderr.read()
        assert process.wait(60) == 2
        assert says in error and "\n" not in error.strip()
