"""The reference against float64, the kernels in the TPU interpreter against the reference."""

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
from kernels.attention import masks, mosaic_tpu, tpu_blocks
from kernels.attention.api import attention

# float32 sums of up to a few hundred products of order 1; scores are also scaled by log2(e).
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "_BLOCK", 128)  # Several blocks of few tokens.


def inputs(batch=2, heads=4, kv_heads=2, seq=200, keys=None, key_dim=16, value_dim=16, seed=0):
  rng = np.random.default_rng(seed)
  keys = seq if keys is None else keys
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return (
    make(batch, heads, seq, key_dim),
    make(batch, kv_heads, keys, key_dim),
    make(batch, kv_heads, keys, value_dim),
  )


def packed(*lengths, left_padding=0):
  """positions and segment ids, int32 [1, tokens], of segments one behind the other."""
  sizes = (left_padding, *lengths)
  segments = np.repeat(np.arange(len(sizes)), sizes)
  positions = np.concatenate([np.arange(n) for n in sizes])
  return jnp.asarray(positions[None], jnp.int32), jnp.asarray(segments[None], jnp.int32)


def brute_force(query, key, value, allowed, scores_bias=0.0, scale=None):
  """float64, one query at a time. allowed: [batch, heads, seq, keys]."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  group = query.shape[1] // key.shape[1]
  key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  scores = np.einsum("bhqd,bhkd->bhqk", query, key) * scale + scores_bias
  scores = np.where(allowed, scores, -np.inf)
  largest = scores.max(axis=-1, keepdims=True)
  weights = np.exp(scores - np.where(np.isinf(largest), 0, largest))
  total = weights.sum(axis=-1, keepdims=True)
  return np.einsum("bhqk,bhkd->bhqd", weights / np.where(total == 0, 1, total), value)


def in_interpreter(*arrays, **options):
  with pltpu.force_tpu_interpret_mode():
    return attention(*arrays, implementation="mosaic_tpu", **options)


def test_the_reference_agrees_with_float64():
  arrays = inputs(seq=12, keys=20)
  positions = np.array([np.arange(8, 20), np.arange(0, 12)])
  segments = np.where(np.arange(12) < 3, 0, 1) * np.ones((2, 1), int)
  key_positions = np.arange(20) * np.ones((2, 1), int)
  key_segments = np.where(np.arange(20) < 5, 0, 1) * np.ones((2, 1), int)
  slopes = np.array([0.5, 0.1, 0.3, 0.05])
  rng = np.random.default_rng(1)
  mask, bias = rng.uniform(size=(2, 1, 12, 20)) < 0.8, rng.normal(size=(1, 4, 12, 20))
  distance = positions[:, :, None] - key_positions[:, None, :]
  allowed = (segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] != 0)
  allowed &= (distance >= 0) & (distance < 7)
  extra = bias - slopes[:, None, None] * distance[:, None]
  expected = brute_force(*arrays, allowed[:, None] & mask, extra, scale=0.3)
  found = attention(
    *arrays,
    positions=jnp.asarray(positions),
    segment_ids=jnp.asarray(segments),
    key_positions=jnp.asarray(key_positions),
    key_segment_ids=jnp.asarray(key_segments),
    sliding_window=7,
    alibi_slopes=jnp.asarray(slopes),
    mask=jnp.asarray(mask),
    bias=jnp.asarray(bias, jnp.float32),
    scale=0.3,
    implementation="xla",
  )
  np.testing.assert_allclose(found, expected, **CLOSE)
  nothing = ~(allowed[:, None] & mask).any(axis=-1)
  assert nothing.any() and (np.asarray(found)[np.broadcast_to(nothing, (2, 4, 12))] == 0).all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seq, keys", [(5, 5), (1, 7)])
def test_the_reference_agrees_with_that_of_jax(seq, keys, kv_heads):
  query, key, value = inputs(2, 4, kv_heads, seq, keys, 8, 8)
  rng = np.random.default_rng(0)
  mask = jnp.asarray(rng.random((2, 1, seq, keys)) < 0.6).at[..., 0].set(True)
  bias = jnp.asarray(rng.normal(size=(1, 4, seq, keys)), jnp.float32)
  swap = lambda x: x.swapaxes(1, 2)
  expected = jax.nn.dot_product_attention(swap(query), swap(key), swap(value), bias=bias, mask=mask)
  found = attention(query, key, value, causal=False, mask=mask, bias=bias, implementation="xla")
  np.testing.assert_allclose(swap(found), expected, atol=2e-6)


def test_gradients_of_a_row_without_keys_are_finite():
  query, key, value = inputs(2, 2, 2, 3, 4)
  mask = jnp.ones((2, 1, 3, 4), bool).at[0, :, 1].set(False)
  loss = lambda *arrays: jnp.sum(attention(*arrays, causal=False, mask=mask) ** 2)
  gradients = jax.grad(loss, (0, 1, 2))(query, key, value)
  assert all(np.isfinite(g).all() for g in gradients)
  assert (gradients[0][0, :, 1] == 0).all()


def with_gradients(implementation, *arrays, **options):
  """The result, and the gradients of a loss by every array."""

  def loss(*arrays):
    *arrays, bias = arrays if len(arrays) == 4 else (*arrays, None)
    out = attention(*arrays, bias=bias, implementation=implementation, **options)
    return jnp.sum(jnp.sin(out)), out

  with pltpu.force_tpu_interpret_mode():
    (_, out), gradients = jax.jit(
      jax.value_and_grad(loss, range(len(arrays)), has_aux=True)
    )(*arrays)  # fmt: skip
  return out, *gradients


def check(*arrays, **options):
  found = with_gradients("mosaic_tpu", *arrays, **options)
  for a, b in zip(found, with_gradients("xla", *arrays, **options)):
    np.testing.assert_allclose(a, b, **CLOSE)
  return found[0]


PACKED = packed(37, 150, 60, left_padding=20)
CASES = {
  "causal": {},
  "window": {"sliding_window": 40},
  "bidirectional window": {"causal": False, "sliding_window": 40},
  "packed": {"positions": PACKED[0], "segment_ids": PACKED[1]},
  "alibi": {"alibi_slopes": jnp.array([0.5, 0.1, 0.3, 0.05])},
  "everything": {
    "positions": PACKED[0],
    "segment_ids": PACKED[1],
    "sliding_window": 30,
    "alibi_slopes": jnp.array([0.5, 0.1, 0.3, 0.05]),
    "scale": 0.2,
  },
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_agree_with_the_reference(case):
  check(*inputs(batch=1, seq=267), **CASES[case])


def test_a_bias_a_mask_and_their_gradients():
  query, key, value = inputs(batch=1, seq=140)
  rng = np.random.default_rng(0)
  mask = jnp.asarray(rng.uniform(size=(1, 1, 140, 140)) < 0.7).at[..., 5, :].set(False)
  bias = jnp.asarray(rng.normal(size=(1, 4, 140, 140)), jnp.float32)
  found = check(query, key, value, bias, mask=mask)
  assert (found[:, :, 5] == 0).all()


@settings(max_examples=5, deadline=None)
@given(
  seq=st.integers(1, 260),
  keys=st.integers(1, 260),
  heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
  dims=st.sampled_from([(8, 8), (80, 80), (24, 40)]),
  causal=st.booleans(),
  window=st.sampled_from([None, 1, 50]),
  seed=st.integers(0, 99),
)
def test_any_shape(seq, keys, heads, dims, causal, window, seed):
  arrays = inputs(1, *heads, seq, keys, *dims, seed=seed)
  rng = np.random.default_rng(seed)
  options = {"causal": causal, "sliding_window": window}
  for prefix, count in (("", seq), ("key_", keys)):
    options[f"{prefix}positions"] = jnp.asarray(rng.integers(0, keys, (1, count)))
    options[f"{prefix}segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (1, count))))
  np.testing.assert_allclose(
    in_interpreter(*arrays, **options), attention(*arrays, **options), **CLOSE
  )


def test_bfloat16_is_as_good_as_the_reference():
  arrays = inputs(seq=200)
  exact = attention(*arrays)
  half = [x.astype(jnp.bfloat16) for x in arrays]
  error = lambda x: np.abs(np.asarray(x, np.float32) - exact).max()
  found = in_interpreter(*half)
  assert found.dtype == jnp.bfloat16
  assert error(found) <= 1.5 * error(attention(*half))


def test_parts_of_the_keys_in_turn(monkeypatch):
  """More keys than the chip takes at once."""
  monkeypatch.setattr(tpu_blocks, "_RESIDENT_BYTES", 128 * 2 * 128 * 4)  # A block of each.
  check(*inputs(batch=1, heads=2, seq=400), sliding_window=150)


def test_what_is_forbidden_is_not_even_read():
  """Keys and values that no query may attend to can be anything, NaN too, in blocks of their own."""
  query, key, value = inputs(batch=1, seq=384)
  _, segments = packed(128, 128, 128)
  dirty = lambda x: x.at[:, :, 128:256].set(jnp.nan)
  others = jnp.where(segments == 2, 0, segments)
  found = in_interpreter(
    query, dirty(key), dirty(value), segment_ids=others, key_segment_ids=others
  )
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found, attention(query, key, value, segment_ids=others), **CLOSE)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.booleans(), st.sampled_from([None, 1, 7, 30]))
def test_block_decisions_never_lose_a_key(seed, causal, window):
  rng = np.random.default_rng(seed)
  draw = lambda n: masks.Tokens(
    jnp.asarray(rng.integers(0, 40, (2, n))), jnp.asarray(rng.integers(0, 4, (2, n)))
  )
  queries, keys, rule = draw(24), draw(40), masks.Rule(causal, window)
  allowed = masks.may_attend(
    masks.Tokens(*(x[:, :, None] for x in queries)),
    masks.Tokens(*(x[:, None, :] for x in keys)),
    rule,
  )
  blocks = np.asarray(allowed).reshape(2, 3, 8, 5, 8).transpose(0, 1, 3, 2, 4)
  meet = masks.blocks_that_meet(queries, keys, rule, 8, 8)
  assert (meet | ~blocks.any(axis=(3, 4))).all()
  row = masks.Span(*(x[:, :, None] for x in masks.block_spans(queries, 8)))
  column = masks.Span(*(x[:, None, :] for x in masks.block_spans(keys, 8)))
  assert (blocks.all(axis=(3, 4)) | ~masks.all_may_attend(row, column, rule)).all()


def test_packed_prompts_skip_blocks_of_other_prompts():
  positions, segments = packed(256, 256, 256)
  tokens = masks.Tokens(positions, segments)
  meet = masks.blocks_that_meet(tokens, tokens, masks.Rule(), 128, 128)
  expected = np.kron(np.eye(3, dtype=bool), np.tril(np.ones((2, 2), bool)))
  np.testing.assert_array_equal(meet[0], expected)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"query": (2, 3, 8, 16)}, "multiple of its heads"),
    ({"key": (1, 2, 8, 16)}, "do not match"),
    ({"query": (2, 4, 8, 12)}, "as many channels"),
    ({"query": (4, 8, 16)}, "expected \\[batch, heads"),
    ({"query": (2, 4, 0, 16)}, "nothing to attend"),
  ],
)
def test_shapes_that_do_not_match(change, message):
  shapes = {"query": (2, 4, 8, 16), "key": (2, 2, 8, 16), "value": (2, 2, 8, 16)} | change
  with pytest.raises(ValueError, match=message):
    attention(*(jnp.zeros(shape) for shape in shapes.values()))


def test_bad_options():
  arrays = inputs(seq=8)
  for options, message in (
    ({"implementation": "triton"}, "'triton' is not supported"),
    ({"sliding_window": 0}, "must be positive"),
    ({"alibi_slopes": jnp.zeros(2)}, r"expected \(4,\)"),
    ({"positions": jnp.zeros((2, 9), jnp.int32)}, r"positions have shape \(2, 9\)"),
    ({"mask": jnp.ones((3, 1, 8, 8), bool)}, "mask|[Ii]ncompatible"),
  ):
    with pytest.raises(ValueError, match=message):
      attention(*arrays, **options)
  with pytest.raises(ValueError, match="query of float16"):
    attention(arrays[0].astype(jnp.float16), *arrays[1:], implementation="mosaic_tpu")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slice_name", ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_compiles_for_tpu(slice_name, monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "_BLOCK", 512)
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice(slice_name).devices[0])
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  for dtype, dim in ((jnp.bfloat16, 128), (jnp.float32, 80))[: 2 if "v5e" in slice_name else 1]:
    q, kv = array(dtype, 1, 8, 2048, dim), array(dtype, 1, 2, 2048, dim)
    ids = array(jnp.int32, 1, 2048)

    def loss(q, k, v, positions, segment_ids):
      out = attention(
        q, k, v, positions=positions, segment_ids=segment_ids, implementation="mosaic_tpu"
      )
      return jnp.sum(out.astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, ids, ids).compile()
    text = compiled.as_text()
    for name in ("forward", "backward"):
      assert f"attention_{name}" in text
    # Not the scores, [8, 2048, 2048] float32: memory grows with the tokens only.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2048 * 2048 * 4 / 3
