"""ASAp: the card's invariants, the official trie, and the tiny run."""

import dataclasses
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from common.decoding.constrained import GrammarConstraint, decode, read_prompts
from common.decoding.generation import Sampling
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary
from common.errors import UserError
from projects.gad import config as config_module
from projects.gad import experiment, toy
from projects.gad.asap import AsapConstraint, asap_sample
from projects.gad.baselines import rejection_sample
from projects.gad.exact import (
  TabularModel,
  conditional,
  future_grammaticality,
  text_probabilities,
)
from projects.gad.independent_parser import independent_parser
from projects.gad.metrics import empirical_kl, restricted, total_variation, window_kl
from projects.gad.sygus import evaluate
from projects.gad.tasks import EMBEDDED, Task, load_tasks
from projects.gad.trie import Node, Trie
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gad" / "asap_trie.npz"
LANGUAGE, MAX_TOKENS = "5 bits", 6


@pytest.fixture(scope="module")
def masks():
  return toy.toy_masks(LANGUAGE)


def random_model(seed: int) -> TabularModel:
  return toy.random_model(MAX_TOKENS, np.random.default_rng(seed))


def sample(model, masks, trie, rng, propagation="root", max_tokens=MAX_TOKENS):
  constraint = AsapConstraint(masks, trie, propagation)
  text = toy.sample_text(model, constraint, max_tokens, rng)
  constraint.finish(text is not None)
  return text


def walk(trie: Trie):
  """All nodes, each with its prefix."""
  pending = [((), trie.root)]
  while pending:
    prefix, node = pending.pop()
    yield prefix, node
    pending += [((*prefix, token), child) for token, child in node.children.items()]


def success_sum(node: Node) -> float:
  """The sum over allowed next tokens of P c~."""
  below = (np.exp(child.log_p + child.log_success) for child in node.children.values())
  return np.exp(node.log_rest) + sum(below)


def test_trie_of_the_official_code():
  with np.load(GOLDEN) as arrays:
    golden = dict(arrays)
  eos = int(golden["eos"])
  tokens = [b"0", b"1", b"", b"3", b"4"]
  texts = " | ".join('"' + "".join(map(str, row)) + '"' for row in golden["grammatical"])
  masks = TokenMasks(parse_ebnf(f"root ::= {texts}"), Vocabulary(tokens, eos))
  logits = {
    tuple(t for t in prefix if t >= 0): row
    for prefix, row in zip(golden["prefixes"].tolist(), golden["prefix_logits"])
  }
  trie = Trie(eos)
  for i, (chosen, scores) in enumerate(zip(golden["tokens"], golden["adjusted_scores"])):
    constraint = AsapConstraint(masks, trie)
    prefix = ()
    for token, expected in zip(chosen.tolist(), scores):
      row = logits[prefix].astype(np.float64)
      log_p = row - np.logaddexp.reduce(row)
      allowed = np.unpackbits(constraint.packed_mask(), count=5).view(bool)
      adjusted = np.where(allowed, log_p, -np.inf)
      weighted, weights = constraint.log_weights()
      adjusted[list(weighted)] += weights
      # The official numbers are float32.
      np.testing.assert_allclose(adjusted, expected, rtol=1e-5, atol=1e-5)
      # The same choice by the same uniform number.
      probabilities = np.exp(adjusted - np.logaddexp.reduce(adjusted))
      drawn = np.searchsorted(np.cumsum(probabilities), golden["uniforms"][i, len(prefix)])
      assert drawn == token
      prefix = (*prefix, token)
      if constraint.advance(token, lambda log_p=log_p: log_p):
        break
    constraint.finish(complete=True)
    np.testing.assert_allclose(
      np.exp(trie.root.log_success), golden["root_success_rate"][i], rtol=1e-5
    )
    likelihood = np.exp(sum(node.log_p for node in constraint.path))
    np.testing.assert_allclose(likelihood, golden["raw_likelihood"][i], rtol=1e-5)


