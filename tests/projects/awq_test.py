"""AWQ: vectors of the reference code, invariants, and the tiny run."""

import dataclasses
import pathlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.base import base_model
from common.models.decoder import make_context
from common.models.outliers import inject_outliers
from common.quantization import awq, rtn
from common.quantization.calibration import quantize_blocks, rtn_block, run_block
from common.quantization.linear import quantized_weights
from common.quantization.quantized_array import IntegerFormat
from projects.awq import config, experiment, methods, salient, search_result
from tests.common.models.small_decoders import ARCHITECTURES, logits, random_decoder, random_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "awq"
# The tiny preset's model, tokens and settings: the tests share its compiled programs.
TINY = config.get_config("tiny")
FORMAT = methods.integer_format(TINY, TINY.bits)
SETTINGS = methods.awq_settings(TINY, FORMAT)
search_clip = jax.jit(awq.search_clip, static_argnums=2)
fake_quantize = jax.jit(rtn.fake_quantize, static_argnums=1)


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
    limits = search_clip(jnp.asarray(golden["w"]).T, jnp.asarray(golden["x"]), settings)
    np.testing.assert_array_equal(limits.T, golden[f"best_max_b{bits}_g{group_size}"][..., 0])


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


def scale_search_with_losses(losses):
  """The scale and the losses found when the exponents' losses are the given ones."""
  settings = awq.AWQSettings(IntegerFormat(3), scale_grid=len(losses))
  s_x, table = jnp.arange(1.0, 9.0), jnp.asarray(losses, jnp.float32)
  w = jax.random.normal(jax.random.key(0), (8, 4))
  # Rounded weights give their exponent away.
  scales = jnp.stack([awq.channel_scale(s_x, i / len(losses)) for i in range(len(losses))])
  rounded = jnp.stack([awq.scaled_fake_quantize(w, s, settings.format) for s in scales])

  def forward(kernels):
    return table[jnp.abs(rounded - kernels["w"]).sum(axis=(1, 2)).argmin()]

  scale, found = awq.search_scale(forward, {"w": w}, s_x, settings)
  np.testing.assert_array_equal(found, table)
  return int(jnp.argmin(jnp.abs(scales - scale).sum(axis=1)))


def test_the_first_of_equal_losses_wins_and_nan_never():
  assert scale_search_with_losses([3.0, 1.0, 2.0, 1.0]) == 1
  assert scale_search_with_losses([2.0, 2.0, 2.0, 2.0]) == 0
  assert scale_search_with_losses([3.0, np.nan, 2.0, np.inf]) == 2
  assert scale_search_with_losses([np.nan] * 4) == 0


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
  w, x = jax.random.normal(keys[0], (64, 6)), jax.random.normal(keys[1], (100, 64))
  limits = search_clip(w, x, SETTINGS)
  largest = jnp.abs(w.reshape(2, 32, 6)).max(axis=1)
  assert ((limits >= 0.55 * largest * (1 - 1e-6)) & (limits <= largest)).all()

  def group_errors(w_new):
    error = (fake_quantize(w_new, FORMAT) - w).reshape(2, 32, 6)
    return jnp.mean(jnp.einsum("tgi,gio->tgo", x.reshape(100, 2, 32), error) ** 2, axis=0)

  clipped, plain = group_errors(awq.clamp(w, limits)), group_errors(w)
  assert (clipped <= plain * (1 + 1e-5)).all() and (clipped < 0.99 * plain).any()


