"""The Hopper kernel in the interpreter, lowered, compiled where the CUDA plugin is, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.decode_attention import mosaic_gpu
from kernels.decode_attention.api import decode_attention, quantize_tokens
from tests.kernels.gpu_interpreter import (
  compile_for_h100,
  gpu_interpreter,
  lower_for_gpu,
  on_hopper,
  with_cuda_plugin,
)

LENGTHS, STARTS = jnp.array([200, 17, 0]), jnp.array([140, 3, 0])


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
  monkeypatch.setattr(mosaic_gpu, "_MIN_BLOCKS", 1)  # Several parts of few slots.


def cache(batch=3, heads=4, kv_heads=2, slots=200, key_dim=32, value_dim=32, seed=0):
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  return (
    make(batch, heads, key_dim),
    make(batch, kv_heads, slots, key_dim),
    make(batch, kv_heads, slots, value_dim),
  )


def stored(query, keys, values, types=(None, None)):
  """The arrays with keys and values in codes of these types, and the options for their scales."""
  options = {}
  arrays = [query]
  for name, x, dtype in zip(("key", "value"), (keys, values), types):
    if dtype is not None:
      x, options[f"{name}_scales"] = quantize_tokens(x, dtype)
    arrays.append(x)
  return arrays, options


def in_pages(arrays, options, table, size, num_pages, rest):
  """Keys, values and scales cut into pages, the others full of `rest`."""
  batch, pages = table.shape

  def cut(x):
    split = x.reshape(batch, x.shape[1], pages, size, *x.shape[3:]).swapaxes(1, 2)
    return jnp.full((num_pages, *split.shape[2:]), rest, x.dtype).at[table].set(split)

  query, *cached = arrays
  scales = {name: cut(x) for name, x in options.items()}
  return [query, *map(cut, cached)], scales | {"page_table": jnp.asarray(table)}


def kernel(arrays, lengths, options):
  """Also the log-sum-exp. The window and the scale are static."""
  static = {name: x for name, x in options.items() if not isinstance(x, jax.Array)}
  traced = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
  attend = lambda arrays, lengths, traced: decode_attention(
    *arrays, lengths, return_log_sum_exp=True, implementation="mosaic_gpu", **traced, **static
  )
  return jax.jit(attend)(arrays, lengths, traced)


def in_interpreter(arrays, lengths, options):
  with gpu_interpreter():
    return kernel(arrays, lengths, options)


def check(found, arrays, lengths, options):
  """Against the reference in float32, of the numbers that codes stand for."""
  found, log_sum_exp = found
  query, *cached = (x.astype(jnp.float32) for x in arrays)
  for i, name in enumerate(("key_scales", "value_scales")):
    if name in options:
      cached[i] *= options[name][..., None]
  options = {name: x for name, x in options.items() if not name.endswith("_scales")}
  exact, exact_sum = decode_attention(
    query, *cached, lengths, return_log_sum_exp=True, implementation="xla", **options
  )
  assert found.shape == exact.shape and found.dtype == jnp.bfloat16
  # Weights, which sum to 1, and the result are rounded to bfloat16, by at most 2^-8 each.
  bound = 2.0**-8 * (float(jnp.nanmax(jnp.abs(cached[1]))) + np.abs(exact)) + 1e-4
  assert (np.abs(np.asarray(found, np.float32) - exact) <= bound).all()
  np.testing.assert_allclose(log_sum_exp, exact_sum, rtol=1e-4, atol=1e-4)


SLOPES = jnp.array([0.5, 0.1, 0.3, 0.05])
# What the cache is like, what keys and values are stored in, the options.
CASES = {
  "left padding": ({}, (None, None), {"starts": STARTS}),
  "window, ALiBi": ({}, (None, None), {"sliding_window": 100, "alibi_slopes": SLOPES}),
  "int8": ({"kv_heads": 4}, (jnp.int8, jnp.int8), {"starts": STARTS}),
  "int4": ({"key_dim": 64}, (jnp.int4, jnp.int4), {}),
  "int8 values, ALiBi": ({}, (None, jnp.int8), {"alibi_slopes": SLOPES}),
  "pruned keys": ({"key_dim": 48, "value_dim": 64}, (None, None), {"scale": 64**-0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case):
  shape, types, options = CASES[case]
  arrays, scales = stored(*cache(**shape), types)
  found = in_interpreter(arrays, LENGTHS, options | scales)
  check(found, arrays, LENGTHS, options | scales)
  # A row without slots.
  assert (found[0][2] == 0).all() and (found[1][2] == -np.inf).all()


# Pages of a part of a block, of a block and of several.
PAGES = [(16, None), (32, jnp.int8), (64, None), (128, jnp.int4)]


def paged(size, dtype, slots=256, **shape):
  """Arrays, lengths and options; pages that are no row's are NaN if they can be."""
  arrays, scales = stored(*cache(slots=slots, **shape), (dtype, dtype))
  pages = slots // size
  table = np.random.default_rng(0).permutation(3 * pages + 5)[: 3 * pages].reshape(3, pages)
  rest = jnp.nan if dtype is None else 7
  arrays, options = in_pages(arrays, scales, table, size, 3 * pages + 5, rest)
  # Entries behind a row's end are pages, and not the row's.
  other = np.setdiff1d(np.arange(3 * pages + 5), table)[0]
  lengths = jnp.array([200, 70, 0])
  beyond = jnp.arange(pages) * size >= lengths[:, None]
  options["page_table"] = jnp.where(beyond, other, options["page_table"])
  return arrays, lengths, options | {"starts": jnp.array([100, 0, 0])}


