import dataclasses
import itertools
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.quantization import rtn
from common.quantization.quantized_array import IntegerFormat

GOLDEN = np.load(
  pathlib.Path(__file__).parents[2] / "golden" / "awq" / "pseudo_quantize_tensor.npz"
)
GOLDEN_FORMATS = [(bits, group) for bits in (2, 3, 4) for group in (32, 64, -1)]

quantize = jax.jit(rtn.quantize, static_argnums=1)
fake_quantize = jax.jit(rtn.fake_quantize, static_argnums=1)
dequantize = jax.jit(lambda quantized: quantized.dequantize())


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_group(per_group, w, format):
  """Repeats a value per group for every weight."""
  rows, columns = w.shape[0] // per_group.shape[0], w.shape[1] // per_group.shape[1]
  return np.kron(np.asarray(per_group, np.float64), np.ones((rows, columns)))


@pytest.mark.parametrize(
  "bits, group_size, jitted",
  [(*f, True) for f in GOLDEN_FORMATS] + [(bits, 32, False) for bits in (2, 3, 4)],
)
def test_equals_the_official_code_bit_for_bit(bits, group_size, jitted):
  """Fused by the compiler or one operation at a time."""
  format, suffix = IntegerFormat(bits, group_size), f"_b{bits}_g{group_size}"
  w = jnp.asarray(GOLDEN["w"].T)
  with jax.disable_jit(not jitted):
    quantized, fake = quantize(w, format), fake_quantize(w, format)
  np.testing.assert_array_equal(fake.T, GOLDEN["wq" + suffix])
  np.testing.assert_array_equal(dequantize(quantized).T, GOLDEN["wq" + suffix])
  np.testing.assert_array_equal(quantized.scales.T, GOLDEN["scale" + suffix])
  np.testing.assert_array_equal(quantized.zero_points.astype(jnp.int32).T, GOLDEN["zero" + suffix])


def test_golden_covers_the_official_oddities():
  """Row 3 is all positive, row 5 constant: both hit the clamped zero point."""
  w = GOLDEN["w"]
  assert (w[3] > 0).all() and (w[5] == w[5, 0]).all()
  assert (GOLDEN["zero_b3_g32"][[3, 5]] == 0).all()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_a_constant_group_collapses(bits):
  """The scale hits its floor, 1e-5 / (2^bits - 1), so nothing above 1e-5 can be represented."""
  w = np.full((8, 2), 0.7, np.float32)
  result = np.asarray(fake_quantize(w, IntegerFormat(bits, 8)))
  # The top code times the scale: 1e-5 up to the rounding of both.
  np.testing.assert_allclose(result, 1e-5, rtol=1e-6)


def test_an_all_positive_group_saturates_at_the_top():
  """The zero point cannot go below 0, so codes count from 0 and the largest weights are cut."""
  w = np.linspace(1.0, 2.0, 8, dtype=np.float32)[:, None]
  quantized = quantize(w, IntegerFormat(2, 8))
  assert quantized.zero_points.astype(jnp.int32).item() == 0
  np.testing.assert_allclose(quantized.scales, 1 / 3, rtol=1e-6)
  # Every weight is at least 3 scales, the top code.
  np.testing.assert_allclose(quantized.dequantize(), 1.0, rtol=1e-6)


def test_an_all_negative_group_saturates_at_the_bottom():
  w = np.linspace(-2.0, -1.0, 8, dtype=np.float32)[:, None]
  quantized = quantize(w, IntegerFormat(2, 8))
  assert quantized.zero_points.astype(jnp.int32).item() == 3
  np.testing.assert_allclose(quantized.dequantize(), -1.0, rtol=1e-6)


