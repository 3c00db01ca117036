import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import UserError
from common.models.decoder import Block
from common.models.surgery import get_module, linear_paths
from common.quantization import rtn
from common.quantization.activations import (
  ActivationFormat,
  IntegerLinear,
  QuantizedInput,
  fake_quantize,
  integer_linears,
  min_max_range,
  no_integer_product,
  quantize_inputs,
  range_to_scale,
  static_range,
)
from common.quantization.calibration import rtn_block
from common.quantization.linear import QuantizedLinear
from common.quantization.quantized_array import IntegerFormat
from common.quantization.straight_through import clip_ste, round_ste
from tests.common.models.small_decoders import ARCHITECTURES, random_module

FORMATS = [
  ActivationFormat(bits, symmetric=symmetric, group_size=group, include_zero=include)
  for bits, symmetric, group, include in itertools.product(
    (2, 4, 8), (True, False), (-1, 4), (True, False)
  )
]
values = arrays.arrays(np.float32, (3, 8), elements=st.floats(-1e3, 1e3, width=32))


@settings(deadline=None)  # The first call of a shape compiles.
@given(x=values, format=st.sampled_from(FORMATS))
def test_a_token_has_few_levels_and_an_error_of_half_a_step(x, format):
  rounded = np.asarray(fake_quantize(jnp.asarray(x), format))
  low, high = min_max_range(jnp.asarray(x), format)
  scale, _ = range_to_scale(low, high, format)
  groups = 1 if format.group_size == -1 else 2
  by_group = lambda a: np.asarray(a).reshape(3, groups, -1)
  for token, group in itertools.product(range(3), range(groups)):
    assert len(np.unique(by_group(rounded)[token, group])) <= 2**format.bits
  # Half a step; the zero point rounds the range's ends by another half.
  bound = np.asarray(scale) * (0.5 if format.symmetric else 1.0)
  error = np.abs(by_group(rounded - x))
  # Codes reach 1e3 / 1e-7 of a nearly constant group: float32 rounding of x adds to the bound.
  assert (error <= bound * (1 + 1e-4) + 1e-6 * np.abs(by_group(x)) + 1e-6).all()
  if format.symmetric or format.include_zero:
    assert np.all(rounded[x == 0] == 0)


def test_the_scales_are_the_formulas():
  low, high = jnp.float32(-1.0), jnp.float32(3.0)
  scale, zero = range_to_scale(low, high, ActivationFormat(4))
  assert scale == pytest.approx(4 / 15) and zero == np.round(15 / 4)
  scale, zero = range_to_scale(low, high, ActivationFormat(4, symmetric=True))
  assert scale == pytest.approx(3 / 7) and zero == 0
  scale, zero = range_to_scale(high / 2, high, ActivationFormat(4))
  assert scale == pytest.approx(3 / 15) and zero == 0
  inside = ActivationFormat(4, include_zero=False)
  scale, zero = range_to_scale(high / 2, high, inside)
  assert scale == pytest.approx(1.5 / 15) and zero == -15


def test_gradients_pass_the_rounding_and_stop_where_x_is_clipped():
  format = ActivationFormat(4, "per_tensor", symmetric=True)
  x = jnp.asarray([-9.0, -0.3, 0.0, 0.6, 2.0])
  loss = lambda x, high: jnp.sum(fake_quantize(x, format, low=-high, high=high))
  dx, dhigh = jax.grad(loss, argnums=(0, 1))(x, jnp.float32(1.0))
  np.testing.assert_array_equal(dx, [0, 1, 1, 1, 0])
  # By the range R, with step R / 7: code / 7, less x / R where x is not clipped.
  codes, inside = np.array([-8, -2, 0, 4, 7]), np.array([0, 1, 1, 1, 0])
  np.testing.assert_allclose(dhigh, np.sum((codes - inside * 7 * np.asarray(x)) / 7), rtol=1e-5)


