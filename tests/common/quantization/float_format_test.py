import pathlib
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.quantization.float_format import (
  FloatFormat,
  bias_for,
  decode,
  encode,
  fake_quantize,
  max_value,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[2] / "golden" / "llm_fp4" / "fp_fake_quant.npz")
FORMATS = [FloatFormat(e, m) for e in range(1, 6) for m in range(0, 7) if 3 <= 1 + e + m <= 8]


def grid(format: FloatFormat, bias: float) -> np.ndarray:
  """All non-negative values, written out, float64."""
  m = format.mantissa_bits
  k = np.arange(2**m) / 2**m
  normal = [2.0 ** (p - bias) * (1 + k) for p in range(1, 2**format.exponent_bits)]
  return np.concatenate([2.0 ** (1 - bias) * k, *normal])


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "x"])
def test_equals_the_official_quantizer(name):
  bits, m, bias = re.fullmatch(r"q_n(\d)_m(\d)_b([\d.]+)", name).groups()
  format = FloatFormat(int(bits) - 1 - int(m), int(m))
  x, expected = GOLDEN["x"], GOLDEN[name]
  found = np.asarray(fake_quantize(jnp.asarray(x), format, float(bias)))
  # The official code clips at 2^(2^e - b), beyond its own largest value: see SOURCE.md.
  largest = float(max_value(format, float(bias)))
  inside = np.abs(x) <= largest
  assert inside.mean() > 0.1
  # Ties that the rounding of log2 or of a real bias decides differ by a step at most.
  different = ~np.isclose(found, expected, rtol=1e-5, atol=0)
  assert different[inside].mean() < 0.01, np.flatnonzero(different & inside)
  np.testing.assert_allclose(np.abs(found[~inside]), largest, rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_are_the_grid_in_order(format):
  codes = jnp.arange(2 ** (format.bits - 1))
  for bias in (0.0, 1.0, 2.3):
    values = decode(codes.astype(format.dtype), format, bias)
    np.testing.assert_allclose(values, grid(format, bias), rtol=1e-6)
    np.testing.assert_array_equal(encode(values, format, bias), codes)
    negative = encode(-values[1:], format, bias).astype(jnp.int32)
    np.testing.assert_array_equal(negative, codes[1:] | 2 ** (format.bits - 1))
    assert max_value(format, bias) == pytest.approx(grid(format, bias).max(), rel=1e-6)
    assert bias_for(format, max_value(format, bias)) == pytest.approx(bias, abs=1e-5)


@settings(max_examples=30, deadline=None)
@example(FloatFormat(5, 0), -0.2, 1)
@given(st.sampled_from(FORMATS), st.floats(-3, 5), st.integers(0, 2**16))
def test_nearest_value_and_round_trip(format, bias, seed):
  largest = float(max_value(format, bias))
  x = jnp.asarray(np.random.default_rng(seed).uniform(-1.2, 1.2, 40) * largest, jnp.float32)
  found = np.asarray(fake_quantize(x, format, bias), np.float64)
  values = np.concatenate([-grid(format, bias), grid(format, bias)])
  nearest = np.abs(np.asarray(x, np.float64)[:, None] - values).min(axis=1)
  # 2^e in float32: an exponent of 32 and more is rounded by up to 2e-6, and so is the value by 1.3e-6.
  np.testing.assert_allclose(np.abs(x - found), nearest, rtol=1e-4, atol=4e-6 * largest)
  np.testing.assert_allclose(
    decode(encode(x, format, bias), format, bias), found, rtol=1e-5, atol=1e-6 * largest
  )


def test_integer_biases_are_the_formats_of_ml_dtypes():
  x = jnp.asarray(np.random.default_rng(0).normal(size=500) * 2, jnp.float32)
  for format, bias, dtype in (
    (FloatFormat(2, 1), 1, ml_dtypes.float4_e2m1fn),
    (FloatFormat(2, 3), 1, ml_dtypes.float6_e2m3fn),
    (FloatFormat(3, 2), 3, ml_dtypes.float6_e3m2fn),
  ):
    # Both saturate; these formats have no infinity and no NaN.
    largest = float(max_value(format, bias))
    expected = np.asarray(jnp.clip(x, -largest, largest)).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(x, format, float(bias)), expected)


def test_a_bias_for_each_channel():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
  bias = jnp.array([1.0, 2.5, -1.0])
  found = fake_quantize(x, FloatFormat(2, 1), bias)
  for j in range(3):
    np.testing.assert_array_equal(found[:, j], fake_quantize(x[:, j], FloatFormat(2, 1), bias[j]))


@pytest.mark.parametrize("bits", [(0, 3), (6, 1), (4, 4), (2, -1)])
def test_formats_that_do_not_exist(bits):
  with pytest.raises(ValueError, match="exponent bits"):
    FloatFormat(*bits)
