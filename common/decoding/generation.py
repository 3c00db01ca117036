"""Batched generation with a KV cache: greedy, temperature, top-k and top-p sampling.

Prompts, or the sources of an encoder-decoder, are left-padded to a common length, so that every
row appends at the same cache slot. One compilation serves every call with the same padded length,
batch and number of new tokens. The cache is made for exactly these, so that it cannot overflow.

`prepare`, `start` and `step` are what `streaming.py` and `beam_search.py` build on too.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from common.data.tokenizer import eos_id
from common.errors import UserError
from common.models.decoder import Decoder, KVCache
from common.models.encoder_decoder import DecoderCache, EncoderDecoder

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


def adjust(logits: Array, sampling: Sampling) -> Array:
  """Logits whose softmax is what tokens are sampled from; a greedy choice has all the probability.

  Args:
    logits: float32 [..., vocab].
  """
  if sampling.temperature == 0:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
  logits = logits / sampling.temperature
  if sampling.top_k:
    kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    # A token stays while the mass before it is below p; the most likely one always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1)
    logits = jnp.where(logits < smallest[..., None], -jnp.inf, logits)
  return logits


class RowSampling(NamedTuple):
  """`Sampling` of each row, on device: float32, int32, float32 [batch]."""

  temperature: Array
  top_k: Array
  top_p: Array


def adjust_rows(logits: Array, sampling: RowSampling) -> Array:
  """`adjust` where every row has a sampling of its own.

  Args:
    logits: float32 [batch, ..., vocab].
  """
  extra = (1,) * (logits.ndim - 1)
  temperature, top_k, top_p = (x.reshape(-1, *extra) for x in sampling)
  scaled = logits / jnp.where(temperature == 0, 1.0, temperature)

  def truncate(scaled):
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    vocab = scaled.shape[-1]
    last = jnp.where(top_k == 0, vocab, jnp.minimum(top_k, vocab)) - 1
    last = jnp.broadcast_to(last, (*ordered.shape[:-1], 1))
    kth = jnp.take_along_axis(ordered, last, axis=-1)
    ordered = jnp.where(ordered < kth, -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # At p = 1 every token stays, whatever the sums round to.
    kept = (before < top_p) | (top_p >= 1)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled < jnp.maximum(smallest, kth), -jnp.inf, scaled)

  # Sorting a vocabulary takes longer than all the rest, and most batches need none.
  truncates = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
  sampled = jax.lax.cond(truncates, truncate, lambda scaled: scaled, scaled)
  best = jnp.argmax(logits, axis=-1, keepdims=True)
  greedy = jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
  return jnp.where(temperature == 0, greedy, sampled)


def categorical(key: Array, logits: Array) -> Array:
  """A token of each row, int32 [batch].

  Args:
    key: one, or one for each row, [batch]: then a row's token does not depend on the others.
    logits: [batch, vocab].
  """
  draw = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
  return draw(key, logits).astype(jnp.int32)


def fold_in(key: Array, data) -> Array:
  """`jax.random.fold_in` of one key, or of one for each row [batch], with one number or one each."""
  if not key.ndim:
    return jax.random.fold_in(key, data)
  return jax.vmap(jax.random.fold_in)(key, jnp.broadcast_to(data, key.shape))


def sample(logits: Array, key: Array, sampling: Sampling) -> Array:
  """Chooses tokens, int32 [batch]. logits: float32 [batch, vocab]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return categorical(key, adjust(logits, sampling))


def bucket(size: int) -> int:
  """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that is not below `size`."""
  power = 1 << max(size - 1, 0).bit_length()
  return power * 3 // 4 if power > 2 and size <= power * 3 // 4 else power


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


class Progress(NamedTuple):
  """What the next step of a model needs besides the token.

  Attributes:
    cache: of the tokens so far.
    positions: int32 [batch], of the next token of each row. An encoder-decoder, whose targets have
      no padding, does not read it.
  """

  cache: KVCache | DecoderCache
  positions: Array


