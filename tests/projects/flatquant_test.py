"""FlatQuant: vectors of the official code, invariants, bad input, and the tiny run."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.base import base_model
from common.quantization.activations import ActivationFormat, fake_quantize
from common.quantization.calibration import Streams, rtn_block, run_block
from common.quantization.equivalent import smoothquant_scale
from common.quantization.linear import quantized_weights
from common.quantization.online_transforms import (
  ClippedInput,
  TransformedAttention,
  TransformedIntegerLinear,
  TransformedMLP,
  TransformedNorm,
  clipped_fake_quantize,
  integer_transformed_linears,
)
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import Learned, ReconstructionSettings
from kernels.attention.api import attention
from projects.flatquant import config as flatquant_config
from projects.flatquant import experiment, methods, saved
from projects.flatquant.flat_block import ClipFactors, FlatQuantSettings, clip_kernel, round_kernel
from projects.flatquant.flatness import channel_magnitudes, flatness_gap
from projects.flatquant.flatquant import (
  initial_block,
  learn_block,
  make_optimizer,
  normalized_error,
  pack,
  quantize_block,
  reparametrize,
)
from projects.flatquant.kronecker import (
  factor_pair,
  multiplications,
  seconds_per_token,
)
from projects.flatquant.rotation import rotate_residual
from projects.flatquant.transforms import (
  Factors,
  SVDMatrix,
  cayley,
  hadamard,
  random_hadamard,
)
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)

README = pathlib.Path(experiment.__file__).parent / "README.md"
GOLDEN = np.load(
  pathlib.Path(__file__).parents[1] / "golden/flatquant/transform_and_quantizers.npz"
)
SIGNED, UNSIGNED = ActivationFormat(4, symmetric=True), ActivationFormat(4)
CLIP_AT_START = np.full(2, 1 / (1 + np.exp(-4.0)), np.float32)
jit_cayley = jax.jit(cayley)


# The official code.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("matrix", ["u", "v"])
def test_cayley_is_the_official_one(side, matrix):
  for raw, orthogonal in (("raw", "orth_init"), ("raw2", "orth2")):
    found = np.asarray(jit_cayley(GOLDEN[f"{raw}_linear_{matrix}_{side}"]))
    np.testing.assert_allclose(found, GOLDEN[f"{orthogonal}_linear_{matrix}_{side}"], atol=1e-6)
    np.testing.assert_allclose(found.T @ found, np.eye(len(found)), atol=1e-5)
    assert np.linalg.det(found) == pytest.approx(1, abs=1e-5)
  nothing = np.zeros((len(found), len(found)), np.float32)
  np.testing.assert_array_equal(jit_cayley(nothing), np.eye(len(found)))


def test_inverses_are_decomposed_one_at_a_time():
  """See `transforms.inverse`: batched ones may wait for each other for ever."""
  program = jax.jit(lambda raw: jax.vjp(cayley, raw)[1](raw))
  text = program.lower(jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)).as_text()
  batches = re.findall(r'custom_call @lapack_sgetrf.*num_batch_dims = "(\d)"', text)
  assert batches and set(batches) == {"0"}, batches


def golden_factors() -> Factors:
  matrices = []
  for power in (1, -1):
    for side in ("left", "right"):
      u, v = (GOLDEN[f"orth2_linear_{matrix}_{side}"] for matrix in "uv")
      matrices.append(jnp.asarray(u * GOLDEN[f"diag_{side}"] ** power @ v.T))
  return Factors(*matrices, jnp.asarray(GOLDEN["diag_scale"]))


def test_transforms_of_activations_and_weights():
  factors = golden_factors()
  both = jax.jit(lambda factors, x, kernel: (factors.apply(x), factors.apply_inverse(kernel)))
  transformed, weights = map(np.asarray, both(factors, GOLDEN["x"], GOLDEN["w"].T))
  np.testing.assert_allclose(transformed, GOLDEN["x_trans"], atol=2e-6)
  np.testing.assert_allclose(weights.T, GOLDEN["w_trans"], atol=2e-6)
  np.testing.assert_allclose(transformed @ weights, GOLDEN["y"], atol=1e-5)


def test_quantizers():
  @jax.jit
  def quantized(x, kernel):
    return (
      clipped_fake_quantize(x, SIGNED, CLIP_AT_START),
      fake_quantize(x, UNSIGNED),
      round_kernel(kernel, IntegerFormat(4, symmetric=True)).T,
    )

  found = quantized(GOLDEN["x"], GOLDEN["w"].T)
  for values, name in zip(found, ("x_q4_sym_lac4", "x_q4_asym", "w_q4_sym"), strict=True):
    np.testing.assert_allclose(values, GOLDEN[name], atol=1e-6)


def test_initial_scale():
  scale = smoothquant_scale(np.abs(GOLDEN["x"]).max(axis=0), [GOLDEN["w"].T], 0.3)
  np.testing.assert_allclose(1 / np.asarray(scale), GOLDEN["init_scale_alpha0.3"], rtol=1e-5)


def test_factor_pairs():
  for n, pair in zip(GOLDEN["dims_n"].tolist(), GOLDEN["dims"].tolist()):
    assert factor_pair(n) == tuple(pair)
  # The official search never ends on these.
  assert factor_pair(6) == (2, 3) and factor_pair(90) == (9, 10) and factor_pair(7) == (1, 7)
  assert factor_pair(64, 2) == (2, 32)
  for n in range(1, 200):
    left, right = factor_pair(n)
    assert left * right == n and left <= right


def random_matrix(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_cost_model():
  assert multiplications(4096, 64) == 4096 * 128
  assert multiplications(4096, 1) == 4096 * 4096
  speed = {"flops_per_second": 1e12, "bytes_per_second": 1e12}
  assert seconds_per_token(4096, 64, **speed) == pytest.approx(4096 * 256e-12)
  # Where memory is the limit, fusing saves the passes between.
  speed["bytes_per_second"] = 1e10
  assert seconds_per_token(64, 8, **speed) == pytest.approx(64 * 2.5e-10)
  assert seconds_per_token(64, 8, **speed, fused=False) == pytest.approx(64 * 10.5e-10)


def test_a_learned_rotation_starts_as_hadamard_and_stays_orthogonal():
  rotation = SVDMatrix(12, jax.random.key(0), rotation=True)
  matrices = nnx.jit(lambda rotation: rotation.matrices())
  start, inverse_transpose = map(np.asarray, matrices(rotation))
  np.testing.assert_allclose(start, random_hadamard(jax.random.key(0), 12), atol=1e-6)
  np.testing.assert_array_equal(start, inverse_transpose)
  # Whatever happens to what it does not use.
  rotation.raw[...], rotation.sigma[...] = random_matrix(1, 2, 12, 12), random_matrix(2, 12)
  moved = np.asarray(matrices(rotation)[0])
  np.testing.assert_allclose(moved @ moved.T, np.eye(12), atol=1e-5)
  assert np.abs(moved - start).max() > 0.1


@pytest.mark.parametrize("n", [1, 2, 7, 12, 16, 24, 86, 384])
def test_hadamard_matrices_are_orthogonal_and_flat(n):
  matrix = hadamard(n)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-5)
  flat = n not in (7, 86)  # A cosine transform of the odd factor.
  assert np.abs(matrix).max() * np.sqrt(n) <= (1.001 if flat else 1.4143)


def test_flatness():
  assert float(flatness_gap(np.full(4, 3.0, np.float32))) == pytest.approx(0, abs=1e-6)
  one_hot = jax.jit(channel_magnitudes)(np.float32([[5, 0, 0, 0]]))
  np.testing.assert_array_equal(one_hot, [5, 0, 0, 0])
  assert float(flatness_gap(one_hot)) == pytest.approx(1)


# Blocks.


@pytest.fixture(scope="module")
def small_block():
  """The first block of a random decoder with grouped queries, its inputs and its context."""
  model = random_decoder(ARCHITECTURES["qwen2, grouped-query"])
  x, context = model.stem(jnp.asarray(random_tokens(model.config)))
  return model.blocks[0], x, context


# The tiny run's model, tokens and settings, whose programs the tests share.


@pytest.fixture(scope="module")
def tiny():
  return flatquant_config.get_config("tiny")


@pytest.fixture(scope="module")
def draw(tiny):
  return experiment.make_draw(tiny, base_model(tiny.model), 0, True)


@pytest.fixture(scope="module")
def block_and_inputs(draw):
  return draw.model.blocks[0], *draw.model.stem(draw.tokens)


@pytest.mark.parametrize("matrices", ["svd", "inverse"])
def test_transforms_leave_the_function(matrices, small_block):
  block, x, context = small_block
  settings = FlatQuantSettings(clip=False, matrices=matrices)
  flat = initial_block(block, x, context, jax.random.key(0), settings)
  rng = np.random.default_rng(0)
  noise = lambda leaf: leaf * np.exp(0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
  learned = jax.device_get(nnx.state(flat, Learned))
  nnx.update(flat, jax.tree.map(lambda leaf: jnp.asarray(noise(leaf)), learned))
  expected = run_block(block, x, context)
  bound = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(run_block(flat, x, context), expected, atol=bound)
  folded = reparametrize(flat, settings)
  np.testing.assert_allclose(run_block(folded, x, context), expected, atol=bound)
  kernel = folded.attention.v_proj.kernel[...]
  assert kernel.dtype == jnp.float32 and not np.allclose(kernel, block.attention.v_proj.kernel[...])


def test_no_transforms_and_no_clipping_are_rounding_to_nearest(block_and_inputs, tiny):
  block, x, context = block_and_inputs
  settings = methods.settings_of(tiny, "W4A4KV4", sites=(), scale=False, clip=False)
  packed = pack(initial_block(block, x, context, jax.random.key(0), settings), settings)
  expected = methods.round_activations(methods.rtn_block(block, settings.weights), settings)
  found = quantized_weights(packed)
  assert len(found) == 7
  for path, weight in quantized_weights(expected).items():
    np.testing.assert_array_equal(found[path].dequantize(), weight.dequantize())
  np.testing.assert_array_equal(run_block(packed, x, context), run_block(expected, x, context))


def test_integer_products_equal_the_fake_quantized_block(block_and_inputs, tiny):
  block, x, context = block_and_inputs
  settings = methods.settings_of(tiny, "W8A8KV4", initial_clip=2.0)
  flat = initial_block(block, x, context, jax.random.key(0), settings)
  for i, clips in enumerate(flat.input_clips.values()):
    clips.logits[...] = jnp.array([2.0, 0.5 + 0.25 * i])  # The readers of a transform differ.
  packed = pack(flat, settings)
  integer = nnx.clone(packed)
  integer_transformed_linears(integer)
  kinds = [type(module) for _, module in nnx.iter_modules(integer)]
  assert kinds.count(TransformedIntegerLinear) == 7
  assert ClippedInput not in kinds and TransformedNorm not in kinds
  assert integer.mlp.transform is None and isinstance(integer.mlp, TransformedMLP)
  x_in = np.asarray(x)
  expected = run_block(packed, x, context) - x_in
  error = np.abs(run_block(integer, x, context) - x_in - expected)
  # A code that goes the other way moves an output by a step of 1/127 of a token's largest input;
  # without one only the order of float32 sums differs.
  size = np.abs(expected).max()
  assert error.max() < 1e-2 * size and np.median(error) < 1e-5 * size
  # There are no integer products of 5 bits: nothing changes.
  unsupported = nnx.clone(packed)
  for _, layer in nnx.iter_modules(unsupported):
    if isinstance(layer, ClippedInput):
      layer.format = ActivationFormat(5, symmetric=True)
  integer_transformed_linears(unsupported)
  kinds = [type(module) for _, module in nnx.iter_modules(unsupported)]
  assert kinds.count(ClippedInput) == 7 and kinds.count(TransformedNorm) == 2


def test_keys_and_queries_keep_their_products():
  q, k, v = (random_matrix(i, 2, heads, 5, 8) for i, heads in enumerate((4, 2, 2)))
  matrix, over_heads = random_matrix(3, 8, 8), random_matrix(4, 4, 4)
  inverse_transpose = jnp.asarray(np.linalg.inv(matrix).T)
  attend = TransformedAttention((matrix, inverse_transpose), over_heads, {}, {})
  both = nnx.jit(lambda attend, *qkv: (attend(*qkv), attention(*qkv)))
  found, plain = both(attend, q, k, v)
  expected = np.einsum("bhsd,hg->bgsd", plain, over_heads)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_clipping_factors():
  kernel = random_matrix(0, 16, 3)
  clip = ClipFactors((3,), FlatQuantSettings())
  clipped_by = nnx.jit(lambda clip, kernel: clip_kernel(kernel, clip.factors()))
  clipped = np.asarray(clipped_by(clip, kernel))
  np.testing.assert_allclose(clipped.max(axis=0) / np.max(kernel, axis=0), 0.982, atol=1e-4)
  open_clip = ClipFactors((3,), FlatQuantSettings(initial_clip=jnp.inf))
  np.testing.assert_array_equal(clipped_by(open_clip, kernel), kernel)
  unused = ClipFactors((3,), FlatQuantSettings(clip=False))
  np.testing.assert_array_equal(unused.factors(), 1.0)


def test_the_loss_keeps_the_direction_of_the_gradient():
  target, output = random_matrix(0, 4, 3), random_matrix(1, 4, 3)
  plain = lambda y: jnp.mean((y - target) ** 2)
  normalized = lambda y: normalized_error(None, y, target, 0.0)
  both = jax.jit(lambda y: [jax.value_and_grad(loss)(y) for loss in (normalized, plain)])
  (loss, gradient), (plain_loss, plain_gradient) = both(output)
  assert float(loss) == pytest.approx(1)
  np.testing.assert_allclose(gradient, plain_gradient / plain_loss, rtol=1e-5)


def test_the_optimizer_has_two_rates_and_decay():
  learned = {"transforms": np.ones(3, np.float32), "input_clips": np.full(2, 4.0, np.float32)}
  optimizer = make_optimizer(1e-3, 10)
  assert optimizer is make_optimizer(1e-3, 10)
  gradient = jax.tree.map(lambda p: np.full_like(p, 0.5), learned)
  update = lambda gradient, learned: optimizer.update(gradient, optimizer.init(learned), learned)
  updates, _ = jax.jit(update)(gradient, learned)
  # Adam's first step is the rate, and decay adds the rate times 0.01 times the variable.
  np.testing.assert_allclose(updates["transforms"], -1e-3 * (1 + 0.01), rtol=1e-4)
  np.testing.assert_allclose(updates["input_clips"], -1e-2 * (1 + 0.04), rtol=1e-4)


def test_the_rotated_model_is_the_same_function():
  model = random_decoder(ARCHITECTURES["qwen2, grouped-query"])
  rotated = rotate_residual(model, random_hadamard(jax.random.key(0), model.config.hidden_size))
  tokens = jnp.asarray(random_tokens(model.config))
  expected = logits(model, tokens)
  bound = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(logits(rotated, tokens), expected, atol=bound)


# Bad input.


@pytest.mark.parametrize("architecture", ["opt", "opt, post-norm", "neox"])
def test_other_architectures_are_refused(architecture):
  block = random_decoder(ARCHITECTURES[architecture]).blocks[0]
  with pytest.raises(UserError, match="a norm before a gated MLP"):
    initial_block(block, None, None, jax.random.key(0), FlatQuantSettings())


def test_bad_settings_and_tensors_are_named(block_and_inputs):
  block, x, context = block_and_inputs
  start = lambda settings, block=block, x=x: initial_block(
    block, x, context, jax.random.key(0), settings
  )
  width = block.attention.q_proj.in_features
  with pytest.raises(UserError, match=f"left_size=5 does not divide {width} channels"):
    start(FlatQuantSettings(left_size=5))
  with pytest.raises(UserError, match="group_size=5 does not divide"):
    start(FlatQuantSettings(IntegerFormat(4, 5)))
  with pytest.raises(UserError, match="the calibration activations: NaN or infinite"):
    start(FlatQuantSettings(), x=jnp.full_like(x, jnp.nan))
  broken = nnx.clone(block)
  kernel = np.array(broken.mlp.up_proj.kernel[...])
  kernel[0, 0] = np.inf
  broken.mlp.up_proj.kernel[...] = jnp.asarray(kernel)
  with pytest.raises(UserError, match="mlp.up_proj.kernel: NaN or infinite"):
    start(FlatQuantSettings(), block=broken)
  for changes, message in (
    ({"sites": ("P_x",)}, "no transform 'P_x'"),
    ({"matrices": "qr"}, "matrices='qr'"),
    ({"weights": IntegerFormat(4, -1, 1)}, "axis=1"),
    ({"keys": ActivationFormat(4, "per_tensor")}, "per_token"),
  ):
    with pytest.raises(UserError, match=message):
      FlatQuantSettings(**changes)
  with pytest.raises(UserError, match="the setting 'W4' is unknown"):
    methods.settings_of(flatquant_config.get_config("tiny"), "W4")


# The tiny run.


@pytest.fixture(scope="module")
def tiny_run(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("flatquant")
  return experiment.run(tiny, workdir), workdir


def test_tiny_run(tiny_run):
  report, workdir = tiny_run
  rows = {row[0]: row for row in report.tables[0].rows}
  assert set(rows) == {
    *("full precision", "RTN", "SmoothQuant", "QuaRot"),
    *("learned rotation", "LT", "LT + PS", "FlatQuant"),
  }
  assert all(np.isfinite(row[1]) for row in rows.values())
  assert rows["FlatQuant"][4] < rows["RTN"][4]
  assert len(report.claims) == 12
  for figure in report.figures:
    assert (workdir / figure.path).stat().st_size > 0


def test_a_second_run_finds_the_measurements(tiny, tiny_run, monkeypatch):
  def quantized_again(*args, **options):
    raise AssertionError("quantized again")

  for name in ("quantize_model", "learn_model", "fixed_blocks"):
    monkeypatch.setattr(methods, name, quantized_again)
  report, workdir = tiny_run
  assert experiment.run(tiny, workdir) == report


@pytest.fixture(scope="module")
def learned(tiny, block_and_inputs):
  """(block, inputs, context, learned block, log, arguments) of the tiny run's first block."""
  block, x, context = block_and_inputs
  settings = methods.settings_of(tiny, "W4A4KV4")
  steps = ReconstructionSettings(tiny.epochs, tiny.batch_size, keep_best=False)
  key = jax.random.fold_in(jax.random.key(0), 0)
  optimizer = make_optimizer(
    tiny.learning_rate, tiny.epochs, clip_rate_factor=tiny.clip_rate_factor, warmup_steps=0
  )
  arguments = {"settings": settings, "reconstruction": steps, "optimizer": optimizer}
  flat, log = learn_block(block, x, context, key, **arguments)
  return block, x, context, flat, log, arguments