# Every width, grouping and symmetry, not every combination: each compiles anew.
FORMATS = [
  IntegerFormat(bits, group_size, axis, symmetric)
  for (bits, group_size, axis), symmetric in itertools.chain(
    itertools.product(((2, 8, 0), (3, 8, 0), (4, -1, 0), (8, 8, 0)), (False, True)),
    zip(((3, 8, 1), (4, -1, None), (2, -1, 1), (4, 8, 1)), (False, False, True, True)),
  )
]
weights = st.builds(
  lambda seed, exponent, offset: (
    (normal((32, 16), seed) + offset) * np.float32(10.0) ** np.float32(exponent)
  ),
  st.integers(0, 2**32 - 1),
  st.floats(-3, 3),
  # Groups with both signs, of one sign, and touching 0.
  st.sampled_from((0.0, 0.0, 2.0, -5.0)),
)


@hypothesis.settings(deadline=None, max_examples=120, derandomize=True)
@hypothesis.given(w=weights, format=st.sampled_from(FORMATS))
def test_properties(w, format):
  quantized = quantize(w, format)
  result = np.asarray(dequantize(quantized))
  np.testing.assert_array_equal(fake_quantize(w, format), result)

  grouped = np.asarray(rtn.group(result, format)).transpose(0, 2, 1, 3)
  for values in grouped.reshape(-1, grouped.shape[2] * grouped.shape[3]):
    assert len(np.unique(values)) <= 2**format.bits

  # Where the range holds 0, every weight is within half a scale of a code: asymmetric ranges, whose
  # zero point is rounded, can end up to half a scale beyond the last code. (A range on one side
  # of 0 saturates, see above.)
  original = np.asarray(rtn.group(w, format))
  low, high = original.min(axis=(1, 3)), original.max(axis=(1, 3))
  bounded = of_group(((low <= 0) & (high >= 0)) | format.symmetric, w, format) == 1
  half = of_group(quantized.scales, w, format) / 2
  error = np.abs(w.astype(np.float64) - result)
  # 1e-6 covers the float32 rounding of the quotient and of the product.
  assert (error <= half * (1 + 1e-6) + 1e-6 * np.abs(w))[bounded].all()


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  format=st.sampled_from([f for f in FORMATS if not f.symmetric]),
)
def test_idempotent_where_a_group_holds_both_extremes(seed, format):
  """With the outermost codes among a group's values, the second pass finds the same range."""
  quantized = quantize(normal((32, 16), seed), format)
  once = np.asarray(dequantize(quantized))
  grouped = np.asarray(rtn.group(once, format))
  scales = np.asarray(quantized.scales)
  span = grouped.max(axis=(1, 3)) - grouped.min(axis=(1, 3))
  full = of_group(np.round(span / scales) == 2**format.bits - 1, once, format) == 1
  hypothesis.assume(full.any())
  twice = np.asarray(fake_quantize(once, format))
  # The second scale is the rounded quotient of a rounded span: a few float32 roundings apart.
  np.testing.assert_allclose(twice[full], once[full], rtol=1e-6, atol=0)


def test_symmetric_uses_the_signed_range_and_keeps_zero():
  w = np.array([[-1.0], [0.0], [0.3], [1.0]], np.float32)
  quantized = quantize(w, IntegerFormat(4, 4, symmetric=True))
  assert quantized.zero_points is None and quantized.values.dtype == jnp.int4
  np.testing.assert_array_equal(quantized.values.astype(jnp.int32)[:, 0], [-7, 0, 2, 7])
  np.testing.assert_allclose(quantized.scales, 1 / 7, rtol=1e-6)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
