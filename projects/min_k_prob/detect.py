"""Detection in a file with a model of one's own: `--config.data=file:PATH --config.model=DIR`."""

import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.checkpoints.huggingface import load_decoder
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.models.base import RECIPES, BaseModel, base_model
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Report, Table, write_text
from projects.min_k_prob import benchmark as benchmarks
from projects.min_k_prob import files
from projects.min_k_prob.benchmark import Benchmark
from projects.min_k_prob.case_studies import book_contamination
from projects.min_k_prob.metrics import (
  bootstrap_weights,
  detection,
  percentile_interval,
  weighted_auc,
)
from projects.min_k_prob.min_k_prob import (
  MIN_K,
  PPL,
  TokenLogProbs,
  ablation_scores,
  attack_scores,
  loss,
  min_k_prob,
  outlier_tokens,
)
from projects.min_k_prob.neighbours import load_masked_lm, neighbours
from projects.min_k_prob.paraphrase import paraphrase
from projects.min_k_prob.token_log_probs import token_log_probs

BOS = {"tokenizer": None, "yes": True, "no": False}
# Least likely tokens of every text in scores.jsonl.
OUTLIERS = 5


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Every attack on every length of the file; the file is read before any model is."""
  records = files.read_jsonl(config.data)
  if not config.model:
    raise UserError("model is empty: expected --config.model=DIR, a Hugging Face directory")
  if config.bos not in BOS:
    raise UserError(f"bos={config.bos!r}: expected {', '.join(BOS)}")
  groups = benchmark_groups(config, records)
  for length, group in groups.items():
    if group.members.all() or not group.members.any():
      raise UserError(
        f"{config.data}: of {len(group.texts)} texts of length {length} {group.members.sum()} are "
        "members: expected both members and non-members"
      )
  target = load(config, config.model)
  reference = load(config, config.reference) if config.reference else None
  masked_lm = load_masked_lm(config.masked_lm) if config.masked_lm else None
  measurements = Measurements(workdir, config, (TokenLogProbs,))
  report, lines = Report(tables=[], claims=[]), []
  scores_by_setting = {}
  for length, group in groups.items():
    versions = {"original": group}
    if config.paraphrase:
      versions["paraphrase"] = group._replace(texts=[paraphrase(text) for text in group.texts])
    for version, texts in versions.items():
      lowered = [text.lower() for text in texts.texts]
      asked = {
        "target": functools.partial(score, config, target, texts.texts),
        "lowercase": functools.partial(score, config, target, lowered),
      }
      if reference is not None:
        asked["reference"] = functools.partial(score, config, reference, texts.texts)
      if masked_lm is not None:
        asked["neighbours"] = functools.partial(near, config, target, masked_lm, texts.texts)
      found = {
        name: measurements.get(f"{length} words, {version}, {name}", ask)
        for name, ask in asked.items()
      }
      scored = found["target"]
      scores = attack_scores(texts.texts, **found, k=config.k)
      scores_by_setting[length, version] = scores
      report.tables.append(attack_table(config, f"{length} words, {version}", scores, texts))
      if version == "original":
        report.tables.append(sweep_table(config, length, scored, texts))
        lines += score_lines(target, length, scored, scores, texts)
      if version == "original" and "book" in records[0]:
        report.tables.append(book_table(config, scores[MIN_K], texts))
  write_text(workdir / "scores.jsonl", "\n".join(lines) + "\n")
  auc = lambda attack: [
    detection(scores[attack], groups[length].members).auc
    for (length, _), scores in scores_by_setting.items()
  ]
  report.claims.append(
    Claim.greater(
      "Min-K% Prob has a higher AUC than PPL (mean over lengths and versions)",
      {MIN_K: [np.mean(auc(MIN_K))], PPL: [np.mean(auc(PPL))]},
    )
  )
  return report


def load(config: ConfigDict, name: str) -> BaseModel:
  """A model by name or directory, in the config's dtype."""
  if name in RECIPES:
    return base_model(name)
  if not pathlib.Path(name).expanduser().is_dir():
    raise UserError(
      f"there is no model {name!r}: expected {', '.join(RECIPES)} or a Hugging Face directory"
    )
  return BaseModel(load_decoder(name, jnp.dtype(config.dtype)), load_tokenizer(name), {})


