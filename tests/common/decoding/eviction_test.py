"""Tokens that SnapKV and H2O keep, against a loop over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.decoding.eviction import h2o_scores, keep_slots_of, snapkv_scores, take_slots

SEQ, WINDOW = 12, 4
query, keys = (jax.random.normal(jax.random.key(i), (2, 4 // (i + 1), SEQ, 8)) for i in (0, 1))
valid = jnp.arange(SEQ) >= jnp.array([[0], [7]])


def attention_sums(queries):
  """Per row and kv head, the attention that each earlier slot gets from the queries."""
  sums = np.zeros((2, 2, SEQ - WINDOW))
  for row, head, at in np.ndindex(2, 4, SEQ):
    if at in queries and valid[row, at]:
      scores = np.asarray(keys[row, head // 2] @ query[row, head, at]) / np.sqrt(8)
      weights = np.exp(scores) * np.asarray(valid[row]) * (np.arange(SEQ) <= at)
      sums[row, head // 2] += (weights / weights.sum())[: SEQ - WINDOW]
  return sums


def test_scores_are_sums_of_attention():
  in_window = range(SEQ - WINDOW, SEQ)
  snap = snapkv_scores(query, keys, valid, WINDOW, kernel=1)
  np.testing.assert_allclose(snap, attention_sums(in_window), atol=1e-5)
  h2o = h2o_scores(query, keys, valid, WINDOW)
  np.testing.assert_allclose(h2o, attention_sums(range(SEQ)), atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_scores_are_pooled_over_neighbours(pooling):
  plain = np.asarray(snapkv_scores(query, keys, valid, WINDOW, kernel=1))
  pooled = snapkv_scores(query, keys, valid, WINDOW, pooling=pooling, kernel=3)
  padded = np.pad(plain, ((0, 0), (0, 0), (1, 1)))  # No score is negative.
  three = np.stack([padded[..., i : i + SEQ - WINDOW] for i in range(3)])
  np.testing.assert_allclose(pooled, three.max(0) if pooling == "max" else three.mean(0), atol=1e-6)


def test_the_best_and_the_window_stay_in_order_behind_the_padding():
  scores = jax.random.uniform(jax.random.key(2), (2, 2, SEQ - WINDOW))
  slots = np.asarray(keep_slots_of(scores, valid, 7, WINDOW))
  assert (np.diff(slots, axis=-1) > 0).all()
  for head in range(2):
    best = np.argsort(-np.asarray(scores[0, head]))[:3]
    assert slots[0, head].tolist() == sorted(best.tolist()) + [8, 9, 10, 11]
  # The second row has 5 tokens: all of them stay, behind 2 slots of padding.
  assert (slots[1, :, 2:] == np.arange(7, 12)).all() and (slots[1, :, :2] < 7).all()
  np.testing.assert_array_equal(take_slots(keys, slots)[1, 1, 2:], keys[1, 1, 7:])
  with pytest.raises(ValueError, match="capacity=13"):
    keep_slots_of(scores, valid, 13, WINDOW)
