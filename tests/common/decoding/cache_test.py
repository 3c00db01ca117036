"""Operations on a KV cache against passes without one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.decoding.cache import keep_slots, roll_back, take_rows, unpack
from common.models.decoder import KVCache
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder, random_tokens

# float32 sums in another order.
TOLERANCE = {"atol": 2e-5}

run = nnx.jit(lambda model, tokens, options: model(tokens, **options))


@pytest.fixture(scope="module", params=("llama", "qwen2, grouped-query", "bloom"))
def model(request):
  return random_decoder(ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def tokens(model):
  return jnp.asarray(random_tokens(model.config, 2)[:, :9])


def read(model, tokens, room=16, **options):
  cache = KVCache.empty(model.config, len(tokens), room)
  return run(model, tokens, {"cache": cache} | options)


def whole_logits(model, row):
  """Without a cache, [seq, vocab]. One padded shape for all: what follows the end is not seen."""
  row = jnp.asarray(row)
  return run(model, jnp.pad(row, (0, 16 - len(row)))[None], {})[0][0, : len(row)]


def test_rows_go_on_from_where_each_was_rolled_back(model, tokens):
  _, cache = read(model, tokens)
  length = jnp.array([5, 7])
  logits, cache = run(model, tokens[:, :2], {"cache": roll_back(cache, length)})
  np.testing.assert_array_equal(cache.length, length + 2)
  for row, kept in enumerate((5, 7)):
    whole = jnp.concatenate([tokens[row, :kept], tokens[row, :2]])
    np.testing.assert_allclose(logits[row], whole_logits(model, whole)[kept:], **TOLERANCE)


def test_rows_are_reordered(model, tokens):
  _, cache = read(model, tokens)
  rows = jnp.array([1, 1, 0])
  new = jnp.array([[3], [4], [5]])
  logits, _ = run(model, new, {"cache": take_rows(cache, rows)})
  whole = jnp.concatenate([tokens[rows], new], axis=1)
  for found, row in zip(logits, whole):
    np.testing.assert_allclose(found[0], whole_logits(model, row)[-1], **TOLERANCE)


def test_a_tree_of_drafts_is_as_its_paths_one_by_one(model, tokens):
  """Root 0 has the children 1 and 2; 3 follows 1, 4 follows 2."""
  parents, depth = [None, 0, 0, 1, 2], jnp.array([0, 1, 1, 2, 2])
  drafts = jnp.array([[3, 4, 5, 6, 7], [7, 6, 5, 4, 3]])
  ancestors = np.eye(5, dtype=bool)
  for node, parent in enumerate(parents):
    if parent is not None:
      ancestors[node] |= ancestors[parent]
  _, cache = read(model, tokens)
  length = jnp.array([9, 6])
  cache = roll_back(cache, length)
  options = {"positions": length[:, None] + depth, "cache": cache}
  logits, tree = run(model, drafts, options | {"mask": jnp.asarray(ancestors)[None]})
  paths = ([0, 1, 3], [0, 2, 4])
  whole = lambda row, path: jnp.concatenate([tokens[row, : length[row]], drafts[row, path]])
  for path in map(jnp.array, paths):
    for row in (0, 1):
      expected = whole_logits(model, whole(row, path))[length[row] :]
      np.testing.assert_allclose(logits[row, path], expected, **TOLERANCE)
  # The second path stays, of the second row its first two nodes.
  slots, count = length[:, None] + jnp.array(paths[1]), jnp.array([3, 2])
  kept = keep_slots(tree, length, slots, count)
  logits, _ = run(model, jnp.array([[8], [8]]), {"cache": kept})
  for row in (0, 1):
    path = jnp.array(paths[1][: int(count[row])])
    expected = whole_logits(model, jnp.append(whole(row, path), 8))[-1]
    np.testing.assert_allclose(logits[row, 0], expected, **TOLERANCE)


def test_packed_prompts_are_unpacked(model):
  prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2]]
  rows, segments = jnp.array([0, 0, 1, 1]), jnp.array([1, 2, 1, 2])
  packed = jnp.array([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 2, 0]])
  segment_ids = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 0]])
  positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]])
  _, cache = read(model, packed, room=6, positions=positions, segment_ids=segment_ids)
  lengths = jnp.array([len(p) for p in prompts])
  cache = unpack(cache, rows, segments, lengths, max_length=8)
  logits, _ = run(model, jnp.full((4, 1), 3), {"cache": cache})
  for row, prompt in enumerate(prompts):
    expected = whole_logits(model, [*prompt, 3])[-1]
    np.testing.assert_allclose(logits[row, 0], expected, **TOLERANCE)


def test_a_common_length_becomes_one_of_each_row(model, tokens):
  _, cache = read(model, tokens)
  assert cache.length.ndim == 0
  apart = dataclasses.replace(cache, length=jnp.full(2, 9))
  one, _ = run(model, tokens[:, :1], {"cache": cache})
  other, _ = run(model, tokens[:, :1], {"cache": apart})
  np.testing.assert_allclose(one, other, **TOLERANCE)
