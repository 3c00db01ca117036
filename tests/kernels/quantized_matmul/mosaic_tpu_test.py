"""The kernel in the TPU interpreter against float64, and compiled for real chips."""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from common import cli
from common.compilation.topology import tpu_slice
from kernels.quantized_matmul import tpu_bfloat16, tpu_operands, tpu_output_groups
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import pack, packed_dtype


def weights(bits, asymmetric, inputs, columns, group, scale_dtype=np.float32, out_group=1):
  """Packed weights, and the float64 matrix that they stand for."""
  rng = np.random.default_rng(bits)
  low = 0 if asymmetric else -(2 ** (bits - 1))
  codes = rng.integers(low, low + 2**bits, (inputs, columns))
  scales = jnp.asarray(rng.uniform(0.5, 1.5, (inputs // group, columns // out_group)), scale_dtype)
  zeros = rng.integers(0, 2**bits, scales.shape) if asymmetric else np.zeros(scales.shape, int)
  spread = lambda v: np.kron(np.asarray(v, np.float64), np.ones((group, out_group)))
  exact = (codes - spread(zeros)) * spread(scales)
  packed_zeros = (
    pack(jnp.asarray(zeros), 8 if bits == 3 else bits, signed=False) if asymmetric else None
  )
  return (pack(jnp.asarray(codes), bits, signed=not asymmetric), scales, packed_zeros), exact


def in_interpreter(x, packed, bits):
  with pltpu.force_tpu_interpret_mode():
    return quantized_matmul(x, *packed, bits=bits, implementation="mosaic_tpu")


def check(x, packed, exact, bits, x_error=2.0**-14):
  y = in_interpreter(x, packed, bits)
  assert y.shape == (*x.shape[:-1], exact.shape[1]) and y.dtype == x.dtype
  reference = np.asarray(x, np.float64)
  expected = reference @ exact
  # x is rounded to `x_error` of the largest value in reach; codes, up to 2^bits - 1 in size before
  # the zero point comes off, are exact; sums and scales are float32; the result has x's precision.
  largest = np.abs(reference).max(axis=-1, keepdims=True)
  unsubtracted = np.abs(exact) + 2**bits * 1.5
  bound = x_error * largest * np.abs(exact).sum(axis=0)
  bound = bound + 64 * 2.0**-24 * (np.abs(reference) @ unsubtracted)
  bound = bound + float(jnp.finfo(x.dtype).eps) * np.abs(expected)
  assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("asymmetric", (True, False))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_equals_float64(bits, asymmetric, monkeypatch):
  monkeypatch.setattr(tpu_operands, "_BLOCK_INPUTS", 256)  # Two blocks of inputs.
  packed, exact = weights(bits, asymmetric, 512, 256, 128)
  x = np.random.default_rng(0).normal(size=(3, 512))
  for dtype in (jnp.bfloat16, jnp.float32):
    check(jnp.asarray(x, dtype), packed, exact, bits)


def on_chip(kind, cores=1):
  """A context in which JAX knows the chip, as it knows the process's own."""
  chip = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  axes = {"axis_types": (jax.sharding.AxisType.Explicit,), "abstract_device": chip}
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), **axes))


