import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.decoding import generation
from common.decoding.generation import Sampling, generate
from common.errors import UserError
from common.models.encoder_decoder import (
  EncoderDecoder,
  EncoderDecoderConfig,
  bidirectional_mask,
  relative_buckets,
)

CONFIG = EncoderDecoderConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_layers=1,
  num_decoder_layers=2,
  num_heads=3,
  head_dim=8,
  num_buckets=8,
  max_distance=12,
)
SOURCE, TARGET = 12, 8


@pytest.fixture(scope="module")
def model():
  return EncoderDecoder(CONFIG, rngs=nnx.Rngs(0))


@nnx.jit
def run(model, tokens, target, segment_ids, target_segment_ids):
  return model(tokens, target, segment_ids=segment_ids, target_segment_ids=target_segment_ids)


@nnx.jit(static_argnames="max_length")
def start(model, tokens, max_length):
  return model.start(tokens, max_length=max_length)


@nnx.jit
def decode(model, target, cache):
  return model.decode(target, cache)


def random_tokens(seed, length):
  return np.random.default_rng(seed).integers(2, CONFIG.vocab_size, (2, length)).astype(np.int32)


def place(tokens, start, length):
  """The tokens in a row of padding from `start` on, and segment ids."""
  width = ((0, 0), (start, length - start - tokens.shape[1]))
  return np.pad(tokens, width, constant_values=3), np.pad(np.ones_like(tokens), width)


def logits(model, tokens, target, source_start=0, target_start=0):
  """Logits of the target's tokens; all calls share one compilation."""
  tokens, segments = place(tokens, source_start, SOURCE)
  placed, target_segments = place(target, target_start, TARGET)
  out = run(model, tokens, placed, segments, target_segments)
  return np.asarray(out[:, target_start : target_start + target.shape[1]])


def bucket(distance, bidirectional, num_buckets, max_distance):
  """The definition of the T5 paper's code, in exact arithmetic away from the ranges' borders."""
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets if distance > 0 else 0
    distance = abs(distance)
  else:
    distance = max(-distance, 0)
  exact = num_buckets // 2
  if distance < exact:
    return offset + distance
  fraction = math.log(distance / exact) / math.log(max_distance / exact)
  wide = exact + math.floor(fraction * (num_buckets - exact) + 1e-6)
  return offset + min(wide, num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 12), (16, 50), (64, 256)])
def test_relative_buckets_against_the_definition(bidirectional, num_buckets, max_distance):
  distances = np.arange(-300, 301)
  args = {
    "bidirectional": bidirectional,
    "num_buckets": num_buckets,
    "max_distance": max_distance,
  }
  expected = [bucket(int(d), **args) for d in distances]
  actual = jax.jit(lambda d: relative_buckets(d, **args))(distances)
  np.testing.assert_array_equal(actual, expected)
  assert min(expected) == 0 and max(expected) == num_buckets - 1


def test_prefill_and_steps_equal_one_pass(model):
  tokens, target = random_tokens(0, SOURCE), random_tokens(1, TARGET)
  cache = start(model, tokens, max_length=TARGET + 2)
  out, cache = decode(model, target[:, :4], cache)
  parts = [out]
  for i in range(4, TARGET):
    out, cache = decode(model, target[:, i : i + 1], cache)
    parts.append(out)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), logits(model, tokens, target), atol=2e-5
  )
  assert cache.length == TARGET


def test_source_padding_changes_nothing(model):
  tokens, target = random_tokens(2, 9), random_tokens(3, TARGET)
  ones = np.ones_like
  plain = run(model, tokens, target, ones(tokens), ones(target))
  for source_start in (0, 3, 1):
    padded = logits(model, tokens, target, source_start)
    np.testing.assert_allclose(padded, plain, atol=2e-5)


def test_target_padding_and_causality(model):
  tokens, target = random_tokens(4, SOURCE), random_tokens(5, 5)
  plain = logits(model, tokens, target)
  np.testing.assert_allclose(logits(model, tokens, target, target_start=2), plain, atol=2e-5)
  changed = target.copy()
  changed[:, 3] = (target[:, 3] + 1) % CONFIG.vocab_size
  after = logits(model, tokens, changed)
  np.testing.assert_allclose(after[:, :3], plain[:, :3], atol=1e-6)
  assert np.abs(after[:, 3:] - plain[:, 3:]).max() > 1e-3


def argmax_loop(model, source, max_new_tokens):
  config, target = model.config, [model.config.decoder_start_token_id]
  sources = np.array([source] * 2, np.int32)
  while len(target) <= max_new_tokens:
    out = logits(model, sources, np.array([target] * 2, np.int32))
    token = int(out[0, -1].argmax())
    if token == config.eos_token_id:
      break
    target.append(token)
  return target[1:]


def test_generation_equals_an_argmax_loop():
  # With a head of its own a random model does not just repeat its input.
  config = dataclasses.replace(CONFIG, tie_word_embeddings=False, eos_token_id=25)
  model = EncoderDecoder(config, rngs=nnx.Rngs(9))
  sources = random_tokens(8, SOURCE).tolist()
  compiled = generation._generate._cache_size()
  generated = generate(model, sources, max_new_tokens=TARGET)
  assert generated == [argmax_loop(model, source, TARGET) for source in sources]
  assert sorted(len(row) == TARGET for row in generated) == [False, True]  # One row ended early.
  # Other lengths of the same bucket do not compile again; a row does not depend on its neighbours.
  again = generate(model, [[4] * 20, sources[1]], max_new_tokens=TARGET)
  assert again[1] == generated[1]
  assert generation._generate._cache_size() == compiled + 1


def test_sampling_depends_on_its_key_alone(model):
  draw = lambda seed: generate(
    model,
    [[5, 6, 7]] * 2,
    max_new_tokens=TARGET,
    key=jax.random.key(seed),
    sampling=Sampling(temperature=2.0),
  )
  first = draw(0)
  assert first == draw(0) and first != draw(1)
  assert first[0] != first[1]
  with pytest.raises(ValueError, match="needs a key"):
    generate(model, [[5]], max_new_tokens=1, sampling=Sampling(temperature=1.0))
  with pytest.raises(UserError, match="at least one token"):
    generate(model, [[5], []], max_new_tokens=1)


def test_mask_lets_padding_see_the_text():
  mask = np.asarray(bidirectional_mask(jnp.array([[0, 1, 1, 2]])))[0, 0]
  expected = [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
  np.testing.assert_array_equal(mask, np.array(expected, bool))
