"""What a decoding engine does to a KV cache: append, roll back, reorder, keep a path of a tree.

`append`, `roll_back` and `length_of` are all that step-by-step decoding needs; caches of other kinds
register theirs (`pruned_cache.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from common.models.decoder import Decoder, KVCache

Array = jax.Array


@functools.singledispatch
def append(
  cache: KVCache, model: Decoder, tokens: Array, positions: Array, segment_ids: Array
) -> tuple[Array, KVCache]:
  """Runs the blocks over new tokens, which see the cache and are written to it.

  Args:
    cache: with room for them.
    model: the decoder.
    tokens, positions, segment_ids: int32 [batch, seq].

  Returns:
    The last block's output [batch, seq, dim], which `Decoder.head` takes, and the cache.
  """
  return model.run_blocks(tokens, positions, segment_ids, cache)


@functools.singledispatch
def length_of(cache: KVCache) -> Array:
  """How much of the cache is written, int32 [] or [batch]: what `roll_back` sets."""
  return cache.length


@functools.singledispatch
def roll_back(cache: KVCache, length: Array) -> KVCache:
  """Forgets what was written from slot `length` on; the next tokens are written there.

  Args:
    cache: of any pass.
    length: int32 [] or [batch], at most the cache's.
  """
  slots = jnp.arange(cache.positions.shape[1])
  kept = slots < length[..., None]
  # Segment 0 is never attended to: keys and values may stay where they are.
  return dataclasses.replace(
    cache, segment_ids=jnp.where(kept, cache.segment_ids, 0), length=length
  )


def take_rows(cache: KVCache, rows: Array) -> KVCache:
  """The rows of another batch: what beams go on from, or a prompt's cache for several samples.

  Args:
    cache: of `old` rows.
    rows: int32 [batch], from 0 to old - 1.
  """
  length = cache.length if cache.length.ndim == 0 else cache.length[rows]
  return dataclasses.replace(jax.tree.map(lambda leaf: _take(leaf, rows), cache), length=length)


def keep_slots(cache: KVCache, start: Array, slots: Array, count: Array) -> KVCache:
  """Moves some slots together behind a prefix and forgets the rest: a path of a tree of drafts.

  Args:
    cache: of any pass.
    start: int32 [batch], length of the prefix that stays.
    slots: int32 [batch, n], in the order of the path; all at or behind `start`.
    count: int32 [batch], how many of them are meant.

  Returns:
    A cache of length start + count, one for each row.
  """

  def move(leaf, axis):
    def one(leaf, start, slots):
      taken = jnp.take(leaf, slots, axis=axis - 1)
      return jax.lax.dynamic_update_slice_in_dim(leaf, taken, start, axis=axis - 1)

    return jax.vmap(one)(leaf, start, slots)

  moved = KVCache(
    keys=[move(leaf, 2) for leaf in cache.keys],
    values=[move(leaf, 2) for leaf in cache.values],
    positions=move(cache.positions, 1),
    segment_ids=move(cache.segment_ids, 1),
    length=start + count,
  )
  return roll_back(moved, moved.length)


def unpack(
  cache: KVCache, rows: Array, segments: Array, lengths: Array, max_length: int
) -> KVCache:
  """A cache of packed prompts, several in a row, as one of a prompt per row (prepacked prefill).

  Args:
    cache: of the packed rows.
    rows: int32 [prompts], the packed row of each prompt.
    segments: int32 [prompts], its segment id there; a prompt's tokens lie together.
    lengths: int32 [prompts], its tokens.
    max_length: slots of each row of the result.

  Returns:
    A cache in which prompt i takes slots 0 to lengths[i] - 1 of row i, all of segment 1.
  """
  first = jnp.argmax(cache.segment_ids[rows] == segments[:, None], axis=1)
  slots = jnp.arange(max_length)
  # Slots behind the prompt hold anything: their segment is 0.
  source = jnp.minimum(first[:, None] + slots, cache.segment_ids.shape[1] - 1)
  of_heads = lambda leaf: jax.vmap(lambda row, at: leaf[row][:, at])(rows, source)
  of_slots = lambda leaf: jax.vmap(lambda row, at: leaf[row, at])(rows, source)
  return KVCache(
    keys=[of_heads(leaf) for leaf in cache.keys],
    values=[of_heads(leaf) for leaf in cache.values],
    positions=of_slots(cache.positions),
    segment_ids=(slots < lengths[:, None]).astype(jnp.int32),
    length=lengths,
  )


def _take(leaf: Array, rows: Array) -> Array:
  return leaf if leaf.ndim < 2 else leaf[rows]
