"""Outlier Suppression+: invariants, bad input, and the tiny run."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apps import parity
from common.checkpoints.huggingface import Checkpoint
from common.errors import UserError
from common.models.decoder import Decoder, make_context
from common.models.encoder import Encoder, EncoderConfig
from common.models.outliers import inject_outliers
from common.models.surgery import get_module
from common.quantization.activations import ActivationFormat, QuantizedInput
from common.quantization.attention import QuantizedAttention
from common.quantization.calibration import quantize_blocks
from common.quantization.linear import QuantizedLinear
from common.quantization.quantized_array import IntegerFormat
from common.quantization.shift_and_scale import (
  channel_range,
  quantization_loss,
  threshold_scale,
)
from projects.outlier_suppression_plus import config as osp_config
from projects.outlier_suppression_plus import experiment, methods
from projects.outlier_suppression_plus import outlier_suppression_plus as osp
from projects.outlier_suppression_plus.methods import main_methods, settings_of
from projects.outlier_suppression_plus.observation import observed_range, operands, stage_inputs
from projects.outlier_suppression_plus.outlier_suppression import (
  clipping_quantiles,
  least_loss,
  token_wise_range,
)
from projects.outlier_suppression_plus.post_norm import PostNormBlock
from projects.outlier_suppression_plus.sites import ShiftAndScale, sites, takes_shift
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_encoder_decoder,
  random_module,
  random_tokens,
)

TESTS = pathlib.Path(__file__).parents[1]
CHECKPOINTS = TESTS / "golden" / "hf_checkpoints"

STATIC = osp.Settings(
  IntegerFormat(6), ActivationFormat(6, "per_tensor"), lower_fraction=0.01, search_samples=4
)


def test_search_against_every_threshold_on_one_head():
  one_head = dataclasses.replace(ARCHITECTURES["opt"], num_heads=1, num_kv_heads=1, head_dim=32)
  block = random_decoder(dataclasses.replace(one_head, num_layers=1)).blocks[0]
  positions = np.arange(12, dtype=np.int32)[None]
  context = make_context(one_head, jnp.asarray(positions), jnp.ones_like(positions))[0]
  x = np.random.default_rng(0).normal(size=(2, 12, 32)).astype(np.float32)
  x[..., 3] *= 30.0
  low, high = jax.jit(channel_range)(x)
  site = sites(one_head)[0]
  graphdef, state = nnx.split(block.attention)
  formats = IntegerFormat(4), ActivationFormat(4)
  found = osp.search_site(
    graphdef, state, x, context, low, high, site, "output", *formats, 1.0, 1.0
  )
  largest = float(np.abs(x).max())
  count = max(100, int(largest / 0.5))
  assert count > 100  # The grid is as fine as the activations are large.
  thresholds = (largest - np.arange(count + 1) * ((largest - 1) / count)).astype(np.float32)

  @jax.jit
  def losses_of(thresholds):
    """The target, the loss of every threshold, and what the attention gives."""
    outputs, kernels = osp.site_outputs(graphdef, state, context, site, "output")
    target, mask = outputs(x, kernels), jnp.ones((2, 12, 1))
    loss = lambda t: quantization_loss(
      outputs, target, x, kernels, mask, threshold_scale(low, high, t), t, *formats
    )
    return target, jax.lax.map(loss, thresholds), nnx.merge(graphdef, state)(x, context)[0]

  target, losses, attended = jax.device_get(losses_of(thresholds))
  np.testing.assert_allclose(found.loss, losses.min(), rtol=1e-4)
  np.testing.assert_allclose(found.threshold, thresholds[losses.argmin()], rtol=1e-5)
  assert losses.min() < 0.9 * losses[0]
  # The target is what the attention gives to its output projection.
  o_proj = block.attention.o_proj
  by_hand = target @ np.asarray(o_proj.kernel[...]) + np.asarray(o_proj.bias[...])
  np.testing.assert_allclose(attended, by_hand, atol=1e-4)


FAMILIES = (
  "opt",
  "opt_post",
  "bloom6",
  "llama_gqa_tied",
  "qwen2",
  "gpt2",
  "gpt_neox",
  "bert_sequence",
  "roberta_masked_lm_left",
)


def any_shift_and_scale(model, seed=0):
  """Random shifts, where there is a place for them, and scales of every block."""
  rng, found = np.random.default_rng(seed), []
  config = osp.block_config(model)
  for block in model.blocks:
    wrapped = PostNormBlock(block) if config.norm_placement == "post" else block
    of_block = {}
    for site in sites(config):
      width = get_module(block, site.linears[0]).kernel.shape[0]
      shift = rng.normal(size=width) * takes_shift(wrapped, site)
      scale = np.exp(rng.normal(size=width))
      of_block[site.previous] = ShiftAndScale(*map(jnp.float32, (shift, scale)), None)
    found.append(of_block)
  return found


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_leaves_the_outputs_of_transformers(name):
  checkpoint = Checkpoint(CHECKPOINTS / name)
  reference = parity.read_reference(CHECKPOINTS / name / "reference.npz")
  model = checkpoint.load_model()
  found = any_shift_and_scale(model)
  folded = osp.fold_model(model, found)
  outputs = parity.run_model(folded, checkpoint.family.model, reference)
  assert parity.difference(outputs, reference) < 1e-4
  norm = folded.blocks[0].attention_norm
  assert not np.allclose(norm.scale[...], model.blocks[0].attention_norm.scale[...])
  shifts = np.abs(np.concatenate([f.shift for block in found for f in block.values()])).max()
  assert (shifts > 0) == (model.blocks[0].attention_norm.__class__ is nnx.LayerNorm)
  if osp.block_config(model).norm_placement == "post":
    # The norm of one block has taken the shift and the scale of the next.
    assert folded.blocks[1].input_folded
    before, after = (m.blocks[0].mlp_norm for m in (model, folded))
    site = found[1]["attention_input"]
    np.testing.assert_allclose(after.scale[...], before.scale[...] / site.scale, rtol=1e-5)
    # OPT-350M has no norm before its first block.
    assert folded.blocks[0].input_folded == (model.embed_norm is not None)


@pytest.fixture(scope="module")
def model():
  """OPT's architecture with asymmetric outliers."""
  natural = random_decoder(ARCHITECTURES["opt"])
  return inject_outliers(natural, jax.random.key(1), fraction=0.1, gain=10.0, shift=60.0)