class Sampled(NamedTuple):
  """What generation goes on from.

  Attributes:
    progress: without `token`.
    key: for the tokens to come.
    token: int32 [batch], the last token of each row; a row that stopped keeps its stop token.
  """

  progress: Progress
  key: Array
  token: Array


def generate(
  model: Decoder | EncoderDecoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
  stop_tokens: int | Sequence[int] | None = None,
) -> list[list[int]]:
  """Continues every prompt, or generates a target for every source.

  Args:
    model: a decoder or an encoder-decoder, quantized or not.
    prompts: token ids, of any lengths; the sources of an encoder-decoder.
    max_new_tokens: tokens to add at most.
    key: for sampling; not needed when greedy.
    sampling: greedy by default.
    stop_tokens: each ends a row and is not part of the output. By default none for a decoder, and
      the end-of-sequence token of an encoder-decoder.

  Returns:
    The new tokens of each row.

  Raises:
    UserError: a prompt is empty or has a token that the model lacks, `max_new_tokens` is not
      positive, the text would not fit into the model's positions, or the model lacks a stop token.
    ValueError: sampling without a key.
  """
  sampling, key = sampling_and_key(sampling, key)
  tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens, stop_tokens)
  graphdef, state = nnx.split(model)
  new = _generate(graphdef, state, tokens, segment_ids, key, stop, max_new_tokens, sampling)
  return [until_stop(row, stop) for row in np.asarray(new).tolist()]


def sampling_and_key(sampling: Sampling | None, key: Array | None) -> tuple[Sampling, Array]:
  """The defaults of both: greedy, which needs no key.

  Raises:
    ValueError: sampling without a key.
  """
  sampling = sampling or Sampling()
  if sampling.temperature > 0 and key is None:
    raise ValueError("sampling with a temperature needs a key")
  return sampling, jax.random.key(0) if key is None else key


