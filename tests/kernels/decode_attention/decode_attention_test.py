"""The reference against float64, the kernel in the TPU interpreter against the reference."""

import importlib.util
import types

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
from kernels.decode_attention import tpu_block, tpu_pages
from kernels.decode_attention.api import decode_attention, quantize_tokens

# float32 sums of up to a few hundred products of order 1; scores are also scaled by log2(e).
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(tpu_block, "_SLOTS", 128)  # Several blocks of few slots.


def cache(batch=3, heads=4, kv_heads=2, slots=200, key_dim=16, value_dim=16, seed=0):
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return (
    make(batch, heads, key_dim),
    make(batch, kv_heads, slots, key_dim),
    make(batch, kv_heads, slots, value_dim),
  )


def both(*arrays, **options):
  reference = decode_attention(*arrays, implementation="xla", **options)
  with pltpu.force_tpu_interpret_mode():
    kernel = decode_attention(*arrays, implementation="mosaic_tpu", **options)
  np.testing.assert_allclose(kernel, reference, **CLOSE)
  return np.asarray(kernel)


def brute_force(query, keys, values, starts, lengths, slopes=(0.0,) * 9):
  query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
  group = query.shape[1] // keys.shape[1]
  out = np.zeros((*query.shape[:2], values.shape[-1]))
  for b, h in np.ndindex(*query.shape[:2]):
    slots = np.arange(starts[b], lengths[b])
    if len(slots):
      scores = keys[b, h // group, slots] @ query[b, h] / query.shape[-1] ** 0.5
      scores += slopes[h] * (slots - (lengths[b] - 1))
      weights = np.exp(scores - scores.max())
      out[b, h] = weights / weights.sum() @ values[b, h // group, slots]
  return out


STARTS, LENGTHS = np.array([140, 3, 0]), np.array([200, 17, 0])


def test_equals_float64():
  slopes = np.array([0.5, 0.1, 0.3, 0.05])
  arrays = cache()
  found = both(
    *arrays, jnp.asarray(LENGTHS), starts=jnp.asarray(STARTS), alibi_slopes=jnp.asarray(slopes)
  )
  np.testing.assert_allclose(found, brute_force(*arrays, STARTS, LENGTHS, slopes), **CLOSE)
  assert (found[2] == 0).all()  # A row without slots.


def test_sliding_window():
  arrays = cache()
  found = both(*arrays, jnp.asarray(LENGTHS), starts=jnp.asarray(STARTS), sliding_window=9)
  starts = np.maximum(STARTS, LENGTHS - 9)
  np.testing.assert_allclose(found, brute_force(*arrays, starts, LENGTHS), **CLOSE)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.int8, 0.02), (jnp.int4, 0.4)])
def test_a_quantized_cache(dtype, tolerance):
  query, keys, values = cache(slots=300)
  lengths = jnp.array([300, 130, 1])
  (keys_q, key_scales), (values_q, value_scales) = (
    quantize_tokens(x, dtype) for x in (keys, values)
  )
  found = both(query, keys_q, values_q, lengths, key_scales=key_scales, value_scales=value_scales)
  restore = lambda x, scales: np.asarray(x, np.float64) * np.asarray(scales)[..., None]
  exact = brute_force(
    query, restore(keys_q, key_scales), restore(values_q, value_scales), [0] * 3, lengths
  )
  np.testing.assert_allclose(found, exact, **CLOSE)
  # A last row of one slot gives its value, which is off by half a scale at most.
  assert np.abs(found - brute_force(query, keys, values, [0] * 3, lengths)).max() < tolerance


