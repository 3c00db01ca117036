"""AWQ: vectors of the reference code, invariants, and the tiny run."""

import dataclasses
import pathlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.base import base_model
from common.models.decoder import make_context
from common.models.outliers import inject_outliers
from common.quantization import awq, rtn
from common.quantization.calibration import quantize_blocks, rtn_block, run_block
from common.quantization.linear import quantized_weights
from common.quantization.quantized_array import IntegerFormat
from projects.awq import config, experiment, methods, salient, search_result
from tests.common.models.small_decoders import ARCHITECTURES, logits, random_decoder, random_tokens

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "awq"
# The tiny preset's model, tokens and settings: the tests share its compiled programs.
TINY = config.get_config("tiny")
FORMAT = methods.integer_format(TINY, TINY.bits)
SETTINGS = methods.awq_settings(TINY, FORMAT)
SAMPLES, SEQ = TINY.calibration_samples, TINY.calibration_length
search_clip = jax.jit(awq.search_clip, static_argnums=2)
fake_quantize = jax.jit(rtn.fake_quantize, static_argnums=1)
channel_scale = jax.jit(awq.channel_scale)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def base():
  return base_model(TINY.model)


@pytest.fixture(scope="module")
def model(base):
  return base.model


@pytest.fixture(scope="module")
def tokens(base):
  return methods.mixed_calibration(TINY, base, 0)


@pytest.fixture(scope="module")
def context(model, tokens):
  positions = jnp.arange(tokens.shape[1])[None]
  return make_context(model.config, positions, jnp.ones_like(positions))[0]


@pytest.fixture(scope="module")
def x(model, tokens):
  """The first block's inputs."""
  return model.embed(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))


@pytest.fixture(scope="module")
def searches(model, tokens):
  return awq.search_model(model, tokens, SETTINGS)


@pytest.mark.parametrize("bits, group_size", [(3, 32), (4, 64), (2, 32)])
def test_clip_search_of_the_reference_code(bits, group_size):
  with np.load(GOLDEN / "auto_clip_layer.npz") as golden:
    settings = awq.AWQSettings(IntegerFormat(bits, group_size))
    limits = np.asarray(search_clip(golden["w"].T, golden["x"], settings))
    np.testing.assert_array_equal(limits.T, golden[f"best_max_b{bits}_g{group_size}"][..., 0])


def test_scale_search_against_trying_every_exponent():
  rng = np.random.default_rng(0)
  w, x = rng.normal(size=(8, 4)), rng.normal(size=(50, 8)) * np.exp(rng.normal(size=8))
  w, x = w.astype(np.float32), x.astype(np.float32)
  settings = awq.AWQSettings(IntegerFormat(3))

  @jax.jit
  def search(w, x):
    s_x, error = awq.activation_statistic(x), awq.linear_error(w, x)
    return s_x, *awq.search_scale(lambda new: error(new["w"]), {"w": w}, s_x, settings)

  s_x, scale, losses = search(w, x)
  by_hand = []
  for r in np.arange(20) / 20:
    s = np.maximum(np.asarray(s_x, np.float64) ** r, 1e-4)
    s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
    rounded = np.asarray(fake_quantize(w * s[:, None], settings.format)) / s[:, None]
    by_hand.append(np.mean((x.astype(np.float64) @ (rounded - w)) ** 2))
  # The Gram form and float32 scales: relative rounding of about 1e-6, and no code on a tie here.
  np.testing.assert_allclose(losses, by_hand, rtol=1e-4)
  best = np.argmin(by_hand)
  np.testing.assert_allclose(scale, channel_scale(s_x, best / 20), rtol=1e-6)
  assert float(losses.min()) < float(losses[0])


