import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantized_matmul import xla
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import SUPPORTED_BITS, pack

# Rows are no multiple of 32, so that the last words of 3-bit weights are padded.
ROWS, COLUMNS = 40, 24
GROUPINGS = {
  "input groups": (ROWS // 8, COLUMNS),
  "per output channel": (1, COLUMNS),
  "output groups": (ROWS, COLUMNS // 8),
  "per input channel": (ROWS, 1),
  "per tensor": (1, 1),
}
dequantize = jax.jit(xla.dequantize, static_argnames=("bits", "rows"))
matmul = jax.jit(quantized_matmul, static_argnames=("bits", "implementation"))


@functools.partial(jax.jit, static_argnames="bits")
def matmul_both(x, low, *weights, bits):
  """One compilation for both input types."""
  return quantized_matmul(x, *weights, bits=bits), quantized_matmul(low, *weights, bits=bits)


def random_weights(bits, groups, asymmetric, seed=0):
  """Codes, scales and zero points, and the float64 matrix that they stand for."""
  rng = np.random.default_rng(seed)
  low = 0 if asymmetric else -(2 ** (bits - 1))
  codes = rng.integers(low, low + 2**bits, (ROWS, COLUMNS))
  scales = rng.uniform(0.5, 1.5, groups).astype(np.float32)
  zeros = rng.integers(0, 2**bits, groups) if asymmetric else np.zeros(groups, int)
  spread = lambda v: np.kron(v, np.ones((ROWS // groups[0], COLUMNS // groups[1])))
  exact = (codes - spread(zeros)) * spread(scales.astype(np.float64))
  return codes, scales, zeros if asymmetric else None, exact


def packed(codes, scales, zeros, bits):
  values = pack(jnp.asarray(codes), bits, signed=zeros is None)
  if zeros is not None:
    zeros = pack(jnp.asarray(zeros), 8 if bits == 3 else bits, signed=False)
  return values, jnp.asarray(scales), zeros


@pytest.mark.parametrize(
  "bits, grouping, asymmetric",
  itertools.product(SUPPORTED_BITS, GROUPINGS, (True, False)),
)
def test_equals_float64(bits, grouping, asymmetric):
  *weights, exact = random_weights(bits, GROUPINGS[grouping], asymmetric)
  values, scales, zeros = packed(*weights, bits)
  x = np.random.default_rng(1).normal(size=(2, 3, ROWS)).astype(np.float32)
  low = jnp.asarray(x, jnp.bfloat16)
  y, y_low = matmul_both(x, low, values, scales, zeros, bits=bits)
  assert y.dtype == jnp.float32 and y.shape == (2, 3, COLUMNS)
  # Float32 rounding of a sum of 40 products: at most (40 + 2) * 2^-24 of the sum of magnitudes.
  bound = 42 * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(exact))
  assert (np.abs(y - x.astype(np.float64) @ exact) <= bound).all()

  assert y_low.dtype == jnp.bfloat16
  # bfloat16 rounds the dequantized weights and the result (2^-9 each, the inputs are exact as
  # given); accumulating in bfloat16 would be tens of times outside.
  reference = np.asarray(low, np.float64)
  bound = (2.0**-9 + 1e-5) * (np.abs(reference) @ np.abs(exact) + np.abs(reference @ exact))
  assert (np.abs(np.asarray(y_low, np.float64) - reference @ exact) <= bound).all()


def test_bfloat16_sums_are_asked_for_in_float32():
  """Read from the program: the CPU sums in float32 whatever it is asked for."""
  values, scales = pack(jnp.ones((64, 8), jnp.int32), 4, signed=True), jnp.ones((1, 1))
  program = jax.make_jaxpr(lambda x: quantized_matmul(x, values, scales, bits=4))
  text = str(program(jnp.ones((1, 64), jnp.bfloat16)))
  assert text.count("dot_general") == 1 and "preferred_element_type=float32" in text


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
def test_scales_may_be_stored_in_half_precision(dtype):
  codes, scales, zeros, _ = random_weights(4, GROUPINGS["input groups"], True)
  values, scales, zeros = packed(codes, scales, zeros, 4)
  x = np.random.default_rng(1).normal(size=(2, ROWS)).astype(np.float32)
  stored = scales.astype(dtype)
  y = matmul(x, values, stored, zeros, bits=4)
  np.testing.assert_array_equal(y, matmul(x, values, stored.astype(jnp.float32), zeros, bits=4))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_dequantize_is_exact(bits, grouping):
  """A code times a scale is one float32 rounding."""
  codes, scales, zeros, exact = random_weights(bits, GROUPINGS[grouping], True)
  weights = dequantize(*packed(codes, scales, zeros, bits), bits=bits, rows=ROWS)
  np.testing.assert_array_equal(weights, exact.astype(np.float32))


def test_implementation_by_name():
  *weights, _ = random_weights(4, (5, COLUMNS), True)
  arguments = jnp.ones((2, ROWS)), *packed(*weights, 4)
  expected = matmul(*arguments, bits=4)
  np.testing.assert_array_equal(matmul(*arguments, bits=4, implementation="xla"), expected)


BAD_ARGUMENTS = {
  "bits": ({"bits": 5}, "5 bits are not supported; supported: .*2, 3, 4, 6, 8"),
  "implementation": (
    {"implementation": "cuda"},
    "'cuda' is not supported; supported: xla, mosaic_tpu",
  ),
  "integer x": ({"x": jnp.ones((2, ROWS), jnp.int32)}, "floating point, got int32"),
  "scalar x": ({"x": jnp.float32(1)}, "at least one dimension"),
  "x and values disagree": ({"x": jnp.ones((2, ROWS - 8))}, r"expected \(32, 24\)"),
  "values of another width": ({"bits": 8}, "uint4, expected uint8"),
  "values packed for 3 bits": (
    {"values": jnp.zeros((6, COLUMNS), jnp.uint32)},
    r"\(6, 24\), expected \(40, 24\)",
  ),
  "too few words of 3-bit codes": (
    {"bits": 3, "values": jnp.zeros((3, COLUMNS), jnp.uint32)},
    r"\(3, 24\), expected \(6, 24\)",
  ),
  "signed values with zero points": (
    {"values": jnp.zeros((ROWS, COLUMNS), jnp.int4)},
    "int4, expected uint4",
  ),
  "unsigned values without zero points": ({"zero_points": None}, "uint4, expected int4"),
  "scales do not divide": ({"scales": jnp.ones((7, COLUMNS))}, r"\(7, 24\) do not divide"),
  "one-dimensional scales": ({"scales": jnp.ones(COLUMNS)}, r"\(24,\) do not divide"),
  "no scales": ({"scales": jnp.ones((0, COLUMNS))}, r"\(0, 24\) do not divide"),
  "zero points of another shape": (
    {"zero_points": jnp.zeros((1, COLUMNS), jnp.uint4)},
    r"\(1, 24\) differ from scales \(5, 24\)",
  ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(case):
  changes, message = BAD_ARGUMENTS[case]
  *weights, _ = random_weights(4, (5, COLUMNS), True)
  values, scales, zeros = packed(*weights, 4)
  arguments = {
    "x": jnp.ones((2, ROWS)),
    "values": values,
    "scales": scales,
    "zero_points": zeros,
    "bits": 4,
  }
  with pytest.raises(ValueError, match=message):
    quantized_matmul(**arguments | changes)
