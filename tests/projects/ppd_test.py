"""Parallel prompt decoding: vectors of the official code, invariants, replay against the engine."""

import dataclasses
import importlib.util
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import cli
from common.decoding.generation import generate
from common.decoding.parallel_prompt import (
  Acceptance,
  parallel_prompt_generate,
  tree_generate,
  verify_tree,
)
from common.decoding.prompt_tree import RANKS, load_prompts, tree_tables
from common.errors import UserError
from projects.ppd import config as config_module
from projects.ppd import experiment
from projects.ppd.accuracy import continue_prompts, guess_ranks, rank_frequencies, replay
from projects.ppd.draft_decoding import draft_and_verify
from projects.ppd.medusa import initial_heads, medusa_logits
from projects.ppd.ppd import distillation_loss, hard_label_loss, random_truncation
from projects.ppd.prompt_lookup import lookup_acceptance_length
from projects.ppd.prompts import read_sharegpt
from projects.ppd.settings import check_config
from projects.ppd.sparse_tree import (
  best_size,
  candidate_tree,
  dynamic_trees,
  ghost_chain_value,
  head_trees,
  random_trees,
  room,
  search,
  static_trees,
  stationary_distribution,
  transitions,
)
from projects.ppd.training import Student
from tests.common.decoding.parallel_prompt_test import PROMPTS, SMALL, random_prompts
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ppd"


def golden(name):
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    return dict(arrays)


def paths_of(padded):
  return [tuple(r for r in row if r >= 0) for row in padded.tolist()]


@pytest.fixture(scope="module")
def accuracies():
  return golden("sparse_tree")["accuracies"]


def test_trees_of_the_official_code(accuracies):
  g = golden("sparse_tree")
  static = candidate_tree(accuracies, 3, 15)
  assert static.paths == paths_of(g["static_paths"])
  np.testing.assert_allclose(static.values, g["static_values"], atol=5e-6)  # Rounded there.
  found = dynamic_trees(accuracies, [0, 10, 9, 9], int(g["input_limit"]), monotone=False)
  for k in (1, 2, 3):
    paths = paths_of(g[f"state{k}_paths"])
    candidates = candidate_tree(accuracies, k, len(paths))
    assert candidates.paths == paths
    np.testing.assert_allclose(candidates.last_accepted, g[f"state{k}_last_accept_prob"], atol=5e-5)
    assert [found.trees[k][path] for path in paths] == g[f"state{k}_num_prompts"].tolist()
  es, vs = g["markov_es"], g["markov_vs"]
  np.testing.assert_allclose(ghost_chain_value(es[0], es[1:].T, vs), g["markov_value"], rtol=1e-9)


@pytest.mark.parametrize("state", [2, 3])
def test_buffers_of_the_official_code(state):
  g = {k[3:]: v for k, v in golden("tree_buffers").items() if k.startswith(f"s{state}")}
  tree = {(): 3} | dict(zip(paths_of(g["paths"]), g["num_prompts"].tolist()))
  tables = tree_tables([{(): 3}] * 3 + [tree])
  mask, depths = np.asarray(tables.mask[3]), np.asarray(tables.depths[3])
  order = sorted(tree, key=lambda path: (len(path), path))
  # Where the official code, which goes depth by depth, has each of our inputs.
  place = np.full(len(mask), -1)
  place[: len(order)] = g["normal_token_indices"]
  for node, path in enumerate(order):
    slots = tables.prompt_slots[3, node, : tree[path], 0]
    place[np.asarray(slots)] = g["special_token_indices"][node, : tree[path]]
  assert sorted(place) == list(range(22))
  np.testing.assert_array_equal(mask, g["attn_mask"][np.ix_(place, place)] == 1)
  np.testing.assert_array_equal(depths, g["position_ids"][place])
  sources = np.asarray(tables.sources[3])
  official = g["tree_indices"][place]
  # Prompt token i is -3 + i there.
  np.testing.assert_array_equal(
    np.where(official < 0, 1 + 3 * RANKS + 3 + official, official), sources
  )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_acceptance_of_the_official_code(temperature):
  g = golden("evaluate_posterior")
  rows, length = g["candidates"].shape
  logits = jnp.asarray(g["logits"])
  if temperature:
    log_p = jax.nn.log_softmax(logits / temperature)
  else:
    best = logits.argmax(-1, keepdims=True)
    log_p = jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
  # Each path is a row of its own: a chain.
  chain = jnp.arange(length)
  _, accepted = verify_tree(
    jnp.asarray(g["candidates"]),
    log_p,
    jnp.broadcast_to(chain - 1, (rows, length)),
    jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length)),
    jnp.broadcast_to(chain, (rows, length)),
    Acceptance(float(g["posterior_threshold"]), float(g["posterior_alpha"])),
  )
  name = "typical" if temperature else "greedy"
  assert int(accepted.max()) == g[f"{name}_len"]
  assert int(accepted[g[f"{name}_best"]]) == g[f"{name}_len"]