def test_static_ranges():
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(4, 50, 6)).astype(np.float32)
  batches[0, 0, 0] = 40.0
  format = ActivationFormat(4, "per_tensor")
  whole = static_range(batches, format)
  np.testing.assert_allclose(whole, (batches.min(), 40.0))
  mean = static_range(batches, format, "average_min_max")
  flat = batches.reshape(4, -1)
  np.testing.assert_allclose(mean, (flat.min(1).mean(), flat.max(1).mean()), rtol=1e-6)
  ends = static_range(batches, format, "percentile", percentile=99.0)
  np.testing.assert_allclose(ends, np.percentile(batches, (1, 99)), rtol=1e-5)
  searched = static_range(batches, format, "mse", steps=40)

  def error(ends):
    rounded = fake_quantize(jnp.asarray(batches), format, low=ends[0], high=ends[1])
    return float(jnp.mean((rounded - batches) ** 2))

  candidates = [error((whole[0] * i / 40, whole[1] * i / 40)) for i in range(1, 41)]
  assert error(searched) == pytest.approx(min(candidates), rel=1e-6)
  assert error(searched) < error(whole)
  with pytest.raises(UserError, match="observer='max'; supported: min_max"):
    static_range(batches, format, "max")


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_straight_through_rounding(symmetric):
  format = ActivationFormat(4, symmetric=symmetric)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 8)), jnp.float32)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
  low, high = 0.6 * x.min(axis=-1, keepdims=True), 0.7 * x.max(axis=-1, keepdims=True)

  def reference(x, low, high):
    scale, zero = range_to_scale(low, high, format)
    codes = clip_ste(round_ste(x / scale) + zero, *format.code_range)
    return jnp.sum((codes - zero) * scale * weights)

  def found(x, low, high):
    # `fake_quantize` has an axis of groups before the channels.
    rounded = fake_quantize(x, format, low=low[..., None, :], high=high[..., None, :])
    return jnp.sum(rounded * weights)

  (a, da), (b, db) = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, low, high) for f in (found, reference)
  )
  np.testing.assert_allclose(a, b, rtol=1e-6)
  for one, other in zip(da, db):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def quantized_block(format, ranges=None):
  config = ARCHITECTURES["opt"]
  block = random_module(lambda: Block(config, nnx.Rngs(0)), seed=0)
  paths = linear_paths(block)
  block = rtn_block(block, IntegerFormat(4, symmetric=True))
  quantize_inputs(block, paths, format, None if ranges is None else dict.fromkeys(paths, ranges))
  return block, paths


@pytest.mark.parametrize(
  "format, ranges",
  (
    (ActivationFormat(4, symmetric=True), None),
    (ActivationFormat(8, "per_tensor", symmetric=True), (-2.0, 3.0)),
    (ActivationFormat(6, "per_tensor"), (-2.0, 3.0)),
  ),
)
def test_integer_products_equal_the_fake_quantized_layer(format, ranges):
  if ranges is not None:
    ranges = jnp.float32(ranges[0]), jnp.float32(ranges[1])
  block, paths = quantized_block(format, ranges)
  layers = {path: get_module(block, path) for path in paths}
  assert all(isinstance(layer, QuantizedInput) for layer in layers.values())
  integer_linears(block)
  x = jax.random.normal(jax.random.key(1), (2, 5, 64))
  for path, layer in layers.items():
    integer = get_module(block, path)
    assert isinstance(integer, IntegerLinear)
    inputs = x[..., : layer.layer.weight.get_value().shape[0]]
    # The integer sums are exact; the reference adds float32 products of order 1.
    np.testing.assert_allclose(integer(inputs), layer(inputs), rtol=1e-4, atol=1e-4)


def test_a_per_tensor_weight_has_an_integer_product():
  w = jax.random.normal(jax.random.key(0), (16, 8))
  weight = rtn.quantize(w, IntegerFormat(8, axis=None, symmetric=True))
  format = ActivationFormat(8, symmetric=True)
  reference = QuantizedInput(QuantizedLinear(weight), format)
  x = jax.random.normal(jax.random.key(1), (3, 16))
  np.testing.assert_allclose(IntegerLinear(weight, format)(x), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "arguments, message",
  (
    ({"bits": 9}, "activations of 9 bits"),
    ({"bits": 4, "granularity": "per_row"}, "granularity='per_row'; supported"),
    ({"bits": 4, "granularity": "per_tensor", "group_size": 4}, "groups of channels"),
  ),
)
def test_formats_that_do_not_exist(arguments, message):
  with pytest.raises(UserError, match=message):
    ActivationFormat(**arguments)


def test_what_does_not_fit_is_named():
  with pytest.raises(UserError, match="group_size=3 does not divide 8 channels"):
    fake_quantize(jnp.ones((2, 8)), ActivationFormat(4, group_size=3))


def test_what_has_no_integer_product_stays_as_it_is():
  block, paths = quantized_block(ActivationFormat(4))
  layer = get_module(block, paths[0])
  reason = no_integer_product(layer.layer.weight.get_value(), layer.format)
  assert "asymmetric per token" in reason
  integer_linears(block)
  assert all(isinstance(get_module(block, path), QuantizedInput) for path in paths)
