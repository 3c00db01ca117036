"""The Hopper kernels in the interpreter, lowered, compiled where the CUDA plugin is, and on a GPU."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.platform import HOPPER, has_one_gpu
from kernels.quantized_matmul import mosaic_gpu
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import pack
from tests.kernels.gpu_interpreter import (
  compile_for_h100,
  gpu_interpreter,
  lower_for_gpu,
  on_hopper,
  with_cuda_plugin,
)

BITS = (2, 3, 4, 8)


def weights(bits, asymmetric, inputs, columns, group, dtype=jnp.bfloat16):
  """Packed weights, and the float64 matrix that they stand for."""
  rng = np.random.default_rng(bits)
  low = 0 if asymmetric else -(2 ** (bits - 1))
  codes = rng.integers(low, low + 2**bits, (inputs, columns))
  shape = (1, 1) if group is None else (inputs // group, columns)
  scales = jnp.asarray(rng.uniform(0.5, 1.5, shape), dtype)
  zeros = rng.integers(0, 2**bits, shape) if asymmetric else np.zeros(shape, int)
  spread = lambda v: np.kron(
    np.asarray(v, np.float64), np.ones((inputs // shape[0], columns // shape[1]))
  )
  packed_zeros = (
    pack(jnp.asarray(zeros), 8 if bits == 3 else bits, signed=False) if asymmetric else None
  )
  packed = pack(jnp.asarray(codes), bits, signed=not asymmetric), scales, packed_zeros
  return packed, (codes - spread(zeros)) * spread(scales)


def activations(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)


def product(x, packed, bits):
  return jax.jit(
    lambda x, packed: quantized_matmul(x, *packed, bits=bits, implementation="mosaic_gpu")
  )(x, packed)


def check(y, x, exact):
  assert y.shape == (*x.shape[:-1], exact.shape[1]) and y.dtype == x.dtype
  reference = np.asarray(x, np.float64)
  expected = reference @ exact
  # bfloat16 rounds the weights and the result, 2^-8 each; sums are float32.
  bound = (2.0**-8 + 1e-5) * (np.abs(reference) @ np.abs(exact) + np.abs(expected))
  assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()


def check_in_interpreter(bits, asymmetric, x, columns, group, dtype=jnp.bfloat16):
  packed, exact = weights(bits, asymmetric, x.shape[-1], columns, group, dtype)
  with gpu_interpreter():
    y = product(x, packed, bits)
  check(y, x, exact)
  # The same weights to the bit as in the reference: only the order of the sums differs.
  same = quantized_matmul(x, *packed, bits=bits, implementation="xla")
  difference = np.abs(np.asarray(y, np.float32) - np.asarray(same, np.float32))
  assert (difference <= 2.0**-7 * np.abs(np.asarray(same, np.float32)) + 1e-3).all()


@pytest.mark.parametrize("asymmetric", (True, False))
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group, dtype", [(32, jnp.float32), (256, jnp.bfloat16)])
def test_few_rows(bits, asymmetric, group, dtype):
  check_in_interpreter(bits, asymmetric, activations(3, 256), 128, group, dtype)


@pytest.mark.parametrize("bits", BITS)
def test_many_rows(bits):
  """Two tiles of rows, the last one padded, for 3 bits, one for the others."""
  check_in_interpreter(bits, bits != 4, activations(70, 256), 128, 64)


def test_the_inputs_are_split_among_blocks_and_groups_span_steps():
  """A matrix so narrow that four blocks share its inputs, each with four steps."""
  assert mosaic_gpu.plan(2, 2048, 128, 8, 4, 2).parts == 4
  check_in_interpreter(4, True, activations(2, 2048), 128, 256)


def test_one_scale_for_all_and_more_axes():
  check_in_interpreter(4, True, activations(2, 2, 128), 256, None, jnp.float16)


@settings(max_examples=3, deadline=None)
@given(
  rows=st.integers(1, 70),
  inputs=st.integers(1, 2),
  columns=st.integers(1, 2),
  bits=st.sampled_from((2, 4, 8)),
  group=st.sampled_from((32, 64, 128)),
  asymmetric=st.booleans(),
)
def test_any_shape(rows, inputs, columns, bits, group, asymmetric):
  check_in_interpreter(bits, asymmetric, activations(rows, 128 * inputs), 128 * columns, group)


def test_gradients_are_those_of_the_reference():
  packed, _ = weights(4, True, 128, 128, 64, jnp.float32)

  def loss(x, scales, implementation):
    y = quantized_matmul(x, packed[0], scales, packed[2], bits=4, implementation=implementation)
    return jnp.sum(y.astype(jnp.float32))

  x = activations(2, 128)
  with gpu_interpreter():
    ours = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, packed[1], "mosaic_gpu")
  expected = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, packed[1], "xla")
  for a, b in zip(ours, expected):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "bits, x, columns, scales, words",
  [
    (4, jnp.ones((1, 128)), 128, (1, 128), "x of float32, expected bfloat16"),
    (3, activations(1, 128), 128, (1, 128), r"\[128, 128\] of 3 bits, expected .* \[256, 128\]"),
    (4, activations(1, 64), 128, (1, 128), r"\[64, 128\] of 4 bits, expected .* \[128, 128\]"),
    (4, activations(1, 128), 64, (1, 64), r"\[128, 64\] of 4 bits"),
    (4, activations(0, 128), 128, (1, 128), "at least one row"),
    (4, activations(1, 128), 128, (8, 128), r"scales \[8, 128\], expected one for each column"),
    (4, activations(1, 384), 128, (2, 128), r"scales \[2, 128\], expected .* multiple of 128"),
    (4, activations(1, 128), 128, (128, 1), r"scales \[128, 1\]"),
  ],
)
def test_what_has_no_kernel_is_named(bits, x, columns, scales, words):
  values = pack(jnp.zeros((x.shape[-1], columns), jnp.int32), bits, signed=True)
  with pytest.raises(ValueError, match="mosaic_gpu does not support .*" + words):
    quantized_matmul(x, values, jnp.ones(scales), bits=bits, implementation="mosaic_gpu")
  assert quantized_matmul(x, values, jnp.ones(scales), bits=bits).shape == (len(x), columns)


# Llama-2-7B's, and steps read ahead, split inputs and both ways of storing scales.
FULL_SIZE = [
  (bits, asymmetric, rows, group, dtype)
  for (bits, asymmetric), (rows, group, dtype) in zip(
    itertools.product(BITS, (True, False)),
    itertools.cycle([(1, 128, jnp.bfloat16), (512, 64, jnp.float32), (64, 4096, jnp.float32)]),
  )
]


def full_size(bits, asymmetric, rows, group, dtype):
  """A product's function and the shapes of its arguments."""
  shapes = jax.eval_shape(lambda: weights_of_zeros(bits, asymmetric, group, dtype))
  return (
    lambda x, packed: quantized_matmul(x, *packed, bits=bits, implementation="mosaic_gpu"),
    jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16),
    shapes,
  )


