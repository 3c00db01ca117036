"""The kernel in the TPU interpreter against float64, and compiled for real chips."""

import importlib.util

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
from kernels.lookup_matmul import api, mosaic_tpu
from kernels.lookup_matmul.api import lookup_matmul, pack_indices
from kernels.lookup_matmul.packing import packed_shape


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
  """What is unrolled takes the interpreter long to compile; loops of two trips and more are tested."""
  monkeypatch.setattr(mosaic_tpu, "_UNROLLED_GATHERS", 1)
  monkeypatch.setattr(mosaic_tpu, "UNROLLED_TABLES", 2)


def stage(inputs, columns, k, v, groups=1, dtype=np.float16, seed=0):
  """Packed indices and codebooks, and the float64 matrix that they stand for."""
  rng = np.random.default_rng(seed)
  indices = rng.integers(0, k, (inputs, -(-columns // v)))
  codebooks = jnp.asarray(rng.normal(size=(groups, k, v)), dtype)
  group = np.arange(inputs) // (inputs // groups)
  exact = np.asarray(codebooks, np.float64)[group[:, None], indices]
  return (
    (pack_indices(jnp.asarray(indices), k), codebooks),
    exact.reshape(inputs, -1)[:, :columns],
  )


def in_interpreter(x, *stages, columns):
  with pltpu.force_tpu_interpret_mode():
    return lookup_matmul(
      x, *(a for s in stages for a in s), columns=columns, implementation="mosaic_tpu"
    )


def check(x, *stages):
  """Against float64 products with weights that are rounded to bfloat16 if x is bfloat16."""
  columns = stages[0][1].shape[1]
  y = in_interpreter(x, *(packed for packed, _ in stages), columns=columns)
  assert y.shape == (*x.shape[:-1], columns) and y.dtype == jnp.float32
  reference, bound = np.asarray(x, np.float64), 0.0
  expected = 0.0
  for _, exact in stages:
    if x.dtype == jnp.bfloat16:
      exact = np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float64)
    expected = expected + reference @ exact
    # Products of bfloat16 are exact in float32; sums round once for each of the inputs, at most. The
    # three parts of float32 x leave 2^-24 of it.
    bound = bound + x.shape[-1] * 2.0**-24 * (np.abs(reference) @ np.abs(exact))
  assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize(
  "inputs, columns, k, v",
  [
    (512, 300, 512, 3),  # Four tables, 9 bits: two fields; an element of padding, a vector cut off.
    (300, 33, 4, 2),  # Groups of 160; fewer centroids than a table, vectors than a register.
  ],
)
def test_equals_float64(inputs, columns, k, v, dtype):
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, inputs)), dtype)
  check(x, stage(inputs, columns, k, v))


