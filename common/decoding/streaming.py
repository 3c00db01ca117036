"""Generation that hands out its tokens while it runs.

Every chunk is one call of the same compiled loop, which takes over the cache of the chunk before.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import (
  Sampled,
  Sampling,
  advance,
  first_token,
  prepare,
  sampling_and_key,
  until_stop,
)
from common.errors import UserError
from common.models.decoder import Decoder
from common.models.encoder_decoder import EncoderDecoder

Array = jax.Array


def stream(
  model: Decoder | EncoderDecoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
  stop_tokens: int | Sequence[int] | None = None,
  chunk: int = 8,
) -> Iterator[list[list[int]]]:
  """Yields the tokens of `generate` as they come, which ends when every row has stopped.

  Text comes from one `DecodeStream` a row, which holds back the bytes of an unfinished character
  and knows the spaces between words:

    decoder = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
    for (tokens,) in stream(model, [prompt], max_new_tokens=100):
      for token in tokens:
        print(decoder.step(tokenizer, token) or "", end="", flush=True)

  Args:
    model, prompts, max_new_tokens, key, sampling, stop_tokens: as of `generate`.
    chunk: tokens of a row to hand out at a time.

  Yields:
    Per row its new tokens: `chunk` of them, fewer where the row stops or reaches
    `max_new_tokens`, none once it has stopped.

  Raises:
    UserError: as `generate`, at the call; or `chunk` is not positive.
    ValueError: sampling without a key.
  """
  sampling, key = sampling_and_key(sampling, key)
  tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens, stop_tokens)
  if chunk < 1:
    raise UserError(f"chunk={chunk} must be positive")
  return _stream(model, tokens, segment_ids, key, stop, max_new_tokens, sampling, chunk)


def _stream(model, tokens, segment_ids, key, stop, max_new_tokens, sampling, chunk):
  graphdef, state = nnx.split(model)
  sampled = _first(graphdef, state, tokens, segment_ids, key, max_new_tokens, sampling)
  # The prompt's logits gave the first token already, so that the first chunk needs one step less.
  rows = np.asarray(sampled.token)[:, None].tolist()
  stopped, left = [False] * len(rows), max_new_tokens
  while left and not all(stopped):
    count = min(chunk, left)
    steps = count - len(rows[0])
    if steps:
      sampled, new = _chunk(graphdef, state, sampled, stop, steps, chunk, sampling)
      rows = [row + tail for row, tail in zip(rows, np.asarray(new)[:, :steps].tolist())]
    fresh = [[] if end else until_stop(row, stop) for row, end in zip(rows, stopped)]
    stopped = [len(row) < count for row in fresh]
    if any(fresh):
      yield fresh
    rows, left = [[] for _ in rows], left - count


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _first(graphdef, state, tokens, segment_ids, key, max_new_tokens, sampling) -> Sampled:
  model = nnx.merge(graphdef, state)
  return first_token(model, tokens, segment_ids, key, max_new_tokens, sampling)


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def _chunk(graphdef, state, sampled, stop, steps, chunk, sampling):
  """The next tokens int32 [batch, chunk], of which the first `steps` columns are meant."""
  new = jnp.full((len(sampled.token), chunk), stop[0], jnp.int32)
  return advance(graphdef, state, sampled, new, 0, steps, stop, sampling)
