"""A small draft for a base model: fewer and narrower blocks, the same vocabulary and text."""

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import token_batches
from common.models.base import CORPUS, pretraining_step
from common.models.decoder import Decoder, DecoderConfig
from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import init_train_state

_BATCH, _LENGTH, _HEAD_DIM = 16, 128, 32


def train_draft(
  config: ConfigDict, target: DecoderConfig, tokenizer: tokenizers.Tokenizer
) -> Decoder:
  """Pretrains a Llama of the config's width and depth as the base models are (seed 0)."""
  width = config.draft_width
  size = DecoderConfig(
    vocab_size=target.vocab_size,
    hidden_size=width,
    intermediate_size=3 * width,
    num_layers=config.draft_layers,
    num_heads=width // _HEAD_DIM,
    num_kv_heads=width // _HEAD_DIM,
    head_dim=_HEAD_DIM,
    max_position_embeddings=target.max_position_embeddings,
    tie_word_embeddings=True,
  )
  optimizer = make_optimizer(
    learning_rate=config.draft_learning_rate,
    num_steps=config.draft_steps,
    warmup_steps=config.draft_steps // 20,
    weight_decay=0.1,
  )
  graphdef, params = nnx.split(Decoder(size, rngs=nnx.Rngs(0)))
  batches = token_batches(
    CORPUS, tokenizer, split="train", seq_len=_LENGTH, batch_size=_BATCH, seed=0
  )
  state = train(
    init_train_state(params, optimizer, jax.random.key(0)),
    pretraining_step(graphdef, optimizer),
    iter(batches),
    num_steps=config.draft_steps,
    description="draft model",
  )
  return nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.params))
