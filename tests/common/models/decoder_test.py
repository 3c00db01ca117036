"""The decoder: masks, positions, cache, and independence of padding and packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.decoder import (
  Decoder,
  KVCache,
  RopeScaling,
  alibi_slopes,
  apply_rope,
  rope_frequencies,
)
from tests.common.models.small_decoders import (
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


def test_gradients_are_finite_beside_padding():
  # A padding query sees no key at all: 0 / 0 in a careless softmax, and in its gradient.
  model = random_decoder(dataclasses.replace(ARCHITECTURES["bloom"], num_layers=1))
  tokens = jnp.asarray(random_tokens(model.config, 2, 9))
  segment_ids = jnp.ones_like(tokens).at[0, :4].set(0).at[1, 6:].set(0)
  graphdef, params = nnx.split(model)

  @jax.jit
  def gradient(params):
    def loss(params):
      logits, _ = nnx.merge(graphdef, params)(tokens, segment_ids=segment_ids)
      return jnp.sum(jax.nn.log_softmax(logits) * segment_ids[..., None])

    return jax.grad(loss)(params)

  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


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


def test_llama3_scaling_against_its_formula():
  """RoPE of Llama 3.1: by the wavelength, kept, divided, or interpolated between the two."""
  config = dataclasses.replace(
    ARCHITECTURES["llama"],
    head_dim=64,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
  )
  expected, cases = [], set()
  for i in range(0, 64, 2):
    frequency = 500000.0 ** (-i / 64)
    wavelength = 2 * np.pi / frequency
    if wavelength < 8192 / 4:
      cases.add("kept")
    elif wavelength > 8192 / 1:
      cases.add("divided")
      frequency /= 8
    else:
      cases.add("between")
      smooth = (8192 / wavelength - 1) / (4 - 1)
      frequency = (1 - smooth) * frequency / 8 + smooth * frequency
    expected.append(frequency)
  assert cases == {"kept", "divided", "between"}
  frequencies = rope_frequencies(config, jnp.int32(1))
  # Powers in float32: measured error 2e-6.
  np.testing.assert_allclose(frequencies, expected, rtol=1e-5)


def test_rope_depends_on_distance_only():
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 12)), jnp.float32) for _ in range(2))
  # A part of the head is not rotated.
  config = dataclasses.replace(ARCHITECTURES["llama"], head_dim=12, rotary_dim=8)
  frequencies = rope_frequencies(config, jnp.int32(1))

  def rotate(x, position):
    angles = position * frequencies[None, None]
    return apply_rope(x, (jnp.cos(angles), jnp.sin(angles)))

  product = lambda q, k: float(jnp.sum(rotate(query, q) * rotate(key, k)))
  assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
  assert abs(product(7, 4) - product(7, 5)) > 1e-2
  np.testing.assert_array_equal(rotate(query, 5)[..., 8:], query[..., 8:])
  # By halves: channel i turns with channel i + 4.
  turned = rotate(jnp.zeros((1, 1, 1, 12)).at[..., 1].set(1.0), 2)[0, 0, 0]
  angle = 2 * float(frequencies[1])
  np.testing.assert_allclose(turned[jnp.array([1, 5])], [np.cos(angle), np.sin(angle)], rtol=1e-5)


def test_some_layers_without_the_window():
  config = dataclasses.replace(
    WINDOWED["mistral, window 5"], family="qwen2", full_attention_layers=(1,)
  )
  model = random_decoder(config)
  tokens = random_tokens(config, BATCH, LENGTH)
  cache = KVCache.empty(config, BATCH, LENGTH)
  _, cache = cached(model, jnp.asarray(tokens[:, :11]), cache)
  last, _ = cached(model, jnp.asarray(tokens[:, 11:]), cache)
  np.testing.assert_allclose(last[:, 0], run(model, tokens)[:, 11], **TOLERANCE)
  # The last token sees the first one through the layer without a window.
  changed = tokens.copy()
  changed[0, 0] = (changed[0, 0] + 1) % config.vocab_size
  assert np.abs(run(model, tokens) - run(model, changed))[0, 11].max() > 1e-4


def test_more_tokens_than_the_cache_has_slots_are_refused():
  model = random_decoder(ARCHITECTURES["llama"])
  cache = KVCache.empty(model.config, 1, 4)
  with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
    model(jnp.zeros((1, 5), jnp.int32), cache=cache)


def test_heads_must_share_keys_evenly():
  with pytest.raises(ValueError, match="num_heads=4 is no multiple of 3"):
    dataclasses.replace(ARCHITECTURES["llama"], num_kv_heads=3)


def test_alibi_slopes():
  np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
  # Six heads: the four of a power of two, and two between them.
  expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
  np.testing.assert_allclose(alibi_slopes(6), expected, rtol=1e-6)
  np.testing.assert_allclose(alibi_slopes(1), [2.0**-8], rtol=1e-6)


def test_blocks_of_a_model_share_one_compilation():
  model = random_decoder(dataclasses.replace(ARCHITECTURES["neox"], num_layers=3))
  graphdefs = {nnx.split(block)[0] for block in model.blocks}
  assert len(graphdefs) == 1
