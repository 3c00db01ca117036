import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.training.losses import next_token_loss


def _reference(logits, tokens, segment_ids):
  total, count = 0.0, 0
  for b in range(tokens.shape[0]):
    for t in range(tokens.shape[1] - 1):
      if segment_ids[b, t] != 0 and segment_ids[b, t] == segment_ids[b, t + 1]:
        x = logits[b, t].astype(np.float64)
        total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[tokens[b, t + 1]]
        count += 1
  return total, count


@pytest.fixture
def packed():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 8, 11)).astype(np.float32) * 4
  tokens = rng.integers(0, 11, (3, 8)).astype(np.int32)
  segment_ids = np.array(
    [[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 0, 0, 0], [1, 2, 3, 3, 0, 0, 0, 0]], np.int32
  )
  return logits, tokens, segment_ids


def test_equals_the_definition(packed):
  total, count = next_token_loss(*packed)
  expected_total, expected_count = _reference(*packed)
  assert count == expected_count == 5 + 4 + 1
  np.testing.assert_allclose(total, expected_total, rtol=1e-6)
  assert total.dtype == count.dtype == jnp.float32


def test_a_position_without_target_has_no_gradient(packed):
  logits, tokens, segment_ids = packed
  grads = jax.grad(lambda x: next_token_loss(x, tokens, segment_ids)[0])(logits)
  has_gradient = np.abs(grads).sum(-1) > 0
  is_target = np.zeros_like(segment_ids, bool)
  is_target[:, :-1] = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
  np.testing.assert_array_equal(has_gradient, is_target)


def test_huge_bfloat16_logits_stay_finite():
  logits = jnp.array([[[3e38, -3e38], [0, 0]]], jnp.bfloat16)
  total, count = next_token_loss(logits, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
  assert total == 0 and count == 1


def test_nothing_but_padding_is_zero_of_zero(packed):
  logits, tokens, segment_ids = packed
  assert next_token_loss(logits, tokens, np.zeros_like(segment_ids)) == (0, 0)
