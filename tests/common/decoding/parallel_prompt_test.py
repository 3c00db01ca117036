"""Parallel prompt decoding: the model's own greedy text for any tree and any prompt tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.decoding.generation import Sampling, generate
from common.decoding.parallel_prompt import (
  Acceptance,
  next_root,
  parallel_prompt_generate,
  tree_generate,
  typical_threshold,
  verify_tree,
)
from common.decoding.prompt_tokens import (
  PromptTokens,
  check_prompt_tokens,
  prompt_logits,
  with_prompt_tokens,
)
from common.decoding.prompt_tree import chain_mask, load_prompts, save_prompts, tree_tables
from common.errors import UserError
from common.models.decoder import Decoder, KVCache
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [9]]
# Wide enough that random guesses are right now and then; nodes lead to all states.
TREES = [
  {(): 2},
  {(): 2} | {(r,): r % 3 for r in range(10)},
  {(): 2} | {(r,): (r + 1) % 3 for r in range(10)} | {(0, r): r % 3 for r in range(10)},
]
# Twelve tokens: chance alone accepts most roots' children.
SMALL = {"vocab_size": 12, "max_position_embeddings": 64}


def random_prompts(model, distances=2, ensemble=1, seed=0):
  rng = np.random.default_rng(seed)
  width = model.config.hidden_size
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return PromptTokens(
    normal(distances, ensemble, width), normal(distances, ensemble), normal(distances, width)
  )


def small_decoder(name):
  return random_decoder(dataclasses.replace(ARCHITECTURES[name], **SMALL))


@pytest.fixture(scope="module")
def model():
  """Rotary positions and a tied head, which must not see the prompt tokens."""
  return small_decoder("qwen2, grouped-query")


@pytest.mark.parametrize("name", ("qwen2, grouped-query", "opt"))  # Rotary and learned positions.
def test_greedy_text_is_the_model_s(name):
  model = small_decoder(name)
  expected = generate(model, PROMPTS, max_new_tokens=15)
  tables, states = tree_tables(TREES), np.zeros(3, int)
  for seed in (0, 1, 2):
    found, counts = parallel_prompt_generate(
      model, random_prompts(model, seed=seed), tables, PROMPTS, max_new_tokens=15
    )
    assert found == expected
    assert counts.accepted[:, 1:].sum() > 0
    states += np.asarray(counts.states.sum(0))
    np.testing.assert_array_equal(counts.states.sum(-1), counts.passes)
    # The first token comes from the pass of the prompt.
    emitted = 1 + (counts.accepted * jnp.arange(1, 4)).sum(-1)
    assert ((emitted >= 15) & (emitted < 15 + 3)).all()
  assert (states > 0).all()
  if name == "opt":
    return
  stop = expected[0][6]
  found, _ = parallel_prompt_generate(
    model, random_prompts(model), tables, PROMPTS, max_new_tokens=15, stop_tokens=stop
  )
  assert found == generate(model, PROMPTS, max_new_tokens=15, stop_tokens=stop)


def test_ensembles_of_one_vector_are_one_prompt_token(model):
  one = random_prompts(model)
  three = PromptTokens(
    jnp.repeat(one.embeddings, 3, axis=1),
    jnp.zeros((2, 3)),
    jnp.zeros((2, model.config.hidden_size)),
  )
  run = lambda prompts, tables: parallel_prompt_generate(
    model, prompts, tables, PROMPTS, max_new_tokens=12
  )
  found, counts = run(three, tree_tables(TREES, ensemble=3))
  expected, one_counts = run(one, tree_tables(TREES))
  assert found == expected
  np.testing.assert_array_equal(counts.accepted, one_counts.accepted)


def _constant(model, token, text_hidden, prompt_hidden):
  """Guesses one token at every distance."""
  del prompt_hidden
  likes = jax.nn.one_hot(jnp.full(2, token), model.config.vocab_size)
  return jnp.broadcast_to(likes, (len(text_hidden), *likes.shape))


def test_perfect_guesses_give_a_whole_path_in_every_pass(model):
  silent = nnx.clone(model)
  # All logits are equal: the greedy text is token 0 for ever.
  silent.final_norm.scale[...] = jnp.zeros_like(silent.final_norm.scale[...])
  trees = tree_tables([{(): 0}, {(): 0, (0,): 0}, {(): 0, (0,): 0, (0, 0): 0}], ensemble=0)
  always = trees._replace(available=jnp.full_like(trees.available, 2))
  for token, rounds in ((0, [0, 0, 4]), (1, [12, 0, 0])):
    found, counts = tree_generate(
      silent, always, PROMPTS, parameters=jnp.int32(token), propose=_constant, max_new_tokens=13
    )
    assert found == [[0] * 13] * 3
    np.testing.assert_array_equal(counts.accepted, [rounds] * 3)
    assert counts.acceptance_length == (1 if token else 3)
    np.testing.assert_array_equal(counts.acceptance_rates, [1 - token] * 2)


@jax.jit
def _logits(model, tokens, length):
  """Of a row, the tokens from `length` on being padding."""
  segments = (jnp.arange(len(tokens)) < length).astype(jnp.int32)
  return nnx.merge(*model)(tokens[None], segment_ids=segments[None])[0][0]


def test_text_does_not_see_prompts_and_a_path_is_sequential_text(model):
  """The tree pass against plain passes: logits of the root, of a path, of the prompts behind it."""
  prompts = random_prompts(model)
  prompted = with_prompt_tokens(model, prompts)
  vocab = model.config.vocab_size
  text = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
  trees = tree_tables([{(): 2}, {(): 2, (0,): 2}, {(): 2, (0,): 1, (1,): 2, (0, 1): 2}])
  tree = jax.tree.map(lambda x: x[2], trees._replace(chain=None))
  candidates = jnp.array([7, 8, *range(8), 10, 11, *range(8)])
  ids = jnp.concatenate([text[0, -1:], candidates, vocab + jnp.arange(2)])
  cache = KVCache.empty(model.config, 1, 32)
  _, cache = nnx.jit(Decoder.__call__)(prompted, text[:, :-1], cache=cache)
  found, _ = nnx.jit(Decoder.__call__)(
    prompted,
    ids[tree.sources][None],
    positions=7 + tree.depths[None],
    cache=cache,
    mask=tree.mask[None],
  )
  node = {(): 0, (0,): 1, (1,): 2, (0, 1): 3}
  for path, tokens in (((), []), ((0,), [7]), ((1,), [8]), ((0, 1), [7, 11])):
    # The path and the chain behind it, one after the other.
    count = {(0,): 1}.get(path, 2)
    sequence = jnp.concatenate([text[0], jnp.array(tokens, jnp.int32), vocab + jnp.arange(count)])
    last = len(sequence) - count - 1
    padded = jnp.zeros(12, jnp.int32).at[: len(sequence)].set(sequence)
    run = jax.tree_util.Partial(_logits, nnx.split(prompted), padded)
    expected = run(len(sequence))
    # float32 sums in another order.
    np.testing.assert_allclose(found[0, node[path]], expected[last], atol=1e-5)
    slots = tree.prompt_slots[node[path], :count, 0]
    np.testing.assert_allclose(found[0, slots], expected[last + 1 : len(sequence)], atol=1e-5)
    # Exactly what the text has without prompts behind it.
    np.testing.assert_array_equal(expected[: last + 1], run(last + 1)[: last + 1])


def test_masks_and_slots_of_the_tables():
  trees = tree_tables(TREES, ensemble=2, kind="decoder", size=80)
  assert trees.mask.shape == (3, 80, 80)
  for state, tree in enumerate(TREES):
    order = sorted(tree, key=lambda p: (len(p), p))
    for i, path in enumerate(order):
      seen = {order[j] for j in np.flatnonzero(trees.mask[state, i])}
      assert seen == {path[:n] for n in range(len(path) + 1)}
      assert trees.available[state, i] == tree[path]
      slots = np.asarray(trees.prompt_slots[state, i, : tree[path]]).reshape(-1)
      for place, slot in enumerate(slots):
        ancestors = {order.index(p) for p in seen}
        assert set(np.flatnonzero(trees.mask[state, slot])) == ancestors | {*slots[: place + 1]}
        assert trees.depths[state, slot] == len(path) + 1 + place // 2
        assert trees.sources[state, slot] == 21 + place
  np.testing.assert_array_equal(
    chain_mask(2, 2, "ensemble"), [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
  )
  np.testing.assert_array_equal(chain_mask(2, 2, "encoder"), np.kron(np.eye(2), np.ones((2, 2))))
  for wrong, message in (
    ([{(): 1}, {(): 1, (0, 0): 1}], "its prefix"),
    ([{(): 1}, {(): 1, (10,): 1}], "ranks below 10"),
    ([{(): 1}, {(): 2}], "expected 0 to 1"),
    ([{(): 1}, {(0,): 1}], "no root"),
  ):
    with pytest.raises(ValueError, match=message):
      tree_tables(wrong)
  with pytest.raises(ValueError, match="42 inputs"):
    tree_tables(TREES, size=8)


def test_typical_acceptance():
  p = jnp.array([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
  log_p = jnp.log(p)
  entropy = [0.8018, np.log(4), 0.0]
  found = typical_threshold(log_p, Acceptance(0.09, 0.3))
  np.testing.assert_allclose(found, np.minimum(0.09, 0.3 * np.exp(-np.array(entropy))), rtol=1e-4)
  # One tree: a root with children 1 and 2, of which 1 has the children 0 and 3.
  arguments = {
    "tokens": jnp.array([[0, 1, 2, 0, 3]]),
    "parents": jnp.array([[-1, 0, 0, 1, 1]]),
    "depths": jnp.array([[0, 1, 1, 2, 2]]),
    "ancestors": jnp.array(
      [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]], bool
    ),
  }
  verify = lambda log_p, epsilon, alpha: tuple(
    int(x[0]) for x in verify_tree(log_p=log_p, acceptance=Acceptance(epsilon, alpha), **arguments)
  )
  behind = jnp.stack([log_p[0], log_p[1], log_p[0], log_p[0], log_p[0]])[None]
  # Token 1 has 0.2 and 2 has 0.1 behind the root; 0 and 3 have 0.25 each: the first of equals.
  assert verify(behind, 0.09, 0.3) == (3, 2)
  # Behind token 1 neither child is possible: of 1 and 2 the likelier stays.
  sure = jnp.log(jnp.array([0.0, 1.0, 0.0, 0.0]))
  assert verify(behind.at[0, 1].set(sure), 0.09, 0.3) == (1, 1)
  assert verify(behind, 0.22, 1.0) == (0, 0)
  one_hot = jnp.where(jnp.arange(4) == jnp.array([2, 0, 0, 0, 0])[:, None], 0.0, -jnp.inf)[None]
  assert verify(one_hot, 0.09, 0.3) == (2, 1)
  # Roots are drawn from what would pass: 0.2 and 0.1 fail min(0.9, exp(-H)) = 0.4486.
  keys = jax.random.split(jax.random.key(0), 200)
  draw = lambda key, acceptance: next_root(key, log_p[:1], acceptance)[0]
  strict = jax.vmap(lambda key: draw(key, Acceptance(0.9, 1.0)))(keys)
  assert (strict == 0).all()
  loose = np.bincount(jax.vmap(lambda key: draw(key, Acceptance(0.09, 1.0)))(keys), minlength=4)
  # 200 draws of 0.7: four standard errors are 0.13.
  assert abs(loose[0] / 200 - 0.7) < 0.13 and loose[3] == 0


def test_sampling_runs_and_is_reproducible(model):
  run = lambda seed: parallel_prompt_generate(
    model,
    random_prompts(model),
    tree_tables(TREES),
    PROMPTS,
    max_new_tokens=12,
    sampling=Sampling(8.0),
    key=jax.random.key(seed),
  )
  (first, counts), (again, _), (other, _) = run(0), run(0), run(1)
  assert first == again != other
  assert counts.accepted[:, 1:].sum() > 0


def test_prompts_and_trees_survive_their_file(model, tmp_path):
  prompts, trees = random_prompts(model), tree_tables(TREES)
  save_prompts(tmp_path / "prompts.safetensors", prompts, trees)
  fields, read = load_prompts(tmp_path / "prompts.safetensors")
  for a, b in zip((*prompts, *trees), (*PromptTokens(**fields), *read), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
  bad = prompts._replace(bias=prompts.bias.at[0, 0].set(jnp.nan))
  save_prompts(tmp_path / "bad.safetensors", bad, trees)
  with pytest.raises(UserError, match="prompt_tokens.bias has NaN"):
    load_prompts(tmp_path / "bad.safetensors")
  save_prompts(tmp_path / "other.safetensors", random_prompts(model, 3), trees)
  with pytest.raises(UserError, match="do not belong together"):
    load_prompts(tmp_path / "other.safetensors")
  with pytest.raises(UserError, match="cannot read the prompt tokens"):
    load_prompts(tmp_path / "none.safetensors")


def test_unsuitable_arguments_are_refused(model):
  prompts, trees = random_prompts(model), tree_tables(TREES)
  run = lambda prompts=prompts, trees=trees, model=model, **options: parallel_prompt_generate(
    model, prompts, trees, PROMPTS, **({"max_new_tokens": 4} | options)
  )
  with pytest.raises(UserError, match="build the trees for these"):
    run(random_prompts(model, 2, 3))
  with pytest.raises(UserError, match="embeddings of the prompt tokens has NaN"):
    run(prompts._replace(embeddings=prompts.embeddings.at[0, 0, 0].set(jnp.nan)))
  with pytest.raises(UserError, match="have width 5, the model's embeddings 32"):
    check_prompt_tokens(model, prompts._replace(embeddings=jnp.zeros((2, 1, 5))))
  with pytest.raises(UserError, match="expected epsilon and alpha"):
    run(acceptance=Acceptance(0.09, 2.0))
  with pytest.raises(UserError, match="expected at least 10"):
    tiny = random_decoder(dataclasses.replace(model.config, vocab_size=5))
    run(model=tiny)
  with pytest.raises(ValueError, match="needs a key"):
    run(sampling=Sampling(1.0))
  assert prompt_logits(model, prompts, None, jnp.zeros((1, 2, 1, 32))).shape == (1, 2, 12)