def test_learning_lowers_the_error_and_leaves_the_weights(learned):
  block, x, context, flat, log, _ = learned
  assert float(log.after) < float(log.before)
  np.testing.assert_allclose(log.losses, 1.0, rtol=1e-5)  # Divided by its own value.
  kernel = block.attention.q_proj.kernel[...]
  np.testing.assert_array_equal(flat.block.attention.q_proj.kernel[...], kernel)


def test_quantize_block_is_learning_then_packing(learned):
  block, x, context, flat, log, arguments = learned
  expected = pack(flat, arguments["settings"])
  for given in (x, Streams(x, x)):
    found = quantize_block(0, block, given, context, key=jax.random.key(0), **arguments)
    for path, weight in quantized_weights(expected).items():
      np.testing.assert_array_equal(quantized_weights(found)[path].values, weight.values)
  # The student that was trained is the packed block, but for roundings of float32 at ties.
  target = run_block(block, x, context)
  error = float(np.mean((run_block(expected, x, context) - np.asarray(target)) ** 2))
  assert error == pytest.approx(float(log.after), rel=0.05)
  with pytest.raises(UserError, match="finisher='awq'"):
    pack(flat, arguments["settings"], "awq")


def test_the_readme_s_code_finishes_a_saved_run(tiny_run, draw, learned):
  """The saved transforms are those learned, the saved blocks their folds, which are rounded."""
  code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
  names = {"model": draw.model, "tokens": draw.tokens, "workdir": tiny_run[1]}
  exec(code.replace("natural", "outlier"), names)
  settings, flats = names["settings"], names["learned"]
  first = (nnx.state(flat, Learned) for flat in (flats[0], learned[3]))
  jax.tree.map(np.testing.assert_array_equal, *first)
  for flat, folded, packed in zip(flats, names["folded"], names["quantized"].blocks, strict=True):
    expected = nnx.state(reparametrize(flat, settings))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(folded), expected)
    rounded = rtn_block(folded, settings.weights)
    flat.quantize_inputs(rounded)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(packed), nnx.state(rounded))


def test_other_files_are_not_loaded(learned, tmp_path):
  flat = learned[3]
  saved.save_learned(tmp_path / "learned", [flat])
  with pytest.raises(UserError, match="nothing for blocks.1"):
    saved.load_learned(tmp_path / "learned", [flat, flat])
  with pytest.raises(UserError, match="too many"):
    saved.load_learned(tmp_path / "learned", [])
  (tmp_path / "learned").write_bytes(b"1234")
  with pytest.raises(UserError, match="not a file of saved transforms"):
    saved.load_learned(tmp_path / "learned", [flat])
  with pytest.raises(UserError, match="does not exist"):
    saved.load_learned(tmp_path / "none", [flat])
