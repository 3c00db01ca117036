"""Steps whose rows all follow a grammar: what the host sends for them, and how long they take.

  .venv/bin/python -m benchmarks.serving.constrained_step

A decoder with 32,000 tokens (two blocks of width 128, random weights) goes on with 16 texts, each a
JSON object, greedily. `packed` is what the server does: masks as bits, which the device makes a
float32 [slots, vocab] of (`constrained.logit_bias`); `dense` makes that array on the host and sends it.
Both take the same steps, in turns, once unmeasured: then the grammar's masks are known and
everything is compiled. A step is the host's work, the pass, and the fetching of its tokens. Written to
benchmarks/serving/constrained_step.json.
"""

import json
import pathlib
import time

import jax
import numpy as np
from absl import app
from flax import nnx

from common.data.tokenizer import load_tokenizer
from common.decoding import continuous
from common.decoding.constrained import GrammarConstraint, logit_bias, padded_weights
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.json_schema import json_schema_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary
from common.models.decoder import Decoder, DecoderConfig
from common.reporting.report import environment

VOCAB, SLOTS, STEPS, TURNS = 32_000, 16, 60, 5
OUT = pathlib.Path("benchmarks/serving/constrained_step.json")
CONFIG = DecoderConfig(
  vocab_size=VOCAB,
  hidden_size=128,
  intermediate_size=384,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  head_dim=32,
  max_position_embeddings=512,
)


def packed(constraints: list[GrammarConstraint]) -> tuple[jax.Array, int]:
  """The bias of a step, and the bytes that the host hands over for it."""
  masks = np.stack([constraint.packed_mask() for constraint in constraints])
  weights = padded_weights([constraint.log_weights() for constraint in constraints])
  sent = masks.nbytes + sum(array.nbytes for array in weights)
  return logit_bias(masks, *weights, VOCAB), sent


def dense(constraints: list[GrammarConstraint]) -> tuple[np.ndarray, int]:
  """The same, made on the host."""
  bias = np.zeros((SLOTS, VOCAB), np.float32)
  for row, constraint in enumerate(constraints):
    allowed = np.unpackbits(constraint.packed_mask(), count=VOCAB)
    bias[row] = np.where(allowed, np.float32(0), np.float32(-np.inf))
  return bias, bias.nbytes


def take_steps(model: Decoder, masks: TokenMasks, bias_of) -> tuple[np.ndarray, float, int]:
  """Tokens [steps, slots], seconds of the median step, and bytes of one."""
  slots = continuous.empty_slots(model, SLOTS, STEPS + 1)
  slots = slots._replace(pair=slots.pair._replace(last=slots.pair.last + np.arange(SLOTS)[:, None]))
  model = nnx.split(model)
  constraints = [GrammarConstraint(masks) for _ in range(SLOTS)]
  everyone = np.ones(SLOTS, bool)
  tokens, seconds = [], []
  for _ in range(STEPS):
    start = time.perf_counter()
    bias, sent = bias_of(constraints)
    slots, new = continuous.decode(*model, slots, everyone, bias, 1, 0)
    tokens.append(np.asarray(new.tokens)[:, 0])
    seconds.append(time.perf_counter() - start)
    for row, token in enumerate(tokens[-1].tolist()):
      if constraints[row].advance(token, None):  # The text has ended: another one begins.
        constraints[row] = GrammarConstraint(masks)
  return np.array(tokens), float(np.median(seconds)), sent


def main(_) -> None:
  vocabulary = Vocabulary.of(load_tokenizer(f"embedded-{VOCAB}"), VOCAB)
  masks = TokenMasks(parse_ebnf(json_schema_ebnf({"type": "object"})), vocabulary)
  model = Decoder(CONFIG, rngs=nnx.Rngs(0))
  ways = {"dense": dense, "packed": packed}
  found = {name: [] for name in ways}
  for _ in range(TURNS + 1):
    for name, way in ways.items():
      found[name].append(take_steps(model, masks, way))
  rows = {}
  for name, turns in found.items():
    if any((tokens != found["dense"][0][0]).any() for tokens, *_ in turns):
      raise SystemExit(f"{name} gives other tokens")
    rows[name] = {
      "bytes_per_step": turns[0][2],
      "step_milliseconds": round(1e3 * float(np.median([s for _, s, _ in turns[1:]])), 3),
    }
  result = {"rows": rows, "environment": environment()}
  OUT.write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(rows, indent=1))


if __name__ == "__main__":
  app.run(main)
