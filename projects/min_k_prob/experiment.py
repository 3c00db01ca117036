"""Trains models on half of the documents and asks every attack which half it was."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.data.sources import SPLITS, load_documents
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.reporting.measurements import Measurements
from common.reporting.report import Report
from projects.min_k_prob import benchmark as benchmarks
from projects.min_k_prob import case_studies, detect, tables
from projects.min_k_prob.benchmark import Benchmark, Document
from projects.min_k_prob.case_studies import IN_DISTRIBUTION, OUTLIER, Completions, Inserted
from projects.min_k_prob.metrics import detection
from projects.min_k_prob.min_k_prob import (
  TokenLogProbs,
  ablation_scores,
  attack_scores,
  loss,
  min_k_prob,
  outlier_tokens,
)
from projects.min_k_prob.neighbours import MaskedLM, neighbours, train_masked_lm
from projects.min_k_prob.paraphrase import paraphrase
from projects.min_k_prob.pretraining import Trainer, decoder_config
from projects.min_k_prob.tables import SeedResult, Unlearning
from projects.min_k_prob.token_log_probs import encode, token_log_probs

PyTree = Any
# Which documents train the base models must not depend on the seeds of the experiment.
BASE_SPLIT_SEED = 2024
# Of the target among the sizes, the epochs and the learning rates; of the reference among sizes.
TARGET, REFERENCE = 1, 0


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Detects in the file `config.data`, or trains models and runs every study on them."""
  if config.data:
    return detect.run(config, workdir)
  check(config)
  measurements = Measurements(workdir, config, (SeedResult, Benchmark, Unlearning, Completions))
  prepared = functools.cache(lambda: prepare(config))
  results = [
    measurements.get(f"seed {seed}", lambda seed=seed: run_seed(config, prepared(), seed))
    for seed in track(config.seeds, "seeds", console=Console(stderr=True))
  ]
  return tables.report(config, results, workdir)


def check(config: ConfigDict) -> None:
  """Raises a UserError for a config that cannot be run."""
  for name in ("sizes", "epochs", "learning_rates"):
    if len(config[name]) < 2:
      raise UserError(f"{name}={config[name]}: expected at least two, the second is the target's")
  if list(config.lengths) != sorted(config.lengths) or config.snippet_words > config.lengths[-1]:
    raise UserError(
      f"lengths={config.lengths}, snippet_words={config.snippet_words}: expected ascending lengths, "
      "the last at least snippet_words"
    )
  if not all(0 < k <= 1 for k in (config.k, *config.k_sweep)):
    raise UserError(f"k={config.k}, k_sweep={config.k_sweep}: expected shares in (0, 1]")
  if len(config.occurrences) < 2 or len(config.corpus_tokens) != 2:
    raise UserError("expected at least two occurrences and two corpus_tokens, both ascending")


class Material(NamedTuple):
  """What every seed starts from.

  Attributes:
    tokenizer: of all models.
    trainers, bases: of every size, and its base model's parameters.
    candidates: {domain: documents} that no base model has seen.
    shifted: such documents of the shifted domain.
    masked_lm: trained on the base documents too.
  """

  tokenizer: tokenizers.Tokenizer
  trainers: list[Trainer]
  bases: list[PyTree]
  candidates: dict[str, list[Document]]
  shifted: list[Document]
  masked_lm: MaskedLM


def prepare(config: ConfigDict) -> Material:
  """Splits the documents and trains the base models."""
  tokenizer = load_tokenizer(config.tokenizer)
  rng = np.random.default_rng(BASE_SPLIT_SEED)
  base_texts, unseen = [], {}
  for domain in (*config.domains, config.shifted_domain):
    documents = [d for split in SPLITS for d in load_documents(f"embedded:{domain}", split)]
    seen, unseen[domain] = benchmarks.split_by_inclusion(documents, rng)
    base_texts += [d["text"] for d in seen[: config.base_documents]]
  rows, _ = encode(tokenizer, base_texts, True)
  base_rows = [row[: config.base_document_tokens] for row in rows]
  # Equal sizes share a compiled step.
  by_size = {
    (width, num_layers): Trainer(
      decoder_config(tokenizer.get_vocab_size(), width, num_layers, config.max_tokens),
      row_length=config.max_tokens,
      batch_size=config.train_batch,
    )
    for width, num_layers in config.sizes
  }
  trainers, bases = [by_size[size] for size in config.sizes], []
  for trainer in trainers:
    bases += trainer.train(
      trainer.initial(config.seed),
      base_rows,
      epochs=[1],
      learning_rate=config.base_learning_rate,
      seed=config.seed,
    )
  width, num_layers = config.sizes[TARGET]
  masked_lm = train_masked_lm(
    base_rows,
    tokenizer,
    width=width,
    num_layers=num_layers,
    row_length=config.max_tokens,
    batch_size=config.train_batch,
    num_steps=config.masked_lm_steps,
    learning_rate=config.base_learning_rate,
    max_tokens=config.max_tokens,
    seed=config.seed,
  )
  shifted = unseen.pop(config.shifted_domain)
  return Material(tokenizer, trainers, bases, unseen, shifted, masked_lm)