def clip_oracle(w, x, format, clip_grid=20, max_shrink=0.5):
  """The published search in float64: partial products of every token, one candidate at a time."""
  groups = format.num_groups(w.shape)[0]
  w64, x64 = np.asarray(w, np.float64), np.asarray(x, np.float64).reshape(-1, w.shape[0])
  largest = np.abs(w64.reshape(groups, -1, w.shape[1])).max(axis=1)
  losses = []
  for i in range(int(max_shrink * clip_grid)):
    limit = np.repeat(largest * (1 - i / clip_grid), w.shape[0] // groups, axis=0)
    clipped = jnp.asarray(np.clip(w64, -limit, limit), jnp.float32)
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
  keys = jax.random.split(jax.random.key(2), 2)
  w, x = jax.random.normal(keys[0], (32, 16)), jax.random.normal(keys[1], (tokens, 32))
  format = IntegerFormat(3, group_size)
  used = x[:: max(1, tokens // 512)]
  assert len(used) == {100: 100, 511: 511, 1300: 650}[tokens]
  expected, losses = clip_oracle(w, used, format)
  assert len(np.unique(losses.argmin(axis=0))) > 2  # A search whose answers differ.
  assert_clips_equal(search_clip(w, x.reshape(1, tokens, 32), awq.AWQSettings(format)), expected)


def test_clip_grid_and_largest_shrink():
  keys = jax.random.split(jax.random.key(2), 2)
  w, x = jax.random.normal(keys[0], (32, 16)), jax.random.normal(keys[1], (100, 32))
  # Each group's largest weights meet inputs of almost 0: a small range costs nothing.
  w, x = w.at[::16].multiply(8.0), x.at[:, ::16].multiply(1e-3)
  settings = awq.AWQSettings(IntegerFormat(2, 16), clip_grid=10, max_shrink=0.8)
  expected, _ = clip_oracle(w, x, settings.format, 10, 0.8)
  limits = search_clip(w, x, settings)
  assert_clips_equal(limits, expected)
  largest = jnp.abs(w.reshape(2, 16, 16)).max(axis=1)
  assert float((limits / largest).min()) < 0.5


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
  if architecture != "llama":  # The tiny preset's model is one.
    model = random_decoder(ARCHITECTURES[architecture])
    tokens = jnp.asarray(random_tokens(model.config, 8, 16))
  settings = dataclasses.replace(SETTINGS, mse_range=False)
  scaled = nnx.clone(model)
  scaled.blocks = nnx.List(
    [
      awq.apply_search(b, s, model.config)
      for b, s in zip(model.blocks, awq.search_model(model, tokens, settings))
    ]
  )
  expected = logits(model, tokens)
  # Scales of 0.1 to 10 reorder float32 sums; the bar is 1e-4 of the logits.
  np.testing.assert_allclose(
    logits(scaled, tokens), expected, atol=1e-4 * float(abs(expected).max())
  )


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
    s_x = jnp.abs(features).mean(axis=(0, 1))
    for i in (0, int(losses.argmin()), 19):
      changed = nnx.clone(block)
      s = awq.channel_scale(s_x, i / 20)
      for path in group.linears:
        linear = awq.get_module(changed, path)
        linear.kernel[...] = fake_quantize(linear.kernel[...] * s[:, None], FORMAT) / s[:, None]
      expected = jnp.mean((output(changed, group) - output(block, group)) ** 2)
      # Float32 sums in another order; and a weight on a tie may take the other of two codes.
      np.testing.assert_allclose(losses[i], expected, rtol=2e-3, err_msg=f"{group.previous} {i}")
    best = awq.channel_scale(s_x, int(losses.argmin()) / 20)
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
      features = inputs[path] / search.scales[group.previous]
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
    magnitude = np.abs(np.asarray(inputs[group.linears[0]], np.float64)).reshape(8 * 64, -1)
    s = np.sqrt(magnitude.mean(axis=0) if stat == "mean" else magnitude.max(axis=0))
    s = s / np.sqrt(s.max() * s.min())
    np.testing.assert_allclose(search.scales[group.previous], s, rtol=1e-4)


def test_unsuitable_settings_are_refused():
  for axis in (1, None):
    with pytest.raises(UserError, match="grouped along the input"):
      awq.AWQSettings(IntegerFormat(4, -1, axis))
  with pytest.raises(UserError, match="scale_stat='median' is not supported; supported: mean, max"):
    awq.AWQSettings(FORMAT, scale_stat="median")


def test_dead_and_huge_channels(model, x, context):
  """An input channel that is always 0 beside one that is large: everything stays finite."""
  block = nnx.clone(model.blocks[0])
  gain = block.attention_norm.scale
  gain[...] = gain[...].at[3].set(0.0).at[5].set(1e4)
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

  blocks = [random_decoder(model.config, seed).blocks[0] for seed in range(4)]
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    jax.jit(lambda x: x + 2)(jnp.zeros(3))
    assert compiled  # The listener hears.
    list(quantize_blocks(model, blocks, tokens, block, stream="full_precision"))
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert len(before_block) == 4 and len(compiled) == before_block[1], before_block


def test_better_than_rounding_where_channels_differ(model, tokens):
  """The model's point: the same function with a few large channels, which rounding does not see."""
  outliers = inject_outliers(model, jax.random.key(0), fraction=0.05, gain=30.0)
  expected = logits(model, tokens)
  np.testing.assert_allclose(
    logits(outliers, tokens), expected, atol=1e-4 * float(abs(expected).max())
  )
  error = lambda new: float(jnp.mean((logits(new, tokens) - expected) ** 2))
  searches = awq.search_model(outliers, tokens, SETTINGS)
  rounded = nnx.clone(outliers)
  rounded.blocks = nnx.List([rtn_block(block, FORMAT) for block in outliers.blocks])
  assert error(awq.apply_to_model(outliers, searches, FORMAT)) < 0.7 * error(rounded)


def changed_search(searches, **changes):
  """The first block's search with entries added or replaced, {scale or clip: {name: value}}."""
  return awq.BlockSearch(
    searches[0].scales | changes.get("scales", {}), searches[0].clips | changes.get("clips", {})
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"scales": {"mlp.activation": jnp.ones(128)}}, r"scale of mlp.activation, \(128,\), is not"),
    ({"scales": {"mlp_norm": jnp.ones(128)}}, r"scale of mlp_norm, \(128,\), is not of this model"),
    ({"clips": {"mlp.fc1": jnp.ones((2, 128))}}, r"clip of mlp.fc1, \(2, 128\), is not of this"),
    ({"clips": {"mlp.up_proj": jnp.ones((2, 48))}}, r"clip of mlp.up_proj, \(2, 48\), is not of"),
    ({"clips": {"mlp.up_proj": jnp.ones((3, 128))}}, r"clip of mlp.up_proj, \(3, 128\), is not of"),
    ({"clips": {"mlp.up_proj": jnp.ones((0, 128))}}, r"clip of mlp.up_proj, \(0, 128\), is not of"),
  ],
)
def test_a_search_of_another_model_is_refused(changes, message, model, searches):
  with pytest.raises(UserError, match=message):
    awq.apply_search(model.blocks[0], changed_search(searches, **changes), model.config)


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
    np.testing.assert_array_equal(weight.values.astype(int), second[path].values.astype(int))
    np.testing.assert_array_equal(weight.scales, second[path].scales)


