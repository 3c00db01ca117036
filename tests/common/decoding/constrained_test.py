"""Constrained generation against masks applied to the model's own logits, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from common.decoding import constrained
from common.decoding.constrained import (
  GrammarConstraint,
  choose,
  constrained_generate,
  decode,
  logit_bias,
  padded_weights,
  read_prompts,
)
from common.decoding.generation import Sampling
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary
from common.errors import UserError
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder, random_encoder_decoder

EOS, NEW = 0, 6
# 64 tokens: the end, 0 to 9, a few longer ones, and letters.
TOKENS = [b"", *(b"%d" % i for i in range(10)), b"12", b"+1", b"(1", b"1)", b"+", b"(", b")"]
TOKENS += [bytes([c]) for c in range(ord("A"), ord("A") + 64 - len(TOKENS))]
SUM = parse_ebnf('root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"')
SHORT = parse_ebnf('root ::= "(" [0-3] ")" | "12"')
PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def model():
  return random_decoder(ARCHITECTURES["llama"])


@pytest.fixture(scope="module")
def vocabulary():
  return Vocabulary(TOKENS, EOS)


@pytest.fixture(scope="module")
def masks(vocabulary):
  return [TokenMasks(SUM, vocabulary), TokenMasks(SHORT, vocabulary)]


def test_greedy_rows_are_the_best_allowed_tokens(model, masks):
  found = constrained_generate(model, PROMPTS, masks, max_new_tokens=NEW)
  assert found[1].complete
  for prompt, mask, row in zip(PROMPTS, masks, found):
    # One pass over the finished text.
    tokens = row.tokens + [EOS] * row.complete
    logits = np.asarray(model(jnp.array([prompt + tokens]))[0][0, len(prompt) - 1 : -1])
    total, state = 0.0, mask.start
    for token, scores in zip(tokens, logits):
      assert token == np.argmax(np.where(mask.mask(state), scores, -np.inf))
      total += float(jax.nn.log_softmax(scores)[token])
      state = state if token == EOS else mask.advance(state, token)
    # float32 through a cache and without one.
    np.testing.assert_allclose(row.log_p, total, rtol=1e-4)
    assert row.complete == (len(row.tokens) < NEW) and (not row.complete or mask.accepts(state))


def test_samples_are_of_the_masked_distribution(model, masks):
  """Chi-square of the short language's five texts, whose GCD probabilities are known."""
  rows, mask = 4000, masks[1]
  prompts = [PROMPTS[0]] * rows
  found = constrained_generate(
    model, prompts, mask, max_new_tokens=NEW, key=jax.random.key(0), sampling=Sampling(0.7)
  )
  assert all(row.complete for row in found)
  texts = sorted({tuple(row.tokens) for row in found})
  spelled = {mask.vocabulary.text(list(text)) for text in texts}
  assert spelled == {b"12", b"(0)", b"(1)", b"(2)", b"(3)"}
  longest = max(map(len, texts)) + 1
  padded = [[*PROMPTS[0], *text] + [EOS] * (longest - len(text)) for text in texts]
  logits = np.asarray(model(jnp.array(padded))[0], np.float64)[:, len(PROMPTS[0]) - 1 :] / 0.7
  expected = []
  for text, scores in zip(texts, logits):
    log_q, state = 0.0, mask.start
    for token, row in zip((*text, EOS), scores):
      masked = np.where(mask.mask(state), row, -np.inf)
      log_q += masked[token] - np.logaddexp.reduce(masked)
      state = state if token == EOS else mask.advance(state, token)
    expected.append(rows * np.exp(log_q))
  observed = [sum(tuple(row.tokens) == text for row in found) for text in texts]
  together = lambda counts: (
    [*(c for c, e in zip(counts, expected) if e >= 5)]
    + [sum(c for c, e in zip(counts, expected) if e < 5)]
  )
  observed, wanted = together(observed), together(expected)
  if wanted[-1] == 0:
    observed, wanted = observed[:-1], wanted[:-1]
  assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_texts_that_find_no_end(model, masks):
  """A row without room is cut off, and the beginning of a text; others are not concerned."""
  found = constrained_generate(model, PROMPTS, masks, max_new_tokens=2)
  for mask, row in zip(masks, found):
    assert not row.complete or len(row.tokens) < 2
    assert mask.read(row.tokens) is not None
  assert not found[1].complete or found[1].tokens == [11]


