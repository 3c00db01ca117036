import json
import pathlib
import zlib

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import roc_auc_score

from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.models.decoder import Decoder
from common.models.encoder import Encoder, EncoderConfig
from projects.min_k_prob import benchmark, case_studies, config, detect, experiment, files
from projects.min_k_prob import metrics as m
from projects.min_k_prob import min_k_prob as mk
from projects.min_k_prob import neighbours as n
from projects.min_k_prob.paraphrase import paraphrase
from projects.min_k_prob.pretraining import decoder_config, packed_rows
from projects.min_k_prob.token_log_probs import encode, token_log_probs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "min_k_prob"
TEXTS = [
  "def f(x):\n  return x",
  "The file is not open, so it cannot be read.",
  "a b",
  "os.path" * 6,
]


@pytest.fixture(scope="module")
def tokenizer():
  return load_tokenizer("embedded-512")


@pytest.fixture(scope="module")
def model():
  return Decoder(decoder_config(512, 16, 1, 64), rngs=nnx.Rngs(0))


def as_log_probs(values):
  """NaN-padded [texts, length] -> TokenLogProbs."""
  values = np.atleast_2d(values)
  counts = np.isfinite(values).sum(axis=1)
  filled = np.nan_to_num(values).astype(np.float32)
  return mk.TokenLogProbs(filled, counts, np.zeros(values.shape, np.int32))


@pytest.fixture
def log_probs():
  rng = np.random.default_rng(0)
  values = -rng.gamma(1.0, 2.0, size=(5, 40))
  for row, count in enumerate((40, 17, 3, 1, 26)):
    values[row, count:] = np.nan
  return as_log_probs(values)


