"""Continuous batching: every request's text is the one that it gets alone, whatever else is there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.decoding import continuous
from common.decoding.bin_packing import best_fit_decreasing
from common.decoding.continuous import FIRST_SLOT, NewTexts, empty_slots
from common.decoding.generation import RowSampling, Sampling, adjust, adjust_rows, generate
from common.decoding.prepacking import PackedPrompts, pack
from common.decoding.prompt_tokens import PromptTokens, with_prompt_tokens
from common.decoding.prompt_tree import tree_tables
from common.decoding.pruned_cache import Compression, compress, observe, run_pruned
from common.decoding.speculative import constant
from projects.think.think import query_driven_scores
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

LENGTH, SLOTS, DRAFTS = 48, 4, 3
PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [4, 4], [3, 1, 4, 1, 5]]


@pytest.fixture(scope="module", params=("llama", "opt"))  # Rotary and learned positions.
def models(request):
  config = dataclasses.replace(ARCHITECTURES[request.param], vocab_size=64)
  small = dataclasses.replace(config, num_layers=1)
  return random_decoder(config), random_decoder(small, seed=1)


GREEDY = Sampling()


def rows(count, sampling=GREEDY):
  full = lambda value, dtype: jnp.full(count, value, dtype)
  return RowSampling(
    full(sampling.temperature, jnp.float32),
    full(sampling.top_k, jnp.int32),
    full(sampling.top_p, jnp.float32),
  )


def admit(slots, models, prompts, at, seeds=None, sampling=GREEDY, pruning=None):
  """Reads prompts and puts them into the slots `at`."""
  lengths = [len(prompt) for prompt in prompts]
  packed = pack(prompts, best_fit_decreasing(lengths, max(lengths)))
  fill = lambda x: jnp.pad(jnp.asarray(x), ((0, SLOTS - len(prompts)), (0, 0))[: np.ndim(x)])
  packed = PackedPrompts(*packed[:3], *map(fill, packed[3:]))
  texts = NewTexts(
    at=fill(at),
    last=fill([([0] + prompt)[-2:] for prompt in prompts]),
    keys=jax.vmap(jax.random.key)(fill(seeds or [0] * len(prompts))),
    sampling=rows(SLOTS, sampling),
  )
  draft = nnx.split(models[1]) if slots.pair.draft is not None else (None, None)
  return continuous.admit(
    *nnx.split(models[0]), *draft, slots, packed, texts, jnp.int32(len(prompts)), pruning
  )


def run(slots, models, wanted, active, with_draft):
  """Steps until every active row has `wanted` tokens."""
  target, draft = models
  texts = {row: [] for row in np.flatnonzero(active)}
  while any(len(text) < wanted for text in texts.values()):
    if with_draft:
      policy = constant(2)
      slots, new = continuous.speculate(
        *nnx.split(target),
        *nnx.split(draft),
        slots,
        jnp.array(active),
        None,
        # A row may be held to fewer drafts, or to none.
        jnp.arange(SLOTS),
        policy.state,
        policy.stop,
        DRAFTS,
        0,
      )
    else:
      slots, new = continuous.decode(*nnx.split(target), slots, jnp.array(active), None, 2, 0)
    for row, text in texts.items():
      text += np.asarray(new.tokens)[row, : new.counts[row]].tolist()
    assert not any(new.counts[row] for row in range(SLOTS) if row not in texts)
  return slots, {row: text[:wanted] for row, text in texts.items()}


@pytest.mark.parametrize("with_draft", (False, True))
def test_texts_do_not_depend_on_the_batch(models, with_draft):
  expected = generate(models[0], PROMPTS, max_new_tokens=16)
  slots = empty_slots(models[0], SLOTS, LENGTH, models[1] if with_draft else None)
  slots = admit(slots, models, PROMPTS[:3], [2, 0, 3])
  slots, texts = run(slots, models, 6, [True, False, True, True], with_draft)
  assert texts == {2: expected[0][:6], 0: expected[1][:6], 3: expected[2][:6]}
  # One row ends, two prompts come.
  slots = admit(slots, models, [PROMPTS[3], PROMPTS[4]], [1, 2])
  slots, texts = run(slots, models, 6, [False, True, True, False], with_draft)
  assert texts == {1: expected[3][:6], 2: expected[4][:6]}
  # The rows that waited go on where they were.
  found = slots.pair.last[0, 1], slots.pair.target.length[0] - FIRST_SLOT
  text = [*PROMPTS[1], *expected[1]]
  assert text[int(found[1])] == found[0]


def test_sampled_texts_depend_on_their_seed_alone(models):
  sampling = Sampling(temperature=1.0, top_k=20)
  alone = empty_slots(models[0], SLOTS, LENGTH)
  alone = admit(alone, models, [PROMPTS[0]], [1], [7], sampling)
  _, first = run(alone, models, 8, [False, True, False, False], False)
  together = empty_slots(models[0], SLOTS, LENGTH)
  together = admit(together, models, PROMPTS[:3], [3, 0, 1], [7, 8, 7], sampling)
  _, second = run(together, models, 8, [True, True, False, True], False)
  assert first[1] == second[3]
  assert first[1] != second[0] and first[1] != second[1]


def test_a_bias_forbids_tokens_and_scores_are_the_model_s(models):
  target, draft = models
  tokens = PROMPTS[2]
  expected = np.asarray(jax.nn.log_softmax(target(jnp.array([tokens]))[0][0, -1]))
  order = np.argsort(-expected)
  bias = np.zeros((SLOTS, 64), np.float32)
  bias[1, order[:2]] = -np.inf
  policy = constant(2)
  for with_draft in (False, True):
    slots = empty_slots(target, SLOTS, LENGTH, draft if with_draft else None)
    slots = admit(slots, models, [tokens], [1])
    active = jnp.arange(SLOTS) == 1
    if with_draft:
      limit = jnp.zeros(SLOTS, jnp.int32)
      args = (slots, active, bias, limit, policy.state, policy.stop, DRAFTS, 3)
      _, new = continuous.speculate(*nnx.split(target), *nnx.split(draft), *args)
    else:
      _, new = continuous.decode(*nnx.split(target), slots, active, bias, 1, 3)
    assert new.counts.tolist() == [0, 1, 0, 0]
    assert new.tokens[1, 0] == order[2]
    np.testing.assert_array_equal(new.top_tokens[1, 0], order[:3])
    # Two programs round differently.
    np.testing.assert_allclose(new.top_log_probs[1, 0], expected[order[:3]], atol=1e-4)
    np.testing.assert_allclose(new.log_probs[1, 0], expected[order[2]], atol=1e-4)
    np.testing.assert_allclose(new.all_log_probs[1], expected, atol=1e-4)


def test_every_row_has_its_own_sampling():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 40)) * 3, jnp.float32)
  each = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.5, top_k=5),
    Sampling(1.0, top_p=0.7),
    Sampling(2.0, top_k=7, top_p=0.5),
    Sampling(1.0, top_k=100),
  ]
  columns = ([s.temperature for s in each], [s.top_k for s in each], [s.top_p for s in each])
  found = adjust_rows(logits, RowSampling(*map(jnp.array, columns)))
  expected = jnp.stack([adjust(row, sampling) for row, sampling in zip(logits, each)])
  # XLA may divide by a constant temperature as by any other: up to rounding.
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_pruned_caches_give_the_text_of_generate_pruned(models):
  """Also with drafts: the target's greedy text is that of its own cache, whatever drafts it."""
  target, draft = models
  compression = Compression(query_driven_scores, ratio=0.9, recent=1, window=4)
  pruning = continuous.Pruning(compression, prompt_room=12, new_tokens=16)
  alone = generate_pruned_by_row(target, PROMPTS[:3], compression)
  # It is another text than that of the whole cache: the test would see the difference.
  assert alone != [row[:6] for row in generate(target, PROMPTS[:3], max_new_tokens=6)]
  for with_draft in (False, True):
    slots = empty_slots(target, SLOTS, LENGTH, draft if with_draft else None, pruning)
    slots = admit(slots, models, PROMPTS[:3], [2, 0, 3], pruning=pruning)
    slots, texts = run(slots, models, 6, [True, False, True, True], with_draft)
    assert [texts[row] for row in (2, 0, 3)] == alone


