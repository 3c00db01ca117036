import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.models.decoder import Decoder, DecoderConfig
from common.models.encoder_decoder import EncoderDecoder
from projects.lm_cascades import (
  ablations,
  deferral,
  experiment,
  metrics,
  outputs,
  post_hoc,
  rules,
  tasks,
)
from projects.lm_cascades import config as lm_cascades_config
from projects.lm_cascades.cascade import generation_flops, run_cascade
from projects.lm_cascades.translation import EOS, make_language, make_pairs, model_config

ALPHAS = np.array([0, 0.1, 0.37, 0.5, 1], np.float32)
BATCH, SLOTS = 6, 5


@pytest.fixture(scope="module")
def rng():
  return np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
  return EncoderDecoder(model_config(16, 1), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def prompts():
  return [[5, 9], [7], [11, 30, 40], [2, 3, 4, 50], [60, 61], [8, 12, 70]]


@pytest.fixture(scope="module")
def greedy(model, prompts):
  decoding = {"max_new_tokens": SLOTS, "stop_token": EOS, "batch_size": BATCH}
  return outputs.greedy_decode(model, prompts, **decoding)


def test_chow_scores_equal_numpy(rng):
  lengths = np.array([1, 2, 5, 7])
  mask = np.arange(7) < lengths[:, None]
  log_probs = -rng.exponential(size=mask.shape).astype(np.float32)
  quantiles = np.asarray(deferral.chow_quantile(log_probs, mask, ALPHAS))
  sums, means = deferral.chow_sum(log_probs, mask), deferral.chow_average(log_probs, mask)
  for i, length in enumerate(lengths):
    row = log_probs[i, :length]
    np.testing.assert_allclose(quantiles[i], np.quantile(row, ALPHAS), atol=1e-6)
    assert sums[i] == pytest.approx(row.sum(), rel=1e-6)
    assert means[i] == pytest.approx(row.mean(), rel=1e-6)
  # Invariant 2: of one token all rules are the same.
  np.testing.assert_allclose(quantiles[0], np.full(5, sums[0]), rtol=1e-6)
  assert means[0] == sums[0]


def test_constant_log_probs_only_the_sum_sees_the_length():
  mask = np.arange(7) < np.array([2, 4, 7])[:, None]
  log_probs = np.full(mask.shape, -0.5, np.float32)
  np.testing.assert_allclose(deferral.chow_sum(log_probs, mask), [-1, -2, -3.5])
  np.testing.assert_allclose(deferral.chow_average(log_probs, mask), [-0.5] * 3)
  quantiles = deferral.chow_quantile(log_probs, mask, ALPHAS)
  np.testing.assert_allclose(quantiles, np.full((3, 5), -0.5))
  np.testing.assert_array_equal(deferral.length_score(mask), [-2, -4, -7])


def brute_force_curve(scores, small, large):
  """Mean quality of every deferral count, over explicit orders of the ties (tie sizes <= 2)."""
  curves = []
  for sign in (1, -1):  # Both orders of every pair.
    order = np.lexsort((sign * np.arange(len(scores)), scores))
    quality = [small.mean()]
    answers = small.copy()
    for i in order:
      answers[i] = large[i]
      quality.append(answers.mean())
    curves.append(quality)
  return np.mean(curves, axis=0)


def test_auc_dc_equals_brute_force_with_ties(rng):
  scores = np.repeat(np.arange(10), 2).astype(np.float32)
  scores = rng.permutation(scores)
  small, large = rng.random((2, 20)).astype(np.float32)
  wanted = brute_force_curve(scores, small, large)
  curve = np.asarray(deferral.deferral_curve(scores, small, large))
  np.testing.assert_allclose(curve, wanted, atol=1e-6)
  # Invariant 4: the ends are the models' own.
  assert curve[0] == pytest.approx(small.mean()) and curve[-1] == pytest.approx(large.mean())
  area = float(deferral.auc_dc(scores, small, large))
  assert area == pytest.approx(np.trapezoid(wanted, dx=1 / 20), abs=1e-6)
  step = float(deferral.auc_dc(scores, small, large, rule="step"))
  assert step == pytest.approx(wanted[:-1].mean(), abs=1e-6)


def test_auc_dc_depends_on_the_order_alone(rng):
  scores = rng.normal(size=20).astype(np.float32)
  small, large = rng.random((2, 20)).astype(np.float32)
  area = lambda s: float(deferral.auc_dc(s, small, large))
  middle = float(deferral.random_auc_dc(small, large))
  assert area(np.exp(2 * scores) - 3) == area(scores)
  assert area(-scores) - middle == pytest.approx(middle - area(scores), abs=1e-6)
  assert area(np.zeros(20, np.float32)) == pytest.approx(middle, abs=1e-6)
  best = area(np.asarray(deferral.oracle_score(small, large)))
  others = [area(rng.normal(size=20).astype(np.float32)) for _ in range(50)]
  assert best >= max(others)
  # The mean over random orders is the straight line's (0.02: five standard errors of the mean).
  assert np.mean(others) == pytest.approx(middle, abs=0.02)


def test_bootstrap_of_the_oracle_stays_above_random(rng):
  small, large = rng.random((2, 20)).astype(np.float32)
  scores = np.stack([small - large, np.zeros(20, np.float32)])
  gains = np.asarray(
    deferral.bootstrap_gains(scores, small, large, jax.random.key(0), resamples=20)
  )
  assert gains.shape == (20, 2) and (gains[:, 0] > 0).all()
  np.testing.assert_allclose(gains[:, 1], 0, atol=1e-4)


def test_threshold_defers_the_requested_share(rng):
  scores = rng.normal(size=50).astype(np.float32)
  for rate in (0.0, 0.1, 0.5, 1.0):
    threshold = float(deferral.threshold_for_rate(scores, rate))
    assert (scores < threshold).sum() == round(50 * rate)
  # Invariant 10: on other inputs of the same kind, within four standard errors.
  other = rng.normal(size=2000)
  threshold = float(deferral.threshold_for_rate(rng.normal(size=2000).astype(np.float32), 0.3))
  assert abs((other < threshold).mean() - 0.3) < 4 * (0.21 / 2000 * 2) ** 0.5


def test_cached_decoding_equals_teacher_forcing(model, prompts, greedy):
  rescored, embedding = outputs.rescore(model, prompts, greedy, stop_token=EOS, batch_size=BATCH)
  mask = greedy.mask
  np.testing.assert_allclose(rescored.log_probs, np.where(mask, greedy.log_probs, 0), atol=1e-5)
  np.testing.assert_allclose(rescored.entropies, np.where(mask, greedy.entropies, 0), atol=1e-5)
  # Chow-Sum is -n times the mean cross-entropy, row by row without any padding.
  inputs = jnp.asarray([[0, *greedy.tokens[0, :-1]]])
  logits = model(jnp.asarray(prompts[:1]), inputs)
  log_p = jax.nn.log_softmax(logits)[0, np.arange(SLOTS), greedy.tokens[0]]
  assert deferral.chow_sum(greedy.log_probs, mask)[0] == pytest.approx(
    float(log_p[mask[0]].sum()), abs=1e-4
  )
  # The embedding is what the (tied, scaled) head reads: its product with a table is the logits.
  state = outputs.decoder_states(
    *nnx.split(model),
    jnp.asarray(prompts[:1]),
    jnp.ones((1, 2), int),
    jnp.asarray(greedy.tokens[:1]),
  )
  table = model.embed_tokens.embedding[...]
  np.testing.assert_allclose(state @ table.T * 16**-0.5, logits, atol=1e-4)
  np.testing.assert_allclose(embedding[0], state[0][mask[0]].mean(axis=0), atol=1e-4)


def test_the_intermediate_state_needs_the_prompt_alone(model, prompts, greedy):
  states = {"num_layers": 1, "stop_token": EOS, "batch_size": BATCH}
  first = outputs.intermediate_embedding(model, prompts, **states)
  arguments = jnp.asarray(prompts[:1]), jnp.ones((1, 2), int), jnp.asarray(greedy.tokens[:1])
  whole = outputs.decoder_states(*nnx.split(model), *arguments)
  np.testing.assert_allclose(first[0], whole[0, 0], atol=1e-4)


def test_the_stop_token_counts_unless_told_otherwise():
  tokens = np.array([[4, 5, EOS, EOS], [EOS] * 4, [4, 5, 6, 7]])
  mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
  written = outputs.Outputs(tokens, np.zeros((3, 4)), np.zeros((3, 4)), mask)
  assert outputs.scored_mask(written, EOS).sum(axis=1).tolist() == [3, 1, 4]
  without = outputs.scored_mask(written, EOS, include_eos=False)
  assert without.sum(axis=1).tolist() == [2, 1, 4]
  assert written.texts(EOS) == [[4, 5], [], [4, 5, 6, 7]]


def test_cascade_asks_the_large_model_for_the_deferred_only(model, prompts, greedy):
  large = EncoderDecoder(model_config(16, 1), rngs=nnx.Rngs(1))
  decoding = {"max_new_tokens": SLOTS, "stop_token": EOS, "batch_size": BATCH}
  score = lambda prompts, written: deferral.chow_sum(written.log_probs, written.mask)
  scores = np.asarray(score(prompts, greedy))
  threshold = float(deferral.threshold_for_rate(scores, 1 / 3))
  answers = run_cascade(model, large, prompts, score, threshold, **decoding)
  others = outputs.greedy_decode(large, prompts, **decoding).texts(EOS)
  assert answers.deferred.sum() == 2
  for i, kept in enumerate(greedy.texts(EOS)):
    assert answers.texts[i] == (others[i] if answers.deferred[i] else kept)
  assert answers.texts != greedy.texts(EOS)
  none = run_cascade(model, None, prompts, score, -np.inf, **decoding)
  assert none.texts == greedy.texts(EOS) and not none.deferred.any()


def test_a_decoder_is_scored_as_a_whole_text():
  sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "head_dim": 8}
  sizes |= {"max_position_embeddings": 32}
  decoder = Decoder(
    DecoderConfig(vocab_size=40, num_heads=2, num_kv_heads=2, **sizes), rngs=nnx.Rngs(0)
  )
  prompts = [[3, 4, 5], [6]]
  decoding = {"stop_token": 1, "batch_size": 2}
  written = outputs.greedy_decode(decoder, prompts, max_new_tokens=4, **decoding)
  rescored, embedding = outputs.rescore(decoder, prompts, written, **decoding)
  np.testing.assert_allclose(
    rescored.log_probs, np.where(written.mask, written.log_probs, 0), atol=1e-5
  )
  text = jnp.asarray([[*prompts[0], *written.tokens[0]]])
  log_p = jax.nn.log_softmax(decoder(text)[0])[0, 2:6]
  picked = log_p[np.arange(4), written.tokens[0]]
  np.testing.assert_allclose(
    rescored.log_probs[0][written.mask[0]], picked[written.mask[0]], atol=1e-5
  )
  assert embedding.shape == (2, 16)


