"""A small language model trained on lists: the model of the default preset."""

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import token_batches
from common.models.base import pretraining_step
from common.models.decoder import Decoder, DecoderConfig
from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state


def lm_config(config: ConfigDict) -> DecoderConfig:
  """A Llama of the config's size."""
  return DecoderConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    intermediate_size=2 * config.width,
    num_layers=config.layers,
    num_heads=config.heads,
    num_kv_heads=config.heads,
    head_dim=config.head_dim,
    max_position_embeddings=1024,
    tie_word_embeddings=config.tied,
  )


def lm_training_step(config: ConfigDict) -> StepFn:
  """The jitted training step, for every seed."""
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(lm_config(config), rngs=nnx.Rngs(0))))
  return pretraining_step(graphdef, _optimizer(config))


def train_lm(
  config: ConfigDict,
  step: StepFn,
  tokenizer: tokenizers.Tokenizer,
  texts: Sequence[str],
  *,
  seed: int,
  workdir: pathlib.Path,
) -> Decoder:
  """Trains a model on lists, packed in rows.

  Args:
    config: sizes and steps.
    step: of `lm_training_step`.
    tokenizer: of `train_tokenizer`.
    texts: of `training_lists`; written to the workdir.
    seed: of initialization and order.
    workdir: of the run.
  """
  path = workdir / f"lists_{seed}.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
  batches = token_batches(
    f"file:{path}",
    tokenizer,
    split="train",
    seq_len=config.seq_len,
    batch_size=config.batch_size,
    seed=seed,
  )
  graphdef, params = nnx.split(Decoder(lm_config(config), rngs=nnx.Rngs(seed)))
  state = train(
    init_train_state(params, _optimizer(config), jax.random.key(seed)),
    step,
    iter(batches),
    num_steps=config.num_steps,
    log_every=200,
    description=f"model of seed {seed}",
  )
  return nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.params))


def _optimizer(config: ConfigDict):
  return make_optimizer(
    learning_rate=config.learning_rate,
    num_steps=config.num_steps,
    warmup_steps=config.num_steps // 20,
    weight_decay=0.1,
  )
