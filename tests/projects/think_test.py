"""ThinK: vectors of the official code, the score and its objective, LongBench's scores, the tiny run."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.decoding.eviction import keep_slots_of, snapkv_scores, take_slots
from common.decoding.pruned_cache import kept_channels
from common.decoding.split_attention import take_channels
from common.errors import UserError
from common.models.decoder import Decoder
from projects.think import config, evaluation, experiment, longbench, recall, study, think

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "think"


@functools.cache
def random_heads(heads=4, kv_heads=2, slots=20, head_dim=8, seed=0):
  rng = np.random.default_rng(seed)
  query = rng.normal(size=(2, heads, 6, head_dim)).astype(np.float32)
  keys = rng.normal(size=(2, kv_heads, slots, head_dim)).astype(np.float32)
  return query, keys * rng.uniform(0.1, 3, (2, kv_heads, 1, head_dim)).astype(np.float32)


def every(x):
  return jnp.ones((len(x), x.shape[2]), bool)


def query_driven(query, keys):
  return np.asarray(think.query_driven_scores(query, keys, every(query), every(keys)))


@pytest.mark.parametrize("name", ["key_pruner_r40", "key_pruner_r60"])
def test_pruner_of_the_official_code(name):
  with np.load(GOLDEN / f"{name}.npz") as golden:
    query, keys, recent = golden["Q"], golden["K"], int(golden["recent_size"])
    kept = keys.shape[3] - int(keys.shape[3] * float(golden["ratio"]))
    channels = kept_channels(query_driven(query[:, :, -32:], keys), kept)
    mask = np.zeros(golden["kept_mask"].shape, bool)
    np.put_along_axis(mask, np.asarray(channels), True, axis=-1)
    np.testing.assert_array_equal(mask, golden["kept_mask"])
    np.testing.assert_array_equal(take_channels(keys[:, :, :-recent], channels), golden["pruned"])
    np.testing.assert_array_equal(keys[:, :, -recent:], golden["recent"])


@pytest.mark.parametrize("name", ["snap_avgpool", "snap_maxpool", "h2o_avgpool"])
def test_eviction_then_pruning_of_the_official_code(name):
  with np.load(GOLDEN / "eviction_then_pruning.npz") as golden:
    query, keys, values = golden["Q"], golden["K"], golden["V"]
    window, capacity, recent = (int(golden[k]) for k in ("window", "capacity", "recent"))
    # The official H2O scores by the window's queries too, without pooling.
    options = {"kernel": 1} if name.startswith("h2o") else {"kernel": int(golden["kernel"])}
    pooling = "avg" if name == "snap_avgpool" else "max"
    scores = snapkv_scores(query, keys, every(keys), window, pooling=pooling, **options)
    slots = np.asarray(keep_slots_of(scores, every(keys), capacity, window))
    official = np.argmin(np.abs(keys[:, :, None] - golden[f"{name}_k"][:, :, :, None]).sum(-1), -1)
    # Max pooling gives neighbours equal scores: which of them stay is not defined. The scores are.
    np.testing.assert_array_equal(slots[..., -window:], official[..., -window:])
    of = lambda kept: np.sort(np.take_along_axis(np.asarray(scores), kept[..., :-window], -1), -1)
    np.testing.assert_allclose(of(slots), of(official), rtol=1e-6)
    if name != "snap_maxpool":
      np.testing.assert_array_equal(np.sort(official, -1), slots)

    kept_keys = np.asarray(take_slots(keys, official))
    np.testing.assert_array_equal(take_slots(values, official), golden[f"{name}_v"])
    channels = np.asarray(kept_channels(query_driven(query[:, :, -32:], kept_keys), 4))
    mask = np.zeros((1, 3, 8), bool)
    np.put_along_axis(mask, channels, True, axis=-1)
    np.testing.assert_array_equal(mask, golden[f"{name}_mask"])
    pruned = take_channels(kept_keys[:, :, :-recent], channels)
    np.testing.assert_array_equal(pruned, golden[f"{name}_kpruned"])
    np.testing.assert_array_equal(kept_keys[:, :, -recent:], golden[f"{name}_krecent"])


def test_score_is_the_norm_of_the_outer_product_and_a_group_sums():
  query, keys = random_heads()
  scores = query_driven(query, keys)
  for row, head, j in np.ndindex(2, 2, 8):
    group = query[row, 2 * head : 2 * head + 2, :, j]
    outer = [np.linalg.norm(np.outer(q, keys[row, head, :, j])) ** 2 for q in group]
    # Means over 6 queries and 20 keys.
    np.testing.assert_allclose(scores[row, head, j], sum(outer) / (6 * 20), rtol=1e-5)
  repeated = query_driven(query, np.repeat(keys, 2, axis=1))
  np.testing.assert_allclose(repeated.reshape(2, 2, 2, 8).sum(2), scores, rtol=1e-5)


def test_padding_does_not_count():
  query, keys = random_heads()
  valid_query, valid = np.arange(6) >= np.array([[0], [4]]), np.arange(20) >= np.array([[0], [15]])
  scores = think.query_driven_scores(query, keys, jnp.asarray(valid_query), jnp.asarray(valid))
  np.testing.assert_allclose(scores[0], query_driven(query, keys)[0], rtol=1e-6)
  short = query_driven(query[1:, :, 4:], keys[1:, :, 15:])
  np.testing.assert_allclose(scores[1], short[0], rtol=1e-5)
  l1 = think.l1_scores(query, keys, valid_query, jnp.asarray(valid))
  np.testing.assert_allclose(l1[1], np.abs(keys[1, :, 15:]).mean(1), rtol=1e-5)
  l2 = think.l2_scores(query, keys, valid_query, jnp.asarray(valid))
  np.testing.assert_allclose(l2[1], (keys[1, :, 15:] ** 2).mean(1), rtol=1e-5)


def test_scale_of_a_head_and_permutation_of_channels():
  query, keys = random_heads()
  kept = lambda q, k: np.asarray(think.kept_mask(jnp.asarray(query_driven(q, k)), 5))
  mask = kept(query, keys)
  assert (mask.sum(-1) == 5).all()
  scaled = keys * np.array([7.0, 0.3], np.float32)[:, None, None]
  np.testing.assert_array_equal(kept(query, scaled), mask)
  order = np.random.default_rng(1).permutation(8)
  np.testing.assert_array_equal(kept(query[..., order], keys[..., order]), mask[..., order])


def test_channels_of_zeros_go_first_and_cost_nothing():
  query, keys = (x.copy() for x in random_heads())
  query[..., 2], keys[..., 5] = 0, 0
  mask = think.kept_mask(jnp.asarray(query_driven(query, keys)), 6)
  assert not mask[..., 2].any() and not mask[..., 5].any()
  error = think.pruning_error(query[:, ::2], keys, mask)
  np.testing.assert_allclose(error, 0, atol=1e-7)
  assert think.pruning_error(jnp.zeros((3, 4)), jnp.zeros((3, 4)), jnp.ones(4, bool)) == 0


def test_objective_is_the_frobenius_error_and_greedy_is_its_bound():
  query, keys = random_heads(2, 2)
  mask = np.asarray(think.kept_mask(jnp.asarray(query_driven(query, keys)), 4))
  logits = lambda q, k: np.einsum("bhqd,bhsd->bhqs", q, k)
  norm = lambda x: np.linalg.norm(x, axis=(2, 3))
  exact = logits(query, keys)
  error = norm(exact - logits(query * mask[:, :, None], keys)) ** 2
  got = np.asarray(think.pruning_error(query, keys, jnp.asarray(mask)))
  np.testing.assert_allclose(got, error / norm(exact) ** 2, rtol=1e-4)
  scores = np.sqrt(query_driven(query, keys) * 6 * 20)  # ||q_j|| ||k_j||
  bound = (scores * ~mask).sum(-1)
  assert (np.sqrt(error) <= bound * (1 + 1e-5)).all()


def test_greedy_is_best_for_orthogonal_channels_and_not_always():
  rng = np.random.default_rng(0)
  selections = np.zeros((20, 6), bool)
  picked = list(itertools.combinations(range(6), 3))
  np.put_along_axis(selections, np.array(picked), True, axis=1)
  optimal = []
  for orthogonal in (True, False):
    for _ in range(20):
      query, keys = rng.normal(size=(2, 12, 6)).astype(np.float32)
      if orthogonal:
        query = np.linalg.qr(query)[0] * rng.uniform(0.5, 2, 6)
      mask = think.kept_mask(jnp.asarray(query_driven(query[None, None], keys[None, None])), 3)
      gram = think.channel_gram(jnp.asarray(query), jnp.asarray(keys))
      best, error = think.best_selection(gram, jnp.asarray(selections))
      brute = min(np.linalg.norm(query[:, ~s] @ keys[:, ~s].T) ** 2 for s in selections)
      np.testing.assert_allclose(error, brute, rtol=1e-3)
      optimal.append(bool((best == mask[0, 0]).all()))
  assert all(optimal[:20]) and not all(optimal[20:])


def test_value_scores_are_norms_of_values_times_rows_of_the_output():
  _, values = random_heads()
  kernel = np.random.default_rng(2).normal(size=(4 * 8, 5)).astype(np.float32)
  scores = np.asarray(think.value_scores(values, kernel, every(values)))
  rows = (kernel.reshape(2, 2, 8, 5) ** 2).sum((1, 3))
  np.testing.assert_allclose(scores, (values**2).mean(2) * rows, rtol=1e-5)


@functools.cache
def recall_study():
  settings = config.get_config("tiny")
  model = Decoder(recall.recall_decoder(settings), rngs=nnx.Rngs(0))
  rows = recall.recall_rows(np.random.default_rng(0), 3, **recall.recall_size(settings))
  tokens = np.concatenate(rows, axis=1)
  prompts = evaluation.Prompts(
    tokens, np.ones_like(tokens), rows.prompt.shape[1], experiment.answers_scored(settings)
  )
  return study.Study(model, prompts, experiment.sizes_of(settings, "recall_"), jax.random.key(0))


def test_nothing_dropped_costs_nothing_and_errors_grow():
  s = recall_study()
  dense = s.measure(s.dense)
  assert dense.kl == pytest.approx(0, abs=1e-6)
  assert s.pruned(0.0).kl == pytest.approx(0, abs=1e-6) and s.pruned(0.0).error == 0
  errors = [s.pruned(ratio).error for ratio in (0.2, 0.5, 0.8)]
  assert errors == sorted(errors) and errors[0] > 0
  assert s.pruned(0.5, recent=s.prompts.length).kl == pytest.approx(0, abs=1e-6)
  repeated = study.repeat_kv_heads(s.model)
  assert repeated.config.num_kv_heads == 2
  same = study.Study(repeated, s.prompts, s.sizes, s.key)
  np.testing.assert_allclose(same.dense.logits, s.dense.logits, atol=1e-4)


def test_equal_bytes():
  sizes = study.Sizes(recent=32, window=32, capacity=56, pool_kernel=7)
  # 12 of 32 channels of 24 tokens are the keys and values of 4.5 tokens.
  assert study.equal_bytes_capacity(sizes, 32, 0.4) == 52


def test_recall_prompts_ask_for_their_needles():
  size = {"haystack": 10, "needles": 4, "asked": 2, "symbols": 5}
  for depth, at in ((0.0, 0), (1.0, 9)):
    rows = recall.recall_rows(np.random.default_rng(0), 20, **size, depth=depth)
    assert rows.prompt.max() < recall.recall_vocabulary(5) and rows.prompt.min() >= 1
    for prompt, answers in zip(rows.prompt, rows.answers):
      needles = {(t - 16) // 5: ((t - 16) % 5, i) for i, t in enumerate(prompt[:10]) if t >= 16}
      assert len(needles) == 4
      for key, value in answers.reshape(-1, 2):
        assert needles[key - 6][0] == value - 11
      assert needles[answers[0] - 6][1] == at
      assert prompt[10:].tolist() == answers[::2].tolist()


def test_longbench_prompts_and_scores(tmp_path):
  path = tmp_path / "task.jsonl"
  record = {"context": "c", "input": "i", "answers": ["The cat", "dog"], "all_classes": None}
  path.write_text(json.dumps(record) + "\n\n" + json.dumps(record) + "\n")
  questions = longbench.read_questions(str(path), "{context}?{input}", 0)
  assert len(questions) == 2 and questions[0].prompt == "c?i"
  assert longbench.score(["a cat!", "mouse"], questions, "f1") == 50
  assert longbench.truncate_middle(range(10), 5) == [0, 1, 7, 8, 9]
  assert longbench.truncate_middle([1, 2], 5) == [1, 2]
  # Two of three words are common, in order: 2 * 2 / (3 + 3).
  assert longbench.rouge_l("the black cat", "the cat sat") == pytest.approx(2 / 3)
  assert longbench.rouge_l("cat the", "the cat") == 0.5 and longbench.f1("x", "y") == 0
  classes = ("Sport", "Sports car", "News")
  assert longbench.accuracy("It is Sports car", "Sports car", classes) == 1
  assert longbench.accuracy("News or Sport", "News", classes) == 0.5
  assert longbench.edit_similarity("# so\nx = 1\ny", "x = 1") == 1
  with pytest.raises(UserError, match="no question"):
    (tmp_path / "empty.jsonl").write_text("\n")
    longbench.read_questions(str(tmp_path / "empty.jsonl"), "{input}", 0)
  with pytest.raises(UserError, match='line 1: expected an object with "context"'):
    (tmp_path / "bad.jsonl").write_text('{"input": 1}')
    longbench.read_questions(str(tmp_path / "bad.jsonl"), "{input}", 0)
  with pytest.raises(UserError, match="cannot read"):
    longbench.read_questions(str(tmp_path / "absent.jsonl"), "{input}", 0)


def test_longbench_run(tmp_path, monkeypatch):
  path = tmp_path / "task.jsonl"
  path.write_text(json.dumps({"context": "x = 1\n" * 20, "input": "x", "answers": ["1"]}))
  settings = config.get_config("tiny")
  settings.update({"text_rows": 0, "recall_rows": 0, "longbench": str(path)})
  settings.update({"prompt_length": 32, "new_tokens": 4, "capacity": 24})
  settings.update({"longbench_capacities": (24,), "residual": 64})
  report = experiment.run(settings, tmp_path)
  (table,) = report.tables
  assert [row[:2] for row in table.rows] == [["all", 0.0], [24, 0.0], [24, 0.4]]
  assert all(0 <= row[2] <= 100 for row in table.rows)
  # The same command after a kill: no question is answered again.
  monkeypatch.setattr(longbench, "answer", lambda *_, **__: pytest.fail("measured again"))
  assert experiment.run(settings, tmp_path) == report


@pytest.mark.parametrize(
  "changes, what",
  [
    ({"ratios": (1.2,)}, "pruning ratio 1.2"),
    ({"capacity": 8}, "fit into capacity=8"),
    ({"recall_asked": 5}, "recall_asked=5"),
    ({"group": 32}, "fewer than residual=32"),
    ({"residual": 16}, "residual=16"),
    ({"text_rows": 0, "recall_rows": 0}, "nothing to do"),
    ({"longbench": "x.jsonl", "longbench_metric": "bleu"}, "longbench_metric"),
    ({"longbench": "absent.jsonl"}, "cannot read"),
    ({"model": "bloom-small"}, "ALiBi"),
    ({"model": "absent"}, "no model 'absent'"),
    ({"longbench": "x.jsonl", "longbench_capacities": (8,)}, "raise the capacity"),
  ],
)
def test_bad_settings_fail_before_any_work(changes, what, tmp_path):
  settings = config.get_config("tiny")
  settings.update(changes)
  with pytest.raises(UserError, match=what):
    experiment.run(settings, tmp_path)


def test_tiny_run(tmp_path):
  settings = config.get_config("tiny")
  report = experiment.run(settings, tmp_path)
  assert len(report.tables) == 9 and len(report.claims) == 13
  assert all((tmp_path / f.path).stat().st_size for f in report.figures)
  scores = report.tables[0].rows
  errors = {(r[0], r[1]): r[5] for r in scores[1:]}
  assert errors[0.4, "query-driven"] < errors[0.8, "query-driven"] < 1
  partners = {(r[0], r[1]): r[3] for r in report.tables[1].rows}
  assert partners["none", "dense keys"] > partners["none", "ThinK"] > partners["SnapKV", "ThinK"]
  # Two blocks of 4 heads: 64 tokens of keys and values of 16 channels; masks are 16 bytes.
  assert partners["none", "dense keys"] == 2 * 4 * 64 * 2 * 16 * 4 + 16
  assert partners["none", "ThinK"] == partners["none", "dense keys"] - 2 * 4 * (64 - 16) * 6 * 4