@pytest.fixture(scope="module")
def tokens(model):
  return jnp.asarray(random_tokens(model.config, 4, 16))


@nnx.jit
def logits(model, tokens):
  return model(tokens)[0]


def error(model, quantized, tokens):
  return np.mean((np.asarray(logits(quantized, tokens)) - logits(model, tokens)) ** 2)


@pytest.fixture(scope="module")
def quantized(model, tokens):
  return osp.quantize(model, tokens, STATIC)


def test_quantized_model(model, tokens, quantized):
  quantized, found = quantized
  block = quantized.blocks[1]
  for path in ("attention.q_proj", "attention.o_proj", "mlp.up_proj", "mlp.down_proj"):
    layer = get_module(block, path)
    assert isinstance(layer, QuantizedInput) and isinstance(layer.layer, QuantizedLinear)
    assert float(layer.low[...]) < float(layer.high[...])
  plain = dataclasses.replace(STATIC, shift="none", scale="none")
  minmax, _ = osp.quantize(model, tokens, plain)
  assert error(model, quantized, tokens) < 0.1 * error(model, minmax, tokens)
  for of_block in found:
    assert set(of_block) == {"attention_norm", "mlp_norm"}
    for shift, scale, result in of_block.values():
      assert np.abs(shift).max() > 30 and float(scale.min()) >= 1
      assert float(result.loss) <= float(result.loss_unscaled)
  folded = osp.fold_model(model, found)
  np.testing.assert_allclose(logits(folded, tokens), logits(model, tokens), atol=1e-3)


def test_blocks_one_at_a_time_from_host_memory(model, tokens, quantized):
  block = functools.partial(osp.quantize_block, config=model.config, settings=STATIC)
  options = {"stream": "quantized", "sample_memory": "pinned_host"}
  blocks = quantize_blocks(model, iter(model.blocks), tokens, block, **options)
  for streamed, whole in zip(blocks, quantized[0].blocks, strict=True):
    a, b = (jax.tree.leaves(nnx.state(m)) for m in (streamed, whole))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


ENCODER = EncoderConfig(64, 16, 32, 2, 2, 32, head="sequence", labels=("no", "yes"), pooler=True)


@pytest.fixture(scope="module")
def encoder():
  return random_module(lambda: Encoder(ENCODER, rngs=nnx.Rngs(0)))


@nnx.jit
def hidden(model, tokens, segment_ids):
  return model(tokens, segment_ids=segment_ids).hidden


