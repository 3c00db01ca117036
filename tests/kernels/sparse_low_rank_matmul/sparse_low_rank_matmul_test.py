"""Sparse plus low-rank products against the dense formula, and what they keep for the backward pass."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from common import cli
from common.compilation.compile_only import compile_lowered
from common.compilation.topology import tpu_slice
from kernels.sparse_low_rank_matmul.api import sparse_low_rank_matmul

INPUTS, COLUMNS, RANK, NONZEROS, SCALE = 12, 20, 3, 30, 0.25


def arguments(seed=0, inputs=INPUTS, columns=COLUMNS, nonzeros=NONZEROS):
  """x [2, 5, in], A, B, V and I, a random support without repetition."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  indices = np.sort(rng.choice(inputs * columns, nonzeros, replace=False)).astype(np.int32)
  return (
    normal(2, 5, inputs), normal(inputs, RANK), normal(RANK, columns), normal(nonzeros), indices
  )  # fmt: skip


def dense_weight(a, b, values, indices):
  """float64 [in, out] by the definition, one position at a time."""
  w = SCALE * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
  for value, index in zip(values, indices):
    w[divmod(int(index), w.shape[1])] += value
  return w


product = jax.jit(functools.partial(sparse_low_rank_matmul, scale=SCALE))


def loss(x, a, b, values, indices):
  return jnp.sum(jnp.sin(sparse_low_rank_matmul(x, a, b, values, indices, scale=SCALE)))


gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))


def test_equals_float64():
  x, *weight = arguments()
  y = product(x, *weight)
  assert y.dtype == jnp.float32 and y.shape == (2, 5, COLUMNS)
  # Float32 sums of 3 and of 12 products of order 1.
  np.testing.assert_allclose(y, x.astype(np.float64) @ dense_weight(*weight), atol=2e-5)


def test_gradients_are_those_of_the_dense_formula():
  x, a, b, values, indices = arguments()

  def dense(x, a, b, values):
    w = SCALE * jnp.matmul(a, b)
    w += jax.nn.one_hot(indices, w.size).T.dot(values).reshape(w.shape)
    return jnp.sum(jnp.sin(jnp.matmul(x, w)))

  expected, expected_gradients = jax.value_and_grad(dense, (0, 1, 2, 3))(x, a, b, values)
  found, found_gradients = gradients(x, a, b, values, indices)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_gradients_equal_float64():
  """The equations of the API's docstring, in numpy."""
  x, a, b, values, indices = arguments()
  w, rows = dense_weight(a, b, values, indices), x.reshape(-1, INPUTS).astype(np.float64)
  g = np.cos(rows @ w)
  dw = rows.T @ g
  expected = (g @ w.T).reshape(x.shape), SCALE * dw @ b.T, SCALE * a.T @ dw, dw.ravel()[indices]
  for ours, theirs in zip(gradients(x, a, b, values, indices)[1], expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_values_at_one_position_add_up():
  x, a, b, values, indices = arguments()
  indices[:3] = indices[0]
  y = product(x, a, b, values, indices)
  expected = x.astype(np.float64) @ dense_weight(a, b, values, indices)
  np.testing.assert_allclose(y, expected, atol=2e-5)
  dvalues = gradients(x, a, b, values, indices)[1][3]
  assert dvalues[0] == dvalues[1] == dvalues[2]


def test_vmap_over_weights_and_inputs():
  several = [np.stack(arrays) for arrays in zip(*(arguments(seed) for seed in range(3)))]
  found = jax.jit(jax.vmap(functools.partial(sparse_low_rank_matmul, scale=SCALE)))(*several)
  expected = [product(*arguments(seed)) for seed in range(3)]
  np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)
  in_batch = jax.jit(jax.vmap(jax.grad(loss, 3)))(*several)
  for row, seed in zip(in_batch, range(3)):
    np.testing.assert_allclose(row, gradients(*arguments(seed))[1][3], atol=5e-5)


def test_bfloat16_rounds_operands_only():
  x, *weight, indices = arguments()
  low = [jnp.asarray(array, jnp.bfloat16) for array in (x, *weight)]
  y = product(*low, indices)
  assert y.dtype == jnp.bfloat16
  x, a, b, values = (np.asarray(array, np.float64) for array in low)
  w = dense_weight(a, b, values, indices)
  # W is rounded twice, the product and with the values added, and the result once: 2^-8 each.
  size = np.abs(SCALE * a @ b) + np.abs(w)
  bound = 2.0**-8 * (np.abs(x) @ size + np.abs(x @ w)) + 1e-3
  assert (np.abs(np.asarray(y, np.float64) - x @ w) <= bound).all()
  assert [g.dtype for g in gradients(*low, indices)[1]] == [jnp.bfloat16] * 4


def test_neither_the_weight_nor_its_gradient_is_kept():
  x, *weight = arguments()
  kept = jax.tree.leaves(jax.vjp(lambda *floats: loss(*floats, weight[-1]), x, *weight[:-1])[1])
  sizes = [array.size for array in kept]
  # x, the result that the sine needs, A, B, V and I: nothing of the size of W.
  assert INPUTS * COLUMNS not in sizes
  assert sorted(sizes)[-2:] == sorted([x.size, x.size // INPUTS * COLUMNS])


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"x": jnp.ones((2, INPUTS), jnp.int32)}, "x is int32"),
    ({"x": jnp.ones((2, 7))}, r"x \(2, 7\), a \(12, 3\) and b \(3, 20\) do not make a product"),
    ({"a": jnp.ones((INPUTS, 4))}, "do not make a product"),
    ({"b": jnp.ones(3)}, r"b is float32 \(3,\), expected floating point of 2 dimensions"),
    ({"values": jnp.ones(30, jnp.int32)}, "values is int32"),
    ({"indices": jnp.zeros(29, jnp.int32)}, r"\(29,\), expected int32 \(30,\) as values"),
    ({"indices": jnp.zeros(30, jnp.uint32)}, "indices are uint32"),
  ],
)
def test_bad_arguments_are_refused(changes, message):
  names = ("x", "a", "b", "values", "indices")
  with pytest.raises(ValueError, match=message):
    sparse_low_rank_matmul(**dict(zip(names, arguments())) | changes)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_program_makes_the_weight_again():
  """The compiler would merge the weight of the forward pass with that of the backward pass.

  (XLA's CPU backend does: it drops what keeps them apart before it looks for what is the same.)
  """
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice("v5e:2x2").devices[0])
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  size, rank, nonzeros = 512, 32, 8000
  shapes = [(16, size), (size, rank), (rank, size), (nonzeros,)]
  floats = [array(jnp.bfloat16, *shape) for shape in shapes]

  def two_layers(x, a, b, values, indices):
    return loss(jnp.tanh(sparse_low_rank_matmul(x, a, b, values, indices)), a, b, values, indices)

  step = jax.jit(jax.grad(two_layers, (1, 2, 3)))
  _, text = compile_lowered(step.lower(*floats, array(jnp.int32, nonzeros)))
  # Forward of both layers, backward of the second one: the first one's dx is not asked for.
  assert text.count(" scatter(") == 3
