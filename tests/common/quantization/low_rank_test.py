"""Low-rank compensation: Eckart-Young, storage, and the layer with both paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.quantization import low_rank, rtn
from common.quantization.quantized_array import IntegerFormat


@pytest.fixture(scope="module")
def error():
  return np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)


def test_frobenius_error_in_closed_form(error):
  s = np.linalg.svd(error.astype(np.float64), compute_uv=False)
  factors = low_rank.low_rank(jnp.asarray(error), 16)
  energy = np.asarray(low_rank.residual_energy(jnp.asarray(error)))
  left = []
  for rank in range(17):
    product = np.asarray(factors.truncated(rank).product())
    left.append(np.square(error - product).sum(dtype=np.float64))
    # float32 singular values; 0 at full rank, up to the rounding of ||E||^2.
    np.testing.assert_allclose(left[-1], (s[rank:] ** 2).sum(), rtol=1e-4, atol=1e-8 * left[0])
  np.testing.assert_allclose(energy, np.array(left) / left[0], rtol=1e-4, atol=1e-6)
  assert all(a > b for a, b in zip(left, left[1:]))
  # A product of another width may sum in another order: a few roundings of entries below 2.
  fewer = low_rank.low_rank(jnp.asarray(error), 4).a
  np.testing.assert_allclose(fewer, factors.a[:, :4], rtol=0, atol=1e-6)


def test_no_other_matrix_of_the_rank_is_nearer(error):
  """Against alternating least squares from random starts."""
  best = np.square(error - np.asarray(low_rank.low_rank(jnp.asarray(error), 3).product())).sum()
  rng = np.random.default_rng(2)
  for _ in range(3):
    a = rng.normal(size=(24, 3))
    for _ in range(50):
      b = np.linalg.lstsq(a, error, rcond=None)[0]
      a = np.linalg.lstsq(b.T, error.T, rcond=None)[0].T
    assert np.square(error - a @ b).sum() >= best * (1 - 1e-5)


@pytest.mark.parametrize("decay", [0.0, 6.0])
def test_excess_over_the_best_in_float64(decay):
  """Of a wide matrix with a flat spectrum, or one that falls by six orders of magnitude."""
  rng = np.random.default_rng(3)
  u, v = (np.linalg.qr(rng.normal(size=(n, 16)))[0] for n in (16, 24))
  s, rank = np.logspace(0, -decay, 16), 8
  e = ((u * s) @ v.T).astype(np.float32)
  factors = low_rank.low_rank(jnp.asarray(e), rank)
  a, b = (np.asarray(f, np.float64) for f in (factors.a, factors.b))
  best = np.square(np.linalg.svd(e.astype(np.float64), compute_uv=False)[rank:]).sum()
  # m eigenvalues of E E^T (largest: 1), each off by a few float32 roundings.
  assert np.square(e - a @ b).sum() - best < rank * 1e-6


def test_an_error_of_zero_has_factors_of_zero():
  factors = low_rank.low_rank(jnp.zeros((16, 24)), 8)
  assert not factors.a.any() and not factors.b.any()


def test_factors_are_balanced(error):
  factors = low_rank.low_rank(jnp.asarray(error), 5)
  s = np.diag(np.linalg.svd(error, compute_uv=False)[:5])
  # float32 orthogonality.
  np.testing.assert_allclose(factors.a.T @ factors.a, s, atol=1e-5 * s.max())
  np.testing.assert_allclose(factors.b @ factors.b.T, s, atol=1e-5 * s.max())


def test_integer_factors_are_nearly_the_same_and_half_as_large():
  """The output of x (W_q + A B) changes by less than 1 %."""
  keys = jax.random.split(jax.random.key(0), 2)
  w, x = jax.random.normal(keys[0], (64, 48)), jax.random.normal(keys[1], (100, 64))
  packed = rtn.quantize(w, IntegerFormat(2))
  factors = low_rank.low_rank(w - packed.dequantize(), 8)
  integer = low_rank.quantize_factors(factors)
  output = lambda f: np.asarray(x @ packed.dequantize() + f.apply(x))
  change = np.linalg.norm(output(integer) - output(factors)) / np.linalg.norm(output(factors))
  assert 0 < change < 0.01
  # 8 (64 + 48) values; integers have a float16 scale for each of 8 columns and rows.
  assert factors.stored_bits() == 16 * 8 * (64 + 48)
  assert integer.stored_bits() == 8 * 8 * (64 + 48) + 16 * (8 + 8)
  # (code A, code B) is what the dense product is made of; only the order of the sums differs.
  np.testing.assert_allclose(integer.apply(x), x @ integer.product(), atol=1e-4)


def test_stored_bits(error):
  packed = rtn.quantize(jnp.asarray(error), IntegerFormat(4, 8, scale_dtype=jnp.float16))
  assert low_rank.bits_per_weight([packed]) == 4 + (16 + 4) / 8
  factors = low_rank.low_rank(jnp.asarray(error), 2)
  extra = 16 * 2 * (24 + 16) / (24 * 16)
  assert low_rank.bits_per_weight([packed], [factors]) == pytest.approx(4 + 20 / 8 + extra)