def test_choices_by_chip():
  """A v6e converts integers into bfloat16; a v5p has two cores that share the columns."""
  for kind, cores, converts in [("TPU v5 lite", 1, False), ("TPU v5", 2, False),
                                ("TPU v6 lite", 1, True)]:  # fmt: skip
    with on_chip(kind, cores):
      assert tpu_operands.grid((8192, 8192), 128, 4) == (cores, 8 // cores, 2, 1024)
      assert tpu_bfloat16.converts_integers() == converts
  assert tpu_operands.grid((8192, 8192), 128, 4) == (2, 4, 2, 1024)
  assert not tpu_bfloat16.converts_integers()


@pytest.mark.parametrize("asymmetric", (True, False))
@pytest.mark.parametrize(
  "bits, group, converts",
  [
    (2, 128, False), (3, 128, False), (4, 256, False), (8, 1024, False),
    (2, 128, True), (3, 128, True), (4, 256, True),
  ],
)  # fmt: skip
def test_many_rows_of_bfloat16_lose_nothing(bits, group, converts, asymmetric, monkeypatch):
  """Unlike digits; two blocks of inputs, groups of a part of one and of both."""
  monkeypatch.setattr(tpu_bfloat16, "converts_integers", lambda: converts)
  monkeypatch.setattr(tpu_operands, "_BLOCK_INPUTS", 512)
  packed, exact = weights(bits, asymmetric, 1024, 128, group)
  x = np.random.default_rng(0).normal(size=(33, 1024))
  x[:, 5] *= 1e4
  check(jnp.asarray(x, jnp.bfloat16), packed, exact, bits, x_error=0)


@pytest.mark.parametrize("bits, rows", [(4, 3), (3, 3), (4, 40)])
def test_the_last_block_may_reach_beyond_the_columns(bits, rows, monkeypatch):
  """As of Llama-2-7B's 11008: of 384 columns in blocks of 256 half of the second."""
  assert tpu_operands.grid((4096, 11008), 128, 4) == (2, 11, 1, 512)
  monkeypatch.setattr(tpu_operands, "BLOCK_COLUMNS", (256, 128))
  monkeypatch.setattr(tpu_operands, "_PADDING", 1 / 2)
  assert tpu_operands.grid((256, 384), 128, bits) == (2, 1, 1, 256)
  packed, exact = weights(bits, True, 256, 384, 128)
  x = np.random.default_rng(0).normal(size=(rows, 256))
  check(jnp.asarray(x, jnp.bfloat16), packed, exact, bits)


def test_float32_dot():
  a, b = (np.random.default_rng(0).normal(size=shape) for shape in ((4, 6), (6, 5)))
  a, b = a.astype(np.float32), b.astype(np.float32)
  exact = a.astype(np.float64) @ b
  # The products of parts that are left out are 2^-24 of the whole; so is the rounding of the sums.
  bound = 8 * 2.0**-24 * (np.abs(a) @ np.abs(b))
  found = jax.jit(tpu_operands.float32_dot)(a, b)
  assert (np.abs(np.asarray(found, np.float64) - exact) <= bound).all()
  assert not np.isfinite(tpu_operands.float32_dot(jnp.asarray(a).at[1, 2].set(jnp.inf), b)[1]).any()


@pytest.mark.parametrize("asymmetric", (True, False))
@pytest.mark.parametrize(
  "bits, group, rows", [(4, 32, 3), (4, 32, 12), (4, 64, 8), (3, 32, 1), (8, 64, 2)]
)
def test_groups_smaller_than_the_matrix_unit(bits, group, rows, asymmetric):
  """Rows that share a register with those of another group, fill it, and are padded."""
  packed, exact = weights(bits, asymmetric, 256, 128, group)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 256)), jnp.float32)
  check(x, packed, exact, bits)


@pytest.mark.parametrize("asymmetric", (True, False))
@pytest.mark.parametrize("bits, group, rows", [(4, 128, 3), (3, 256, 17), (2, 512, 1)])
def test_scales_along_the_output(bits, group, rows, asymmetric, monkeypatch):
  """Groups of a part of a block of columns, of one and of all columns; two blocks of inputs."""
  monkeypatch.setattr(tpu_operands, "_BLOCK_INPUTS", 256)
  monkeypatch.setattr(tpu_output_groups, "BLOCK_COLUMNS", (128,))
  packed, exact = weights(bits, asymmetric, 512, 512, 1, out_group=group)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 512)), jnp.bfloat16)
  check(x, packed, exact, bits)


