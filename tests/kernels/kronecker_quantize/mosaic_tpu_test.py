"""The kernel in the TPU interpreter against float64 and the reference, and compiled for real chips."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from common import cli
from common.compilation.topology import tpu_slice
from kernels.kronecker_quantize.api import kronecker_quantize

CLIP = jnp.array([0.9, 0.8])


def factors(n1, n2):
  rng = np.random.default_rng(n1 + n2)
  normal = lambda n: jnp.asarray(rng.normal(size=(n, n)) / np.sqrt(n), jnp.float32)
  return normal(n1), normal(n2)


def random_rows(rows, n, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, n)), dtype)


on_tpu = functools.partial(kronecker_quantize, implementation="mosaic_tpu")
_compiled = jax.jit(on_tpu, static_argnames="bits")


def in_interpreter(x, left, right, clip=None, bits=4):
  with pltpu.force_tpu_interpret_mode():
    return _compiled(x, left, right, clip, bits=bits)


# Registers that hold two rows of a matrix (n2 = 64), one, or parts of some (16, 96 and 160); one part of
# a block, two, a block that the rows do not fill; left factors that are padded and one that is not.
@pytest.mark.parametrize(
  "n1, n2, rows, dtype, bits, clip",
  [
    (16, 64, 3, jnp.float32, 4, None),
    (2, 64, 70, jnp.float32, 8, CLIP),
    (2, 64, 40, jnp.bfloat16, 4, CLIP),
    (3, 128, 3, jnp.float32, 4, CLIP),
    (1, 128, 33, jnp.bfloat16, 3, None),
    (4, 96, 2, jnp.bfloat16, 4, None),
    (8, 16, 2, jnp.float32, 6, CLIP),
    (4, 160, 1, jnp.float32, 4, None),
  ],
)
def test_codes_and_scales_equal_float64(n1, n2, rows, dtype, bits, clip):
  left, right = factors(n1, n2)
  x = random_rows(rows, n1 * n2, dtype)
  codes, scales = in_interpreter(x, left, right, clip, bits)
  assert codes.dtype == jnp.int8 and codes.shape == x.shape
  assert scales.dtype == jnp.float32 and scales.shape == (rows, 1)
  exact = [np.asarray(array.astype(dtype), np.float64) for array in (x, left, right)]
  y = exact[0] @ np.kron(*exact[1:])
  # Every float32 sum is of at most 256 products of order 1; bfloat16 rounds X P2 to 2^-8 of itself.
  first = np.abs(exact[0].reshape(rows, n1, n2) @ exact[2])
  rounding = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-20
  error = rounding * np.einsum("rij,ik->rkj", first, np.abs(exact[1])).reshape(rows, -1) + 1e-6
  limit = 2 ** (bits - 1) - 1
  low, high = (1, 1) if clip is None else np.asarray(clip, np.float64)
  largest = np.maximum(np.abs(low * y.min(axis=1)), np.abs(high * y.max(axis=1)))[:, None]
  scales = np.asarray(scales, np.float64)
  assert (np.abs(scales * limit - largest) <= error.max(axis=1, keepdims=True) * 2).all()
  # A code is the nearest one of its value, or the last one.
  distance = np.abs(np.clip(y / scales, -limit - 1, limit) - np.asarray(codes))
  assert (distance <= 0.5 + error / scales + 1e-5).all()


def test_float32_agrees_with_the_reference():
  left, right = factors(2, 64)
  x = random_rows(70, 128)
  codes, scales = in_interpreter(x, left, right, CLIP, 8)
  expected, expected_scales = kronecker_quantize(x, left, right, CLIP, bits=8, implementation="xla")
  np.testing.assert_allclose(scales, expected_scales, rtol=1e-5)
  # Values at the middle of two codes are few of 8960, and differ by one code.
  difference = np.abs(np.asarray(codes, int) - np.asarray(expected, int))
  assert difference.max() <= 1 and difference.sum() <= 5


def test_more_axes():
  left, right = factors(2, 64)
  x = random_rows(4, 128)
  codes, scales = in_interpreter(x.reshape(2, 2, 128), left, right)
  flat = in_interpreter(x, left, right)
  np.testing.assert_array_equal(codes.reshape(4, 128), flat[0])
  np.testing.assert_array_equal(scales.reshape(4, 1), flat[1])


def test_what_is_not_finite_stays_in_its_row():
  """Rows r and r + 16 share the lanes of a matrix."""
  left, right = factors(2, 64)
  x = random_rows(70, 128)
  broken = x.at[1, 3].set(jnp.nan).at[34, 100].set(jnp.inf)
  others = np.isfinite(broken).all(axis=1)
  results = in_interpreter(broken, left, right, CLIP, 8), in_interpreter(x, left, right, CLIP, 8)
  for found, expected in zip(*results, strict=True):
    np.testing.assert_array_equal(np.asarray(found)[others], np.asarray(expected)[others])
  assert not np.isfinite(results[0][1][~others]).any()


def test_a_row_of_zeros_stays_zero():
  left, right = factors(2, 64)
  x = random_rows(4, 128).at[2].set(0)
  codes, scales = in_interpreter(x, left, right)
  assert not np.asarray(codes)[2].any() and np.isfinite(scales).all()


def test_gradients_of_the_scales_are_those_of_the_reference():
  arrays = random_rows(4, 128), *factors(2, 64), CLIP

  @functools.partial(jax.jit, static_argnums=1)
  def gradients(arrays, implementation):
    scales = lambda arrays: kronecker_quantize(*arrays, bits=4, implementation=implementation)[1]
    return jax.grad(lambda arrays: jnp.sum(scales(arrays) ** 2))(arrays)

  with pltpu.force_tpu_interpret_mode():
    ours = gradients(arrays, "mosaic_tpu")
  for a, b in zip(ours, gradients(arrays, "xla"), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  "n1, n2, x, words",
  [
    (4, 24, jnp.ones((2, 96)), "a right factor of 24, expected a multiple of 16"),
    (3, 64, jnp.ones((2, 192)), "a left factor of 3 beside 64, expected a multiple of 2"),
    (256, 256, jnp.ones((1, 65536)), "65536 channels, expected at most 32768"),
    (2, 64, jnp.ones((0, 128)), r"x \[0, 128\], expected at least one row"),
    (2, 64, jnp.ones((1, 128), jnp.float16), "x of float16, expected bfloat16 or float32"),
  ],
)
def test_what_has_no_kernel_is_named(n1, n2, x, words):
  arguments = x, jnp.eye(n1), jnp.eye(n2)
  with pytest.raises(ValueError, match="mosaic_tpu does not support " + words):
    kronecker_quantize(*arguments, bits=4, implementation="mosaic_tpu")


def test_an_unknown_implementation_is_named():
  with pytest.raises(ValueError, match="'cuda' is not supported; supported: xla, mosaic_tpu"):
    kronecker_quantize(jnp.ones((1, 4)), jnp.eye(2), jnp.eye(2), bits=4, implementation="cuda")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slice_name", ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_compiles_for_tpu(slice_name):
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice(slice_name).devices[0])
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  # Llama-2-7B's 4096 inputs; a padded left factor; float32 and registers with parts of matrix rows.
  for n1, n2, rows, dtype in [
    (64, 64, 2048, jnp.bfloat16), (22, 128, 1, jnp.bfloat16), (16, 224, 33, jnp.float32),
  ]:  # fmt: skip
    shapes = (rows, n1 * n2), (n1, n1), (n2, n2), (2,)
    arrays = [array(shape, dtype) for shape in shapes]
    compiled = jax.jit(on_tpu, static_argnames="bits").lower(*arrays, bits=4).compile()
    assert "kronecker_quantize" in compiled.as_text()