def test_candidate_trees_are_the_best_of_their_size():
  a = np.zeros((3, RANKS))
  a[:, :3] = np.sort(np.random.default_rng(0).dirichlet(np.ones(4), 3)[:, :3])[:, ::-1]
  nodes = [p for d in (1, 2) for p in itertools.product(range(3), repeat=d)]
  value = lambda path: np.prod([a[i, r] for i, r in enumerate(path)])
  for count in (2, 4, 5):
    closed = (
      tree
      for tree in itertools.combinations(nodes, count)
      if all(len(p) == 1 or p[:-1] in tree for p in tree)
    )
    best = max(sum(map(value, tree)) for tree in closed)
    np.testing.assert_allclose(candidate_tree(a, 2, count).expected, best, rtol=1e-12)
  tree = candidate_tree(a, 3, 9)
  depths = np.array(list(map(len, tree.paths)))
  q = tree.last_accepted
  assert (q > -1e-12).all() and q.sum() < 1
  np.testing.assert_allclose(q @ depths, tree.expected, rtol=1e-12)


def test_chain_and_size(accuracies):
  size = 24
  found = search(accuracies, size)
  q = [candidate_tree(accuracies, k, c).last_accepted for k, c in enumerate(found.counts)]
  prompts = [np.array(list(tree.values()))[1:].astype(int) for tree in found.trees]
  chain = transitions(q, prompts, 3)
  np.testing.assert_allclose(chain.sum(1), 1, rtol=1e-12)
  np.testing.assert_allclose(found.stationary.sum(), 1, rtol=1e-12)
  np.testing.assert_allclose(found.stationary @ chain, found.stationary, atol=1e-9)
  # 200,000 steps: standard errors are below 0.002, whatever the correlation of a few steps.
  rng = np.random.default_rng(0)
  draws, cumulative, state = rng.random(200_000), chain.cumsum(1), 3
  visits = np.zeros(4)
  for u in draws:
    state = min(int(np.searchsorted(cumulative[state], u)), 3)
    visits[state] += 1
  np.testing.assert_allclose(visits / len(draws), found.stationary, atol=0.008)
  # The ascent against all counts of a small limit; it may stop at a local optimum, not far off.
  small = room(12, 3)
  every = [
    dynamic_trees(accuracies, [0, *counts], small).tokens_per_pass
    for counts in itertools.product(range(1, small // 2 + 1), repeat=3)
  ]
  assert max(every) * 0.99 <= search(accuracies, 12).tokens_per_pass <= max(every) + 1e-9
  static = static_trees(accuracies, size)
  assert found.tokens_per_pass >= static.tokens_per_pass
  random = random_trees(accuracies, found, size, 0)
  for trees in (found, static, random):
    tree_tables(trees.trees, size=size)  # Fits.
  # Perfect guesses: m + 1 tokens in every pass; none: 1.
  sure = np.eye(1, RANKS).repeat(3, axis=0)
  assert search(sure, size).tokens_per_pass == pytest.approx(4)
  assert search(np.zeros((3, RANKS)), size).tokens_per_pass == pytest.approx(1)
  assert best_size([8, 16], lambda n: {8: 1.5, 16: 1.6}[n], [1.0, 1.2]) == 8
  np.testing.assert_allclose(stationary_distribution(np.array([[0.0, 1], [1, 0]]), 0), 0.5)


def test_losses():
  rng = np.random.default_rng(0)
  labels, logits = jnp.asarray(rng.normal(size=(2, 4, 3, 7)), jnp.float32)
  np.testing.assert_allclose(distillation_loss(labels, labels), 0, atol=1e-6)
  p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (labels, logits))
  kl = (p * np.log(p / q)).sum(-1)
  expected = (kl * [1, 0.8, 0.64]).sum(-1) / 3
  np.testing.assert_allclose(distillation_loss(labels, logits), expected, rtol=1e-5)
  tokens = labels.argmax(-1)
  nll = -np.log(np.take_along_axis(q, np.asarray(tokens)[..., None], -1)[..., 0])
  expected = (nll * [1, 0.8, 0.64]).sum(-1) / 3
  np.testing.assert_allclose(hard_label_loss(tokens, logits), expected, rtol=1e-5)


def test_truncation_leaves_labels():
  rng = np.random.default_rng(0)
  cuts = [random_truncation(rng, [(2, 9), (12, 20), (25, 27)], 3) for _ in range(200)]
  # The last answer is too short; of the one before, 4 tokens stay behind the cut.
  assert set(cuts) == set(range(12, 17))
  with pytest.raises(UserError, match="no answer of the text has 4 tokens"):
    random_truncation(rng, [(0, 3)], 3)


@pytest.fixture(scope="module")
def model():
  size = dataclasses.replace(ARCHITECTURES["qwen2, grouped-query"], **SMALL, num_layers=1)
  return random_decoder(size)


def test_replay_counts_what_the_engine_counts(model):
  """Prompt tokens and Medusa heads: text, accepted candidates and states, row by row."""
  m, measured = 2, 12
  students = {"prompts": Student(), "medusa": Student("medusa")}
  parameters = {"prompts": random_prompts(model), "medusa": initial_heads(model, m)}
  noise = jax.random.normal(jax.random.key(0), parameters["medusa"].biases.shape)
  parameters["medusa"] = parameters["medusa"]._replace(biases=noise)
  texts = continue_prompts(model, PROMPTS, measured + m, len(PROMPTS))
  ranks = guess_ranks(model, students, parameters, texts)
  accuracies = {name: rank_frequencies(x) for name, x in ranks.items()}
  sets = {
    "prompts": search(accuracies["prompts"], 12).trees,
    "medusa": head_trees(accuracies["medusa"], 12).trees,
  }
  expected = generate(model, PROMPTS, max_new_tokens=measured + 1)
  for name, trees in sets.items():
    (replayed,) = replay(ranks[name], [trees], nodes=16)
    options = {"max_new_tokens": measured + 1}
    if name == "prompts":
      tables = tree_tables(trees)
      found, counts = parallel_prompt_generate(model, parameters[name], tables, PROMPTS, **options)
    else:
      tables = tree_tables(trees, ensemble=0)
      options |= {"parameters": parameters[name], "propose": medusa_logits}
      found, counts = tree_generate(model, tables, PROMPTS, **options)
    assert found == expected
    np.testing.assert_array_equal(counts.accepted, replayed.accepted)
    np.testing.assert_array_equal(counts.states, replayed.states)
  np.testing.assert_allclose(accuracies["prompts"].sum(1) <= 1, True)


def test_prompt_tokens_on_the_draft_model(model):
  draft = random_decoder(model.config, seed=1)
  trees = tree_tables([{(): 2}, *[{(): 2} | {(r,): 1 for r in range(10)}] * 2])
  for drafter in (draft, model):
    found, counts = draft_and_verify(
      model, drafter, random_prompts(draft), trees, PROMPTS, max_new_tokens=12, drafts=3
    )
    assert found == generate(model, PROMPTS, max_new_tokens=12)
    assert (counts.accepted + counts.target_calls >= 11).all()
  # Its own draft: every round but the last gives all its drafts and a token more.
  assert (counts.target_calls == 3).all() and (counts.draft_calls >= counts.target_calls).all()


def test_prompt_lookup_copies_what_followed():
  # 1 2 3 4 again and again: behind the prompt everything is copied, ten tokens at most.
  text = np.tile([1, 2, 3, 4], 12)[None].astype(np.int32)
  found = lookup_acceptance_length(text, np.ones_like(text), 40, longest=10)
  assert found > 4
  distinct = np.arange(48, dtype=np.int32)[None]
  assert lookup_acceptance_length(distinct, np.ones_like(distinct), 40) == 1


def test_bad_input_is_refused(tmp_path, accuracies):
  config = config_module.get_config("tiny")
  for name, value, message in (
    ("mask", "causal", "mask=causal: expected ensemble or decoder or encoder"),
    ("sizes", (4, 10), "size=4: a root with 2 prompt tokens and a candidate"),
    ("compared_size", 7, "compared_size=7: expected one of sizes"),
    ("model", "nowhere", "model=nowhere: there is no such folder"),
    ("train_source", "sharegpt:none.json", "there is no file none.json"),
    ("prompt_tokens", "none", "prompt_tokens=none: there is no such file"),
    ("tpu", "v5e:3x3x3", "unknown TPU slice 'v5e:3x3x3'"),
    ("tpu_model", "lm-small", "tpu_model=lm-small is for a bound: set --config.tpu"),
  ):
    changed = config.copy_and_resolve_references()
    changed[name] = value
    with pytest.raises(UserError, match=message):
      check_config(changed)
  with pytest.raises(UserError, match="finite probabilities"):
    search(np.full((3, RANKS), np.nan), 24)
  with pytest.raises(ValueError, match="need more than 10 inputs"):
    dynamic_trees(accuracies, [0, 1, 1, 6], 10)
  file = tmp_path / "chats.json"
  file.write_text(json.dumps([{"conversations": [{"from": "human"}]}]))
  with pytest.raises(UserError, match="dialogue 0: a turn needs texts"):
    read_sharegpt(str(file))
  turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
  file.write_text(json.dumps([{"conversations": turns}]))
  assert read_sharegpt(str(file)) == [[("human", "Hi"), ("gpt", "Hello")]]


def test_tiny_run(tmp_path):
  config = config_module.get_config("tiny")
  if importlib.util.find_spec("libtpu") is not None:
    cli.prepare_jax(compile_only=True)
    config.tpu, config.tpu_model = "v5e:1x1", "lm-small"
  report = experiment.run(config, tmp_path)
  if config.tpu:
    (table,) = (t for t in report.tables if t.title.startswith("Size of the tree for v5e:1x1"))
    # The tree that is kept is the one that the bound chooses.
    (chosen,) = (row[0] for row in table.rows if row[-1] == "yes")
    _, trees = load_prompts(tmp_path / "prompts_0.safetensors")
    assert trees.sources.shape[1] == chosen == max(table.rows, key=lambda row: row[4])[0]
  assert report.claims[0].holds  # Greedy text is the model's own.
  assert (tmp_path / "prompts_0.safetensors").is_file()
  assert {f.path for f in report.figures} == {"accuracy.png", "trees.png"}
