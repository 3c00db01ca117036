"""ZeroQuant-V2: DeepSpeed's quantizers, LoRC's closed forms, the four methods, and the tiny run."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.errors import UserError
from common.models.base import base_model
from common.models.surgery import get_module
from common.quantization import low_rank, rtn
from common.quantization.activations import ActivationFormat, QuantizedInput, quantize_inputs
from common.quantization.calibration import quantize_blocks, run_block
from common.quantization.gptq import gptq
from common.quantization.linear import QuantizedLinear, get_kernels, quantized_weights, set_kernels
from common.quantization.low_rank import CompensatedLinear
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings
from projects.zeroquant_v2 import (
  comparison,
  config,
  evaluation,
  experiment,
  lorc_study,
  sensitivity,
)
from projects.zeroquant_v2.zeroquant_v2 import (
  ZeroQuantSettings,
  compensate,
  distill,
  fake_quantize_weight,
  optimizer_of,
  quantize_block,
  quantize_weight,
  quantize_weights,
)

fake_quantize = jax.jit(fake_quantize_weight, static_argnums=(1, 2))
run = nnx.jit(lambda layer, x: layer(x))

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "zeroquant_v2"
# The tiny run's, so that its programs serve every test.
TINY = config.get_config("tiny")
FORMAT = IntegerFormat(2, scale_dtype=jnp.float16)
SETTINGS = ZeroQuantSettings(
  "RTN",
  FORMAT,
  activations=ActivationFormat(8),
  learning_rates=tuple(TINY.learning_rates),
  distillation=ReconstructionSettings(TINY.distillation_steps, TINY.distillation_batch_size),
)


@pytest.fixture(scope="module")
def base():
  return base_model("lm-tiny")


@pytest.fixture(scope="module")
def block(base):
  return base.model.blocks[0]


@pytest.fixture(scope="module")
def stem(base):
  """The first block's inputs on calibration text, and their context."""
  return base.model.stem(evaluation.calibration(TINY, base, 0))


@pytest.fixture(scope="module")
def error():
  return np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_deepspeed_quantizers(bits, symmetric):
  """Their groups are consecutive values of the flattened tensor: columns of inputs here."""
  format = IntegerFormat(bits, symmetric=symmetric)
  with np.load(GOLDEN / "deepspeed_group_quantizers.npz") as golden:
    tensor, name = golden["w"], f"{'sym' if symmetric else 'asym'}_b{bits}_g"
    columns = lambda x, groups: np.asarray(x).reshape(groups, -1).T
    weights = {groups: columns(tensor, groups) for groups in (1, 8, 16)}
    expected = {groups: columns(golden[f"{name}{groups}"], groups) for groups in weights}

  @jax.jit
  def both_rules(weights):
    rounded = {g: fake_quantize_weight(w, format, "deepspeed") for g, w in weights.items()}
    return rounded, {
      g: rtn.range_to_scales(*rtn.min_max_range(w, format), format)[0] for g, w in weights.items()
    }

  rounded, standard = both_rules(weights)
  for groups, w in weights.items():
    step = (np.abs(w).max(axis=0) * 2 if symmetric else np.ptp(w, axis=0)) / 2**bits
    # Their offset, of up to 256 steps, is added in floating point; a weight on a tie may go either
    # way.
    difference = np.abs(np.asarray(rounded[groups]) - expected[groups])
    assert (difference > 1e-4 * step).sum() <= 1 and (difference <= 1.001 * step).all()
    # The standard rule divides by one level less.
    levels = 2 ** (bits - 1) if symmetric else 2**bits
    found = np.asarray(standard[groups])[0] * (levels - 1) / levels
    np.testing.assert_allclose(found, step, rtol=1e-6)