@pytest.mark.parametrize("size, dtype", PAGES)
def test_pages(size, dtype):
  arrays, lengths, options = paged(size, dtype)
  found = in_interpreter(arrays, lengths, options)
  # The reference multiplies what it does not use by 0.
  clean = [jnp.nan_to_num(x) if dtype is None else x for x in arrays]
  check(found, clean, lengths, options)


def test_only_the_blocks_of_a_row_are_read():
  """Those before and behind its slots can be anything, NaN too."""
  arrays = cache(slots=320)
  lengths, starts = jnp.array([320, 200, 120]), jnp.array([256, 64, 0])
  slots = jnp.arange(320)
  unused = (slots < starts[:, None]) | (slots >= -(-lengths[:, None] // 64) * 64)
  dirty = [jnp.where(unused[:, None, :, None], jnp.nan, x) for x in arrays[1:]]
  found = in_interpreter((arrays[0], *dirty), lengths, {"starts": starts})
  check(found, arrays, lengths, {"starts": starts})


def test_blocks_are_read_into_the_place_of_others(monkeypatch):
  """One part of five blocks, of which two are in shared memory."""
  monkeypatch.setattr(mosaic_gpu, "_MIN_BLOCKS", 8)
  monkeypatch.setattr(mosaic_gpu, "_MAX_STAGES", 2)
  arrays, lengths = cache(1, slots=320), jnp.array([300])
  check(in_interpreter(arrays, lengths, {}), arrays, lengths, {})


@settings(max_examples=2, deadline=None)
@given(
  slots=st.integers(1, 63) | st.integers(8, 40).map(lambda n: 8 * n),
  heads=st.sampled_from([(1, 1), (9, 1), (6, 2)]),
  dims=st.sampled_from([(16, 16), (80, 64), (128, 96)]),
  seed=st.integers(0, 99),
)
def test_any_shape(slots, heads, dims, seed):
  arrays = cache(2, *heads, slots, *dims, seed)
  rng = np.random.default_rng(seed)
  lengths = jnp.asarray(rng.integers(0, slots + 1, 2))
  # Perhaps behind the end: an empty row.
  options = {"starts": jnp.asarray(rng.integers(0, slots + 1, 2))}
  check(in_interpreter(arrays, lengths, options), arrays, lengths, options)


def test_few_rows_are_split_among_parts():
  """Until there are two for each multiprocessor, or four blocks in each."""

  def parts(batch, kv_heads, slots):
    shapes = cache_shapes(jnp.bfloat16, None, batch, kv_heads, slots)
    return lower_for_gpu(*shapes)

  assert "5x1x2x8x128xf32" in parts(1, 2, 5 * 64)
  assert "33x1x8x8x128xf32" in parts(1, 8, 2**16)
  assert "1x40x8x8x128xf32" in parts(40, 8, 4096)


@pytest.mark.parametrize(
  "change, options, words",
  [
    (lambda q, k, v: (q.astype(jnp.float32), k, v), {}, "query of float32, expected bfloat16"),
    (lambda q, k, v: (q, k, v.astype(jnp.float32)), {}, "values of float32, expected bfloat16"),
    (lambda q, k, v: (jnp.tile(q, (1, 33, 1)), k, v), {}, "66 query heads of each kv head"),
    (lambda q, k, v: (q[..., :9], k[..., :9], v), {}, "keys with 9 channels, .* multiple of 16"),
    (lambda q, k, v: (q, k, jnp.tile(v, 5)), {}, "values with 160 channels, .* at most 128"),
    (lambda q, k, v: (q, k[:, :, :99], v[:, :, :99]), {}, "99 slots, expected a multiple of 8"),
    (
      lambda q, k, v: (q, k[:, :, :24], v[:, :, :24]),
      {"page_table": jnp.zeros((3, 2), jnp.int32)},
      "pages of 24 slots, expected 8, 16, 32 or a multiple of 64",
    ),
  ],
)
def test_what_has_no_kernel_is_named(change, options, words):
  arrays = change(*cache())
  lengths = jnp.minimum(LENGTHS, arrays[1].shape[2])
  with pytest.raises(ValueError, match="mosaic_gpu does not support .*" + words):
    decode_attention(*arrays, lengths, implementation="mosaic_gpu", **options)
  assert decode_attention(*arrays, lengths, **options).shape == (
    *arrays[0].shape[:2],
    len(arrays[2].T),
  )


@pytest.mark.parametrize(
  "size, channels, words",
  [
    (16, 32, "pages of 16 slots, expected 32 or a multiple of 64"),
    (32, 48, "keys of int8 with 48 channels, expected 32, 64 or 128"),
  ],
)
def test_codes_that_have_no_kernel_are_named(size, channels, words):
  pages, scales = jnp.zeros((4, 2, size, channels), jnp.int8), jnp.ones((4, 2, size))
  with pytest.raises(ValueError, match=words):
    decode_attention(
      jnp.ones((3, 4, channels), jnp.bfloat16), pages, pages, LENGTHS, key_scales=scales,
      value_scales=scales, page_table=jnp.zeros((3, 13), jnp.int32), implementation="mosaic_gpu",
    )  # fmt: skip


def cache_shapes(dtype, page, batch=8, kv_heads=8, slots=4096, channels=128, **static):
  """A step's function and the shapes of its arguments."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  rows = array(jnp.int32, batch)
  options = {"starts": rows}
  shape = (batch, kv_heads, slots) if page is None else (100, kv_heads, page)
  if page is not None:
    options["page_table"] = array(jnp.int32, batch, slots // page)
  if dtype != jnp.bfloat16:
    options |= {name: array(jnp.float32, *shape) for name in ("key_scales", "value_scales")}
  if "sliding_window" in static:
    options["alibi_slopes"] = array(jnp.float32, 4 * kv_heads)
  step = lambda q, k, v, lengths, options: decode_attention(
    q, k, v, lengths, implementation="mosaic_gpu", **options, **static
  )
  kv = array(dtype, *shape, channels)
  return step, array(jnp.bfloat16, batch, 4 * kv_heads, channels), kv, kv, rows, options


FULL_SIZE = {
  "bfloat16": (jnp.bfloat16, None, {}),
  "bfloat16, 80 channels, window and ALiBi": (
    (jnp.bfloat16, None, {"channels": 80, "sliding_window": 500})
  ),
  "bfloat16 in pages of 16": (jnp.bfloat16, 16, {}),
  "bfloat16 in pages of 128": (jnp.bfloat16, 128, {}),
  "int8": (jnp.int8, None, {}),
  "int8 in pages of 32": (jnp.int8, 32, {}),
  "int4": (jnp.int4, None, {"channels": 64}),
}


def full_size(case):
  dtype, page, options = FULL_SIZE[case]
  return cache_shapes(dtype, page, **options)


@pytest.mark.parametrize("case", FULL_SIZE)
def test_lowers_for_hopper(case):
  text = lower_for_gpu(*full_size(case))
  assert "mosaic_gpu" in text and "decode_attention" in text


@with_cuda_plugin
@pytest.mark.parametrize("case", FULL_SIZE)
def test_compiles_for_hopper(case, monkeypatch):
  monkeypatch.setattr(mosaic_gpu, "_MIN_BLOCKS", 4)
  compiled = compile_for_h100(*full_size(case))
  # The results of the parts, and no copy of the cache: that of int4 has 2^24 bytes.
  assert compiled.memory_analysis().temp_size_in_bytes < 2**21


def test_has_to_be_named():
  for name in (None, "mosaic_gpu"):
    program = lambda *arrays, name=name: decode_attention(*arrays, LENGTHS, implementation=name)
    assert ("mosaic_gpu" in lower_for_gpu(program, *cache())) == (name is not None)


@on_hopper
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
  shape, types, options = CASES[case]
  arrays, scales = stored(*cache(**shape), types)
  check(kernel(arrays, LENGTHS, options | scales), arrays, LENGTHS, options | scales)


@on_hopper
@pytest.mark.parametrize("size, dtype", PAGES)
def test_pages_on_a_gpu(size, dtype):
  arrays, lengths, options = paged(size, dtype)
  found = kernel(arrays, lengths, options)
  check(found, [jnp.nan_to_num(x) if dtype is None else x for x in arrays], lengths, options)


@on_hopper
@pytest.mark.parametrize("dtype", (None, jnp.int8, jnp.int4))
@pytest.mark.parametrize("batch", (1, 40))
def test_many_slots_on_a_gpu(batch, dtype, monkeypatch):
  monkeypatch.setattr(mosaic_gpu, "_MIN_BLOCKS", 4)
  arrays, options = stored(*cache(batch, 32, 8, 3000, 128, 128), (dtype, dtype))
  lengths = jnp.asarray(np.random.default_rng(0).integers(1, 3001, batch))
  check(kernel(arrays, lengths, options), arrays, lengths, options)
