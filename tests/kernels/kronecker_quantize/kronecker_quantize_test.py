"""Kronecker-factored transforms against the dense matrix, and their fused quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.quantization.activations import ActivationFormat
from common.quantization.online_transforms import clipped_fake_quantize
from kernels.kronecker_quantize.api import kronecker_quantize, kronecker_transform

CLIP = jnp.array([0.9, 0.8])


def random_matrix(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("n1, n2", [(3, 4), (1, 6), (6, 1)])
def test_kronecker_transform_is_the_dense_product(n1, n2):
  left, right, x = random_matrix(0, n1, n1), random_matrix(1, n2, n2), random_matrix(2, 5, n1 * n2)
  dense = np.kron(left, right)
  np.testing.assert_allclose(kronecker_transform(x, left, right), x @ dense, atol=1e-5)
  inverses = (np.linalg.inv(m).T for m in (left, right))
  # The inverse of a random matrix may be large.
  np.testing.assert_allclose(np.kron(*inverses), np.linalg.inv(dense).T, rtol=1e-2, atol=1e-3)


def test_fused_quantization_is_transform_then_rounding():
  left, right = random_matrix(0, 4, 4), random_matrix(1, 6, 6)
  x = random_matrix(2, 5, 24).at[1].set(0.0)
  codes, scales = kronecker_quantize(x, left, right, CLIP, bits=4)
  expected = clipped_fake_quantize(
    kronecker_transform(x, left, right), ActivationFormat(4, symmetric=True), CLIP
  )
  assert codes.dtype == jnp.int8 and int(codes.min()) >= -8 and int(codes.max()) <= 7
  np.testing.assert_allclose(codes * scales, expected, atol=1e-5)
  np.testing.assert_array_equal(codes[1], 0)


@pytest.mark.parametrize(
  "changes, message",
  (
    ({"x": jnp.ones((2, 24), jnp.int32)}, "x is int32"),
    ({"x": jnp.ones((2, 20))}, "factors of 4 and 6 do not make up the 20 channels"),
    ({"left": jnp.ones((4, 3))}, "left has shape .4, 3., expected a square matrix"),
    ({"clip": jnp.ones(3)}, "clip has shape .3,., expected .2,."),
    ({"bits": 9}, "9 bits are not supported; supported: 2 to 8"),
  ),
)
def test_unsuitable_arguments_are_named(changes, message):
  arguments = {"x": jnp.ones((2, 24)), "left": jnp.eye(4), "right": jnp.eye(6), "bits": 4} | changes
  with pytest.raises(ValueError, match=message):
    kronecker_quantize(**arguments)