def test_flops_count_every_matrix():
  config = model_config(16, 1)
  # One source and one target token: every weight of both layers and the head once.
  graphdef, state = nnx.split(EncoderDecoder(config, rngs=nnx.Rngs(0)))
  kernels = sum(x.size for path, x in nnx.to_flat_state(state) if path[-1] == "kernel")
  attention = 2 * 16 * (1 + 1 + 1)
  wanted = 2 * (kernels + attention + 16 * config.vocab_size)
  assert generation_flops(config, np.array([1]), np.array([1])).tolist() == [wanted]
  longer = generation_flops(config, np.array([1, 1]), np.array([2, 3]))
  assert wanted < longer[0] < longer[1]


def labels_of(rng, n):
  small, large = rng.random((2, n)).astype(np.float32)
  return post_hoc.Labels(
    small, large, (small > 0.5).astype(np.float32), (large > 0.5).astype(np.float32)
  )


FIT = {"runs": 2, "hidden": 8, "learning_rate": 1e-2, "batch_size": 16, "epochs": 30}


def test_a_learned_rule_with_the_gain_as_feature_reaches_the_oracle(rng):
  n = 240
  labels = labels_of(rng, n)
  gain = labels.target("diff_quality")
  rows = np.arange(n)
  fit = {"train": rows[:120], "validation": rows[120:160], "key": jax.random.key(0), **FIT}
  test = rows[160:]
  small, large = labels.small[test], labels.large[test]
  scorer = post_hoc.fit(gain[:, None], labels, target="diff_quality", **fit)
  scores = post_hoc.predict(scorer, gain[test, None])
  best = float(deferral.percent_gain(small - large, small, large))
  for score in scores:
    assert float(deferral.percent_gain(score, small, large)) > 0.9 * best
  # The other targets share the program; the small model's quality says whether it is right.
  for target in ("correct1", "diff01"):
    scorer = post_hoc.fit(labels.small[:, None], labels, target=target, **fit)
    score = post_hoc.predict(scorer, labels.small[test, None])[0]
    right = labels.small_right[test] > 0.5
    assert score[right].mean() > score[~right].mean()
    assert ((0 <= scorer.best_epoch) & (scorer.best_epoch < FIT["epochs"])).all()


