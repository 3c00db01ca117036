"""AdaDim: vectors of the official code, invariants, bad input, and the tiny run."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.base import base_model
from common.models.outliers import inject_outliers
from common.quantization import rtn
from common.quantization.calibration import block_inputs, quantize_blocks
from common.quantization.gptq import gptq, hessian
from common.quantization.linear import get_kernels, quantized_weights
from common.quantization.quantized_array import IntegerFormat
from projects.adadim import adadim, config, experiment, methods, sensitivity, tasks
from projects.adadim.adadim import PER_IC, PER_OC, AdaDimSettings, along
from projects.adadim.gptq_per_ic import gptq_per_ic
from tests.common.models.small_decoders import ARCHITECTURES, logits, random_decoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "adadim" / "rtn_and_gptq_axes.npz"
TINY = config.get_config("tiny")
# Of the tests of one layer, and of the tests on the tiny preset's model.
FORMAT = IntegerFormat(3, 16)
BLOCK_FORMAT = IntegerFormat(3, 32, scale_dtype=jnp.float16)
IC3 = IntegerFormat(3, 16, PER_IC)
fake_quantize = jax.jit(rtn.fake_quantize, static_argnums=1)
quantize = jax.jit(rtn.quantize, static_argnums=1)
axis_candidates = jax.jit(adadim.axis_candidates, static_argnums=1)
dequantize = jax.jit(lambda weight: weight.dequantize())
jit_hessian = jax.jit(hessian)
output_error = jax.jit(adadim.output_error)


def dequantized(weight):
  return np.asarray(dequantize(weight))


@nnx.jit
def run_module(module, x):
  return module(x)


@nnx.jit
def run_attention(module, x, context):
  return module(x, context)[0]


# The tiny preset's model, tokens and formats: the tests share its compiled programs.
@pytest.fixture(scope="module")
def base():
  return base_model(TINY.model)


@pytest.fixture(scope="module")
def model(base):
  return base.model


@pytest.fixture(scope="module")
def tokens(base):
  return methods.calibration(TINY, base, TINY.calibration, 0)


@pytest.fixture(scope="module")
def stem(model, tokens):
  """The first block's inputs and context."""
  return model.stem(tokens)


@pytest.fixture(scope="module")
def layer():
  """Weights [in, out] and their Hessian, with the shapes of the golden vectors."""
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(200, 32)) @ rng.normal(size=(32, 32))).astype(np.float32)
  return rng.normal(size=(32, 64)).astype(np.float32), jit_hessian(x)


@pytest.mark.parametrize("bits", [3, 4])
def test_quantizers_of_the_official_code(bits):
  with np.load(GOLDEN) as golden:
    w, h = golden["weight"].T, golden["H"]
    rounded = np.asarray(axis_candidates(w, IntegerFormat(bits, 16)))
    for axis in (PER_OC, PER_IC):
      np.testing.assert_array_equal(rounded[axis].T, golden[f"rtn_b{bits}_ic{axis}"])
    # Values below 1 in another order of float32 operations.
    oc = gptq(w, h, IntegerFormat(bits, 16, PER_OC), act_order=True)
    np.testing.assert_allclose(dequantized(oc).T, golden[f"gptq_oc_b{bits}"], atol=2e-6)
    ic = gptq_per_ic(w, h, IntegerFormat(bits, 16, PER_IC))
    np.testing.assert_allclose(dequantized(ic).T, golden[f"gptq_ic_b{bits}"], atol=2e-6)


def test_per_ic_is_per_oc_of_the_transpose(layer):
  w, _ = layer
  oc, ic = (np.asarray(axis_candidates(k, FORMAT))[i] for k, i in ((w, PER_OC), (w.T, PER_IC)))
  np.testing.assert_array_equal(ic.T, oc)
  packed = [quantize(w, along(FORMAT, axis)) for axis in (PER_OC, PER_IC)]
  assert packed[0].scales.shape == (2, 64) and packed[1].scales.shape == (32, 4)
  assert packed[0].scales.size == packed[1].scales.size
  assert packed[0].bits_per_weight() == packed[1].bits_per_weight()


def test_an_outlier_channel_is_alone_in_its_groups(layer):
  w, _ = layer
  others = np.arange(32) != 5
  outlier = np.where(others, 1, 1000).astype(np.float32)[:, None]
  before, after = (np.asarray(axis_candidates(k, FORMAT)) for k in (w, w * outlier))
  np.testing.assert_array_equal(after[PER_IC][others], before[PER_IC][others])
  assert (after[PER_OC][:16][others[:16]] != before[PER_OC][:16][others[:16]]).mean() > 0.5


