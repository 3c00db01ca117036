"""A KV cache whose older keys have fewer channels than the head (ThinK, Xu et al. 2025).

The cache of a prompt is cut in two. Of the older tokens (the pruned part) the keys have the `kept`
most important of the head's channels, which each kv head chooses for itself and keeps for good; the
recent tokens and all that come later (the full part) have all of them. A query meets the pruned part
with the same channels left:

    weights = softmax([q_T K_pruned^T, q K_full^T] / sqrt(head_dim)),  out = weights [V_pruned; V_full]

Tokens may be evicted before (`eviction.py`), and the pruned part may be quantized
(`quantized_cache.py`): then the full part is a buffer that is pruned by the same channels, quantized
and emptied when it is full.

Rows are padded on the left, as by `generation.pad_left`. Padding therefore is the first slots of a
row, in all heads, also after eviction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.cache import append, length_of, roll_back
from common.decoding.eviction import Eviction, keep_slots_of, take_slots
from common.decoding.generation import is_stop, prepare, until_stop
from common.decoding.quantized_cache import (
  PackedGroups,
  dequantize,
  quantize_keys,
  quantize_values,
  write_packed,
)
from common.decoding.split_attention import (
  split_attention,
  split_decode_attention,
  take_channels,
)
from common.errors import UserError
from common.models.decoder import Decoder, DecoderConfig, write_slots
from kernels.attention.api import attention
from kernels.platform import has_tpu

Array = jax.Array

# (query [batch, heads, window, head_dim], keys [batch, kv_heads, slots, head_dim],
#  valid queries bool [batch, window], valid keys bool [batch, slots])
# -> importance of each channel, [batch, kv_heads, head_dim].
ChannelScores = Callable[[Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Compression:
  """How the cache of a prompt is made smaller.

  Attributes:
    score_channels: which channels of the keys matter; see `ChannelScores`.
    ratio: of the channels to drop (lambda), floor(ratio * head_dim) of them.
    recent: last tokens of the prompt that keep all channels.
    window: last queries that scores are made of.
    evict: scores of tokens (`snapkv_scores`, `h2o_scores`); None keeps every token.
    capacity: tokens of the prompt that eviction leaves.
    bits: of the pruned part's codes; None leaves it in floating point.
    group: tokens of a key's group and channels of a value's.
    residual: slots of the buffer in front of a quantized part; a multiple of `group`.
    per_head: one choice of channels per query head. Keys and values are then repeated for every
      query head, which costs what grouped-query attention saves.
  """

  score_channels: ChannelScores
  ratio: float = 0.4
  recent: int = 32
  window: int = 32
  evict: Eviction | None = None
  capacity: int = 1024
  bits: int | None = None
  group: int = 32
  residual: int = 128
  per_head: bool = False

  def __post_init__(self):
    if not 0 <= self.ratio < 1:
      raise UserError(f"pruning ratio {self.ratio}: expected 0 (keep all channels) to below 1")
    if self.recent < 0 or self.window < 1:
      raise UserError(
        f"recent={self.recent}, window={self.window}: expected at least 0 and at least 1 token"
      )
    if self.evict is not None and self.capacity < max(self.window, self.recent):
      raise UserError(
        f"capacity={self.capacity} tokens cannot hold the window of {self.window} and the "
        f"{self.recent} recent tokens: raise the capacity"
      )
    if self.bits is not None and (
      self.bits not in (1, 2, 4, 8) or self.residual % self.group or self.residual <= self.recent
    ):
      raise UserError(
        f"bits={self.bits}, group={self.group}, residual={self.residual}: expected 1, 2, 4 or 8 "
        f"bits, and a residual that is a multiple of the group and above recent={self.recent}"
      )

  def kept(self, head_dim: int) -> int:
    """T, the channels that stay."""
    return head_dim - math.floor(self.ratio * head_dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PrunedCache:
  """Keys and values of the tokens so far; `kv_heads` are the query heads if chosen per head.

  Attributes:
    keys: per block, the pruned part [batch, kv_heads, slots, kept], floating point or packed.
    values: per block [batch, kv_heads, slots, head_dim], likewise.
    channels: per block int32 [batch, kv_heads, kept], ascending: those that the keys have.
    full_keys, full_values: per block, the full part [batch, kv_heads, full_slots, head_dim].
    starts: int32 [batch], slots of padding, counted from the first of the pruned part on.
    length: int32 [], slots written of the pruned part.
    full_length: of the full part, int32 []; or [batch], where rows differ in it.
  """

  keys: list[Array | PackedGroups]
  values: list[Array | PackedGroups]
  channels: list[Array]
  full_keys: list[Array]
  full_values: list[Array]
  starts: Array
  length: Array
  full_length: Array

  @property
  def num_bytes(self) -> int:
    """Of keys, values and the choice of channels, which is a bit for each channel of a head.

    All slots count, written or not.
    """
    parts = self.keys, self.values, self.full_keys, self.full_values
    arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts))
    head_dim = self.full_keys[0].shape[-1]
    masks = sum(math.prod(c.shape[:2]) * head_dim for c in self.channels)
    return arrays + -(-masks // 8)


class Observed(NamedTuple):
  """What a pass over a prompt leaves, per block.

  Attributes:
    hidden: [batch, seq, dim], the last block's output.
    query: [batch, heads, seq, head_dim], as the attention's product takes them.
    keys, values: [batch, kv_heads, seq, head_dim].
  """

  hidden: Array
  query: list[Array]
  keys: list[Array]
  values: list[Array]


def observe(
  model: Decoder, tokens: Array, segment_ids: Array, positions: Array | None = None
) -> Observed:
  """Runs the blocks over prompts with all keys, and keeps queries, keys and values.

  Args:
    tokens, segment_ids: int32 [batch, seq], padded on the left; or packed, with their positions.
    positions: int32 [batch, seq]; by default those of a prompt that is padded on the left.
  """
  positions = positions_of(segment_ids) if positions is None else positions
  seen = []

  def observed_attention(query, key, value, **options):
    seen.append((query, key, value))
    return attention(query, key, value, **options)

  x, _ = _with_attention(model, [observed_attention] * len(model.blocks)).run_blocks(
    tokens, positions, segment_ids
  )
  return Observed(x, *(list(part) for part in zip(*seen)))


def positions_of(segment_ids: Array) -> Array:
  """0, 1, ... from each row's first token on; 0 for padding. int32 [batch, seq]."""
  return jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)


