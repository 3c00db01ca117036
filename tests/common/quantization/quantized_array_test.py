import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.quantization import rtn
from common.quantization.quantized_array import IntegerFormat, from_codes

quantize = jax.jit(rtn.quantize, static_argnums=1)
dequantize = jax.jit(lambda quantized: quantized.dequantize())


@pytest.mark.parametrize(
  "arguments, message",
  (
    ((5,), "bits=5 is not supported; supported: 2, 3, 4, 6, 8"),
    ((16,), "bits=16"),
    ((4, 0), "group_size=0 must be positive, or -1"),
    ((4, -2), "group_size=-2 must be positive"),
    ((4, 8, 2), "axis=2 must be 0 .*1 .*None"),
  ),
)
def test_unsupported_formats_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    IntegerFormat(*arguments)


@pytest.mark.parametrize(
  "format, expected",
  (
    (IntegerFormat(4, 8), (4, 24)),
    (IntegerFormat(4), (1, 24)),
    (IntegerFormat(4, 8, 1), (32, 3)),
    (IntegerFormat(4, -1, 1), (32, 1)),
    (IntegerFormat(4, -1, None), (1, 1)),
  ),
)
def test_num_groups(format, expected):
  assert format.num_groups((32, 24)) == expected
  quantized = jax.eval_shape(lambda w: rtn.quantize(w, format), jnp.zeros((32, 24)))
  assert quantized.scales.shape == expected


def test_code_range():
  assert IntegerFormat(3).code_range == (0, 7)
  assert IntegerFormat(3, symmetric=True).code_range == (-4, 3)


def abstract(shape, *arguments, **options):
  """A `QuantizedArray` of shapes and types only."""
  format = IntegerFormat(*arguments, **options)
  return jax.eval_shape(lambda w: rtn.quantize(w, format), jnp.zeros(shape))


@pytest.mark.parametrize("bits", (2, 3, 4, 6, 8))
@pytest.mark.parametrize("group_size", (32, 128))
def test_bits_per_weight(bits, group_size):
  """N + (16 + N) / g with float16 scales; symmetric codes have no zero points."""
  stored = functools.partial(abstract, (128, 64), bits, group_size)
  asymmetric = stored(scale_dtype=jnp.float16)
  assert asymmetric.bits_per_weight() == bits + (16 + bits) / group_size
  assert stored(scale_dtype=jnp.float16, symmetric=True).bits_per_weight() == bits + 16 / group_size
  assert stored().bits_per_weight() == bits + (32 + bits) / group_size
  # Zero points of 3-bit codes take a byte each, and so do 6-bit codes.
  code_bits, zero_bits = 8 if bits == 6 else bits, 8 if bits in (3, 6) else bits
  stored_bits = 128 * 64 * code_bits + 128 // group_size * 64 * (16 + zero_bits)
  assert asymmetric.packed_bytes() == stored_bits / 8


def test_packed_bytes_count_padding():
  """Words of 64 rows hold 40 rows."""
  quantized = abstract((40, 8), 3, -1, scale_dtype=jnp.float16)
  assert quantized.values.shape == (2 * 3, 8)
  assert quantized.packed_bytes() == 2 * 3 * 8 * 4 + 8 * (2 + 1)


def test_is_a_pytree_with_static_format():
  w = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  quantized = quantize(jnp.asarray(w), IntegerFormat(4, 32))
  assert len(jax.tree.leaves(quantized)) == 3
  assert len(jax.tree.leaves(quantize(w, IntegerFormat(4, 32, symmetric=True)))) == 2
  through = jax.jit(lambda q: q)(quantized)
  assert through.format == quantized.format and through.shape == quantized.shape
  np.testing.assert_array_equal(dequantize(quantized), quantized.dequantize())


def test_dequantize_to_another_type():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
  quantized = quantize(w, IntegerFormat(4, 32))
  low = quantized.dequantize(jnp.bfloat16)
  assert low.dtype == jnp.bfloat16
  np.testing.assert_array_equal(low, quantized.dequantize().astype(jnp.bfloat16))


@pytest.mark.parametrize("bits", (2, 3, 4, 6, 8))
def test_from_codes(bits):
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 2**bits, (40, 4)).astype(np.float32)
  zeros = rng.integers(0, 2**bits, (5, 4)).astype(np.float32)
  scales = rng.uniform(1, 2, (5, 4)).astype(np.float32)
  format = IntegerFormat(bits, 8, scale_dtype=jnp.float16)
  quantized = from_codes(*map(jnp.asarray, (codes, scales, zeros)), format)
  assert quantized.shape == (40, 4) and quantized.scales.dtype == jnp.float16
  stored = scales.astype(np.float16).astype(np.float32)
  expected = (codes - zeros.repeat(8, axis=0)) * stored.repeat(8, axis=0)
  np.testing.assert_array_equal(dequantize(quantized), expected)