@pytest.mark.parametrize("quantized", (False, True))
def test_pages(quantized):
  rng = np.random.default_rng(0)
  query, keys, values = cache(slots=160)
  # The rows' slots, cut into pages of 32 that lie anywhere among 20, the others NaN.
  table = rng.permutation(20)[:15].reshape(3, 5)
  empty = 7 if quantized else np.nan
  to_pages = lambda x: jnp.asarray(
    np.full((20, 2, 32, 16), empty, np.float32)
  ).at[table].set(jnp.asarray(x).reshape(3, 2, 5, 32, 16).swapaxes(1, 2))  # fmt: skip
  lengths, starts = jnp.array([160, 70, 0]), jnp.array([0, 40, 0])
  options = {"starts": starts}
  pages = [to_pages(keys), to_pages(values)]
  if quantized:
    flat = [quantize_tokens(x, jnp.int8) for x in (keys, values)]
    (pages[0], key_scales), (pages[1], value_scales) = (quantize_tokens(x, jnp.int8) for x in pages)
    options |= {"key_scales": key_scales, "value_scales": value_scales}
    keys, values = (codes * scales[..., None] for codes, scales in flat)
  found = both(query, *pages, lengths, page_table=jnp.asarray(table), **options)
  np.testing.assert_allclose(found, brute_force(query, keys, values, starts, lengths), **CLOSE)


@pytest.mark.parametrize("two_cores", (False, True))
def test_pages_are_copied_ahead_over_rows_and_heads(monkeypatch, two_cores):
  """Rows of no, one and several blocks, of one head each; two cores take two rows each."""
  monkeypatch.setattr(tpu_block, "_BYTES", 0)
  chip = types.SimpleNamespace(is_megacore=two_cores)
  monkeypatch.setattr(tpu_pages, "tpu_chip", lambda: chip)
  rng = np.random.default_rng(1)
  query, _, _ = cache(batch=4)
  keys, values = (jnp.asarray(rng.normal(size=(40, 2, 32, 16)), jnp.float32) for _ in range(2))
  table = jnp.asarray(rng.permutation(40).reshape(4, 10), jnp.int32)
  lengths = jnp.array([30, 0, 320, 200])
  both(query, keys, values, lengths, page_table=table, starts=jnp.array([0, 0, 140, 130]))


def test_pruned_keys_need_the_scale_of_all_channels():
  """ThinK: channels that are 0 can be left out of keys and query."""
  query, keys, values = cache(key_dim=16)
  kept = np.array([0, 2, 3, 7, 9, 15])
  sparse = jnp.zeros_like(keys).at[..., kept].set(keys[..., kept])
  lengths = jnp.array([200, 50, 9])
  found = both(query[..., kept], keys[..., kept], values, lengths, scale=16**-0.5)
  np.testing.assert_allclose(found, brute_force(query, sparse, values, [0] * 3, lengths), **CLOSE)


@settings(max_examples=5, deadline=None)
@given(
  slots=st.integers(1, 300),
  heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
  dims=st.sampled_from([(8, 8), (80, 80), (24, 40)]),
  seed=st.integers(0, 99),
)
def test_any_shape(slots, heads, dims, seed):
  arrays = cache(2, *heads, slots, *dims, seed)
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, slots + 1, 2)
  starts = rng.integers(0, slots + 1, 2)  # Perhaps behind the end: an empty row.
  found = both(*arrays, jnp.asarray(lengths), starts=jnp.asarray(starts))
  np.testing.assert_allclose(found, brute_force(*arrays, starts, lengths), **CLOSE)


