"""Prepacking: vectors of the official code, both attention paths, counted costs, the tiny run."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from common import cli
from common.compilation.topology import tpu_slice
from common.decoding.bin_packing import best_fit_decreasing
from common.decoding.generation import Progress, generate, step
from common.decoding.prepacking import pack, pad_to_buckets, read_packed
from common.errors import UserError
from common.models.decoder import KVCache
from kernels.attention import mosaic_tpu
from kernels.attention.api import attention
from projects.prepacking import accounting, batching, experiment, prompts
from projects.prepacking import config as config_module
from projects.prepacking.compile_steps import compile_steps
from projects.prepacking.prepacking import (
  independent_mask,
  read_packed_densely,
  unpack_left_padded,
)
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "prepacking"
# One prompt of a single token, which has nothing in the packed rows.
LENGTHS = (9, 1, 5, 12, 5, 2)


def golden(name):
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def packed_by_the_official_code():
  """The vectors, and the same prompts packed here."""
  expected = golden("pack_unpack")
  found = [row[:n].tolist() for row, n in zip(expected["prompts"], expected["lengths"])]
  batch = batching.pack_batch(found)
  return expected, batch, pack(batch.prompts, batch.bins)


@pytest.fixture(scope="module")
def model():
  return random_decoder(ARCHITECTURES["qwen2, grouped-query"])


@pytest.fixture(scope="module")
def some_prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 64, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def packed(some_prompts):
  return pad_to_buckets(pack(some_prompts, best_fit_decreasing(LENGTHS, 12)))


def test_bins_of_the_official_code():
  expected = golden("greedy_bins")
  bins = best_fit_decreasing(expected["weights"].tolist(), int(expected["capacity"]))
  assert len(bins) == expected["num_bins"]
  assert [item for items in bins for item in items] == expected["items_in_bin_order"].tolist()
  for index, items in enumerate(bins):
    assert (expected["bin_of_item"][items] == index).all()


def test_packing_positions_and_mask_of_the_official_code(packed_by_the_official_code):
  expected, batch, packed = packed_by_the_official_code
  np.testing.assert_array_equal(packed.tokens, expected["packed_tokens"])
  np.testing.assert_array_equal(packed.last_tokens, expected["final_tokens"][:, 0])
  # Padding, which nothing reads, has position 1 there.
  positions = np.where(packed.segment_ids == 0, 1, packed.positions)
  np.testing.assert_array_equal(positions, expected["packed_positions"])
  mask = independent_mask(jnp.asarray(packed.segment_ids), jnp.asarray(packed.positions))
  np.testing.assert_array_equal(mask, expected["packed_mask"].astype(bool))
  for row, items in enumerate(batch.bins):
    ends = np.cumsum([0, *(packed.lengths[i] for i in items)])
    np.testing.assert_array_equal(expected["restart_offsets"][row, : len(ends)], ends)
    np.testing.assert_array_equal(expected["restart_prompt"][row, 1 : len(ends)], items)


def test_unpacked_cache_of_the_official_code(packed_by_the_official_code):
  expected, _, packed = packed_by_the_official_code
  kv, longest = jnp.asarray(expected["packed_kv"]), int(expected["lengths"].max()) - 1
  ids = jnp.asarray(packed.positions), jnp.asarray(packed.segment_ids)
  cache = KVCache(list(kv[:, 0]), list(kv[:, 1]), *ids, jnp.int32(kv.shape[4]))
  unpacked = unpack_left_padded(cache, packed, longest, longest + 1)
  found = np.stack([unpacked.keys, unpacked.values], axis=1)
  np.testing.assert_array_equal(found[..., :-1, :], expected["unpacked_kv"])
  # The token that is held back comes into the last slot.
  mask = unpacked.segment_ids.at[:, longest].set(1)
  np.testing.assert_array_equal(mask, expected["decode_mask"])
  assert unpacked.length == longest


def test_dense_mask_and_segment_kernel_agree(monkeypatch):
  """Masked attention of a model that knows of one segment, and the kernel in the interpreter."""
  monkeypatch.setattr(mosaic_tpu, "_BLOCK", 128)  # Several blocks of few tokens.
  rng = np.random.default_rng(0)
  lengths = [90, 30, 20, 131, 3, 100]
  given = [rng.integers(0, 9, length).tolist() for length in lengths]
  # Two blocks, which meet in the first row and not in the second; padding at the end of the first.
  packed = pack(given, [[0, 1, 2, 4], [3, 5]])
  rows, slots = packed.tokens.shape
  query, key, value = (
    jnp.asarray(rng.normal(size=(rows, heads, slots, 8)), jnp.float32) for heads in (2, 1, 1)
  )
  positions, segment_ids = jnp.asarray(packed.positions), jnp.asarray(packed.segment_ids)
  mask = independent_mask(segment_ids, positions)[:, None]
  dense = attention(query, key, value, causal=False, mask=mask, implementation="xla")
  ids = {"positions": positions, "segment_ids": segment_ids}
  by_segments = attention(query, key, value, **ids, implementation="xla")
  with pltpu.force_tpu_interpret_mode():
    kernel = attention(query, key, value, **ids, implementation="mosaic_tpu")
  # Rows of padding attend to nothing and are zero everywhere.
  for found in (by_segments, kernel):
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, dense, rtol=2e-5, atol=2e-5)
  assert not np.asarray(dense)[
    np.broadcast_to((packed.segment_ids == 0)[:, None], (2, 2, slots))
  ].any()


def test_keys_and_values_are_those_of_each_prompt_alone(model, some_prompts, packed):
  """Packed and unpacked, by segment ids and by the dense mask."""
  longest, room = max(LENGTHS) - 1, 32
  alone = pad_to_buckets(pack(some_prompts, [[i] for i in range(len(LENGTHS))]))
  read = nnx.jit(read_packed)
  expected = read(model, alone)
  both = read(model, packed), nnx.jit(read_packed_densely)(model, packed)
  for cache in both:
    unpacked = unpack_left_padded(cache, packed, longest, room)
    for row, length in enumerate(packed.lengths):
      real = slice(longest - length, longest)
      np.testing.assert_array_equal(unpacked.positions[row, real], np.arange(length))
      assert unpacked.segment_ids[row].sum() == length
      for a, b in zip(unpacked.keys + unpacked.values, expected.keys + expected.values):
        np.testing.assert_allclose(a[row, :, real], b[row, :, :length], atol=1e-5)


def test_decoding_goes_on_from_the_left_padded_cache(model, some_prompts, packed):
  new_tokens = 4
  expected = generate(model, some_prompts, max_new_tokens=new_tokens)
  cache = nnx.jit(read_packed_densely)(model, packed)
  cache = unpack_left_padded(cache, packed, max(LENGTHS) - 1, 32)
  progress, token = Progress(cache, jnp.asarray(packed.lengths)), jnp.asarray(packed.last_tokens)
  found, advance = [], nnx.jit(step)
  for _ in range(new_tokens):
    logits, progress = advance(model, progress, token)
    found.append(token := jnp.argmax(logits, axis=-1))
  np.testing.assert_array_equal(np.stack(found, axis=1), expected)


def test_ways_of_batching(some_prompts):
  full = batching.full_batching(some_prompts, 4)
  assert [batch.lengths for batch in full] == [[9, 1, 5, 12], [5, 2]]
  ordered = batching.length_ordered(some_prompts, 4)
  assert [batch.lengths for batch in ordered] == [[1, 2, 5, 5], [9, 12]]
  packed = batching.prepacked(some_prompts, 4)
  assert [batch.bins for batch in packed] == [[[3], [0, 1], [2]], [[0], [1]]]
  # Dataset prepacking: every prompt once, the bins of the whole data set two at a time.
  many = [[i] * n for i, n in enumerate(np.random.default_rng(0).integers(1, 20, 60).tolist())]
  batches = batching.dataset_prepacked(many, 2, seed=0)
  assert sorted(p for batch in batches for p in batch.prompts) == sorted(many)
  whole = batching.pack_batch(many)
  rows = [[batch.prompts[i] for i in items] for batch in batches for items in batch.bins]
  assert sorted(rows) == sorted([many[i] for i in items] for items in whole.bins)
  assert all(len(batch.bins) <= 2 for batch in batches)
  assert rows != [[many[i] for i in items] for items in whole.bins]


def test_equal_lengths_are_the_input_without_last_tokens():
  equal = np.arange(24).reshape(4, 6).tolist()
  batch = batching.pack_batch(equal)
  packed = pack(batch.prompts, batch.bins)
  np.testing.assert_array_equal(packed.tokens, np.array(equal)[:, :-1])
  assert accounting.slots(batch).total == accounting.slots(batching.Batch(equal)).total == 24


def test_counts_by_hand():
  """Prompts of 4 and 2 tokens, of a model of one layer."""
  size = ARCHITECTURES["qwen2, grouped-query"]  # Width 32, 4 / 2 heads of 8, MLP 64, 2 layers.
  prompts = [[1] * 4, [2] * 2]
  padded, packed = batching.Batch(prompts), batching.pack_batch(prompts)
  assert packed.bins == [[0], [1]]
  one_row = batching.Batch(prompts, [[0, 1]])
  linear = 32 * (32 + 2 * 16 + 32) + 3 * 32 * 64
  head = 2 * 2 * 32 * 64
  # Padded: 2 rows of 3; one row: 3 + 1 tokens. Then 2 last ones against 4 keys each.
  expected = {"padded": (6 + 2, 18 + 8), "one row": (4 + 2, 16 + 8)}
  for name, batch in (("padded", padded), ("one row", one_row)):
    total, pairs = expected[name]
    found = accounting.slots(batch)
    assert (found.total, found.tokens, found.waste) == (total, 6, total - 6)
    assert accounting.attention_pairs(batch)["dense"] == pairs
    assert accounting.attention_pairs(batch)["needed"] == 10 + 3
    assert accounting.flops(batch, size) == 2 * (2 * linear * total + 4 * 32 * pairs) + head
  assert accounting.kv_slots(one_row) == (4, 4 + 2 * 3) and accounting.kv_slots(padded) == (6, 6)
  assert accounting.kv_bytes_per_slot(size, 4) == 2 * 2 * 2 * 8 * 4
  # The kernel's blocks of 128: 299 tokens in 3 blocks, of which causally 6 of 9 pairs meet.
  long = batching.Batch([[1] * 300])
  assert accounting.attention_pairs(long)["kernel"] == 6 * 128**2 + 300
  # Two segments of 128 meet only themselves.
  two = batching.Batch([[1] * 129, [1] * 129], [[0, 1]])
  assert accounting.attention_pairs(two)["kernel"] == 2 * 128**2 + 2 * 129
  assert accounting.largest_batch([[1]] * 9, 20, lambda some: 3 * len(some)) == 6


def test_bad_input():
  config = config_module.get_config("tiny")
  for name, value, message in (
    ("clips", (64, 32), "one for each of sources"),
    ("batch_sizes", (64,), "from 1 to prompts=16"),
    ("sweep_long", (0, 2, 9), "from 0 to sweep_batch=8"),
    ("seeds", (), "at least one"),
    ("repeats", 0, "a positive number"),
    ("prompts", 31, "31"),
  ):
    changed = config.copy_and_resolve_references()
    changed[name] = value
    if name == "prompts":
      with pytest.raises(UserError, match="has 30 prompts, expected 31"):
        few = [[1]] * 30
        experiment.check_sizes(changed, ARCHITECTURES["llama"], [few], few)
      continue
    with pytest.raises(UserError, match=message):
      experiment.run(changed, pathlib.Path())
  many = [[1]] * 64
  with pytest.raises(UserError, match="the model has 32: lower --config.clips"):
    experiment.check_sizes(config, ARCHITECTURES["llama"], [many], many)
  with pytest.raises(UserError, match="has 3 prompts, expected 4"):
    prompts.draw([[1]] * 3, 4, 0)


def test_tiny_run(tmp_path):
  report = experiment.run(config_module.get_config("tiny"), tmp_path)
  held = {claim.statement.partition(" (")[0]: claim.holds for claim in report.claims}
  # What does not depend on the data or on the clock.
  assert held["first logits are those of each prompt alone"]
  assert held["greedy tokens are those of each prompt alone"]
  assert held["equal lengths: slots, full-batching / prepacking, is at least"]
  assert held["equal lengths: slots, full-batching / prepacking, is at most"]
  assert len(report.claims) == 13
  # Prepacked by segment ids and by the dense mask, and padded; float32 sums in another order.
  assert all(row[1] < 1e-4 for row in report.tables[0].rows)
  assert all((tmp_path / figure.path).stat().st_size > 1000 for figure in report.figures)


def test_paper_steps_are_abstract_and_placed():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
  steps = compile_steps(config_module.get_config("paper"), tpu_slice("v5e:2x2").devices)
  names = ["packed prefill, 16 x 512", "unpack", "padded prefill, 64 x 512", "decode, 64 x 1"]
  assert all(step.name.startswith(name) for step, name in zip(steps, names, strict=True))
  for step_ in steps:
    leaves = jax.tree.leaves(step_.arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None for x in leaves)
