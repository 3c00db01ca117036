"""What the head is trained on: the target's continuations, the draft's tokens beside them, labels."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import Sampling, adjust, generate, pad_left
from common.evaluation.log_likelihood import whole_batches
from common.models.decoder import Decoder, KVCache
from projects.specdec_pp.specdec_pp import IGNORED, mix_tokens, soft_labels

Array = jax.Array

# Rows of a forward pass: logits of all new tokens are in memory together.
_BATCH = 128


class Texts(NamedTuple):
  """Prompts, padded on the left, and their continuations.

  Attributes:
    tokens: int32 [rows, prompt + new].
    segment_ids: 1 for tokens, 0 for padding on either side, int32 [rows, prompt + new].
  """

  tokens: np.ndarray
  segment_ids: np.ndarray


class HeadData(NamedTuple):
  """Rows that the head is trained or evaluated on.

  Attributes:
    hidden: the draft's state at each token of Z, float32 [rows, new, width].
    labels: A, or `IGNORED`, float32 [rows, new].
  """

  hidden: np.ndarray
  labels: np.ndarray


class DraftLabels(NamedTuple):
  """The draft's own token at every position behind the target's text.

  Attributes:
    drafts: Y, int32 [rows, new].
    labels: A; `IGNORED` behind the end of a text, float32 [rows, new].
  """

  drafts: np.ndarray
  labels: np.ndarray


def continue_prompts(
  target: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  new_tokens: int,
  key: Array,
  sampling: Sampling,
  stop_token: int | None = None,
) -> Texts:
  """Continuations X drawn from the target; a stop token ends one and belongs to it."""
  found = []
  for i, batch in enumerate(whole_batches(list(prompts), 4 * _BATCH)):
    found += generate(
      target,
      batch,
      max_new_tokens=new_tokens,
      key=jax.random.fold_in(key, i),
      sampling=sampling,
      stop_tokens=stop_token,
    )
  prompt_tokens, prompt_segments = pad_left(prompts)
  new, segments = np.zeros((2, len(prompts), new_tokens), np.int32)
  for row, tokens in enumerate(found[: len(prompts)]):
    tokens = tokens if len(tokens) == new_tokens else [*tokens, stop_token]
    new[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
  return Texts(
    np.concatenate([prompt_tokens, new], axis=1),
    np.concatenate([prompt_segments, segments], axis=1),
  )


def label_drafts(
  target: Decoder, draft: Decoder, texts: Texts, *, new_tokens: int, key: Array, sampling: Sampling
) -> DraftLabels:
  """Draws Y_i ~ q(. | X_<i) and labels it with min(1, p(Y_i) / q(Y_i)).

  Both distributions are those of decoding: temperature, top-k and top-p are in them.
  """
  models = (*nnx.split(target), *nnx.split(draft))
  label = lambda key, *batch: _label(*models, *batch, key, new_tokens, sampling)
  drafts, labels = _by_batches(label, key, *texts)
  ended = texts.segment_ids[:, -new_tokens:] == 0
  return DraftLabels(drafts, np.where(ended, IGNORED, labels))


def head_data(
  draft: Decoder, texts: Texts, drafted: DraftLabels, *, mixing: float, key: Array
) -> HeadData:
  """Mixes tokens and runs the frozen draft over (prompt, Z)."""
  new_tokens = drafted.drafts.shape[1]
  text = texts.tokens[:, -new_tokens:]
  mixed, labels = mix_tokens(key, text, drafted.drafts, drafted.labels, mixing)
  tokens = np.concatenate([texts.tokens[:, :-new_tokens], mixed], axis=1)
  graphdef, state = nnx.split(draft)
  states = lambda key, *batch: [_hidden_states(graphdef, state, *batch, new_tokens)]
  hidden = _by_batches(states, key, tokens, texts.segment_ids)[0]
  return HeadData(hidden, np.asarray(labels))


def _by_batches(function: Callable, key: Array, *arrays: np.ndarray) -> list[np.ndarray]:
  """function(key, *rows) -> arrays, on `_BATCH` rows at a time; one compilation."""
  rows, results = len(arrays[0]), []
  for i, batch in enumerate(whole_batches(list(range(rows)), min(rows, _BATCH))):
    part = function(jax.random.fold_in(key, i), *(array[np.array(batch)] for array in arrays))
    results.append(jax.device_get(part))
  return [np.concatenate(parts)[:rows] for parts in zip(*results)]


def run_texts(
  model: Decoder, tokens: Array, segment_ids: Array, cache: KVCache | None = None
) -> tuple[Array, KVCache | None]:
  """The state behind the final norm at every token, [rows, seq, width], and the filled cache."""
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  x, cache = model.run_blocks(tokens, positions, segment_ids, cache)
  return model.head_input(x), cache


@functools.partial(jax.jit, static_argnums=(0, 2, 7, 8))
def _label(
  target_graph, target_state, draft_graph, draft_state, tokens, segment_ids, key, new, sampling
):
  def log_probabilities(graphdef, state):
    model = nnx.merge(graphdef, state)
    hidden, _ = run_texts(model, tokens, segment_ids)
    # The state before a token predicts it.
    return jax.nn.log_softmax(adjust(model.logits(hidden[:, -new - 1 : -1]), sampling))

  log_p = log_probabilities(target_graph, target_state)
  log_q = log_probabilities(draft_graph, draft_state)
  drafts = jax.random.categorical(key, log_q).astype(jnp.int32)
  of_draft = lambda logs: jnp.take_along_axis(logs, drafts[..., None], axis=-1)[..., 0]
  return drafts, soft_labels(of_draft(log_p), of_draft(log_q))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _hidden_states(graphdef, state, tokens, segment_ids, new):
  return run_texts(nnx.merge(graphdef, state), tokens, segment_ids)[0][:, -new:]
