"""AWQ: vectors of the reference code, the card's invariants, and the tiny run."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.decoder import make_context
from common.quantization import rtn
from common.quantization.linear import quantized_weights
from common.quantization.quantized_array import IntegerFormat
from projects.awq import awq, config, experiment, salient, search_result
from tests.common.quantization.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "awq"
FORMAT = IntegerFormat(3, 16, scale_dtype=jnp.float16)
SETTINGS = awq.AWQSettings(FORMAT)


@pytest.fixture(scope="module")
def model():
  return random_decoder(ARCHITECTURES["llama"])


@pytest.fixture(scope="module")
def tokens(model):
  return jnp.asarray(random_tokens(model.config, 8, 16))


@pytest.fixture(scope="module")
def searches(model, tokens):
  return awq.search_model(model, tokens, SETTINGS)


@pytest.mark.parametrize("bits, group_size", [(3, 32), (4, 64), (2, 32)])
def test_clip_search_of_the_reference_code(bits, group_size):
  with np.load(GOLDEN / "auto_clip_layer.npz") as golden:
    settings = awq.AWQSettings(IntegerFormat(bits, group_size))
    limits = awq.search_clip(jnp.asarray(golden["w"]).T, jnp.asarray(golden["x"]), settings)
    expected = golden[f"best_max_b{bits}_g{group_size}"][..., 0]
    np.testing.assert_allclose(limits.T, expected, rtol=1e-6)


def test_scale_search_against_trying_every_exponent():
  rng = np.random.default_rng(0)
  w, x = rng.normal(size=(8, 4)), rng.normal(size=(50, 8)) * np.exp(rng.normal(size=8))
  w, x = jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)
  settings = awq.AWQSettings(IntegerFormat(3))
  s_x = awq.activation_statistic(x)
  error = awq.linear_error(w, x)
  scale, losses = awq.search_scale(lambda new: error(new["w"]), {"w": w}, s_x, settings)
  by_hand = []
  for r in np.arange(20) / 20:
    s = np.maximum(np.asarray(s_x, np.float64) ** r, 1e-4)
    s = jnp.asarray(s / np.sqrt(s.max() * s.min()), jnp.float32)
    rounded = rtn.fake_quantize(w * s[:, None], settings.format) / s[:, None]
    by_hand.append(float(np.mean(np.asarray(x @ (rounded - w), np.float64) ** 2)))
  # The Gram form and float32 scales: relative rounding of about 1e-6, and no code on a tie here.
  np.testing.assert_allclose(losses, by_hand, rtol=1e-4)
  best = np.argmin(by_hand)
  np.testing.assert_allclose(scale, awq.channel_scale(s_x, best / 20), rtol=1e-6)
  assert float(losses.min()) < float(losses[0])


@pytest.mark.parametrize("tokens", [5, 50])
def test_linear_error_in_both_forms(tokens):
  keys = jax.random.split(jax.random.key(0), 3)
  w, new = (jax.random.normal(k, (8, 4)) for k in keys[:2])
  x = jax.random.normal(keys[2], (tokens, 8))
  np.testing.assert_allclose(
    awq.linear_error(w, x)(new), jnp.mean((x @ new - x @ w) ** 2), rtol=1e-5
  )


def test_exponent_zero_is_plain_rounding_and_scales_are_normalised():
  s_x = jnp.array([0.1, 1.0, 7.0, 0.4])
  np.testing.assert_array_equal(awq.channel_scale(s_x, 0.0), np.ones(4))
  for ratio in (0.3, 0.95):
    scale = awq.channel_scale(s_x, ratio)
    assert float(jnp.sqrt(scale.max() * scale.min())) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(awq.channel_scale(100 * s_x, ratio), scale, rtol=1e-5)


def test_a_dead_channel_leaves_scales_finite():
  scale = awq.channel_scale(jnp.array([0.0, 1.0, 50.0]), 0.95)
  assert np.isfinite(scale).all() and (np.asarray(scale) > 0).all()


def test_clipping_never_adds_error_and_shrinks_at_most_to_eleven_twentieths():
  keys = jax.random.split(jax.random.key(1), 2)
  w, x = jax.random.normal(keys[0], (32, 6)), jax.random.normal(keys[1], (100, 32))
  limits = awq.search_clip(w, x, SETTINGS)
  largest = jnp.abs(w.reshape(2, 16, 6)).max(axis=1)
  assert ((limits >= 0.55 * largest * (1 - 1e-6)) & (limits <= largest)).all()

  def group_errors(w_new):
    error = (rtn.fake_quantize(w_new, FORMAT) - w).reshape(2, 16, 6)
    return jnp.mean(jnp.einsum("tgi,gio->tgo", x.reshape(100, 2, 16), error) ** 2, axis=0)

  clipped, plain = group_errors(awq.clamp(w, limits)), group_errors(w)
  assert (clipped <= plain * (1 + 1e-5)).all() and (clipped < 0.99 * plain).any()


def test_the_search_scales_every_input_and_spares_q_and_k(searches):
  assert len(searches) == 2
  for search in searches:
    assert set(search.scales) == {
      "attention_norm",
      "attention.v_proj",
      "mlp_norm",
      "mlp.up_proj",
    }
    assert set(search.clips) == {
      f"{p}_proj" for p in ("attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scales_alone_leave_the_logits(architecture):
  model = random_decoder(ARCHITECTURES[architecture])
  tokens = jnp.asarray(random_tokens(model.config, 8, 16))
  settings = dataclasses.replace(SETTINGS, mse_range=False, scale_grid=4)
  scaled = nnx.clone(model)
  scaled.blocks = nnx.List(
    [
      awq.apply_search(b, s, model.config)
      for b, s in zip(model.blocks, awq.search_model(model, tokens, settings))
    ]
  )
  expected = logits(model, tokens)
  # Scales of 0.1 to 10 reorder float32 sums; the card's bar is 1e-4 of the logits.
  np.testing.assert_allclose(
    logits(scaled, tokens), expected, atol=1e-4 * float(abs(expected).max())
  )


def test_each_module_is_no_worse_than_rounding(model, tokens):
  positions = jnp.arange(tokens.shape[1])[None]
  context, _ = make_context(model.config, positions, jnp.ones_like(positions))
  x = model.embed(tokens, jnp.broadcast_to(positions, tokens.shape))
  inputs = awq.block_inputs(model.blocks[0], x, context)
  for group in awq.scaling_groups(model.config):
    _, losses = awq.search_group_scale(
      *nnx.split(model.blocks[0]), inputs[group.linears[0]], context, group, SETTINGS
    )
    assert losses.shape == (20,) and float(losses.min()) <= float(losses[0])


def test_a_saved_search_gives_the_same_packed_model(model, searches, tmp_path):
  search_result.save(tmp_path / "s.safetensors", searches, SETTINGS)
  loaded, settings = search_result.load(tmp_path / "s.safetensors")
  assert settings == SETTINGS
  first = quantized_weights(awq.apply_to_model(model, searches, FORMAT))
  second = quantized_weights(awq.apply_to_model(model, loaded, settings.format))
  assert len(first) == 14
  for path, weight in first.items():
    np.testing.assert_array_equal(weight.values.astype(int), second[path].values.astype(int))
    np.testing.assert_array_equal(weight.scales, second[path].scales)


@pytest.mark.parametrize("content", [None, b"", b"not a search result"])
def test_a_missing_or_damaged_search_is_a_user_error(content, tmp_path):
  if content is not None:
    (tmp_path / "s").write_bytes(content)
  with pytest.raises(UserError):
    search_result.load(tmp_path / "s")


def test_packed_equals_fake_quantized(model, searches):
  block = awq.apply_search(model.blocks[0], searches[0], model.config)
  packed = awq.quantize_block(model.blocks[0], searches[0], model.config, FORMAT)
  for path, weight in quantized_weights(packed).items():
    kernel = awq.get_module(block, path).kernel[...]
    np.testing.assert_array_equal(weight.dequantize(), rtn.fake_quantize(kernel, FORMAT))


def test_salient_channels():
  score = jnp.array([3.0, 9.0, 1.0, 7.0])
  np.testing.assert_array_equal(salient.salient_channels(score, 0.5), [False, True, False, True])
  assert int(salient.salient_channels(score, 0.001).sum()) == 1
  w, x = jnp.eye(4) * jnp.arange(1.0, 5.0)[:, None], jnp.ones((3, 4)) * jnp.array([4.0, 3, 2, 1])
  key = jax.random.key(0)
  assert int(jnp.argmax(salient.channel_scores(w, x, "activation", key))) == 0
  assert int(jnp.argmax(salient.channel_scores(w, x, "weight", key))) == 3


def test_tiny_run(tmp_path):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  assert len(report.claims) == 8
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  rows = {row[0]: row for row in report.tables[0].rows}
  assert rows["AWQ"][5] == pytest.approx(3 + 19 / 32)
  assert all(np.isfinite(row[2]) for row in rows.values())
  assert (tmp_path / "search.safetensors").exists()