def fits_rows(config: ConfigDict, material: Material, text: str) -> bool:
  """Whether a text and all versions of it, behind a bos token, fit into the rows of training."""
  versions = [text, text.lower(), paraphrase(text), paraphrase(text).lower()]
  rows = material.tokenizer.encode_batch(versions)
  return max(len(row.ids) for row in rows) < config.max_tokens


def build_benchmark(config: ConfigDict, material: Material, seed: int) -> tuple[Benchmark, ...]:
  """One benchmark of the longest texts for every domain, and the shifted one's non-members."""
  rng = np.random.default_rng([seed, 0])
  fits = lambda text: fits_rows(config, material, text)
  sizes = {"length": config.lengths[-1], "per_document": config.per_document, "fits": fits}
  found = [
    benchmarks.build(
      *benchmarks.split_by_inclusion(documents, rng), per_class=config.per_class, rng=rng, **sizes
    )
    for documents in material.candidates.values()
  ]
  half = benchmarks.split_by_inclusion(material.shifted, rng)
  shifted = benchmarks.build(*half, per_class=config.per_class, rng=rng, **sizes)
  return *found, shifted.select(~shifted.members)


class Scorer:
  """Asks models of one seed: token log-probabilities of texts, and of their first words."""

  def __init__(self, config: ConfigDict, material: Material):
    self._config, self._tokenizer = config, material.tokenizer

  def __call__(
    self, trainer: Trainer, params: PyTree, texts: Sequence[str], *, room: float | None = 1.0
  ) -> TokenLogProbs:
    """Rows have `room` times max_tokens; None takes what the longest of some short texts needs."""
    return token_log_probs(
      trainer.model(params),
      self._tokenizer,
      texts,
      bos=True,
      batch_size=self._config.batch_size,
      pad_to=None if room is None else int(room * self._config.max_tokens),
    )

  def first_words(self, scored: TokenLogProbs, texts: Sequence[str], length: int) -> TokenLogProbs:
    """Of the first `length` words; words end where tokens do, so that nothing is scored again."""
    cut = [benchmarks.first_words(text, length) for text in texts]
    return scored.prefix([len(row.ids) for row in self._tokenizer.encode_batch(cut)])


def run_seed(config: ConfigDict, material: Material, seed: int) -> SeedResult:
  """Draws members, trains on them, and measures."""
  *by_domain, shifted = build_benchmark(config, material, seed)
  texts = benchmarks.join(*by_domain)
  domain = np.repeat(np.arange(len(by_domain)), [len(b.texts) for b in by_domain])
  scorer = Scorer(config, material)
  member_texts = [text for text, is_member in zip(texts.texts, texts.members) if is_member]
  rows, _ = encode(material.tokenizer, member_texts, True)
  trained = train_models(config, material, rows, seed)
  target, reference = material.trainers[TARGET], material.trainers[REFERENCE]
  params = trained["epochs"][config.epochs[TARGET]]

  versions = {"original": texts.texts}
  if config.paraphrase:
    versions["paraphrase"] = [paraphrase(text) for text in texts.texts]
  scores, target_log_probs = {}, {}
  for version, version_texts in versions.items():
    lowered = [text.lower() for text in version_texts]
    whole = scorer(target, params, version_texts)
    target_log_probs[version] = whole
    others = {
      "lowercase": (scorer(target, params, lowered), lowered),
      "reference": (scorer(reference, trained["size"][REFERENCE], version_texts), version_texts),
    }
    for length in config.lengths:
      longest = length == config.lengths[-1]
      near = None
      if longest and version == "original":
        near = neighbour_losses(config, material, scorer, params, version_texts, seed)
      cut = {name: scorer.first_words(scored, of, length) for name, (scored, of) in others.items()}
      scores[version, length] = attack_scores(
        [benchmarks.first_words(text, length) for text in version_texts],
        scorer.first_words(whole, version_texts, length),
        k=config.k,
        neighbours=near,
        **cut,
      )
  original = target_log_probs["original"]
  scores["ablation"] = ablation_scores(original, jax.random.key(seed), config.k)
  scores["k"] = {k: min_k_prob(original, k) for k in config.k_sweep}
  for axis, models in trained.items():
    for value, other in models.items():
      trainer = material.trainers[value] if axis == "size" else target
      scored = original if other is params else scorer(trainer, other, texts.texts)
      scores[axis, value] = attack_scores(texts.texts, scored, k=config.k)
  # The base model has seen neither class: what it tells apart is no memory.
  unseen = scorer(target, material.bases[TARGET], texts.texts)
  scores["base"] = attack_scores(texts.texts, unseen, k=config.k)
  gap = [
    float(np.mean(loss(original)[(domain == d) & ~texts.members]))
    - float(np.mean(loss(original)[(domain == d) & texts.members]))
    for d in range(len(by_domain))
  ]
  return SeedResult(
    texts,
    domain,
    scores,
    gap,
    [benchmarks.blind_auc(b) for b in by_domain],
    shifted_scores(config, material, scorer, params, by_domain[-1], shifted),
    contamination(config, material, scorer, seed),
    books(config, scorer, target, params, texts, seed),
    unlearning(config, material, scorer, texts, domain, seed),
    outliers(material, original, texts),
  )