@pytest.mark.parametrize("propagation", ["root", "none", "last"])
def test_bounds_are_sound_and_never_rise(masks, propagation):
  """c~ >= c at every node after every sample; at every expanded node it is the sum (ASAp)."""
  model, trie, rng = random_model(0), Trie(toy.EOS), np.random.default_rng(1)
  exact = future_grammaticality(model, masks, MAX_TOKENS)
  before = {}
  for _ in range(60):
    sample(model, masks, trie, rng, propagation)
    for prefix, node in walk(trie):
      success = np.exp(node.log_success)
      assert success <= before.get(prefix, 1.0)
      before[prefix] = success
      if prefix and prefix[-1] == toy.EOS:
        assert success == 1
        continue
      at = 0
      for token in prefix:
        at = int(model.after[at, token])
      # Rounding of sums in float64.
      assert success >= exact[len(prefix)][masks.read(prefix), at] * (1 - 1e-12)
      if propagation == "root":
        np.testing.assert_allclose(success, success_sum(node), rtol=1e-12)


def test_first_sample_is_that_of_masks(masks):
  model = random_model(2)
  gcd = text_probabilities(model, masks, MAX_TOKENS)
  assert text_probabilities(model, masks, MAX_TOKENS, Trie(toy.EOS)) == gcd
  np.testing.assert_allclose(sum(np.exp(p.sampler) for p in gcd.values()), 1, rtol=1e-12)


def test_tries_share_nothing(masks):
  model, rng = random_model(2), np.random.default_rng(0)
  used, other = Trie(toy.EOS), Trie(toy.EOS)
  for _ in range(5):
    sample(model, masks, used, rng)
  assert not other.root.children and other.statistics() == (1, 0, 0.0, 1.0)
  assert text_probabilities(model, masks, MAX_TOKENS, other) == text_probabilities(
    model, masks, MAX_TOKENS
  )
  # Two samples at once, of tries of their own.
  first, second = AsapConstraint(masks, used), AsapConstraint(masks, other)
  first.advance(1, lambda: model.log_p[0])
  assert second.path == [other.root] and second.state is masks.start


def explore_all(model, masks, max_tokens):
  """A trie in which every text was sampled, by force."""
  trie = Trie(masks.vocabulary.eos)
  for text in text_probabilities(model, masks, max_tokens):
    constraint, at = AsapConstraint(masks, trie), 0
    for token in (*text, masks.vocabulary.eos):
      constraint.advance(token, lambda at=at: model.log_p[at])
      at = model.after[at, token]
    constraint.finish(complete=True)
  return trie


@pytest.mark.parametrize("seed", range(3))
def test_a_fully_explored_language_is_sampled_exactly(masks, seed):
  model = random_model(seed)
  trie = explore_all(model, masks, MAX_TOKENS)
  found = text_probabilities(model, masks, MAX_TOKENS, trie)
  log_p = np.array([p.model for p in found.values()])
  mass = np.exp(np.logaddexp.reduce(log_p))
  np.testing.assert_allclose(np.exp(trie.root.log_success), mass, rtol=1e-6)
  np.testing.assert_allclose(
    future_grammaticality(model, masks, MAX_TOKENS)[0][masks.start, 0], mass, rtol=1e-12
  )
  np.testing.assert_allclose(
    [np.exp(p.sampler) for p in found.values()], conditional(log_p), rtol=1e-6
  )
  statistics = trie.statistics()
  assert statistics.texts == len(found) == 17
  np.testing.assert_allclose([statistics.explored_mass, statistics.success], mass, rtol=1e-9)


def test_nothing_is_changed_where_every_token_is_allowed():
  vocabulary = Vocabulary(toy.TOKENS, toy.EOS)
  free = TokenMasks(parse_ebnf("root ::= [01x]*"), vocabulary)
  # The fourth token ends it, so that no text is longer than that.
  model = random_model(4)
  log_p = model.log_p.copy()
  depth = np.zeros(len(log_p), int)
  for at in range(len(log_p)):
    children = model.after[at, :3]
    depth[children[children > at]] = depth[at] + 1
  log_p[depth == 3] = np.log([1e-300, 1e-300, 1e-300, 1.0])
  model = model._replace(log_p=log_p)
  trie, rng = Trie(toy.EOS), np.random.default_rng(0)
  for _ in range(50):
    sample(model, free, trie, rng, max_tokens=MAX_TOKENS)
  assert all(abs(node.log_success) < 1e-12 for _, node in walk(trie))
  found = text_probabilities(model, free, 4, trie)
  np.testing.assert_allclose(
    [p.model for p in found.values()], [p.sampler for p in found.values()], atol=1e-9
  )