@jax.jit
def scale_search_with_losses(table):
  """Index of the exponent found, and the losses found, when the exponents' losses are the given."""
  settings = awq.AWQSettings(IntegerFormat(3), scale_grid=len(table))
  s_x, w = jnp.arange(1.0, 9.0), normal(0, 8, 4)
  # Rounded weights give their exponent away.
  scales = jnp.stack([awq.channel_scale(s_x, i / len(table)) for i in range(len(table))])
  rounded = jnp.stack([awq.scaled_fake_quantize(w, s, settings.format) for s in scales])

  def forward(kernels):
    return table[jnp.abs(rounded - kernels["w"]).sum(axis=(1, 2)).argmin()]

  scale, found = awq.search_scale(forward, {"w": w}, s_x, settings)
  return jnp.argmin(jnp.abs(scales - scale).sum(axis=1)), found


@pytest.mark.parametrize(
  "losses, best",
  [
    ([3.0, 1.0, 2.0, 1.0], 1),
    ([2.0, 2.0, 2.0, 2.0], 0),
    ([3.0, np.nan, 2.0, np.inf], 2),
    ([np.nan] * 4, 0),
  ],
)
def test_the_first_of_equal_losses_wins_and_nan_never(losses, best):
  index, found = scale_search_with_losses(np.float32(losses))
  np.testing.assert_array_equal(found, np.float32(losses))
  assert int(index) == best


@pytest.mark.parametrize("tokens", [5, 50])
def test_linear_error_in_both_forms(tokens):
  w, new, x = normal(0, 8, 4), normal(1, 8, 4), normal(2, tokens, 8)
  found = jax.jit(lambda w, x, new: awq.linear_error(w, x)(new))(w, x, new)
  np.testing.assert_allclose(found, np.mean((x @ new - x @ w) ** 2), rtol=1e-5)


