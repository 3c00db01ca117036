"""Key-value recall: a small decoder that finds needles in a haystack, and its prompts.

A needle is one token that says which value a key has; the haystack is filler. The prompt ends with a
question, some of the keys, and its continuation gives these with their values:

    f f (k3=v3) f f f (k1=v1) f ... | k1 k3 | k1 v1 k3 v3

so that what the question's tokens attend to is what the answers need, from far back.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.models.decoder import Decoder, DecoderConfig
from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step

Array = jax.Array

_FILLER = 1  # The first filler token; token 0 is padding.


class Recall(NamedTuple):
  """Prompts and their continuations.

  Attributes:
    prompt: int32 [rows, haystack + asked].
    answers: int32 [rows, 2 asked]: key, value, key, value, ...
  """

  prompt: np.ndarray
  answers: np.ndarray


def recall_vocabulary(symbols: int) -> int:
  """Padding, as many filler tokens, keys and values, and a needle for each key and value."""
  return _FILLER + 3 * symbols + symbols**2


def recall_rows(
  rng: np.random.Generator,
  rows: int,
  *,
  haystack: int,
  needles: int,
  asked: int,
  symbols: int,
  depth: float | None = None,
) -> Recall:
  """Draws prompts.

  Args:
    rng: of everything.
    rows: how many.
    haystack: tokens before the question.
    needles: in the haystack, with different keys.
    asked: how many of them are asked for.
    symbols: filler tokens, keys and values that there are.
    depth: of the needle asked for first, 0 (the beginning) to 1; None leaves it to chance.
  """
  keys_at, values_at, needles_at = (_FILLER + i * symbols for i in (1, 2, 3))
  tokens = rng.integers(_FILLER, keys_at, (rows, haystack))
  at = rng.permuted(np.tile(np.arange(haystack), (rows, 1)), axis=1)[:, :needles]
  if depth is not None:
    wanted = round(depth * (haystack - 1))
    # The needle that stands there already, if any, changes places with the first.
    at = np.where(at == wanted, at[:, :1], at)
    at[:, 0] = wanted
  keys = rng.permuted(np.tile(np.arange(symbols), (rows, 1)), axis=1)[:, :needles]
  values = rng.integers(0, symbols, (rows, needles))
  np.put_along_axis(tokens, at, needles_at + keys * symbols + values, axis=1)
  question = keys_at + keys[:, :asked]
  answers = np.stack([question, values_at + values[:, :asked]], axis=2).reshape(rows, -1)
  prompt = np.concatenate([tokens, question], axis=1)
  return Recall(prompt.astype(np.int32), answers.astype(np.int32))


def recall_decoder(config: ConfigDict) -> DecoderConfig:
  """The size of the recall model."""
  return DecoderConfig(
    vocab_size=recall_vocabulary(config.recall_symbols),
    hidden_size=config.recall_width,
    intermediate_size=2 * config.recall_width,
    num_layers=2,
    num_heads=config.recall_heads,
    num_kv_heads=config.recall_kv_heads,
    head_dim=config.recall_head_dim,
    max_position_embeddings=4 * config.recall_haystack,
  )


def recall_step(graphdef: nnx.GraphDef, optimizer, answers: int) -> StepFn:
  """The train step: cross-entropy of the values, the last `answers` tokens' every second one."""

  def loss_fn(params, batch, key):
    del key  # No dropout.
    model, tokens = nnx.merge(graphdef, params), batch["tokens"]
    x, _ = model.run_blocks(tokens)
    logits = model.head(x[:, -answers::2])
    log_probs = jax.nn.log_softmax(logits)
    targets = tokens[:, -answers + 1 :: 2]
    nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)
    return nll.sum(), jnp.float32(nll.size)

  return make_train_step(loss_fn, optimizer)


def train_recall(config: ConfigDict, quiet: bool = True) -> Decoder:
  """Trains the recall model (seed 0) on prompts of the config's size."""
  optimizer = make_optimizer(
    learning_rate=config.recall_learning_rate,
    num_steps=config.recall_steps,
    warmup_steps=config.recall_steps // 20,
    final_fraction=0.05,
    weight_decay=0.01,
  )
  graphdef, params = nnx.split(Decoder(recall_decoder(config), rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  draw = functools.partial(recall_rows, rng, config.recall_batch, **recall_size(config))

  def batches():
    while True:
      yield {"tokens": np.concatenate(draw(), axis=1)}

  state = train(
    init_train_state(params, optimizer, jax.random.key(0)),
    recall_step(graphdef, optimizer, 2 * config.recall_asked),
    batches(),
    num_steps=config.recall_steps,
    description="recall model",
    quiet=quiet,
  )
  return nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.params))


def recall_size(config: ConfigDict) -> dict[str, int]:
  return {
    "haystack": config.recall_haystack,
    "needles": config.recall_needles,
    "asked": config.recall_asked,
    "symbols": config.recall_symbols,
  }
