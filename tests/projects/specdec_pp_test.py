"""SpecDec++: vectors of the official code, invariants, policies in the engine and replayed."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special, stats

from common.decoding.generation import Sampling
from common.decoding.speculative import Policy, Statistics, constant, speculative_generate
from common.errors import UserError
from common.training.train_step import init_train_state
from projects.specdec_pp import config as config_module
from projects.specdec_pp import experiment, frontier, mdp, prompts
from projects.specdec_pp.draft_model import distillation_step
from projects.specdec_pp.head_training import head_quality, load_head, save_head
from projects.specdec_pp.policies import heuristic, random_length
from projects.specdec_pp.replay import DecisionLog, decision_log, oracle, replay
from projects.specdec_pp.settings import check_config, check_models
from projects.specdec_pp.specdec_pp import (
  IGNORED,
  AcceptanceHead,
  acceptance_logits,
  acceptance_probability,
  bernoulli_kl,
  init_head,
  mix_tokens,
  soft_labels,
  threshold_policy,
  tie_blocks,
  weighted_cross_entropy,
)
from projects.specdec_pp.training_data import continue_prompts
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "specdec_pp" / "acceptance_head_loss.npz"
SAMPLED = Sampling(1.0)


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def models():
  """A target and a draft of five tokens."""
  size = dataclasses.replace(ARCHITECTURES["llama"], vocab_size=5)
  small = dataclasses.replace(size, num_layers=1)
  return random_decoder(small), random_decoder(small, seed=1)


def test_soft_labels_of_the_official_code(golden):
  found = soft_labels(golden["log_p"], golden["log_q"])
  np.testing.assert_allclose(found, golden["p_acc"], rtol=1e-6)
  # q below the smallest float32; tokens that only one of the models has.
  log_p, log_q = jnp.array([-200.0, -jnp.inf, -1.0]), jnp.array([-200.5, -1.0, -jnp.inf])
  np.testing.assert_array_equal(soft_labels(log_p, log_q), [1, 0, 1])


@pytest.mark.parametrize("blocks", [0, 3])
def test_head_loss_and_divergence_of_the_official_code(golden, blocks):
  shared = AcceptanceHead(
    jnp.asarray(golden["tied_w"]).T[None],
    jnp.asarray(golden["tied_b"])[None],
    jnp.asarray(golden[f"out{blocks}_w"]).T,
    jnp.asarray(golden[f"out{blocks}_b"]),
  )
  logits = acceptance_logits(tie_blocks(shared, blocks), golden["hidden"])
  # float32 sums in another order.
  np.testing.assert_allclose(logits, golden[f"logits_layers{blocks}"], atol=1e-6)
  for weight in (1, 6):
    total, count = weighted_cross_entropy(logits, golden["soft_labels"], weight)
    np.testing.assert_allclose(total / count, golden[f"loss_layers{blocks}_w{weight}"], rtol=1e-5)
  # The official metric adds the labels' entropy to the cross-entropy, where a divergence subtracts
  # it: it is the divergence and twice the entropy.
  labels = golden["soft_labels"][golden["soft_labels"] != IGNORED]
  predicted = jax.nn.softmax(logits)[..., 1][golden["soft_labels"] != IGNORED]
  divergence = bernoulli_kl(labels, predicted).mean()
  entropy = stats.bernoulli.entropy(labels).mean()
  np.testing.assert_allclose(divergence + 2 * entropy, golden[f"kl_layers{blocks}"], rtol=1e-5)


def test_loss_is_plain_cross_entropy_without_weights_and_soft_labels():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(4, 6, 2)), jnp.float32)
  labels = rng.integers(0, 2, (4, 6))
  total, count = weighted_cross_entropy(logits, labels.astype(np.float32), 1.0)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  assert count == 24
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
  # Ignored positions change nothing, whatever the logits there.
  some = np.where(np.arange(6) < 3, labels, IGNORED).astype(np.float32)
  changed = logits.at[:, 3:].set(7.0)
  for weight in (1.0, 6.0):
    found = weighted_cross_entropy(changed, some, weight)
    expected = weighted_cross_entropy(logits[:, :3], some[:, :3], weight)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  # 0 log 0 = 0.
  np.testing.assert_allclose(bernoulli_kl(jnp.array([0.0, 1.0]), 0.5), np.log(2), rtol=1e-6)


def test_token_mixing():
  text, drafts = jnp.zeros((200, 50), jnp.int32), jnp.ones((200, 50), jnp.int32)
  labels = jnp.full((200, 50), 0.5)
  mixed, kept = mix_tokens(jax.random.key(0), text, drafts, labels, 0.15)
  # 10,000 draws: four standard errors are 0.014.
  assert abs(float((mixed == 0).mean()) - 0.15) < 0.0143
  np.testing.assert_array_equal(kept == IGNORED, mixed == 0)
  mixed, kept = mix_tokens(jax.random.key(0), text, drafts, labels, 0.0)
  assert (mixed == 1).all() and (kept == 0.5).all()


def test_expected_acceptance_and_residual_on_tables():
  p, q = np.random.default_rng(0).dirichlet(np.ones(7), 2)
  labels = soft_labels(np.log(p), np.log(q))
  np.testing.assert_allclose((q * labels).sum(), 1 - np.abs(p - q).sum() / 2, rtol=1e-6)
  residual = np.maximum(p - q, 0)
  mixture = np.minimum(p, q) + (1 - np.minimum(p, q).sum()) * residual / residual.sum()
  np.testing.assert_allclose(mixture, p, rtol=1e-12)


def test_distillation_loss_is_the_divergence_from_the_target(models):
  tokens = jax.random.randint(jax.random.key(2), (4, 6), 0, 5)
  segments = jnp.ones_like(tokens).at[:, 4:].set(0)
  positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
  batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
  graphdef, params = nnx.split(models[1])
  optimizer = optax.sgd(0.0)
  step = distillation_step(graphdef, models[0], 0.3, optimizer)
  state = init_train_state(jax.tree.map(jnp.copy, params), optimizer, jax.random.key(0))
  loss = step(state, batch)[1]["loss"]
  p, q = (np.float64(jax.nn.softmax(model(tokens[:, :4])[0] / 0.3)) for model in models)
  np.testing.assert_allclose(loss, special.rel_entr(p, q).sum(-1).mean(), rtol=1e-4)


# Rows, tokens of each and drafts of a round in the engine.
ROWS, NEW, DRAFTS = 16_000, 3, 3
PROMPT = [1, 2, 3]
ADAPTIVE = np.arange(ROWS) < ROWS // 2


def adaptive_policy(draft):
  head = init_head(jax.random.key(5), draft.config.hidden_size, 1)
  return threshold_policy(head, 0.5, batch=ROWS, shortest=1, longest=DRAFTS)


@pytest.fixture(scope="module")
def decoded(models):
  """Texts and costs of SpecDec++ in half of the rows and of the heuristic in the others."""
  policies = adaptive_policy(models[1]), heuristic(ROWS, initial=1)

  def stop(states, draft):
    results = [p.stop(state, draft) for p, state in zip(policies, states)]
    return tuple(r[0] for r in results), jnp.where(ADAPTIVE, results[0][1], results[1][1])

  def observe(states, drafts, accepted):
    return tuple(p.observe(state, drafts, accepted) for p, state in zip(policies, states))

  found, counts = speculative_generate(
    *models,
    [PROMPT] * ROWS,
    policy=Policy(stop, observe, tuple(p.state for p in policies)),
    max_new_tokens=NEW,
    max_drafts=DRAFTS,
    key=jax.random.key(0),
    sampling=SAMPLED,
  )
  return np.array(found), counts


def test_policies_keep_the_target_s_distribution(models, decoded):
  """Chi-square of three tokens against their exact joint distribution."""
  texts, counts = decoded
  triples = np.stack(np.meshgrid(*[np.arange(5)] * NEW, indexing="ij"), -1).reshape(-1, NEW)
  known = np.concatenate([np.tile(PROMPT, (125, 1)), triples], axis=1)
  log_p = jax.nn.log_softmax(models[0](jnp.asarray(known))[0])[:, 2:5]
  log_p = jnp.take_along_axis(log_p, jnp.asarray(triples)[..., None], axis=-1)[..., 0].sum(axis=1)
  expected = ROWS // 2 * np.exp(np.asarray(log_p, np.float64))
  # Texts that are rarely to be expected are counted together.
  rare = expected < 5
  together = lambda counts: np.append(counts[~rare], counts[rare].sum())
  for rows in (ADAPTIVE, ~ADAPTIVE):
    drafted, accepted, calls = (
      np.asarray(x)[rows] for x in (counts.drafted, counts.accepted, counts.target_calls)
    )
    assert 0.2 < accepted.sum() / drafted.sum() < 0.95
    assert len(set((drafted / calls).tolist())) > 1
    observed = np.bincount(texts[rows] @ [25, 5, 1], minlength=125)
    observed, wanted = together(observed), together(expected)
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_replay_costs_what_decoding_costs(models, decoded):
  draw = {"new_tokens": NEW + DRAFTS + 1, "sampling": SAMPLED}
  rows, key = 2000, jax.random.key(3)
  texts = continue_prompts(models[0], [PROMPT] * rows, key=key, **draw)
  log = decision_log(*models, texts, max_drafts=DRAFTS, key=key, **draw)
  policy = adaptive_policy(models[1])
  policy = policy._replace(state=policy.state._replace(all_accepted=jnp.ones(rows)))
  replayed = replay(log, [policy], max_drafts=DRAFTS, sampling=SAMPLED)
  for name in Statistics._fields:
    a = np.asarray(getattr(replayed, name))[0]
    b = np.asarray(getattr(decoded[1], name))[ADAPTIVE]
    assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / len(a) + b.var() / len(b)), name
  # Some rounds go on behind a rejected draft.
  assert (replayed.drafted > replayed.accepted + replayed.target_calls).any()


def table_log(accepted: np.ndarray, max_drafts: int) -> DecisionLog:
  """A log whose states are zero."""
  rows, length = accepted.shape
  return DecisionLog(
    accepted=jnp.asarray(accepted),
    tokens=jnp.zeros((rows, length), jnp.int32),
    hidden=jnp.zeros((rows, length, 4)),
    after_tokens=jnp.zeros((rows, length, max_drafts - 1), jnp.int32),
    after_hidden=jnp.zeros((rows, length, max_drafts - 1, 4)),
    num_tokens=jnp.full(rows, length - max_drafts - 1),
    draft_head=jnp.zeros((4, 5)),
  )


def test_replay_on_tables():
  max_drafts, rng = 6, np.random.default_rng(0)
  accepted = rng.random((400, 107)) < 0.7
  log = table_log(accepted, max_drafts)
  options = {"max_drafts": max_drafts, "sampling": SAMPLED}
  found = replay(log, [constant(k) for k in (1, 3, 6)], **options)
  # By hand.
  for i, length in enumerate((1, 3, 6)):
    for row in range(3):
      begin = calls = kept = 0
      while begin < 100:
        run = 0
        while run < length and accepted[row, begin + run]:
          run += 1
        begin, calls, kept = begin + run + 1, calls + 1, kept + run
      assert (found.target_calls[i, row], found.accepted[i, row]) == (calls, kept)
  np.testing.assert_array_equal(found.drafted, np.array([[1], [3], [6]]) * found.target_calls)
  # (1 - alpha^(K + 1)) / (1 - alpha); a call's tokens have a standard deviation of about K / 2, and
  # there are more than 10,000 calls.
  per_call = 1 + found.accepted.sum(axis=1) / found.target_calls.sum(axis=1)
  np.testing.assert_allclose(per_call, mdp.tokens_per_call(0.7, np.array([1, 3, 6])), atol=0.1)
  # A constant predictor of 0.7 makes a constant length, and bounds hold.
  out_bias = jnp.log(jnp.array([0.3, 0.7]))
  head = AcceptanceHead(jnp.zeros((0, 4, 4)), jnp.zeros((0, 4)), jnp.zeros((4, 2)), out_bias)
  adaptive = lambda h: threshold_policy(head, h, batch=400, shortest=2, longest=6)
  scored = replay(log, [adaptive(h) for h in (0.0, 0.4, 0.6, 1.0)], **options)
  # The newest token is sent without a score: 0.7^2 < 1 - 0.4 stops behind the third.
  lengths = np.array([[2], [3], [4], [6]])
  np.testing.assert_array_equal(scored.drafted, lengths * scored.target_calls)
  np.testing.assert_array_equal(scored.accepted[1], found.accepted[1])
  known = oracle(log, max_drafts=max_drafts)
  np.testing.assert_array_equal(known.target_calls, found.target_calls[2])
  np.testing.assert_array_equal(known.drafted, found.accepted[2])
  drawn = replay(log, [random_length(jax.random.key(0), 400, 6)], **options)
  assert abs(float(drawn.drafted.sum() / drawn.target_calls.sum()) - 3.5) < 0.1
  # Equal models: nothing is rejected; disjoint ones: everything.
  for share, tokens in ((1.0, 4), (0.0, 1)):
    extreme = table_log(np.full((2, 107), bool(share)), max_drafts)
    counts = replay(extreme, [constant(3)], **options)
    np.testing.assert_array_equal(counts.accepted, (tokens - 1) * counts.target_calls)


def test_dynamic_programming_finds_a_threshold():
  lengths = np.arange(1, 25)
  alike = mdp.AcceptanceProcess(1.0, 0.8, 0.8)
  best = mdp.solve(alike, 1.0, 10.0, max_drafts=24)
  costs = mdp.cost_per_token(0.8, lengths, 1.0, 10.0)
  # float32, and a cost between 0 and 10.
  np.testing.assert_allclose(best.cost, costs.min(), rtol=1e-5)
  stops = np.asarray(best.stops)[np.arange(24), np.arange(24)]
  assert np.argmax(stops) == lengths[np.argmin(costs)]
  # Two kinds of tokens: every state stops or goes on as a threshold on C says.
  mixed = mdp.AcceptanceProcess(0.6, 0.95, 0.3)
  best = mdp.solve(mixed, 1.0, 10.0, max_drafts=24)
  meant = np.arange(25) <= np.arange(24)[:, None]
  all_accepted, stops = np.asarray(best.all_accepted)[meant], np.asarray(best.stops)[meant]
  assert 0 < best.threshold < 1 and stops.any() and not stops.all()
  np.testing.assert_array_equal(stops, all_accepted <= 1 - float(best.threshold))
  # And seeing the kinds is worth something.
  assert best.cost < mdp.cost_per_token(0.69, lengths, 1.0, 10.0).min()


def test_costs_and_frontiers():
  statistics = Statistics(
    *(np.array(x) for x in ([[2, 3], [1, 1]], [[8, 12], [1, 2]], [[5, 5], [1, 2]]))
  )
  found = frontier.rates(statistics)
  np.testing.assert_allclose(found.discard, [10 / 15, 0])
  np.testing.assert_allclose(found.verification, [5 / 15, 2 / 5])
  # 10 passes of the draft to one of the target: 15 tokens for 20 + 50.
  np.testing.assert_allclose(frontier.modelled_speedup(found, 10.0)[0], 150 / 70)
  line = frontier.Rates(np.array([0.0, 1.0]), np.array([1.0, 0.5]), np.zeros(2))
  below = line._replace(verification=line.verification - 0.1)
  np.testing.assert_allclose(frontier.verification_at(line, 0.5), 0.75)
  comparison = frontier.compare_frontiers(below, line)
  np.testing.assert_allclose(comparison, (0.1, -0.1), rtol=1e-12)


def test_head_quality_counts_soft_labels_by_their_weight():
  head = init_head(jax.random.key(0), 4, 1)
  hidden = jax.random.normal(jax.random.key(1), (3000, 4))
  labels = acceptance_probability(head, hidden)
  soft = head_quality(head, hidden, labels)
  assert soft.ece < 1e-5
  drawn = np.random.default_rng(0).random(3000) < np.asarray(labels)
  hard = head_quality(head, hidden, drawn)
  # The standard error of an AUROC of 3,000 is about 0.01.
  assert abs(soft.auroc - hard.auroc) < 0.04 and soft.auroc > 0.55


def test_bad_input_is_refused(tmp_path, models):
  config = config_module.get_config("tiny")
  for name, value, expected in (
    ("mixing", 1.0, r"mixing=1.0: expected in \[0, 1\)"),
    ("min_drafts", 9, "min_drafts=9: expected 1 to max_drafts"),
    ("new_tokens", 7, "new_tokens=7: expected > max_drafts"),
    ("constants", (1, 9), "at least two lengths from 1 to max_drafts"),
    ("thresholds", (0.0,), "thresholds=.*numbers in"),
    ("draft_objective", "none", "draft_objective=none: expected text or target"),
    ("draft", "nowhere", "draft=nowhere: there is no such folder"),
    ("head", "nowhere", "head=nowhere: there is no such file"),
  ):
    wrong = config.copy_and_resolve_references()
    wrong[name] = value
    with pytest.raises(UserError, match=expected):
      check_config(wrong)
  other = random_decoder(dataclasses.replace(models[1].config, vocab_size=7))
  with pytest.raises(UserError, match="7 tokens, the target 5: expected one vocabulary"):
    check_models(models[0], other)
  head, path = init_head(jax.random.key(0), 4, 2), tmp_path / "head.safetensors"
  save_head(path, head)
  jax.tree.map(np.testing.assert_array_equal, load_head(path, 4), head)
  with pytest.raises(UserError, match=r"kernels has shape \(2, 4, 4\), expected \(2, 8, 8\)"):
    load_head(path, 8)
  save_head(path, head._replace(out_bias=jnp.array([0.0, jnp.nan])))
  with pytest.raises(UserError, match="out_bias has NaN or infinite values"):
    load_head(path, 4)
  with pytest.raises(UserError, match="cannot read the head"):
    load_head(tmp_path / "none", 4)
  with pytest.raises(UserError, match="gsm8k has instructions"):
    prompts.load_prompts(
      "gsm8k", None, split="test", count=1, prompt_length=8, instructions=False, seed=0
    )


def test_tiny_run(tmp_path):
  report = experiment.run(config_module.get_config("tiny"), tmp_path)
  assert len(report.claims) == 7
  costs = {row[0]: row for row in report.tables[0].rows}
  assert {"target alone", "constant K=4", "SpecDec++ h=0.3", "heuristic (+2 / -1)"} <= set(costs)
  assert costs["oracle"][1] == 0
  assert costs["oracle"][4] >= max(row[4] for row in costs.values())
  assert (tmp_path / "frontier.png").is_file() and (tmp_path / "head_0.safetensors").is_file()
