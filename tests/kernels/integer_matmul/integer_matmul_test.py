"""Integer products against float64, and in the programs of real chips."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from common import cli
from common.compilation.topology import tpu_slice
from kernels.integer_matmul.api import integer_matmul


def weights(bits, inputs=24, columns=10, groups=1, seed=0):
  rng = np.random.default_rng(seed)
  codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (inputs, columns))
  scales = rng.uniform(0.5, 1.5, (groups, columns)).astype(np.float32)
  exact = codes * np.repeat(scales.astype(np.float64), inputs // groups, axis=0)
  dtype = jnp.int4 if bits == 4 else jnp.int8
  return jnp.asarray(codes, dtype), jnp.asarray(scales), exact


def fake_quantized(x, scale, zero, bits):
  """float64 values that the codes stand for; zero None for symmetric codes."""
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if zero is None else (0, 2**bits - 1)
  zero = 0 if zero is None else zero
  # float32, as the codes are made: the same rounding of ties.
  codes = np.clip(np.round(np.float32(x) / np.float32(scale)) + zero, low, high)
  return (codes - zero) * np.float64(scale)


@settings(max_examples=12, deadline=None)
@given(
  bits=st.sampled_from([(8, 8), (6, 6), (4, 8), (4, 4)]),
  groups=st.sampled_from([1, 3]),
  rows=st.integers(1, 5),
  seed=st.integers(0, 99),
)
def test_dynamic_per_token(bits, groups, rows, seed):
  weight_bits, activation_bits = bits
  values, scales, exact = weights(weight_bits, groups=groups, seed=seed)
  x = np.random.default_rng(seed).normal(size=(2, rows, 24)).astype(np.float32)
  x[0, 0] = 0
  largest = np.abs(x).max(axis=-1, keepdims=True)
  scale = np.where(largest == 0, 1, largest) / np.float32(2 ** (activation_bits - 1) - 1)
  found = integer_matmul(jnp.asarray(x), values, scales, activation_bits=activation_bits)
  expected = fake_quantized(x, scale, None, activation_bits) @ exact
  # The sums are exact; three float32 products and a sum over groups are not.
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("zero", (None, 0, 77, 255))
def test_static_scales_and_zero_points(zero):
  values, scales, exact = weights(8, groups=2)
  x = np.random.default_rng(1).normal(size=(7, 24)).astype(np.float32)
  scale = np.float32(0.013)  # Some values are clipped.
  found = integer_matmul(
    jnp.asarray(x),
    values,
    scales,
    activation_bits=8,
    activation_scales=jnp.asarray(scale),
    activation_zero_points=None if zero is None else jnp.asarray(zero),
  )
  expected = fake_quantized(x, scale, zero, 8) @ exact
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_scales_of_tokens():
  values, scales, exact = weights(4)
  x = np.random.default_rng(1).normal(size=(7, 24)).astype(np.float32)
  scale = np.linspace(0.1, 0.4, 7, dtype=np.float32)[:, None]
  zero = np.arange(7)[:, None]
  found = integer_matmul(
    jnp.asarray(x),
    values,
    scales,
    activation_bits=4,
    activation_scales=jnp.asarray(scale),
    activation_zero_points=jnp.asarray(zero),
  )
  np.testing.assert_allclose(found, fake_quantized(x, scale, zero, 4) @ exact, rtol=1e-5, atol=1e-4)


def test_gradients_go_straight_through():
  values, scales, exact = weights(8, groups=2)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 24)), jnp.float32)
  loss = lambda x, **options: jnp.sum(
    integer_matmul(x, values, scales, activation_bits=8, **options)
  )
  np.testing.assert_allclose(
    jax.grad(loss)(x), np.broadcast_to(exact.sum(axis=1), (5, 24)), rtol=1e-4, atol=1e-4
  )
  clipped = jax.grad(loss)(x, activation_scales=jnp.float32(0.01))
  outside = np.abs(np.asarray(x)) > 1.28
  assert outside.any() and (np.asarray(clipped)[outside] == 0).all()
  assert (np.asarray(clipped)[~outside] != 0).all()


def test_bad_arguments():
  values, scales, _ = weights(8)
  x = jnp.ones((3, 24))
  for change, message in (
    ({"activation_bits": 5}, "supported"),
    ({"x": jnp.ones((3, 24), jnp.int8)}, "expected float32"),
    ({"values": values.astype(jnp.int32)}, "int8 or int4"),
    ({"x": jnp.ones((3, 23))}, "do not match"),
    ({"scales": scales[:, :9]}, "expected \\[groups, 10\\]"),
    ({"scales": jnp.ones((5, 10))}, "5 groups do not divide 24"),
    ({"activation_zero_points": jnp.zeros(())}, "need static"),
    ({"activation_scales": jnp.ones(24)}, "do not broadcast|[Ii]ncompatible"),
  ):
    arguments = {"x": x, "values": values, "scales": scales, "activation_bits": 8} | change
    with pytest.raises(ValueError, match=message):
      integer_matmul(**arguments)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("weight_bits, activation_bits", [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("slice_name", ("v5e:2x2", "v6e:2x2"))
def test_integers_reach_the_matrix_unit(slice_name, weight_bits, activation_bits):
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice(slice_name).devices[0])
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  values = array(jnp.int4 if weight_bits == 4 else jnp.int8, 1024, 1024)
  product = lambda x, w, s: integer_matmul(x, w, s, activation_bits=activation_bits)
  compiled = jax.jit(product).lower(
    array(jnp.bfloat16, 256, 1024), values, array(jnp.float32, 1, 1024)
  ).compile()  # fmt: skip
  products = re.findall(r"= (\w+)\[[^=]* (?:convolution|dot)\(", compiled.as_text())
  assert products and set(products) == {"s32"}, products