def generate_pruned_by_row(model, prompts, compression):
  """The cache of all but the last token is pruned; the last one is read then."""
  texts = []
  for prompt in prompts:
    tokens, segment_ids = np.zeros((2, 1, 12), np.int32)
    if len(prompt) > 1:
      tokens[0, 13 - len(prompt) :], segment_ids[0, 13 - len(prompt) :] = prompt[:-1], 1
    observed = observe(model, jnp.asarray(tokens), jnp.asarray(segment_ids))
    cache = compress(observed, jnp.asarray(segment_ids), compression, 16)
    text = [prompt[-1]]
    for i in range(6):
      position = jnp.array([[len(prompt) - 1 + i]])
      x, cache = run_pruned(model, jnp.array([text[-1:]]), position, cache)
      text.append(int(model.head(x)[0, 0].argmax()))
    texts.append(text[1:])
  return texts


@pytest.mark.parametrize("sampling", (GREEDY, Sampling(temperature=1.0, top_k=20)), ids=str)
def test_trees_give_the_text_of_single_steps(sampling):
  """Of a small vocabulary, in which random candidates are right now and then."""
  config = dataclasses.replace(ARCHITECTURES["qwen2, grouped-query"], vocab_size=12)
  model = random_decoder(config)
  rng = np.random.default_rng(0)
  width = config.hidden_size
  prompt_tokens = PromptTokens(
    jnp.asarray(rng.normal(size=(2, 1, width)), jnp.float32),
    jnp.zeros((2, 1)),
    jnp.zeros((2, width)),
  )
  trees = tree_tables(
    [{(): 2}] + [{(): 2} | {(r,): (r + k) % 3 for r in range(10)} for k in range(2)]
  )
  prompted = with_prompt_tokens(model, prompt_tokens)
  prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5]]
  slots = empty_slots(model, SLOTS, LENGTH)
  slots = admit(slots, (model, None), prompts, [2, 0, 3], [1, 2, 3], sampling)
  active = [True, False, True, True]
  slots, expected = run(slots, (model, None), 12, active, False)
  slots = empty_slots(model, SLOTS, LENGTH + trees.sources.shape[1], trees=trees)
  slots = admit(slots, (prompted, None), prompts, [2, 0, 3], [1, 2, 3], sampling)
  texts, accepted = {row: [] for row in expected}, 0
  limit = jnp.array([9, 9, 9, 0])  # The last row takes no candidates.
  while any(len(text) < 12 for text in texts.values()):
    slots, new = continuous.verify_trees(
      *nnx.split(prompted), slots, jnp.array(active), None, limit, trees, prompt_tokens, 0
    )
    accepted += np.asarray(new.accepted)
    for row, text in texts.items():
      text += np.asarray(new.tokens)[row, : new.counts[row]].tolist()
  assert {row: text[:12] for row, text in texts.items()} == expected
  assert accepted[[0, 2]].all() and not accepted[[1, 3]].any()
