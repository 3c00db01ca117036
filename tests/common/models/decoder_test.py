"""The decoder: masks, positions, cache, and independence of padding and packing."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.decoder import (
  Decoder,
  KVCache,
  RopeScaling,
  alibi_slopes,
  attention_mask,
  rope_frequencies,
)
from tests.common.quantization.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_tokens,
)

# Sums of some hundred float32 products in another order: about 1e-6 of logits of size 1 to 10.
TOLERANCE = dict(atol=3e-5, rtol=1e-5)

WINDOWED = {
  "mistral, window 5": dataclasses.replace(
    ARCHITECTURES["llama"], sliding_window=5, family="mistral"
  )
}
CONFIGS = ARCHITECTURES | WINDOWED


BATCH, LENGTH = 2, 12


@pytest.fixture(params=CONFIGS, scope="module")
def model(request) -> Decoder:
  return random_decoder(CONFIGS[request.param])


@nnx.jit
def forward(model, tokens, positions, segment_ids):
  return model(tokens, positions=positions, segment_ids=segment_ids)[0]


@nnx.jit
def cached(model, tokens, cache):
  return model(tokens, cache=cache)


def run(model, tokens, positions=None, segment_ids=None):
  """Logits [2, 12, vocab]: one shape, so that every test of an architecture shares a program."""
  positions = np.broadcast_to(np.arange(LENGTH), tokens.shape) if positions is None else positions
  segment_ids = np.ones_like(tokens) if segment_ids is None else segment_ids
  return np.asarray(forward(model, *map(jnp.asarray, (tokens, positions, segment_ids))))


def test_prefill_and_single_steps_equal_one_pass(model):
  tokens = jnp.asarray(random_tokens(model.config, BATCH, LENGTH))
  cache = KVCache.empty(model.config, BATCH, LENGTH)
  logits, cache = cached(model, tokens[:, :5], cache)
  parts = [np.asarray(logits)]
  for i in range(5, LENGTH):
    logits, cache = cached(model, tokens[:, i : i + 1], cache)
    parts.append(np.asarray(logits))
  whole = run(model, np.asarray(tokens))
  np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, **TOLERANCE)
  assert int(cache.length) == LENGTH


@pytest.mark.parametrize("pad", [(3, 0), (0, 3)], ids=["left", "right"])
def test_padding_changes_nothing(model, pad):
  tokens = random_tokens(model.config, BATCH, LENGTH)
  width = ((0, 0), pad)
  padded = np.pad(tokens[:, :9], width, constant_values=3)
  segment_ids = np.pad(np.ones((BATCH, 9), np.int32), width)
  positions = np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0)
  out = run(model, padded, positions, segment_ids)
  kept = out[segment_ids > 0].reshape(BATCH, 9, -1)
  # Causal: the first nine of twelve tokens are a document of nine.
  np.testing.assert_allclose(kept, run(model, tokens)[:, :9], **TOLERANCE)
  assert np.isfinite(out).all()


def test_packed_documents_do_not_see_each_other(model):
  a, b = (random_tokens(model.config, BATCH, LENGTH, seed=seed) for seed in (0, 1))
  packed = np.concatenate([a[:, :7], b[:, :5]], axis=1)
  segment_ids = np.repeat([[1, 2]] * BATCH, [7, 5], axis=1)
  positions = np.tile([*range(7), *range(5)], (BATCH, 1))
  out = run(model, packed, positions, segment_ids)
  np.testing.assert_allclose(out[:, :7], run(model, a)[:, :7], **TOLERANCE)
  np.testing.assert_allclose(out[:, 7:], run(model, b)[:, :5], **TOLERANCE)


def test_the_future_is_not_seen(model):
  tokens = random_tokens(model.config, BATCH, LENGTH)
  changed = tokens.copy()
  changed[:, 6] = (changed[:, 6] + 1) % model.config.vocab_size
  before, after = run(model, tokens), run(model, changed)
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert np.abs(before[:, 6] - after[:, 6]).max() > 1e-3


def test_mask_against_the_rule_written_out():
  rng = np.random.default_rng(0)
  positions, segments = rng.integers(0, 8, (2, 9)), rng.integers(0, 3, (2, 9))
  mask = np.asarray(attention_mask(*map(jnp.asarray, (positions, segments) * 2), 3))
  for b in range(2):
    for q in range(9):
      for k in range(9):
        distance = positions[b, q] - positions[b, k]
        same = segments[b, q] == segments[b, k] != 0
        assert mask[b, 0, q, k] == (same and 0 <= distance < 3)


def test_sliding_window_reaches_only_so_far():
  model = random_decoder(dataclasses.replace(WINDOWED["mistral, window 5"], num_layers=1))
  tokens = random_tokens(model.config, BATCH, LENGTH)
  changed = tokens.copy()
  changed[:, 2] = (changed[:, 2] + 1) % model.config.vocab_size
  moved = np.abs(run(model, tokens) - run(model, changed)).max(axis=(0, 2)) > 1e-6
  np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(2, 7))


def test_rope_scalings():
  config = ARCHITECTURES["llama"]
  plain = np.asarray(rope_frequencies(config, jnp.int32(100)))
  scaled = lambda **kwargs: np.asarray(
    rope_frequencies(
      dataclasses.replace(config, rope_scaling=RopeScaling(**kwargs)), jnp.int32(100)
    )
  )
  linear = scaled(kind="linear", factor=4.0, original_max_position=32)
  np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
  # Within the training length "dynamic" changes nothing.
  within = scaled(kind="dynamic", factor=2.0, original_max_position=128)
  np.testing.assert_array_equal(within, plain)
  beyond = scaled(kind="dynamic", factor=2.0, original_max_position=25)
  theta = 10000.0 * (2.0 * 4 - 1) ** (8 / 6)
  np.testing.assert_allclose(beyond, theta ** -(np.arange(0, 8, 2) / 8), rtol=1e-5)
  llama3 = scaled(
    kind="llama3",
    factor=8.0,
    original_max_position=64,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
  )
  wavelength = 2 * np.pi / plain
  np.testing.assert_allclose(llama3[wavelength < 16], plain[wavelength < 16], rtol=1e-6)
  np.testing.assert_allclose(llama3[wavelength > 64], plain[wavelength > 64] / 8, rtol=1e-6)


def test_alibi_slopes():
  np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
  # Six heads: the four of a power of two, and two between them.
  expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
  np.testing.assert_allclose(alibi_slopes(6), expected, rtol=1e-6)


def test_blocks_of_a_model_share_one_compilation():
  model = random_decoder(dataclasses.replace(ARCHITECTURES["neox"], num_layers=3))
  graphdefs = {nnx.split(block)[0] for block in model.blocks}
  assert len(graphdefs) == 1