def kept_channels(scores: Array, kept: int) -> Array:
  """The `kept` best channels of each head in ascending order, int32 [..., kept].

  Args:
    scores: [..., head_dim]; of equal ones the first stays.
  """
  return jnp.sort(jax.lax.top_k(scores, kept)[1], axis=-1).astype(jnp.int32)


def compress(
  observed: Observed, segment_ids: Array, compression: Compression, new_tokens: int
) -> PrunedCache:
  """The cache of a prompt: tokens are evicted, then channels of the keys that are left pruned.

  Args:
    observed: of the prompts.
    segment_ids: int32 [batch, seq], padded on the left.
    compression: how.
    new_tokens: for which the cache has room.
  """
  valid, window = segment_ids != 0, compression.window
  blocks, starts = [], None
  for query, keys, values in zip(observed.query, observed.keys, observed.values):
    if compression.per_head:
      group = query.shape[1] // keys.shape[1]
      keys, values = jnp.repeat(keys, group, axis=1), jnp.repeat(values, group, axis=1)
    kept_valid = valid
    if compression.evict is not None and compression.capacity < keys.shape[2]:
      scores = compression.evict(query, keys, valid, window)
      slots = keep_slots_of(scores, valid, compression.capacity, window)
      keys, values = take_slots(keys, slots), take_slots(values, slots)
      # Every head keeps all padding that is left over before its tokens.
      count = jnp.minimum(valid.sum(axis=1), compression.capacity)
      kept_valid = jnp.arange(compression.capacity) >= compression.capacity - count[:, None]
    scores = compression.score_channels(query[:, :, -window:], keys, valid[:, -window:], kept_valid)
    channels = kept_channels(scores, compression.kept(keys.shape[3]))
    blocks.append(_split(keys, values, channels, kept_valid, compression, new_tokens))
    starts = jnp.sum(~kept_valid, axis=1)
  pruned = pruned_slots(keys.shape[2], compression)
  return PrunedCache(
    *(list(part) for part in zip(*blocks)),
    starts=starts.astype(jnp.int32),
    length=jnp.int32(pruned),
    full_length=jnp.int32(keys.shape[2] - pruned),
  )


def pruned_slots(slots: int, compression: Compression) -> int:
  """How many of the prompt's slots are in the pruned part: whole groups, where it is quantized."""
  pruned = max(slots - compression.recent, 0)
  return pruned if compression.bits is None else pruned // compression.group * compression.group


