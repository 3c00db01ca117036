"""ICN: ranking, navigation, key clusters, metrics, baselines, chain of thought."""

import collections
import dataclasses
import decimal
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api as sm
from flax import nnx

from common.decoding.beam_search import beam_search
from common.decoding.generation import Sampling, generate
from common.errors import UserError
from projects.icn import baselines, clusters, cot, experiment, icn, knowledge, metrics
from projects.icn import config as config_module
from projects.icn.icn import Navigation, list_prompt
from projects.icn.judge import Judge
from projects.icn.query_shift import query_shift
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "icn" / "mapk.npz"
VOCAB, NEW = 320, 4


@pytest.fixture(scope="module")
def world():
  return knowledge.synthetic_questions(count=3, answers=8, seed=0)


@pytest.fixture(scope="module")
def tokenizer(world):
  lists = knowledge.training_lists(*world, count=30, longest=8, mistakes=0.1, seed=0)
  return knowledge.train_tokenizer(lists, VOCAB)


@pytest.fixture(scope="module")
def model():
  size = dataclasses.replace(ARCHITECTURES["llama"], num_layers=1, vocab_size=VOCAB)
  return random_decoder(dataclasses.replace(size, max_position_embeddings=256))


def make_prober(model, tokenizer, **changes):
  options = {"max_new_tokens": NEW, "branch_batch": 12, "prompt_lengths": (64,)}
  return icn.Prober(model, tokenizer, **options | changes)


@pytest.fixture(scope="module")
def prober(model, tokenizer):
  return make_prober(model, tokenizer)


@pytest.fixture(scope="module")
def groups(tokenizer):
  return icn.token_groups(tokenizer, VOCAB, merge_spaces=True)


def explore(prober, world, groups, how):
  prompt = lambda i, explored: list_prompt(world[0][i].instruction, explored)
  return icn.navigate(prober, prompt, 3, how, groups)


def test_logits_are_products_of_queries_and_keys(model, tokenizer, prober):
  prompts = ["some baras", list_prompt("Please show me some baras.", ["A1"])]
  queries, logits = prober.read(prompts)
  # float32 sums of 32 products, in another order.
  np.testing.assert_allclose(queries @ model.head_kernel, logits, rtol=1e-4, atol=1e-4)
  # Left padding changes nothing.
  run = nnx.jit(lambda model, tokens: model(tokens)[0])
  expected = run(model, jnp.array([tokenizer.encode(prompts[1]).ids]))
  np.testing.assert_allclose(logits[1], expected[0, -1], rtol=1e-4, atol=1e-4)
  # Logits of two keys differ by at most ||q|| ||k_a - k_b||; those of equal keys do not.
  keys = np.asarray(model.head_kernel).T
  a, b = np.random.default_rng(0).integers(VOCAB, size=(2, 200))
  gap = np.abs(np.asarray(logits[:, a] - logits[:, b]))
  bound = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys[a] - keys[b], axis=1)
  assert (gap <= bound + 1e-4).all() and (gap > bound / 20).any()
  twins = nnx.clone(model)
  kernel = twins.lm_head.kernel[...]
  twins.lm_head.kernel[...] = kernel.at[:, 7].set(kernel[:, 9])
  _, logits = make_prober(twins, tokenizer).read(prompts)
  np.testing.assert_array_equal(logits[:, 7], logits[:, 9])


def test_first_tokens_against_a_loop():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, 30)).astype(np.float32)
  logits[:, 4] = logits[:, 20]  # Two of one group.
  groups = np.arange(30, dtype=np.int32)
  groups[[11, 20, 25]] = 3, 4, 3
  probed = rng.random((5, 30)) < 0.2
  found = icn.next_tokens(logits, probed, groups, 8)
  for row in range(5):
    order, seen, expected = np.argsort(-logits[row], kind="stable"), set(), []
    for token in order:
      if groups[token] not in seen and not probed[row, groups[token]]:
        expected.append(token)
      seen.add(groups[token])
    assert found[row].tolist() == expected[:8]
  # A permuted vocabulary is ranked alike.
  order = rng.permutation(30)
  permuted = icn.next_tokens(logits[:, order], probed * False, np.arange(30), 8)
  plain = icn.next_tokens(logits, probed * False, np.arange(30), 8)
  same_logits = lambda t: np.take_along_axis(logits, np.asarray(t), axis=1)
  np.testing.assert_array_equal(same_logits(order[permuted]), same_logits(plain))


