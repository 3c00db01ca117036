"""A training run of a second, for the tests: a linear language model on random packed rows.

python -m tests.common.training.tiny_run WORKDIR [SIGNAL STEP]
sends itself SIGNAL when the batch of STEP (from 0) is asked for.
"""

import os
import signal
import sys

import jax
import numpy as np

from common.training.loop import train
from common.training.losses import next_token_loss
from common.training.optimizer import make_optimizer
from common.training.train_step import init_train_state, make_train_step

VOCAB, DIM, SEQ = 64, 128, 16
NUM_STEPS = 12


class RandomRows:
  """Endless batches [rows, SEQ]; a pure function of the position, like a Grain iterator.

  `on_batch(position)` is called before a batch is handed out.
  """

  def __init__(self, rows: int = 4, on_batch=lambda position: None):
    self.rows, self.position, self.on_batch = rows, 0, on_batch

  def __iter__(self):
    return self

  def __next__(self):
    self.on_batch(self.position)
    rng = np.random.default_rng(self.position)
    self.position += 1
    lengths = rng.integers(2, SEQ + 1, self.rows)
    return {
      "tokens": rng.integers(1, VOCAB, (self.rows, SEQ)).astype(np.int32),
      "segment_ids": (np.arange(SEQ) < lengths[:, None]).astype(np.int32),
    }

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]


def loss_fn(params, batch, key):
  """Predicts the next token from this one, with dropout so that the PRNG key matters."""
  x = params["embed"][batch["tokens"]]
  x = x * jax.random.bernoulli(key, 0.9, x.shape)
  return next_token_loss(x @ params["head"], batch["tokens"], batch["segment_ids"])


OPTIMIZER = make_optimizer(learning_rate=0.01, num_steps=NUM_STEPS, warmup_steps=2)
STEP_FN = make_train_step(loss_fn, OPTIMIZER)


def initial_state(place=lambda params: params):
  rng = np.random.default_rng(0)
  shapes = {"embed": (VOCAB, DIM), "head": (DIM, VOCAB)}
  params = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
  return init_train_state(place(params), OPTIMIZER, jax.random.key(1))


def run(workdir, on_batch=lambda position: None, **options):
  """Trains to NUM_STEPS, saving every other step."""
  options = {"num_steps": NUM_STEPS, "save_every": 2, "log_every": 5, "quiet": True} | options
  return train(initial_state(), STEP_FN, RandomRows(on_batch=on_batch), workdir=workdir, **options)


def kill_at(signum: int, position: int):
  def on_batch(at):
    if at == position:
      os.kill(os.getpid(), signum)

  return on_batch


if __name__ == "__main__":
  workdir, name, position = sys.argv[1:]
  run(workdir, kill_at(signal.Signals[name], int(position)), quiet=False)