def test_masks_are_exact_for_a_model_that_is_grammatical(masks):
  """All of P on the language: GCD's distribution is P."""
  model = random_model(5)
  log_p, seen = np.full_like(model.log_p, np.log(0.25)), {}
  pending = [(masks.start, 0)]
  while pending:
    state, at = pending.pop()
    mask = masks.mask(state)
    scores = np.where(mask, model.log_p[at], -np.inf)
    log_p[at] = seen[at] = scores - np.logaddexp.reduce(scores)
    for token in np.flatnonzero(mask).tolist():
      if token != toy.EOS:
        pending.append((masks.advance(state, token), int(model.after[at, token])))
  model = model._replace(log_p=log_p)
  found = text_probabilities(model, masks, MAX_TOKENS)
  np.testing.assert_allclose(
    [p.model for p in found.values()], [p.sampler for p in found.values()], atol=1e-12
  )
  np.testing.assert_allclose(sum(np.exp(p.model) for p in found.values()), 1, rtol=1e-12)


def test_future_grammaticality_by_enumeration():
  """A Markov chain and a recursive grammar: far more prefixes than pairs of states."""
  rng = np.random.default_rng(0)
  vocabulary = Vocabulary([b"(", b")", b"()", b"x", b""], eos=4)
  masks = TokenMasks(parse_ebnf('root ::= "(" root ")" root | "x"?'), vocabulary)
  log_p = np.log(rng.dirichlet(np.ones(5), 5))
  chain = TabularModel(log_p, np.tile(np.arange(5), (5, 1)))
  total = 0.0
  for length in range(6):
    for text in itertools.product(range(4), repeat=length):
      state = masks.read(list(text))
      if state is not None and masks.accepts(state):
        at = 0
        value = 0.0
        for token in (*text, 4):
          value, at = value + log_p[at, token], token
        total += np.exp(value)
  found = future_grammaticality(chain, masks, 6)
  np.testing.assert_allclose(found[0][masks.start, 0], total, rtol=1e-12)
  assert max(map(len, found)) < 40
  exact = text_probabilities(chain, masks, 6)
  np.testing.assert_allclose(np.exp([p.model for p in exact.values()]).sum(), total, rtol=1e-12)


def test_samples_cut_off_count_as_failures():
  """Q is over the texts that fit: behind others c~ comes down to 0."""
  vocabulary = Vocabulary(toy.TOKENS, toy.EOS)
  masks = TokenMasks(parse_ebnf('root ::= "0" "1"* | "x" "x" "x"'), vocabulary)
  model = toy.random_model(3, np.random.default_rng(0))
  trie, rng = Trie(toy.EOS), np.random.default_rng(0)
  samples = [sample(model, masks, trie, rng, max_tokens=3) for _ in range(200)]
  assert None in samples and None not in samples[50:]
  fit = text_probabilities(model, masks, 3)
  assert {tuple(s) for s in samples if s is not None} == {(0,), (0, 1)} == fit.keys()
  mass = np.exp(np.logaddexp.reduce([p.model for p in fit.values()]))
  np.testing.assert_allclose(np.exp(trie.root.log_success), mass, rtol=1e-12)
  nothing = TokenMasks(parse_ebnf('root ::= "xxx"'), vocabulary)
  trie = Trie(toy.EOS)
  sample(model, nothing, trie, rng, max_tokens=3)
  with pytest.raises(UserError, match="no text of the grammar fits into max_new_tokens"):
    sample(model, nothing, trie, rng, max_tokens=3)