def test_scores_are_those_of_the_official_code():
  golden = np.load(GOLDEN / "scores.npz")
  target, lower, ref = (
    as_log_probs(golden[name]) for name in ("logprobs", "logprobs_lower", "logprobs_ref")
  )
  texts = [str(text) for text in golden["texts"]]
  found = mk.attack_scores(texts, target, lowercase=lower, reference=ref)
  columns = [mk.perplexity(target)]
  columns += [-found[name] for name in (mk.REFERENCE, mk.LOWERCASE, mk.ZLIB)]
  columns += [-mk.min_k_prob(target, k) for k in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
  # Log-probabilities in float32 (2^-24 relative), summed over at most 80.
  np.testing.assert_allclose(np.stack(columns, axis=1), golden["scores"], rtol=3e-6, atol=1e-7)


def test_detection_is_that_of_the_official_code_and_of_brute_force():
  golden = np.load(GOLDEN / "roc.npz")
  members = golden["labels"].astype(bool)
  for row, expected in zip(
    golden["predictions_lower_is_member"], golden["auc_acc_tpr_at_5pct_fpr"]
  ):
    found = m.detection(-row, members)
    np.testing.assert_allclose([found.auc, found.accuracy, found.tpr_at_5], expected, rtol=1e-12)
    assert found.tpr_at_1 <= found.tpr_at_5
    flipped = m.detection(-row, ~members)
    assert flipped.auc == pytest.approx(1 - found.auc)
    # The threshold of the best accuracy gives it.
    called = -row >= m.best_threshold(-row, members)
    accuracy = (called[members].mean() + 1 - called[~members].mean()) / 2
    assert accuracy == pytest.approx(found.accuracy)
  with pytest.raises(UserError, match="0 of 3 texts are members: expected both"):
    m.detection(np.zeros(3), np.zeros(3, bool))


def test_min_k_by_brute_force(log_probs):
  for k in (0.05, 0.2, 0.5, 0.6, 1.0):
    found = mk.min_k_prob(log_probs, k)
    largest = mk.max_k_prob(log_probs, k)
    for row, count in enumerate(log_probs.num_tokens):
      ordered = np.sort(log_probs.values[row, :count].astype(np.float64))
      size = max(1, int(k * count))
      assert found[row] == pytest.approx(ordered[:size].mean(), rel=1e-5)
      assert largest[row] == pytest.approx(ordered[-size:].mean(), rel=1e-5)


def test_min_k_invariants(log_probs):
  values, counts = log_probs.values, log_probs.num_tokens
  sweep = np.stack([mk.min_k_prob(log_probs, k) for k in (0.001, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)])
  assert (np.diff(sweep, axis=0) >= -1e-5).all()
  np.testing.assert_allclose(sweep[-1], -mk.loss(log_probs), rtol=1e-5)
  smallest = [values[row, :count].min() for row, count in enumerate(counts)]
  np.testing.assert_array_equal(sweep[0], np.float32(smallest))
  # Order does not matter, and a constant shifts the score.
  rng = np.random.default_rng(1)
  shuffled = values.copy()
  for row, count in enumerate(counts):
    shuffled[row, :count] = rng.permutation(values[row, :count])
  expected = mk.min_k_prob(log_probs)
  np.testing.assert_allclose(
    mk.min_k_prob(log_probs._replace(values=shuffled)), expected, rtol=1e-5
  )
  shifted = log_probs._replace(values=values - 3)
  np.testing.assert_allclose(mk.min_k_prob(shifted), expected - 3, rtol=1e-5)
  # Random subsets: between the two extremes, and all tokens at k = 1.
  key = jax.random.key(0)
  drawn = mk.random_k_prob(log_probs, key)
  assert ((drawn >= expected - 1e-5) & (drawn <= mk.max_k_prob(log_probs) + 1e-5)).all()
  np.testing.assert_allclose(mk.random_k_prob(log_probs, key, 1.0), sweep[-1], rtol=1e-5)
  assert list(mk.subset_size(np.array([1, 4, 5, 10, 100]), 0.2)) == [1, 1, 1, 2, 20]
  assert [int(mk.subset_size(np.array([n]), k)[0]) for n, k in ((10, 0.3), (100, 0.29))] == [
    int(10 * 0.3),
    int(100 * 0.29),
  ]
  with pytest.raises(ValueError, match="k=0 must be in"):
    mk.min_k_prob(log_probs, 0)


def test_outlier_tokens_are_the_least_likely(log_probs):
  values, places = mk.outlier_tokens(log_probs, 3)
  for row, count in enumerate(log_probs.num_tokens):
    order = np.argsort(log_probs.values[row, :count])[:3]
    np.testing.assert_array_equal(places[row, : len(order)], order)
    assert np.isinf(values[row, len(order) :]).all()


def test_baselines(log_probs):
  texts = ["one", "two two", "three", "x" * 50, "five"]
  scores = mk.attack_scores(
    texts,
    log_probs,
    lowercase=log_probs,
    reference=log_probs,
    neighbours=np.repeat(mk.loss(log_probs)[:, None], 3, axis=1) + [0, 1, 2],
  )
  np.testing.assert_array_equal(scores[mk.REFERENCE], 0)
  np.testing.assert_array_equal(scores[mk.LOWERCASE], 1)  # The code's -1, higher for members.
  np.testing.assert_allclose(scores[mk.NEIGHBOUR], 1, rtol=1e-12)
  sizes = [len(zlib.compress(text.encode())) for text in texts]
  np.testing.assert_allclose(scores[mk.ZLIB], -mk.loss(log_probs) / sizes)
  members = np.array([1, 0, 0, 1, 0], bool)
  assert roc_auc_score(members, scores[mk.PPL]) == roc_auc_score(members, -mk.loss(log_probs))
  assert m.detection(scores[mk.REFERENCE], members).auc == 0.5


def test_batched_scores_are_those_of_one_text_and_of_the_logits(model, tokenizer):
  together = token_log_probs(model, tokenizer, TEXTS, bos=True, batch_size=3, pad_to=64)
  without = token_log_probs(model, tokenizer, TEXTS, bos=False, batch_size=3, pad_to=64)
  np.testing.assert_array_equal(together.num_tokens, without.num_tokens + 1)
  for row, text in enumerate(TEXTS):
    alone = token_log_probs(model, tokenizer, [text], bos=True, pad_to=64)
    np.testing.assert_allclose(alone.values[0], together.values[row], atol=1e-5)
    assert not together.values[row, together.num_tokens[row] :].any()
  ids = [1, *tokenizer.encode(TEXTS[1]).ids]
  logits = nnx.jit(lambda model, tokens: model(tokens)[0][0])(model, np.array([ids[:-1]]))
  logits = np.asarray(logits, np.float64)
  expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  expected = expected[np.arange(len(ids) - 1), ids[1:]]
  np.testing.assert_allclose(together.values[1, : len(ids) - 1], expected, atol=1e-5)
  np.testing.assert_array_equal(together.tokens[1, : len(ids) - 1], ids[1:])
  # The first words of a text have the log-probabilities that they have in the text.
  cut = together.prefix(together.num_tokens - 1)
  assert cut.values[0, together.num_tokens[0] - 1] == 0
  np.testing.assert_array_equal(cut.values[1, :3], together.values[1, :3])


def test_words_end_where_tokens_do(tokenizer):
  text = "if x:\n    return os.path.join(a, 'b')  # Don't  stop\n\nclass  B(object):\n\tpass\n"
  whole = tokenizer.encode(text).ids
  for length in range(1, len(text.split()) + 1):
    cut = tokenizer.encode(benchmark.first_words(text, length)).ids
    assert cut == whole[: len(cut)]
  assert benchmark.first_words("a b", 3) is None


def test_scoring_names_bad_input(model, tokenizer):
  with pytest.raises(UserError, match="there are no texts"):
    token_log_probs(model, tokenizer, [])
  with pytest.raises(UserError, match="text 1 .* has 1 token: expected at least two"):
    token_log_probs(model, tokenizer, ["a b", "a"], bos=False)
  with pytest.raises(UserError, match=r"text 0 .* expected at most 9: shorten"):
    token_log_probs(model, tokenizer, [TEXTS[1]], bos=True, pad_to=8)
  with pytest.raises(UserError, match="is the tokenizer another model's"):
    small = Decoder(decoder_config(64, 16, 1, 64), rngs=nnx.Rngs(0))
    token_log_probs(small, tokenizer, TEXTS)
  broken = nnx.clone(model)
  broken.final_norm.scale[...] = broken.final_norm.scale[...] * np.nan
  with pytest.raises(UserError, match="of text 0 .* are NaN or infinite"):
    token_log_probs(broken, tokenizer, TEXTS, bos=True, batch_size=3, pad_to=64)


def test_the_template_of_a_tokenizer_decides_on_bos(tokenizer):
  assert encode(tokenizer, ["a b"])[1] == [0]
  other = load_tokenizer("embedded-512")
  from tokenizers.processors import TemplateProcessing

  other.post_processor = TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
  )
  (row,), prefixes = encode(other, ["a b"])
  assert prefixes == [1] and row == [1, *tokenizer.encode("a b").ids]
  assert encode(other, ["a b"], False)[0] == [row[1:]]


