"""What is the TPU kernels' own: blocks that they visit, keys in parts, gradients in bfloat16."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from common import cli
from common.compilation.topology import tpu_slice
from kernels.attention import masks, mosaic_tpu, tpu_blocks
from kernels.attention.api import attention

# float32 sums of up to a few hundred products of order 1; scores are also scaled by log2(e).
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def inputs(heads, kv_heads, seq, dim=16):
  rng = np.random.default_rng(0)
  make = lambda count: jnp.asarray(rng.normal(size=(1, count, seq, dim)), jnp.float32)
  return make(heads), make(kv_heads), make(kv_heads)


def gradients(implementation, *arrays, **options):
  def loss(*arrays):
    out = attention(*arrays, implementation=implementation, **options)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))

  with pltpu.force_tpu_interpret_mode():
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)


@pytest.mark.parametrize(
  "tokens, blocks, limit, expected",
  [
    (4096, 512, 4096, 4096),
    (4608, 512, 4096, 2560),  # 9 blocks in two parts, the second of 4 and padding.
    (8192, 512, 8192, 4096),  # 2 MiB of keys and values.
    (1536, 512, 1024, 1024),
    (100, 128, 100, 128),  # A block at least.
  ],
)
def test_parts_are_few_and_of_equal_size(tokens, blocks, limit, expected):
  array = jax.ShapeDtypeStruct((1, 8, tokens, 128), jnp.bfloat16)
  assert tpu_blocks.resident_tokens(blocks, limit, array, array) == expected


@pytest.fixture(params=(False, True), ids=("products bind", "softmax binds"))
def either_chip(request, monkeypatch):
  """Both ways in which the forward kernel orders its work."""
  monkeypatch.setattr(mosaic_tpu, "products_are_fast", lambda: request.param)


def test_gradients_over_parts_of_the_keys(monkeypatch, either_chip):
  """Three blocks of keys in two parts, heads that share them, rows that may attend to nothing."""
  monkeypatch.setattr(mosaic_tpu, "_BLOCK", 128)
  monkeypatch.setattr(tpu_blocks, "_RESIDENT_BYTES", 2 * 128 * 2 * 128 * 4)  # Two blocks of each.
  arrays = inputs(heads=4, kv_heads=2, seq=300)
  segments = jnp.asarray(np.repeat([0, 1, 2], (20, 210, 70))[None])
  options = {"segment_ids": segments, "alibi_slopes": jnp.array([0.5, 0.1, 0.3, 0.05])}
  found = gradients("mosaic_tpu", *arrays, **options)
  for a, b in zip(found, gradients("xla", *arrays, **options)):
    np.testing.assert_allclose(a, b, **CLOSE)
  assert all((np.asarray(x)[:, :, :20] == 0).all() for x in found)


def test_masked_blocks_before_and_behind_whole_ones(monkeypatch, either_chip):
  """A window of three blocks and more: one or two whole ones between masked ones."""
  monkeypatch.setattr(mosaic_tpu, "_BLOCK", 128)
  arrays = inputs(heads=1, kv_heads=1, seq=640, dim=8)
  names = "mosaic_tpu", "xla"
  found, expected = (gradients(name, *arrays, sliding_window=400) for name in names)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, **CLOSE)


def test_ranges_hold_one_run_of_whole_blocks():
  tokens = masks.Tokens(jnp.arange(48)[None], jnp.asarray(np.repeat([0, 1, 2], (4, 28, 16))[None]))
  settings = tpu_blocks.Settings(masks.Rule(True, 20), 1.0, False, 8, 8, 48, False)
  # Blocks of 8: padding in the first, the second segment from the fifth on.
  expected = [
    [0, 0, 0, 0, 4, 4],  # First,
    [1, 2, 3, 4, 5, 6],  # end,
    [0, 0, 1, 2, 0, 4],  # of the whole ones the first
    [0, 0, 2, 3, 0, 5],  # and the end.
  ]
  np.testing.assert_array_equal(tpu_blocks.ranges_of(tokens, tokens, settings)[:, 0], expected)


@pytest.mark.parametrize("at_once", (1, 2))
@pytest.mark.parametrize(
  "ranges",  # First block, end, first whole one, its end; of a row of 10 blocks in parts of 5.
  [(0, 0, 0, 0), (3, 4, 0, 0), (0, 10, 0, 10), (0, 3, 0, 3), (1, 9, 3, 6), (2, 7, 2, 5)],
)
def test_every_block_is_visited_once_and_announced(ranges, at_once):
  start, end, whole_start, whole_end = ranges
  visited = []
  for part in range(2):
    count = jnp.zeros((2, 5), jnp.int32)  # Of visits without and with a mask.
    state = {"count": count, "next": jnp.int32(-1), "announced": jnp.bool(True)}

    def run(state, part=part):
      # A body of a kernel changes references; here they are stateful through `jax.new_ref`.
      refs = {name: jax.new_ref(x) for name, x in state.items()}

      def body(blocks, masked, following):
        refs["announced"][...] &= refs["next"][...] == blocks[0]
        for block, needs_mask in zip(blocks, masked):
          refs["count"][int(needs_mask), block] += 1
        refs["next"][...] = following

      def first(block):
        refs["next"][...] = block

      of_row = jnp.asarray(ranges, jnp.int32)[:, None]
      tpu_blocks.visit(of_row, (0,), part, 5, body, at_once=at_once, first=first)
      return {name: ref[...] for name, ref in refs.items()}

    found = jax.jit(run)(state)
    assert found["announced"] and 0 <= found["next"] < 5
    visited.append(np.asarray(found["count"]))
  unmasked, masked = np.concatenate(visited, axis=1)
  j = np.arange(10)
  whole = (j >= whole_start) & (j < whole_end)
  np.testing.assert_array_equal(unmasked, whole)
  np.testing.assert_array_equal(masked, (j >= start) & (j < end) & ~whole)


def test_bfloat16_gradients_are_as_good_as_those_of_the_reference():
  arrays = inputs(heads=2, kv_heads=1, seq=200)
  exact = gradients("xla", *arrays)
  half = [x.astype(jnp.bfloat16) for x in arrays]
  error = lambda x, y: np.abs(np.asarray(x, np.float32) - y).max()
  found, reference = (gradients(name, *half) for name in ("mosaic_tpu", "xla"))
  for kernel, other, y in zip(found, reference, exact):
    assert kernel.dtype == jnp.bfloat16
    assert error(kernel, y) <= 1.5 * error(other, y)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_long_rows_compile_and_take_one_more_gradient_of_the_queries():
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice("v5e:2x2").devices[0])
  array = lambda heads: jax.ShapeDtypeStruct((1, heads, 16384, 128), jnp.bfloat16, sharding=where)
  loss = lambda *arrays: jnp.sum(
    attention(*arrays, implementation="mosaic_tpu").astype(jnp.float32)
  )
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array(8), array(2), array(2)).compile()
  # Of the queries, float32, [8, 16384, 128]; the result, its gradient and four parts are bfloat16.
  size = 8 * 16384 * 128 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * size