def test_three_bits_of_a_large_prime_take_one_block():
  """Llama-2-7B's 11008 = 43 x 256 inputs: 43 steps of a block of 256 would be too short."""
  assert tpu_operands.grid((11008, 4096), 128, 3) == (2, 4, 1, 512)
  assert tpu_operands.grid((11008, 4096), 128, 4) == (2, 4, 2, 512)
  assert tpu_operands.grid((28672, 8192), 128, 3) == (2, 4, 7, 1024)


@settings(max_examples=6, deadline=None)
@given(
  st.integers(1, 64), st.integers(1, 6), st.sampled_from((1, 2, 3)), st.booleans(), st.booleans()
)
def test_any_shape(rows, inputs, columns, per_channel, asymmetric):
  inputs, columns = 128 * inputs, 128 * columns
  packed, exact = weights(4, asymmetric, inputs, columns, inputs if per_channel else 128)
  x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, inputs)), jnp.bfloat16)
  check(x, packed, exact, 4)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_half_precision_scales_and_more_axes(dtype):
  packed, exact = weights(4, True, 256, 128, 128, dtype)
  check(
    jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 256)), jnp.bfloat16), packed, exact, 4
  )


def test_an_outlier_costs_precision_in_its_block_only():
  packed, exact = weights(4, False, 1024, 128, 128)
  x = np.random.default_rng(0).normal(size=(1, 1024)).astype(np.float32)
  x[0, 700] = 1e4
  exact[512:] = 0  # Look at what the first block of 512 adds.
  packed = (packed[0].at[512:].set(0), *packed[1:])
  y = np.asarray(in_interpreter(jnp.asarray(x), packed, 4), np.float64)
  bound = 2.0**-14 * np.abs(x[0, :512]).max() * np.abs(exact).sum(axis=0) + 1e-3
  assert (np.abs(y - x.astype(np.float64) @ exact) <= bound).all()


@pytest.mark.parametrize("value", (np.nan, np.inf))
@pytest.mark.parametrize("rows, dtype", [(2, np.float32), (33, jnp.bfloat16)])
def test_what_is_not_finite_stays_in_its_row(rows, dtype, value):
  packed, _ = weights(4, True, 128, 128, 128)
  x = np.ones((rows, 128), np.float32)
  x[1, 3] = value
  y = np.asarray(in_interpreter(jnp.asarray(x, dtype), packed, 4), np.float32)
  assert np.isfinite(np.delete(y, 1, axis=0)).all() and not np.isfinite(y[1]).any()


def test_zeros_give_zeros():
  packed, _ = weights(4, True, 128, 128, 128)
  assert not np.asarray(in_interpreter(jnp.zeros((1, 128)), packed, 4)).any()


def test_gradients_are_those_of_the_reference():
  (values, scales, zeros), _ = weights(4, True, 256, 128, 128)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 256)), jnp.float32)

  def loss(x, scales, implementation):
    y = quantized_matmul(x, values, scales, zeros, bits=4, implementation=implementation)
    return jnp.sum(jnp.sin(y / 16))

  with pltpu.force_tpu_interpret_mode():
    ours = jax.grad(loss, (0, 1))(x, scales, "mosaic_tpu")
  # The sine's slope is taken at outputs that differ by the rounding of x, less than 0.1 here.
  for a, b in zip(ours, jax.grad(loss, (0, 1))(x, scales, "xla")):
    np.testing.assert_allclose(a, b, atol=0.01 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
  "bits, x, columns, scales, words",
  [
    (3, (1, 128), 128, (1, 128), "128 inputs of 3 bits, expected a multiple of 256"),
    (4, (65, 128), 128, (1, 128), "65 rows, expected 1 to 64"),
    (4, (0, 128), 128, (1, 128), "0 rows"),
    (4, (17, 128), 128, (4, 128), "17 rows, expected 1 to 16 for groups of 32 inputs"),
    (4, (33, 128), 128, (2, 128), "33 rows, expected 1 to 32 for groups of 64 inputs"),
    (4, (1, 128), 128, (8, 128), r"scales \[8, 128\], expected one for each column .* 32, 64 or"),
    (4, (1, 100), 128, (1, 128), r"\[100, 128\], expected multiples of 128"),
    (4, (1, 128), 100, (1, 100), r"\[128, 100\], expected multiples of 128"),
    (4, (1, 128), 128, (128, 2), r"scales \[128, 2\], expected one for .* input and group of col"),
    (4, (65, 128), 128, (128, 1), "65 rows, expected 1 to 64"),
  ],
)  # fmt: skip
def test_what_has_no_kernel_is_named(bits, x, columns, scales, words):
  values = pack(jnp.zeros((x[1], columns), jnp.int32), bits, signed=True)
  arguments = jnp.ones(x, jnp.bfloat16), values, jnp.ones(scales)
  with pytest.raises(ValueError, match="mosaic_tpu does not support .*" + words):
    quantized_matmul(*arguments, bits=bits, implementation="mosaic_tpu")
  assert quantized_matmul(*arguments, bits=bits).shape == (x[0], columns)