def test_padding_does_not_count(encoder):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 64, (3, 12)).astype(np.int32)
  segment_ids = (np.arange(12) < np.array([[12], [5], [7]])).astype(np.int32)
  other = np.where(segment_ids, tokens, rng.integers(1, 64, tokens.shape)).astype(np.int32)
  settings = dataclasses.replace(STATIC, quantize_bmm=True)
  assert (other != tokens).any()
  a, found = osp.quantize(
    encoder, jnp.asarray(tokens), settings, segment_ids=jnp.asarray(segment_ids)
  )
  b, _ = osp.quantize(encoder, jnp.asarray(other), settings, segment_ids=jnp.asarray(segment_ids))
  for x, y in zip(*(jax.tree.leaves(nnx.state(m)) for m in (a, b)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert all(set(of_block) == {"attention_input", "attention_norm"} for of_block in found)
  attend = a.blocks[0].attention.attend
  assert isinstance(attend, QuantizedAttention)
  low, high = attend.ranges["probabilities"][...]
  # Right-padded keys have no probability; nothing is above 1.
  assert float(low) == 0 and 0 < float(high) <= 1 + 1e-6
  full, rounded = hidden(encoder, tokens, segment_ids), hidden(a, tokens, segment_ids)
  change = np.mean(np.square(rounded - full)[segment_ids != 0])
  # Six bits: an error, but a small one.
  assert 0 < change < 0.05 * np.var(np.asarray(full)[segment_ids != 0])
  # Ranges are those of the real tokens alone.
  x, context = encoder.stem(jnp.asarray(tokens), jnp.asarray(segment_ids))
  real = np.asarray(x)[segment_ids != 0]
  middle = (real.max(axis=0) + real.min(axis=0)) / 2
  np.testing.assert_allclose(found[0]["attention_input"].shift, middle, atol=1e-6)


def test_two_values_of_a_sample_s_channels_give_the_ranges_of_all_tokens(encoder):
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(1, 64, (3, 12)), jnp.int32)
  segment_ids = jnp.asarray(np.arange(12) < np.array([[12], [5], [7]]), jnp.int32)
  x, context = encoder.stem(tokens, segment_ids)
  block = nnx.split(PostNormBlock(nnx.clone(encoder.blocks[0])))
  record = lambda all_tokens: stage_inputs(*block, x, context, "mlp.up_proj", 2, all_tokens)
  (first, tokens), (same, ends) = record(True), record(False)
  np.testing.assert_array_equal(first, same)
  np.testing.assert_array_equal(first[0], tokens[0])
  np.testing.assert_array_equal(first[1, :5], tokens[1, :5])
  np.testing.assert_array_equal(first[1, :5], tokens[1, 5:10])
  assert ends.shape == (3, 2, 16) and tokens.shape == (3, 12, 16)
  # A scale of each channel leaves the order of its values.
  shift, scale = (rng.normal(size=16).astype(np.float32) for _ in range(2))
  pairs = [[(v - shift) / np.exp(scale) for v in (tokens, ends)]]
  noted = [operands(*block, x, context, all_tokens) for all_tokens in (True, False)]
  pairs += [[found[name] for found in noted] for name in ("query", "probabilities")]
  for observer in ("min_max", "average_min_max"):
    for pair in pairs:
      of_tokens, of_ends = (
        observed_range(value, STATIC.activations, observer, 100.0) for value in pair
      )
      assert of_tokens == of_ends and of_tokens[0] < of_tokens[1]


def test_gamma_migration_and_token_wise_clipping(encoder):
  tokens = jnp.asarray(np.random.default_rng(0).integers(1, 64, (3, 12)), jnp.int32)
  settings = dataclasses.replace(STATIC, shift="none", scale="gamma", observer="token_wise")
  clipped = dataclasses.replace(settings, percentile=90.0)
  wide, narrow = (osp.quantize(encoder, tokens, s)[0] for s in (settings, clipped))
  for norm in (wide.embed_norm, wide.blocks[0].attention_norm, wide.blocks[0].mlp_norm):
    np.testing.assert_allclose(norm.scale[...], 1, rtol=1e-6)
  np.testing.assert_array_equal(
    wide.blocks[1].mlp_norm.scale[...], encoder.blocks[1].mlp_norm.scale[...]
  )
  limits = lambda m: m.blocks[0].attention.q_proj.high[...]
  assert float(limits(narrow)) < float(limits(wide))
  x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype(np.float32)
  low, high = token_wise_range(jnp.asarray(x), 0.9)
  np.testing.assert_allclose(high, np.quantile(x.max(axis=-1), 0.9), rtol=1e-5)
  np.testing.assert_allclose(low, np.quantile(x.min(axis=-1), 0.1), rtol=1e-5)


def test_a_hyper_parameter_is_chosen_by_its_loss():
  assert clipping_quantiles(2) == [1, 0.995, 0.99]
  table = {1.0: 3.0, 0.5: 1.0, 0.25: 1.0, 0.0: np.nan}
  assert least_loss(table, lambda q: q, table.get) == (0.5, 0.5)
  assert least_loss([0.0], lambda q: q, table.get) == (0.0, 0.0)


def test_settings_of_the_paper():
  config = osp_config.get_config("tiny")
  eight = settings_of(config, "W8A8")
  assert eight.weights.axis is None and eight.weights.symmetric and eight.activations.symmetric
  assert eight.quantize_bmm and eight.activations.granularity == "per_tensor"
  six = settings_of(config, "W6A6")
  assert six.weights.axis == 0 and not six.weights.symmetric and not six.activations.symmetric
  group = settings_of(config, "W4A4 per group")
  assert group.weights.group_size == group.activations.group_size == 32
  assert not group.quantize_bmm
  static = main_methods(config, six, {}, None)
  assert {"MinMax", "percentile", "SmoothQuant", "Outlier Suppression", "OS+"} <= set(static)


@pytest.mark.parametrize(
  "wrong, message",
  [
    (lambda: settings_of(osp_config.get_config(), "W5A5"), "settings='W5A5'"),
    (lambda: dataclasses.replace(STATIC, shift="centre"), "shift='centre'"),
    (lambda: dataclasses.replace(STATIC, objective="mse"), "objective='mse'"),
    (lambda: dataclasses.replace(STATIC, search_samples=0), "search_samples=0"),
    (lambda: osp.check_model(random_encoder_decoder(), STATIC), "EncoderDecoder; supported"),
    (
      lambda: sites(dataclasses.replace(ARCHITECTURES["llama"], norm_placement="post")),
      "norm='rms', gated_mlp=True are not supported",
    ),
  ],
)
def test_what_is_not_supported_is_named(wrong, message):
  with pytest.raises(UserError, match=message):
    wrong()


def test_bad_weights_activations_and_sizes(model, tokens):
  broken = nnx.clone(model)
  kernel = np.array(broken.blocks[1].mlp.up_proj.kernel[...])
  kernel[2, 3] = np.nan
  broken.blocks[1].mlp.up_proj.kernel[...] = jnp.asarray(kernel)
  with pytest.raises(UserError, match="blocks.1.mlp.up_proj.kernel.*NaN"):
    osp.quantize(broken, tokens, STATIC)
  x, context = model.stem(tokens)
  with pytest.raises(UserError, match="calibration activations"):
    infinite = jnp.full_like(x, jnp.inf)
    osp.calibrate_block(model.blocks[0], infinite, context, model.config, STATIC)
  for change, message in (
    ({"weights": IntegerFormat(4, 24)}, "group_size=24"),
    ({"activations": ActivationFormat(4, "per_token", 24)}, "group_size=24 of activations"),
  ):
    with pytest.raises(UserError, match=f"attention.*: {message}"):
      osp.quantize(model, tokens, dataclasses.replace(STATIC, **change))


def test_tiny_run(tmp_path, monkeypatch):
  report = experiment.run(osp_config.get_config("tiny"), tmp_path)
  tables = {table.title.split(",")[0]: table for table in report.tables}
  names = [row[0] for row in tables["W4A4 per token"].rows]
  assert names[0] == "full precision" and {"ZeroQuant", "SmoothQuant", "OS+"} < set(names)
  (_, original), (_, loaded) = tables["The folded full-precision checkpoint"].rows
  np.testing.assert_allclose(loaded, original, rtol=1e-4)
  ranges = {row[0]: row[1:] for row in tables["Ranges of activations (max - min)"].rows}
  assert set(ranges) == {"q_proj + k_proj + v_proj", "gate_proj + up_proj", "down_proj"}
  for tensor, shifted, _, scaled, _, count in ranges.values():
    # RMSNorm takes no shift; scales are at least 1.
    assert shifted == tensor and count > 0 and scaled < tensor
  assert all((tmp_path / figure.path).stat().st_size > 5000 for figure in report.figures)
  assert isinstance(Checkpoint(tmp_path / "folded").load_model(), Decoder)
  # The same command after a kill: of the methods, none quantizes again.
  monkeypatch.setattr(methods, "quantize", lambda *_, **__: pytest.fail("measured again"))
  assert experiment.run(osp_config.get_config("tiny"), tmp_path) == report