def train_models(
  config: ConfigDict, material: Material, rows: Sequence[Sequence[int]], seed: int
) -> dict[str, dict]:
  """Continues from the base models on the members: {what varies: {its value: parameters}}."""
  epochs, rate = config.epochs[TARGET], config.learning_rates[TARGET]
  train = lambda i, epochs, rate: material.trainers[i].train(
    material.bases[i], rows, epochs=epochs, learning_rate=rate, seed=seed
  )
  by_epochs = dict(zip(config.epochs, train(TARGET, config.epochs, rate)))
  target = by_epochs[epochs]
  sizes = range(len(config.sizes))
  by_size = {i: target if i == TARGET else train(i, [epochs], rate)[0] for i in sizes}
  by_rate = {
    r: target if r == rate else train(TARGET, [epochs], r)[0] for r in config.learning_rates
  }
  return {"epochs": by_epochs, "size": by_size, "learning rate": by_rate}


def neighbour_losses(
  config: ConfigDict, material: Material, scorer: Scorer, params: PyTree, texts, seed: int
) -> np.ndarray:
  """The target's loss on every neighbour, [texts, neighbours]."""
  near = neighbours(
    material.masked_lm,
    texts,
    count=config.neighbours,
    rate=config.neighbour_rate,
    key=jax.random.key(seed),
    batch_size=config.batch_size,
  )
  flat = [text for several in near for text in several]
  # Replaced tokens may be longer or shorter once they are text again: so many more fit.
  scored = scorer(material.trainers[TARGET], params, flat, room=1.25)
  return loss(scored).reshape(len(texts), config.neighbours)


def shifted_scores(
  config: ConfigDict, material: Material, scorer: Scorer, params: PyTree, members, shifted
) -> dict[str, float]:
  """AUC where non-members are of another domain: of attacks, of a blind classifier, of no member."""
  both = benchmarks.join(members.select(members.members), shifted)
  found = {"blind bag of words": benchmarks.blind_auc(both)}
  trainer = material.trainers[TARGET]
  for name, model in (("target", params), ("base, saw neither", material.bases[TARGET])):
    scored = scorer(trainer, model, both.texts)
    for attack, values in attack_scores(both.texts, scored, k=config.k).items():
      found[f"{attack}, {name}"] = detection(values, both.members).auc
  return found


