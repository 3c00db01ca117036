"""Codes of keys and values against a NumPy quantizer, and that they are really packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.decoding.quantized_cache import (
  dequantize,
  quantize_keys,
  quantize_values,
  write_packed,
)

X = jax.random.normal(jax.random.key(0), (2, 3, 16, 8))


def rounded(x, bits, axis, group):
  """Every group of entries along the axis on its own grid of 2^bits points."""
  x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
  grouped = x.reshape(*x.shape[:-1], -1, group)
  low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
  step = (high - low) / (2**bits - 1)
  out = np.round((grouped - low) / step) * step + low
  return np.moveaxis(out.reshape(x.shape), -1, axis)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("quantize, axis", [(quantize_keys, 2), (quantize_values, 3)])
def test_codes_stand_for_the_rounded_array(quantize, axis, bits):
  packed = quantize(X, bits=bits, group=8)
  np.testing.assert_allclose(dequantize(packed), rounded(X, bits, axis, 8), atol=1e-5)
  assert packed.codes.nbytes == X.size * bits // 8
  assert packed.scales.size == packed.minimums.size == X.size // 8


def test_constant_groups_are_exact_and_a_group_is_at_most_the_head():
  constant = jnp.full((1, 1, 8, 8), 1.25)
  np.testing.assert_array_equal(dequantize(quantize_keys(constant, group=8)), constant)
  assert quantize_values(X, group=32).scales.shape == (2, 3, 16, 1)


@pytest.mark.parametrize("quantize", [quantize_keys, quantize_values])
def test_slots_are_written_in_place(quantize):
  packed = quantize(X, group=8)
  written = write_packed(packed, quantize(-X[:, :, :8], group=8), jnp.int32(8))
  expected = [dequantize(packed)[:, :, :8], dequantize(quantize(-X[:, :, :8], group=8))]
  np.testing.assert_array_equal(dequantize(written), jnp.concatenate(expected, axis=2))


@pytest.mark.parametrize("arguments", [{"group": 5}, {"bits": 3, "group": 8}, {"group": 2}])
def test_sizes_that_do_not_fill_bytes(arguments):
  with pytest.raises(ValueError, match="do not fill bytes"):
    quantize_keys(X, **arguments)