def benchmark_groups(config: ConfigDict, records: Sequence[dict]) -> dict[int, Benchmark]:
  """The texts of every length in words: as the file has them, or cut from dated documents."""
  if "date" not in records[0]:
    return files.by_length(files.labelled(records))
  split = benchmarks.split_by_date(
    files.dated(records), config.members_before, config.non_members_from
  )
  rng = np.random.default_rng(config.seed)
  return {n: benchmarks.build(*split, length=n, per_class=0, rng=rng) for n in config.lengths}


def score(config: ConfigDict, base: BaseModel, texts: Sequence[str]) -> TokenLogProbs:
  return token_log_probs(
    base.model, base.tokenizer, texts, bos=BOS[config.bos], batch_size=config.batch_size
  )


def near(config: ConfigDict, target: BaseModel, masked_lm, texts: Sequence[str]) -> np.ndarray:
  """The target's loss on neighbours, [texts, neighbours]."""
  found = neighbours(
    masked_lm,
    texts,
    count=config.neighbours,
    rate=config.neighbour_rate,
    key=jax.random.key(config.seed),
    batch_size=config.batch_size,
  )
  scored = score(config, target, [text for several in found for text in several])
  return loss(scored).reshape(len(texts), config.neighbours)


def attack_table(config: ConfigDict, name: str, scores: dict, texts: Benchmark) -> Table:
  """AUC with its interval, TPR at low FPR and accuracy of every attack."""
  weights = bootstrap_weights(
    texts.members, texts.documents, config.bootstrap, np.random.default_rng(config.seed)
  )
  rows = []
  for attack, values in scores.items():
    low, high = percentile_interval(weighted_auc(values, texts.members, weights))
    measured = detection(values, texts.members)
    rows.append([attack, measured.auc, f"{low:.3f} to {high:.3f}"])
    rows[-1] += [measured.tpr_at_5, measured.tpr_at_1, measured.accuracy]
  columns = ["attack", Column("AUC", ".3f", "higher"), "95 %", Column("TPR at 5 % FPR", ".3f")]
  columns += [Column("TPR at 1 % FPR", ".3f"), Column("balanced accuracy", ".3f")]
  members = int(texts.members.sum())
  blind = "too few texts for"
  if min(members, len(texts.texts) - members) >= 10:
    blind = f"{benchmarks.blind_auc(texts):.3f} is the AUC of"
  note = f"{members} members, {len(texts.texts) - members} non-members; {blind} a blind classifier."
  return Table(f"Detection, {name}, k = {config.k:.0%}", columns, rows, note=note)


def sweep_table(config: ConfigDict, length: int, scored: TokenLogProbs, texts: Benchmark) -> Table:
  """AUC by k, and of the ablations."""
  scores = {f"{k:.0%}": min_k_prob(scored, k) for k in config.k_sweep}
  scores |= ablation_scores(scored, jax.random.key(config.seed), config.k)
  rows = [[name, detection(values, texts.members).auc] for name, values in scores.items()]
  return Table(f"Which tokens, {length} words", ["tokens", Column("AUC", ".3f", "higher")], rows)


def book_table(config: ConfigDict, values: np.ndarray, texts: Benchmark) -> Table:
  """Contamination rate of every book outside the validation half."""
  found = book_contamination(values, texts, np.random.default_rng(config.seed))
  order = np.argsort(-found.rates, kind="stable")
  rows = [[found.books[i], found.rates[i], "yes" if found.members[i] else "no"] for i in order]
  columns = ["book", Column("contamination rate", ".0%"), "labelled a member"]
  note = f"Threshold {found.threshold:.3f}, set on the validation books."
  return Table("Contamination by book", columns, rows, note=note)


def score_lines(
  base: BaseModel, length: int, scored: TokenLogProbs, scores: dict, texts: Benchmark
) -> list[str]:
  """One JSON object per text: its scores and its least likely tokens."""
  log_probs, places = outlier_tokens(scored, min(OUTLIERS, scored.values.shape[1]))
  lines = []
  for i, text in enumerate(texts.texts):
    shown = [
      [base.tokenizer.decode([int(scored.tokens[i, place])]), round(float(value), 4)]
      for value, place in zip(log_probs[i], places[i])
      if np.isfinite(value)
    ]
    record = {"input": text, "label": int(texts.members[i]), "length": length}
    record |= {attack: float(values[i]) for attack, values in scores.items()}
    lines.append(json.dumps(record | {"least likely tokens": shown}))
  return lines