def test_packed_equals_fake_quantized(model, searches):
  block = awq.apply_search(model.blocks[0], searches[0], model.config)
  packed = awq.quantize_block(model.blocks[0], searches[0], model.config, FORMAT)
  for path, weight in quantized_weights(packed).items():
    kernel = awq.get_module(block, path).kernel[...]
    np.testing.assert_array_equal(weight.dequantize(), fake_quantize(kernel, FORMAT))


def test_salient_channels():
  score = jnp.array([3.0, 9.0, 1.0, 7.0])
  np.testing.assert_array_equal(salient.salient_channels(score, 0.5), [False, True, False, True])
  assert int(salient.salient_channels(score, 0.001).sum()) == 1
  w, x = jnp.eye(4) * jnp.arange(1.0, 5.0)[:, None], jnp.ones((3, 4)) * jnp.array([4.0, 3, 2, 1])
  key = jax.random.key(0)
  assert int(jnp.argmax(salient.channel_scores(w, x, "activation", key))) == 0
  assert int(jnp.argmax(salient.channel_scores(w, x, "weight", key))) == 3


@pytest.mark.parametrize("criterion", ["activation", "weight", "random"])
def test_keep_salient_spares_the_chosen_channels(criterion, model, x, context):
  block, key = model.blocks[0], jax.random.key(7)
  keep = lambda key: salient.keep_salient(
    block, x, context, FORMAT, fraction=0.1, criterion=criterion, key=key
  )
  kept, inputs = keep(key), awq.block_inputs(block, x, context)
  for path, kernel in awq.get_kernels(block).items():
    new = awq.get_module(kept, path).kernel[...]
    spared = np.asarray((new == kernel).all(axis=1))
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
    expected = fake_quantize(kernel * s, FORMAT) / s
    np.testing.assert_array_equal(awq.get_module(scaled, path).kernel[...], expected)


def test_tiny_run(tmp_path):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  assert len(report.claims) == 8
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  rows = {row[0]: row for row in report.tables[0].rows}
  assert rows["AWQ"][5] == pytest.approx(3 + 19 / 32)
  assert all(np.isfinite(row[2]) for row in rows.values())
  assert (tmp_path / "search.safetensors").exists()