def test_tokens_that_differ_in_spaces_are_one_beginning(tokenizer, groups):
  by_text = collections.defaultdict(set)
  for token in range(tokenizer.get_vocab_size()):
    by_text[tokenizer.decode([token]).strip()].add(int(groups[token]))
  assert all(len(found) == 1 for text, found in by_text.items() if text)
  assert len(set(groups.tolist())) < VOCAB
  every = icn.token_groups(tokenizer, VOCAB, merge_spaces=False)
  np.testing.assert_array_equal(every, np.arange(VOCAB))


def test_navigation(model, tokenizer, world, groups):
  prober = make_prober(model, tokenizer)
  plain = explore(prober, world, groups, Navigation(1, 6, context="none"))
  assert (prober.completed, prober.hits) == (18, 0)
  found = explore(prober, world, groups, Navigation(2, 3))
  for a, b in zip(found, plain):
    # Nothing is explored in the first round.
    np.testing.assert_array_equal(a.first_tokens[:3], b.first_tokens[:3])
    np.testing.assert_array_equal(a.queries[0], b.queries[0])
    assert np.abs(a.queries[1] - a.queries[0]).max() > 1e-3
    assert len(set(groups[a.first_tokens])) == 6
  assert prober.completed + prober.hits == 36 and prober.hits >= 9
  other = explore(prober, world, groups, Navigation(2, 3, context="next"))
  assert any((a.queries[1] != b.queries[1]).any() for a, b in zip(found, other))
  # From the initial prompt, an answer depends on the first token only, as `generate` says.
  for i, question in enumerate(world[0]):
    start = tokenizer.encode(list_prompt(question.instruction, [])).ids
    for probed in (plain[i], found[i], other[i]):
      rows = [[*start, int(t)] for t in probed.first_tokens]
      new = generate(model, rows, max_new_tokens=NEW - 1, stop_tokens=prober.stop.tolist())
      for token, rest, answer in zip(probed.first_tokens.tolist(), new, probed.answers):
        text = tokenizer.decode([token, *rest]).partition('"')[0].strip()
        assert answer.startswith(text) or '"' in tokenizer.decode([token])
  # Completed in context, it does depend on what was shown.
  free = explore(prober, world, groups, Navigation(2, 3, regularized=False))
  np.testing.assert_array_equal(free[0].first_tokens[:3], found[0].first_tokens[:3])
  assert any(a.answers[:3] == b.answers[:3] for a, b in zip(free, found))
  assert any(a.answers[3:] != b.answers[3:] for a, b in zip(free, found))


def test_explored_keys_are_subtracted_from_the_query(model):
  rng = np.random.default_rng(0)
  kernel = np.asarray(model.head_kernel)
  queries = rng.normal(size=(2, len(kernel))).astype(np.float32)
  probed = np.zeros((2, VOCAB), bool)
  probed[1, [3, 5]] = True
  found = icn.subtract_explored_keys(queries @ kernel, queries, probed, kernel, 0.5)
  np.testing.assert_allclose(found[0], queries[0] @ kernel, rtol=1e-5, atol=1e-5)
  mean = kernel[:, 3] + kernel[:, 5]
  moved = queries[1] - 0.5 * np.linalg.norm(queries[1]) * mean / np.linalg.norm(mean)
  np.testing.assert_allclose(found[1], moved @ kernel, rtol=1e-4, atol=1e-4)


def test_query_shift_by_hand():
  kernel = np.eye(3, dtype=np.float32)
  queries = lambda a, b: np.array([a, b], np.float32)
  probed = [
    icn.Probed(np.array([0, 1]), ["a", "b"], queries([3, 1, 2], [1, 2, 2])),
    icn.Probed(np.array([2, 1]), ["a", "b"], queries([0, 1, 2], [0, 0, 1.5])),
  ]
  found = query_shift(probed, kernel)
  np.testing.assert_allclose(found.dot, [[3, 1], [2, 1.5]])
  np.testing.assert_allclose(found.centred_dot, [[1, 1 - 5 / 3], [1, 1]], rtol=1e-6)
  np.testing.assert_allclose(found.cosine[0], [3 / 14**0.5, 1 / 3], rtol=1e-6)
  np.testing.assert_array_equal(found.rank, [[1, 3], [1, 1]])
  assert found.repeats == 0.5


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusters(metric):
  rng = np.random.default_rng(0)
  # Two directions at two lengths: four Euclidean clusters, of which pairs share a direction.
  centres = np.array([[4, 0], [0, 4], [12, 0], [0, 12]], float)
  truth = rng.integers(4, size=80)
  keys = centres[truth] + rng.normal(size=(80, 2)) * 0.1
  count, truth = (4, truth) if metric == "euclidean" else (2, truth % 2)
  order = rng.permutation(80)
  for rows in (np.arange(80), order):
    labels = clusters.key_clusters(keys[rows], count, metric=metric, seed=0)
    pairs = set(zip(labels.tolist(), truth[rows].tolist()))
    assert len(pairs) == count  # Equal up to names, whatever the order of the vocabulary.
  scaled = keys / np.linalg.norm(keys, axis=1, keepdims=True) if metric == "cosine" else keys
  random = rng.normal(size=(200, 5)) if metric == "euclidean" else scaled
  labels = clusters.key_clusters(random, 5, metric=metric, seed=0)
  means = np.stack([random[labels == c].mean(axis=0) for c in range(5)])
  distances = np.linalg.norm(random[:, None] - means, axis=2)
  np.testing.assert_array_equal(distances.argmin(axis=1), labels)  # Lloyd's fixed point.
  with pytest.raises(UserError, match="clusters=81: expected 1 to 80"):
    clusters.key_clusters(keys, 81, seed=0)