def test_codes_are_computed_against_the_stored_scale(dtype, symmetric):
  """Half-precision scales move codes; rounding against the float32 scale would be worse."""
  w = normal((64, 16)) * 1e-2
  format = IntegerFormat(8, 64, symmetric=symmetric, scale_dtype=dtype)
  quantized = quantize(w, format)
  assert quantized.scales.dtype == dtype
  scales = np.asarray(quantized.scales, np.float64)
  zeros = 0 if symmetric else np.asarray(quantized.zero_points, np.int64)
  low, high = format.code_range
  expected = (np.clip(np.round(w / scales) + zeros, low, high) - zeros) * scales
  # One float32 rounding of the product.
  np.testing.assert_allclose(quantized.dequantize(), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_float16_scales_of_a_constant_group_are_finite(bits):
  """The floor of the scale, 1e-5 / 255, lies below float16's normal numbers."""
  format = IntegerFormat(bits, 8, scale_dtype=jnp.float16)
  result = fake_quantize(np.zeros((8, 2), np.float32), format)
  np.testing.assert_array_equal(result, 0)


def test_low_precision_weights_are_quantized_in_float32():
  w = jnp.asarray(normal((32, 8)), jnp.bfloat16)
  expected = fake_quantize(w.astype(jnp.float32), IntegerFormat(4, 8))
  result = fake_quantize(w, IntegerFormat(4, 8))
  assert result.dtype == jnp.float32
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("bits, levels", ((4, np.arange(-7, 7)), (8, np.arange(-100, 100))))
def test_ties_are_decided_by_the_true_quotient(bits, levels):
  """Weights exactly between two codes go to the even one. A product with the rounded reciprocal of
  the scale would put many of them on the wrong side."""
  rng = np.random.default_rng(0)
  scales = rng.uniform(0.01, 0.02, (1, 400)).astype(np.float32)
  halves = (levels[:, None] + 0.5).astype(np.float32)
  w = halves * scales
  ties = w / scales == halves  # The product may have been rounded off the tie.
  assert 0.3 < ties.mean()
  assert (np.round(w * (1 / scales)) != np.round(halves))[ties].any()
  format = IntegerFormat(bits, -1, symmetric=True)
  codes = jax.jit(rtn.encode, static_argnums=3)(w, scales, None, format)
  np.testing.assert_array_equal(codes[ties], np.broadcast_to(np.round(halves), w.shape)[ties])


def test_group_size_must_divide():
  for format in (IntegerFormat(4, 24), IntegerFormat(4, 24, axis=1), IntegerFormat(4, 64)):
    with pytest.raises(UserError, match=f"{format.group_size} does not divide the .*put dimension"):
      rtn.quantize(jnp.zeros((32, 32)), format)


def test_matches_float64_min_max():
  """The formula of the module, redone in float64."""
  w, format = normal((32, 16), 3), IntegerFormat(3, 8)
  grouped = w.astype(np.float64).reshape(4, 8, 16)
  scale = (grouped.max(1) - grouped.min(1)) / 7
  zero = np.clip(-np.round(grouped.min(1) / scale), 0, 7)
  codes = np.clip(np.round(grouped / scale[:, None]) + zero[:, None], 0, 7)
  expected = ((codes - zero[:, None]) * scale[:, None]).reshape(32, 16)
  # No tie among these weights, so only the rounding of the scale differs.
  np.testing.assert_allclose(fake_quantize(w, format), expected, rtol=1e-6)


def test_scale_type_does_not_matter_to_equality():
  """Formats are static arguments: the same type spelled in two ways must not compile twice."""
  a, b = (dataclasses.replace(IntegerFormat(4), scale_dtype=d) for d in (jnp.float16, "float16"))
  assert a == b and hash(a) == hash(b)


def test_spread_repeats_every_groups_value_over_its_weights():
  groups = jnp.arange(6.0).reshape(2, 3)
  expected = np.repeat(np.asarray(groups), 4, axis=0)
  np.testing.assert_array_equal(rtn.spread(groups, (8, 3)), expected)
  np.testing.assert_array_equal(rtn.spread(groups, (2, 2, 2, 3)), expected.reshape(2, 2, 2, 3))
  np.testing.assert_array_equal(rtn.spread(jnp.full((1, 1), 2.0), (3, 5)), np.full((3, 5), 2.0))


@pytest.mark.parametrize("axis", (0, 1, None))
def test_a_range_can_be_made_to_contain_zero(axis):
  w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)) + 1, jnp.float32)
  format = IntegerFormat(4, 2 if axis is not None else -1, axis=axis)
  low, high = rtn.min_max_range(w, format)
  wide = rtn.min_max_range(w, format, include_zero=True)
  np.testing.assert_array_equal(wide, (np.minimum(low, 0), np.maximum(high, 0)))
  assert axis is None or (np.asarray(low) > 0).any()
