"""Training and generation of a Llama on the CPU, beside the same model in transformers.

  .venv/bin/pip install -r benchmarks/requirements.txt
  .venv/bin/python -m benchmarks.models.llama_vs_transformers

Training: `lm-small`, batch 16 x 128, forward, backward and AdamW; ours with the base models' train
step, theirs with LlamaForCausalLM and torch.optim.AdamW. Generation: 8 layers of width 512, batch
8, prompts of 32 tokens, 128 new tokens, greedy; ours compiled, theirs `generate` with its KV cache.
Both sides start from the same weights, and must agree on the loss and on the tokens. Each runs in
a process of its own, set up as its users would have it; the two are timed in turns, and the fastest
turn of each counts.
"""

import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from common import cli
from common.checkpoints.huggingface import load_decoder, save_model
from common.decoding.generation import generate
from common.models.base import RECIPES, pretraining_step
from common.models.decoder import Decoder, DecoderConfig
from common.reporting.report import environment
from common.training.optimizer import make_optimizer
from common.training.train_step import init_train_state

_TURNS = flags.DEFINE_integer("turns", 5, "turns of each side")
_OUT = flags.DEFINE_string("out", "benchmarks/models/llama_vs_transformers.json", "result")

TRAIN_BATCH, TRAIN_LENGTH, TRAIN_STEPS = 16, 128, 4
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 8, 32, 128
TRAINED = RECIPES["lm-small"].config
GENERATES = DecoderConfig(
  vocab_size=256,
  hidden_size=512,
  intermediate_size=1280,
  num_layers=8,
  num_heads=8,
  num_kv_heads=8,
  head_dim=64,
  max_position_embeddings=512,
)

# Loads the checkpoint in a folder and returns what one turn runs, and gives as its result.
Prepare = Callable[[str], Callable[[], np.ndarray]]


def training_tokens() -> np.ndarray:
  """int32 [batch, seq]."""
  shape = (TRAIN_BATCH, TRAIN_LENGTH)
  return np.random.default_rng(0).integers(0, TRAINED.vocab_size, shape).astype(np.int32)


def generation_prompts() -> np.ndarray:
  """int64 [prompts, seq]."""
  shape = (PROMPTS, PROMPT_LENGTH)
  return np.random.default_rng(0).integers(0, GENERATES.vocab_size, shape)


def our_training(folder: str) -> Callable[[], np.ndarray]:
  """A turn of ours: the loss after some steps."""
  cli.prepare_jax()
  graphdef, params = nnx.split(load_decoder(folder))
  optimizer = make_optimizer(learning_rate=1e-3, num_steps=10_000, weight_decay=0.1)
  state = init_train_state(params, optimizer, jax.random.key(0))
  step_fn = pretraining_step(graphdef, optimizer)
  tokens = training_tokens()
  batch = {
    "tokens": tokens,
    "positions": np.broadcast_to(np.arange(TRAIN_LENGTH, dtype=np.int32), tokens.shape),
    "segment_ids": np.ones(tokens.shape, np.int32),
  }

  def turn():
    nonlocal state
    for _ in range(TRAIN_STEPS):
      state, metrics = step_fn(state, batch)
    return np.asarray(metrics["loss"])

  return turn


def their_training(folder: str) -> Callable[[], np.ndarray]:
  """A turn of theirs: the loss after some steps."""
  import torch

  model = _transformers_model(folder).train()
  tokens = torch.from_numpy(training_tokens()).long()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

  def turn():
    for _ in range(TRAIN_STEPS):
      optimizer.zero_grad()
      loss = model(input_ids=tokens, labels=tokens).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
    return loss.detach().numpy()

  return turn


def our_generation(folder: str) -> Callable[[], np.ndarray]:
  """A turn of ours: the new tokens [prompts, NEW_TOKENS]."""
  cli.prepare_jax()
  model, prompts = load_decoder(folder), generation_prompts().tolist()
  return lambda: np.array(generate(model, prompts, max_new_tokens=NEW_TOKENS))


def their_generation(folder: str) -> Callable[[], np.ndarray]:
  """A turn of theirs: the new tokens [prompts, NEW_TOKENS]."""
  import torch

  model, prompts = _transformers_model(folder).eval(), torch.from_numpy(generation_prompts())

  def turn():
    with torch.no_grad():
      out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
      )
    return out[:, PROMPT_LENGTH:].numpy()

  return turn


def _transformers_model(folder: str):
  import torch
  import transformers

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  return transformers.AutoModelForCausalLM.from_pretrained(folder)


def compare(config: DecoderConfig, ours: Prepare, theirs: Prepare, tokens: int, turns: int):
  """Runs two sides on one checkpoint, in turns.

  Returns:
    ({what is reported}, the two results of the turn that warms up).
  """
  with tempfile.TemporaryDirectory() as parent:
    folder = str(pathlib.Path(parent) / "model")
    save_model(Decoder(config, rngs=nnx.Rngs(0)), folder)
    sides = [_start(prepare, folder) for prepare in (ours, theirs)]
    first, seconds = [], [[], []]
    for turn in range(turns + 1):
      for (_, connection), times in zip(sides, seconds):
        connection.send(True)
        elapsed, result = connection.recv()
        times.append(elapsed) if turn else first.append(result)
    for process, connection in sides:
      connection.send(False)
      process.join()
  ours, theirs = (tokens / min(times) for times in seconds)
  rates = {"tokens_per_second": ours, "transformers_tokens_per_second": theirs}
  return rates | {"ratio": ours / theirs}, first


def _start(prepare: Prepare, folder: str):
  """A process that runs a turn whenever it is sent True, and the connection to it."""
  context = multiprocessing.get_context("spawn")
  here, there = context.Pipe()
  process = context.Process(target=_serve, args=(there, prepare, folder), daemon=True)
  process.start()
  return process, here


def _serve(connection, prepare: Prepare, folder: str) -> None:
  turn = prepare(folder)
  while connection.recv():
    start = time.perf_counter()
    result = turn()
    connection.send((time.perf_counter() - start, result))


def training(turns: int) -> dict:
  tokens = TRAIN_STEPS * TRAIN_BATCH * TRAIN_LENGTH
  report, losses = compare(TRAINED, our_training, their_training, tokens, turns)
  # Norm gains are decayed by torch's default and the rates differ a little: close, not equal.
  assert abs(losses[0] - losses[1]) < 0.05, losses
  return report


def generation(turns: int) -> dict:
  tokens = PROMPTS * NEW_TOKENS
  report, (ours, theirs) = compare(GENERATES, our_generation, their_generation, tokens, turns)
  # Random weights give near ties, after which two correct continuations part.
  assert (ours[:, :8] == theirs[:, :8]).all(), (ours, theirs)
  return report | {"tokens_that_agree": float((ours == theirs).mean())}


def main(_) -> None:
  result = {
    "training": training(_TURNS.value),
    "generation": generation(_TURNS.value),
    "environment": environment()
    | {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    | {"torch_threads": len(os.sched_getaffinity(0))},
  }
  pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  app.run(main)