def prepare(
  model: Decoder | EncoderDecoder,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  stop_tokens: int | Sequence[int] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Checks what every kind of generation is given, and pads the prompts.

  Returns:
    tokens and segment_ids as of `pad_left`, and the stop tokens, int32 [stops]; [-1] for none.

  Raises:
    UserError: see `generate`.
  """
  config = model.config
  tokens, segment_ids = pad_left(prompts)
  if max_new_tokens < 1:
    raise UserError(f"max_new_tokens={max_new_tokens} must be positive")
  if tokens.min() < 0 or tokens.max() >= config.vocab_size:
    # The embedding of such a token would be NaN.
    raise UserError(
      f"prompts have tokens {tokens.min()} to {tokens.max()}; the model has 0 to "
      f"{config.vocab_size - 1}: is the tokenizer another model's?"
    )
  if isinstance(model, EncoderDecoder):
    stop_tokens = config.eos_token_id if stop_tokens is None else stop_tokens
  elif config.position == "learned":
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > config.max_position_embeddings:
      raise UserError(
        f"prompt and new tokens take {longest} positions; the model has "
        f"{config.max_position_embeddings}: shorten the prompts or lower max_new_tokens"
      )
  stop = np.atleast_1d(np.asarray(() if stop_tokens is None else stop_tokens, np.int32))
  if not len(stop):
    return tokens, segment_ids, np.array([-1], np.int32)
  if stop.min() < 0 or stop.max() >= config.vocab_size:
    raise UserError(
      f"stop_tokens={stop.tolist()}: the model has tokens 0 to {config.vocab_size - 1}: is the "
      "tokenizer another model's?"
    )
  return tokens, segment_ids, stop


def stop_tokens_of(model: str | pathlib.Path, tokenizer: tokenizers.Tokenizer) -> list[int]:
  """The tokens that end a model's texts.

  Args:
    model: a Hugging Face directory, whose generation_config.json may list several (Llama 3); or the
      name of a base model.
    tokenizer: the model's; its end-of-sequence token, if it has one, is taken where no file says
      otherwise.

  Raises:
    UserError: generation_config.json cannot be read, or its eos_token_id is no token.
  """
  path = pathlib.Path(model).expanduser() / "generation_config.json"
  if path.is_file():
    try:
      found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
      raise UserError(f"{path} is no JSON object ({error}): mend or remove it") from None
    tokens = found if isinstance(found, list) else [found]
    if found is not None:
      if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise UserError(f"{path}: eos_token_id is {found}, expected a token id or a list of them")
      return tokens
  eos = eos_id(tokenizer)
  return [] if eos is None else [eos]


def start(
  model: Decoder | EncoderDecoder, tokens: Array, segment_ids: Array, max_new_tokens: int
) -> tuple[Array, Progress]:
  """Reads the prompts.

  Args:
    tokens, segment_ids: int32 [batch, seq], padded on the left.
    max_new_tokens: for which the cache has room.

  Returns:
    logits of the first new token, float32 [batch, vocab], and what `step` goes on from.
  """
  batch, length = tokens.shape
  if isinstance(model, EncoderDecoder):
    cache = model.start(tokens, segment_ids=segment_ids, max_length=max_new_tokens)
    first = jnp.full(batch, model.config.decoder_start_token_id, jnp.int32)
    return step(model, Progress(cache, jnp.zeros(batch, jnp.int32)), first)
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, batch, length + max_new_tokens, dtype)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  logits, cache = model(tokens, positions=positions, segment_ids=segment_ids, cache=cache)
  return logits[:, -1], Progress(cache, positions[:, -1] + 1)


def step(
  model: Decoder | EncoderDecoder, progress: Progress, token: Array
) -> tuple[Array, Progress]:
  """Appends int32 [batch] tokens; the next tokens' logits, float32 [batch, vocab]."""
  cache, positions = progress
  if isinstance(model, EncoderDecoder):
    logits, cache = model.decode(token[:, None], cache)
  else:
    logits, cache = model(token[:, None], positions=positions[:, None], cache=cache)
  return logits[:, 0], Progress(cache, positions + 1)


def is_stop(tokens: Array, stop: Array) -> Array:
  """bool, of the shape of `tokens`. stop: int32 [stops]."""
  return jnp.any(tokens[..., None] == stop, axis=-1)


def until_stop(row: list[int], stop: np.ndarray) -> list[int]:
  """The row's tokens before its first stop token."""
  stops = set(stop.tolist())
  return list(itertools.takewhile(lambda token: token not in stops, row))


def first_token(model, tokens, segment_ids, key, max_new_tokens: int, sampling: Sampling):
  """Reads the prompts and samples the first token of each row. Returns `Sampled`."""
  logits, progress = start(model, tokens, segment_ids, max_new_tokens)
  key, use = jax.random.split(key)
  return Sampled(progress, key, sample(logits, use, sampling))


def advance(
  graphdef, state, sampled: Sampled, new: Array, first, end, stop: Array, sampling: Sampling
) -> tuple[Sampled, Array]:
  """Samples the columns `first` to `end` of the tokens `new`, int32 [batch, columns].

  A row that stopped repeats its stop token; once all have, the other columns stay as they are.
  """

  def unfinished(loop):
    i, sampled, _ = loop
    return (i < end) & ~jnp.all(is_stop(sampled.token, stop))

  def decode(loop):
    i, (progress, key, token), new = loop
    logits, progress = step(nnx.merge(graphdef, state), progress, token)
    key, use = jax.random.split(key)
    token = jnp.where(is_stop(token, stop), token, sample(logits, use, sampling))
    return i + 1, Sampled(progress, key, token), new.at[:, i].set(token)

  return jax.lax.while_loop(unfinished, decode, (first, sampled, new))[1:]


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _generate(graphdef, state, tokens, segment_ids, key, stop, max_new_tokens, sampling):
  """New tokens int32 [batch, max_new_tokens]; only those before a stop token are meant."""
  model = nnx.merge(graphdef, state)
  sampled = first_token(model, tokens, segment_ids, key, max_new_tokens, sampling)
  new = jnp.full((len(tokens), max_new_tokens), stop[0], jnp.int32).at[:, 0].set(sampled.token)
  return advance(graphdef, state, sampled, new, 1, max_new_tokens, stop, sampling)[1]
