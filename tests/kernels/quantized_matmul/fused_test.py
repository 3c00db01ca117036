"""What methods put around a weight-only product: a scale and a shift of x, a low-rank matrix beside W."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.quantized_matmul import xla
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import pack

INPUTS, COLUMNS, RANK, GROUPS = 128, 128, 3, 1


def weights(seed=0):
  """4-bit codes, scales and zero points, and the float64 matrix that they stand for."""
  rng = np.random.default_rng(seed)
  codes, zeros = rng.integers(0, 16, (INPUTS, COLUMNS)), rng.integers(0, 16, (GROUPS, COLUMNS))
  scales = rng.uniform(0.05, 0.15, (GROUPS, COLUMNS)).astype(np.float32)
  packed = [pack(jnp.asarray(c), 4, signed=False) for c in (codes, zeros)]
  return (packed[0], jnp.asarray(scales), packed[1]), (codes - zeros) * scales.astype(np.float64)


def around(seed=1):
  """x [2, 3, in], and A, B, s and z by their names."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  scale = jnp.asarray(rng.uniform(0.5, 4, INPUTS), jnp.float32)
  return normal(2, 3, INPUTS), {
    "low_rank": (normal(INPUTS, RANK), normal(RANK, COLUMNS)),
    "input_scale": scale,
    "input_shift": normal(INPUTS),
  }


def float64(x, w, low_rank=None, input_scale=1.0, input_shift=0.0):
  """The equations of the API's docstring; x~ and y."""
  exact = lambda array: np.asarray(array, np.float64)
  x = (exact(x) - exact(input_shift)) / exact(input_scale)
  y = x @ w
  return x, y if low_rank is None else y + x @ exact(low_rank[0]) @ exact(low_rank[1])


product = jax.jit(functools.partial(quantized_matmul, bits=4))


@pytest.mark.parametrize(
  "names",
  [("low_rank",), ("input_scale",), ("input_scale", "input_shift"), tuple(around()[1])],
)
def test_equals_float64(names):
  packed, w = weights()
  x, options = around()
  options = {name: options[name] for name in names}
  y = product(x, *packed, **options)
  assert y.dtype == jnp.float32 and y.shape == (2, 3, COLUMNS)
  # Float32 sums of 128 products of order 1.
  np.testing.assert_allclose(y, float64(x, w, **options)[1], atol=1e-3)


def test_bfloat16():
  packed, w = weights()
  x, options = around()
  x, options = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (x, options))
  y = product(x, *packed, **options)
  assert y.dtype == jnp.bfloat16
  a, b = (np.asarray(factor, np.float64) for factor in options["low_rank"])
  shifted, expected = float64(x, w, **options)
  # x~, W, x~ A, x~ W and the result are each rounded to 2^-8 of themselves, x~ for all that follows.
  size = 2 * np.abs(shifted) @ np.abs(w) + 2 * np.abs(shifted) @ np.abs(a) @ np.abs(b)
  bound = 2.0**-8 * (size + 2 * np.abs(expected) + np.abs(shifted @ w))
  assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()


def loss(x, scales, options, packed, implementation=None):
  y = quantized_matmul(
    x, packed[0], scales, packed[2], bits=4, implementation=implementation, **options
  )
  return jnp.sum(jnp.sin(y / 8)), y


gradients = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=4)


def test_gradients_equal_float64():
  packed, w = weights()
  x, options = around()
  (dx, dscales, found), _ = gradients(x, packed[1], options, packed)
  a, b = (np.asarray(factor, np.float64) for factor in options["low_rank"])
  scale = np.asarray(options["input_scale"], np.float64)
  shifted, y = (array.reshape(6, -1) for array in float64(x, w, **options))
  g = np.cos(y / 8) / 8
  # Of x~, which reaches W and A.
  dshifted = g @ (w + a @ b).T
  expected = {
    "low_rank": (shifted.T @ (g @ b.T), (shifted @ a).T @ g),
    "input_scale": -(dshifted * shifted).sum(axis=0) / scale,
    "input_shift": -dshifted.sum(axis=0) / scale,
  }
  check = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
  check(dx.reshape(6, -1), dshifted / scale)
  check(dscales, ((shifted.T @ g) * w).sum(axis=0, keepdims=True) / np.asarray(packed[1]))
  jax.tree.map(check, found, expected)


def test_around_the_tpu_kernel():
  packed, w = weights()
  x, options = around()
  with pltpu.force_tpu_interpret_mode():
    ours, y = gradients(x, packed[1], options, packed, "mosaic_tpu")
  shifted, expected = float64(x, w, **options)
  # The kernel keeps 14 bits of the largest value of x~.
  bound = 2.0**-14 * np.abs(shifted).max() * np.abs(w).sum(axis=0) + 1e-3
  assert (np.abs(y - expected) <= bound).all()
  # The sine's slope is taken at outputs that differ by as much, over 8.
  reference, _ = gradients(x, packed[1], options, packed)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, atol=0.01 * float(jnp.abs(b).max()))


def test_vmap_over_low_rank_factors():
  packed, _ = weights()
  x, options = around()
  several = jax.tree.map(lambda factor: jnp.stack([factor, 2 * factor]), options["low_rank"])
  found = jax.vmap(lambda factors: product(x, *packed, low_rank=factors))(several)
  for y, factor in zip(found, (1, 2)):
    factors = jax.tree.map(lambda array, factor=factor: factor * array, options["low_rank"])
    np.testing.assert_allclose(y, product(x, *packed, low_rank=factors), atol=1e-3)


def test_rank_zero_adds_nothing():
  packed, _ = weights()
  x, _ = around()
  factors = jnp.zeros((INPUTS, 0)), jnp.zeros((0, COLUMNS))
  np.testing.assert_array_equal(
    product(x, *packed, low_rank=factors), product(x, *packed)
  )  # fmt: skip


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"input_scale": jnp.ones(64)}, r"input_scale is float32 \(64,\), expected .* \(128,\)"),
    ({"input_shift": jnp.ones(INPUTS, jnp.int32)}, "input_shift is int32"),
    (
      {"low_rank": (jnp.ones((INPUTS, 2)), jnp.ones((3, COLUMNS)))},
      r"shapes \(128, 2\) and \(3, 128\), expected \(128, r\) and \(r, 128\)",
    ),
    ({"low_rank": (jnp.ones((INPUTS, 2), jnp.int8), jnp.ones((2, COLUMNS)))}, "A of .* is int8"),
    ({"low_rank": (jnp.ones((INPUTS, 2)), jnp.ones(2))}, r"B of low_rank is float32 \(2,\)"),
  ],
)
def test_bad_arguments_are_refused(changes, message):
  packed, _ = weights()
  with pytest.raises(ValueError, match=message):
    quantized_matmul(jnp.ones((1, INPUTS)), *packed, bits=4, **changes)


def test_the_input_is_transformed_in_float32():
  """In bfloat16 the shift would be 256."""
  x, shift = jnp.full((1, 1), 258, jnp.bfloat16), jnp.full(1, 256.5, jnp.float32)
  assert xla.transform_input(x, None, shift)[0, 0] == 1.5
