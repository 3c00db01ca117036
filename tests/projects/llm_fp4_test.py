"""LLM-FP4: vectors of the official search, invariants, bad input and the tiny run."""

import dataclasses
import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.encoder import Encoder, EncoderConfig
from common.models.surgery import get_module, linear_paths
from common.models.vit import VisionTransformer
from common.quantization import float_format
from common.quantization.calibration import quantize_model
from common.quantization.float_format import FloatFormat
from projects.llm_fp4 import (
  config,
  experiment,
  language_experiment,
  llm_fp4,
  models,
  search_result,
)
from projects.llm_fp4.compile_steps import compile_steps
from projects.llm_fp4.layers import FPQLinear, fold
from projects.llm_fp4.llm_fp4 import FPQSettings
from projects.llm_fp4.methods import fpq_settings
from projects.llm_fp4.vision_experiment import vit_config
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder, random_tokens

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "llm_fp4" / "layer_search.npz")
METHODS = {
  "minmax": {"pre_shifted": False, "format_search": False, "max_search": False},
  "baseline": {"pre_shifted": False},
  "fpq": {},
}
# The tiny run's: models of its shapes are searched by its programs.
TINY = config.get_config("tiny")
SMALL = fpq_settings(TINY, TINY.bits)
# Of the layers below; so fine that the search of a few channels ends at a fixed point.
SETTINGS = FPQSettings(grid_size=9, rounds=9)
search_linear = jax.jit(llm_fp4.search_linear, static_argnums=3)


def layer(seed: int = 0, tokens: int = 24, channels: int = 6, outputs: int = 4):
  """Weights [in, out] and inputs [tokens, in] whose channels differ in size."""
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(channels, outputs)) / 2
  x = rng.normal(size=(tokens, channels)) * 2.0 ** rng.uniform(-2, 4, channels)
  return np.float32(w), np.float32(x)


def largest(x: np.ndarray) -> np.ndarray:
  """max |x| of each channel."""
  return np.abs(x).max(axis=0)


def bias_of(format: FloatFormat, maximum) -> np.ndarray:
  """`float_format.bias_for` in NumPy: (2 - 2^-m) 2^(2^e - 1 - b) is the maximum."""
  top = np.log2(2 - 2.0**-format.mantissa_bits) + 2**format.exponent_bits - 1
  return np.float32(top - np.log2(maximum))


@nnx.jit
def run(module, x):
  return module(x)


def random_module(make):
  """`make()` with random parameters of NumPy: to compile JAX's takes a second each."""
  graphdef, state = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  normal = lambda leaf: np.float32(rng.normal(size=leaf.shape) / 8)
  return committed(nnx.merge(graphdef, jax.tree.map(normal, state)))


def committed(module):
  """The module with its arrays placed as a loaded model's are: it can then share programs."""
  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, jax.device_put(state, jax.devices()[0]))


def official_bias(format: FloatFormat, maximum):
  """The official code's, where m is a tensor of integers: torch gives 2^-m = 0 there."""
  return 2.0**format.exponent_bits - jnp.log2(maximum)


def official_fake_quantize(x, format: FloatFormat, bias):
  """For the same reason it clips at 2^(2^e - b), one value more than the format has."""
  largest = jnp.exp2(2**format.exponent_bits - bias)
  x = jnp.clip(x, -largest, largest)
  exponent = jnp.maximum(jnp.floor(jnp.log2(jnp.abs(x)) + bias), 1)
  step = jnp.exp2(exponent - format.mantissa_bits - bias)
  return jnp.round(x / step) * step


def official_quantize_to(x, bits, bias):
  return official_fake_quantize(x, llm_fp4._Format(*bits), bias)


def golden_layer():
  return GOLDEN["weight"].T, GOLDEN["x"].reshape(-1, 12)


def golden(method, bits, name):
  return GOLDEN[f"{method}_b{bits}_{name}"]