def test_weighted_auc_is_scikit_learns():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, size=30) / 3  # With ties.
  members = rng.random(30) < 0.4
  documents = [str(i // 2) for i in range(30)]
  weights = m.bootstrap_weights(members, documents, 5, rng)
  found = m.weighted_auc(scores, members, weights)
  for weight, auc in zip(weights, found):
    assert auc == pytest.approx(roc_auc_score(members, scores, sample_weight=weight))
  # Texts of one document and class are drawn together; every class keeps its number of documents.
  pairs = [(a, a + 1) for a in range(0, 30, 2) if members[a] == members[a + 1]]
  assert pairs and all((weights[:, a] == weights[:, b]).all() for a, b in pairs)
  random = m.detection(rng.random(400), np.arange(400) < 200)
  assert abs(random.auc - 0.5) <= 3 * np.sqrt(401 / (12 * 200 * 200))


def document(i, date="2020-01-01"):
  rng = np.random.default_rng(i)
  words = " ".join(f"w{j}" for j in rng.integers(0, 10_000, size=70))
  return {"name": f"d{i}", "text": words, "date": date}


def test_benchmarks_are_balanced_distinct_and_of_one_length():
  rng = np.random.default_rng(0)
  members, others = benchmark.split_by_inclusion([document(i) for i in range(20)], rng)
  assert len(members) == len(others) == 10
  others.append({"name": "copy", "text": members[0]["text"] + " end"})
  built = benchmark.build(members, others, length=32, per_class=9, per_document=2, rng=rng)
  assert built.members.sum() == 9 and len(built.texts) == 18
  assert {len(text.split()) for text in built.texts} == {32}
  shared = [text for text in built.texts if text.split()[0] in members[0]["text"].split()[:1]]
  assert len(shared) <= 1  # Of a document and its copy.
  inside = {d["name"] for d in members}
  assert all((name in inside) == flag for name, flag in zip(built.documents, built.members))
  assert 0.1 < benchmark.blind_auc(built) < 0.9
  with pytest.raises(UserError, match="distinct members of 32 words, expected 90"):
    benchmark.build(members, others, length=32, per_class=90, rng=rng)
  # A shift in topic is seen without a model.
  topic = [f"alpha beta {i} gamma" for i in range(20)] + [f"delta {i} eps zeta" for i in range(20)]
  shifted = benchmark.Benchmark(topic, np.arange(40) < 20, [str(i) for i in range(40)])
  assert benchmark.blind_auc(shifted) > 0.95


def test_a_split_by_date():
  documents = [document(0, "2016-12-31"), document(1, "2020-01-01"), document(2, "2023-01-01")]
  members, others = benchmark.split_by_date(documents, "2017-01-01", "2023-01-01")
  assert [d["name"] for d in members] == ["d0"] and [d["name"] for d in others] == ["d2"]
  with pytest.raises(UserError, match="later than non_members_from"):
    benchmark.split_by_date(documents, "2024-01-01", "2023-01-01")
  with pytest.raises(UserError, match="document 'd9': the date is 'May', expected YYYY-MM-DD"):
    benchmark.split_by_date([document(9, "May")], "2017-01-01", "2023-01-01")


def test_paraphrases_change_words_not_their_number():
  text = 'Return the first value if the list isn\'t empty: x["a"]\n  raise error'
  other = paraphrase(text)
  assert other.split()[0] == "Yield" and other != text and "isnt" in other and "['a']" in other
  assert len(other.split()) == len(text.split()) and other.count("\n") == text.count("\n")
  assert paraphrase(text) == other


def test_packed_rows_hold_every_token_once():
  documents = [[1, 5, 6], [1, 7], [1, 8, 9, 10]]
  rows = packed_rows(documents, 4, np.array([2, 0, 1]))
  np.testing.assert_array_equal(rows["tokens"], [[1, 8, 9, 10], [1, 5, 6, 1], [7, 0, 0, 0]])
  np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 1], [2, 2, 2, 3], [3, 0, 0, 0]])
  np.testing.assert_array_equal(rows["positions"], [[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]])


