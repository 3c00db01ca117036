"""Generation against an argmax loop without a cache, and what sampling may choose."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.data.tokenizer import load_tokenizer
from common.decoding import generation
from common.decoding.generation import Sampling, generate, pad_left, sample, stop_tokens_of
from common.errors import UserError
from common.quantization.calibration import rtn_block
from common.quantization.quantized_array import IntegerFormat
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_encoder_decoder,
)

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [9]]


def packed(model):
  model = nnx.clone(model)
  model.blocks = nnx.List([rtn_block(b, IntegerFormat(4, 16)) for b in model.blocks])
  return model


@pytest.mark.parametrize(
  "architecture, prepare",
  [
    ("llama", packed),
    ("qwen2, grouped-query", lambda m: m),
    ("opt", lambda m: m),
    ("bloom", lambda m: m),
  ],
)
def test_greedy_equals_an_argmax_loop_row_by_row(architecture, prepare):
  model = prepare(random_decoder(ARCHITECTURES[architecture]))
  step = nnx.jit(lambda model, tokens: model(tokens)[0])
  for prompt, new in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=6)):
    # One padded shape for all lengths; what follows the end is not seen.
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + 6):
      tokens[0, i] = np.argmax(step(model, jnp.asarray(tokens))[0, i - 1])
    assert new == tokens[0, len(prompt) : len(prompt) + 6].tolist()


def test_a_stop_token_ends_its_row_only():
  model = random_decoder(ARCHITECTURES["llama"])
  free = generate(model, PROMPTS, max_new_tokens=8)
  stop = free[0][2]
  stopped = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=[stop])
  for a, b in zip(free, stopped):
    assert b == (a[: a.index(stop)] if stop in a else a)
  # A row may stop before its first token.
  first = free[1][0]
  assert generate(model, PROMPTS, max_new_tokens=8, stop_tokens=first)[1] == []


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_each_of_several_stop_tokens_ends_a_row(architecture):
  model = (
    random_encoder_decoder()
    if architecture == "t5"
    else random_decoder(ARCHITECTURES[architecture])
  )
  free = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=[])
  assert [len(row) for row in free] == [8] * 3
  stops = [free[0][2], free[1][5], free[2][0]]
  stopped = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=stops)
  for a, b in zip(free, stopped):
    assert b == a[: min(a.index(stop) for stop in stops if stop in a)]
  assert stopped[2] == []


def test_a_checkpoint_says_which_tokens_end_its_texts(tmp_path):
  tokenizer = load_tokenizer("embedded-512")
  file = tmp_path / "generation_config.json"
  # The tokenizer's own where no file says otherwise.
  assert stop_tokens_of("lm-tiny", tokenizer) == stop_tokens_of(tmp_path, tokenizer) == [2]
  for found, expected in ((7, [7]), ([7, 9, 8], [7, 9, 8]), (None, [2])):
    file.write_text(json.dumps({"eos_token_id": found, "temperature": 0.6}))
    assert stop_tokens_of(tmp_path, tokenizer) == expected
  for wrong in ('{"eos_token_id": [-1]}', '{"eos_token_id": []}', '{"eos_token_id": "</s>"}'):
    file.write_text(wrong)
    with pytest.raises(UserError, match="eos_token_id is .* expected a token id or a list"):
      stop_tokens_of(tmp_path, tokenizer)
  for wrong in ("{", "[]"):
    file.write_text(wrong)
    with pytest.raises(UserError, match="is no JSON object"):
      stop_tokens_of(tmp_path, tokenizer)


def test_the_loop_ends_when_all_rows_have_stopped():
  model = random_decoder(ARCHITECTURES["llama"])
  tokens, segment_ids, _ = generation.prepare(model, PROMPTS, 8, None)
  graphdef, state = nnx.split(model)
  run = lambda stop: np.asarray(
    generation._generate(
      graphdef, state, tokens, segment_ids, jax.random.key(0), stop, 8, Sampling()
    )
  )
  free = run(np.array([-1, -1, -1]))
  stops = np.array([free[0][2], free[1][3], free[2][0]])
  for a, b in zip(free, run(stops)):
    end = next(i for i, token in enumerate(a) if token in stops)
    assert b[: end + 1].tolist() == a[: end + 1].tolist()
    # A stopped row repeats its token while others go on; then the loop leaves what was there.
    assert {*b[end:4]} == {a[end]} and {*b[4:]} == {stops[0]}


def test_an_encoder_decoder_stops_at_its_end_token_by_default():
  model = random_encoder_decoder()
  free = generate(model, PROMPTS, max_new_tokens=8, stop_tokens=[])
  end = free[0][3]
  stopped = generate(random_encoder_decoder(eos_token_id=end), PROMPTS, max_new_tokens=8)
  assert stopped == [row[: row.index(end)] if end in row else row for row in free]


def test_a_full_bucket_and_all_new_tokens_fit_into_the_cache():
  model = random_decoder(ARCHITECTURES["llama"])
  prompt = list(range(generation.PROMPT_BUCKET))
  (new,) = generate(model, [prompt], max_new_tokens=5)
  logits = nnx.jit(lambda model, tokens: model(tokens)[0])(model, jnp.array([prompt + new]))[0]
  assert jnp.argmax(logits, axis=-1)[len(prompt) - 1 : -1].tolist() == new


def test_one_compilation_per_bucket():
  model = random_decoder(ARCHITECTURES["llama"])
  generate(model, [[1, 2], [3]], max_new_tokens=5)
  before = generation._generate._cache_size()
  generate(model, [[4, 5, 6, 7], [8]], max_new_tokens=5)
  assert generation._generate._cache_size() == before
  generate(model, [[4] * 40, [8]], max_new_tokens=5)
  assert generation._generate._cache_size() == before + 1


@functools.partial(jax.jit, static_argnums=1)
def draws(logits, sampling):
  """200 tokens for the one row of `logits`."""
  keys = jax.random.split(jax.random.key(0), 200)
  return jax.vmap(lambda key: sample(logits, key, sampling)[0])(keys)


def test_sampling_stays_in_the_nucleus():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  draw = lambda sampling: set(draws(logits, sampling).tolist())
  # 200 draws miss a token of probability 0.05 with probability 4e-5.
  assert draw(Sampling(temperature=1.0)) == {0, 1, 2, 3}
  assert draw(Sampling(temperature=1.0, top_k=2)) == {0, 1}
  assert draw(Sampling(temperature=1.0, top_p=0.8)) == {0, 1}
  assert draw(Sampling(temperature=1.0, top_p=0.81)) == {0, 1, 2}
  assert draw(Sampling(temperature=1.0, top_p=0.01)) == {0}
  # The nucleus is taken of what top-k leaves: 0.5 / 0.8 is more than 0.6.
  assert draw(Sampling(temperature=1.0, top_k=2, top_p=0.6)) == {0}
  assert draw(Sampling(temperature=1.0, top_k=9)) == {0, 1, 2, 3}
  # ... and of what the temperature leaves: 0.25 / 0.365 is more than 0.65.
  assert draw(Sampling(temperature=0.5, top_p=0.65)) == {0}
  assert draw(Sampling(temperature=1e-4)) == {0}
  assert draw(Sampling()) == {0}
  # The mass before the second token is p exactly: it is out.
  halves = jnp.log(jnp.array([[2.0, 1.0, 1.0]]))
  assert set(draws(halves, Sampling(temperature=1.0, top_p=0.5)).tolist()) == {0}


def test_temperature_sharpens():
  logits = jnp.tile(jnp.log(jnp.array([0.6, 0.4])), (4000, 1))
  share = lambda t: float(jnp.mean(sample(logits, jax.random.key(1), Sampling(t)) == 0))
  # Standard error 0.008.
  assert abs(share(1.0) - 0.6) < 0.03
  assert abs(share(0.5) - 0.36 / 0.52) < 0.03


def test_sampling_follows_the_key():
  model = random_decoder(ARCHITECTURES["llama"])
  hot = Sampling(temperature=1e6)  # All but uniform.
  draw = lambda seed: generate(
    model, PROMPTS, max_new_tokens=8, key=jax.random.key(seed), sampling=hot
  )
  assert draw(0) == draw(0) != draw(1)
  # Every step and every row has noise of its own: 24 of 64 tokens, of which 20 are expected to be
  # different (standard deviation 1.6).
  assert len({token for row in draw(0) for token in row}) > 12
  cold = Sampling(temperature=1e-4)
  greedy = generate(model, PROMPTS, max_new_tokens=8)
  assert greedy == generate(model, PROMPTS, max_new_tokens=8, key=jax.random.key(0), sampling=cold)
  with pytest.raises(ValueError, match="key"):
    generate(model, PROMPTS, max_new_tokens=8, sampling=hot)


def test_padding_is_on_the_left():
  tokens, segment_ids = pad_left([[1, 2], [3, 4, 5]])
  assert tokens.shape == (2, generation.PROMPT_BUCKET)
  assert tokens[0, -2:].tolist() == [1, 2] and segment_ids.sum(axis=1).tolist() == [2, 3]


@pytest.mark.parametrize(
  "call",
  [
    lambda m: generate(m, [[1], []], max_new_tokens=2),
    lambda m: generate(m, [], max_new_tokens=2),
    lambda m: generate(m, [[1]], max_new_tokens=0),
    lambda m: generate(m, [[1], [64]], max_new_tokens=2),  # The model has tokens 0 to 63.
    lambda m: generate(m, [[1, -1]], max_new_tokens=2),
    lambda m: generate(m, [[1] * 30], max_new_tokens=9),  # The model has 32 positions.
    lambda m: generate(m, [[1]], max_new_tokens=2, stop_tokens=[3, 64]),
    lambda m: generate(m, [[1]], max_new_tokens=2, stop_tokens=-1),
    lambda m: Sampling(temperature=-1.0),
    lambda m: Sampling(top_p=0.0),
    lambda m: Sampling(top_p=1.1),
    lambda m: Sampling(top_k=-1),
  ],
)
def test_bad_input_is_a_user_error(call):
  with pytest.raises(UserError):
    call(random_decoder(ARCHITECTURES["opt"]))


def test_decoding_holds_no_dequantized_copy_of_the_model():
  config = dataclasses.replace(
    ARCHITECTURES["llama"],
    hidden_size=128,
    intermediate_size=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
  )
  model = packed(random_decoder(config))
  graphdef, state = nnx.split(model)
  tokens, segment_ids = pad_left([[1, 2, 3]])
  compiled = generation._generate.lower(
    graphdef, state, tokens, segment_ids, jax.random.key(0), np.array([-1]), 8, Sampling()
  ).compile()
  block_weights = 8 * (4 * 128 * 128 + 3 * 128 * 256)
  # Room for activations and a few layers' weights at a time, but not for all of them in float32.
  assert compiled.memory_analysis().temp_size_in_bytes < block_weights * 4 / 2