@pytest.mark.parametrize(
  "method, bits", [("minmax", 4), ("minmax", 6), ("baseline", 4), ("baseline", 6)]
)
def test_search_of_the_official_code(method, bits, monkeypatch):
  """Min-max and the FPQ baseline, exactly.

  In the official search candidates are clipped rightly, and the partner (the weights in use while
  activations are searched, and the other way round) is clipped a value too late.
  """
  settings = FPQSettings(bits, bits, **METHODS[method])
  if method == "minmax":
    monkeypatch.setattr(float_format, "bias_for", official_bias)
  for name in ("_current_input", "_current_kernel"):
    partner = getattr(llm_fp4, name)

    def clipped_late(*arguments, partner=partner):
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_fp4, "quantize_to", official_quantize_to)
        return partner(*arguments)

    monkeypatch.setattr(llm_fp4, name, clipped_late)
  w, x = golden_layer()
  search = jax.jit(lambda w, x: llm_fp4.search_linear(w, x, jnp.abs(x).max(axis=0), settings))(w, x)
  weight_format = settings.weight_formats[int(search.weight_format)]
  activation_format = settings.activation_formats[int(search.activation_format)]
  assert weight_format.mantissa_bits == golden(method, bits, "w_mantissa")
  assert activation_format.mantissa_bits == golden(method, bits, "a_mantissa")
  np.testing.assert_allclose(search.weight_bias, golden(method, bits, "w_bias"), rtol=1e-5)
  rho = golden(method, bits, "a_interval")[0]
  np.testing.assert_allclose(search.tensor_bias, rho, rtol=1e-5)
  kernel, rounded = jax.jit(
    lambda w, x, search: (
      official_fake_quantize(w, weight_format, search.weight_bias),
      official_fake_quantize(x, activation_format, search.activation_bias),
    )
  )(w, x, search)
  for found, name in ((kernel.T, "wq"), (rounded, "xq")):
    expected = golden(method, bits, name).reshape(found.shape)
    # Entries on a tie may fall to either side.
    assert (~np.isclose(found, expected, rtol=1e-5, atol=1e-7)).mean() < 0.01
  mse = float(search.output_error) * np.mean((x @ w) ** 2)
  assert mse == pytest.approx(float(golden(method, bits, "mse")), rel=1e-3)


@pytest.mark.parametrize("bits, gamma_index", [(4, 99), (6, 79)])
def test_steps_of_the_official_pre_shifted_search(bits, gamma_index):
  """Each step of FPQ, given the official partner.

  The official code updates the activations' bias a step late, so its path is not ours: its last
  weights were searched with gamma 99 (of 0 ... 99; 79 at six bits), which it then replaced.
  """
  settings = FPQSettings(bits, bits)
  w, x = golden_layer()
  weight_format, activation_format = (
    [f.mantissa_bits for f in settings.weight_formats].index(int(golden("fpq", bits, name)))
    for name in ("w_mantissa", "a_mantissa")
  )

  @jax.jit
  def steps(w, x):
    """The channels' biases, then the choice after each step, the result and the activations."""
    problem = llm_fp4._problem(w, x, jnp.abs(x).max(axis=0), settings, None)
    tensor_bias = settings.gammas[gamma_index] * problem.tensor_start
    formats = jnp.int32(weight_format), jnp.int32(activation_format)
    choice = llm_fp4.Choice(problem.weight_start, formats[0], tensor_bias, formats[1])
    first = llm_fp4._search_weight_bias(problem, choice, settings)
    second = llm_fp4._search_tensor_bias(problem, first, settings)
    search = llm_fp4.linear_result(problem, second, settings)
    rounded = llm_fp4.quantize(x, settings.activation_formats, formats[1], search.activation_bias)
    return problem.channel_bias, first, second, search, rounded

  channels, first, second, search, rounded = steps(w, x)
  channels, weight_bias = channels[activation_format], first.weight_bias[weight_format]
  np.testing.assert_allclose(channels, golden("fpq", bits, "a_bias_channel"), atol=1e-5)
  np.testing.assert_allclose(weight_bias, golden("fpq", bits, "w_bias"), rtol=1e-5)
  rho = second.tensor_bias[activation_format]
  np.testing.assert_allclose(rho, golden("fpq", bits, "a_interval")[0], rtol=1e-5)
  expected = golden("fpq", bits, "xq").reshape(x.shape)
  format, bias = settings.activation_formats[activation_format], np.asarray(search.activation_bias)
  top = (2 - 2.0**-format.mantissa_bits) * 2.0 ** (2**format.exponent_bits - 1 - bias)
  inside = np.abs(x) <= top
  assert (~np.isclose(rounded, expected, rtol=1e-5, atol=1e-7))[inside].mean() < 0.01


