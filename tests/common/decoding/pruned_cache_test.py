"""A pruned cache against the full one, against zeroed channels, and its bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from common.decoding import pruned_cache
from common.decoding.eviction import h2o_scores, snapkv_scores
from common.decoding.generation import generate, pad_left
from common.decoding.pruned_cache import Compression, generate_pruned
from common.decoding.split_attention import (
  split_attention,
  split_decode_attention,
  take_channels,
)
from common.errors import UserError
from common.models.decoder import KVCache
from kernels.attention.api import attention
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_encoder_decoder,
)

# Of several lengths; some are shorter than the recent part of 8.
PROMPTS = [list(range(1, 30)), [5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 40, 41, 42]]


def key_energy(query, keys, valid_query, valid):
  del query, valid_query
  return jnp.sum(jnp.where(valid[:, None, :, None], keys**2, 0), axis=2)


@functools.cache
def grouped_query_decoder():
  config = dataclasses.replace(ARCHITECTURES["qwen2, grouped-query"], max_position_embeddings=64)
  return random_decoder(config)


SIZES = Compression(key_energy, ratio=0.0, recent=8, window=8)


@pytest.mark.parametrize(
  "architecture, changes",
  [
    ("qwen2, grouped-query", {}),
    ("qwen2, grouped-query", {"per_head": True, "recent": 0}),
    ("neox", {"evict": snapkv_scores, "capacity": 32}),
  ],
)
def test_nothing_to_drop_is_generate_token_for_token(architecture, changes):
  model = random_decoder(ARCHITECTURES[architecture])
  compression = dataclasses.replace(SIZES, **changes)
  expected = generate(model, PROMPTS, max_new_tokens=8)
  assert generate_pruned(model, PROMPTS, compression, max_new_tokens=8) == expected
  if changes:
    return
  stop = expected[0][2]
  stopped = generate_pruned(model, PROMPTS, compression, max_new_tokens=8, stop_tokens=stop)
  assert stopped == generate(model, PROMPTS, max_new_tokens=8, stop_tokens=stop)


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def cached_logits(graphdef, state, tokens, segment_ids, compression, new, room):
  """Logits of new tokens behind a compressed prompt; the cache; the pass over the prompt."""
  model = nnx.merge(graphdef, state)
  observed = pruned_cache.observe(model, tokens, segment_ids)
  cache = pruned_cache.compress(observed, segment_ids, compression, room)
  positions = segment_ids.sum(axis=1)[:, None] + jnp.arange(new.shape[1])
  x, after = pruned_cache.run_pruned(model, new, positions, cache)
  return model.head(x), cache, after, observed


@functools.partial(jax.jit, static_argnums=0)
def full_logits(graphdef, state, keys, values, starts, positions, new):
  """Logits of new tokens behind keys of all channels, the first `starts` of which are padding."""
  slots, extra = keys[0].shape[2], new.shape[1]
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
  segments = (jnp.arange(slots + extra) >= starts[:, None]) & (jnp.arange(slots + extra) < slots)
  cache = KVCache(
    keys=[pad(k) for k in keys],
    values=[pad(v) for v in values],
    positions=jnp.zeros_like(segments, jnp.int32),  # All before the new tokens.
    segment_ids=segments.astype(jnp.int32),
    length=jnp.int32(slots),
  )
  return nnx.merge(graphdef, state)(new, positions=positions, cache=cache)[0]


NEW = jnp.array([[3, 1, 4], [1, 5, 9], [2, 6, 5]], jnp.int32)


def zeroed(pruned, channels, head_dim):
  """The pruned keys in their places, zeros elsewhere."""
  one_hot = jax.nn.one_hot(channels, head_dim)
  return jnp.einsum("bkst,bktd->bksd", pruned, one_hot)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"evict": snapkv_scores, "capacity": 16},
    {"evict": h2o_scores, "capacity": 16, "per_head": True},
    {"bits": 2, "group": 8, "residual": 16},
  ],
  ids=["none", "snapkv", "h2o, per head", "kivi"],
)
def test_pruned_attention_is_that_of_zeroed_channels_and_its_bytes_are_counted(changes):
  model = grouped_query_decoder()
  tokens, segment_ids = map(jnp.asarray, pad_left(PROMPTS))
  compression = dataclasses.replace(SIZES, ratio=0.4, **changes)
  graphdef, state = nnx.split(model)
  logits, cache, after, _ = cached_logits(graphdef, state, tokens, segment_ids, compression, NEW, 3)

  heads = 4 if compression.per_head else 2
  kept_tokens = compression.capacity if compression.evict else tokens.shape[1]
  pruned, recent = kept_tokens - 8, 8
  assert int(cache.length) == pruned and int(cache.full_length) == recent
  assert int(after.full_length) == recent + 3
  counts = np.minimum(segment_ids.sum(axis=1), kept_tokens)
  np.testing.assert_array_equal(cache.starts, kept_tokens - counts)
  read = lambda x: np.asarray(pruned_cache.read(x))[:, :, :pruned]
  for channels, keys in zip(cache.channels, cache.keys):
    assert channels.shape == (3, heads, 8 - int(8 * 0.4))
    assert (np.diff(channels, axis=-1) > 0).all()
    assert read(keys).shape == (3, heads, pruned, 5)

  # A decoder with as many kv heads reads repeated keys too.
  full = lambda old, new: jnp.concatenate([old, new[:, :, :recent]], axis=2)
  keys = [
    full(zeroed(read(k), c, 8), f) for k, c, f in zip(cache.keys, cache.channels, cache.full_keys)
  ]
  values = [full(read(v), f) for v, f in zip(cache.values, cache.full_values)]
  if not compression.per_head:
    positions = segment_ids.sum(axis=1)[:, None] + jnp.arange(3)
    expected = full_logits(graphdef, state, keys, values, cache.starts, positions, NEW)
    # Sums in another order: a few float32 roundings of logits of order 1.
    np.testing.assert_allclose(logits, expected, atol=2e-5)

  if compression.bits:
    slots, blocks = pruned, 2  # The buffer of 16 has room for 3 more.
    key_bytes = slots // 4 * 5 + slots // 8 * 5 * 8  # Codes, then scales and minimums.
    value_bytes = slots * 8 // 4 + slots * 8
    stored = 3 * heads * (key_bytes + value_bytes + 2 * 16 * 8 * 4)
  else:
    stored = 3 * heads * (pruned * (5 + 8) + 2 * (recent + 3) * 8) * 4
    blocks = 2
  assert cache.num_bytes == blocks * stored + blocks * 3 * heads  # Masks of 8 bits.


def test_split_attention_scales_by_the_whole_head_and_masks_rows():
  keys = jax.random.normal(jax.random.key(0), (2, 2, 12, 8))
  values, query = jax.random.normal(jax.random.key(1), (2, 2, 2, 12, 8))
  query = jnp.repeat(query[:, :, :3], 2, axis=1)
  channels = jnp.array([[[0, 2, 5], [1, 2, 7]], [[3, 4, 5], [0, 1, 6]]])
  allowed = jnp.arange(12) >= jnp.array([[[2], [0], [9]], [[0], [0], [3]]])
  out = split_attention(
    query,
    take_channels(keys[:, :, :7], channels),
    values[:, :, :7],
    channels,
    keys[:, :, 7:],
    values[:, :, 7:],
    allowed,
  )
  mask = jax.nn.one_hot(channels, 8).sum(axis=2)[:, :, None]
  masked = jnp.concatenate([keys[:, :, :7] * mask, keys[:, :, 7:]], axis=2)
  expected = attention(query, masked, values, causal=False, mask=allowed[:, None])
  np.testing.assert_allclose(out, expected, atol=1e-6)
  wrong = attention(query, masked, values, causal=False, mask=allowed[:, None], scale=3**-0.5)
  assert np.abs(out - wrong).max() > 1e-2


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_the_decode_kernels_join_both_parts(implementation):
  normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  keys, values = normal(0, 2, 2, 12, 8), normal(1, 2, 2, 12, 8)
  full_keys, full_values = normal(2, 2, 2, 6, 8), normal(3, 2, 2, 6, 8)
  query = normal(4, 2, 4, 1, 8)
  channels = jnp.array([[[0, 2, 5], [1, 2, 7]], [[3, 4, 5], [0, 1, 6]]])
  parts = query, take_channels(keys, channels), values, channels, full_keys, full_values
  full_length = jnp.array([3, 6])
  for length, starts in ((9, [2, 0]), (9, [11, 9]), (0, [0, 2])):  # The pruned part may be empty.
    starts = jnp.array(starts)
    with pltpu.force_tpu_interpret_mode():
      found = split_decode_attention(
        *parts, starts, jnp.full(2, length), full_length, implementation=implementation
      )
    old, new = jnp.arange(12), jnp.arange(6)
    seen = (old >= starts[:, None]) & (old < length)
    written = (new < full_length[:, None]) & (new + length >= starts[:, None])
    allowed = jnp.concatenate([seen, written], axis=1)[:, None]
    np.testing.assert_allclose(found, split_attention(*parts, allowed), atol=1e-5)


def test_a_full_buffer_is_pruned_by_the_same_channels_and_quantized():
  model = grouped_query_decoder()
  tokens, segment_ids = map(jnp.asarray, pad_left(PROMPTS))
  kivi = dataclasses.replace(SIZES, ratio=0.4, bits=8, group=8, residual=16)
  graphdef, state = nnx.split(model)
  new = jnp.tile(NEW, (1, 3))[:, :8]
  _, before, after, _ = cached_logits(graphdef, state, tokens, segment_ids, kivi, new, 9)
  assert int(after.full_length) == 16
  flushed = jax.jit(pruned_cache.flush)(after)
  assert (int(flushed.length), int(flushed.full_length)) == (24 + 16, 0)
  for i, channels in enumerate(before.channels):
    kept = take_channels(after.full_keys[i], channels)
    np.testing.assert_allclose(pruned_cache.read(flushed.keys[i])[:, :, 24:40], kept, atol=2e-2)
    values = pruned_cache.read(flushed.values[i])
    np.testing.assert_allclose(values[:, :, 24:40], after.full_values[i], atol=2e-2)
    # What was there stays.
    np.testing.assert_array_equal(values[:, :, :24], pruned_cache.read(before.values[i])[:, :, :24])
  assert pruned_cache.flush(before) is not before  # Not full: a copy.
  # 8 bits are so many that the tokens are those of the full cache, over two flushes.
  exact = dataclasses.replace(kivi, ratio=0.0)
  expected = generate(model, PROMPTS, max_new_tokens=28)
  assert generate_pruned(model, PROMPTS, exact, max_new_tokens=28) == expected


def test_a_prompt_that_fits_into_the_buffer_is_quantized_later():
  model = grouped_query_decoder()
  kivi = dataclasses.replace(SIZES, bits=8, group=8, recent=32, residual=40)
  new = generate_pruned(model, PROMPTS, kivi, max_new_tokens=12)
  assert new == generate(model, PROMPTS, max_new_tokens=12)


@pytest.mark.parametrize(
  "changes, what",
  [
    ({"ratio": 1.0}, "ratio"),
    ({"window": 0}, "window"),
    ({"evict": snapkv_scores, "capacity": 4}, "raise the capacity"),
    ({"bits": 3}, "bits=3"),
    ({"bits": 2, "residual": 32, "recent": 32}, "residual"),
  ],
)
def test_sizes_that_do_not_fit(changes, what):
  with pytest.raises(UserError, match=what):
    dataclasses.replace(SIZES, **changes)


def test_models_that_it_is_not_for():
  with pytest.raises(UserError, match="ALiBi"):
    generate_pruned(random_decoder(ARCHITECTURES["bloom"]), PROMPTS, SIZES, max_new_tokens=2)
  with pytest.raises(UserError, match="needs a decoder"):
    generate_pruned(random_encoder_decoder(), PROMPTS, SIZES, max_new_tokens=2)