def test_neighbours_replace_some_words_only(tokenizer):
  sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}
  architecture = EncoderConfig(513, max_position_embeddings=64, head="masked_lm", **sizes)
  masked_lm = n.MaskedLM(Encoder(architecture, rngs=nnx.Rngs(0)), tokenizer, 512)
  found = n.neighbours(masked_lm, TEXTS[:2], count=3, rate=0.2, key=jax.random.key(0))
  assert [len(several) for several in found] == [3, 3]
  for text, several in zip(TEXTS, found):
    assert all(other != text for other in several)
    assert len(set(several)) > 1
    # White space stays where it was.
    assert all(other.count("\n") == text.count("\n") for other in several)
  again = n.neighbours(masked_lm, TEXTS[:2], count=3, rate=0.2, key=jax.random.key(0))
  assert found == again


def test_case_study_arithmetic():
  names = [f"b{i}" for i in range(8) for _ in range(4)]
  members = np.repeat(np.arange(8) < 4, 4)
  texts = benchmark.Benchmark(["t"] * 32, members, names)
  scores = members + np.tile([0, 0, 0, -2], 8) * 1.0  # Three of a member's four snippets are above.
  books = case_studies.book_contamination(scores, texts, np.random.default_rng(0))
  assert books.threshold == 1 and len(books.books) == 4 and books.members.sum() == 2
  np.testing.assert_array_equal(books.rates, np.where(books.members, 0.75, 0))
  corpus = case_studies.contaminated_corpus(
    [[1] * 5, [2] * 5, [3] * 5], 6, [([[7], [8], [9]], np.array([0, 1, 4]))]
  )
  assert corpus == [[1] * 5, [2] * 5, [8], [9], [9], [9], [9]]


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return f"file:{path}"


def test_files_are_read_and_their_faults_named(tmp_path):
  rows = [{"input": "a " * 32, "label": 1}, {"input": "b " * 70, "label": 0}]
  groups = files.by_length(
    files.labelled(files.read_jsonl(write(tmp_path / "w.jsonl", rows + rows)))
  )
  assert list(groups) == [32, 64] and len(groups[32].texts) == 1 and groups[32].members.all()
  book = {"book_id": 3, "book": "Emma", "snippet_id": 0, "snippet": "a b", "label": 0}
  books = files.labelled(files.read_jsonl(write(tmp_path / "b.jsonl", [book])))
  assert books.documents == ["Emma"] and not books.members.any()
  for wrong, message in (
    ({"input": "a"}, "w.jsonl:1: has input; expected {input, label} or {snippet"),
    ({"input": "a", "label": 2}, "'label' is 2, expected 1"),
    ({"input": " ", "label": 1}, "'input' is ' ', expected text"),
  ):
    with pytest.raises(UserError, match=message):
      files.read_jsonl(write(tmp_path / "w.jsonl", [wrong]))
  (tmp_path / "w.jsonl").write_text("{")
  with pytest.raises(UserError, match="w.jsonl:1: not JSON"):
    files.read_jsonl(f"file:{tmp_path / 'w.jsonl'}")
  with pytest.raises(UserError, match="cannot read .*missing.jsonl: No such file"):
    files.read_jsonl("file:missing.jsonl")
  with pytest.raises(UserError, match="expected file:PATH of JSON lines"):
    files.read_jsonl("WikiMIA")