def test_the_whole_search_is_no_worse_than_the_official_one():
  w, x = golden_layer()
  search = search_linear(w, x, largest(x), FPQSettings())
  assert float(search.output_error) * np.mean((x @ w) ** 2) <= golden("fpq", 4, "mse")


@functools.partial(jax.jit, static_argnums=0)
def decode_every_code(formats, biases):
  """The values of each format's codes with its bias."""
  codes = [jnp.arange(2**format.bits).astype(format.dtype) for format in formats]
  return [float_format.decode(*each) for each in zip(codes, formats, biases)]


def test_values_of_the_four_bit_formats():
  formats = [f for bits in llm_fp4.MANTISSA_BITS for f in llm_fp4.float_formats(bits)]
  biases = [2.0, 1.0, 0.0] + [1.0] * (len(formats) - 3)
  values = [np.unique(v) for v in decode_every_code(tuple(formats), biases)]
  assert all(len(v) <= 2**format.bits - 1 for v, format in zip(values, formats))
  assert [f.bits for f in formats] == [4] * 3 + [6] * 5 + [8] * 5
  e3m0, e2m1, e1m2 = (v[v > 0] for v in values[:3])
  np.testing.assert_array_equal(e2m1, [0.5, 1, 1.5, 2, 3, 4, 6])
  codes = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
  np.testing.assert_array_equal(e2m1, codes[codes > 0])
  np.testing.assert_array_equal(e1m2, np.arange(1, 8) / 2)
  np.testing.assert_array_equal(e3m0, 2.0 ** np.arange(-1, 6))