def test_exponent_zero_is_plain_rounding_and_scales_are_normalised():
  s_x = np.float32([0.1, 1.0, 7.0, 0.4])
  np.testing.assert_array_equal(channel_scale(s_x, 0.0), np.ones(4))
  for ratio in (0.3, 0.95):
    scale = np.asarray(channel_scale(s_x, ratio))
    assert np.sqrt(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(channel_scale(100 * s_x, ratio), scale, rtol=1e-5)


def test_a_dead_channel_leaves_scales_finite():
  scale = channel_scale(np.float32([0.0, 1.0, 50.0, 2.0]), 0.95)
  assert np.isfinite(scale).all() and (np.asarray(scale) > 0).all()


def test_clipping_never_adds_error_and_shrinks_at_most_to_eleven_twentieths():
  w, x = normal(1, 64, 6), normal(2, 100, 64)
  limits = np.asarray(search_clip(w, x, SETTINGS))
  largest = np.abs(w.reshape(2, 32, 6)).max(axis=1)
  assert ((limits >= 0.55 * largest * (1 - 1e-6)) & (limits <= largest)).all()

  def group_errors(w_new):
    error = (np.asarray(fake_quantize(w_new, FORMAT)) - w).reshape(2, 32, 6)
    return np.mean(np.einsum("tgi,gio->tgo", x.reshape(100, 2, 32), error) ** 2, axis=0)

  clipped, plain = group_errors(jax.jit(awq.clamp)(w, limits)), group_errors(w)
  assert (clipped <= plain * (1 + 1e-5)).all() and (clipped < 0.99 * plain).any()


def clip_oracle(w, x, format, clip_grid=20, max_shrink=0.5):
  """The published search in float64: partial products of every token, one candidate at a time."""
  groups = format.num_groups(w.shape)[0]
  w64, x64 = np.asarray(w, np.float64), np.asarray(x, np.float64).reshape(-1, w.shape[0])
  largest = np.abs(w64.reshape(groups, -1, w.shape[1])).max(axis=1)
  losses = []
  for i in range(int(max_shrink * clip_grid)):
    limit = np.repeat(largest * (1 - i / clip_grid), w.shape[0] // groups, axis=0)
    clipped = np.clip(w64, -limit, limit).astype(np.float32)
    error = np.asarray(fake_quantize(clipped, format), np.float64) - w64
    partial = np.einsum(
      "tgi,gio->tgo", x64.reshape(len(x64), groups, -1), error.reshape(groups, -1, w.shape[1])
    )
    losses.append((partial**2).mean(axis=0))
  losses = np.stack(losses)
  return largest * (1 - losses.argmin(axis=0) / clip_grid), losses


def assert_clips_equal(limits, expected):
  # A clipped range puts weights on ties, which float32 limits may break differently: one entry, or
  # 3 % of them, may end up at another candidate.
  assert limits.shape == expected.shape
  different = int((~np.isclose(limits, expected, rtol=1e-5)).sum())
  assert different <= max(1, 0.03 * expected.size), different


@pytest.mark.parametrize("tokens", [100, 511, 1300])
@pytest.mark.parametrize("group_size", [16, -1])
def test_clip_search_against_the_published_sums(tokens, group_size):
  """Also per output channel, where the reference code fails, and with fewer tokens than it takes."""
  w, x = normal(3, 32, 16), normal(4, tokens, 32)
  format = IntegerFormat(3, group_size)
  used = x[:: max(1, tokens // 512)]
  assert len(used) == {100: 100, 511: 511, 1300: 650}[tokens]
  expected, losses = clip_oracle(w, used, format)
  assert len(np.unique(losses.argmin(axis=0))) > 2  # A search whose answers differ.
  assert_clips_equal(search_clip(w, x.reshape(1, tokens, 32), awq.AWQSettings(format)), expected)


def test_clip_grid_and_largest_shrink():
  w, x = normal(3, 32, 16), normal(4, 100, 32)
  # Each group's largest weights meet inputs of almost 0: a small range costs nothing.
  w[::16] *= 8.0
  x[:, ::16] *= 1e-3
  settings = awq.AWQSettings(IntegerFormat(2, 16), clip_grid=10, max_shrink=0.8)
  expected, _ = clip_oracle(w, x, settings.format, 10, 0.8)
  limits = np.asarray(search_clip(w, x, settings))
  assert_clips_equal(limits, expected)
  largest = np.abs(w.reshape(2, 16, 16)).max(axis=1)
  assert (limits / largest).min() < 0.5


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
def test_scales_alone_leave_the_logits(architecture, model, tokens):
  searched = architecture == "llama"  # The tiny preset's model is one.
  # Elsewhere a fixed exponent, whose scales differ as much: the searches' programs take long to
  # compile. That they can be made is tested below.
  settings = dataclasses.replace(SETTINGS, mse_range=False, fixed_ratio=None if searched else 0.5)
  if not searched:
    model = random_decoder(dataclasses.replace(ARCHITECTURES[architecture], num_layers=1))
    tokens = jnp.asarray(random_tokens(model.config, 8, 16))
  found = awq.search_model(model, tokens, settings)
  assert all(np.ptp(scale) > 0.1 for search in found for scale in search.scales.values())
  scaled = nnx.clone(model)
  scaled.blocks = nnx.List(
    [awq.apply_search(b, s, model.config) for b, s in zip(model.blocks, found)]
  )
  expected = logits(model, tokens)
  # Scales of 0.1 to 10 reorder float32 sums; the bar is 1e-4 of the logits.
  bound = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(logits(scaled, tokens), expected, atol=bound)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "llama"])
def test_every_architecture_has_its_searches(architecture):
  """Their programs are traced, not compiled."""
  model = random_decoder(dataclasses.replace(ARCHITECTURES[architecture], num_layers=1))
  graphdef, state = nnx.split(model.blocks[0])
  x, context = jax.eval_shape(model.stem, random_tokens(model.config, 8, 16))
  for group in awq.scaling_groups(model.config):
    width = awq.get_module(model.blocks[0], group.linears[0]).in_features
    features = jax.ShapeDtypeStruct((*x.shape[:2], width), x.dtype)
    search = lambda state, features, context, group=group: awq.search_group_scale(
      graphdef, state, features, context, group, SETTINGS
    )
    scale, losses = jax.eval_shape(search, state, features, context)
    assert scale.shape == (width,) and losses.shape == (20,)


def test_losses_are_those_of_the_inspected_modules(model, x, context):
  """Of the whole attention for q, k, v, of the MLP for gate and up; none is above plain rounding."""
  block = model.blocks[0]
  inputs = awq.block_inputs(block, x, context)
  graphdef, state = nnx.split(block)
  run = nnx.jit(lambda module, *x: module(*x))

  def output(block, group):
    module, features = awq.get_module(block, group.inspect), inputs[group.linears[0]]
    return (
      run(module, features, context)[0] if group.inspect == "attention" else run(module, features)
    )

  for group in awq.scaling_groups(model.config):
    features = inputs[group.linears[0]]
    scale, losses = awq.search_group_scale(graphdef, state, features, context, group, SETTINGS)
    assert losses.shape == (20,) and float(losses.min()) <= float(losses[0])
    s_x = np.abs(features).mean(axis=(0, 1))
    for i in (0, int(losses.argmin()), 19):
      changed = nnx.clone(block)
      s = np.asarray(channel_scale(s_x, i / 20))[:, None]
      for path in group.linears:
        linear = awq.get_module(changed, path)
        rounded = fake_quantize(np.asarray(linear.kernel[...]) * s, FORMAT)
        linear.kernel[...] = jnp.asarray(np.asarray(rounded) / s)
      expected = np.mean((np.asarray(output(changed, group)) - output(block, group)) ** 2)
      # Float32 sums in another order; and a weight on a tie may take the other of two codes.
      np.testing.assert_allclose(losses[i], expected, rtol=2e-3, err_msg=f"{group.previous} {i}")
    best = channel_scale(s_x, int(losses.argmin()) / 20)
    np.testing.assert_allclose(scale, best, rtol=1e-5)


def test_clips_are_searched_on_the_scaled_problem(model, x, context):
  """Weights times s, inputs divided by s. Without the division the limits are others."""
  block = inject_outliers(model, jax.random.key(0)).blocks[0]  # Scales far from 1.
  search = awq.search_block(block, x, context, model.config, SETTINGS)
  inputs = awq.block_inputs(block, x, context)
  scaled = awq.apply_search(block, awq.BlockSearch(search.scales, {}), model.config)
  moved = 0
  for group in awq.scaling_groups(model.config):
    for path in group.linears:
      if path not in search.clips:
        continue
      kernel = awq.get_module(scaled, path).kernel[...]
      features = np.asarray(inputs[path]) / np.asarray(search.scales[group.previous])
      expected = clip_oracle(kernel, features, FORMAT)[0]
      assert_clips_equal(search.clips[path], expected)
      unscaled = clip_oracle(kernel, inputs[path], FORMAT)[0]
      moved += int((~np.isclose(unscaled, expected, rtol=1e-5)).sum())
  assert moved > 20


def test_q_and_k_stay_as_they_are(model, searches):
  for search in searches:
    assert not any(path.endswith(("q_proj", "k_proj")) for path in search.clips)
  scales_only = awq.BlockSearch(searches[0].scales, {})
  block, config_ = model.blocks[0], model.config
  clipped = awq.apply_search(block, searches[0], config_).attention
  unclipped = awq.apply_search(block, scales_only, config_).attention
  np.testing.assert_array_equal(clipped.q_proj.kernel[...], unclipped.q_proj.kernel[...])
  assert not np.array_equal(clipped.o_proj.kernel[...], unclipped.o_proj.kernel[...])


def test_settings_switch_the_parts_off(model, x, context):
  def search(**changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return awq.search_block(model.blocks[0], x, context, model.config, settings)

  neither = search(auto_scale=False, mse_range=False)
  assert neither.scales == {} and neither.clips == {}
  assert search(mse_range=False).clips == {}
  clips_only = search(auto_scale=False)
  assert clips_only.scales == {} and len(clips_only.clips) == 5
  kernel = model.blocks[0].mlp.down_proj.kernel[...]
  features = awq.block_inputs(model.blocks[0], x, context)["mlp.down_proj"]
  expected = clip_oracle(kernel, features, FORMAT)[0]
  assert_clips_equal(clips_only.clips["mlp.down_proj"], expected)


@pytest.mark.parametrize("stat", ["mean", "max"])
def test_fixed_exponent_and_statistic(stat, model, x, context):
  settings = dataclasses.replace(SETTINGS, fixed_ratio=0.5, mse_range=False, scale_stat=stat)
  search = awq.search_block(model.blocks[0], x, context, model.config, settings)
  inputs = awq.block_inputs(model.blocks[0], x, context)
  for group in awq.scaling_groups(model.config):
    magnitude = np.abs(np.asarray(inputs[group.linears[0]], np.float64)).reshape(SAMPLES * SEQ, -1)
    s = np.sqrt(magnitude.mean(axis=0) if stat == "mean" else magnitude.max(axis=0))
    s = s / np.sqrt(s.max() * s.min())
    np.testing.assert_allclose(search.scales[group.previous], s, rtol=1e-4)


def test_dead_and_huge_channels(model, x, context):
  """An input channel that is always 0 beside one that is large: everything stays finite."""
  block = nnx.clone(model.blocks[0])
  gain = np.array(block.attention_norm.scale[...])
  gain[3], gain[5] = 0.0, 1e4
  block.attention_norm.scale[...] = jnp.asarray(gain)
  search = awq.search_block(block, x, context, model.config, SETTINGS)
  for value in (*search.scales.values(), *search.clips.values()):
    assert np.isfinite(value).all() and (np.asarray(value) >= 0).all()
  assert all((np.asarray(s) > 0).all() for s in search.scales.values())
  packed = awq.quantize_block(block, search, model.config, FORMAT)
  assert np.isfinite(run_block(packed, x, context)).all()


def test_blocks_of_one_shape_compile_once(model, tokens):
  compiled, before_block = [], []
  listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None

  def block(index, block, x, context):
    before_block.append(len(compiled))
    search = awq.search_block(block, x, context, model.config, SETTINGS)
    return awq.quantize_block(block, search, model.config, FORMAT)

  rng = np.random.default_rng(0)
  noise = lambda leaf: jnp.asarray(leaf * np.exp(0.1 * rng.normal(size=leaf.shape)), leaf.dtype)
  graphdef, state = nnx.split(model.blocks[0])
  blocks = [nnx.merge(graphdef, jax.tree.map(noise, jax.device_get(state))) for _ in range(4)]
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    jax.jit(lambda x: x + 2)(np.zeros(3))
    assert compiled  # The listener hears.
    list(quantize_blocks(model, blocks, tokens, block, stream="full_precision"))
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert len(before_block) == 4 and len(compiled) == before_block[1], before_block


def test_better_than_rounding_where_channels_differ(model, tokens):
  """The model's point: the same function with a few large channels, which rounding does not see."""
  outliers = inject_outliers(model, jax.random.key(0), fraction=0.05, gain=30.0)
  expected = logits(model, tokens)
  bound = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(logits(outliers, tokens), expected, atol=bound)
  error = lambda new: np.mean((np.asarray(logits(new, tokens)) - expected) ** 2)
  searches = awq.search_model(outliers, tokens, SETTINGS)
  rounded = nnx.clone(outliers)
  rounded.blocks = nnx.List([rtn_block(block, FORMAT) for block in outliers.blocks])
  assert error(awq.apply_to_model(outliers, searches, FORMAT)) < 0.7 * error(rounded)


def test_every_block_needs_a_search(model, searches):
  with pytest.raises(ValueError):
    awq.apply_to_model(model, searches[:1], FORMAT)


def test_a_saved_search_gives_the_same_packed_model(model, searches, tmp_path):
  search_result.save(tmp_path / "s.safetensors", searches, SETTINGS)
  loaded, settings = search_result.load(tmp_path / "s.safetensors")
  assert settings == SETTINGS
  first = quantized_weights(awq.apply_to_model(model, searches, FORMAT))
  second = quantized_weights(awq.apply_to_model(model, loaded, settings.format))
  assert len(first) == 14
  for path, weight in first.items():
    values = [np.asarray(w.values).astype(int) for w in (weight, second[path])]
    np.testing.assert_array_equal(*values)
    np.testing.assert_array_equal(weight.scales, second[path].scales)


def test_packed_equals_fake_quantized(model, searches):
  block = awq.apply_search(model.blocks[0], searches[0], model.config)
  packed = awq.quantize_block(model.blocks[0], searches[0], model.config, FORMAT)
  for path, weight in quantized_weights(packed).items():
    kernel = awq.get_module(block, path).kernel[...]
    np.testing.assert_array_equal(weight.dequantize(), fake_quantize(kernel, FORMAT))


def test_salient_channels():
  score = np.float32([3.0, 9.0, 1.0, 7.0])
  channels = jax.jit(salient.salient_channels, static_argnums=1)
  np.testing.assert_array_equal(channels(score, 0.5), [False, True, False, True])
  assert np.sum(channels(score, 0.001)) == 1
  w, x = np.diag(np.float32([1, 2, 3, 4])), np.tile(np.float32([4, 3, 2, 1]), (3, 1))
  key, scores = jax.random.key(0), jax.jit(salient.channel_scores, static_argnums=2)
  assert np.argmax(scores(w, x, "activation", key)) == 0
  assert np.argmax(scores(w, x, "weight", key)) == 3


@pytest.mark.parametrize("criterion", ["activation", "weight", "random"])
def test_keep_salient_spares_the_chosen_channels(criterion, model, x, context):
  block, key = model.blocks[0], jax.random.key(7)
  keep = lambda key: salient.keep_salient(
    block, x, context, FORMAT, fraction=0.1, criterion=criterion, key=key
  )
  kept, inputs = keep(key), awq.block_inputs(block, x, context)
  for path, kernel in awq.get_kernels(block).items():
    new, kernel = np.asarray(awq.get_module(kept, path).kernel[...]), np.asarray(kernel)
    spared = (new == kernel).all(axis=1)
    assert spared.sum() == round(0.1 * kernel.shape[0])
    np.testing.assert_array_equal(new[~spared], np.asarray(fake_quantize(kernel, FORMAT))[~spared])
    score = {
      "activation": np.abs(inputs[path]).mean(axis=(0, 1)),
      "weight": np.linalg.norm(kernel, axis=1),
    }.get(criterion)
    if score is not None:
      assert score[spared].min() > score[~spared].max()
  if criterion == "random":
    other = keep(jax.random.key(8))
    assert any(
      not np.array_equal(awq.get_module(kept, p).kernel[...], awq.get_module(other, p).kernel[...])
      for p in awq.get_kernels(block)
    )


def test_scale_salient_multiplies_the_largest_channels_only(model, x, context):
  block, inputs = model.blocks[0], awq.block_inputs(model.blocks[0], x, context)
  scaled = salient.scale_salient(block, x, context, FORMAT, fraction=0.1, scale=2.0)
  plain = salient.scale_salient(block, x, context, FORMAT, fraction=0.1, scale=1.0)
  for path, kernel in awq.get_kernels(block).items():
    np.testing.assert_array_equal(
      awq.get_module(plain, path).kernel[...], fake_quantize(kernel, FORMAT)
    )
    magnitude = np.abs(inputs[path]).mean(axis=(0, 1))
    s = np.where(magnitude >= np.sort(magnitude)[-round(0.1 * len(magnitude))], 2, 1)[:, None]
    expected = np.asarray(fake_quantize(np.asarray(kernel) * s.astype(np.float32), FORMAT)) / s
    np.testing.assert_array_equal(awq.get_module(scaled, path).kernel[...], expected)


def test_tiny_run(tmp_path, monkeypatch):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  assert len(report.claims) == 8
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  rows = {row[0]: row for row in report.tables[0].rows}
  assert rows["AWQ"][5] == pytest.approx(3 + 19 / 32)
  assert all(np.isfinite(row[2]) for row in rows.values())
  assert (tmp_path / "search.safetensors").exists()
  # The same command after a kill.
  never = lambda *_, **__: pytest.fail("measured again")
  for module in (methods, experiment):
    monkeypatch.setattr(module, "quantize_model", never)
    monkeypatch.setattr(module, "search_model", never)
  assert experiment.run(config.get_config("tiny"), tmp_path) == report
