"""VPTQ: vectors of the published code, invariants, bad input, and the tiny run."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.cluster import KMeans

from common.errors import UserError
from common.models.surgery import linear_paths
from common.quantization.calibration import quantize_blocks, quantize_model
from common.quantization.gptq import gptq, hessian, inverse_cholesky
from common.quantization.quantized_array import IntegerFormat
from common.quantization.vector_quantized import VectorQuantizedLinear, vector_quantized_weights
from projects.vptq import blocks, config, experiment
from projects.vptq.finetune import Finetuning, finetune_block, finetune_model
from projects.vptq.gptvq import joint_pass
from projects.vptq.kmeans import lloyd, nearest_centroid
from projects.vptq.vptq import VPTQSettings, column_pass, prepare, proxy_error, to_vectors, vptq
from tests.common.models.small_decoders import ARCHITECTURES, logits, random_decoder, random_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vptq" / "column_pass.npz"
SETTINGS = VPTQSettings(
  vector_length=3, num_centroids=16, normalize=False, block_size=8, kmeans_iterations=10
)
factor = jax.jit(inverse_cholesky)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_hessian(seed, size):
  """Of correlated inputs with channels of different size."""
  rng = np.random.default_rng(seed)
  x = (
    rng.normal(size=(4 * size, size))
    @ rng.normal(size=(size, size))
    * np.exp(rng.normal(size=size))
  )
  return hessian(jnp.asarray(x, jnp.float32))


@pytest.fixture(scope="module")
def model():
  # All linears have one shape, so that there is one program.
  return random_decoder(dataclasses.replace(ARCHITECTURES["llama"], intermediate_size=32))


@pytest.fixture(scope="module")
def tokens(model):
  return jnp.asarray(random_tokens(model.config, 8, 16))


@pytest.fixture(scope="module")
def quantized(model, tokens):
  block = functools.partial(blocks.quantize_block, settings=SETTINGS, key=jax.random.key(0))
  return quantize_model(model, tokens, block, stream="full_precision")


@pytest.mark.parametrize("stage", ["single", "residual"])
def test_column_pass_of_the_published_code(stage):
  with np.load(GOLDEN) as golden:
    w, h = jnp.asarray(golden["weight"]).T, jnp.asarray(golden["H"])
    residual = jnp.asarray(golden["res_centroids"])[None] if stage == "residual" else None
    result = column_pass(
      w, factor(h, 0.01), jnp.asarray(golden["centroids"])[None], residual, block_size=8
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
  result = column_pass(w, factor(jnp.eye(20), 0.01), codebook[None], block_size=8)
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
  grid = (0.25 * jnp.arange(8.0))[None, :, None]
  result = column_pass(jnp.asarray(w), factor(h, 0.01), grid, block_size=8)
  np.testing.assert_array_equal(result.indices, expected.dequantize() * 4)


def test_blocks_do_not_change_the_pass():
  w, u, codebook = normal(0, 20, 10), factor(random_hessian(1, 20), 0.01), normal(2, 1, 16, 3)
  one, many = (column_pass(w, u, codebook, block_size=b) for b in (20, 8))
  np.testing.assert_array_equal(one.indices, many.indices)
  np.testing.assert_allclose(one.error, many.error, atol=1e-4)


def test_feedback_lowers_the_proxy_error_in_the_mean():
  def errors(w, h, codebook):
    one = lambda u: proxy_error(w, column_pass(w, u, codebook, block_size=8).quantized, h)
    return one(factor(h, 0.01)), one(jnp.eye(16))

  draws = range(20)
  w = jnp.stack([normal(i, 16, 9) for i in draws])
  h = jnp.stack([random_hessian(100 + i, 16) for i in draws])
  codebooks = jnp.stack([normal(200 + i, 1, 16, 3) for i in draws])
  with_feedback, without = jax.jit(jax.vmap(errors))(w, h, codebooks)
  assert float(with_feedback.mean()) < 0.8 * float(without.mean())


def test_joint_pass_of_one_channel_is_the_column_pass():
  """v = 1 is where GPTVQ and VPTQ meet."""
  w, u, codebook = normal(0, 12, 5), factor(random_hessian(1, 12), 0.01), normal(2, 8, 1)
  indices, values = joint_pass(w, u, codebook)
  expected = column_pass(w, u, codebook[None], block_size=8)
  np.testing.assert_array_equal(indices, expected.indices)
  np.testing.assert_array_equal(values, expected.quantized)


def test_joint_pass_minimizes_the_joint_error_of_its_channels():
  """Against the definition: inverses instead of factors, one output and candidate at a time."""
  w, h, codebook = normal(3, 6, 4), random_hessian(4, 6), normal(5, 8, 3)
  _, values = joint_pass(w, factor(h, 0.0), codebook)
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


def test_kmeans_inertia_never_rises_and_equals_scikit_learn():
  x, start = normal(0, 200, 3), normal(0, 200, 3)[:8]
  run = lambda steps: lloyd(x, jnp.ones_like(x), start, max_iterations=steps, tolerance=0.0)
  inertia = [float(run(steps)[1]) for steps in range(1, 8)]
  assert all(b <= a * (1 + 1e-5) for a, b in zip(inertia, inertia[1:])) and inertia[-1] < inertia[0]
  expected = KMeans(8, init=np.asarray(start), n_init=1, max_iter=100, tol=0.0).fit(x)
  centroids, final = run(100)
  np.testing.assert_allclose(centroids, expected.cluster_centers_, atol=1e-5)
  assert float(final) == pytest.approx(expected.inertia_, rel=1e-4)


def test_kmeans_weights_count_samples():
  x, start = normal(1, 60, 3), normal(1, 60, 3)[:5]
  counts = np.random.default_rng(2).integers(1, 4, 60)
  weights = jnp.broadcast_to(jnp.asarray(counts, jnp.float32)[:, None], x.shape)
  weighted, inertia = lloyd(x, weights, start)
  repeated = jnp.asarray(np.repeat(x, counts, axis=0))
  expected, expected_inertia = lloyd(repeated, jnp.ones_like(repeated), start, tolerance=0.0)
  np.testing.assert_allclose(weighted, expected, atol=1e-2)  # They may stop an iteration apart.
  assert float(inertia) == pytest.approx(float(expected_inertia), rel=1e-2)


def test_an_empty_cluster_stays_and_ties_go_to_the_first():
  x, far = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [1.0], [50.0]])
  np.testing.assert_array_equal(lloyd(x, jnp.ones_like(x), far)[0], far)
  index = nearest_centroid(jnp.array([[0.5]]), jnp.ones((1, 1)), jnp.array([[1.0], [0.0], [1.0]]))
  assert int(index[0]) == 0


@pytest.mark.parametrize("k", [64, 100, 256])
def test_many_centroids_against_the_definition(k):
  """More than the CPU compares at once. Whole numbers: distances are exact, and often equal."""
  rng = np.random.default_rng(3)
  x, centroids = rng.integers(-3, 4, (300, 2)), rng.integers(-3, 4, (k, 2))
  weights = rng.integers(0, 3, (300, 2))
  distances = (weights[:, None] * (x[:, None] - centroids) ** 2).sum(-1)
  arrays = [jnp.asarray(a, jnp.float32) for a in (x, weights, centroids)]
  np.testing.assert_array_equal(nearest_centroid(*arrays), distances.argmin(-1))
  moved, inertia = lloyd(*arrays, max_iterations=1)
  assert float(inertia) == distances.min(-1).sum()
  member = np.eye(k)[distances.argmin(-1)]
  total = member.T @ weights
  mean = member.T @ (weights * x) / np.maximum(total, 1)
  np.testing.assert_allclose(moved, np.where(total > 0, mean, centroids), rtol=1e-6)


def test_residual_codebook_with_zero_never_adds_error():
  w, codebook = normal(0, 20, 10), normal(1, 1, 16, 3)
  residual = normal(2, 1, 8, 3).at[0, 0].set(0.0)
  first = column_pass(w, jnp.eye(20), codebook, block_size=8)
  both = column_pass(w, jnp.eye(20), codebook, residual, block_size=8)
  norms = lambda result: jnp.sum(to_vectors(result.error, 3) ** 2, axis=-1)
  assert (norms(both) <= norms(first) + 1e-6).all()
  assert float(norms(both).sum()) < 0.9 * float(norms(first).sum())


VARIANTS = {
  "all": {
    "normalize": True,
    "num_residual_centroids": 8,
    "outlier_fraction": 0.1,
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
  w, h = normal(0, 20, 10), random_hessian(1, 20)
  settings = dataclasses.replace(SETTINGS, **VARIANTS[name])
  weight, errors = vptq(w, h, jax.random.key(0), settings)
  dense = weight.dequantize()
  assert float(proxy_error(w, dense, h)) == pytest.approx(float(errors.residual), rel=1e-3)
  # Far below the error of weights that are all off: channels are where they belong.
  assert float(errors.residual) < 0.5 and float(errors.column_pass) < float(errors.kmeans)
  x = normal(2, 7, 20)
  np.testing.assert_allclose(
    VectorQuantizedLinear(weight, jnp.ones(10))(x), x @ dense + 1, atol=1e-4
  )


@pytest.mark.parametrize("permute", [False, True])
def test_order_and_normalisation_are_inverted(permute):
  w, h = normal(0, 12, 7), random_hessian(1, 12)
  p = prepare(w, h, permute=permute)
  restored = jnp.zeros_like(w).at[p.order].set(p.w)
  restored = restored * p.scale.astype(jnp.float32)[:, None] + p.bias.astype(jnp.float32)[:, None]
  np.testing.assert_allclose(restored, w, atol=1e-6)
  assert permute == bool((jnp.diff(p.importance) <= 0).all())
  # The same objective in both coordinates: the bias cancels in differences.
  change = 0.1 * normal(2, 12, 7)
  scaled = (change / p.scale.astype(jnp.float32)[:, None])[p.order]
  form = lambda a, h: float(jnp.sum(a * (h @ a)))
  assert form(scaled, p.h) == pytest.approx(form(change, h), rel=1e-4)
  unscaled = prepare(w, h, permute=permute, norm_hessian=False).h
  assert float(jnp.trace(unscaled)) == pytest.approx(float(jnp.trace(h)), rel=1e-5)


def test_padding_never_leaks():
  """10 outputs in vectors of 3: only the first coordinate of a last centroid counts."""
  w, codebook = normal(0, 20, 10), normal(2, 1, 16, 3)
  result = column_pass(w, factor(random_hessian(1, 20), 0.01), codebook, block_size=8)
  current = np.asarray(result.quantized + result.error)[:, 9]
  distances = (current[:, None] - np.asarray(codebook)[0, :, 0]) ** 2
  np.testing.assert_array_equal(result.indices[:, 3], distances.argmin(-1))
  assert result.quantized.shape == (20, 10)


def test_dead_and_constant_channels_stay_finite():
  w, h = normal(0, 20, 10).at[3].set(0.7), random_hessian(1, 20)
  h = h.at[5].set(0).at[:, 5].set(0)
  settings = dataclasses.replace(SETTINGS, normalize=True)
  weight, errors = vptq(w, h, jax.random.key(0), settings)
  assert np.isfinite(weight.dequantize()).all() and np.isfinite(float(errors.residual))


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
    ({"num_groups": 3}, "num_groups=3 does not divide its 32 input channels"),
    ({"num_centroids": 1024}, "a group has 352 vectors, fewer than 1024 centroids"),
    (
      {"outlier_fraction": 0.02, "num_outlier_centroids": 64},
      "the outliers has 8 vectors, fewer than 64 centroids",
    ),
  ],
)
def test_weights_that_do_not_fit_are_named_before_any_work(changes, message, model):
  settings = dataclasses.replace(SETTINGS, **changes)
  with pytest.raises(UserError, match=message):
    blocks.check_block(model.blocks[0], settings)


def test_nan_is_named(model, tokens):
  x, context = model.stem(tokens)
  quantize = functools.partial(blocks.quantize_block, settings=SETTINGS, key=jax.random.key(0))
  broken = nnx.clone(model.blocks[0])
  kernel = broken.mlp.up_proj.kernel
  kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(UserError, match="^mlp.up_proj.kernel: NaN or infinite"):
    quantize(0, broken, x, context)
  with pytest.raises(UserError, match="the calibration activations: NaN"):
    quantize(0, model.blocks[0], x.at[0, 0].set(jnp.inf), context)


def test_a_streamed_block_is_packed_and_repeatable(model, tokens, quantized):
  assert set(vector_quantized_weights(quantized.blocks[0])) == set(linear_paths(model.blocks[0]))
  block = functools.partial(blocks.quantize_block, settings=SETTINGS, key=jax.random.key(0))
  stream = quantize_blocks(model, iter(model.blocks), tokens, block, stream="full_precision")
  for first, second in zip(quantized.blocks, stream):
    for path, weight in vector_quantized_weights(first).items():
      again = vector_quantized_weights(second)[path]
      np.testing.assert_array_equal(weight.indices, again.indices)
      np.testing.assert_array_equal(weight.codebooks, again.codebooks)
  np.testing.assert_allclose(
    logits(quantized, tokens), logits(blocks.dense(quantized, model), tokens), atol=2e-4
  )


def test_tuning_lowers_its_loss_and_keeps_indices(model, tokens, quantized):
  x, context = model.stem(tokens)
  settings, key = Finetuning(20, 3e-3, 8), jax.random.key(0)
  before = quantized.blocks[0]
  tuned, losses = finetune_block(before, model.blocks[0], x, context, key, settings)
  assert float(losses[-1]) < 0.9 * float(losses[0])
  old, new = (vector_quantized_weights(b)["mlp.up_proj"] for b in (before, tuned))
  np.testing.assert_array_equal(old.indices, new.indices)
  assert new.codebooks.dtype == jnp.float16 and not np.array_equal(old.codebooks, new.codebooks)
  short, full = nnx.clone(quantized), nnx.clone(model)
  short.blocks, full.blocks = nnx.List([before]), nnx.List([model.blocks[0]])
  whole, divergence = finetune_model(short, full, tokens, key, settings)
  assert float(divergence[-1]) < 0.9 * float(divergence[0])
  embedding = lambda m: m.embed_tokens.embedding[...]
  np.testing.assert_array_equal(embedding(whole), embedding(model))


def test_tiny_run(tmp_path):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  assert len(report.claims) == 10
  rows = {row[0]: row for row in report.tables[0].rows}
  assert len(rows) == 10 and all(np.isfinite(row[4]) for row in rows.values())
  assert rows["VPTQ"][1] == 2.0 and rows["VPTQ"][2] < rows["GPTQ"][2]
  packed = report.tables[-1].rows[1]
  assert packed[2] == pytest.approx(rows["VPTQ, tuned end to end"][4], rel=1e-4)
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