@functools.partial(jax.jit, static_argnums=1)
def quantize(x, bits, index, bias):
  return llm_fp4.quantize(x, llm_fp4.float_formats(bits), index, bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantizer(bits):
  """Every format through one program: as in common, idempotent, odd, monotone, shift identity."""
  x = np.float32(np.sort(np.random.default_rng(0).normal(size=200) * 4))
  formats = llm_fp4.float_formats(bits)
  biases = [float(bias_of(format, 3.0)) for format in formats]
  rounded = lambda x, biases: [float_format.fake_quantize(x, *b) for b in zip(formats, biases)]
  expected = jax.jit(rounded)(x, biases)
  for index, bias in enumerate(biases):
    found = np.asarray(quantize(x, bits, index, bias))
    np.testing.assert_allclose(found, expected[index], rtol=1e-6)
    np.testing.assert_allclose(quantize(found, bits, index, bias), found, rtol=1e-6)
    np.testing.assert_array_equal(quantize(-x, bits, index, bias), -found)
    assert (np.diff(found) >= -1e-6).all()
    assert float(np.abs(found).max()) == pytest.approx(3.0, rel=1e-6)
    for k in (-2, 3):
      shifted = quantize(np.ldexp(x, k), bits, index, bias - k)
      np.testing.assert_allclose(np.ldexp(shifted, -k), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["separate", "difference"])
def test_offsets(rounding):
  settings = FPQSettings(offset_rounding=rounding)
  channels = np.float32([-1.4, 0.2, 0.7, 1.6, 9.0])
  rho = channels.min()
  offsets = jax.jit(lambda channels, rho: llm_fp4.exponent_offsets(channels, rho, 3.0, settings))
  found = np.asarray(offsets(channels, rho))
  by_hand = {"separate": [0, 1, 2, 3, 3], "difference": [0, 2, 2, 3, 3]}
  np.testing.assert_array_equal(found, by_hand[rounding])
  for gamma in (0.1, 0.7, 1.2):
    o = np.asarray(offsets(channels, np.float32(gamma) * rho))
    assert ((0 <= o) & (o <= 3) & (o == np.round(o))).all()


def test_candidates_on_either_grid():
  start = np.float32([[2.0, -1.0], [0.5, 3.0]])  # [formats, channels]
  gammas = 0.01 + np.arange(100) * 1.19 / 100
  assert gammas[-1] < 1.2 and len(FPQSettings().gammas) == 100
  candidates = jax.jit(llm_fp4.candidate_biases, static_argnums=1)
  on_bias = candidates(start, FPQSettings())
  np.testing.assert_allclose(on_bias, gammas[:, None] * start[:, None], rtol=1e-5, atol=1e-6)
  on_maximum = np.asarray(candidates(start, FPQSettings(param="maxval_gamma")))
  e2m1_max = lambda bias: 1.5 * 2.0 ** (3 - bias)
  expected = gammas[:, None] * e2m1_max(start)[:, None]
  np.testing.assert_allclose(e2m1_max(on_maximum), expected, rtol=1e-4)


def test_search_against_trying_everything():
  """The last steps' choices are the best of all formats and gammas, tried one by one."""
  w, x = layer()
  search = search_linear(w, x, largest(x), SETTINGS)
  x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
  y = x64 @ w64
  formats = llm_fp4.float_formats(4)
  gammas = 0.01 + np.arange(9) * 1.19 / 9
  rounded = lambda a, i, b: np.asarray(quantize(a, 4, i, np.float32(b)), np.float64)
  best = {}
  xq = rounded(x, int(search.activation_format), search.activation_bias)
  for i, format in enumerate(formats):
    start = bias_of(format, largest(w))
    tried = [((y - xq @ rounded(w, i, g * start)) ** 2).mean(axis=0) for g in gammas]
    best[i] = np.min(tried, axis=0)
  # A fixed point: the weights are the best of all for the activations that were found.
  total = {i: losses.mean() for i, losses in best.items()}
  assert min(total, key=total.get) == int(search.weight_format)
  wq = rounded(w, int(search.weight_format), search.weight_bias)
  np.testing.assert_allclose(((y - xq @ wq) ** 2).mean(axis=0), best[int(search.weight_format)],
                             rtol=1e-4)  # fmt: skip
  found = float(search.output_error) * (y**2).mean()
  for (i, format), g in itertools.product(enumerate(formats), gammas):
    channel = bias_of(format, largest(x))
    rho = g * channel.min()
    low = np.round(rho)
    high = low + 2**format.exponent_bits - 1
    offsets = np.clip(np.round(channel), low, high) - low
    tried = ((y - rounded(x, i, rho + offsets) @ wq) ** 2).mean()
    assert found <= tried * (1 + 1e-4), (format, g)


def test_gamma_1_and_a_fixed_format_are_min_max():
  w, x = layer()
  search = search_linear(w, x, largest(x), FPQSettings(**METHODS["minmax"]))
  e2m1 = FloatFormat(2, 1)
  np.testing.assert_allclose(search.weight_bias, bias_of(e2m1, largest(w)), rtol=1e-6)
  np.testing.assert_allclose(search.activation_bias, bias_of(e2m1, np.abs(x).max()), rtol=1e-6)


def linear_of(w) -> nnx.Linear:
  linear = nnx.eval_shape(lambda: nnx.Linear(*w.shape, rngs=nnx.Rngs(0)))
  linear.kernel = nnx.Param(jnp.asarray(w))
  linear.bias = nnx.Param(jnp.asarray(np.arange(w.shape[1], dtype=np.float32)))
  return linear


@pytest.mark.parametrize("how", ["exact", "requantize"])
def test_folded_layer_equals_the_simulated_one(how):
  settings = dataclasses.replace(SETTINGS, fold=how)
  w, x = layer()
  search = search_linear(w, x, largest(x), settings)
  assert np.max(search.offsets) > 0
  linear = linear_of(w)
  simulated, folded = (make(linear, search, settings) for make in (FPQLinear, fold))
  codes = jax.eval_shape(folded.encode_input, x)
  assert folded.values[...].dtype == codes.dtype == jnp.uint4
  expected, product = np.asarray(run(simulated, x)), x @ w
  # Float32 sums of a few terms as large as the outputs.
  np.testing.assert_allclose(run(folded, x), expected, atol=2e-6 * np.abs(expected).max())
  error = np.sum((expected - np.asarray(linear.bias[...]) - product) ** 2) / np.sum(product**2)
  assert error == pytest.approx(float(search.output_error), rel=1e-3)


def test_channels_of_zeros_stay_zeros():
  w, x = layer()
  w[:, 1], x[:, 2] = 0, 0
  search = search_linear(w, x, largest(x), SETTINGS)
  assert all(np.isfinite(value).all() for value in search)
  y = np.asarray(run(FPQLinear(linear_of(w), search, SETTINGS), x))
  assert np.isfinite(y).all() and (y[:, 1] == 1).all()


def test_table_search_is_the_best_of_all():
  table, _ = layer(channels=20, outputs=8)
  search_table = jax.jit(llm_fp4.search_table, static_argnums=(1, 2))
  index, bias, errors = search_table(table, 4, FPQSettings(grid_size=7))
  assert errors.shape == (3, 7)
  rounded = np.asarray(quantize(table, 4, index, bias))
  assert np.mean((table - rounded) ** 2) == pytest.approx(float(errors.min()), rel=1e-5)


@pytest.fixture(scope="module")
def model():
  # Biases and a tied head, in the sizes of the tiny run's model.
  sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
  architecture = ARCHITECTURES["qwen2, grouped-query"]
  return committed(random_decoder(dataclasses.replace(architecture, num_kv_heads=4, **sizes)))


@pytest.fixture(scope="module")
def tokens(model):
  return jnp.asarray(random_tokens(model.config, 4, 32))


@pytest.fixture(scope="module")
def found(model, tokens):
  return models.search_model(model, tokens, SMALL, embedding_bits=4)


def test_every_linear_head_and_table_is_quantized(model, tokens, found):
  quantized = models.apply_to_model(model, found, SMALL, embedding_bits=4)
  assert linear_paths(quantized) == [] and set(found.linears) == {
    "lm_head", *(path for path in linear_paths(model))
  }  # fmt: skip
  assert len(np.unique(quantized.embed_tokens.embedding[...])) <= 15
  assert linear_paths(model) and model.lm_head is None  # The original is as it was.


def test_blocks_stream(model, tokens, found):
  """`quantize_block` one block at a time gives what the search of the whole model gives."""
  quantize_block = lambda index, *arguments: models.quantize_block(*arguments, SMALL)
  streamed = quantize_model(model, tokens, quantize_block, stream="full_precision")
  whole = models.apply_to_model(model, found, SMALL, embedding_bits=None)
  for i, path in ((0, "attention.k_proj"), (1, "mlp.down_proj")):
    a, b = get_module(streamed.blocks[i], path), get_module(whole.blocks[i], path)
    np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
    np.testing.assert_array_equal(a.activation_bias[...], b.activation_bias[...])


def test_the_readme_s_code_quantizes_by_a_saved_search(model, found, tmp_path):
  search_result.save(tmp_path / "search.safetensors", found, SMALL)
  readme = pathlib.Path(experiment.__file__).with_name("README.md").read_text()
  names = {"model": model, "workdir": tmp_path}
  exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
  assert names["settings"] == SMALL
  expected = models.apply_to_model(model, found, SMALL, embedding_bits=4, packed=True)
  jax.tree.map(np.testing.assert_array_equal, names["search"], found)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(names["quantized"]), nnx.state(expected))
  (tmp_path / "bad").write_bytes(b"1234")
  with pytest.raises(UserError, match="not an FPQ search result"):
    search_result.load(tmp_path / "bad")
  with pytest.raises(UserError, match="does not exist"):
    search_result.load(tmp_path / "none")