@pytest.mark.parametrize("implementation", ("xla", "mosaic_tpu"))
def test_parts_of_a_cache_are_joined_by_their_log_sum_exp(implementation):
  """Slots before and after a cut in caches of their own; a row has none of the one, or of both."""
  query, keys, values = cache(slots=200)
  slopes = jnp.array([0.5, 0.1, 0.3, 0.05])

  def attend(keys, values, lengths, starts, slopes):
    with pltpu.force_tpu_interpret_mode():
      return decode_attention(
        query, keys, values, jnp.array(lengths), starts=jnp.array(starts), alibi_slopes=slopes,
        return_log_sum_exp=True, implementation=implementation,
      )  # fmt: skip

  first, first_sum = attend(keys[:, :, :130], values[:, :, :130], [130, 17, 0], [5, 0, 0], None)
  second, second_sum = attend(keys[:, :, 130:], values[:, :, 130:], [70, 0, 0], [0, 0, 0], None)
  assert first_sum.shape == (3, 4) and first_sum.dtype == jnp.float32
  assert (first_sum[2] == -np.inf).all() and (second_sum[1:] == -np.inf).all()
  whole = np.logaddexp(first_sum, second_sum)
  weight = lambda part: np.exp(part - np.where(np.isinf(whole), 0, whole))[..., None]
  joined = weight(first_sum) * first + weight(second_sum) * second
  np.testing.assert_allclose(
    joined, brute_force(query, keys, values, [5, 0, 0], [200, 17, 0]), **CLOSE
  )
  # With slopes, against float64.
  _, found = attend(keys, values, [200, 17, 0], [140, 3, 0], slopes)
  for b, h in np.ndindex(2, 4):
    slots = np.arange([140, 3][b], [200, 17][b])
    scores = np.asarray(keys[b, h // 2, slots], np.float64) @ np.asarray(query[b, h]) / 4
    scores += float(slopes[h]) * (slots - slots[-1])
    np.testing.assert_allclose(found[b, h], np.log(np.exp(scores).sum()), **CLOSE)


def test_codes_are_within_half_a_scale():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7, 16)), jnp.float32).at[0, 0].set(0)
  for dtype, largest in ((jnp.int8, 127), (jnp.int4, 7)):
    codes, scales = quantize_tokens(x, dtype)
    assert codes.dtype == dtype and np.abs(np.asarray(codes, int)).max() == largest
    error = np.abs(np.asarray(codes, np.float32) * scales[..., None] - x)
    assert (error <= 0.5001 * scales[..., None]).all()
    assert (codes[0, 0] == 0).all()


def test_bad_arguments():
  query, keys, values = cache()
  lengths = jnp.array(LENGTHS)
  table = jnp.zeros((3, 2), jnp.int32)
  for arrays, options, message in (
    ((query, keys, values[:, :, :9]), {}, "do not match"),
    ((query[:, :3], keys, values), {}, "multiple of its heads"),
    ((query[..., :4], keys, values), {}, "as many channels"),
    ((query[:2], keys, values), {}, "different batches"),
    ((query, keys, values), {"page_table": table[:2]}, "page_table has shape"),
    ((query, keys.astype(jnp.int8), values), {}, "need scales"),
    ((query, keys, values), {"key_scales": keys[..., 0]}, "have no scales"),
    ((query, keys.astype(jnp.int32), values), {}, "expected float32, bfloat16"),
    ((query, keys, values), {"starts": lengths[:2]}, "starts have shape"),
    ((query, keys, values), {"sliding_window": 0}, "must be positive"),
    ((query, keys, values), {"implementation": "cuda"}, "not supported"),
    (
      (query, keys[:, :, :40], values[:, :, :40]),
      {"page_table": table, "implementation": "mosaic_tpu"},
      "pages of 40 slots",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      decode_attention(*arrays, lengths, **options)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slice_name", ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_compiles_for_tpu(slice_name, monkeypatch):
  monkeypatch.setattr(tpu_block, "_SLOTS", 512)
  cli.prepare_jax(compile_only=True)
  where = SingleDeviceSharding(tpu_slice(slice_name).devices[0])
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  query, rows = array(jnp.bfloat16, 8, 32, 128), array(jnp.int32, 8)
  for dtype, paged in ((jnp.bfloat16, False), (jnp.int8, True), (jnp.int4, False)):
    shape = (100, 8, 64) if paged else (8, 8, 2000)
    quantized = dtype != jnp.bfloat16
    arguments = {"starts": rows}
    if paged:
      arguments["page_table"] = array(jnp.int32, 8, 30)
    if quantized:
      arguments |= {name: array(jnp.float32, *shape) for name in ("key_scales", "value_scales")}
    kv = array(dtype, *shape, 128)
    step = lambda q, k, v, lengths, options: decode_attention(
      q, k, v, lengths, implementation="mosaic_tpu", **options
    )
    compiled = jax.jit(step).lower(query, kv, kv, rows, arguments).compile()
    assert "decode_attention" in compiled.as_text()
