"""OFQ: vectors of the reference code, invariants, the integer model, the tiny run."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.errors import UserError
from common.models.surgery import get_module
from common.models.vit import VisionTransformer, VisionTransformerConfig
from projects.ofq import config, digits_runs, experiment, ofq, oscillation, training
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


def random(seed, *shape):
  """Standard normal numbers, float32."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES = jnp.asarray(random(0, 4, 4, 4, 1))
OFQ = QATSettings()
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


# `bits` and `boundary_range` are traced: one program serves all.
statsq = jax.jit(ofq.statsq, static_argnames="axis")
statsq_scale = jax.jit(ofq.statsq_scale)
near_threshold = jax.jit(ofq.near_threshold)


@nnx.jit
def call(module, x):
  return module(x)


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(function, inputs, cotangent):
  output, vjp = jax.vjp(function, *inputs)
  return output, *vjp(cotangent)


def apply(graphdef, params, x):
  return nnx.merge(graphdef, params)(x)


# StatsQ.


@jax.jit
def statsq_and_gradient(w, bits, cotangent):
  rounded, vjp = jax.vjp(lambda w: ofq.statsq(w, bits), w)
  return rounded, vjp(cotangent)[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_statsq_of_the_reference_code(bits):
  cotangent = GOLDEN[f"statsq_b{bits}_cot"].T
  rounded, grad = map(np.asarray, statsq_and_gradient(GOLDEN["w"].T, bits, cotangent))
  np.testing.assert_allclose(rounded.T, GOLDEN[f"statsq_b{bits}"], atol=1e-6)
  np.testing.assert_array_equal(grad.T, GOLDEN[f"statsq_b{bits}_grad"])
  if f"statsq3d_b{bits}" in GOLDEN:
    three = statsq(GOLDEN["w3"], bits, axis=(0, 2))
    np.testing.assert_allclose(three, GOLDEN[f"statsq3d_b{bits}"], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3])
def test_statsq_has_exactly_two_to_the_bits_levels_and_follows_scale(bits):
  w = np.linspace(-3, 3, 1001, dtype=np.float32)[:, None]
  scale, n = np.asarray(statsq_scale(w)), 2 ** (bits - 1)
  # A float32 sum of 1001 terms in another order.
  np.testing.assert_allclose(scale, 2 * np.abs(w).mean(axis=0, keepdims=True), rtol=1e-5)
  rounded, grad = map(np.asarray, statsq_and_gradient(w, bits, np.ones_like(w)))
  levels = np.unique(np.round(rounded / scale * n - 0.5, 4))
  np.testing.assert_allclose(levels, np.arange(-n, n), atol=1e-3)
  rounded_of_four, _ = statsq_and_gradient(4 * w, bits, np.ones_like(w))
  np.testing.assert_allclose(rounded_of_four, 4 * rounded, rtol=1e-6)
  # The identity, for clipped weights too; no gradient goes through s.
  np.testing.assert_array_equal(grad, np.ones_like(w))


def test_many_bits_are_almost_full_precision():
  w = random(1, 200, 3)
  scale = np.asarray(statsq_scale(w))
  error = np.abs(statsq(w, 8) - w) / scale
  assert error[np.abs(w) < scale].max() < 0.01


# LSQ.


@pytest.mark.parametrize("unsigned", [0, 1])
def test_lsq_per_token_of_the_reference_code(unsigned):
  x = np.abs(GOLDEN["x"]) if unsigned else GOLDEN["x"]
  golden = {k: GOLDEN[f"lsq_pos{unsigned}_{k}"] for k in ("out", "s", "grad_s", "grad_x", "cot")}
  quantizer = ofq.ActivationQuantizer(2, (5, 1), None, signed=not unsigned)
  quantizer.calibrating = True
  call(quantizer, x)
  quantizer.calibrating = False
  np.testing.assert_allclose(np.asarray(quantizer.step[...])[:, 0], golden["s"], rtol=1e-5)
  graphdef, params = nnx.split(quantizer)
  function = functools.partial(apply, graphdef)
  out, grad, grad_x = output_and_gradients(function, (params, x), golden["cot"])
  np.testing.assert_allclose(out, golden["out"], atol=1e-5)
  # Sums of 24 terms that nearly cancel: relative rounding grows to 1e-5.
  np.testing.assert_allclose(np.asarray(grad["step"][...])[:, 0], golden["grad_s"], rtol=1e-4)
  np.testing.assert_allclose(grad_x, golden["grad_x"], atol=1e-5)


