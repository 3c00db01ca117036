import jax.numpy as jnp
import numpy as np
import pytest

from common.quantization.float_format import FloatFormat, bias_for, decode, encode
from kernels.float_matmul.api import float_matmul


@pytest.mark.parametrize("groups", (1, 3))
@pytest.mark.parametrize("bits", [(2, 1), (1, 2), (3, 0), (4, 3), (5, 2)])
def test_equals_float64(bits, groups):
  format, rng = FloatFormat(*bits), np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(groups, 8, 10)), jnp.float32)
  bias = bias_for(format, jnp.abs(w).max(axis=1, keepdims=True))  # Real, of every channel.
  codes = encode(w, format, bias).reshape(-1, 10)
  exact = np.asarray(decode(codes.reshape(w.shape), format, bias), np.float64).reshape(-1, 10)
  x = jnp.asarray(rng.normal(size=(2, 5, 8 * groups)), jnp.float32)
  options = {"exponent_bits": bits[0], "mantissa_bits": bits[1]}
  y = float_matmul(x, codes, jnp.exp2(-bias[:, 0]), **options)
  np.testing.assert_allclose(y, np.asarray(x, np.float64) @ exact, rtol=1e-5, atol=1e-5)
  half = float_matmul(x.astype(jnp.bfloat16), codes, jnp.exp2(-bias[:, 0]), **options)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(half, np.float32), y, rtol=0.02, atol=0.1)


def test_bad_arguments():
  x, codes, scales = jnp.ones((3, 8)), jnp.zeros((8, 4), jnp.uint4), jnp.ones((2, 4))
  good = {"exponent_bits": 2, "mantissa_bits": 1}
  assert float_matmul(x, codes, scales, **good).shape == (3, 4)
  for arrays, options, message in (
    ((x, codes, scales), {"exponent_bits": 6, "mantissa_bits": 1}, "E6M1 is not supported"),
    ((x, codes, scales), {"exponent_bits": 4, "mantissa_bits": 3}, "expected uint8"),
    ((x, codes.astype(jnp.uint8), scales), good, "expected uint4"),
    ((x[:, :7], codes, scales), good, r"expected uint4 \[7, out\]"),
    ((x, codes, scales[:, :3]), good, r"expected \[groups, 4\]"),
    ((x, codes, jnp.ones((3, 4))), good, "3 groups do not divide 8"),
    ((x.astype(jnp.int32), codes, scales), good, "x is int32"),
  ):
    with pytest.raises(ValueError, match=message):
      float_matmul(*arrays, **options)
