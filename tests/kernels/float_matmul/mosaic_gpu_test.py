"""The Hopper kernel in the interpreter, lowered, compiled where the CUDA plugin is, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.float_matmul import xla
from kernels.float_matmul.api import float_matmul
from tests.kernels.gpu_interpreter import (
  compile_for_h100,
  gpu_interpreter,
  lower_for_gpu,
  on_hopper,
  with_cuda_plugin,
)

FORMATS = [(4, 3), (2, 1), (1, 2), (3, 0)]


def dtype_of(bits):
  return jnp.uint4 if sum(bits) < 4 else jnp.uint8


def weights(bits, inputs, columns, group, dtype=jnp.float32):
  """Codes, all that there are among them, scales of real biases, and the float64 matrix."""
  rng = np.random.default_rng(0)
  codes = jnp.asarray(rng.integers(0, 2 ** (1 + sum(bits)), (inputs, columns)))
  assert len(np.unique(codes)) == 2 ** (1 + sum(bits))
  scales = jnp.asarray(2 ** -rng.uniform(0, 20, (inputs // group, columns)), dtype)
  exact = np.asarray(xla.decode(codes, *bits), np.float64)
  exact *= np.repeat(np.asarray(scales, np.float64), group, axis=0)
  return codes.astype(dtype_of(bits)), scales, exact


def activations(*shape):
  return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)


def product(x, codes, scales, bits, implementation="mosaic_gpu"):
  multiply = functools.partial(
    float_matmul, exponent_bits=bits[0], mantissa_bits=bits[1], implementation=implementation
  )
  return jax.jit(multiply)(x, codes, scales)


def check(y, x, exact):
  assert y.shape == (*x.shape[:-1], exact.shape[1]) and y.dtype == jnp.bfloat16
  reference = np.asarray(x, np.float64)
  expected = reference @ exact
  # bfloat16 rounds the weights and the result, by at most 2^-8 each; sums are float32.
  bound = (2.0**-8 + 2e-5) * (np.abs(reference) @ np.abs(exact) + np.abs(expected))
  assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()


def check_in_interpreter(bits, x, columns, group, dtype=jnp.float32):
  codes, scales, exact = weights(bits, x.shape[-1], columns, group, dtype)
  with gpu_interpreter():
    y = product(x, codes, scales, bits)
  check(y, x, exact)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("group, dtype", [(256, jnp.float32), (32, jnp.bfloat16)])
def test_few_rows(bits, group, dtype):
  check_in_interpreter(bits, activations(3, 256), 128, group, dtype)


@pytest.mark.parametrize("bits", [(4, 3), (2, 1)])
def test_many_rows(bits):
  """Of the identity: the weights, and to the bit those of the reference."""
  codes, scales, exact = weights(bits, 128, 128, 64)
  x = jnp.eye(128, dtype=jnp.bfloat16)
  with gpu_interpreter():
    y = product(x, codes, scales, bits)
  np.testing.assert_array_equal(y, product(x, codes, scales, bits, "xla"))
  np.testing.assert_array_equal(y, jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize("bits", [(3, 2), (1, 1)])
def test_fewer_bits_than_are_stored_and_more_axes(bits):
  check_in_interpreter(bits, activations(2, 2, 128), 256, 128)


def test_gradients_are_those_of_the_reference():
  codes, scales, _ = weights((2, 1), 128, 128, 64)
  loss = lambda x, scales, implementation: jnp.sum(
    product(x, codes, scales, (2, 1), implementation).astype(jnp.float32)
  )
  gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  x = activations(2, 128)
  with gpu_interpreter():
    ours = gradients(x, scales, "mosaic_gpu")
  for a, b in zip(ours, gradients(x, scales, "xla")):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "bits, x, columns, groups, words",
  [
    ((2, 1), jnp.ones((1, 128)), 128, 1, "x of float32, expected bfloat16"),
    ((2, 1), activations(1, 64), 128, 1, r"\[64, 128\] of 4 bits, expected .* \[128, 128\]"),
    ((4, 3), activations(1, 128), 64, 1, r"\[128, 64\] of 8 bits"),
    ((5, 2), activations(1, 128), 128, 1, "E5M2, expected at most 4 exponent bits"),
    ((2, 1), activations(1, 128), 128, 8, r"scales \[8, 128\], expected one for each column"),
  ],
)
def test_what_has_no_kernel_is_named(bits, x, columns, groups, words):
  codes = jnp.zeros((x.shape[1], columns), dtype_of(bits))
  with pytest.raises(ValueError, match="mosaic_gpu does not support .*" + words):
    product(x, codes, jnp.ones((groups, columns)), bits)
  assert product(x, codes, jnp.ones((groups, columns)), bits, None).shape == (1, columns)


def test_an_unknown_implementation():
  with pytest.raises(ValueError, match="'cuda' is not supported; supported: xla, mosaic_gpu"):
    product(activations(1, 128), *weights((2, 1), 128, 128, 128)[:2], (2, 1), "cuda")


# Steps read ahead, split inputs, and both ways of storing scales.
FULL_SIZE = [
  (*case, group, dtype)
  for case, (group, dtype) in zip(
    [(bits, rows) for bits in FORMATS for rows in (16, 512)],
    2 * [(4096, jnp.float32), (64, jnp.bfloat16), (32, jnp.bfloat16), (128, jnp.float32)],
  )
]


def full_size(bits, rows, group, dtype):
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  return (
    lambda *arrays: product(*arrays, bits),
    array(jnp.bfloat16, rows, 4096),
    array(dtype_of(bits), 4096, 4096),
    array(dtype, 4096 // group, 4096),
  )


@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
def test_lowers_for_hopper(case):
  bits = case[0]
  assert f"float_matmul_e{bits[0]}m{bits[1]}" in lower_for_gpu(*full_size(*case))


@with_cuda_plugin
@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
def test_compiles_for_hopper(case):
  assert "mosaic_gpu" in compile_for_h100(*full_size(*case)).as_text()


def test_has_to_be_named():
  codes, scales, _ = weights((2, 1), 128, 128, 128)
  for name in (None, "mosaic_gpu"):
    program = lambda x, name=name: product(x, codes, scales, (2, 1), name)
    assert ("mosaic_gpu" in lower_for_gpu(program, activations(4, 128))) == (name is not None)


@on_hopper
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("rows", (1, 16, 64, 200))
@pytest.mark.parametrize("group, dtype", [(32, jnp.bfloat16), (1024, jnp.float32)])
def test_on_a_gpu(bits, rows, group, dtype):
  codes, scales, exact = weights(bits, 1024, 512, group, dtype)
  x = activations(rows, 1024)
  check(product(x, codes, scales, bits), x, exact)
