"""FlexRound: vectors of the official code, invariants, and the tiny run."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.errors import UserError
from common.models.base import base_model
from common.models.decoder import Block
from common.models.mobilenet import MobileNet, MobileNetConfig, Stage
from common.quantization import rtn
from common.quantization.activations import ActivationFormat, fake_quantize
from common.quantization.adaround import AdaRound, adaround_objective, harden
from common.quantization.calibration import Streams, quantize_blocks
from common.quantization.linear import quantized_weights
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import QuantizedKernel
from common.quantization.reconstruction import Learned, ReconstructionSettings, reconstruct
from common.quantization.straight_through import lsq
from projects.flexround import (
  config,
  convnets,
  digits_networks,
  experiment,
  language_experiment,
  network_experiment,
)
from projects.flexround.activation_quantizer import LearnedInput, freeze_inputs
from projects.flexround.flexround import (
  FlexRound,
  FlexRoundSettings,
  feature_sum,
  grid_shift,
  make_optimizer,
  pack,
  quantize_block,
)
from projects.flexround.methods import (
  Layer,
  Protocol,
  quantize_unit,
  round_to_nearest,
  run_layer,
)
from projects.flexround.scale_search import NORM, initial_scales
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder, random_tokens

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "flexround"
FORMATS = [
  IntegerFormat(3),
  IntegerFormat(4, axis=None),
  IntegerFormat(2, 4),
  IntegerFormat(3, symmetric=True),
]


def weights(shape=(8, 6), seed=0):
  return np.float32(np.random.default_rng(seed).normal(size=shape))


def flexround(w, format=FORMATS[0], start="min_max", **switches):
  settings = FlexRoundSettings(format, start, **switches)
  return FlexRound(w, *initial_scales(w, format, start), settings)


@nnx.jit
def kernel_codes_and_shift(weight):
  return weight(), weight.codes(), grid_shift(weight).shift


@nnx.jit
def value_and_gradients(weight, cotangent):
  """The rounded kernel, and the gradients of sum(it * cotangent) by every `Learned` variable."""
  graphdef, learned, rest = nnx.split(weight, Learned, ...)

  def loss(learned):
    out = nnx.merge(graphdef, learned, rest)()
    return jnp.sum(out * cotangent), out

  gradients, out = jax.grad(loss, has_aux=True)(learned)
  return out, {path[0]: value[...] for path, value in gradients.flat_state()}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("search", [0, 1])
@pytest.mark.parametrize("channel", [0, 1])
def test_the_official_code(channel, search, bits):
  with np.load(GOLDEN / "quantizer_forward_and_grad.npz") as file:
    prefix = f"ch{channel}_clip{search}_b{bits}_"
    golden = {k.removeprefix(prefix): file[k].T for k in file.files if k.startswith(prefix)}
    w = file["weight"].T
  per_group = lambda name: golden[name].reshape(1, -1)
  start = ("min_max", "search")[search]
  weight = flexround(w, IntegerFormat(bits, axis=0 if channel else None), start)
  np.testing.assert_allclose(weight.step(), per_group("delta"), rtol=1e-6)
  np.testing.assert_array_equal(weight.zero_points[...], per_group("zp"))
  rounded = kernel_codes_and_shift(weight)[0]
  np.testing.assert_allclose(rounded, golden["rtn"], rtol=1e-5, atol=1e-6)
  weight.s1[...] = jnp.asarray(per_group("d1") - np.log(per_group("delta")))
  weight.s2[...] = jnp.asarray(golden["d2"])
  weight.s3[...] = jnp.asarray(golden["d3"])
  out, gradients = value_and_gradients(weight, golden["cotangent"])
  np.testing.assert_allclose(out, golden["out"], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradients["s2"], golden["grad_d2"], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(gradients["s3"], golden["grad_d3"], rtol=1e-4, atol=1e-5)
  # A sum over 240 weights of order 1.
  np.testing.assert_allclose(gradients["s1"], per_group("grad_d1"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parametrization", ["log", "linear"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_starts_from_rounding_to_nearest(format, parametrization):
  w = weights()
  weight = flexround(w, format, parametrization=parametrization)
  s1, z = initial_scales(w, format, "min_max")
  kernel, _, shift = kernel_codes_and_shift(weight)
  np.testing.assert_array_equal(kernel, round_to_nearest(w, s1, z, format))
  assert not np.any(shift)


def test_the_gradient_is_the_papers():
  """-W / S'^2 inside the range and 0 outside; of the logarithm, S' times that (Proposition 3.1)."""
  w = weights((32, 3))
  cotangent = weights((32, 3), 1)
  s1, z = initial_scales(w, FORMATS[0], "min_max")
  s1, z = 0.5 * np.asarray(s1), np.asarray(z)  # So that a part is clipped.
  divisor = np.exp(0.2 * weights((32, 3), 2))
  codes = np.round(w / (s1 * divisor)) + z
  inside = (codes >= 0) & (codes <= 7)
  assert 0.2 < inside.mean() < 0.9
  for parametrization in ("linear", "log"):
    weight = FlexRound(w, s1, z, FlexRoundSettings(FORMATS[0], parametrization=parametrization))
    weight.s2[...] = jnp.asarray(divisor if parametrization == "linear" else np.log(divisor))
    found = value_and_gradients(weight, cotangent)[1]["s2"]
    expected = np.where(inside, -w / divisor**2 * cotangent, 0)
    if parametrization == "log":
      expected = divisor * expected
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_only_s1_multiplies():
  def kernel(weight, **logarithms):
    for name, value in logarithms.items():
      getattr(weight, name)[...] = jnp.asarray(value)
    return kernel_codes_and_shift(weight)[0]

  weight, log2 = flexround(weights()), np.float32(np.log(2))
  s2, ones = 0.3 * weights((8, 6), 1), np.ones((1, 6), np.float32)
  before = kernel(weight, s2=s2)
  np.testing.assert_allclose(kernel(weight, s2=s2 - log2, s3=log2 * ones), before, rtol=1e-6)
  # A convolution's s4 likewise, in the shape of its inputs.
  conv = flexround(weights((3, 3, 4, 6)))
  s3, s4 = np.zeros((1, 1, 1, 6), np.float32), np.zeros((1, 1, 4, 1), np.float32)
  assert conv.s4.shape == s4.shape and conv.s3.shape == s3.shape
  before = kernel(conv)
  np.testing.assert_allclose(kernel(conv, s4=s4 + log2, s3=s3 - log2), before, rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_are_integers_in_the_range_and_can_be_packed(format):
  weight = flexround(weights(), format)
  weight.s1[...] = jnp.asarray(np.full(weight.s1.shape, 0.1, np.float32))
  weight.s2[...] = jnp.asarray(weights((8, 6), 1))
  kernel, codes, _ = map(np.asarray, kernel_codes_and_shift(weight))
  low, high = format.code_range
  assert np.array_equal(codes, np.round(codes)) and codes.min() >= low and codes.max() <= high

  @nnx.jit
  def packed_and_dense(weight):
    packed = pack(weight, format)
    return packed, packed.dequantize()

  packed, dense = packed_and_dense(weight)
  np.testing.assert_allclose(dense, kernel, rtol=1e-6)
  assert (packed.zero_points is None) == format.symmetric


def test_with_s1_alone_it_is_lsq():
  w, format = weights(), IntegerFormat(3, axis=None, symmetric=True)
  weight = flexround(w, format, use_s2=False, use_s3=False, use_s4=False)
  assert weight.s2 is weight.s3 is weight.s4 is None
  cotangent = weights((8, 6), 1)
  out, gradients = value_and_gradients(weight, cotangent)
  s1 = weight.initial_s1[...]

  def loss(s):
    rounded = lsq(w, s, (-4, 3))
    return jnp.sum(rounded * cotangent), rounded

  by_step, expected = jax.jit(jax.grad(loss, has_aux=True))(s1)
  np.testing.assert_allclose(out, expected, rtol=1e-6)
  np.testing.assert_allclose(gradients["s1"], np.asarray(s1) * np.asarray(by_step), rtol=1e-4)


@pytest.mark.parametrize("learned", ["flexround", "adaround"])
def test_a_shift_of_two_is_found_by_flexround_alone(learned):
  """Two inputs that are always equal, so that the weights' sum counts: 3.0 - 1.9.

  3.0 is clipped to 1. The other should become 0, two steps from its nearest, -2; AdaRound's best is
  -1.
  """
  w, format = jnp.array([[3.0], [-1.9]]), IntegerFormat(2, axis=None, symmetric=True)
  s1, z = jnp.ones((1, 1)), jnp.zeros((1, 1))
  if learned == "flexround":
    weight = FlexRound(w, s1, z, FlexRoundSettings(format, learn_s1=False, use_s3=False))
  else:
    weight = AdaRound(w, s1, None, format)
  x = jnp.array([[1.0, 1.0], [0.5, 0.5]])
  layer = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
  soft = learned == "adaround"
  found, _ = reconstruct(
    Layer(QuantizedKernel(layer, weight)),
    x,
    x @ w,
    None,
    jax.random.key(0),
    ReconstructionSettings(200, 2, keep_best=not soft),
    optax.adam(0.05),
    objective=adaround_objective if soft else feature_sum,
    run=run_layer,
  )
  harden(found)
  expected = [[1.0], [-1.0]] if soft else [[1.0], [0.0]]
  np.testing.assert_array_equal(found.layer.weight(), expected)


@pytest.mark.parametrize(
  "format", [*FORMATS, IntegerFormat(8), IntegerFormat(8, symmetric=True)], ids=str
)
def test_the_search_is_never_worse_than_min_max(format):
  w = weights()
  w[0] *= 4
  w[:, 0] = np.abs(w[:, 0])  # One channel is one-sided.

  @jax.jit
  def error(scales, zeros):
    codes = rtn.encode(w, scales, zeros, format)
    difference = jnp.abs(rtn.decode(codes, scales, zeros, format) - w) ** NORM
    return rtn.group(difference, format).mean(axis=(1, 3))

  starts = ("min_max", "search")
  errors = {start: np.asarray(error(*initial_scales(w, format, start))) for start in starts}
  assert np.all(errors["search"] <= errors["min_max"] * (1 + 1e-6))
  if format.bits <= 3:  # Few codes are better spent on a range that leaves the large weights out.
    assert errors["search"].mean() < 0.999 * errors["min_max"].mean()


# All linears have one shape, so that there is one program.
LLAMA = dataclasses.replace(ARCHITECTURES["llama"], intermediate_size=32)
RECONSTRUCTION = ReconstructionSettings(num_steps=20, batch_size=2)
LEARNING_RATE = 1e-2
TINY = config.get_config("tiny")


@pytest.fixture(scope="module")
def model():
  return random_decoder(LLAMA)


@pytest.fixture(scope="module")
def streams(model):
  """(a block's two inputs, its context)."""
  x, context = model.stem(jnp.asarray(random_tokens(LLAMA, 4, 8)))
  return Streams(x, np.asarray(x) + 0.05 * weights(x.shape)), context


def test_blocks_are_streamed_packed_and_compiled_once():
  """With the tiny run's settings and model, and so by its programs."""
  base = base_model(TINY.model)
  model, tokens = base.model, language_experiment.calibration(TINY, base, 0)
  settings = FlexRoundSettings(
    language_experiment.integer_format(TINY, TINY.model_bits), TINY.start
  )
  compiled = []
  quantize = functools.partial(
    quantize_block,
    settings=settings,
    reconstruction=language_experiment.reconstruction_settings(TINY),
    optimizer=make_optimizer(TINY.learning_rates.FlexRound[0], TINY.steps),
    key=jax.random.key(0),
  )
  listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
  blocks = quantize_blocks(model, model.blocks, tokens, quantize, stream="both")
  first = next(blocks)
  # The quantized stream's pass is compiled when the second block is asked for.
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    second = next(blocks)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert len(compiled) < 5, compiled
  for block in (first, second):
    packed = quantized_weights(block)
    assert len(packed) == 7 and all(w.format == settings.format for w in packed.values())


def run_mlp(mlp, x, context):
  del context
  return mlp(x)


@pytest.mark.parametrize("layer_wise", [False, True])
def test_learning_never_ends_above_rounding_to_nearest(model, streams, layer_wise):
  """A unit is whatever `run` calls: here a block's MLP."""
  protocol = Protocol(IntegerFormat(3), "min_max", RECONSTRUCTION, layer_wise=layer_wise)
  arguments = (model.blocks[0].mlp, *streams, jax.random.key(0), protocol, LEARNING_RATE)
  result = quantize_unit("FlexRound", *arguments, run=run_mlp)
  assert result.error < 0.9 * result.rtn_error
  assert set(result.shifts) == {"gate_proj", "up_proj", "down_proj"}
  if not layer_wise:
    assert result.losses.shape == (20,)
    nearest = quantize_unit("RTN", *arguments, run=run_mlp)
    assert result.rtn_error == nearest.error == nearest.rtn_error


def test_activations_learn_their_step_and_are_frozen():
  run = nnx.jit(lambda layer, x: layer(x))
  layer = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
  format, x = ActivationFormat(4, "per_tensor"), weights((5, 6))
  low, high = x.min(), x.max()
  learned = Layer(LearnedInput(layer, format, low, high))
  rounded = jax.jit(lambda x: fake_quantize(x, format, low=low, high=high))(x)
  expected = np.asarray(run(layer, rounded))
  np.testing.assert_allclose(run(learned.layer, x), expected, rtol=1e-5, atol=1e-6)
  learned.layer.log_step[...] = jnp.float32(0.2)
  output = np.asarray(run(learned.layer, x))
  assert np.abs(output - expected).max() > 1e-3
  freeze_inputs(learned)
  np.testing.assert_allclose(run(learned.layer, x), output, rtol=1e-5, atol=1e-6)


def test_folding_batch_norms_changes_nothing():
  settings = MobileNetConfig(4, 2, (Stage(1, 4, 1, 1), Stage(2, 6, 1, 2)), 8, 1, ("a", "b"))
  graphdef, state = nnx.split(nnx.eval_shape(lambda: MobileNet(settings, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(0)
  flat = dict(state.flat_state())
  for path, variable in flat.items():
    value = np.float32(rng.normal(size=variable.shape))
    flat[path] = variable.replace(jnp.asarray(np.exp(value) if path[-1] == "var" else value))
  model = nnx.merge(graphdef, nnx.State.from_flat_path(flat))
  images = weights((2, 8, 8, 1))
  run = nnx.jit(lambda model, images: model(images).logits)
  expected = run(model, images)
  convnets.fold_batch_norms(model)
  assert not any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(model))
  np.testing.assert_allclose(run(model, images), expected, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named_before_any_work(model, streams):
  w = weights()
  with pytest.raises(UserError, match="start='mean'.*search, min_max"):
    initial_scales(w, FORMATS[0], "mean")
  with pytest.raises(UserError, match="group_size=5 does not divide"):
    initial_scales(w, IntegerFormat(3, 5), "search")
  with pytest.raises(UserError, match="nothing to learn"):
    FlexRoundSettings(FORMATS[0], learn_s1=False, use_s2=False, use_s3=False, use_s4=False)
  with pytest.raises(UserError, match="parametrization='exp'"):
    FlexRoundSettings(FORMATS[0], parametrization="exp")
  x, context = streams
  protocol = Protocol(FORMATS[0], "min_max", RECONSTRUCTION)
  arguments = (x, context, jax.random.key(0), protocol, LEARNING_RATE)
  with pytest.raises(UserError, match="method='GPTQ'.*AdaRound"):
    quantize_unit("GPTQ", model.blocks[0], *arguments)
  broken: Block = nnx.clone(model.blocks[0])
  broken.mlp.up_proj.kernel[...] = broken.mlp.up_proj.kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(UserError, match="mlp.up_proj.kernel.*NaN"):
    quantize_unit("FlexRound", broken, *arguments)
  settings = config.get_config("tiny")
  settings.axis = "row"
  with pytest.raises(UserError, match="axis='row'.*channel, tensor"):
    experiment.compare_on_language_model(settings, pathlib.Path(), None, None)
  with pytest.raises(UserError, match="network='VGG'"):
    digits_networks.train("VGG", None, num_steps=1, seed=0)


def test_tiny_run(tmp_path, monkeypatch):
  tiny = config.get_config("tiny")
  tiny.network_other_bits = (2,)  # Of the network's own: measured once.
  report = experiment.run(tiny, tmp_path)
  assert [t.title.split(",")[0] for t in report.tables] == [
    "ResNet",
    "Perplexity of lm-tiny",
    "Grid shift of FlexRound",
  ]
  methods = [row[0] for row in report.tables[1].rows]
  assert methods == ["full precision", "RTN", "AdaRound", "AdaQuant", "FlexRound"]
  assert all(np.isfinite(row[2]) for row in report.tables[1].rows)
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 5000
  assert len(report.claims) == 8

  # After a kill the same command measures nothing again.
  for module in (network_experiment, language_experiment):
    monkeypatch.setattr(module, "quantize", None)
    monkeypatch.setattr(module, "sweep", None)
  assert experiment.run(tiny, tmp_path) == report


def test_a_missing_encoder_leaves_a_note(tmp_path, monkeypatch):
  monkeypatch.setenv("FLAXWORKS_MODELS", str(tmp_path))
  settings = config.get_config("encoder")
  (table,) = experiment.run(settings, tmp_path).tables
  assert not table.rows and "all-minilm-l6-v2" in table.note