def test_groups_of_codebooks_and_a_residual():
  """The stages may differ in all but the outputs; more axes and rows than a tile has."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 7, 512)), jnp.bfloat16)
  check(x, stage(512, 24, 16, 8, groups=2), stage(512, 24, 8, 4, groups=1, seed=2))


@settings(max_examples=3, deadline=None)
@given(
  st.integers(1, 42), st.integers(1, 600), st.integers(1, 300), st.integers(1, 8), st.integers(1, 8)
)
def test_any_shape(rows, inputs, columns, bits, v):
  x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, inputs)), jnp.bfloat16)
  check(x, stage(inputs, columns, 2**bits, v))


def test_float32_codebooks_keep_sixteen_bits():
  """Two bfloat16 for an element leave 2^-17 of it."""
  packed, exact = stage(256, 8, 16, 2, dtype=np.float32)
  x = np.random.default_rng(0).normal(size=(1, 256)).astype(np.float32)
  y = np.asarray(in_interpreter(jnp.asarray(x), packed, columns=8), np.float64)
  bound = (2.0**-17 + 256 * 2.0**-24) * (np.abs(x, dtype=np.float64) @ np.abs(exact))
  assert (np.abs(y - x.astype(np.float64) @ exact) <= bound).all()


def test_what_is_not_finite_stays_in_its_row():
  packed, _ = stage(256, 8, 16, 2)
  x = jnp.ones((2, 256), jnp.bfloat16).at[1, 3].set(jnp.nan)
  y = np.asarray(in_interpreter(x, packed, columns=8))
  assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any()


def test_gradients_are_those_of_the_reference():
  """Of x and of the codebooks of both stages."""
  (planes, codebooks), _ = stage(256, 8, 16, 2, dtype=np.float32)
  (rest, residual), _ = stage(256, 8, 4, 2, dtype=np.float32, seed=3)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 256)), jnp.float32)

  def loss(x, codebooks, residual, implementation):
    y = lookup_matmul(
      x, planes, codebooks, rest, residual, columns=8, implementation=implementation
    )
    return jnp.sum(jnp.sin(y / 16))

  arguments = x, codebooks, residual
  with pltpu.force_tpu_interpret_mode():
    ours = jax.grad(loss, (0, 1, 2))(*arguments, "mosaic_tpu")
  # The sine's slope is taken at outputs that differ by 2^-17 of the codebooks, less than 1e-3 here.
  for a, b in zip(ours, jax.grad(loss, (0, 1, 2))(*arguments, "xla")):
    np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
  "rows, inputs, groups, dtype, words",
  [
    (129, 40, 1, jnp.bfloat16, "129 rows, expected 1 to 128 of bfloat16"),
    (43, 40, 1, jnp.float32, "43 rows, expected 1 to 42 of float32"),
    (0, 40, 1, jnp.bfloat16, "0 rows"),
    (1, 40, 2, jnp.bfloat16, "2 groups of 20 inputs, expected one group or a multiple of 256"),
  ],
)
def test_what_has_no_kernel_is_named(rows, inputs, groups, dtype, words):
  (planes, codebooks), _ = stage(inputs, 6, 4, 2, groups)
  x = jnp.ones((rows, inputs), dtype)
  with pytest.raises(ValueError, match="mosaic_tpu does not support .*" + words):
    lookup_matmul(x, planes, codebooks, columns=6, implementation="mosaic_tpu")
  assert lookup_matmul(x, planes, codebooks, columns=6).shape == (rows, 6)


@pytest.mark.parametrize(
  "k, rows, tpu, kernel",
  [(16, 2, True, True), (16, 2, False, False), (16, 129, True, False), (16384, 2, True, False)],
)
def test_which_one_is_picked(k, rows, tpu, kernel, monkeypatch):
  monkeypatch.setattr(api, "has_tpu", lambda kinds: tpu)
  (planes, codebooks), _ = stage(40, 6, k, 2)
  traced = jax.make_jaxpr(lambda x: lookup_matmul(x, planes, codebooks, columns=6))
  assert ("pallas_call" in str(traced(jnp.ones((rows, 40), jnp.bfloat16)))) == kernel


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slice_name", ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_compiles_for_tpu(slice_name, monkeypatch):
  monkeypatch.undo()  # As it is unrolled for chips.
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice(slice_name).devices[0])
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  # Llama-2-7B's projection down; VPTQ's inputs and outliers; groups, and the largest codebook.
  for rows, inputs, columns, groups, k, v, dtype in [
    (1, 11008, 4096, 1, 256, 8, jnp.bfloat16), (16, 4055, 4096, 1, 4096, 6, jnp.bfloat16),
    (2, 41, 4096, 1, 8192, 4, jnp.float32), (128, 2048, 100, 4, 16, 3, jnp.bfloat16),
    (1, 28672, 1024, 1, 65536, 8, jnp.bfloat16),
  ]:  # fmt: skip
    function = lambda *arrays, columns=columns: lookup_matmul(
      *arrays, columns=columns, implementation="mosaic_tpu"
    )
    compiled = (
      jax.jit(function)
      .lower(
        array((rows, inputs), dtype),
        array(packed_shape(inputs, k, -(-columns // v)), jnp.uint32),
        array((groups, k, v), jnp.float16),
      )
      .compile()
    )
    assert f"lookup_matmul_k{k}" in compiled.as_text()
