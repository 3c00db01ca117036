"""Batched generation with a KV cache: greedy, temperature, top-k and top-p sampling.

Prompts are left-padded to a common length, so that every row appends at the same cache slot. One
compilation serves every call with the same padded prompt length, batch and number of new tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from common.models.decoder import Decoder, KVCache

Array = jax.Array

PROMPT_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: 0 is greedy.
    top_k: sample among the k most likely tokens only (0: all).
    top_p: sample among the fewest tokens whose probabilities reach p (1: all).
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise UserError(f"{self}: temperature and top_k must be >= 0, top_p in (0, 1]")


def sample(logits: Array, key: Array, sampling: Sampling) -> Array:
  """Chooses tokens, int32 [batch]. logits: float32 [batch, vocab]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k:
    kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    # A token stays while the mass before it is below p; the most likely one always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1)
    logits = jnp.where(logits < smallest[:, None], -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the left to a multiple of `PROMPT_BUCKET`.

  Returns:
    tokens and segment_ids (0 marks padding), int32 [batch, padded].

  Raises:
    UserError: a prompt is empty.
  """
  if not prompts or not all(len(p) for p in prompts):
    raise UserError("every prompt needs at least one token")
  length = -(-max(map(len, prompts)) // PROMPT_BUCKET) * PROMPT_BUCKET
  tokens = np.zeros((len(prompts), length), np.int32)
  segment_ids = np.zeros_like(tokens)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    segment_ids[row, length - len(prompt) :] = 1
  return tokens, segment_ids


def generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
  stop_token: int | None = None,
) -> list[list[int]]:
  """Continues every prompt.

  Args:
    model: a decoder, quantized or not.
    prompts: token ids, of any lengths.
    max_new_tokens: tokens to add at most.
    key: for sampling; not needed when greedy.
    sampling: greedy by default.
    stop_token: ends a row; not part of the output.

  Returns:
    The new tokens of each row.

  Raises:
    UserError: a prompt is empty, or the text would not fit into the model's positions.
  """
  sampling = sampling or Sampling()
  if sampling.temperature > 0 and key is None:
    raise ValueError("sampling with a temperature needs a key")
  tokens, segment_ids = pad_left(prompts)
  limit = model.config.max_position_embeddings
  longest = max(map(len, prompts)) + max_new_tokens
  if model.config.position == "learned" and longest > limit:
    raise UserError(f"prompt and new tokens take {longest} positions; the model has {limit}")
  key = jax.random.key(0) if key is None else key
  graphdef, state = nnx.split(model)
  stop = -1 if stop_token is None else stop_token
  new = _generate(graphdef, state, tokens, segment_ids, key, stop, max_new_tokens, sampling)
  rows = np.asarray(new).tolist()
  return [row[: row.index(stop)] if stop in row else row for row in rows]


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _generate(graphdef, state, tokens, segment_ids, key, stop, max_new_tokens, sampling):
  """New tokens int32 [batch, max_new_tokens]; what follows a stop token repeats it."""
  batch, length = tokens.shape
  model = nnx.merge(graphdef, state)
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, batch, length + max_new_tokens, dtype)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  logits, cache = model(tokens, positions=positions, segment_ids=segment_ids, cache=cache)
  key, use = jax.random.split(key)
  token = sample(logits[:, -1], use, sampling)
  new = jnp.full((batch, max_new_tokens), stop, jnp.int32).at[:, 0].set(token)

  def unfinished(carry):
    step, _, _, _, token, _, _ = carry
    return (step < max_new_tokens) & jnp.any(token != stop)

  def decode(carry):
    step, position, cache, key, token, new, done = carry
    model = nnx.merge(graphdef, state)
    logits, cache = model(token[:, None], positions=position[:, None], cache=cache)
    key, use = jax.random.split(key)
    done = done | (token == stop)
    token = jnp.where(done, stop, sample(logits[:, 0], use, sampling))
    return step + 1, position + 1, cache, key, token, new.at[:, step].set(token), done

  start = (1, positions[:, -1] + 1, cache, key, token, new, token == stop)
  return jax.lax.while_loop(unfinished, decode, start)[5]