@pytest.mark.parametrize("scale_rule", ["standard", "deepspeed"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_equals_fake_quantized(scale_rule, symmetric, error):
  format = IntegerFormat(3, 8, symmetric=symmetric, scale_dtype=jnp.float16)
  packed = jax.jit(lambda w: quantize_weight(w, format, scale_rule).dequantize())
  np.testing.assert_array_equal(packed(error), fake_quantize(error, format, scale_rule))


def test_a_block_as_long_as_the_row_is_a_row_and_smaller_blocks_round_better(error):
  w = np.float32(np.random.default_rng(1).normal(size=(64, 48)))
  rounded = lambda size: np.asarray(fake_quantize(w, IntegerFormat(3, size)))
  np.testing.assert_array_equal(rounded(64), rounded(-1))
  errors = [np.square(rounded(size) - w).mean() for size in (64, 32, 16, 8)]
  assert all(a > b for a, b in zip(errors, errors[1:]))


@pytest.mark.parametrize("factor", [0.125, 3.7])
def test_rounding_to_nearest_is_scale_equivariant(factor, error):
  rounded = lambda w: np.asarray(fake_quantize(w, IntegerFormat(4)))
  # A power of two exactly; otherwise a weight next to a tie may go either way.
  apart = ~np.isclose(rounded(np.float32(factor) * error), factor * rounded(error), rtol=1e-5)
  assert apart.mean() <= (0 if factor == 0.125 else 0.01)


def test_gptq_with_an_identity_hessian_is_rounding_to_nearest():
  # Every column has weights of both signs, so that the ranges agree.
  w = np.float32(np.random.default_rng(0).normal(size=(64, 64)))
  identity = np.eye(64, dtype=np.float32)
  found = gptq(w, identity, FORMAT, damping=jnp.float32(0.01)).dequantize()
  np.testing.assert_array_equal(found, fake_quantize(w, FORMAT))


def test_the_learning_rate_as_a_factor_is_adam_with_that_rate():
  """Against Adam on the weights themselves: the units of `change` do not matter."""
  target, rate, steps = np.linspace(-1, 1, 6, dtype=np.float32), 1e-2, 5
  loss = lambda w: jnp.sum((w - target) ** 4)

  def descend(optimizer, function):
    w = jnp.zeros(6)
    state = optimizer.init(w)
    for _ in range(steps):
      updates, state = optimizer.update(jax.grad(function)(w), state)
      w = w + updates
    return w

  @jax.jit
  def both():
    plain = descend(optax.adam(optax.linear_schedule(rate, 0.0, steps), eps=1e-12 / rate), loss)
    return plain, rate * descend(optimizer_of(steps), lambda change: loss(rate * change))

  plain, scaled = both()
  np.testing.assert_allclose(scaled, plain, rtol=1e-5)


@pytest.mark.parametrize("method", ["ZQ-Local", "ZQ-Global"])
def test_distillation_without_steps_is_rounding_to_nearest(method, block, stem):
  # A rate of 0 takes the steps' program and leaves the weights where they are.
  settings = dataclasses.replace(SETTINGS, method=method, learning_rates=(0.0, 0.0))
  found = quantize_weights(0, block, *stem, jax.random.key(0), settings)
  for path, kernel in get_kernels(block).items():
    np.testing.assert_array_equal(found[path].dequantize(), fake_quantize(kernel, FORMAT))


def test_distillation_keeps_the_best_rate_and_never_loses_to_rounding(block, stem):
  x, context = stem
  settings = dataclasses.replace(SETTINGS, method="ZQ-Global", learning_rates=(1e3, 1e-3))
  targets = run_block(block, x, context)
  weights, errors = distill(block, x, targets, context, jax.random.key(0), settings)
  rtn_error, huge, small = np.asarray(errors)
  # The huge rate ends above rounding to nearest, and counts as not run.
  assert small < 0.9 * rtn_error and huge == rtn_error
  changed = nnx.clone(block)
  set_kernels(changed, evaluation.dense_kernels(weights, {}))
  quantize_inputs(changed, list(weights), settings.activations)
  found = np.mean((np.asarray(run_block(changed, x, context)) - targets) ** 2)
  np.testing.assert_allclose(found, small, rtol=1e-3)  # Sums in other batches.


@pytest.mark.parametrize("method", ["RTN", "GPTQ", "ZQ-Local", "ZQ-Global"])
def test_a_block_at_a_time(method, base, block, stem):
  """Every linear packed, with its correction and its rounded input; rank 0 is the base method."""
  x, context = stem
  settings = dataclasses.replace(SETTINGS, method=method)
  key = jax.random.key(0)
  weights = quantize_weights(0, block, x, context, key, settings)
  quantize = lambda settings: quantize_block(0, block, x, context, key=key, settings=settings)
  plain, corrected = (quantize(dataclasses.replace(settings, rank=r)) for r in (0, 8))
  factors = compensate(get_kernels(block), weights, 8)
  for path, weight in weights.items():
    layer = get_module(plain, path)
    assert isinstance(layer, QuantizedInput) and isinstance(layer.layer, QuantizedLinear)
    np.testing.assert_array_equal(layer.layer.weight.get_value().dequantize(), weight.dequantize())
    layer = get_module(corrected, path).layer
    assert isinstance(layer, CompensatedLinear)
    if path not in ("attention.o_proj", "mlp.down_proj"):
      continue
    features = np.ones((3, weight.shape[0]), np.float32)
    features[0, 0] = -2
    correction = np.float32(factors[path].a) @ np.float32(factors[path].b)
    expected = features @ (np.asarray(weight.dequantize()) + correction)
    np.testing.assert_allclose(run(layer, features), expected, rtol=1e-4, atol=1e-4)
  assert len(quantized_weights(corrected)) == 7


def test_streaming_through_the_model(base):
  """A block is calibrated on the compensated outputs before it; a dense copy computes the same."""
  settings = dataclasses.replace(SETTINGS, activations=None, rank=8, factor_bits=8)
  seen, weights, factors = [], [], []

  def quantize(index, block, x, context):
    seen.append(x)
    weights.append(quantize_weights(index, block, x, context, None, settings))
    factors.append(compensate(get_kernels(block), weights[-1], 8, 8))
    return quantize_block(index, block, x, context, key=None, settings=settings)

  tokens = evaluation.calibration(TINY, base, 0)
  list(quantize_blocks(base.model, base.model.blocks, tokens, quantize, stream=settings.inputs))
  dense = evaluation.dense_model(base.model, weights, factors)
  context = base.model.stem(tokens)[1]
  # (x A) B against x (A B), in float32.
  np.testing.assert_allclose(seen[1], run_block(dense.blocks[0], seen[0], context), atol=1e-4)


def test_rank_zero_and_full_rank(base):
  """The base method bit for bit, and the original weights."""
  kernels = get_kernels(base.model.blocks[0])
  weights = quantize_weights(0, base.model.blocks[0], None, None, None, SETTINGS)
  plain = evaluation.dense_kernels(weights, {})
  none = evaluation.dense_kernels(weights, compensate(kernels, weights, 0))
  for path in kernels:
    np.testing.assert_array_equal(none[path], plain[path])
  original, rounded = np.asarray(kernels["mlp.up_proj"]), np.asarray(plain["mlp.up_proj"])
  full = jax.jit(lambda error: low_rank.low_rank(error, 64).product())(original - rounded)
  # float32 SVD.
  np.testing.assert_allclose(rounded + full, original, atol=1e-5)


@pytest.mark.parametrize(
  "rise, expected", [(-0.3, "Class-1"), (0.1, "Class-1"), (0.2, "Class-2"), (0.51, "Class-3")]
)
def test_degradation_classes(rise, expected):
  assert evaluation.degradation_class(rise) == expected


def test_the_mean_of_perplexities_is_not_that_of_losses(base):
  windows = {name: np.zeros((count, 3), np.int32) for name, count in (("a", 1), ("b", 3))}
  losses = evaluation.WindowLosses(np.array([2.0, 4.0, 4.0, 4.0]), 2)
  found = evaluation.Evaluation(windows, 1).mean_perplexity(losses)
  assert found == pytest.approx((np.exp(1) + np.exp(2)) / 2)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"method": "OBQ"}, "method='OBQ' is not supported; supported: RTN, GPTQ, ZQ-Local, ZQ-Global"),
    ({"scale_rule": "v1"}, "scale_rule='v1' is not supported; supported: standard, deepspeed"),
    ({"inputs": "fp"}, "inputs='fp' is not supported; supported: quantized, full_precision"),
    ({"factor_bits": 4}, "factor_bits=4 is not supported; supported: 8, 16"),
    ({"method": "GPTQ", "scale_rule": "deepspeed"}, "GPTQ has scale_rule='standard' only"),
    ({"method": "ZQ-Local", "learning_rates": ()}, "needs at least one learning rate"),
    ({"format": IntegerFormat(4, axis=1)}, "is not grouped along the input; use axis=0"),
  ],
)
def test_unsuitable_settings_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SETTINGS, **changes)


