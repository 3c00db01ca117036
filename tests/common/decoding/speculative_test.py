"""Speculative decoding: the target's own text and distribution, whatever drafts it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from common.decoding.generation import Sampling, adjust, generate
from common.decoding.speculative import (
  Policy,
  constant,
  speculative_generate,
  verification_widths,
  verify,
)
from common.errors import UserError
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [9]]


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module", params=("llama", "opt"))  # Rotary and learned positions.
def models(request):
  config = dataclasses.replace(ARCHITECTURES[request.param], vocab_size=64)
  small = dataclasses.replace(config, num_layers=1)
  return random_decoder(config), random_decoder(small, seed=1)


def test_greedy_text_is_the_target_s(models):
  target, draft = models
  expected = generate(target, PROMPTS, max_new_tokens=12)
  for length in (1, 3):  # Of one compilation: the length is the policy's state.
    found, counts = speculative_generate(
      target, draft, PROMPTS, max_new_tokens=12, policy=constant(length), max_drafts=4
    )
    assert found == expected
    np.testing.assert_array_equal(counts.drafted, length * counts.target_calls)
    assert (counts.accepted <= counts.drafted).all()
    # Every call gives the accepted drafts and a token more.
    assert (counts.accepted + counts.target_calls >= 12).all()


def test_a_perfect_draft_is_always_accepted(models):
  target, _ = models
  found, counts = speculative_generate(
    target, target, PROMPTS, max_new_tokens=12, policy=constant(3), max_drafts=3
  )
  assert found == generate(target, PROMPTS, max_new_tokens=12)
  # Three rounds of four tokens: after an accepted round the draft's cache is complete again.
  np.testing.assert_array_equal(counts.target_calls, 3)
  np.testing.assert_array_equal(counts.accepted, counts.drafted)


def test_rows_stop_at_their_stop_token(models):
  target, draft = models
  expected = generate(target, PROMPTS, max_new_tokens=12)
  stop = expected[0][5]
  found, _ = speculative_generate(
    target,
    draft,
    PROMPTS,
    max_new_tokens=12,
    policy=constant(3),
    max_drafts=3,
    stop_tokens=stop,
  )
  assert found == generate(target, PROMPTS, max_new_tokens=12, stop_tokens=stop)


def _alternate(state, draft):
  """Rows of even and odd tokens stop after one and after all drafts."""
  return state, draft.token % 2 == 0


def test_rows_may_draft_differently(models):
  target, draft = models
  found, counts = speculative_generate(
    target, draft, PROMPTS, max_new_tokens=12, policy=Policy(_alternate), max_drafts=5
  )
  assert found == generate(target, PROMPTS, max_new_tokens=12)
  assert len(set((counts.drafted / counts.target_calls).tolist())) > 1


def test_widths_of_the_target_s_pass():
  assert verification_widths(20) == [1, 2, 3, 6, 11, 21]
  assert [verification_widths(n) for n in (1, 4)] == [[1, 2], [1, 2, 3, 5]]


def test_sampled_text_has_the_target_s_distribution():
  """Chi-square of the first two new tokens against their exact joint distribution."""
  config = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=5)
  target = random_decoder(config)
  draft = random_decoder(dataclasses.replace(config, num_layers=1), seed=1)
  sampling, prompt, rows = Sampling(temperature=0.7, top_k=4), [1, 2, 3], 4000
  found, counts = speculative_generate(
    target,
    draft,
    [prompt] * rows,
    max_new_tokens=2,
    policy=constant(2),
    max_drafts=2,
    key=jax.random.key(0),
    sampling=sampling,
  )
  # Both ends are there: drafts that are accepted and drafts that are not.
  assert 0.2 < counts.accepted.sum() / counts.drafted.sum() < 0.95
  continued = jnp.array([[*prompt, token] for token in range(5)])
  logits = target(continued)[0]
  first = jax.nn.softmax(adjust(logits[0, 2], sampling))
  second = jax.nn.softmax(adjust(logits[:, 3], sampling))
  expected = np.asarray(first[:, None] * second).reshape(-1)
  observed = np.bincount([5 * a + b for a, b in found], minlength=25)
  assert observed[expected == 0].sum() == 0
  p = stats.chisquare(observed[expected > 0], rows * expected[expected > 0], sum_check=False).pvalue
  assert p > 1e-3


def test_verification_on_tables():
  keys = jax.random.split(jax.random.key(0), 3)
  batch, count, vocab = 20_000, 2, 5
  q, p = normal(0, 1, count, vocab), normal(1, 1, count + 1, vocab)
  wide = lambda logits: jnp.broadcast_to(logits, (batch, *logits.shape[1:]))
  drafts = jax.random.categorical(keys[0], wide(q)).astype(jnp.int32)
  lengths = jnp.full(batch, count)
  number, token = verify(drafts, wide(q), wide(p), lengths, keys[1])
  # P(first accepted) = 1 - TV(p, q), within four standard errors.
  p1, q1 = jax.nn.softmax(p[0, 0]), jax.nn.softmax(q[0, 0])
  overlap = float(jnp.minimum(p1, q1).sum())
  error = 4 * (overlap * (1 - overlap) / batch) ** 0.5
  np.testing.assert_allclose(jnp.mean(number > 0), overlap, atol=error)
  first = jnp.where(number > 0, drafts[:, 0], token)
  observed = np.bincount(first, minlength=vocab)
  assert (
    stats.chisquare(observed, batch * np.asarray(p1, np.float64), sum_check=False).pvalue > 1e-3
  )
  # Unused drafts are not looked at.
  number, token = verify(drafts, wide(q), wide(p), jnp.zeros(batch, jnp.int32), keys[2])
  assert (number == 0).all()
  observed = np.bincount(token, minlength=vocab)
  assert (
    stats.chisquare(observed, batch * np.asarray(p1, np.float64), sum_check=False).pvalue > 1e-3
  )
  # Disjoint supports: always rejected; equal ones: always accepted.
  low = jnp.where(jnp.arange(vocab) < 2, 0.0, -jnp.inf)
  high = jnp.where(jnp.arange(vocab) < 2, -jnp.inf, 0.0)
  of = lambda row, n: jnp.broadcast_to(row, (64, n, vocab))
  few = jnp.zeros((64, count), jnp.int32)
  number, token = verify(few, of(low, count), of(high, count + 1), lengths[:64], keys[0])
  assert (number == 0).all() and (token >= 2).all()
  number, _ = verify(few, of(low, count), of(low, count + 1), lengths[:64], keys[0])
  assert (number == count).all()


def test_unsuitable_arguments_are_refused(models):
  target, draft = models
  other = random_decoder(dataclasses.replace(target.config, vocab_size=32))
  run = lambda draft, **options: speculative_generate(
    target, draft, PROMPTS, policy=constant(2), **({"max_new_tokens": 4, "max_drafts": 2} | options)
  )
  with pytest.raises(UserError, match="32 tokens, the target 64; .* one vocabulary"):
    run(other)
  with pytest.raises(UserError, match="max_drafts=0 must be positive"):
    run(draft, max_drafts=0)
  with pytest.raises(ValueError, match="needs a key"):
    run(draft, sampling=Sampling(1.0))
