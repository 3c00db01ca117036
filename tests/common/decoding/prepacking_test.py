"""Prepacked prefill and generation against those of padded prompts and of one prompt at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.decoding.bin_packing import best_fit_decreasing, fewest_bins, one_per_bin
from common.decoding.generation import Sampling, bucket, generate, step
from common.decoding.prepacking import (
  pack,
  pad_to_buckets,
  prepacked_generate,
  prepacked_prefill,
  read_packed,
)
from common.errors import UserError
from common.models.decoder import RopeScaling
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_encoder_decoder,
)

# float32 sums in another order.
TOLERANCE = {"atol": 2e-5}
# One prompt of a single token, which has nothing in the packed rows; two that are equal.
LENGTHS = (9, 1, 5, 12, 5, 2)
WINDOW = dataclasses.replace(ARCHITECTURES["llama"], sliding_window=3, family="mistral")

run = nnx.jit(lambda model, tokens, options: model(tokens, **options))


@pytest.fixture(scope="module", params=("qwen2, grouped-query", "opt", "bloom", "window"))
def model(request):
  return random_decoder(WINDOW if request.param == "window" else ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 64, length).tolist() for length in LENGTHS]


def alone(model, prompt):
  """Logits of a prompt on its own, [tokens, vocab]; what follows its end is not seen."""
  row = np.pad(prompt, (0, 16 - len(prompt)))[None]
  return run(model, row, {})[0][0, : len(prompt)]


def test_packed_rows(prompts):
  bins = best_fit_decreasing(LENGTHS, 12)
  assert bins == [[3], [0, 1], [2, 4, 5]]
  packed = pack(prompts, bins)
  assert packed.tokens.shape == (3, 11)
  row = [*prompts[2][:-1], *prompts[4][:-1], prompts[5][0], 0, 0]
  np.testing.assert_array_equal(packed.tokens[2], row)
  np.testing.assert_array_equal(packed.positions[2], [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 0])
  np.testing.assert_array_equal(packed.segment_ids[2], [1, 1, 1, 1, 2, 2, 2, 2, 3, 0, 0])
  np.testing.assert_array_equal(packed.prompt_rows, [1, 1, 2, 0, 2, 2])
  np.testing.assert_array_equal(packed.prompt_segments, [1, 2, 1, 1, 2, 3])
  np.testing.assert_array_equal(packed.lengths, np.array(LENGTHS) - 1)
  np.testing.assert_array_equal(packed.last_tokens, [p[-1] for p in prompts])
  padded = pad_to_buckets(packed)
  assert padded.tokens.shape == (3, 32)
  np.testing.assert_array_equal(padded.segment_ids[:, :11], packed.segment_ids)
  assert not padded.segment_ids[:, 11:].any()
  sizes = [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 17, 25, 32, 33, 48, 511)]
  assert sizes == [1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 24, 32, 32, 48, 48, 512]


run_step = nnx.jit(step)


def test_prefill_and_its_cache_are_those_of_each_prompt_alone(model, prompts):
  logits, progress = prepacked_prefill(model, prompts, max_new_tokens=2)
  np.testing.assert_array_equal(progress.positions, LENGTHS)
  np.testing.assert_array_equal(progress.cache.length, LENGTHS)
  again, _ = run_step(model, progress, jnp.full(len(prompts), 7))
  for row, prompt in enumerate(prompts):
    expected = alone(model, [*prompt, 7])
    np.testing.assert_allclose(logits[row], expected[-2], **TOLERANCE)
    np.testing.assert_allclose(again[row], expected[-1], **TOLERANCE)


@pytest.mark.parametrize(
  "config, sampling", [(WINDOW, Sampling()), (ARCHITECTURES["llama"], Sampling(1.5, top_k=20))]
)
def test_generation_is_that_of_padded_prompts(config, prompts, sampling):
  model = random_decoder(config)
  options = {
    "max_new_tokens": 6,
    "key": jax.random.key(1),
    "sampling": sampling,
    "stop_tokens": [5, 6, 7, 8],
  }
  expected = generate(model, prompts, **options)
  assert prepacked_generate(model, prompts, **options) == expected


def test_packers_and_order_change_nothing(prompts):
  model = random_decoder(ARCHITECTURES["llama"])
  logits, progress = prepacked_prefill(model, prompts, max_new_tokens=2)
  for packer in (fewest_bins, one_per_bin):
    other, cache = prepacked_prefill(model, prompts, max_new_tokens=2, packer=packer)
    np.testing.assert_allclose(other, logits, **TOLERANCE)
  order = [4, 2, 0, 5, 1, 3]
  permuted, cache = prepacked_prefill(model, [prompts[i] for i in order], max_new_tokens=2)
  np.testing.assert_allclose(permuted, logits[np.array(order)], **TOLERANCE)
  np.testing.assert_array_equal(cache.positions, progress.positions[np.array(order)])


def test_prompts_do_not_see_each_other(prompts):
  """Other tokens in one prompt leave the keys and values of the others exactly the same."""
  model = random_decoder(ARCHITECTURES["qwen2, grouped-query"])
  bins = [[0, 1, 2], [3, 4, 5]]
  read = nnx.jit(read_packed)
  changed = [[(t + 1) % 64 for t in p] if i == 2 else p for i, p in enumerate(prompts)]
  packed = pack(prompts, bins)
  before, after = (read(model, pack(p, bins)) for p in (prompts, changed))
  other = (packed.segment_ids != 3) | (np.arange(2)[:, None] != 0)
  for a, b in zip(before.keys + before.values, after.keys + after.values):
    difference = np.abs(np.asarray(a) - np.asarray(b)).max(axis=(1, 3))
    assert not difference[other].any() and difference[~other].all()


def test_bad_input(prompts):
  llama = ARCHITECTURES["llama"]
  model = random_decoder(llama)
  with pytest.raises(UserError, match="at least one token"):
    prepacked_generate(model, [[1], []], max_new_tokens=2)
  with pytest.raises(UserError, match="the model has 0 to 63"):
    prepacked_prefill(model, [[64]], max_new_tokens=2)
  with pytest.raises(UserError, match="max_new_tokens=0 must be positive"):
    prepacked_prefill(model, prompts, max_new_tokens=0)
  with pytest.raises(UserError, match="the model has 32"):
    prepacked_generate(random_decoder(ARCHITECTURES["opt"]), prompts, max_new_tokens=21)
  with pytest.raises(UserError, match="needs a decoder, got EncoderDecoder"):
    prepacked_prefill(random_encoder_decoder(), prompts, max_new_tokens=2)
  for change, message in (
    ({"causal": False}, "needs a causal decoder"),
    ({"rope_scaling": RopeScaling("dynamic", 2.0, 16)}, "dynamic scaling"),
  ):
    with pytest.raises(UserError, match=message):
      prepacked_prefill(
        random_decoder(dataclasses.replace(llama, **change)), prompts, max_new_tokens=2
      )
  with pytest.raises(ValueError, match="needs a key"):
    prepacked_generate(model, prompts, max_new_tokens=2, sampling=Sampling(1.0))