def test_lsq_weights_of_the_reference_code():
  w = jnp.asarray(GOLDEN["w"].T)
  graphdef, params = nnx.split(ofq.WeightQuantizer(w, 3, "lsq"))
  np.testing.assert_allclose(np.asarray(params["step"][...])[0], GOLDEN["lsqw_s"], rtol=1e-6)
  function = functools.partial(apply, graphdef)
  out, grad, grad_w = output_and_gradients(function, (params, w), GOLDEN["lsqw_cot"].T)
  np.testing.assert_allclose(np.asarray(out).T, GOLDEN["lsqw_out"], atol=1e-6)
  np.testing.assert_allclose(np.asarray(grad["step"][...])[0], GOLDEN["lsqw_grad_s"], rtol=1e-4)
  np.testing.assert_allclose(np.asarray(grad_w).T, GOLDEN["lsqw_grad_w"], atol=1e-6)


def test_offsets_are_added_before_and_after_rounding():
  quantizer = ofq.ActivationQuantizer(2, (1,), 3)
  quantizer.offset_before[...] = jnp.array([0.4, 0.0, -5.0])
  quantizer.offset_after[...] = jnp.array([10.0, 20.0, 30.0])
  x = np.full((1, 3), 0.2, np.float32)
  np.testing.assert_allclose(call(quantizer, x), [[11.0, 20.0, 28.0]])


# Oscillation.


@jax.jit
def track(sequence):
  start = oscillation.init_oscillation(sequence[0])
  return jax.lax.scan(oscillation.update_oscillation, start, sequence[1:])


def test_the_tracker_of_the_reference_code():
  end, turned = track(GOLDEN["osc_seq"])
  np.testing.assert_array_equal(np.sum(turned, axis=0), GOLDEN["osc_total"])
  np.testing.assert_allclose(end.frequency, GOLDEN["osc_ema"], rtol=1e-5)


def test_the_tracker_counts_turns_and_not_drift():
  end, turned = track(np.array([[0, 0], [1, 1], [0, 1], [1, 2]], np.int32))
  np.testing.assert_array_equal(turned, [[False, False], [True, False], [True, False]])
  assert float(oscillation.oscillating_share({"w": end})) == 0.5


@jax.jit
def annealing_mask(w, bits, boundary_range):
  position = ofq.statsq_position(w, ofq.statsq_scale(w), bits)
  return ~ofq.near_threshold(position, bits, boundary_range)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("boundary_range", [0.005, 0.1])
def test_the_annealing_mask_of_the_reference_code(bits, boundary_range):
  frozen = annealing_mask(GOLDEN["w"].T, bits, boundary_range)
  np.testing.assert_array_equal(frozen.T, GOLDEN[f"cga_freeze_b{bits}_br{boundary_range}"] != 0)


def test_extremes_of_the_boundary_range():
  position = np.float32([-2.5, -1.5, -1.2, -0.5, 0.0, 0.3, 0.5, 1.0, 1.4999])
  exact = [False, True, False, True, False, False, True, False, False]
  np.testing.assert_array_equal(near_threshold(position, 2, 0.0), exact)
  # Between the outer levels nothing is further away than 1/2; a clipped weight can be.
  near = near_threshold(position, 2, 0.5)
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
  confidence = jax.jit(lambda layer: oscillation.not_confident(layer, 0.05))
  after, _ = step(before, optax.tree.set(state, annealing=jnp.array(True)))
  old, new = nnx.merge(graphdef, before), nnx.merge(graphdef, after)
  for path, layer in ofq.block_layers(old).items():
    if isinstance(layer, ofq.QueryKeyProduct):
      assert not np.array_equal(layer.query[...], get_module(new, path).query[...])
      continue
    trained = np.asarray(confidence(layer))
    same = np.asarray(layer.latent()) == np.asarray(get_module(new, path).latent())
    np.testing.assert_array_equal(same, ~trained)
    frozen_share.append(same.mean())
  assert 0.5 < np.mean(frozen_share) < 1
  assert not np.array_equal(old.class_token[...], new.class_token[...])