def test_isotonic_gains_fall_with_the_score(rng):
  scores = rng.normal(size=200)
  expected = post_hoc.calibrate(scores, -scores + rng.normal(size=200))
  predicted = expected.predict(np.sort(scores))
  assert (np.diff(predicted) <= 0).all() and predicted[0] > predicted[-1]


def test_quantile_features_hold_what_their_name_says(greedy):
  phi = post_hoc.quantile_features(greedy.log_probs, greedy.mask)
  assert phi.shape == (BATCH, 14)
  row = greedy.log_probs[0][greedy.mask[0]]
  wanted = [*np.quantile(row, np.linspace(0, 1, 11)), row.sum(), row.mean(), np.log(len(row))]
  np.testing.assert_allclose(phi[0], wanted, atol=1e-5)


def test_metrics():
  assert metrics.token_f1("a b c".split(), "b c d e".split()) == pytest.approx(4 / 7)
  assert metrics.token_f1([], []) == 1 and metrics.token_f1([], ["a"]) == 0
  assert metrics.exact_match([1, 2], [1, 2]) == 1 and metrics.exact_match([1], [1, 2]) == 0


def test_difficulty_does_not_depend_on_length():
  language = make_language(np.random.default_rng(0))
  sources, targets = make_pairs(language, 2000, 20, np.random.default_rng(1))
  lengths = np.array([len(s) for s in sources])
  hard = np.array([sum(language.second_sense[t - 2] > 0 for t in s) for s in sources])
  assert [len(t) for t in targets] == lengths.tolist()
  assert lengths.min() == 2 and lengths.max() == 20
  long = lengths > 10
  # Short sentences cannot hold the most hard words; from 5 words on the means are alike.
  assert abs(hard[long].mean() - hard[~long & (lengths > 4)].mean()) < 0.3


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("tasks", ("translate",), "did you mean translation"),
    ("metric", "bleurt", "unknown metric"),
    ("target", "gain", "unknown target"),
    ("validation_share", 1.0, "validation_share"),
    ("deferral_rate", 0.0, "deferral_rate"),
    ("examples", 10, "at least 40"),
    ("embed_layers", 9, "embed_layers=9"),
    ("seeds", (), "seeds is empty"),
    ("longest", 99, "longest=99"),
  ],
)
def test_a_config_that_cannot_run_is_one_clear_line(field, value, message, tmp_path):
  settings = lm_cascades_config.get_config("tiny")
  with settings.ignore_type():
    settings[field] = value
  with pytest.raises(UserError, match=message):
    experiment.run(settings, tmp_path)