NO_COMPILER = importlib.util.find_spec("libtpu") is None


def compile_for_tpu(slice_name, bits, rows, inputs, columns, groups):
  """The compiled text of a product of codes with zero points; scales and zero points as `groups`."""
  device = tpu_slice(slice_name).devices[0]
  where = SingleDeviceSharding(device)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  codes = jax.eval_shape(
    lambda codes: pack(codes, bits, signed=False),
    jax.ShapeDtypeStruct((inputs, columns), jnp.int32),
  )
  zeros_dtype = packed_dtype(8 if bits == 3 else bits, signed=False)
  function = lambda *arrays: quantized_matmul(*arrays, bits=bits, implementation="mosaic_tpu")
  arrays = (
    array((rows, inputs), jnp.bfloat16),
    array(codes.shape, codes.dtype),
    array(groups, jnp.bfloat16),
    array(groups, zeros_dtype),
  )
  with on_chip(device.device_kind, device.num_cores):
    return jax.jit(function).lower(*arrays).compile().as_text()


@pytest.mark.skipif(NO_COMPILER, reason="libtpu is not installed")
@pytest.mark.parametrize("slice_name", ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_compiles_for_tpu(slice_name):
  cli.prepare_jax(compile_only=True)
  # Llama-2-7B's projections down (two blocks of 43 groups) and up, and per-channel 8-bit codes.
  for bits, rows, inputs, columns, groups in [
    (4, 1, 11008, 4096, (86, 4096)), (2, 16, 4096, 11008, (32, 11008)),
    (8, 33, 4096, 4096, (1, 4096)), (3, 8, 1024, 512, (8, 512)), (4, 4, 512, 512, (16, 512)),
    (3, 20, 512, 512, (8, 512)), (4, 4, 512, 1024, (512, 4)), (4, 40, 11008, 512, (86, 512)),
    (2, 64, 4096, 512, (32, 512)), (3, 64, 512, 512, (4, 512)),
  ]:  # fmt: skip
    compiled = compile_for_tpu(slice_name, bits, rows, inputs, columns, groups)
    assert f"quantized_matmul_w{bits}" in compiled


@pytest.mark.skipif(NO_COMPILER, reason="libtpu is not installed")
def test_two_bits_of_few_groups_compile():
  """XLA's compiler aborts, and ends its process, where it converts 2-bit zero points of few groups."""
  test = (
    "from common import cli; from tests.kernels.quantized_matmul import mosaic_tpu_test as test; "
  )
  test += "cli.prepare_jax(compile_only=True); "
  test += "; ".join(
    f"test.compile_for_tpu('v5e:2x2', 2, {rows}, 512, 512, ({groups}, 512))"
    for rows, groups in ((4, 4), (64, 4), (1, 1))
  )
  root = pathlib.Path(__file__).parents[3]
  done = subprocess.run([sys.executable, "-c", test], cwd=root, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
