"""Prepacking (Zhao et al. 2024): the mask and the positions of packed prompts, and what it replaces.

Packing, the pass over packed rows and the unpacked cache that decoding goes on from are
`common/decoding/prepacking.py`; the packers are `common/decoding/bin_packing.py`. Here are the
paper's own forms of them, which the tests and the experiment compare with: the dense mask in place
of segment ids, the left-padded cache in place of one length per row, and the prefill of padded
prompts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from common.decoding.prepacking import PackedPrompts
from common.models.decoder import Decoder, KVCache

Array = jax.Array


def independent_mask(segment_ids: Array, positions: Array) -> Array:
  """The paper's mask M: block-diagonal, with lower-triangular blocks, one for each prompt.

  Args:
    segment_ids: int32 [rows, slots], 0 for padding.
    positions: int32 [rows, slots], restarting at 0 in every prompt.

  Returns:
    bool [rows, slots, slots]; rows of padding allow nothing.
  """
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  causal = positions[:, :, None] >= positions[:, None, :]
  return same & causal & (segment_ids != 0)[:, :, None]


def read_packed_densely(model: Decoder, packed: PackedPrompts) -> KVCache:
  """`read_packed` with the paper's dense mask: the model itself knows of one segment only."""
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, *packed.tokens.shape, dtype)
  one = jnp.ones_like(packed.tokens)
  mask = independent_mask(jnp.asarray(packed.segment_ids), jnp.asarray(packed.positions))
  _, cache = model.run_blocks(packed.tokens, packed.positions, one, cache, mask)
  return dataclasses.replace(cache, segment_ids=jnp.asarray(packed.segment_ids))


def unpack_left_padded(cache: KVCache, packed: PackedPrompts, longest: int, room: int) -> KVCache:
  """The paper's unpacked cache: prompts end at a common slot, and zeros are before them.

  Args:
    cache: of `read_packed`.
    packed: its prompts.
    longest: the largest of their lengths, at least 1.
    room: slots of each row of the result, at least `longest`.

  Returns:
    A cache of length `longest`, one prompt per row in the original order. Its segment ids, 1 where
    there is a token, are the paper's decode mask without the token that was held back.
  """
  rows, lengths = jnp.asarray(packed.prompt_rows), jnp.asarray(packed.lengths)
  inside = cache.segment_ids[rows] == jnp.asarray(packed.prompt_segments)[:, None]
  slots = jnp.arange(room)
  offset = slots - (longest - lengths[:, None])
  real = (offset >= 0) & (slots < longest)
  # A prompt of one token has nothing in the packed rows: all of its row is padding.
  source = jnp.clip(jnp.argmax(inside, axis=1)[:, None] + offset, 0, inside.shape[1] - 1)
  of_heads = lambda leaf: jax.vmap(lambda row, at: leaf[row][:, at])(rows, source)
  keep = lambda leaf: jnp.where(real[:, None, :, None], of_heads(leaf), 0)
  return KVCache(
    keys=[keep(leaf) for leaf in cache.keys],
    values=[keep(leaf) for leaf in cache.values],
    positions=jnp.where(real, offset, 0),
    segment_ids=real.astype(jnp.int32),
    length=jnp.int32(longest),
  )


def padded_cache(model: Decoder, tokens: Array, segment_ids: Array, room: int) -> KVCache:
  """The baselines' prefill, which holds back last tokens as well: one prompt per row.

  A pass that only has to give keys and values saves most of its last block, whether packed or not.
  It attends to the prompts' slots and not to those of tokens to come.

  Args:
    tokens, segment_ids: int32 [prompts, slots], without last tokens, padded on the left.
    room: slots of each row of the result.
  """
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, *tokens.shape, dtype)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  _, cache = model.run_blocks(tokens, positions, segment_ids, cache)
  more = (0, room - tokens.shape[1])
  of_heads = lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), more, (0, 0)))
  of_slots = lambda leaf: jnp.pad(leaf, ((0, 0), more))
  return KVCache(
    keys=[of_heads(leaf) for leaf in cache.keys],
    values=[of_heads(leaf) for leaf in cache.values],
    positions=of_slots(cache.positions),
    segment_ids=of_slots(cache.segment_ids),
    length=cache.length,
  )