def test_split_by_hand(tokenizer):
  labels = np.array([0, 0, 1, 1, 2, 2, 2])
  tokens = np.array([[0, 2, 1, 4, 3], [4, 5, 6, 0, 2]])
  correct = tokens % 2 == 0
  split = clusters.split_by_main_clusters(tokens, correct, labels, 2)
  assert split.inside.tolist() == [True, False, True, True, False, False]
  assert split.rank.tolist() == [3, 4, 5] * 2
  assert split.question.tolist() == [0, 0, 0, 1, 1, 1]
  assert split.correct.tolist() == [False, True, False, True, True, True]
  small = clusters.split_by_main_clusters(tokens, correct, labels, 2, largest=2)
  assert small.rank.tolist() == [3, 5, 4, 5]
  assert clusters.browse(labels, tokenizer, clusters=[2], show=1)[0][:2] == (2, 3)


def planted(effect: float, seed: int) -> clusters.Split:
  """80 questions, 30 ranks; being inside moves the log odds by `effect`, and so does the rank."""
  rng = np.random.default_rng(seed)
  question, rank = (x.ravel() for x in np.indices((80, 30)))
  inside = rng.random(2400) < 0.8 - 0.02 * rank
  chance = 1 / (1 + np.exp(0.1 * rank - 1 - effect * inside))
  return clusters.Split(question, rank + 6, inside, rng.random(2400) < chance)


def test_the_effect_of_a_main_cluster_is_told_from_the_rank():
  split = planted(-1.0, 0)
  # Ranks alone hide it: tokens inside rank better.
  assert split.correct[split.inside].mean() > split.correct[~split.inside].mean() - 0.1
  found = clusters.inside_effect(split, resamples=40, seed=0)
  assert found.low < found.coefficient < found.high < 0 < found.matched_gap
  features = sm.add_constant(np.stack([split.rank, split.inside], axis=1).astype(float))
  expected = sm.Logit(split.correct, features).fit(disp=False).params[2]
  assert found.coefficient == pytest.approx(expected, abs=0.02)  # The ridge.
  nothing = clusters.inside_effect(planted(0.0, 1), resamples=40, seed=0)
  assert nothing.low < 0 < nothing.high and abs(nothing.matched_gap) < 0.05
  # Labels that know nothing of the answers.
  rng = np.random.default_rng(2)
  shuffled = split._replace(inside=rng.random(2400) < 0.4)
  without = clusters.inside_effect(shuffled, resamples=40, seed=0)
  assert without.low < 0 < without.high and abs(without.matched_gap) < 0.05
  one_sided = split._replace(inside=np.ones(2400, bool))
  assert np.isnan(clusters.inside_effect(one_sided, resamples=2, seed=0).coefficient)


def test_map_of_the_official_code_and_by_a_double_loop():
  with np.load(GOLDEN) as golden:
    for k, expected in zip(golden["ks"], golden["mapk"].T):
      np.testing.assert_allclose(metrics.map_at_k(golden["correct"], k), expected, rtol=1e-12)
  correct = np.random.default_rng(0).random(9) < 0.5
  expected = 0.0
  for i in range(1, 8):
    expected += sum(correct[:i]) / i / 7
  assert metrics.map_at_k(correct, 7) == pytest.approx(expected)
  assert metrics.map_at_k(np.ones(5, bool), 5) == 1 and metrics.map_at_k(np.zeros(5), 5) == 0


