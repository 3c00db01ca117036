"""Products with vector-quantized weights against the dense matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.lookup_matmul.api import lookup, lookup_matmul, pack_indices, unpack_indices


def normal(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("bits", [1, 4, 12, 16])
def test_packed_indices_come_back(bits):
  indices = np.random.default_rng(bits).integers(0, 2**bits, (37, 5))
  planes = pack_indices(jnp.asarray(indices), 2**bits)
  assert planes.shape == (2, bits, 5) and planes.dtype == jnp.uint32
  np.testing.assert_array_equal(unpack_indices(planes, 37), indices)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_lookup_matmul_against_dense(dtype, tolerance):
  """Two groups, a residual, and a last vector that is cut off."""
  rng = np.random.default_rng(0)
  indices, rest = rng.integers(0, 16, (40, 4)), rng.integers(0, 8, (40, 4))
  codebooks, residual = (normal(rng, 2, k, 3) for k in (16, 8))
  x = normal(rng, 2, 5, 40).astype(dtype)
  group = np.arange(40) // 20
  w = np.asarray(codebooks)[group[:, None], indices] + np.asarray(residual)[group[:, None], rest]
  w = w.reshape(40, 12)[:, :10]
  planes, rest_planes = pack_indices(jnp.asarray(indices), 16), pack_indices(jnp.asarray(rest), 8)
  np.testing.assert_allclose(
    lookup(planes, codebooks, 40, 10) + lookup(rest_planes, residual, 40, 10), w, rtol=1e-6
  )
  y = lookup_matmul(x, planes, codebooks, rest_planes, residual, columns=10)
  expected = np.asarray(x, np.float32) @ w
  np.testing.assert_allclose(y, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
  "changes, message",
  (
    ({"x": jnp.ones((2, 40), jnp.int32)}, "x is int32"),
    ({"x": jnp.ones((2, 72))}, "expected uint32 (3, 4, 4)"),
    ({"codebooks": jnp.ones((3, 16, 3))}, "for 40 inputs"),
    ({"codebooks": jnp.ones((2, 12, 3))}, "12 centroids, expected a power of two"),
    ({"columns": 13}, "expected uint32 (2, 4, 5)"),
    ({"residual_codebooks": jnp.ones((2, 8, 3))}, "go together"),
  ),
)
def test_unsuitable_arguments_are_named(changes, message):
  planes = pack_indices(jnp.zeros((40, 4), jnp.int32), 16)
  arguments = dict(x=jnp.ones((2, 40)), planes=planes, codebooks=jnp.ones((2, 16, 3)), columns=10)
  with pytest.raises(ValueError) as e:
    lookup_matmul(**(arguments | changes))
  assert message in str(e.value)