def replaced(block, kernels):
  """A copy of the block with some kernels."""
  block = nnx.clone(block)
  for path, kernel in kernels.items():
    adadim.get_module(block, path).kernel[...] = kernel
  return block


@pytest.mark.parametrize("reference", ["fp", "code"])
def test_axis_errors_by_brute_force(reference, model, stem):
  """Of the whole attention for q, k, v, of the MLP for gate and up; and the chosen axes."""
  block, (x, context) = model.blocks[0], stem
  inputs, kernels = block_inputs(block, x, context), get_kernels(block)
  errors = adadim.axis_errors(block, x, context, BLOCK_FORMAT, reference=reference)
  axes = adadim.choose_axes(errors)
  siblings = {}

  def output(changed, path):
    name = adadim.INSPECTED_MODULE.get(path, path)
    module = adadim.get_module(replaced(block, changed), name)
    x = inputs[path]
    y = run_attention(module, x, context) if name == "attention" else run_module(module, x)
    return np.asarray(y, np.float64)

  assert set(errors) == set(kernels)
  for path in adadim.module_order(kernels):
    target, expected = output(siblings, path), []
    for axis in (PER_OC, PER_IC):
      candidate = fake_quantize(kernels[path], along(BLOCK_FORMAT, axis))
      new = output(siblings | {path: candidate}, path)
      expected.append(np.mean((new - target) ** 2))
    # Float32 sums in another order; a weight on a tie may take the other of two codes.
    np.testing.assert_allclose(errors[path], expected, rtol=2e-3, err_msg=path)
    assert axes[path] == int(expected[1] < expected[0])
    if reference == "code":
      siblings[path] = fake_quantize(kernels[path], along(BLOCK_FORMAT, axes[path]))
  assert len(set(axes.values())) == 2  # The test sees either outcome.


def test_equal_errors_choose_per_oc():
  errors = {"a": np.array([1.0, 1.0]), "b": np.array([1.0, 0.9]), "c": np.array([0.9, 1.0])}
  assert adadim.choose_axes(errors) == {"a": PER_OC, "b": PER_IC, "c": PER_OC}


def test_padding_does_not_count(model, tokens):
  """Samples with padding behind: its tokens change nothing, nor does it dilute the mean."""
  real = 3 * tokens.shape[1] // 4
  segments = np.broadcast_to((np.arange(tokens.shape[1]) < real).astype(np.int32), tokens.shape)

  def padded(padding):
    return model.stem(jnp.asarray(np.where(segments, tokens, padding)), jnp.asarray(segments))

  errors = [adadim.axis_errors(model.blocks[0], *padded(token), BLOCK_FORMAT) for token in (3, 7)]
  features = np.asarray(block_inputs(model.blocks[0], *padded(3))["mlp.down_proj"])[:, :real]
  kernel = np.asarray(model.blocks[0].mlp.down_proj.kernel[...])
  for axis in (PER_OC, PER_IC):
    change = np.asarray(fake_quantize(kernel, along(BLOCK_FORMAT, axis))) - kernel
    expected = np.mean((features @ change) ** 2)
    np.testing.assert_allclose(errors[0]["mlp.down_proj"][axis], expected, rtol=1e-3)
  for path in errors[0]:
    np.testing.assert_allclose(errors[0][path], errors[1][path], rtol=1e-5, err_msg=path)


def test_outlier_channels_choose_per_ic(model, tokens, stem):
  outliers = inject_outliers(model, jax.random.key(0), fraction=0.06, gain=50.0)
  x, context = outliers.stem(tokens)
  errors = jax.device_get(adadim.axis_errors(outliers.blocks[0], x, context, BLOCK_FORMAT))
  plain = jax.device_get(adadim.axis_errors(model.blocks[0], *stem, BLOCK_FORMAT))
  for path in adadim.INSPECTED_MODULE:
    assert errors[path][PER_IC] < 0.5 * errors[path][PER_OC], path
    assert errors[path][PER_IC] / errors[path][PER_OC] < plain[path][PER_IC] / plain[path][PER_OC]


def test_fixed_axes(model):
  paths = adadim.module_order(get_kernels(model.blocks[0]))
  assert len(paths) == 7
  for axis, expected in {
    "per_oc": [0, 0, 0, 0, 0, 0, 0],
    "per_ic": [1, 1, 1, 1, 1, 1, 1],
    "heuristic": [1, 1, 1, 0, 0, 0, 1],
  }.items():
    axes = adadim.fixed_axes(model.blocks[0], axis)
    assert [axes[p] for p in paths] == expected


