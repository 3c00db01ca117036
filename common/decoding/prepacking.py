"""Prefill of packed prompts (Zhao et al. 2024, "Prepacking"): several prompts share a row.

Prompts of different lengths are packed into few dense rows, read in one pass in which each attends
to itself only and has positions from 0, and unpacked to a KV cache of one prompt per row, from which
decoding goes on as usual. The last token of every prompt is held back: it is the first query of the
decoder, whose logits are those of the first new token.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.bin_packing import Bins, Packer, best_fit_decreasing
from common.decoding.cache import unpack
from common.decoding.generation import (
  PROMPT_BUCKET,
  Progress,
  Sampled,
  Sampling,
  advance,
  bucket,
  prepare,
  sample,
  sampling_and_key,
  step,
  until_stop,
)
from common.errors import UserError
from common.models.decoder import Decoder, KVCache

Array = jax.Array


class PackedPrompts(NamedTuple):
  """Prompts without their last tokens, several in a row, and where each of them is.

  Attributes:
    tokens: int32 [rows, slots].
    positions: int32 [rows, slots], from 0 in every prompt.
    segment_ids: int32 [rows, slots], 1, 2, ... for the prompts of a row and 0 for padding.
    prompt_rows: int32 [prompts], the row of each prompt.
    prompt_segments: int32 [prompts], its segment id there.
    lengths: int32 [prompts], its tokens there, one less than it has; may be 0.
    last_tokens: int32 [prompts].
  """

  tokens: Array
  positions: Array
  segment_ids: Array
  prompt_rows: Array
  prompt_segments: Array
  lengths: Array
  last_tokens: Array


def pack(prompts: Sequence[Sequence[int]], bins: Bins) -> PackedPrompts:
  """Lays prompts into rows as long as the fullest bin needs.

  Args:
    prompts: token ids, at least one each.
    bins: every prompt once, see `bin_packing`.

  Returns:
    NumPy arrays, prompts in their given order; at least one slot.
  """
  slots = max(1, *(sum(len(prompts[i]) - 1 for i in items) for items in bins))
  tokens, positions, segment_ids = np.zeros((3, len(bins), slots), np.int32)
  prompt_rows, prompt_segments = np.zeros((2, len(prompts)), np.int32)
  for row, items in enumerate(bins):
    start = 0
    for segment, item in enumerate(items, 1):
      end = start + len(prompts[item]) - 1
      tokens[row, start:end] = prompts[item][:-1]
      positions[row, start:end] = np.arange(end - start)
      segment_ids[row, start:end] = segment
      prompt_rows[item], prompt_segments[item] = row, segment
      start = end
  lengths = np.array([len(p) - 1 for p in prompts], np.int32)
  last_tokens = np.array([p[-1] for p in prompts], np.int32)
  return PackedPrompts(
    tokens, positions, segment_ids, prompt_rows, prompt_segments, lengths, last_tokens
  )


def pad_to_buckets(packed: PackedPrompts) -> PackedPrompts:
  """Adds padding, so that rows and slots take few values and few programs are compiled."""
  rows, slots = packed.tokens.shape
  more = ((0, bucket(rows) - rows), (0, bucket(max(slots, PROMPT_BUCKET)) - slots))
  ids = [np.pad(x, more) for x in (packed.tokens, packed.positions, packed.segment_ids)]
  return PackedPrompts(*ids, *packed[3:])


def cache_room(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
  """Slots of a cache row: those of `generation.generate` for the same prompts."""
  return -(-max(map(len, prompts)) // PROMPT_BUCKET) * PROMPT_BUCKET + max_new_tokens


def read_packed(model: Decoder, packed: PackedPrompts) -> KVCache:
  """The keys and values of the packed rows, in one pass, without logits."""
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, *packed.tokens.shape, dtype)
  return model.run_blocks(packed.tokens, packed.positions, packed.segment_ids, cache)[1]


def unpacked_cache(model: Decoder, packed: PackedPrompts, room: int) -> KVCache:
  """Prefill: the cache of `read_packed`, one prompt per row in slots 0 to lengths - 1.

  Args:
    room: slots of each row.
  """
  where = packed.prompt_rows, packed.prompt_segments, packed.lengths
  return unpack(read_packed(model, packed), *map(jnp.asarray, where), room)


def first_logits(model: Decoder, packed: PackedPrompts, cache: KVCache) -> tuple[Array, Progress]:
  """Reads the tokens that were held back. Returns what `generation.start` does."""
  return step(model, Progress(cache, jnp.asarray(packed.lengths)), packed.last_tokens)


def prepacked_prefill(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  packer: Packer = best_fit_decreasing,
) -> tuple[Array, Progress]:
  """Reads prompts as `generation.start` does, packed into rows as long as the longest of them.

  One compilation serves every call with the same number of prompts, room and buckets of rows and
  slots.

  Args:
    model: a decoder, quantized or not.
    prompts: token ids, of any lengths.
    max_new_tokens: for which the cache has room.
    packer: which prompts share a row.

  Returns:
    logits of the first new token, float32 [prompts, vocab], and what `generation.step` and
    `generation.advance` go on from: a cache of one prompt per row, in the given order, each row with
    a length of its own, and the positions of the next tokens.

  Raises:
    UserError: as `generation.generate`; the model is no decoder, or one of which packed prompts
      would see each other; the packer's.
  """
  check_model(model)
  prepare(model, prompts, max_new_tokens, None)
  graphdef, state = nnx.split(model)
  packed = packed_rows(prompts, packer)
  return _prefill(graphdef, state, packed, cache_room(prompts, max_new_tokens))


def prepacked_generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
  stop_tokens: int | Sequence[int] | None = None,
  packer: Packer = best_fit_decreasing,
) -> list[list[int]]:
  """The tokens of `generation.generate`, whose arguments it takes, after a prepacked prefill.

  Raises:
    UserError: see `prepacked_prefill`.
    ValueError: sampling without a key.
  """
  check_model(model)
  sampling, key = sampling_and_key(sampling, key)
  _, _, stop = prepare(model, prompts, max_new_tokens, stop_tokens)
  graphdef, state = nnx.split(model)
  packed, room = packed_rows(prompts, packer), cache_room(prompts, max_new_tokens)
  new = _generate(graphdef, state, packed, key, stop, room, max_new_tokens, sampling)
  return [until_stop(row, stop) for row in np.asarray(new).tolist()]


def packed_rows(prompts: Sequence[Sequence[int]], packer: Packer) -> PackedPrompts:
  """Packs prompts into rows as long as the longest of them, padded to buckets."""
  lengths = [len(prompt) for prompt in prompts]
  return pad_to_buckets(pack(prompts, packer(lengths, max(lengths))))


def check_model(model: Decoder) -> None:
  """Raises UserError for a model that cannot read packed prompts."""
  if not isinstance(model, Decoder):
    raise UserError(
      f"prepacking needs a decoder, got {type(model).__name__}; generate() reads the prompts of others"
    )
  config = model.config
  if not config.causal:
    raise UserError("prepacking needs a causal decoder: the last token of a prompt is read later")
  if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
    raise UserError(
      "prepacking needs rotary frequencies that do not depend on the longest prompt, got dynamic "
      'scaling; take a model with "linear" or "llama3" scaling'
    )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _prefill(graphdef, state, packed, room: int) -> tuple[Array, Progress]:
  model = nnx.merge(graphdef, state)
  return first_logits(model, packed, unpacked_cache(model, packed, room))


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(graphdef, state, packed, key, stop, room, max_new_tokens, sampling):
  """New tokens int32 [prompts, max_new_tokens]; only those before a stop token are meant."""
  logits, progress = _prefill(graphdef, state, packed, room)
  key, use = jax.random.split(key)
  sampled = Sampled(progress, key, sample(logits, use, sampling))
  new = jnp.full((len(logits), max_new_tokens), stop[0], jnp.int32).at[:, 0].set(sampled.token)
  return advance(graphdef, state, sampled, new, 1, max_new_tokens, stop, sampling)[1]
