"""A small draft for a base model: fewer and narrower blocks, the same vocabulary and text."""

import jax
import jax.numpy as jnp
import optax
import tokenizers
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import token_batches
from common.models.base import CORPUS, MICROBATCHES, pretraining_step
from common.models.decoder import Decoder, DecoderConfig
from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step

_BATCH, _LENGTH, _HEAD_DIM = 16, 128, 32


def train_draft(config: ConfigDict, target: Decoder, tokenizer: tokenizers.Tokenizer) -> Decoder:
  """Trains a Llama of the config's width and depth on the base models' corpus (seed 0).

  Of its text, as the base models are, or of the target's distributions (`distillation_step`).
  """
  width = config.draft_width
  size = DecoderConfig(
    vocab_size=target.config.vocab_size,
    hidden_size=width,
    intermediate_size=3 * width,
    num_layers=config.draft_layers,
    num_heads=width // _HEAD_DIM,
    num_kv_heads=width // _HEAD_DIM,
    head_dim=_HEAD_DIM,
    max_position_embeddings=target.config.max_position_embeddings,
    tie_word_embeddings=True,
  )
  optimizer = make_optimizer(
    learning_rate=config.draft_learning_rate,
    num_steps=config.draft_steps,
    warmup_steps=config.draft_steps // 20,
    weight_decay=0.1,
  )
  graphdef, params = nnx.split(Decoder(size, rngs=nnx.Rngs(0)))
  if config.draft_objective == "target":
    step = distillation_step(graphdef, target, config.temperature, optimizer)
  else:
    step = pretraining_step(graphdef, optimizer)
  batches = token_batches(
    CORPUS, tokenizer, split="train", seq_len=_LENGTH, batch_size=_BATCH, seed=0
  )
  state = train(
    init_train_state(params, optimizer, jax.random.key(0)),
    step,
    iter(batches),
    num_steps=config.draft_steps,
    description="draft model",
  )
  return nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.params))


def distillation_step(
  graphdef: nnx.GraphDef,
  target: Decoder,
  temperature: float,
  optimizer: optax.GradientTransformation,
) -> StepFn:
  """A train step on KL(p | q) at every token of a text, both at the temperature of decoding.

  The forward divergence on fixed texts of Zhou et al. ("DistillSpec", 2024). Greedy decoding has no
  distribution to learn: at temperature 0 both are taken at 1.
  """
  teacher_graphdef, teacher = nnx.split(target)

  def log_probabilities(graphdef, params, batch):
    model = nnx.merge(graphdef, params)
    x, _ = model.run_blocks(batch["tokens"], batch["positions"], batch["segment_ids"])
    return jax.nn.log_softmax(model.head_input(x) @ model.head_kernel / (temperature or 1.0))

  def loss_fn(params, batch, key, teacher):
    del key  # No dropout.
    log_p = log_probabilities(teacher_graphdef, teacher, batch)
    log_q = log_probabilities(graphdef, params, batch)
    divergence = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
    is_text = batch["segment_ids"] > 0
    return jnp.sum(divergence, where=is_text), jnp.sum(is_text, dtype=jnp.float32)

  step = make_train_step(loss_fn, optimizer, accumulate_steps=MICROBATCHES)
  return lambda state, batch: step(state, batch, teacher)