def gptq_oracle(w, h, bits, group_size, damping):
  """Per-IC GPTQ by its definition in float64: the inverse Hessian of the rows that are left."""
  w, h = np.array(w, np.float64), np.array(h, np.float64)
  h += damping * np.diag(h).mean() * np.eye(len(h))
  order, result = np.argsort(-np.diag(h), kind="stable"), np.zeros_like(w)
  for k, i in enumerate(order):
    grouped = w[i].reshape(-1, group_size)
    low, high = grouped.min(axis=1, keepdims=True), grouped.max(axis=1, keepdims=True)
    scale = np.maximum(high - low, 1e-5) / (2**bits - 1)
    zero = np.clip(-np.round(low / scale), 0, 2**bits - 1)
    codes = np.clip(np.round(grouped / scale) + zero, 0, 2**bits - 1)
    result[i] = ((codes - zero) * scale).reshape(-1)
    left = order[k:]
    inverse = np.linalg.inv(h[np.ix_(left, left)])
    w[left] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - result[i])
  return result


def test_per_ic_gptq_against_its_definition(layer):
  w, h = layer
  expected = gptq_oracle(w, h, 3, 16, 0.01)
  for block_size in (12, 128):  # 12 does not divide the 32 rows.
    found = dequantized(gptq_per_ic(w, h, IC3, block_size=block_size))
    # Float32 against float64: a code near a tie may differ, and what follows it in its column.
    assert (np.abs(found - expected) < 1e-3).mean() > 0.98


@pytest.mark.parametrize("axis, solve", [(PER_OC, gptq), (PER_IC, gptq_per_ic)])
def test_gptq_of_an_identity_hessian_is_rounding(axis, solve, layer):
  w, _ = layer
  # Groups of 16 normal weights contain 0, so that GPTQ's per-OC range is RTN's.
  format = IntegerFormat(3, 16, axis)
  found = solve(w, np.eye(32, dtype=np.float32), format, damping=0.01, act_order=False)
  np.testing.assert_allclose(dequantized(found), fake_quantize(w, format), atol=1e-6)


def test_per_ic_gptq_does_not_depend_on_the_order_of_channels(layer):
  w, h = layer
  shuffle = np.random.default_rng(1).permutation(32)
  expected = dequantized(gptq_per_ic(w, h, IC3))
  shuffled = np.asarray(h)[shuffle][:, shuffle]
  found = dequantized(gptq_per_ic(w[shuffle], shuffled, IC3))
  np.testing.assert_allclose(found, expected[shuffle], atol=1e-5)


@pytest.mark.parametrize("axis, solve", [(PER_OC, gptq), (PER_IC, gptq_per_ic)])
def test_gptq_has_lower_output_error_than_rounding(axis, solve):
  """In the mean over draws of inputs, of the same shapes."""
  format, errors = IntegerFormat(3, 16, axis), []
  for seed in range(8):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(200, 32)) @ rng.normal(size=(32, 32))).astype(np.float32)
    h, w = jit_hessian(x), rng.normal(size=(32, 64)).astype(np.float32)
    solved = dequantized(solve(w, h, format, damping=0.01, act_order=False))
    for quantized in (solved, np.asarray(fake_quantize(w, format))):
      errors.append(float(output_error(quantized - w, h)))
  gptq_errors, rtn_errors = np.array(errors).reshape(8, 2).T
  assert gptq_errors.mean() < 0.8 * rtn_errors.mean()


def test_dead_channels_are_zero(layer):
  w, h = layer
  dead = np.array(h)
  dead[3] = dead[:, 3] = 0.0
  quantized = dequantized(gptq_per_ic(w, dead, IC3))
  assert np.isfinite(quantized).all() and not quantized[3].any()


def test_streamed_blocks_are_those_of_the_model(model, tokens):
  """`quantize_block` one block at a time; packed weights of both axes; the same as dequantized."""
  model = methods.variant(TINY, "norm_outliers", model, 0)  # The tiny run packs it too.
  settings = AdaDimSettings(BLOCK_FORMAT, algorithm="gptq")
  step = lambda i, block, x, context: adadim.quantize_block(block, x, context, settings)
  blocks = quantize_blocks(model, iter(model.blocks), tokens, step, stream=settings.stream)
  streamed = nnx.clone(model)
  streamed.blocks = nnx.List(list(blocks))
  reference = methods.quantize_dequantized(model, tokens, settings)
  assert {w.format.axis for w in quantized_weights(streamed).values()} == {PER_OC, PER_IC}
  for path, weight in quantized_weights(streamed).items():
    kernel = adadim.get_module(reference.model, path).kernel[...]
    np.testing.assert_array_equal(dequantize(weight), kernel, err_msg=path)
  expected = logits(reference.model, tokens)
  np.testing.assert_allclose(logits(streamed, tokens), expected, atol=1e-4)
  assert reference.bits_per_weight == pytest.approx(3 + 19 / 32)