def test_saved_tries_go_on_as_they_were(masks, tmp_path):
  model, trie, rng = random_model(6), Trie(toy.EOS), np.random.default_rng(2)
  for _ in range(10):
    sample(model, masks, trie, rng)
  path = tmp_path / "trie.npz"
  trie.save(path, "a model, a grammar")
  loaded = Trie.load(path, "a model, a grammar")
  as_text = lambda t: [
    (prefix, node.log_p, node.log_success, node.log_rest, node.visits) for prefix, node in walk(t)
  ]
  assert as_text(loaded) == as_text(trie) and loaded.num_nodes == trie.num_nodes
  assert text_probabilities(model, masks, MAX_TOKENS, loaded) == text_probabilities(
    model, masks, MAX_TOKENS, trie
  )
  for seed in range(3):
    again = [sample(model, masks, t, np.random.default_rng(seed)) for t in (trie, loaded)]
    assert again[0] == again[1]
  assert as_text(loaded) == as_text(trie)
  with pytest.raises(UserError, match="sampled for a model, a grammar, not another"):
    Trie.load(path, "another")
  with pytest.raises(UserError, match="cannot read the trie"):
    Trie.load(tmp_path / "none.npz", "x")
  (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 broken")
  with pytest.raises(UserError, match="cannot read the trie"):
    Trie.load(tmp_path / "broken.npz", "x")
  np.savez(tmp_path / "other.npz", parent=np.zeros(1))
  with pytest.raises(UserError, match="no trie: it lacks"):
    Trie.load(tmp_path / "other.npz", "x")
  with np.load(path) as arrays:
    damaged = dict(arrays)
  damaged["log_p"][1] = np.nan
  np.savez(path, **damaged)
  with pytest.raises(UserError, match="log_p has NaN"):
    Trie.load(path, "a model, a grammar")


def test_memory_is_bounded_by_collapsing_rare_subtrees(masks):
  model, rng = random_model(7), np.random.default_rng(3)
  trie = Trie(toy.EOS, max_nodes=20)
  exact = future_grammaticality(model, masks, MAX_TOKENS)
  bound, collapsed = 1.0, 0
  for _ in range(150):
    nodes = trie.num_nodes
    sample(model, masks, trie, rng)
    collapsed += trie.num_nodes < nodes
    assert trie.num_nodes == sum(1 for _ in walk(trie)) <= 20
    success = np.exp(trie.root.log_success)
    assert exact[0][masks.start, 0] * (1 - 1e-12) <= success <= bound
    bound = success
  assert collapsed > 3
  # It still learned: far below the bound of one level, the probability of the allowed tokens.
  assert bound < 0.5 * np.exp(np.logaddexp.reduce(model.log_p[0, :2]))


def test_a_long_text_needs_no_recursion():
  trie = Trie(eos=1)
  path, allowed = [trie.root], np.array([True, False])
  for _ in range(5000):
    path.append(trie.insert(path[-1], 0, np.log([0.9, 0.1]), allowed))
  trie.update(path)
  np.testing.assert_allclose(trie.root.log_success, 5000 * np.log(0.9), rtol=1e-9)
  assert trie.statistics().nodes == 5001


EOS = 0
TOKENS = [b"", b"a", b"b", b"ab", b"(", b")", b"((", *(b"%c" % c for c in range(99, 122))]
TOKENS += [b"."] * (64 - len(TOKENS))


@pytest.fixture(scope="module")
def decoder():
  return random_decoder(dataclasses.replace(ARCHITECTURES["llama"], num_layers=1))


def test_samples_of_a_decoder(decoder):
  """Rows are independent, the first sample is GCD's, and c~ bounds what the model says."""
  vocabulary = Vocabulary(TOKENS, EOS)
  grammars = ('root ::= "(" root ")" | [ab]+', 'root ::= "aaa" | "b" [ab]')
  both = [TokenMasks(parse_ebnf(g), vocabulary) for g in grammars]
  prompts = read_prompts(decoder, [[5, 6], [7]], 8)
  tries = [Trie(EOS), Trie(EOS)]
  draw = lambda i: asap_sample(decoder, prompts, both, tries, key=jax.random.key(i))
  first = draw(0)
  gcd = decode(
    decoder,
    prompts,
    [GrammarConstraint(m) for m in both],
    key=jax.random.key(0),
    sampling=Sampling(1.0),
  )
  assert first == gcd
  found = [first, *(draw(i) for i in range(1, 25))]
  for row, (mask, grammar) in enumerate(zip(both, grammars)):
    accepts = independent_parser(grammar)
    texts = {
      tuple(round_[row].tokens): round_[row].log_p for round_ in found if round_[row].complete
    }
    assert texts and all(accepts(vocabulary.text(text).decode()) for text in texts)
    statistics = tries[row].statistics()
    assert statistics.texts == len(texts)
    # Raw likelihoods of the trie and of the decoder, float32.
    np.testing.assert_allclose(
      statistics.explored_mass, np.exp(list(texts.values())).sum(), rtol=1e-4
    )
    assert statistics.success >= statistics.explored_mass * (1 - 1e-5)
    for prefix, node in walk(tries[row]):
      if node.log_rest is not None:
        np.testing.assert_allclose(np.exp(node.log_success), success_sum(node), rtol=1e-9)
      assert mask.read([t for t in prefix if t != EOS]) is not None
  # The second grammar has two token sequences of "ab" to "bb": all were found, c~ is c.
  np.testing.assert_allclose(
    tries[1].statistics().success, tries[1].statistics().explored_mass, rtol=0.2
  )
  with pytest.raises(UserError, match="temperature=0"):
    asap_sample(decoder, prompts, both, tries, key=jax.random.key(0), temperature=0)


def test_rejection_is_exact_and_drawn_texts_are_the_model_s(masks):
  model = random_model(1)
  exact = text_probabilities(model, masks, MAX_TOKENS)
  q = dict(zip(exact, conditional(np.array([p.model for p in exact.values()]))))
  draw = toy.drawer(model, MAX_TOKENS, 2000, np.random.default_rng(0))
  texts, drawn = rejection_sample(draw, lambda t: tuple(t) in q, 500, 1000)
  mass = np.exp(np.logaddexp.reduce([p.model for p in exact.values()]))
  # Four standard errors of a geometric count; and of TV, whose mean for 500 is about 0.06.
  assert len(texts) == 500 and abs(drawn * mass - 500) < 4 * np.sqrt(500)
  assert total_variation([tuple(t) for t in texts], q) < 0.12
  assert rejection_sample(lambda i: [None, [2]], lambda t: False, 3, 4) == ([], 8)


def test_metrics_by_hand():
  log_q = restricted({"a": np.log(0.3), "b": np.log(0.1)})
  np.testing.assert_allclose(np.exp([log_q["a"], log_q["b"]]), [0.75, 0.25])
  np.testing.assert_allclose(empirical_kl(["a"] * 3 + ["b"], log_q), 0, atol=1e-12)
  np.testing.assert_allclose(empirical_kl(["b", "b"], log_q), np.log(4))
  curve = window_kl(["a", "b", None, "b", "b", None, "a", "a"], log_q, [2, 4, 8])
  mixed = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
  np.testing.assert_allclose(curve, [mixed, np.log(4), -np.log(0.75)])
  assert np.isnan(window_kl([None] * 4, log_q, [4])[0])
  assert total_variation(["a", "b"], {"a": 0.75, "b": 0.25}) == 0.25


@pytest.mark.parametrize(
  "program, value",
  [
    ('(str.++ (str.substr x 0 2) "-" (int.to.str (+ 1 (str.len x))))', "he-6"),
    ('(str.replace x "l" "")', "helo"),
    ("(str.substr x (- (str.len x) 2) 9)", "lo"),
    ("(str.at x 7)", ""),
    ('(str.indexof x "l" 3)', 3),
    ('(ite (str.prefixof "he" x) (str.to.int "12") (- 1))', 12),
    ('(str.++ "say ""hi""" "")', 'say "hi"'),
    ("(define-fun f ((x String) (n (_ BitVec 4))) String (str.at x 1))", "e"),
    ("(bvslt (bvadd #b1111 n) #x3)", True),
    ("(bvlshr (bvneg n) #b0001)", 7),
    ("(bvudiv n #b0000)", 15),
    ("(and (= n #b0010) (not false))", True),
  ],
)
def test_sygus_programs(program, value):
  assert evaluate(program, {"x": "hello", "n": 2}) == value


@pytest.mark.parametrize(
  "program", ["", "x y", "(x)", "(str.len", "(str.len x))", "(f x)", "(+ x 1)"]
)
def test_programs_that_are_none(program):
  with pytest.raises(ValueError):
    evaluate(program, {"x": "hello"})


def test_tasks_and_bad_input(tmp_path):
  for task in EMBEDDED:
    parse_ebnf(task.grammar)
    assert independent_parser(task.grammar) is not None
  assert EMBEDDED[0].is_correct("import os") and not EMBEDDED[0].is_correct("import o")
  assert EMBEDDED[1].is_correct("A = 1") is None
  examples = [{"arguments": {"x": "ab"}, "output": "a"}, {"arguments": {"x": "c"}, "output": "c"}]
  lines = [{"name": "first", "prompt": "p", "grammar": 'root ::= "a"', "examples": examples}]
  path = tmp_path / "tasks.jsonl"
  path.write_text(json.dumps(lines[0]) + "\n\n")
  (task,) = load_tasks(str(path))
  assert task == Task("first", "p", 'root ::= "a"', examples=tuple(examples))
  assert task.is_correct("(str.at x 0)") and not task.is_correct("x") and not task.is_correct("(")
  for line, message in (
    ("{", "line 1: not JSON"),
    ("[]", "expected an object"),
    ('{"name": "a", "prompt": "p"}', "grammar is missing"),
    ('{"name": "a/b", "prompt": "p", "grammar": "g"}', "names files too"),
    ('{"name": "a", "prompt": "p", "grammar": "g", "examples": [1]}', "expected examples"),
    ("", "at least one task"),
  ):
    path.write_text(line)
    with pytest.raises(UserError, match=message):
      load_tasks(str(path))
  with pytest.raises(UserError, match="cannot read the tasks"):
    load_tasks(str(tmp_path / "none"))
  config = config_module.get_config("tiny")
  for name, value, message in (
    ("model", "nowhere", "model=nowhere: expected a checkpoint's folder"),
    ("temperature", 0.0, "temperature=0.0: expected a positive number"),
    ("methods", ("ASAp",), "methods=.*GCD, ASAp"),
    ("toy_languages", ("9 bits",), "toy_languages"),
    ("tries", "nowhere", "tries=nowhere: expected a folder"),
    ("max_nodes", 3, "max_nodes=3"),
  ):
    wrong = config.copy_and_resolve_references()
    wrong[name] = value
    with pytest.raises(UserError, match=message):
      experiment.run(wrong, tmp_path)


def test_tiny_run(tmp_path):
  config = config_module.get_config("tiny")
  report = experiment.run(config, tmp_path)
  assert len(report.claims) == 9
  toy_rows = {row[0]: row for row in report.tables[0].rows}
  assert set(toy_rows) == {"GCD", "ASAp", "no propagation", "last level", "rejection"}
  assert toy_rows["ASAp"][2] < toy_rows["GCD"][2]
  tasks = {row[0]: row for row in report.tables[1].rows}
  assert set(tasks) == {task.name for task in EMBEDDED}
  # What was sampled is part of the language, whose probability c~ bounds.
  assert all(row[10] <= row[11] * (1 + 1e-5) for row in tasks.values())
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 1000
  # Another run goes on from the tries.
  row = next(iter((tmp_path / "tries").glob("import-*.npz")))
  config.tries, config.new_tokens = str(row.parent), 20
  with pytest.raises(UserError, match="was sampled for lm-tiny.* 24 tokens.* not .* 20 tokens"):
    experiment.run(config, tmp_path)