def _split(keys, values, channels, valid, compression: Compression, new_tokens: int):
  """(keys, values, channels, full keys, full values) of a block, with room for new tokens."""
  pruned = pruned_slots(keys.shape[2], compression)
  full = keys.shape[2] - pruned
  pad = lambda x, slots: jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0)))
  old_keys, old_values = take_channels(keys[:, :, :pruned], channels), values[:, :, :pruned]
  if compression.bits is None:
    room = new_tokens
  else:
    if compression.residual <= full:
      raise UserError(
        f"residual={compression.residual} slots do not hold the {full} recent tokens: raise it"
      )
    # Padding would widen the ranges of its groups: it takes the place of a real token.
    first = jnp.argmax(valid, axis=1)[:, None]
    source = jnp.maximum(jnp.arange(pruned), jnp.minimum(first, pruned - 1))
    in_place = lambda x: jnp.take_along_axis(x, source[:, None, :, None], axis=2)
    # The buffer is emptied when another token comes, not when it has become full.
    flushes = max(-(-(full + new_tokens) // compression.residual) - 1, 0)
    more = lambda x: pad(in_place(x), flushes * compression.residual)
    old_keys = quantize_keys(more(old_keys), bits=compression.bits, group=compression.group)
    old_values = quantize_values(more(old_values), bits=compression.bits, group=compression.group)
    room = compression.residual - full
  recent = lambda x: pad(x[:, :, pruned:], room)
  return old_keys, old_values, channels, recent(keys), recent(values)


def run_pruned(
  model: Decoder, tokens: Array, positions: Array, cache: PrunedCache
) -> tuple[Array, PrunedCache]:
  """Appends tokens to the cache, which must have room for them in its full part.

  Args:
    tokens, positions: int32 [batch, seq].

  Returns:
    the last block's output [batch, seq, dim], which `Decoder.head` takes, and the cache.
  """
  seq = tokens.shape[1]
  # Codes of values are packed along the channels: they have all slots.
  values = cache.values[0]
  slots = (values.codes if isinstance(values, PackedGroups) else values).shape[2]
  full_slots = cache.full_keys[0].shape[2]
  old, new = jnp.arange(slots), jnp.arange(full_slots)
  seen = (old >= cache.starts[:, None]) & (old < cache.length)
  seen = jnp.broadcast_to(seen[:, None], (len(tokens), seq, slots))
  last = jnp.broadcast_to(cache.full_length[..., None] + jnp.arange(seq), tokens.shape)
  written = new <= last[..., None]
  written &= (new + cache.length >= cache.starts[:, None])[:, None]
  allowed = jnp.concatenate([seen, written], axis=-1)
  updated = []

  def through(keys, values, channels, full_keys, full_values):
    """Attention that appends this pass's keys and values to the block's, and reads them all."""

    def attend(query, key, value, **options):
      del options  # Which tokens there are, `allowed` says.
      if full_keys.shape[1] != key.shape[1]:
        repeat = full_keys.shape[1] // key.shape[1]
        key, value = jnp.repeat(key, repeat, axis=1), jnp.repeat(value, repeat, axis=1)
      all_keys = write_slots(full_keys, key, cache.full_length, axis=2)
      all_values = write_slots(full_values, value, cache.full_length, axis=2)
      updated.append((all_keys, all_values))
      parts = query, read(keys), read(values), channels, all_keys, all_values
      if seq == 1 and has_tpu():
        lengths = jnp.broadcast_to(cache.length, len(tokens)), last[:, 0] + 1
        return split_decode_attention(*parts, cache.starts, *lengths)
      return split_attention(*parts, allowed)

    return attend

  blocks = zip(cache.keys, cache.values, cache.channels, cache.full_keys, cache.full_values)
  x, _ = _with_attention(model, [through(*block) for block in blocks]).run_blocks(
    tokens, positions, jnp.ones_like(tokens)
  )
  full_keys, full_values = (list(part) for part in zip(*updated))
  cache = dataclasses.replace(
    cache, full_keys=full_keys, full_values=full_values, full_length=cache.full_length + seq
  )
  return x, cache


@append.register
def _(cache: PrunedCache, model, tokens, positions, segment_ids):
  # Padding is at the end, where no token sees it, and is rolled back.
  del segment_ids
  return run_pruned(model, tokens, positions, cache)


@roll_back.register
def _(cache: PrunedCache, length):
  return dataclasses.replace(cache, full_length=length)


@length_of.register
def _(cache: PrunedCache):
  return cache.full_length


def flush(cache: PrunedCache) -> PrunedCache:
  """Of a quantized cache: if the full part is full, quantizes it behind the pruned part."""
  if not isinstance(cache.keys[0], PackedGroups):
    return cache
  full_slots = cache.full_keys[0].shape[2]

  def move(cache: PrunedCache) -> PrunedCache:
    keys, values = [], []
    for i, channels in enumerate(cache.channels):
      old_keys, old_values = cache.keys[i], cache.values[i]
      tokens = old_keys.codes.shape[2] * 8 // old_keys.bits
      key_group = tokens // old_keys.scales.shape[2]
      value_group = cache.full_values[i].shape[3] // old_values.scales.shape[3]
      pruned = take_channels(cache.full_keys[i], channels)
      new_keys = quantize_keys(pruned, bits=old_keys.bits, group=key_group)
      new_values = quantize_values(cache.full_values[i], bits=old_values.bits, group=value_group)
      keys.append(write_packed(old_keys, new_keys, cache.length))
      values.append(write_packed(old_values, new_values, cache.length))
    return dataclasses.replace(
      cache,
      keys=keys,
      values=values,
      length=cache.length + full_slots,
      full_length=jnp.zeros_like(cache.full_length),
    )

  return jax.lax.cond(cache.full_length == full_slots, move, lambda cache: cache, cache)


def generate_pruned(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  compression: Compression,
  *,
  max_new_tokens: int,
  stop_tokens: int | Sequence[int] | None = None,
) -> list[list[int]]:
  """Greedy `generate` with the prompts' cache compressed; with nothing to drop it is the same.

  The prompts themselves are read with all keys.

  Raises:
    UserError: as `generate`; or it is no decoder, or its attention depends on where a key stands (ALiBi, sliding
      window), which this cache does not know.
  """
  if not isinstance(model, Decoder):
    raise UserError(f"a pruned cache needs a decoder, got {type(model).__name__}")
  check_supported(model.config)
  tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens, stop_tokens)
  graphdef, state = nnx.split(model)
  new = _generate(graphdef, state, tokens, segment_ids, stop, max_new_tokens, compression)
  return [until_stop(row, stop) for row in np.asarray(new).tolist()]


def check_supported(config: DecoderConfig) -> None:
  """Raises a UserError for a decoder whose attention needs the keys' positions."""
  if config.position == "alibi" or config.sliding_window is not None:
    what = "ALiBi" if config.position == "alibi" else "a sliding window"
    raise UserError(
      f"a pruned cache does not keep the keys' positions, which {what} needs: use a model with "
      "rotary or learned positions and full attention"
    )


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _generate(graphdef, state, tokens, segment_ids, stop, max_new_tokens, compression):
  """New tokens int32 [batch, max_new_tokens]; only those before a stop token are meant."""
  model = nnx.merge(graphdef, state)
  tokens, segment_ids = jnp.asarray(tokens), jnp.asarray(segment_ids)
  observed = observe(model, tokens, segment_ids)
  choose = lambda model, x: jnp.argmax(model.head(x[:, -1:])[:, 0], axis=-1).astype(jnp.int32)
  token = choose(model, observed.hidden)
  cache = compress(observed, segment_ids, compression, max_new_tokens)
  new = jnp.full((len(tokens), max_new_tokens), stop[0], jnp.int32).at[:, 0].set(token)

  def unfinished(loop):
    i, token, *_ = loop
    return (i < max_new_tokens) & ~jnp.all(is_stop(token, stop))

  def decode(loop):
    i, token, positions, cache, new = loop
    model = nnx.merge(graphdef, state)
    x, cache = run_pruned(model, token[:, None], positions[:, None], flush(cache))
    token = jnp.where(is_stop(token, stop), token, choose(model, x))
    return i + 1, token, positions + 1, cache, new.at[:, i].set(token)

  start = jnp.int32(1), token, jnp.sum(segment_ids, axis=1), cache, new
  return jax.lax.while_loop(unfinished, decode, start)[-1]


def read(x: Array | PackedGroups) -> Array:
  """Keys or values of the pruned part, in floating point."""
  return dequantize(x, x.scales.dtype) if isinstance(x, PackedGroups) else x


def _with_attention(model: Decoder, functions: list[Callable[..., Array]]) -> Decoder:
  """The model with another attention in each block."""
  model = nnx.clone(model)
  for block, attend in zip(model.blocks, functions):
    block.attention.attend = attend
  return model