def test_metrics_by_hand():
  new = metrics.new_and_correct(["a", "b", "a", "c"], [True, False, True, True])
  assert new.tolist() == [True, False, False, True]
  assert metrics.distinct_n(["a b a", "a b"], 1) == 2 / 5
  assert metrics.distinct_n(["a b a", "a b"], 2) == 2 / 3
  assert metrics.distinct_n(["", "a"], 2) == 0
  assert metrics.self_bleu(["a b c d e"] * 3) == pytest.approx(1)
  # Unigrams 1 of 3, bigrams half a match of 2, trigrams of 1: cube root of 1/3 1/4 1/2.
  assert metrics.self_bleu(["a b c", "a d e"]) == pytest.approx((1 / 24) ** (1 / 3))
  # A reference of twice the length: exp(1 - 2).
  long, short = "a b a b", "a b"
  assert metrics._bleu(1, *_counts([long, short])) == pytest.approx(np.exp(-1))
  texts = {"x": ["aaa", "aab", "aba"], "y": ["ccc", "ccd", "cdc"]}
  assert metrics.zero_gen_accuracy(texts, {"x": ["aa"], "y": ["cc"]}) == 1
  assert metrics.majority_vote([3, 5, 5, 3]) == 3  # A tie: the first one.
  assert metrics.majority_vote([None, 4, None]) == 4 and metrics.majority_vote([None]) is None


def _counts(texts):
  grams = [[collections.Counter(metrics._ngrams(t, n)) for t in texts] for n in range(1, 5)]
  return grams, [len(t.split()) for t in texts]


def test_lists_do_not_repeat_and_begin_with_common_answers(world):
  questions, names = world
  lists = knowledge.training_lists(questions, names, count=600, longest=10, mistakes=0.0, seed=0)
  first, lengths = collections.Counter(), set()
  for text in lists:
    question = next(q for q in questions if text.startswith(q.instruction))
    items = [line.partition('"')[2][:-1] for line in text.splitlines()[2:]]
    assert len(set(items)) == len(items) <= 10
    lengths.add(len(items))
    assert set(items[:8]) <= set(question.answers)  # No mistakes while there are answers.
    assert text == list_prompt(question.instruction, items)[: -len(f'{len(items) + 1}. "')]
    first[question.answers.index(items[0])] += 1
  assert lengths == set(range(1, 11))
  weights = np.array(questions[0].weights)
  # Four standard errors of a share of 600.
  shares = np.array([first[i] for i in range(8)]) / 600
  np.testing.assert_allclose(shares, weights / weights.sum(), atol=4 * (0.2 * 0.8 / 600) ** 0.5)
  assert {"sqrt", "pi"} <= set(knowledge.module_questions(["math"])[0].answers)


def test_samples_follow_the_model(prober, world):
  prompts = [list_prompt(q.instruction, []) for q in world[0]]
  samplings = [Sampling(1.0, top_k=1), Sampling(1.0)]
  best, drawn = baselines.sample_answers(prober, prompts, 4, samplings, jax.random.key(0), 12)
  _, logits = prober.read(prompts)
  top = np.asarray(jnp.argmax(logits, axis=-1))[:, None]
  for texts, expected in zip(best, prober.complete(prompts, top)):
    assert texts == expected * 4
  assert [len(texts) for texts in drawn] == [4, 4, 4] and drawn != best


def test_diverse_beam_search(model, prober, world):
  prompts = [list_prompt(q.instruction, []) for q in world[0]]
  ids, graph = prober.encode(prompts), nnx.split(model)
  padded = prober.padded(ids)
  search = lambda penalty, groups, beams: baselines.diverse_beam_search(
    *graph, *padded, prober.stop, jnp.float32(penalty), groups, beams, NEW
  )
  plain = search(0.0, 1, 4)
  expected = beam_search(
    model, ids, max_new_tokens=NEW, num_beams=4, length_penalty=0.0, early_stopping="never",
    stop_tokens=prober.stop.tolist(),
  )  # fmt: skip
  np.testing.assert_allclose(
    np.max(np.asarray(plain.scores), axis=(1, 2)), [row[0].score for row in expected], rtol=1e-4
  )
  diverse = search(1e4, 4, 1)
  first = np.asarray(diverse.tokens)[:, :, 0, 0]
  assert all(len(set(row)) == 4 for row in first.tolist())
  # The first group is greedy, and so are all without a penalty.
  greedy = prober.complete(prompts, first[:, :1])
  assert [[prober.text(row.tolist())] for row in np.asarray(diverse.tokens)[:, 0, 0]] == greedy
  texts = baselines.diverse_beam_answers(prober, prompts, groups=4, beams=1, penalty=0.0)
  assert texts == [row * 4 for row in greedy]


