"""Packed indices, and products with vector-quantized weights against the dense matrix."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.lookup_matmul.api import lookup, lookup_matmul, pack_indices, unpack_indices
from kernels.lookup_matmul.packing import group_rows


def normal(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  "bits, rows, shape",
  [
    (1, 37, (1, 2, 5)),
    (4, 37, (1, 8, 5)),
    (12, 37, (1, 24, 5)),
    (16, 37, (1, 32, 5)),
    (12, 750, (3, 96, 5)),
    (12, 600, (19, 12, 5)),
    (6, 384, (2, 36, 5)),
    (7, 225, (1, 56, 5)),
  ],
)
def test_packed_indices_come_back(bits, rows, shape):
  """From groups of 256 rows, or of fewer that pad less: bits / 32 words for each row and column."""
  indices = np.random.default_rng(bits).integers(0, 2**bits, (rows, 5))
  packed = pack_indices(jnp.asarray(indices), 2**bits)
  assert packed.shape == shape and packed.dtype == jnp.uint32
  np.testing.assert_array_equal(unpack_indices(packed, rows), indices)


@settings(max_examples=3)
@given(st.integers(1, 16), st.integers(1, 600), st.integers(1, 5))
def test_any_indices_come_back(bits, rows, vectors):
  indices = np.random.default_rng(rows).integers(0, 2**bits, (rows, vectors))
  packed = pack_indices(jnp.asarray(indices), 2**bits)
  np.testing.assert_array_equal(unpack_indices(packed, rows), indices)


def test_small_widths_are_padded_little():
  """To a multiple of 32, or of 256 by a sixteenth at most; large ones always to a multiple of 256."""
  for rows in (*range(1, 2000), 4055, 4096, 11008, 28672):
    padded = -(-rows // group_rows(rows)) * group_rows(rows)
    assert padded == -(-rows // 32) * 32 or (padded % 256 == 0 and 16 * (padded - rows) <= rows)
    assert rows < 4080 or group_rows(rows) == 256


def test_where_an_index_lies():
  """Checkpoints hold this layout: row 35 = 2 x 16 + 2 x 1 + 1 is the 41st of a group of 256."""
  packed = pack_indices(jnp.zeros((256, 1), jnp.int32).at[35, 0].set(0xA5B), 4096)
  expected = np.zeros((1, 96, 1), np.uint32)
  expected[0, 41, 0] = 0x5B  # Of 64 words for the low 8 bits, in the lowest byte.
  expected[0, 64 + 41 - 32, 0] = 0xA << 4  # Of 32 words for the high 4 bits: the second four bits.
  np.testing.assert_array_equal(packed, expected)


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
    ({"x": jnp.ones((2, 72))}, "expected uint32 (1, 12, 4)"),
    ({"codebooks": jnp.ones((3, 16, 3))}, "for 40 inputs"),
    ({"codebooks": jnp.ones((2, 12, 3))}, "12 centroids, expected a power of two"),
    ({"codebooks": jnp.ones((2, 1, 3))}, "1 centroids, expected a power of two from 2"),
    ({"columns": 13}, "expected uint32 (1, 8, 5)"),
    ({"residual_codebooks": jnp.ones((2, 8, 3))}, "go together"),
    ({"implementation": "triton"}, "supported: xla, mosaic_tpu"),
  ),
)
def test_unsuitable_arguments_are_named(changes, message):
  planes = pack_indices(jnp.zeros((40, 4), jnp.int32), 16)
  arguments = dict(x=jnp.ones((2, 40)), planes=planes, codebooks=jnp.ones((2, 16, 3)), columns=10)
  with pytest.raises(ValueError) as e:
    lookup_matmul(**(arguments | changes))
  assert message in str(e.value)
