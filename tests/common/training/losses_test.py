import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.training.losses import linear_next_token_loss, next_token_loss


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


@pytest.mark.parametrize("chunk_length", [1, 3, 8, 100])
def test_without_logits_it_is_the_same_loss(packed, chunk_length):
  _, tokens, segment_ids = packed
  rng = np.random.default_rng(1)
  x = rng.normal(size=(3, 8, 5)).astype(np.float32)
  kernel = rng.normal(size=(5, 11)).astype(np.float32)

  def of_logits(x, kernel):
    loss, count = next_token_loss(x @ kernel, tokens, segment_ids)
    return 3 * loss, count

  def without(x, kernel):
    loss, count = linear_next_token_loss(x, kernel, tokens, segment_ids, chunk_length=chunk_length)
    return 3 * loss, count

  results = [jax.value_and_grad(f, (0, 1), has_aux=True)(x, kernel) for f in (of_logits, without)]
  # Sums in another order: some units of float32's last place.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


def test_without_logits_bfloat16_keeps_its_types():
  x, kernel = jnp.ones((2, 4, 3), jnp.bfloat16), jnp.ones((3, 7), jnp.bfloat16)
  ids = jnp.ones((2, 4), jnp.int32)
  f = lambda x, kernel: linear_next_token_loss(x, kernel, ids, ids)[0]
  loss, grads = jax.value_and_grad(f, (0, 1))(x, kernel)
  assert loss.dtype == jnp.float32 and [g.dtype for g in grads] == [jnp.bfloat16] * 2
  np.testing.assert_allclose(loss, 6 * np.log(7), rtol=1e-6)