def test_chain_of_thought(model, tokenizer):
  number = cot.Problem("1 + 1?", decimal.Decimal(2), False)
  letter = cot.Problem("Which?\nOptions:\nA)1\nB)2", "B", True)
  assert cot.extract_answer(number, " it is 1,234.50 or 7") == decimal.Decimal("1234.5")
  assert cot.extract_answer(letter, "the letter (B), not A") == "B"
  assert cot.extract_answer(number, "none") is None
  assert cot.way_prompt("Q", ["add"]).endswith("### Way 1:\nStep 1: add\n\n### Way 2:\nStep 1:")
  found = cot.score([number, letter], [[2, 3, None], ["A", "B", "B"]])
  assert (found.vote, found.path) == (1.0, 0.5)
  solver = make_prober(model, tokenizer, ends=cot.WAY_ENDS, prompt_lengths=(192,))
  every = np.arange(VOCAB, dtype=np.int32)
  for navigates in (True, False):
    result = cot.self_consistency(solver, [number, letter], 2, every, navigates=navigates)
    assert 0 <= result.path <= 1 and [len(row) for row in result.answers] == [2, 2]


@pytest.mark.parametrize(
  "task, count, answer", [("gsm8k", 1319, 18), ("svamp", 1000, 51), ("aqua_rat", 254, "A")]
)
def test_chain_of_thought_problems(task, count, answer):
  problems = cot.load_cot_problems(task)
  assert len(problems) == count and problems[0].answer == answer


def test_verdicts_of_a_file(tmp_path):
  asked, known = (
    knowledge.Question("Some leagues.", ()),
    knowledge.Question("Some.", ("x",), (1.0,)),
  )
  path = tmp_path / "verdicts.jsonl"
  verdict = {"instruction": "Some leagues.", "answer": "NBA", "correct": "Yes"}
  path.write_text(json.dumps(verdict) + "\n")
  judge = Judge(str(path))
  assert judge.correct(known, ["x", "y"]).tolist() == [True, False]
  assert judge.correct(asked, ["NBA", ""]).tolist() == [True, False]
  judge.require_verdicts(tmp_path)
  assert judge.correct(asked, ["FIFA"]).tolist() == [False]
  with pytest.raises(UserError, match="1 answers have no verdict"):
    judge.require_verdicts(tmp_path)
  missing = json.loads((tmp_path / "to_judge.jsonl").read_text())
  assert missing == {"instruction": "Some leagues.", "answer": "FIFA"}
  path.write_text(json.dumps(verdict | {"correct": "maybe"}))
  with pytest.raises(UserError, match="verdicts.jsonl:1: 'correct' is 'maybe', expected Yes or No"):
    Judge(str(path))


def test_bad_input_is_refused(model, tokenizer, prober, world, groups, tmp_path, monkeypatch):
  for name, value, message in (
    ("rounds", 1, "at least two"),
    ("ranks", 5, "no more completions than ranks"),
    ("beam_groups", (4,), "must divide rounds x per_round=6"),
    ("cot_tasks", ("math",), "expected some of gsm8k, svamp, aqua_rat"),
    ("judge", "nowhere.jsonl", "cannot read nowhere.jsonl"),
    ("model", "nowhere", "no base model 'nowhere'"),
    ("modules", ("no_such_module",), "there is no module 'no_such_module'"),
    ("answers", 1000, "answers=1000: expected at most"),
    ("probed", 9, "probed=9"),
  ):
    wrong = config_module.get_config("tiny")
    wrong[name] = value
    with pytest.raises(UserError, match=message):
      experiment.run(wrong, tmp_path)
  with pytest.raises(UserError, match="expected the model's own tokenizer"):
    small = dataclasses.replace(model.config, vocab_size=8)
    make_prober(random_decoder(small), tokenizer)
  with pytest.raises(UserError, match="answers would not end"):
    make_prober(model, tokenizer, ends="no such text")
  with pytest.raises(UserError, match="expected fewer"):
    explore(prober, world, groups, Navigation(20, 20))
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path))
  (tmp_path / "svamp").mkdir()
  (tmp_path / "svamp" / "SVAMP.json").write_text('[{"Body": "b", "Question": "q"}]')
  with pytest.raises(UserError, match="problem 0 has no 'Answer'"):
    cot.load_cot_problems("svamp")


def test_tiny_run(tmp_path):
  report = experiment.run(config_module.get_config("tiny"), tmp_path)
  assert len(report.claims) == 10
  titles = [t.title for t in report.tables]
  assert titles[2] == "synthetic: 6 completions of every question" and len(titles) == 7
  rows = {row[0]: row for row in report.tables[2].rows}
  assert {"plain ranking", "ICN", "diverse beam search, 2 groups"} <= set(rows)
  assert all((tmp_path / figure.path).stat().st_size for figure in report.figures)
