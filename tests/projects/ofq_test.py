"""OFQ: vectors of the reference code, invariants, the integer model, the tiny run."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from common.errors import UserError
from common.models.surgery import get_module
from common.models.vit import VisionTransformer, VisionTransformerConfig
from projects.ofq import config, experiment, imagenet, ofq, oscillation, training
from projects.ofq.integer_model import integer_tensors, to_integer
from projects.ofq.ofq import QATSettings

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "ofq" / "statsq_lsq_cga.npz")
VIT = VisionTransformerConfig(
  image_size=(4, 4),
  patch_size=(2, 2),
  hidden_size=8,
  intermediate_size=16,
  num_layers=1,
  num_heads=2,
  num_channels=1,
  norm_eps=1e-6,
  distillation_token=True,
  head="distilled",
  labels=("a", "b", "c"),
)
IMAGES = jax.random.normal(jax.random.key(0), (4, 4, 4, 1))
OFQ = QATSettings()
LSQ = QATSettings(weight_quantizer="lsq", qkr=False)
QVIT = QATSettings(weight_quantizer="lsq", qkr=False, rectify_queries_and_keys=True)


@functools.cache
def full_precision():
  return nnx.jit(lambda: VisionTransformer(VIT, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def teacher():
  return full_precision()


@functools.cache
def quantized(settings=OFQ):
  model = ofq.quantize(full_precision(), settings)
  ofq.calibrate(model, IMAGES)
  return model


# StatsQ.


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_statsq_of_the_reference_code(bits):
  w = jnp.asarray(GOLDEN["w"]).T
  rounded, vjp = jax.vjp(lambda w: ofq.statsq(w, bits), w)
  np.testing.assert_allclose(rounded.T, GOLDEN[f"statsq_b{bits}"], atol=1e-6)
  (grad,) = vjp(jnp.asarray(GOLDEN[f"statsq_b{bits}_cot"]).T)
  np.testing.assert_array_equal(grad.T, GOLDEN[f"statsq_b{bits}_grad"])
  three = ofq.statsq(jnp.asarray(GOLDEN["w3"]), bits, axis=(0, 2))
  if f"statsq3d_b{bits}" in GOLDEN:
    np.testing.assert_allclose(three, GOLDEN[f"statsq3d_b{bits}"], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3])
def test_statsq_has_exactly_two_to_the_bits_levels_and_follows_scale(bits):
  w = jnp.linspace(-3, 3, 1001)[:, None]
  scale, n = ofq.statsq_scale(w), 2 ** (bits - 1)
  np.testing.assert_allclose(scale, 2 * jnp.abs(w).mean(axis=0, keepdims=True), rtol=1e-6)
  levels = np.unique(np.round(np.asarray(ofq.statsq(w, bits) / scale) * n - 0.5, 4))
  np.testing.assert_allclose(levels, np.arange(-n, n), atol=1e-3)
  np.testing.assert_allclose(ofq.statsq(4 * w, bits), 4 * ofq.statsq(w, bits), rtol=1e-6)
  # The identity, for clipped weights too; no gradient goes through s.
  np.testing.assert_array_equal(jax.grad(lambda w: ofq.statsq(w, bits).sum())(w), np.ones_like(w))


def test_many_bits_are_almost_full_precision():
  w = jax.random.normal(jax.random.key(1), (200, 3))
  scale = ofq.statsq_scale(w)
  error = jnp.abs(ofq.statsq(w, 8) - w) / scale
  assert float(jnp.max(error, where=jnp.abs(w) < scale, initial=0)) < 0.01


# LSQ.


@pytest.mark.parametrize("unsigned", [0, 1])
def test_lsq_per_token_of_the_reference_code(unsigned):
  x = jnp.abs(jnp.asarray(GOLDEN["x"])) if unsigned else jnp.asarray(GOLDEN["x"])
  golden = {k: GOLDEN[f"lsq_pos{unsigned}_{k}"] for k in ("out", "s", "grad_s", "grad_x", "cot")}
  quantizer = ofq.ActivationQuantizer(2, (5, 1), None, signed=not unsigned)
  quantizer.calibrating = True
  quantizer(x)
  quantizer.calibrating = False
  np.testing.assert_allclose(quantizer.step[...][:, 0], golden["s"], rtol=1e-5)
  graphdef, params = nnx.split(quantizer)
  out, vjp = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x), params, x)
  np.testing.assert_allclose(out, golden["out"], atol=1e-5)
  grad, grad_x = vjp(jnp.asarray(golden["cot"]))
  # Sums of 24 terms that nearly cancel: relative rounding grows to 1e-5.
  np.testing.assert_allclose(grad["step"][...][:, 0], golden["grad_s"], rtol=1e-4)
  np.testing.assert_allclose(grad_x, golden["grad_x"], atol=1e-5)


def test_lsq_weights_of_the_reference_code():
  w = jnp.asarray(GOLDEN["w"]).T
  graphdef, params = nnx.split(ofq.WeightQuantizer(w, 3, "lsq"))
  np.testing.assert_allclose(params["step"][...][0], GOLDEN["lsqw_s"], rtol=1e-6)
  out, vjp = jax.vjp(lambda p, w: nnx.merge(graphdef, p)(w), params, w)
  grad, grad_w = vjp(jnp.asarray(GOLDEN["lsqw_cot"]).T)
  np.testing.assert_allclose(out.T, GOLDEN["lsqw_out"], atol=1e-6)
  np.testing.assert_allclose(grad["step"][...][0], GOLDEN["lsqw_grad_s"], rtol=1e-4)
  np.testing.assert_allclose(grad_w.T, GOLDEN["lsqw_grad_w"], atol=1e-6)


def test_offsets_are_added_before_and_after_rounding():
  quantizer = ofq.ActivationQuantizer(2, (1,), 3)
  quantizer.offset_before[...] = jnp.array([0.4, 0.0, -5.0])
  quantizer.offset_after[...] = jnp.array([10.0, 20.0, 30.0])
  np.testing.assert_allclose(quantizer(jnp.full((1, 3), 0.2)), [[11.0, 20.0, 28.0]])


# Oscillation.


def test_the_tracker_of_the_reference_code():
  sequence = jnp.asarray(GOLDEN["osc_seq"])
  start = oscillation.init_oscillation(sequence[0])
  end, turned = jax.lax.scan(oscillation.update_oscillation, start, sequence[1:])
  np.testing.assert_array_equal(turned.sum(axis=0), GOLDEN["osc_total"])
  np.testing.assert_allclose(end.frequency, GOLDEN["osc_ema"], rtol=1e-5)


def test_the_tracker_counts_turns_and_not_drift():
  sequence = jnp.array([[0, 0], [1, 1], [0, 1], [1, 2]])
  start = oscillation.init_oscillation(sequence[0])
  end, turned = jax.lax.scan(oscillation.update_oscillation, start, sequence[1:])
  np.testing.assert_array_equal(turned, [[False, False], [True, False], [True, False]])
  assert float(oscillation.oscillating_share({"w": end})) == 0.5


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("boundary_range", [0.005, 0.1])
def test_the_annealing_mask_of_the_reference_code(bits, boundary_range):
  w = jnp.asarray(GOLDEN["w"]).T
  position = ofq.statsq_position(w, ofq.statsq_scale(w), bits)
  frozen = ~ofq.near_threshold(position, bits, boundary_range)
  np.testing.assert_array_equal(frozen.T, GOLDEN[f"cga_freeze_b{bits}_br{boundary_range}"] != 0)


def test_extremes_of_the_boundary_range():
  position = jnp.array([-2.5, -1.5, -1.2, -0.5, 0.0, 0.3, 0.5, 1.0, 1.4999])
  exact = [False, True, False, True, False, False, True, False, False]
  np.testing.assert_array_equal(ofq.near_threshold(position, 2, 0.0), exact)
  # Between the outer levels nothing is further away than 1/2; a clipped weight can be.
  near = ofq.near_threshold(position, 2, 0.5)
  np.testing.assert_array_equal(near, (position >= -2) & (position <= 1))


def test_annealing_leaves_frozen_weights_bit_for_bit():
  graphdef, params = nnx.split(quantized())
  adamw = optax.adamw(1e-2, weight_decay=0.1)
  optimizer = oscillation.confidence_guided_annealing(adamw, graphdef, 0.05)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    return optax.apply_updates(params, updates), state

  before, state = step(
    params, jax.jit(optimizer.init)(params)
  )  # Not annealing yet: momentum gathers.
  frozen_share = []
  after, _ = step(before, optax.tree.set(state, annealing=jnp.array(True)))
  old, new = nnx.merge(graphdef, before), nnx.merge(graphdef, after)
  for path, layer in ofq.block_layers(old).items():
    if isinstance(layer, ofq.QueryKeyProduct):
      assert not np.array_equal(layer.query[...], get_module(new, path).query[...])
      continue
    trained = np.asarray(oscillation.not_confident(layer, 0.05))
    same = np.asarray(layer.latent() == get_module(new, path).latent())
    np.testing.assert_array_equal(same, ~trained)
    frozen_share.append(same.mean())
  assert 0.5 < np.mean(frozen_share) < 1
  assert not np.array_equal(old.class_token[...], new.class_token[...])


def test_iterative_freezing_fixes_what_flips_at_its_mean_level():
  graphdef, params = nnx.split(quantized(LSQ))
  path = "blocks.0.mlp.up_proj"
  sgd = oscillation.track_oscillations(optax.sgd(1.0), graphdef, lambda step: 0.005)

  @jax.jit
  def step(params, state, target):
    # A gradient that takes the kernel to the target in one step.
    model = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, params))
    kernel = get_module(nnx.merge(graphdef, params), path).latent()
    get_module(model, path).layer.kernel[...] = kernel - target
    updates, state = sgd.update(nnx.split(model)[1], state, params)
    return optax.apply_updates(params, updates), state

  layer = lambda params: get_module(nnx.merge(graphdef, params), path)
  scale = layer(params).weight_quantizer.scale(layer(params).latent())
  low = jnp.zeros_like(layer(params).latent())
  high = low.at[0].set(scale[0])  # The first row flips between levels 0 and 1.
  params, state = step(params, jax.jit(sgd.init)(params), low)
  state = state._replace(freezing=jnp.array(True))
  for target in (high, low, high, low):
    params, state = step(params, state, target)
  frozen = np.asarray(state.frozen[path])
  assert frozen[0].all() and not frozen[1:].any()
  level = jnp.round(state.oscillation[path].mean_code)
  np.testing.assert_allclose(layer(params).latent()[0], (scale * level)[0], atol=1e-6)


def test_dampening_pulls_weights_to_their_levels():
  model = quantized(LSQ)
  path = "blocks.0.mlp.up_proj"
  graphdef, params = nnx.split(model)
  loss = lambda params: oscillation.dampening_loss(nnx.merge(graphdef, params))
  grad = jax.jit(jax.grad(loss))(params)
  layer = get_module(model, path)
  w, quantizer = layer.latent(), layer.weight_quantizer
  scale = quantizer.scale(w)
  inside = (w > -2 * scale) & (w < scale)
  expected = jnp.where(inside, 2 * (w - jnp.round(w / scale) * scale), 0)
  found = get_module(nnx.merge(graphdef, grad), path)
  np.testing.assert_allclose(found.latent(), expected, atol=1e-6)
  np.testing.assert_array_equal(found.weight_quantizer.step[...], jnp.zeros_like(scale))


# The model.


@functools.partial(nnx.jit, static_argnums=3)
def run(attention, x, context, settings=None):
  if settings is not None:
    attention = ofq.QATAttention(attention, 6, settings)
  return attention(x, context)[0]


def test_qkr_without_rounding_is_attention(teacher, monkeypatch):
  model = nnx.clone(teacher)
  attention = model.blocks[0].attention
  for projection in (attention.q_proj, attention.k_proj):
    projection.bias[...] = jnp.zeros_like(projection.bias[...])
  attention.v_proj.bias[...] = jnp.arange(8.0)
  x = jax.random.normal(jax.random.key(2), (2, 6, 8))
  _, context = model.stem(IMAGES[:2])
  expected = run(attention, x, context)
  for kind in (ofq.WeightQuantizer, ofq.ActivationQuantizer):
    monkeypatch.setattr(kind, "__call__", lambda self, x: x)
  for settings in (QATSettings(), QATSettings(qkr=False)):
    found = run(attention, x, context, settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_reach_queries_and_keys_through_their_product():
  product = ofq.QueryKeyProduct(
    jax.random.normal(jax.random.key(0), (8, 8)),
    jax.random.normal(jax.random.key(1), (8, 8)),
    2,
    QATSettings(),
  )
  x, cotangent = jnp.eye(8), jax.random.normal(jax.random.key(2), (8, 16))

  def gradient(boundary_range):
    product.boundary_range = boundary_range
    graphdef, params = nnx.split(product)
    return jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x) * cotangent))(params)

  key = product.key[...].reshape(8, 2, 4)
  masked = ofq.near_threshold(product.weight_quantizer.position(product.latent()), 2, 0.1)
  for boundary_range, weights in ((None, cotangent), (0.1, cotangent * masked)):
    expected = jnp.einsum("jhc,jhd->chd", weights.reshape(8, 2, 8), key).reshape(8, 8)
    np.testing.assert_allclose(gradient(boundary_range)["query"][...], expected, atol=1e-5)


@pytest.mark.parametrize(
  "settings", [QATSettings(3, 3), QVIT, QATSettings(4, 4, learnable_offsets=False)], ids=str
)
def test_the_integer_model_computes_the_same(settings):
  model = nnx.clone(quantized(settings))
  for _, quantizer in nnx.iter_modules(model):
    if isinstance(quantizer, ofq.ActivationQuantizer) and quantizer.offset_after is not None:
      shape = quantizer.offset_after.shape
      quantizer.offset_after[...] = 0.1 * jax.random.normal(jax.random.key(0), shape)
  integer = nnx.jit(to_integer)(model)
  expected, found = nnx.jit(lambda a, b: (a(IMAGES).logits, b(IMAGES).logits))(model, integer)
  # Sums in another order; an activation on a tie could round the other way, and none does.
  np.testing.assert_allclose(found, expected, atol=1e-4)
  tensors = integer_tensors(integer)
  codes = tensors["blocks.0.mlp.up_proj.codes"]
  assert codes.dtype == jnp.int8 and len(np.unique(codes)) <= 2**settings.weight_bits
  assert "blocks.0.mlp.up_proj.layer.kernel" not in tensors


def test_distillation_loss_by_hand():
  logits = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.3, -1.0, 0.0]])
  teacher = jnp.array([[2.0, 0.0, 1.0]])
  log_p = [np.asarray(jax.nn.log_softmax(x)) for x in logits]
  soft = -(np.asarray(jax.nn.softmax(teacher)) * log_p[1]).sum()
  target = np.array([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3])
  found = training.distillation_loss(*logits, teacher, jnp.array([1]), 0.1)
  np.testing.assert_allclose(found, [soft - (target * log_p[0]).sum()], rtol=1e-5)


def test_heads_are_apart_in_training_and_averaged_at_evaluation(teacher):
  both = nnx.jit(lambda model: (training.head_logits(model, IMAGES), model(IMAGES).logits))
  (by_class, by_distillation), logits = both(teacher)
  assert not np.allclose(by_class, by_distillation)
  np.testing.assert_allclose((by_class + by_distillation) / 2, logits, atol=1e-6)


def test_guidance_is_zero_for_equal_patterns():
  x = jax.random.normal(jax.random.key(0), (2, 2, 5, 4))
  loss = lambda student: training.guidance_loss([student, x], [x, x]).sum()
  loss = jax.jit(loss)
  np.testing.assert_allclose(loss(3 * x), 0, atol=1e-4)  # Patterns are normalised.
  assert float(loss(jnp.flip(x, axis=2))) > 0.1
  assert np.isfinite(jax.grad(loss)(x)).all()


def test_bad_input_is_refused_before_any_work(teacher):
  with pytest.raises(UserError, match="weight_bits=1 is not supported; supported: 2 to 8"):
    QATSettings(weight_bits=1)
  with pytest.raises(UserError, match="weight_quantizer='pact' is not supported"):
    QATSettings(weight_quantizer="pact")
  with pytest.raises(UserError, match="no queries and keys to rectify"):
    QATSettings(rectify_queries_and_keys=True)
  with pytest.raises(UserError, match="vision transformers .* not Linear"):
    ofq.quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), QATSettings())
  with pytest.raises(UserError, match="quantized already"):
    ofq.quantize(quantized(), QATSettings())
  broken = nnx.clone(teacher)
  broken.blocks[0].mlp.up_proj.kernel[...] = (
    broken.blocks[0].mlp.up_proj.kernel[...].at[0, 0].set(jnp.nan)
  )
  with pytest.raises(UserError, match="blocks.0.mlp.up_proj.kernel: NaN"):
    ofq.quantize(broken, QATSettings())
  with pytest.raises(UserError, match="the calibration activations: NaN"):
    ofq.calibrate(quantized(), IMAGES.at[0].set(jnp.nan))


def test_a_wrong_config_is_refused():
  for field, value, message in [
    ("methods", ("LSQ", "PACT"), "unknown methods PACT; there are LSQ"),
    ("cga_qk", "both", "cga_qk='both' is not supported"),
    ("bits", 9, "weight_bits=9"),
    ("annealing_epochs", 0, "must be at least 1"),
    ("patch_size", 3, "patch_size=3 must divide"),
    ("batch_size", 2000, "batch_size=2000; expected 1 to 1200"),
  ]:
    wrong = config.get_config("tiny")
    wrong[field] = value
    with pytest.raises(UserError, match=message):
      experiment.run(wrong, pathlib.Path("unused"))
  paper = config.get_config("paper")
  with pytest.raises(UserError, match="no checkpoint directory"):
    experiment.run(paper, pathlib.Path("unused"))


def test_images_in_folders(tmp_path):
  for name, value in (("cat", 0), ("dog", 255)):
    (tmp_path / "train" / name).mkdir(parents=True)
    Image.new("RGB", (20, 12), (value,) * 3).save(tmp_path / "train" / name / "1.png")
  images = imagenet.load_images(f"folder:{tmp_path}", "train")
  assert images.classes == ["cat", "dog"] and [label for _, label in images] == [0, 1]
  centred = imagenet.centre_crop(images[1], size=(8, 8))
  white = (1 - imagenet.MEAN) / imagenet.STD
  np.testing.assert_allclose(centred["images"], np.broadcast_to(white, (8, 8, 3)), rtol=1e-5)
  rng = np.random.default_rng(0)
  drawn = [imagenet.augment(images[0], rng, size=(8, 8), random_erasing=0.5) for _ in range(20)]
  black = np.broadcast_to(-imagenet.MEAN / imagenet.STD, (8, 8, 3))
  erased = [not np.allclose(d["images"], black) for d in drawn]
  assert 3 < sum(erased) < 17 and drawn[0]["images"].dtype == np.float32
  with pytest.raises(UserError, match="no folder"):
    imagenet.load_images(f"folder:{tmp_path}", "val")
  with pytest.raises(UserError, match="unknown data 'mnist'"):
    imagenet.load_images("mnist", "train")


def test_tiny_run(tmp_path):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  accuracy, layers = report.tables
  assert [row[0] for row in accuracy.rows] == [
    "full precision",
    "StatsQ + QKR",
    "StatsQ + QKR + CGA",
  ]
  assert accuracy.rows[0][2] > 20  # Chance is 10.
  # The two continue from the same state.
  assert accuracy.rows[1][5] == accuracy.rows[2][5]
  assert all((tmp_path / figure.path).is_file() for figure in report.figures)
  assert len(report.claims) == 5 and "query_key" in [c.name for c in layers.columns]