def test_weights_are_added_to_log_probabilities():
  logits = jax.random.normal(jax.random.key(0), (2, 20))
  mask = np.zeros((2, 20), bool)
  mask[0, [3, 4, 17]] = mask[1, [0, 19]] = True
  tokens = np.array([[3, 17, 0], [19, 0, 0]], np.int32)
  weights = np.array([[-np.inf, 1.5, 0], [-2.0, 0, 0]], np.float32)
  log_p = np.asarray(jax.nn.log_softmax(logits / 0.5))
  scores = np.where(mask, log_p, -np.inf)
  scores[0, 3], scores[0, 17], scores[1, 19] = -np.inf, scores[0, 17] + 1.5, scores[1, 19] - 2
  sampling, count = Sampling(0.5), 3000
  keys = jax.random.split(jax.random.key(1), count)
  draw = lambda key: choose(logits, np.packbits(mask, axis=1), tokens, weights, key, 0, sampling)
  chosen = jax.vmap(draw)(keys)
  np.testing.assert_allclose(chosen.log_p[0], log_p, rtol=1e-5)
  for row in range(2):
    share = np.bincount(np.asarray(chosen.token)[:, row], minlength=20) / count
    expected = np.asarray(jax.nn.softmax(scores[row]))
    # Four standard errors.
    assert (np.abs(share - expected) <= 4 * np.sqrt(expected / count)).all()
    assert (share[~mask[row]] == 0).all()


def test_a_logit_bias_is_what_its_bits_and_weights_say():
  rng, size = np.random.default_rng(0), 75
  allowed = rng.random((3, size)) < 0.5
  weights = [((), ()), ((3, 74, 3), (0.5, -np.inf, 2.0)), (list(range(20)), rng.normal(size=20))]
  expected = np.where(allowed, 0.0, -np.inf)
  for row, (tokens, values) in enumerate(weights):
    np.add.at(expected[row], list(tokens), values)
  padded = padded_weights(weights)
  assert padded[0].shape == padded[1].shape == (3, 64)
  found = logit_bias(np.packbits(allowed, axis=1), *padded, size)
  np.testing.assert_allclose(found, expected, rtol=1e-6)  # float64 rounded.


def test_any_of_several_stop_tokens_ends_a_text(model, masks):
  """Token 63 too: each row ends with whichever the model likes best where the text may end."""
  both = TokenMasks(SHORT, Vocabulary(TOKENS, (EOS, 63)))
  options = {"max_new_tokens": NEW, "key": jax.random.key(0), "sampling": Sampling(1.0)}
  found = constrained_generate(model, PROMPTS * 8, both, **options)
  for row in found:
    assert row.complete and both.accepts(both.read(row.tokens))
  state = both.read([11])
  assert np.flatnonzero(both.mask(state)).tolist() == [EOS, 63]
  assert np.flatnonzero(masks[1].mask(masks[1].read([11]))).tolist() == [EOS]


def test_prompts_are_read_once_for_many_samples(model, masks):
  prompts = read_prompts(model, PROMPTS, NEW)
  compiled = constrained._step._cache_size()
  draw = lambda: decode(
    model,
    prompts,
    [GrammarConstraint(m) for m in masks],
    key=jax.random.key(3),
    sampling=Sampling(1.0),
  )
  assert draw() == draw()
  assert constrained._step._cache_size() <= compiled + 1


def test_an_encoder_decoder(vocabulary, masks):
  model = random_encoder_decoder()
  (row,) = constrained_generate(model, [PROMPTS[0]], masks[1], max_new_tokens=NEW)
  assert row.complete and masks[1].accepts(masks[1].read(row.tokens))


def test_bad_input_is_a_user_error(model, masks, vocabulary):
  with pytest.raises(UserError, match="masks are over 70 tokens, the model has 64"):
    wide = TokenMasks(SUM, Vocabulary(TOKENS, EOS, 70))
    constrained_generate(model, PROMPTS, wide, max_new_tokens=2)
  with pytest.raises(UserError, match="1 constraints for 2 prompts"):
    constrained_generate(model, PROMPTS, masks[:1], max_new_tokens=2)
  with pytest.raises(UserError, match="at least one token"):
    constrained_generate(model, [[]], masks[0], max_new_tokens=2)
  damaged = random_decoder(ARCHITECTURES["llama"])
  kernel = damaged.lm_head.kernel
  kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(UserError, match="logits have NaN"):
    constrained_generate(damaged, PROMPTS, masks, max_new_tokens=2)
  with pytest.raises(ValueError, match="key"):
    constrained_generate(model, PROMPTS, masks, max_new_tokens=2, sampling=Sampling(1.0))
