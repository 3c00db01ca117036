"""Integer products against float64, and in the programs of real chips."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from common import cli
from common.compilation.topology import tpu_slice
from kernels.integer_matmul import mosaic_tpu, xla
from kernels.integer_matmul.api import integer_matmul, scaled_matmul


def weights(bits, inputs=24, columns=10, groups=1, seed=0):
  rng = np.random.default_rng(seed)
  codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (inputs, columns))
  scales = rng.uniform(0.5, 1.5, (groups, columns)).astype(np.float32)
  exact = codes * np.repeat(scales.astype(np.float64), inputs // groups, axis=0)
  dtype = jnp.int4 if bits == 4 else jnp.int8
  return jnp.asarray(codes, dtype), jnp.asarray(scales), exact


def fake_quantized(x, scale, zero, bits):
  """float64 values that the codes stand for; zero None for symmetric codes."""
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zero is None else (0, 2**bits - 1)
  zero = 0 if zero is None else zero
  # float32, as the codes are made: the same rounding of ties.
  codes = np.clip(np.round(np.float32(x) / np.float32(scale)) + zero, low, high)
  return (codes - zero) * np.float64(scale)


@pytest.mark.parametrize("code_bits, weight_bits, groups", [(8, 8, 1), (8, 4, 3), (4, 4, 3)])
def test_products_of_codes(code_bits, weight_bits, groups):
  values, scales, exact = weights(weight_bits, groups=groups)
  rng = np.random.default_rng(1)
  codes = rng.integers(-(2 ** (code_bits - 1)), 2 ** (code_bits - 1), (2, 3, 24))
  code_scales = rng.uniform(0.01, 1, (2, 3, 1)).astype(np.float32)
  narrow = jnp.asarray(codes, jnp.int4 if code_bits == 4 else jnp.int8)
  found = scaled_matmul(narrow, jnp.asarray(code_scales), values, scales, dtype=jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  # bfloat16's rounding.
  np.testing.assert_allclose(found.astype(jnp.float32), codes * code_scales @ exact, rtol=2**-8)


@pytest.mark.parametrize(
  "change, message",
  (
    ({"codes": jnp.ones((3, 24))}, "codes are float32 .3, 24., expected int8 or int4"),
    ({"code_scales": jnp.ones((1, 1))}, "code_scales .1, 1., expected .3, 1."),
    ({"codes": jnp.ones((3, 23), jnp.int8)}, "do not match"),
  ),
)
def test_bad_codes(change, message):
  values, scales, _ = weights(8)
  arguments = {
    "codes": jnp.ones((3, 24), jnp.int8),
    "code_scales": jnp.ones((3, 1)),
    "values": values,
    "scales": scales,
  }
  with pytest.raises(ValueError, match=message):
    scaled_matmul(**arguments | change)


@settings(max_examples=12, deadline=None)
@given(
  bits=st.sampled_from([(8, 8), (6, 6), (4, 8), (4, 4)]),
  groups=st.sampled_from([1, 3]),
  rows=st.integers(1, 5),
  seed=st.integers(0, 99),
)
def test_dynamic_per_token(bits, groups, rows, seed):
  weight_bits, activation_bits = bits
  values, scales, exact = weights(weight_bits, groups=groups, seed=seed)
  x = np.random.default_rng(seed).normal(size=(2, rows, 24)).astype(np.float32)
  x[0, 0] = 0
  largest = np.abs(x).max(axis=-1, keepdims=True)
  scale = np.where(largest == 0, 1, largest) / np.float32(2 ** (activation_bits - 1) - 1)
  found = integer_matmul(jnp.asarray(x), values, scales, activation_bits=activation_bits)
  expected = fake_quantized(x, scale, None, activation_bits) @ exact
  # The sums are exact; three float32 products and a sum over groups are not.
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("zero", (None, 0, 77, 255))
def test_static_scales_and_zero_points(zero):
  values, scales, exact = weights(8, groups=2)
  x = np.random.default_rng(1).normal(size=(7, 24)).astype(np.float32)
  scale = np.float32(0.013)  # Some values are clipped.
  found = integer_matmul(
    jnp.asarray(x),
    values,
    scales,
    activation_bits=8,
    activation_scales=jnp.asarray(scale),
    activation_zero_points=None if zero is None else jnp.asarray(zero),
  )
  expected = fake_quantized(x, scale, zero, 8) @ exact
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_scales_of_tokens():
  values, scales, exact = weights(4)
  x = np.random.default_rng(1).normal(size=(7, 24)).astype(np.float32)
  scale = np.linspace(0.1, 0.4, 7, dtype=np.float32)[:, None]
  zero = np.arange(7)[:, None]
  found = integer_matmul(
    jnp.asarray(x),
    values,
    scales,
    activation_bits=4,
    activation_scales=jnp.asarray(scale),
    activation_zero_points=jnp.asarray(zero),
  )
  np.testing.assert_allclose(found, fake_quantized(x, scale, zero, 4) @ exact, rtol=1e-5, atol=1e-4)


def test_gradients_go_straight_through():
  values, scales, exact = weights(8, groups=2)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 24)), jnp.float32)
  loss = lambda x, **options: jnp.sum(
    integer_matmul(x, values, scales, activation_bits=8, **options)
  )
  np.testing.assert_allclose(
    jax.grad(loss)(x), np.broadcast_to(exact.sum(axis=1), (5, 24)), rtol=1e-4, atol=1e-4
  )
  clipped = jax.grad(loss)(x, activation_scales=jnp.float32(0.01))
  outside = np.abs(np.asarray(x)) > 1.28
  assert outside.any() and (np.asarray(clipped)[outside] == 0).all()
  assert (np.asarray(clipped)[~outside] != 0).all()


@pytest.mark.parametrize("bits, dtype", [(8, jnp.bfloat16), (4, jnp.float32)])
def test_the_kernel_gives_the_codes_of_the_reference(bits, dtype, monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "_BLOCK_BYTES", 32 * 128 * 4)  # Several blocks of rows.
  x = np.random.default_rng(0).normal(size=(3, 32, 128)) * np.logspace(-3, 3, 32)[:, None]
  x[1, 4] = 0
  x = jnp.asarray(x, dtype)
  expected_codes, expected_scales = jax.jit(xla.quantize_activations, static_argnums=3)(
    x, None, None, bits
  )
  with pltpu.force_tpu_interpret_mode():
    codes, scales = mosaic_tpu.quantize_activations(x, None, None, bits)
  np.testing.assert_allclose(scales, expected_scales, rtol=2e-7)  # A division's last bit.
  # A quotient between two codes may go either way by that bit.
  assert codes.dtype == jnp.int8 and codes.shape == x.shape
  quotient = np.asarray(x, np.float64) / np.asarray(expected_scales, np.float64)
  assert (np.abs(codes - quotient) <= 0.5 + 2.0**-15).all()
  assert (np.asarray(codes) == expected_codes).mean() > 0.999


def test_product_and_gradient_with_the_kernel():
  values, scales, _ = weights(8, inputs=128)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(32, 128)), jnp.float32)
  product = lambda x, implementation: integer_matmul(
    x, values, scales, activation_bits=8, implementation=implementation
  )
  with pltpu.force_tpu_interpret_mode():
    found, pullback = jax.vjp(lambda x: product(x, "mosaic_tpu"), x)
  expected, reference = jax.vjp(lambda x: product(x, "xla"), x)
  # One code off by one changes a result by its scale times a weight of at most 1.5 * 128.
  step = float(jnp.abs(x).max()) / 127 * 1.5 * 128
  assert float(jnp.abs(found - expected).max()) <= step
  np.testing.assert_array_equal(pullback(found)[0], reference(found)[0])


def test_bad_arguments():
  values, scales, _ = weights(8)
  x = jnp.ones((3, 24))
  for change, message in (
    ({"activation_bits": 5}, "supported"),
    ({"x": jnp.ones((3, 24), jnp.int8)}, "expected float32"),
    ({"values": values.astype(jnp.int32)}, "int8 or int4"),
    ({"x": jnp.ones((3, 23))}, "do not match"),
    ({"scales": scales[:, :9]}, "expected \\[groups, 10\\]"),
    ({"scales": jnp.ones((5, 10))}, "5 groups do not divide 24"),
    ({"activation_zero_points": jnp.zeros(())}, "need static"),
    ({"activation_scales": jnp.ones(24)}, "do not broadcast|[Ii]ncompatible"),
    ({"implementation": "triton"}, "'triton' is not supported"),
    ({"implementation": "mosaic_tpu"}, "3 rows of 24 inputs, expected multiples of 32 and 128"),
  ):
    arguments = {"x": x, "values": values, "scales": scales, "activation_bits": 8} | change
    with pytest.raises(ValueError, match=message):
      integer_matmul(**arguments)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
  "slice_name, weight_bits, activation_bits, implementation",
  [
    *((chip, *bits, "xla") for chip in ("v5e:2x2", "v6e:2x2") for bits in ((8, 8), (4, 8), (4, 4))),
    *((chip, 8, 8, "mosaic_tpu") for chip in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")),
  ],
)
def test_integers_reach_the_matrix_unit(slice_name, weight_bits, activation_bits, implementation):
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice(slice_name).devices[0])
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  values = array(jnp.int4 if weight_bits == 4 else jnp.int8, 1024, 1024)
  product = lambda x, w, s: integer_matmul(
    x, w, s, activation_bits=activation_bits, implementation=implementation
  )
  compiled = jax.jit(product).lower(
    array(jnp.bfloat16, 256, 1024), values, array(jnp.float32, 1, 1024)
  ).compile()  # fmt: skip
  products = re.findall(r"= (\w+)\[[^=]* (?:convolution|dot)\(", compiled.as_text())
  assert products and set(products) == {"s32"}, products
