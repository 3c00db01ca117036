"""Small language models trained, for several epochs, on texts that are known."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from common.models.decoder import Decoder, DecoderConfig
from common.training.loop import train
from common.training.losses import linear_next_token_loss
from common.training.train_step import StepFn, init_train_state, make_train_step

PyTree = Any


def decoder_config(vocab_size: int, width: int, num_layers: int, max_tokens: int) -> DecoderConfig:
  """A Llama of this width and depth with tied embeddings."""
  heads = max(2, width // 32)
  return DecoderConfig(
    vocab_size=vocab_size,
    hidden_size=width,
    intermediate_size=3 * width,
    num_layers=num_layers,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    max_position_embeddings=max_tokens,
    tie_word_embeddings=True,
  )


def packed_rows(
  documents: Sequence[Sequence[int]], row_length: int, order: np.ndarray
) -> dict[str, np.ndarray]:
  """Strings documents together and cuts a row every `row_length` tokens.

  Args:
    documents: token ids of each, special tokens included.
    row_length: tokens of a row.
    order: indices of documents, in which they follow each other.

  Returns:
    tokens, positions (from 0 in every piece of a document) and segment_ids (0: padding of the last
    row), int32 [rows, row_length].
  """
  lengths = np.array([len(documents[i]) for i in order])
  tokens = np.concatenate([documents[i] for i in order])
  segment_ids = np.repeat(np.arange(1, len(order) + 1), lengths)
  # A piece begins with its document or with its row.
  place = np.arange(len(tokens))
  start = np.repeat(np.cumsum(lengths) - lengths, lengths)
  positions = place - np.maximum(start, place // row_length * row_length)
  padding = -len(tokens) % row_length
  arrays = {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}
  shape = (-1, row_length)
  return {
    name: np.pad(array, (0, padding)).astype(np.int32).reshape(shape)
    for name, array in arrays.items()
  }


def epoch_batches(
  documents: Sequence[Sequence[int]], *, row_length: int, batch_size: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
  """Endless batches; every epoch has every document once, in an order of its own."""
  rng = np.random.default_rng(seed)
  while True:
    rows = packed_rows(documents, row_length, rng.permutation(len(documents)))
    missing = -len(rows["tokens"]) % batch_size
    rows = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in rows.items()}
    for i in range(0, len(rows["tokens"]), batch_size):
      yield {name: array[i : i + batch_size] for name, array in rows.items()}


def steps_per_epoch(documents: Sequence[Sequence[int]], row_length: int, batch_size: int) -> int:
  """Batches of `epoch_batches` in an epoch."""
  rows = -(-sum(map(len, documents)) // row_length)
  return -(-rows // batch_size)


def make_language_model_step(
  graphdef: nnx.GraphDef,
) -> tuple[optax.GradientTransformation, StepFn]:
  """Adam at a constant learning rate that the optimizer's state holds, and the train step.

  One compilation serves every learning rate.
  """
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.adam)(learning_rate=0.0, b1=0.9, b2=0.95),
  )

  def loss_fn(params, batch, key):
    del key  # No dropout.
    model = nnx.merge(graphdef, params)
    x, _ = model.run_blocks(batch["tokens"], batch["positions"], batch["segment_ids"])
    ids = batch["tokens"], batch["segment_ids"]
    return linear_next_token_loss(model.head_input(x), model.head_kernel, *ids)

  return optimizer, make_train_step(loss_fn, optimizer)


class Trainer:
  """Trains decoders of one size; all of its runs share one compiled step."""

  def __init__(self, config: DecoderConfig, *, row_length: int, batch_size: int):
    self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    self._config, self._row_length, self._batch_size = config, row_length, batch_size
    self._optimizer, self._step = make_language_model_step(self.graphdef)

  def initial(self, seed: int) -> PyTree:
    """Parameters before any training."""
    return nnx.state(Decoder(self._config, rngs=nnx.Rngs(seed)))

  def model(self, params: PyTree) -> Decoder:
    return nnx.merge(self.graphdef, params)

  def train(
    self,
    params: PyTree,
    documents: Sequence[Sequence[int]],
    *,
    epochs: Sequence[int],
    learning_rate: float,
    seed: int,
    description: str = "training",
  ) -> list[PyTree]:
    """Continues from `params`, which stay as they are.

    Args:
      params: where to start.
      documents: token ids of each.
      epochs: after which to keep the parameters, ascending.
      learning_rate: constant, of Adam.
      seed: of the order of the documents.
      description: for the progress bar.

    Returns:
      The parameters after each of `epochs`.
    """
    state = init_train_state(params, self._optimizer, jax.random.key(seed))
    opt_state = optax.tree.set(state.opt_state, learning_rate=jnp.float32(learning_rate))
    state = dataclasses.replace(state, opt_state=opt_state)
    sizes = {"row_length": self._row_length, "batch_size": self._batch_size}
    batches = epoch_batches(documents, seed=seed, **sizes)
    steps = steps_per_epoch(documents, **sizes)
    kept = []
    for epoch in epochs:
      state = train(
        state, self._step, batches, num_steps=epoch * steps, description=description, quiet=True
      )
      kept.append(jax.tree.map(jnp.copy, state.params))
    return kept