def weights_of_zeros(bits, asymmetric, group, dtype):
  scales = jnp.zeros((4096 // group, 4096), dtype)
  zeros = pack(scales, 8 if bits == 3 else bits, signed=False) if asymmetric else None
  return pack(jnp.zeros((4096, 4096)), bits, signed=not asymmetric), scales, zeros


@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
def test_lowers_for_hopper(case):
  text = lower_for_gpu(*full_size(*case))
  assert "mosaic_gpu" in text and f"quantized_matmul_w{case[0]}" in text


@with_cuda_plugin
@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
def test_compiles_for_hopper(case):
  assert "mosaic_gpu" in compile_for_h100(*full_size(*case)).as_text()


def test_has_to_be_named():
  packed, _ = weights(4, True, 128, 128, 128)
  product = functools.partial(quantized_matmul, bits=4)
  for name in (None, "mosaic_gpu"):
    program = lambda x, name=name: product(x, *packed, implementation=name)
    assert ("mosaic_gpu" in lower_for_gpu(program, activations(4, 128))) == (name is not None)


@pytest.mark.parametrize(
  "devices, found",
  [
    ([("gpu", "9.0")], True),
    ([("gpu", "8.0")], False),
    ([("gpu", "9.0")] * 2, False),
    ([("tpu", None)], False),
  ],
)
def test_one_hopper_gpu(devices, found, monkeypatch):
  names = ("platform", "compute_capability")
  devices = [types.SimpleNamespace(**dict(zip(names, device))) for device in devices]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  assert has_one_gpu(HOPPER) == found


@on_hopper
@pytest.mark.parametrize("bits, asymmetric", itertools.product(BITS, (True, False)))
@pytest.mark.parametrize("rows", (1, 16, 64, 200))
@pytest.mark.parametrize(
  "group, dtype", [(32, jnp.bfloat16), (128, jnp.float32), (1024, jnp.float32)]
)
def test_on_a_gpu(bits, asymmetric, rows, group, dtype):
  packed, exact = weights(bits, asymmetric, 1024, 512, group, dtype)
  x = activations(rows, 1024)
  check(product(x, packed, bits), x, exact)