def test_encoder_and_vision_classifiers_have_their_heads_quantized():
  """And padding is not calibrated on: another token there changes nothing."""
  # Sizes and rows as of the tiny run's model, as many classes as channels: one program for all
  # linears of a shape.
  vision = dataclasses.replace(vit_config(64), labels=tuple(map(str, range(64))))
  settings = EncoderConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=4,
    max_position_embeddings=16, pooler=True, head="sequence", labels=vision.labels,
  )  # fmt: skip
  encoder = random_module(lambda: Encoder(settings, rngs=nnx.Rngs(0)))
  tokens = jnp.asarray(random_tokens(encoder.config, SMALL.tokens, 4))
  segment_ids = jnp.ones_like(tokens).at[1, 2:].set(0)
  search = functools.partial(models.search_model, encoder, settings=SMALL, embedding_bits=4)
  first = search(tokens, segment_ids=segment_ids)
  second = search(tokens.at[1, 3].set(5), segment_ids=segment_ids)
  assert {"pooler", "sequence_classifier"} < set(first.linears)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  vit = random_module(lambda: VisionTransformer(vision, rngs=nnx.Rngs(0)))
  images = np.float32(np.random.default_rng(0).normal(size=(SMALL.tokens, 8, 8, 1)))
  quantized = models.fpq(vit, images, SMALL, embedding_bits=None)
  assert linear_paths(quantized) == [] and isinstance(quantized.classifier, FPQLinear)
  assert np.isfinite(run(quantized, images).logits).all()


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"weight_bits": 5}, "weight_bits=5 is not supported; supported: 4, 6, 8"),
    ({"metric": "kl"}, "metric='kl' is not supported; supported: l2, l1, cosine, pearson, hessian"),
    ({"param": "x"}, "param='x' is not supported"),
    ({"fold": "x"}, "fold='x' is not supported"),
    ({"rounds": 0}, "must be positive"),
  ],
)
def test_unsuitable_settings_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    FPQSettings(**changes)