def test_missing_files_are_named(tmp_path):
  settings = lm_cascades_config.get_config("paper")
  settings.calibration_file = str(tmp_path / "none.jsonl")
  with pytest.raises(UserError, match="none.jsonl"):
    experiment.run(settings, tmp_path)
  path = tmp_path / "q.npy"
  np.save(path, np.full((3, 2), np.nan))
  with pytest.raises(UserError, match="NaN"):
    tasks.read_quality(str(path), 3)
  with pytest.raises(UserError, match=r"expected \[4, 2\]"):
    tasks.read_quality(str(path), 4)
  with pytest.raises(UserError, match="cannot read"):
    tasks.read_quality(str(tmp_path / "none.npy"), 4)


def test_tiny_run(tmp_path, monkeypatch):
  report = experiment.run(lm_cascades_config.get_config("tiny"), tmp_path)
  assert len(report.claims) == 9 and len(report.tables) == 6
  assert all((tmp_path / figure.path).is_file() for figure in report.figures)
  json.dumps(report.to_json(), allow_nan=False)
  gains = {row[0]: row[2] for row in report.tables[0].rows}
  assert gains["oracle"] >= max(gains.values())
  # Killed here, it would train, decode, fit and search nothing again.
  for module, expensive in (
    (tasks, "translation_task"),
    (rules, "measure"),
    (rules, "fit_rule"),
    (experiment, "run_cascade"),
    (ablations, "beam_search"),
  ):
    monkeypatch.setattr(module, expensive, None)
  again = experiment.run(lm_cascades_config.get_config("tiny"), tmp_path)
  assert again.to_json() == report.to_json()
