"""VPTQ: vectors of the published code, invariants, bad input, and the tiny run."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.cluster.vq import kmeans2

from common.errors import UserError
from common.evaluation.perplexity import window_losses
from common.models.base import base_model
from common.models.surgery import linear_paths
from common.quantization.calibration import quantize_blocks, quantize_model
from common.quantization.gptq import gptq, hessian
from common.quantization.quantized_array import IntegerFormat
from common.quantization.vector_quantized import (
  VectorQuantizedArray,
  VectorQuantizedLinear,
  vector_quantized_weights,
)
from projects.vptq import blocks, config, experiment, methods
from projects.vptq.finetune import Finetuning, finetune_block, finetune_model
from projects.vptq.gptvq import joint_pass
from projects.vptq.kmeans import lloyd, nearest_centroid
from projects.vptq.vptq import (
  VPTQSettings,
  column_pass,
  inverse_factor,
  prepare,
  proxy_error,
  to_vectors,
  vptq,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vptq" / "column_pass.npz"
SETTINGS = VPTQSettings(
  vector_length=3, num_centroids=16, normalize=False, block_size=8, kmeans_iterations=10
)
# The tiny run's: its programs quantize, tune and score the models below.
TINY = config.get_config("tiny")
MODEL_SETTINGS = methods.settings(TINY)
quantize_block = functools.partial(
  blocks.quantize_block, settings=MODEL_SETTINGS, key=jax.random.key(0)
)
nearest = jax.jit(nearest_centroid)
dequantize = jax.jit(VectorQuantizedArray.dequantize)
run = nnx.jit(lambda layer, x: layer(x))
measure = jax.jit(hessian)


def normal(seed, *shape):
  return np.float32(np.random.default_rng(seed).normal(size=shape))


def random_hessian(seed, size):
  """Of correlated inputs with channels of different size."""
  rng = np.random.default_rng(seed)
  x = (
    rng.normal(size=(4 * size, size))
    @ rng.normal(size=(size, size))
    * np.exp(rng.normal(size=size))
  )
  return measure(np.float32(x))


@pytest.fixture(scope="module")
def base():
  return base_model(TINY.model)


@pytest.fixture(scope="module")
def model(base):
  return base.model


@pytest.fixture(scope="module")
def tokens(base):
  return methods.calibration(TINY, base, 0)


@pytest.fixture(scope="module")
def quantized(model, tokens):
  return quantize_model(model, tokens, quantize_block, stream="full_precision")


@pytest.mark.parametrize("stage", ["single", "residual"])
def test_column_pass_of_the_published_code(stage):
  with np.load(GOLDEN) as golden:
    w, h = golden["weight"].T, golden["H"]
    residual = golden["res_centroids"][None] if stage == "residual" else None
    result = column_pass(
      w, inverse_factor(h, 0.01), golden["centroids"][None], residual, block_size=8
    )
    np.testing.assert_array_equal(result.indices.T, golden[f"{stage}_indices"])
    if residual is not None:
      np.testing.assert_array_equal(result.residual_indices.T, golden["residual_res_indices"])
    np.testing.assert_allclose(result.quantized.T, golden[f"{stage}_qweight"], atol=1e-6)
    # The code inverts H by another route: float32 rounding of the weights as compensated.
    np.testing.assert_allclose(result.error.T, golden[f"{stage}_error"], atol=5e-5)
    error = proxy_error(w, result.quantized, h)
    assert float(error) == pytest.approx(golden[f"{stage}_proxy"][2], rel=1e-5)


def test_without_correlations_the_pass_is_the_nearest_centroid():
  w, codebook = normal(0, 20, 10), normal(1, 16, 3)
  result = column_pass(
    w, inverse_factor(np.eye(20, dtype=np.float32), 0.01), codebook[None], block_size=8
  )
  vectors = np.pad(np.asarray(w), ((0, 0), (0, 2))).reshape(20, 4, 3)
  valid = (np.arange(12) < 10).reshape(4, 3)
  distances = (((vectors[:, :, None] - np.asarray(codebook)) ** 2) * valid[:, None]).sum(-1)
  np.testing.assert_array_equal(result.indices, distances.argmin(-1))
  values = np.asarray(codebook)[distances.argmin(-1)].reshape(20, 12)[:, :10]
  np.testing.assert_array_equal(result.quantized, values)
  np.testing.assert_allclose(result.error, w - values, atol=1e-6)


def test_with_scalars_it_is_gptq():
  """v = 1 and the codebook is a uniform grid; GPTQ takes the same grid for every channel."""
  h, format = random_hessian(0, 16), IntegerFormat(3, -1)
  # Each output's range is that of the grid, 0 to 7 quarters, so that GPTQ's scales are all 0.25.
  w = np.array(np.random.default_rng(1).uniform(0, 1.75, (16, 6)), np.float32)
  w[0], w[1] = 0.0, 1.75
  expected = gptq(jnp.asarray(w), h, format, block_size=8)
  np.testing.assert_array_equal(expected.scales, 0.25)
  grid = (0.25 * np.arange(8, dtype=np.float32))[None, :, None]
  result = column_pass(w, inverse_factor(h, 0.01), grid, block_size=8)
  np.testing.assert_array_equal(result.indices, np.asarray(expected.dequantize()) * 4)


def test_blocks_do_not_change_the_pass():
  w, u, codebook = (
    normal(0, 20, 10),
    inverse_factor(random_hessian(1, 20), 0.01),
    normal(2, 1, 16, 3),
  )
  one, many = (column_pass(w, u, codebook, block_size=b) for b in (20, 8))
  np.testing.assert_array_equal(one.indices, many.indices)
  np.testing.assert_allclose(one.error, many.error, atol=1e-4)


def test_feedback_lowers_the_proxy_error_in_the_mean():
  identity = np.eye(16, dtype=np.float32)
  with_feedback, without = [], []
  for i in range(20):
    w, h, codebook = normal(i, 16, 9), random_hessian(100 + i, 16), normal(200 + i, 1, 16, 3)
    for errors, u in ((with_feedback, inverse_factor(h, 0.01)), (without, identity)):
      quantized = column_pass(w, u, codebook, block_size=8).quantized
      errors.append(float(proxy_error(w, quantized, h)))
  assert np.mean(with_feedback) < 0.8 * np.mean(without)


def test_joint_pass_of_one_channel_is_the_column_pass():
  """v = 1 is where GPTVQ and VPTQ meet."""
  w, u, codebook = normal(0, 16, 6), inverse_factor(random_hessian(1, 16), 0.01), normal(2, 8, 1)
  indices, values = joint_pass(w, u, codebook)
  expected = column_pass(w, u, codebook[None], block_size=8)
  np.testing.assert_array_equal(indices, expected.indices)
  np.testing.assert_array_equal(values, expected.quantized)


def test_joint_pass_minimizes_the_joint_error_of_its_channels():
  """Against the definition: inverses instead of factors, one output and candidate at a time."""
  w, h, codebook = normal(3, 6, 4), random_hessian(4, 6), normal(5, 8, 3)
  _, values = joint_pass(w, inverse_factor(h, 0.0), codebook)
  inverse = np.linalg.inv(np.asarray(h, np.float64))
  left = np.array(w, np.float64)
  first = inverse[:3, :3]
  for out in range(4):
    differences = left[:3, out] - np.asarray(codebook, np.float64)
    best = np.einsum("ki,ij,kj->k", differences, np.linalg.inv(first), differences).argmin()
    np.testing.assert_allclose(values[:3, out], codebook[best])
    left[3:, out] -= inverse[3:, :3] @ np.linalg.solve(first, differences[best])
  later = np.linalg.inv(np.asarray(h, np.float64)[3:, 3:])
  for out in range(4):
    differences = left[3:, out] - np.asarray(codebook, np.float64)
    best = np.einsum("ki,ij,kj->k", differences, np.linalg.inv(later), differences).argmin()
    np.testing.assert_allclose(values[3:, out], codebook[best])


def test_kmeans_inertia_never_rises_and_equals_scipy():
  x, start = normal(0, 200, 3), normal(0, 200, 3)[:8]
  cluster = lambda steps: lloyd(x, np.ones_like(x), start, max_iterations=steps, tolerance=0.0)
  inertia = [float(cluster(steps)[1]) for steps in range(1, 8)]
  assert all(b <= a * (1 + 1e-5) for a, b in zip(inertia, inertia[1:])) and inertia[-1] < inertia[0]
  expected, labels = kmeans2(x, start, iter=100, minit="matrix")
  centroids, final = cluster(100)
  np.testing.assert_allclose(centroids, expected, atol=1e-5)
  assert float(final) == pytest.approx(((x - expected[labels]) ** 2).sum(), rel=1e-4)


def test_kmeans_weights_count_samples():
  # 100 samples that count 1 to 3 times, 200 in all; further ones have weight 0.
  x, start = normal(1, 200, 3), normal(1, 200, 3)[:8]
  counts = np.random.default_rng(2).permutation([1] * 33 + [2] * 34 + [3] * 33)
  weights = np.zeros_like(x)
  weights[:100] = counts[:, None]
  cluster = lambda x, weights: lloyd(x, weights, start, max_iterations=100, tolerance=0.0)
  weighted, inertia = cluster(x, weights)
  repeated = np.repeat(x[:100], counts, axis=0)
  expected, expected_inertia = cluster(repeated, np.ones_like(repeated))
  np.testing.assert_allclose(weighted, expected, atol=1e-5)
  assert float(inertia) == pytest.approx(float(expected_inertia), rel=1e-4)


def test_an_empty_cluster_stays_and_ties_go_to_the_first():
  x, far = np.float32([[0], [1]]), np.float32([[0], [1], [50]])
  np.testing.assert_array_equal(lloyd(x, np.ones_like(x), far)[0], far)
  index = nearest(np.float32([[0.5]]), np.float32([[1]]), np.float32([[1], [0], [1]]))
  assert int(index[0]) == 0


@pytest.mark.parametrize("k", [64, 100, 256])
def test_many_centroids_against_the_definition(k):
  """More than the CPU compares at once. Whole numbers: distances are exact, and often equal."""
  rng = np.random.default_rng(3)
  x, centroids = rng.integers(-3, 4, (300, 2)), rng.integers(-3, 4, (k, 2))
  weights = rng.integers(0, 3, (300, 2))
  distances = (weights[:, None] * (x[:, None] - centroids) ** 2).sum(-1)
  arrays = [np.float32(a) for a in (x, weights, centroids)]
  np.testing.assert_array_equal(nearest(*arrays), distances.argmin(-1))
  moved, inertia = lloyd(*arrays, max_iterations=1)
  assert float(inertia) == distances.min(-1).sum()
  member = np.eye(k)[distances.argmin(-1)]
  total = member.T @ weights
  mean = member.T @ (weights * x) / np.maximum(total, 1)
  np.testing.assert_allclose(moved, np.where(total > 0, mean, centroids), rtol=1e-6)


def test_residual_codebook_with_zero_never_adds_error():
  w, codebook = normal(0, 20, 10), normal(1, 1, 16, 3)
  residual, identity = normal(2, 1, 8, 3), np.eye(20, dtype=np.float32)
  residual[0, 0] = 0
  first = column_pass(w, identity, codebook, block_size=8)
  both = column_pass(w, identity, codebook, residual, block_size=8)
  norms = lambda result: np.sum(np.asarray(to_vectors(result.error, 3)) ** 2, axis=-1)
  assert (norms(both) <= norms(first) + 1e-6).all()
  assert float(norms(both).sum()) < 0.9 * float(norms(first).sum())


VARIANTS = {
  "all": {
    "normalize": True,
    "num_residual_centroids": 8,
    "outlier_fraction": 0.09,  # 2 of 22 channels: the others share the programs of the groups.
    "outlier_vector_length": 2,
    "num_outlier_centroids": 8,
    "num_groups": 2,
  },
  "normalised": {"normalize": True},
  "groups in place": {"num_groups": 2, "permute": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_weight_is_what_the_error_was_measured_on(name):
  """Order, normalisation, outliers and padding are undone exactly; so is the product."""
  settings = dataclasses.replace(SETTINGS, **VARIANTS[name])
  rows = 22 if settings.outlier_fraction else 20
  w, h = normal(0, rows, 10), random_hessian(1, rows)
  weight, errors = vptq(w, h, jax.random.key(0), settings)
  dense = np.asarray(dequantize(weight))
  assert float(proxy_error(w, dense, h)) == pytest.approx(float(errors.residual), rel=1e-3)
  # Far below the error of weights that are all off: channels are where they belong.
  assert float(errors.residual) < 0.5 and float(errors.column_pass) < float(errors.kmeans)
  x = normal(2, 7, rows)
  layer = VectorQuantizedLinear(weight, np.ones(10, np.float32))
  np.testing.assert_allclose(run(layer, x), x @ dense + 1, atol=1e-4)


@pytest.mark.parametrize("permute", [False, True])
def test_order_and_normalisation_are_inverted(permute):
  w, h = normal(0, 20, 10), random_hessian(1, 20)
  options = {"permute": permute, "normalize": True}
  p = jax.device_get(prepare(w, h, **options, norm_hessian=True))
  scale, bias = np.float32(p.scale)[:, None], np.float32(p.bias)[:, None]
  restored = np.zeros_like(w)
  restored[p.order] = p.w
  np.testing.assert_allclose(restored * scale + bias, w, atol=1e-6)
  assert permute == bool((np.diff(p.importance) <= 0).all())
  # The same objective in both coordinates: the bias cancels in differences.
  change = 0.1 * normal(2, 20, 10)
  form = lambda a, h: np.sum(a * (np.asarray(h) @ a))
  assert form((change / scale)[p.order], p.h) == pytest.approx(form(change, h), rel=1e-4)
  unscaled = prepare(w, h, **options, norm_hessian=False).h
  assert np.trace(unscaled) == pytest.approx(np.trace(h), rel=1e-5)


def test_padding_never_leaks():
  """10 outputs in vectors of 3: only the first coordinate of a last centroid counts."""
  w, codebook = normal(0, 20, 10), normal(2, 1, 16, 3)
  result = column_pass(w, inverse_factor(random_hessian(1, 20), 0.01), codebook, block_size=8)
  current = np.asarray(result.quantized + result.error)[:, 9]
  distances = (current[:, None] - np.asarray(codebook)[0, :, 0]) ** 2
  np.testing.assert_array_equal(result.indices[:, 3], distances.argmin(-1))
  assert result.quantized.shape == (20, 10)


def test_dead_and_constant_channels_stay_finite():
  w, h = normal(0, 20, 10), np.array(random_hessian(1, 20))
  w[3], h[5], h[:, 5] = 0.7, 0, 0
  settings = dataclasses.replace(SETTINGS, normalize=True)
  weight, errors = vptq(w, h, jax.random.key(0), settings)
  assert np.isfinite(dequantize(weight)).all() and np.isfinite(float(errors.residual))


def abstract(shape, settings):
  key = jax.eval_shape(lambda: jax.random.key(0))
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  arguments = array(*shape), array(shape[0], shape[0]), key
  return jax.eval_shape(functools.partial(vptq, settings=settings), *arguments)[0]


def test_bits_of_the_papers_example():
  """4096 x 4096, v = 8, k = 256: 15.97 times smaller than 16 bits."""
  plain = VPTQSettings(8, 256, normalize=False)
  weight = abstract((4096, 4096), plain)
  assert weight.index_bits_per_weight() == 1.0
  assert weight.bits_per_weight() == pytest.approx(1.002, abs=5e-4)
  assert 16 / weight.bits_per_weight() == pytest.approx(15.97, abs=5e-3)


def test_bits_count_everything():
  settings = VPTQSettings(
    12, 4096, 4096, num_groups=4, outlier_fraction=0.01, num_outlier_centroids=8192
  )
  weight = abstract((4096, 4096), settings)
  outliers = settings.num_outliers(4096)
  assert outliers == 44 and weight.outliers == 44
  index = (4052 * 342 * 24 + 44 * 1024 * 13) / 4096**2
  values = 4 * 12 * 8192 + 4 * 8192 + 3 * 4096
  assert weight.index_bits_per_weight() == pytest.approx(index)
  assert weight.bits_per_weight() == pytest.approx(index + 16 * values / 4096**2)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"num_centroids": 100}, "num_centroids=100 is not supported; choose a power of two"),
    ({"vector_length": 0}, "vector_length=0 must be at least 1"),
    ({"outlier_fraction": 1.0}, r"outlier_fraction=1.0 must be in \[0, 1\)"),
  ],
)
def test_unsuitable_settings_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    VPTQSettings(**changes)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"num_groups": 3}, "num_groups=3 does not divide its 64 input channels"),
    ({"num_centroids": 4096}, "a group has 2048 vectors, fewer than 4096 centroids"),
    (
      {"outlier_fraction": 0.02, "num_outlier_centroids": 64},
      "the outliers has 32 vectors, fewer than 64 centroids",
    ),
  ],
)
def test_weights_that_do_not_fit_are_named_before_any_work(changes, message, model):
  settings = dataclasses.replace(MODEL_SETTINGS, **changes)
  with pytest.raises(UserError, match=message):
    blocks.check_block(model.blocks[0], settings)


def test_nan_is_named(model, tokens):
  x, context = model.stem(tokens)
  broken = nnx.clone(model.blocks[0])
  kernel = broken.mlp.up_proj.kernel
  kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(UserError, match="^mlp.up_proj.kernel: NaN or infinite"):
    quantize_block(0, broken, x, context)
  with pytest.raises(UserError, match="the calibration activations: NaN"):
    quantize_block(0, model.blocks[0], x.at[0, 0].set(jnp.inf), context)


def test_a_streamed_block_is_packed_and_repeatable(base, model, tokens, quantized):
  assert set(vector_quantized_weights(quantized.blocks[0])) == set(linear_paths(model.blocks[0]))
  blocks_of = iter(model.blocks)
  stream = quantize_blocks(model, blocks_of, tokens, quantize_block, stream="full_precision")
  for first, second in zip(quantized.blocks, stream):
    for path, weight in vector_quantized_weights(first).items():
      again = vector_quantized_weights(second)[path]
      np.testing.assert_array_equal(weight.indices, again.indices)
      np.testing.assert_array_equal(weight.codebooks, again.codebooks)
  windows = methods.held_out_windows(TINY, base)
  # As tuning leaves it: the norms have changed too.
  tuned = nnx.clone(quantized)
  tuned.blocks[0].mlp_norm.scale[...] *= 1.5
  packed, dense = (window_losses(m, windows).nll for m in (tuned, blocks.dense(tuned, model)))
  np.testing.assert_allclose(packed, dense, rtol=1e-5)


def test_tuning_lowers_its_loss_and_keeps_indices(model, tokens, quantized):
  x, context = model.stem(tokens)
  # 20 steps, as many at a time as in the tiny run, and so by its programs.
  steps, _, batch_size = TINY.layer_finetuning
  settings = Finetuning(steps, 3e-3, batch_size)
  keys = jax.random.split(jax.random.key(0), 20 // steps)
  before = tuned = quantized.blocks[0]
  losses, whole, divergence = [], quantized, []
  for key in keys:
    tuned, part = finetune_block(tuned, model.blocks[0], x, context, key, settings)
    losses.extend(part.tolist())
    whole, part = finetune_model(whole, model, tokens, key, settings)
    divergence.extend(part.tolist())
  assert len(losses) == len(divergence) == 20
  assert losses[-1] < 0.9 * losses[0] and divergence[-1] < 0.9 * divergence[0]
  old, new = (vector_quantized_weights(b)["mlp.up_proj"] for b in (before, tuned))
  np.testing.assert_array_equal(old.indices, new.indices)
  assert new.codebooks.dtype == jnp.float16 and not np.array_equal(old.codebooks, new.codebooks)
  embedding = lambda m: m.embed_tokens.embedding[...]
  np.testing.assert_array_equal(embedding(whole), embedding(model))


def never(*args, **kwargs):
  raise AssertionError("measured again")


def test_tiny_run(tmp_path, monkeypatch):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  assert len(report.claims) == 10
  rows = {row[0]: row for row in report.tables[0].rows}
  assert len(rows) == 10 and all(np.isfinite(row[4]) for row in rows.values())
  assert rows["VPTQ"][1] == 2.0 and rows["VPTQ"][2] < rows["GPTQ"][2]
  packed = report.tables[-1].rows[1]
  assert packed[2] == pytest.approx(rows["VPTQ, tuned end to end"][4], rel=1e-4)
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  # The same command after a kill: what was measured is neither quantized nor scored again.
  for name in ("model_hessians", "measure_method", "window_losses", "generate"):
    monkeypatch.setattr(experiment, name, never)
  assert experiment.run(config.get_config("tiny"), tmp_path) == report
