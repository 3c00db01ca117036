"""Whether prepacking changes anything: logits and tokens beside those of each prompt alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.bin_packing import best_fit_decreasing
from common.decoding.generation import (
  Progress,
  Sampled,
  Sampling,
  advance,
  pad_left,
  start,
  step,
)
from common.decoding.prepacking import (
  PackedPrompts,
  cache_room,
  packed_rows,
  prepacked_generate,
  prepacked_prefill,
)
from common.models.decoder import Decoder
from projects.prepacking.batching import Prompts
from projects.prepacking.prepacking import (
  padded_cache,
  read_packed_densely,
  unpack_left_padded,
)

Array = jax.Array


class Agreement(NamedTuple):
  """Prepacking against the reference of one prompt at a time.

  Attributes:
    logits: largest difference of the first new tokens' logits, segment ids and per-row lengths.
    reference_logits: the same of the paper's dense mask and left-padded cache.
    padded_logits: the same of a padded batch, what rounding alone does.
    tokens: greedy tokens that differ.
    compared: of so many.
  """

  logits: float
  reference_logits: float
  padded_logits: float
  tokens: int
  compared: int


def agreement(model: Decoder, prompts: Prompts, new_tokens: int) -> Agreement:
  """Reads and continues `prompts` as one packed batch, and each alone."""
  graphdef, state = nnx.split(model)
  tokens, segment_ids = pad_left(prompts)
  expected, continued = _alone(graphdef, state, tokens, segment_ids, new_tokens)
  logits, _ = prepacked_prefill(model, prompts, max_new_tokens=new_tokens)
  packed, room = packed_rows(prompts, best_fit_decreasing), cache_room(prompts, new_tokens)
  longest = max(map(len, prompts)) - 1
  dense = _dense_logits(graphdef, state, packed, longest, room)
  padded = _padded_logits(graphdef, state, tokens, segment_ids)
  found = prepacked_generate(model, prompts, max_new_tokens=new_tokens)
  off = lambda other: float(jnp.abs(other - expected).max())
  differ = int((np.asarray(found) != np.asarray(continued)).sum())
  return Agreement(off(logits), off(dense), off(padded), differ, continued.size)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _alone(graphdef, state, tokens, segment_ids, new_tokens: int) -> tuple[Array, Array]:
  """First logits [prompts, vocab] and greedy tokens [prompts, new_tokens], a prompt at a time."""
  no_stop = jnp.array([-1], jnp.int32)

  def one(row):
    model = nnx.merge(graphdef, state)
    ids, segments = (x[None] for x in row)
    logits, progress = start(model, ids, segments, new_tokens)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sampled = Sampled(progress, jax.random.key(0), token)
    new = jnp.zeros((1, new_tokens), jnp.int32).at[:, 0].set(token)
    _, new = advance(graphdef, state, sampled, new, 1, new_tokens, no_stop, Sampling())
    return logits[0], new[0]

  return jax.lax.map(one, (tokens, segment_ids))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _dense_logits(graphdef, state, packed: PackedPrompts, longest: int, room: int) -> Array:
  model = nnx.merge(graphdef, state)
  cache = unpack_left_padded(read_packed_densely(model, packed), packed, longest, room)
  return step(model, Progress(cache, jnp.asarray(packed.lengths)), packed.last_tokens)[0]


@functools.partial(jax.jit, static_argnums=0)
def _padded_logits(graphdef, state, tokens, segment_ids) -> Array:
  model, length = nnx.merge(graphdef, state), tokens.shape[1]
  cache = padded_cache(model, tokens[:, :-1], segment_ids[:, :-1], length)
  read = segment_ids[:, :-1].sum(axis=1)
  return step(model, Progress(cache, read), tokens[:, -1])[0]