def refused(tmp_path, message, preset="tiny", **changes):
  settings = config.get_config(preset)
  settings.update(changes)
  with pytest.raises(UserError, match=message):
    experiment.run(settings, tmp_path)


def test_bad_configs_are_refused_before_any_work(tmp_path):
  refused(tmp_path, "cannot read WikiMIA_length64.jsonl", preset="paper")
  refused(tmp_path, "expected ascending lengths", lengths=(32, 16))
  refused(tmp_path, "expected shares in", k=1.5)
  refused(tmp_path, r"epochs=\(2,\): expected at least two", epochs=(2,))
  one = [{"input": "a " * 32, "label": 1}]
  data = write(tmp_path / "one.jsonl", one)
  refused(tmp_path, "model is empty", data=data)
  refused(tmp_path, "expected both members and non-members", data=data, model="lm-tiny")
  both = write(tmp_path / "two.jsonl", [*one, {"input": "b " * 32, "label": 0}])
  refused(tmp_path, "there is no model 'nowhere'", data=both, model="nowhere")
  refused(tmp_path, "bos='maybe'", data=both, model="lm-tiny", bos="maybe")


def test_detection_in_a_file(tmp_path, monkeypatch, model, tokenizer):
  """Any decoder and tokenizer; BookMIA's fields, so that books are judged too."""
  monkeypatch.setattr(detect, "load", lambda *_: detect.BaseModel(model, tokenizer, {}))
  records = [
    {
      "snippet": f"word{i} and some other words {i}",
      "label": i % 2,
      "book": f"book {i // 4} {i % 2}",
    }
    for i in range(32)
  ]
  settings = config.get_config("tiny")
  settings.data, settings.model = write(tmp_path / "books.jsonl", records), "any"
  report = experiment.run(settings, tmp_path)
  assert [t.title.partition(",")[0] for t in report.tables] == [
    "Detection",
    "Which tokens",
    "Contamination by book",
    "Detection",
  ]
  assert "a blind classifier" in report.tables[0].note
  lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
  assert len(lines) == 32 and len(lines[0]["least likely tokens"]) == 5
  assert {mk.MIN_K, mk.PPL, mk.ZLIB, mk.LOWERCASE, "input", "label"} <= lines[0].keys()
  # The same command after a kill: no text is scored again.
  monkeypatch.setattr(detect, "token_log_probs", lambda *_, **__: pytest.fail("measured again"))
  assert experiment.run(settings, tmp_path) == report
  again = (tmp_path / "scores.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in again] == lines


def test_tiny_run(tmp_path, monkeypatch):
  report = experiment.run(config.get_config("tiny"), tmp_path)
  for figure in report.figures:
    assert (tmp_path / figure.path).stat().st_size > 0
  attacks = {row[0]: row for row in report.tables[0].rows}
  assert set(attacks) == {mk.MIN_K, mk.PPL, mk.ZLIB, mk.LOWERCASE, mk.REFERENCE, mk.NEIGHBOUR}
  assert all(0 <= row[1] <= 1 for row in attacks.values())
  tokens = {
    row[0]: row[1] for table in report.tables if table.title == "Which tokens" for row in table.rows
  }
  # K = 100% is the loss attack.
  assert tokens["smallest 100%"] == pytest.approx(attacks[mk.PPL][1], abs=2e-2)
  assert len(report.claims) == 22
  # The same command after a kill: nothing is trained again. As text, in which NaN equals NaN.
  monkeypatch.setattr(experiment, "prepare", lambda *_: pytest.fail("measured again"))
  assert repr(experiment.run(config.get_config("tiny"), tmp_path)) == repr(report)
