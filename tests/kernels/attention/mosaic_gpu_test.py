"""The Hopper kernel in the interpreter, lowered, compiled where the CUDA plugin is, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import mosaic_gpu
from kernels.attention.api import attention
from kernels.attention.masks import Rule, Tokens
from tests.kernels.gpu_interpreter import (
  compile_for_h100,
  gpu_interpreter,
  lower_for_gpu,
  on_hopper,
  with_cuda_plugin,
)


def inputs(batch=1, heads=1, kv_heads=1, seq=200, keys=None, key_dim=64, value_dim=64, seed=0):
  rng = np.random.default_rng(seed)
  keys = seq if keys is None else keys
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  return (
    make(batch, heads, seq, key_dim),
    make(batch, kv_heads, keys, key_dim),
    make(batch, kv_heads, keys, value_dim),
  )


def packed(*lengths, left_padding=0):
  """Positions and segment ids, int32 [1, tokens], of segments one behind the other."""
  sizes = (left_padding, *lengths)
  segments = np.repeat(np.arange(len(sizes)), sizes)
  positions = np.concatenate([np.arange(n) for n in sizes])
  return {
    "positions": jnp.asarray(positions[None], jnp.int32),
    "segment_ids": jnp.asarray(segments[None], jnp.int32),
  }


def kernel(arrays, options):
  return jax.jit(lambda *arrays: attention(*arrays, implementation="mosaic_gpu", **options))(
    *arrays
  )


def check(found, arrays, options):
  exact = attention(
    *(x.astype(jnp.float32) for x in arrays), implementation="xla", **options
  )  # fmt: skip
  assert found.shape == exact.shape and found.dtype == jnp.bfloat16
  # Weights, at most 1 of a row's largest, and the result are rounded to bfloat16, 2^-8 each.
  bound = 2.0**-8 * (float(jnp.abs(arrays[2]).max()) + np.abs(exact))
  assert (np.abs(np.asarray(found, np.float32) - exact) <= bound).all()


def check_in_interpreter(arrays, **options):
  with gpu_interpreter():
    found = kernel(arrays, options)
  check(found, arrays, options)
  return found


SLOPES = jnp.array([0.3, 0.05])
CASES = {
  "causal": ({"seq": 200}, {}),
  "grouped heads, ALiBi": ({"heads": 2, "seq": 70, "keys": 140}, {"alibi_slopes": SLOPES}),
  "bidirectional window": ({"batch": 2, "seq": 60}, {"causal": False, "sliding_window": 20}),
  "more channels, other keys": (
    {"seq": 60, "keys": 300, "key_dim": 80, "value_dim": 40},
    {"causal": False, "scale": 0.2},
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case):
  shape, options = CASES[case]
  check_in_interpreter(inputs(**shape), **options)


def test_packed_segments_and_rows_without_keys():
  """Two blocks of queries, of which the first is padding and a row at its end is not."""
  options = packed(37, 50, left_padding=127) | {
    "sliding_window": 30,
    "alibi_slopes": SLOPES[:1],
  }
  found = check_in_interpreter(inputs(seq=214), **options)
  assert (found[:, :, :127] == 0).all()


def test_what_is_forbidden_is_not_even_read():
  """Keys and values that no query may attend to can be anything, NaN too, in blocks of their own."""
  query, key, value = inputs(seq=64, keys=384)
  dirty = lambda x: x.at[:, :, :128].set(jnp.nan)
  options = {
    "key_segment_ids": jnp.asarray(np.repeat([0, 1, 2], 128)[None]),
    "causal": False,
  }
  with gpu_interpreter():
    found = kernel((query, dirty(key), dirty(value)), options)
  check(found, (query, key, value), options)


@settings(max_examples=3, deadline=None)
@given(
  seq=st.integers(1, 128),
  keys=st.integers(1, 300),
  dims=st.sampled_from([(8, 16), (64, 64), (128, 96)]),
  causal=st.booleans(),
  window=st.sampled_from([None, 1, 50]),
  seed=st.integers(0, 99),
)
def test_any_shape(seq, keys, dims, causal, window, seed):
  rng = np.random.default_rng(seed)
  options = {"causal": causal, "sliding_window": window}
  for prefix, count in (("", seq), ("key_", keys)):
    options[f"{prefix}positions"] = jnp.asarray(rng.integers(0, keys, (1, count)))
    options[f"{prefix}segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (1, count))))
  dims = dict(zip(("key_dim", "value_dim"), dims))
  check_in_interpreter(inputs(seq=seq, keys=keys, seed=seed, **dims), **options)


def test_blocks_that_are_read():
  tokens = Tokens(*packed(256, 256, left_padding=256).values())
  (first, count), whole = mosaic_gpu._blocks(tokens, tokens, Rule())
  np.testing.assert_array_equal(first[0, 2:], [2, 2, 4, 4])
  np.testing.assert_array_equal(count[0], [1, 1, 1, 2, 1, 2])  # One step where there is nothing.
  expected = np.zeros((6, 6))
  expected[3, 2] = expected[5, 4] = 1
  np.testing.assert_array_equal(whole[0], expected)


def test_gradients_are_those_of_the_reference():
  arrays = inputs(seq=16)
  loss = lambda implementation: (
    lambda *arrays: jnp.sum(
      attention(*arrays, alibi_slopes=SLOPES[:1], implementation=implementation).astype(jnp.float32)
    )
  )
  with gpu_interpreter():
    ours = jax.jit(jax.grad(loss("mosaic_gpu"), (0, 1, 2)))(*arrays)
  for a, b in zip(ours, jax.jit(jax.grad(loss("xla"), (0, 1, 2)))(*arrays)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "change, options, words",
  [
    (lambda x: x.astype(jnp.float32), {}, "query of float32, expected bfloat16"),
    (lambda x: jnp.tile(x, 3), {}, "query with heads of 192, expected at most 128"),
    (lambda x: x, {"mask": jnp.ones((1, 1, 8, 8), bool)}, "a mask or a bias"),
  ],
)
def test_what_has_no_kernel_is_named(change, options, words):
  arrays = [change(x) for x in inputs(seq=8)]
  with pytest.raises(ValueError, match="mosaic_gpu does not support " + words):
    attention(*arrays, implementation="mosaic_gpu", **options)
  assert attention(*arrays, **options).shape == arrays[0].shape


FULL_SIZE = {
  "causal, 128 channels": (128, {}),
  "window and ALiBi, 64 channels": (64, {"sliding_window": 512, "alibi_slopes": jnp.ones(8)}),
  "bidirectional, 80 channels": (80, {"causal": False}),
}


def full_size(case):
  """A function of its arrays, and their shapes."""
  dim, options = FULL_SIZE[case]
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  keys, ids = array(2, 2, 4096, dim), array(2, 4096, dtype=jnp.int32)

  def function(query, key, value, ids):
    named = {"segment_ids": ids, "implementation": "mosaic_gpu"}
    return attention(query, key, value, **named, **options)

  return function, array(2, 8, 4096, dim), keys, keys, ids


@pytest.mark.parametrize("case", FULL_SIZE)
def test_lowers_for_hopper(case):
  text = lower_for_gpu(*full_size(case))
  assert "mosaic_gpu" in text and "attention_forward" in text


@with_cuda_plugin
@pytest.mark.parametrize("case", FULL_SIZE)
def test_compiles_for_hopper(case):
  compiled = compile_for_h100(*full_size(case))
  # Not the scores, [2, 8, 4096, 4096] float32: memory grows with the tokens only.
  assert compiled.memory_analysis().temp_size_in_bytes < 2**28


def test_has_to_be_named():
  for name in (None, "mosaic_gpu"):
    program = lambda *arrays, name=name: attention(*arrays, implementation=name)
    assert ("mosaic_gpu" in lower_for_gpu(program, *inputs(seq=128))) == (name is not None)


@on_hopper
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
  shape, options = CASES[case]
  arrays = inputs(**shape)
  check(kernel(arrays, options), arrays, options)


@on_hopper
@pytest.mark.parametrize("dim", (64, 80, 128))
def test_many_tokens_on_a_gpu(dim):
  arrays = inputs(2, 8, 2, 2000, key_dim=dim, value_dim=dim)
  options = packed(700, 1000, 200, left_padding=100) | {"sliding_window": 900}
  check(kernel(arrays, options), arrays, options)
