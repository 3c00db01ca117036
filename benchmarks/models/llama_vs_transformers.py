"""Training and generation of a Llama on the CPU, beside the same model in transformers.

  .venv/bin/pip install -r benchmarks/requirements.txt
  .venv/bin/python -m benchmarks.models.llama_vs_transformers

Training: `lm-small`, batch 16 x 128, forward, backward and AdamW; ours with the base models' train
step, theirs with LlamaForCausalLM and torch.optim.AdamW. Generation: 8 layers of width 512, batch
8, prompts of 32 tokens, 128 new tokens, greedy; ours compiled, theirs `generate` with its KV cache.
Both sides start from the same weights, and must agree on the loss and on the tokens. The two are
timed in turns, and the fastest turn of each counts.
"""

import json
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from common import cli
from common.checkpoints.huggingface import save_model
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


def in_turns(turns: int, **sides) -> dict[str, float]:
  """Seconds of each side's fastest turn, after one turn each to warm up."""
  best = {}
  for turn in range(turns + 1):
    for name, run in sides.items():
      start = time.perf_counter()
      run()
      if turn:
        best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
  return best


def as_transformers(model: Decoder):
  """The same model in transformers, through a checkpoint directory."""
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model"
    save_model(model, path)
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def training(turns: int) -> dict:
  import torch

  model = Decoder(RECIPES["lm-small"].config, rngs=nnx.Rngs(0))
  theirs = as_transformers(model)
  vocab = model.config.vocab_size
  shape = (TRAIN_BATCH, TRAIN_LENGTH)
  tokens = np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)
  graphdef, params = nnx.split(model)

  optimizer = make_optimizer(learning_rate=1e-3, num_steps=10_000, weight_decay=0.1)
  state = init_train_state(params, optimizer, jax.random.key(0))
  step_fn = pretraining_step(graphdef, optimizer)
  batch = {
    "tokens": tokens,
    "positions": np.broadcast_to(np.arange(TRAIN_LENGTH, dtype=np.int32), shape),
    "segment_ids": np.ones(shape, np.int32),
  }
  torch_tokens = torch.from_numpy(tokens).long()
  torch_optimizer = torch.optim.AdamW(
    theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
  )
  losses = {"ours": [], "theirs": []}

  def ours():
    nonlocal state
    for _ in range(TRAIN_STEPS):
      state, metrics = step_fn(state, batch)
    losses["ours"].append(float(metrics["loss"]))

  def torch_steps():
    for _ in range(TRAIN_STEPS):
      torch_optimizer.zero_grad()
      loss = theirs(input_ids=torch_tokens, labels=torch_tokens).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
      torch_optimizer.step()
    losses["theirs"].append(float(loss.detach()))

  theirs.train()
  seconds = in_turns(turns, ours=ours, theirs=torch_steps)
  # Norm gains are decayed by torch's default and the rates differ a little: close, not equal.
  assert abs(losses["ours"][0] - losses["theirs"][0]) < 0.05, losses
  rate = {name: TRAIN_STEPS * tokens.size / s for name, s in seconds.items()}
  return {
    "tokens_per_second": rate["ours"],
    "transformers_tokens_per_second": rate["theirs"],
    "ratio": rate["ours"] / rate["theirs"],
  }


def generation(turns: int) -> dict:
  import torch

  config = DecoderConfig(
    vocab_size=256,
    hidden_size=512,
    intermediate_size=1280,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=512,
  )
  model = Decoder(config, rngs=nnx.Rngs(0))
  theirs = as_transformers(model).eval()
  prompts = np.random.default_rng(0).integers(0, 256, (PROMPTS, PROMPT_LENGTH))
  results = {}

  def ours():
    results["ours"] = np.array(generate(model, prompts.tolist(), max_new_tokens=NEW_TOKENS))

  def transformers_generate():
    with torch.no_grad():
      out = theirs.generate(
        torch.from_numpy(prompts),
        attention_mask=torch.ones(PROMPTS, PROMPT_LENGTH, dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
      )
    results["theirs"] = out[:, PROMPT_LENGTH:].numpy()

  seconds = in_turns(turns, ours=ours, theirs=transformers_generate)
  # Random weights give near ties, after which two correct continuations part.
  agree = float((results["ours"] == results["theirs"]).mean())
  assert (results["ours"][:, :8] == results["theirs"][:, :8]).all(), results
  rate = {name: PROMPTS * NEW_TOKENS / s for name, s in seconds.items()}
  return {
    "tokens_per_second": rate["ours"],
    "transformers_tokens_per_second": rate["theirs"],
    "ratio": rate["ours"] / rate["theirs"],
    "tokens_that_agree": agree,
  }


def main(_) -> None:
  cli.prepare_jax()
  import torch
  import transformers

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  result = {
    "training": training(_TURNS.value),
    "generation": generation(_TURNS.value),
    "environment": environment()
    | {
      "torch": torch.__version__,
      "transformers": transformers.__version__,
      "torch_threads": torch.get_num_threads(),
    },
  }
  pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  app.run(main)
