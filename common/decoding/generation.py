"""Batched generation with a KV cache: greedy, temperature, top-k and top-p sampling.

Prompts, or the sources of an encoder-decoder, are left-padded to a common length, so that every
row appends at the same cache slot. One compilation serves every call with the same padded length,
batch and number of new tokens.
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
from common.models.encoder_decoder import EncoderDecoder

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
  if not len(prompts) or not all(len(p) for p in prompts):
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
    UserError: a prompt is empty or has a token that the model lacks, `max_new_tokens` is not
      positive, or the text would not fit into the model's positions.
  """
  sampling = sampling or Sampling()
  if sampling.temperature > 0 and key is None:
    raise ValueError("sampling with a temperature needs a key")
  tokens, segment_ids = _checked(prompts, max_new_tokens, model.config.vocab_size)
  limit = model.config.max_position_embeddings
  longest = max(map(len, prompts)) + max_new_tokens
  if model.config.position == "learned" and longest > limit:
    raise UserError(f"prompt and new tokens take {longest} positions; the model has {limit}")
  key = jax.random.key(0) if key is None else key
  graphdef, state = nnx.split(model)
  stop = -1 if stop_token is None else stop_token
  new = _generate(graphdef, state, tokens, segment_ids, key, stop, max_new_tokens, sampling)
  return _cut(new, stop)


def generate_seq2seq(
  model: EncoderDecoder,
  sources: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
) -> list[list[int]]:
  """Generates a target for every source, until the model's end-of-sequence token.

  Args:
    model: an encoder-decoder.
    sources: token ids, of any lengths.
    max_new_tokens: tokens to generate at most.
    key: for sampling; not needed when greedy.
    sampling: greedy by default.

  Returns:
    The tokens of each target, without the start and the end token.

  Raises:
    UserError: a source is empty or has a token that the model lacks, or `max_new_tokens` is not
      positive.
  """
  sampling = sampling or Sampling()
  if sampling.temperature > 0 and key is None:
    raise ValueError("sampling with a temperature needs a key")
  tokens, segment_ids = _checked(sources, max_new_tokens, model.config.vocab_size)
  key = jax.random.key(0) if key is None else key
  graphdef, state = nnx.split(model)
  new = _generate_seq2seq(graphdef, state, tokens, segment_ids, key, max_new_tokens, sampling)
  return _cut(new, model.config.eos_token_id)


def _checked(prompts, max_new_tokens: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
  tokens, segment_ids = pad_left(prompts)
  if max_new_tokens < 1:
    raise UserError(f"max_new_tokens={max_new_tokens} must be positive")
  if tokens.min() < 0 or tokens.max() >= vocab_size:
    # The embedding of such a token would be NaN.
    raise UserError(
      f"prompts have tokens {tokens.min()} to {tokens.max()}; the model has 0 to {vocab_size - 1}: "
      "is the tokenizer another model's?"
    )
  return tokens, segment_ids


def _cut(new: Array, stop: int) -> list[list[int]]:
  rows = np.asarray(new).tolist()
  return [row[: row.index(stop)] if stop in row else row for row in rows]


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _generate_seq2seq(graphdef, state, tokens, segment_ids, key, max_new_tokens, sampling):
  model = nnx.merge(graphdef, state)
  config = model.config
  cache = model.start(tokens, segment_ids=segment_ids, max_length=max_new_tokens)

  def step(cache, token):
    logits, cache = nnx.merge(graphdef, state).decode(token[:, None], cache)
    return logits[:, 0], cache

  start = jnp.full(len(tokens), config.decoder_start_token_id, jnp.int32)
  logits, cache = step(cache, start)
  return _continue(step, logits, cache, key, config.eos_token_id, max_new_tokens, sampling)


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _generate(graphdef, state, tokens, segment_ids, key, stop, max_new_tokens, sampling):
  batch, length = tokens.shape
  model = nnx.merge(graphdef, state)
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, batch, length + max_new_tokens, dtype)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  logits, cache = model(tokens, positions=positions, segment_ids=segment_ids, cache=cache)

  def step(carry, token):
    position, cache = carry
    model = nnx.merge(graphdef, state)
    logits, cache = model(token[:, None], positions=position[:, None], cache=cache)
    return logits[:, 0], (position + 1, cache)

  carry = (positions[:, -1] + 1, cache)
  return _continue(step, logits[:, -1], carry, key, stop, max_new_tokens, sampling)


def _continue(step, logits, carry, key, stop, max_new_tokens, sampling):
  """New tokens int32 [batch, max_new_tokens]; what follows a stop token repeats it.

  Args:
    step: (carry, tokens int32 [batch]) -> (logits of the next tokens [batch, vocab], carry).
    logits: of the first new token, [batch, vocab].
    carry: for the first call of `step`.
  """
  key, use = jax.random.split(key)
  token = sample(logits, use, sampling)
  new = jnp.full((len(token), max_new_tokens), stop, jnp.int32).at[:, 0].set(token)

  def unfinished(loop):
    i, _, _, token, _ = loop
    return (i < max_new_tokens) & jnp.any(token != stop)

  def decode(loop):
    i, carry, key, token, new = loop
    logits, carry = step(carry, token)
    key, use = jax.random.split(key)
    token = jnp.where(token == stop, stop, sample(logits, use, sampling))
    return i + 1, carry, key, token, new.at[:, i].set(token)

  return jax.lax.while_loop(unfinished, decode, (1, carry, key, token, new))[-1]