def test_unsuitable_blocks_are_refused(block, stem):
  quantize = lambda block, **changes: quantize_weights(
    0, block, *stem, jax.random.key(0), dataclasses.replace(SETTINGS, **changes)
  )
  with pytest.raises(UserError, match=r"rank=65 of a weight \(64, 64\); expected 0 to 64"):
    quantize(block, rank=65)
  with pytest.raises(UserError, match="group_size=48 does not divide the input dimension"):
    quantize(block, format=IntegerFormat(2, 48))
  broken = nnx.clone(block)
  broken.mlp.up_proj.kernel[...] = broken.mlp.up_proj.kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(UserError, match="mlp.up_proj.kernel: NaN or infinite values"):
    quantize(broken)
  packed = quantize_block(0, block, *stem, key=None, settings=SETTINGS)
  with pytest.raises(UserError, match="no full-precision linears"):
    quantize(packed)
  renamed = nnx.clone(block)
  renamed.mlp.extra_proj = nnx.data(renamed.mlp.up_proj)
  with pytest.raises(UserError, match="GPTQ does not know the linears mlp.extra_proj"):
    quantize(renamed, method="GPTQ")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"method_settings": (("4bit", -1),)}, "setting '4bit' is not of the form W4A8"),
    ({"method_models": ("lm-small",)}, "method_models has lm-small, which models lacks"),
    ({"symmetric_sensitivity": ("W5A16",)}, "symmetric_sensitivity has W5A16, which sensitivity"),
    ({"group_sizes": (48,)}, "lm-tiny: attention.k_proj: group_size=48 does not divide"),
    ({"ranks": (0, 65)}, "lm-tiny: ranks=.* at most 64"),
    ({"eval_length": 4096}, "lm-tiny: 4096 tokens; at most 1024"),
    ({"scale_rule": "deepspeed"}, "GPTQ has scale_rule='standard' only"),
  ],
)
def test_an_unsuitable_config_is_refused_before_any_work(changes, message, tmp_path, monkeypatch):
  monkeypatch.setattr(experiment, "sensitivity_study", lambda *_: pytest.fail("work was done"))
  changed = config.get_config("tiny")
  with changed.unlocked():
    changed.update(changes)
  with pytest.raises(UserError, match=message):
    experiment.run(changed, tmp_path)


def test_tiny_run(tmp_path, monkeypatch):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  titles = [table.title.split(",")[0] for table in report.tables]
  assert titles[:3] == ["Sensitivity", "Sensitivity", "Methods"]
  methods = report.tables[2].rows
  assert [row[2] for row in methods] == ["full precision", "RTN", "GPTQ", "ZQ-Local", "ZQ-Global"]
  assert all(np.isfinite(value) for row in methods for value in (row[3], row[4], row[6]))
  # The same weights in two tables: rounding to nearest, with and without the correction.
  assert all(np.isfinite(claim.mean) for claim in report.claims)
  # The same command after a kill: what was measured is neither quantized nor scored again.
  never = lambda *_, **__: pytest.fail("measured again")
  for module in (sensitivity, comparison, lorc_study):
    monkeypatch.setattr(module, "quantize_model_weights", never)
  monkeypatch.setattr(sensitivity, "inject_outliers", never)
  monkeypatch.setattr(evaluation, "window_losses", never)
  assert experiment.run(config.get_config("tiny"), tmp_path) == report