def test_iterative_freezing_fixes_what_flips_at_its_mean_level():
  graphdef, params = nnx.split(quantized(QVIT))
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
  scale = np.asarray(layer(params).weight_quantizer.step[...])
  low = np.zeros(layer(params).latent().shape, np.float32)
  high = low.copy()
  high[0] = scale[0]  # The first row flips between levels 0 and 1.
  params, state = step(params, jax.jit(sgd.init)(params), low)
  state = state._replace(freezing=jnp.array(True))
  for target in (high, low, high, low):
    params, state = step(params, state, target)
  frozen = np.asarray(state.frozen[path])
  assert frozen[0].all() and not frozen[1:].any()
  level = np.round(state.oscillation[path].mean_code)
  fixed = np.asarray(layer(params).latent())[0]
  np.testing.assert_allclose(fixed, (scale * level)[0], atol=1e-6)


def test_dampening_pulls_weights_to_their_levels():
  model = quantized(QVIT)
  path = "blocks.0.mlp.up_proj"
  graphdef, params = nnx.split(model)
  loss = lambda params: oscillation.dampening_loss(nnx.merge(graphdef, params))
  grad = jax.jit(jax.grad(loss))(params)
  layer = get_module(model, path)
  w, scale = np.asarray(layer.latent()), np.asarray(layer.weight_quantizer.step[...])
  inside = (w > -2 * scale) & (w < scale)
  expected = np.where(inside, 2 * (w - np.round(w / scale) * scale), 0)
  found = get_module(nnx.merge(graphdef, grad), path)
  np.testing.assert_allclose(found.latent(), expected, atol=1e-6)
  np.testing.assert_array_equal(found.weight_quantizer.step[...], np.zeros_like(scale))


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
    projection.bias[...] = jnp.asarray(np.zeros(8, np.float32))
  attention.v_proj.bias[...] = jnp.asarray(np.arange(8, dtype=np.float32))
  x = random(2, 4, 6, 8)
  _, context = nnx.jit(lambda model: model.stem(IMAGES))(model)
  expected = run(attention, x, context)
  for kind in (ofq.WeightQuantizer, ofq.ActivationQuantizer):
    monkeypatch.setattr(kind, "__call__", lambda self, x: x)
  for settings in (QATSettings(), QATSettings(qkr=False)):
    found = run(attention, x, context, settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_reach_queries_and_keys_through_their_product():
  make = lambda query, key: ofq.QueryKeyProduct(query, key, 2, QATSettings())
  product = nnx.jit(make)(random(0, 8, 8), random(1, 8, 8))
  x, cotangent = np.eye(8, dtype=np.float32), random(2, 8, 16)

  def gradient(boundary_range):
    product.boundary_range = boundary_range
    graphdef, params = nnx.split(product)
    loss = lambda p: jnp.sum(nnx.merge(graphdef, p)(x) * cotangent)
    return jax.jit(jax.grad(loss))(params)

  key = np.asarray(product.key[...]).reshape(8, 2, 4)
  position = nnx.jit(lambda product: product.weight_quantizer.position(product.latent()))(product)
  masked = np.asarray(near_threshold(position, 2, 0.1))
  for boundary_range, weights in ((None, cotangent), (0.1, cotangent * masked)):
    expected = np.einsum("jhc,jhd->chd", weights.reshape(8, 2, 8), key).reshape(8, 8)
    np.testing.assert_allclose(gradient(boundary_range)["query"][...], expected, atol=1e-5)


@pytest.mark.parametrize(
  "settings", [OFQ, QVIT, QATSettings(4, 4, learnable_offsets=False)], ids=str
)
def test_the_integer_model_computes_the_same(settings):
  model = nnx.clone(quantized(settings))
  for _, quantizer in nnx.iter_modules(model):
    if isinstance(quantizer, ofq.ActivationQuantizer) and quantizer.offset_after is not None:
      quantizer.offset_after[...] = jnp.asarray(0.1 * random(0, *quantizer.offset_after.shape))
  integer = to_integer(model)
  expected, found = nnx.jit(lambda a, b: (a(IMAGES).logits, b(IMAGES).logits))(model, integer)
  # Sums in another order; an activation on a tie could round the other way, and none does.
  np.testing.assert_allclose(found, expected, atol=1e-4)
  tensors = integer_tensors(integer)
  codes = tensors["blocks.0.mlp.up_proj.codes"]
  assert codes.dtype == jnp.int8 and len(np.unique(codes)) <= 2**settings.weight_bits
  assert "blocks.0.mlp.up_proj.layer.kernel" not in tensors


def test_distillation_loss_by_hand():
  logits = np.float32([[1.0, 2.0, 0.5]]), np.float32([[0.3, -1.0, 0.0]])
  teacher = np.float32([[2.0, 0.0, 1.0]])
  log_softmax = lambda x: x - np.log(np.exp(x).sum())
  log_p = [log_softmax(x) for x in logits]
  soft = -(np.exp(log_softmax(teacher)) * log_p[1]).sum()
  target = np.array([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3])
  found = jax.jit(training.distillation_loss)(*logits, teacher, np.array([1]), 0.1)
  np.testing.assert_allclose(found, [soft - (target * log_p[0]).sum()], rtol=1e-5)


def test_heads_are_apart_in_training_and_averaged_at_evaluation(teacher):
  both = nnx.jit(lambda model: (training.head_logits(model, IMAGES), model(IMAGES).logits))
  (by_class, by_distillation), logits = both(teacher)
  assert not np.allclose(by_class, by_distillation)
  mean = np.mean([by_class, by_distillation], axis=0)
  np.testing.assert_allclose(mean, logits, atol=1e-6)


def test_guidance_is_zero_for_equal_patterns():
  x = random(0, 2, 2, 5, 4)
  loss = lambda student: training.guidance_loss([student, x], [x, x]).sum()
  loss = jax.jit(loss)
  np.testing.assert_allclose(loss(3 * x), 0, atol=1e-4)  # Patterns are normalised.
  assert float(loss(np.flip(x, axis=2))) > 0.1
  assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


def test_bad_input_is_refused_before_any_work(teacher):
  with pytest.raises(UserError, match="weight_bits=1 is not supported; supported: 2 to 8"):
    QATSettings(weight_bits=1)
  with pytest.raises(UserError, match="weight_quantizer='pact' is not supported"):
    QATSettings(weight_quantizer="pact")
  with pytest.raises(UserError, match="no queries and keys to rectify"):
    QATSettings(rectify_queries_and_keys=True)
  with pytest.raises(UserError, match="vision transformers .* not Linear"):
    ofq.quantize(nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))), QATSettings())
  with pytest.raises(UserError, match="quantized already"):
    ofq.quantize(quantized(), QATSettings())
  broken = nnx.clone(teacher)
  kernel = np.array(broken.blocks[0].mlp.up_proj.kernel[...])
  kernel[0, 0] = np.nan
  broken.blocks[0].mlp.up_proj.kernel[...] = jnp.asarray(kernel)
  with pytest.raises(UserError, match="blocks.0.mlp.up_proj.kernel: NaN"):
    ofq.quantize(broken, QATSettings())
  with pytest.raises(UserError, match="the calibration activations: NaN"):
    ofq.calibrate(quantized(), jnp.full_like(IMAGES, jnp.nan))


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


def test_tiny_run(tmp_path, monkeypatch):
  tiny = config.get_config("tiny")
  tiny.other_bits = (tiny.bits,)  # Trained once.
  report = experiment.run(tiny, tmp_path)
  accuracy, layers, _ = report.tables
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
  # After a kill the same command trains nothing again.
  monkeypatch.setattr(digits_runs, "train_methods", None)
  monkeypatch.setattr(digits_runs.digits, "pretrain", None)
  assert experiment.run(tiny, tmp_path) == report