def test_sensitivity_against_gradients(model, tokens):
  found = sensitivity.block_sensitivity(model, tokens[:2], 1)["mlp.down_proj"]
  graphdef, state = nnx.split(model)
  kernel = model.blocks[1].mlp.down_proj.kernel[...]

  @jax.jit
  def gradient(row):
    def loss(kernel):
      changed = nnx.merge(graphdef, state)
      changed.blocks[1].mlp.down_proj.kernel = nnx.Param(kernel)
      log_probs = jax.nn.log_softmax(changed(row[None])[0][0, :-1])
      return -jnp.take_along_axis(log_probs, row[1:, None], axis=1).sum()

    return jax.grad(loss)(kernel)

  gradients = np.stack([gradient(row) for row in np.asarray(tokens[:2])])
  saliency, fisher = (
    np.abs(gradients * np.asarray(kernel)).mean(axis=0),
    (gradients**2).mean(axis=0),
  )
  np.testing.assert_allclose(found.saliency_in, saliency.sum(axis=1), rtol=1e-3)
  np.testing.assert_allclose(found.saliency_out, saliency.sum(axis=0), rtol=1e-3)
  np.testing.assert_allclose(found.fisher_in, fisher.sum(axis=1), rtol=1e-3)
  np.testing.assert_allclose(found.fisher_out, fisher.sum(axis=0), rtol=1e-3)
  assert found.activation.shape == (128,)
  assert float(sensitivity.top_share(np.float32([1, 6, 2, 1]), 0.25)) == pytest.approx(0.6)


def test_bad_input_is_named(model, tokens, stem):
  block, (x, context) = model.blocks[0], stem
  settings = AdaDimSettings(BLOCK_FORMAT)
  broken = replaced(block, {"mlp.up_proj": jnp.asarray(np.full((64, 128), np.nan, np.float32))})
  with pytest.raises(
    UserError, match="^mlp.up_proj.kernel: NaN or infinite values, expected finite"
  ):
    adadim.quantize_block(broken, x, context, settings)
  with pytest.raises(UserError, match="the calibration activations: NaN or infinite"):
    adadim.quantize_block(block, jnp.full_like(x, jnp.inf), context, settings)
  with pytest.raises(UserError, match="axis='ada' is not supported; supported: adaptive, heur"):
    AdaDimSettings(FORMAT, axis="ada")
  with pytest.raises(UserError, match="reference='x' is not supported; supported: fp, code"):
    AdaDimSettings(FORMAT, reference="x")
  with pytest.raises(ValueError, match="axis 1"):
    gptq_per_ic(np.ones((32, 64)), np.eye(32), IntegerFormat(3, 16, 0))
  # Grouped-query attention: k and v have 16 outputs.
  grouped = random_decoder(ARCHITECTURES["qwen2, grouped-query"])
  with pytest.raises(UserError, match="k_proj: group_size=32 does not divide the output dimension"):
    adadim.quantize(grouped, tokens, AdaDimSettings(BLOCK_FORMAT))
  adadim.check_sizes(grouped, AdaDimSettings(BLOCK_FORMAT, axis="per_oc"))


def test_bad_configs_are_refused_before_any_work(tmp_path, monkeypatch):
  def refused(message, **changes):
    settings = config.get_config("tiny")
    settings.update(changes)
    with pytest.raises(UserError, match=message):
      experiment.run(settings, tmp_path)

  refused("--config.allow_execution=True", tasks=("humaneval",))
  refused("group_size=48 does not divide", group_size=48)
  refused("sensitivity_block=2: expected 0 to 1", sensitivity_block=2)
  monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
  refused("'mmlu' is none of piqa, gsm8k, humaneval and needs", tasks=("mmlu",))
  with pytest.raises(UserError, match="variant 'x' is not supported; supported: natural"):
    methods.variant(config.get_config("tiny"), "x", None, 0)


def test_tiny_run(tmp_path, monkeypatch):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  assert len(report.claims) == 4
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  rows = {row[0]: row for row in report.tables[0].rows}
  assert len(rows) == 10 and all(np.isfinite(row[1]) for row in rows.values())
  assert rows["RTN-ada"][6] == pytest.approx(3 + 19 / 32)
  assert (rows["RTN-OC"][5], rows["AWQ"][5], rows["RTN-IC"][5]) == (0, 0, 1)
  assert rows["RTN-heuristic"][5] == pytest.approx(4 / 7)

  def measured_again(*args, **options):
    raise AssertionError("measured again")

  monkeypatch.setattr(methods, "quantize_model", measured_again)
  monkeypatch.setattr(adadim, "quantize_model", measured_again)
  monkeypatch.setattr(experiment, "block_sensitivity", measured_again)
  # From the measurements of the first run.
  assert experiment.run(config.get_config("tiny"), tmp_path) == report