def test_bad_models_and_searches_are_refused(model, tokens, found):
  broken = nnx.clone(model)
  kernel = broken.blocks[1].mlp.up_proj.kernel
  kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(UserError, match=r"blocks.1.mlp.up_proj.kernel.*NaN"):
    models.search_model(broken, tokens, SMALL, embedding_bits=4)
  with pytest.raises(UserError, match="a Linear is not supported; expected a decoder"):
    models.search_model(linear_of(jnp.ones((2, 2))), tokens, SMALL, embedding_bits=4)
  wrong = {"blocks.0.mlp.gone": found.linears["lm_head"]}
  with pytest.raises(UserError, match="of blocks.0.mlp.gone, 64 x 512, is not of this model"):
    models.apply_search(nnx.clone(model), wrong, SMALL)
  options = config.get_config("tiny")
  options.model, options.vision_epochs = "", 0
  with pytest.raises(UserError, match="nothing to do"):
    experiment.run(options, pathlib.Path("."))


def test_tiny_run(tmp_path, monkeypatch):
  tiny = config.get_config("tiny")
  tiny.other_bits = (tiny.bits,)  # Measured once.
  report = experiment.run(tiny, tmp_path)
  assert (tmp_path / "methods.png").stat().st_size > 0
  assert (tmp_path / "search.safetensors").exists()
  rows = {row[0]: row for row in report.tables[0].rows}
  assert rows["FPQ"][1] == "4/4/4" and all(np.isfinite(row[2]) for row in rows.values())
  assert len(report.claims) == 5
  # After a kill the same command measures nothing again.
  for name in ("window_losses", "search_model"):
    monkeypatch.setattr(language_experiment, name, None)
  assert experiment.run(tiny, tmp_path) == report


def test_steps_to_compile_are_abstract():
  options = config.get_config("paper")
  steps = compile_steps(options, jax.devices())
  assert [step.name.split(",")[0] for step in steps] == [
    "search of q_proj",
    "search of up_proj",
    "search of down_proj",
    "score",
    "decode",
  ]
  for step in steps:
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(step.arguments))
  assert steps[1].arguments[1].shape == (32 * 1024, 4096)
  jax.eval_shape(steps[-1].function, *steps[-1].arguments)