def contamination(
  config: ConfigDict, material: Material, scorer: Scorer, seed: int
) -> dict[tuple, float]:
  """AUC of Min-K% Prob on inserted strings: {(corpus tokens, learning rate, kind, times): AUC}."""
  rng = np.random.default_rng([seed, 1])
  half = len(material.shifted) // 2
  documents = {
    OUTLIER: next(reversed(material.candidates.values())),
    IN_DISTRIBUTION: material.shifted[:half],
  }
  groups = {
    "per_group": config.contamination_strings,
    "occurrences": config.occurrences,
    "fits": lambda text: fits_rows(config, material, text),
  }
  inserted: dict[str, Inserted] = {
    kind: case_studies.strings_to_insert(of, kind, rng=rng, **groups)
    for kind, of in documents.items()
  }
  tokens = lambda texts: encode(material.tokenizer, texts, True)[0]
  strings = [(tokens(group.texts), group.occurrences) for group in inserted.values()]
  corpus = tokens([d["text"] for d in material.shifted[half:]])
  corpus = [row[: config.base_document_tokens] for row in corpus]
  small, large = config.corpus_tokens
  low, high = config.contamination_rates
  trainer, found = material.trainers[TARGET], {}
  for size, rate in ((small, low), (small, high), (large, low)):
    mixed = case_studies.contaminated_corpus(corpus, size, strings)
    base = material.bases[TARGET]
    (params,) = trainer.train(base, mixed, epochs=[1], learning_rate=rate, seed=seed)
    for kind, group in inserted.items():
      values = min_k_prob(scorer(trainer, params, group.texts, room=None), config.k)
      for times in config.occurrences:
        kept = np.isin(group.occurrences, (0, times))
        auc = detection(values[kept], group.occurrences[kept] > 0).auc
        found[size, rate, kind, times] = auc
  return found


def books(
  config: ConfigDict, scorer: Scorer, target: Trainer, params, texts: Benchmark, seed: int
) -> dict[str, float]:
  """The book study, a document being a book."""
  cut = case_studies.snippets(texts, config.snippet_words)
  values = min_k_prob(scorer(target, params, cut.texts, room=None), config.k)
  found = case_studies.book_contamination(values, cut, np.random.default_rng([seed, 2]))
  rates, members = found.rates, found.members
  return {
    "AUC of snippets": detection(values[found.rows], cut.members[found.rows]).auc,
    "AUC of books by contamination rate": detection(rates, members).auc,
    "contamination rate of members": float(rates[members].mean()),
    "contamination rate of non-members": float(rates[~members].mean()),
  }


def unlearning(
  config: ConfigDict, material: Material, scorer: Scorer, texts: Benchmark, domain, seed: int
) -> Unlearning:
  """Has the target learn a book, unlearns every other chunk by gradient ascent, and audits.

  The ascent ends with the epoch after which the chunks score as in a model that never saw them.
  """
  trainer = material.trainers[TARGET]
  members = np.flatnonzero(texts.members & (domain == 0))[: config.book_chunks]
  chunks = [texts.texts[i] for i in members]
  rows, _ = encode(material.tokenizer, chunks, True)
  requested = np.arange(len(chunks)) % 2 == 0
  base = material.bases[TARGET]
  rate = config.learning_rates[-1]
  (learned,) = trainer.train(base, rows, epochs=[config.book_epochs], learning_rate=rate, seed=seed)
  ascent = trainer.train(
    learned,
    rows[::2],
    epochs=range(1, config.unlearning_epochs + 1),
    learning_rate=-config.unlearning_rate,  # Ascends.
    seed=seed,
  )
  models = {"never trained": base, "learned": learned}
  scored = {name: scorer(trainer, params, chunks) for name, params in models.items()}
  score = lambda log_probs: min_k_prob(log_probs, config.k)[requested].mean()
  # Until the model knows as little as one that never saw the chunks: any further is damage.
  for params in ascent:
    models["unlearned"], scored["unlearned"] = params, scorer(trainer, params, chunks)
    if score(scored["unlearned"]) <= score(scored["never trained"]):
      break
  places = case_studies.question_places(scored["never trained"], config)
  completions = {
    name: case_studies.complete(trainer.model(params), rows, places, config)
    for name, params in models.items()
  }
  return Unlearning(
    {name: min_k_prob(log_probs, config.k) for name, log_probs in scored.items()},
    completions,
    requested,
    case_studies.suspicious(scored["learned"], scored["unlearned"], config.k),
  )


def outliers(material: Material, scored: TokenLogProbs, texts: Benchmark) -> dict[str, list[str]]:
  """The least likely tokens of the first member and the first non-member."""
  shown = {}
  for name, row in (("member", 0), ("non-member", int(np.argmin(texts.members)))):
    values, places = outlier_tokens(scored.select(np.array([row])), 6)
    tokens = [int(scored.tokens[row, place]) for place in places[0]]
    words = material.tokenizer.decode_batch([[token] for token in tokens])
    shown[name] = [f"{word!r} {value:.1f}" for word, value in zip(words, values[0])]
  return shown
