"""Tables, figures and claims of the trained models."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.min_k_prob.benchmark import Benchmark
from projects.min_k_prob.case_studies import IN_DISTRIBUTION, OUTLIER, Completions
from projects.min_k_prob.metrics import (
  Detection,
  bootstrap_weights,
  detection,
  percentile_interval,
  weighted_auc,
)
from projects.min_k_prob.min_k_prob import LOWERCASE, MAX_K, MIN_K, PPL, RANDOM_K, ZLIB

# PPL's AUC may exceed Min-K% Prob's by this much where the two are called equal.
MARGIN = 0.005


class Unlearning(NamedTuple):
  """The audit of an unlearned model.

  Attributes:
    scores: Min-K% Prob of the book's chunks by model, [chunks].
    completions: by model.
    requested: the chunks that were to be unlearned, bool [chunks].
    suspicious: the chunks that the audit flags, bool [chunks].
  """

  scores: dict[str, np.ndarray]
  completions: dict[str, Completions]
  requested: np.ndarray
  suspicious: np.ndarray


class SeedResult(NamedTuple):
  """What one seed measured.

  Attributes:
    texts: the benchmark, all domains.
    domain: of each text, int [texts].
    scores: {setting: {attack: [texts]}}; a setting is (version, length in words), (what varies, its
      value), "ablation", "k" or "base".
    gap: loss of non-members less that of members, of each domain, nats per token.
    blind: AUC of a bag-of-words classifier, of each domain.
    shifted: AUC where non-members are of another domain.
    contamination: {(corpus tokens, learning rate, kind, occurrences): AUC}.
    books, unlearning: of the case studies.
    outliers: the least likely tokens of two texts.
  """

  texts: Benchmark
  domain: np.ndarray
  scores: dict
  gap: list[float]
  blind: list[float]
  shifted: dict[str, float]
  contamination: dict[tuple, float]
  books: dict[str, float]
  unlearning: Unlearning
  outliers: dict[str, list[str]]

  def detection(self, setting, attack) -> Detection:
    """The mean over domains."""
    values, members = self.scores[setting][attack], self.texts.members
    rows = [self.domain == d for d in range(len(self.blind))]
    return Detection(*np.mean([detection(values[r], members[r]) for r in rows], axis=0))

  def auc(self, setting, attack=MIN_K) -> float:
    return self.detection(setting, attack).auc


def report(config: ConfigDict, results: Sequence[SeedResult], workdir: pathlib.Path) -> Report:
  """Everything that the paper reports, of all seeds."""
  found = Report(tables=[], figures=[], claims=[])
  weights = [document_weights(config, seed, r) for seed, r in zip(config.seeds, results)]
  attacks(config, results, weights, found)
  domains(config, results, found)
  lengths(config, results, workdir, found)
  which_tokens(config, results, workdir, found)
  trends(config, results, found)
  shifted(config, results, found)
  contamination(config, results, workdir, found)
  books(results, found)
  unlearning(results, found)
  found.claims.extend(claims(config, results))
  return found


def document_weights(config: ConfigDict, seed: int, result: SeedResult) -> np.ndarray:
  """Bootstrap weights, int [samples, texts], drawn within domain and class."""
  rng = np.random.default_rng([seed, 3])
  weights = np.zeros((config.bootstrap, len(result.domain)), np.int64)
  for d in range(len(result.blind)):
    rows = np.flatnonzero(result.domain == d)
    part = result.texts.select(rows)
    weights[:, rows] = bootstrap_weights(part.members, part.documents, config.bootstrap, rng)
  return weights


def bootstrap_auc(results, weights, setting, attack) -> np.ndarray:
  """AUC, mean over domains and seeds, of every bootstrap sample [samples]."""
  values = []
  for result, weight in zip(results, weights):
    scores, members = result.scores[setting][attack], result.texts.members
    rows = [result.domain == d for d in range(len(result.blind))]
    values += [weighted_auc(scores[r], members[r], weight[:, r]) for r in rows]
  return np.mean(values, axis=0)


def mean(results, setting, attack=MIN_K) -> float:
  return float(np.mean([r.auc(setting, attack) for r in results]))


def attacks(config, results, weights, found: Report) -> None:
  """The main table: every attack on the longest texts, with paired differences to PPL."""
  for version in versions(results):
    setting = (version, config.lengths[-1])
    ppl = bootstrap_auc(results, weights, setting, PPL)
    rows = []
    for attack in results[0].scores[setting]:
      values = bootstrap_auc(results, weights, setting, attack)
      low, high = percentile_interval(values)
      row = [attack, mean(results, setting, attack), f"{low:.3f} to {high:.3f}"]
      if attack == PPL:
        row += [None, None]
      else:
        low, high = percentile_interval(values - ppl)
        row += [row[1] - mean(results, setting, PPL), f"{low:+.3f} to {high:+.3f}"]
      measured = [r.detection(setting, attack) for r in results]
      row += [
        float(np.mean([getattr(m, name) for m in measured])) for name in Detection._fields[1:]
      ]
      rows.append([*row, float(np.std([m.auc for m in measured]))])
    found.tables.append(
      Table(
        f"Detection, {config.lengths[-1]} words, {version}, k = {config.k:.0%}",
        [
          "attack",
          Column("AUC", ".3f", "higher"),
          "95 %",
          Column("AUC - PPL's", "+.3f"),
          "95 %, paired",
          Column("balanced accuracy", ".3f"),
          Column("TPR at 5 % FPR", ".3f"),
          Column("TPR at 1 % FPR", ".3f"),
          Column("sd of AUC over seeds", ".3f"),
        ],
        rows,
        note=(
          f"Mean over {len(results)} seeds and {len(config.domains)} domains with "
          f"{config.per_class} members and as many non-members each; intervals: bootstrap over "
          "documents. Balanced accuracy is that of the best threshold on these texts."
        ),
      )
    )


def versions(results) -> list[str]:
  settings = [s for s in results[0].scores if isinstance(s, tuple) and isinstance(s[1], int)]
  return list(dict.fromkeys(s[0] for s in settings if s[0] in ("original", "paraphrase")))


def domains(config, results, found: Report) -> None:
  """Each domain: generalisation gap, blind classifier, AUC of Min-K% Prob and PPL."""
  setting, rows = ("original", config.lengths[-1]), []
  for d, name in enumerate(config.domains):
    row = [name, np.mean([r.gap[d] for r in results]), np.mean([r.blind[d] for r in results])]
    for attack in (MIN_K, PPL):
      part = [(r.scores[setting][attack], r.texts.members, r.domain == d) for r in results]
      row.append(np.mean([detection(s[rows_], m[rows_]).auc for s, m, rows_ in part]))
    part = [(r.scores["base"][MIN_K], r.texts.members, r.domain == d) for r in results]
    row.append(np.mean([detection(s[rows_], m[rows_]).auc for s, m, rows_ in part]))
    rows.append(row)
  columns = ["domain", Column("loss gap, nats per token", ".2f"), Column("blind AUC", ".3f")]
  columns += [Column(f"AUC of {MIN_K}", ".3f"), Column("AUC of PPL", ".3f")]
  columns += [Column("Min-K% Prob of the base model", ".3f")]
  note = (
    "Blind: a bag-of-words classifier. The base model was trained on neither class: 0.5 expected."
  )
  found.tables.append(Table("Random split of documents, by domain", columns, rows, note=note))


def lengths(config, results, workdir, found: Report) -> None:
  """AUC by length in words, original and paraphrased."""
  rows, series = [], {}
  for version in versions(results):
    shortest = results[0].scores[version, config.lengths[0]]
    for attack in shortest:
      values = [mean(results, (version, n), attack) for n in config.lengths]
      rows.append([version, attack, *values])
      if version == "original":
        series[attack] = values
  columns = ["version", "attack", *[Column(f"{n} words", ".3f", "higher") for n in config.lengths]]
  found.tables.append(Table("AUC by length", columns, rows))
  plots.heatmap(
    workdir / "lengths.png",
    list(series.values()),
    list(series),
    [str(n) for n in config.lengths],
    xlabel="words",
    title="AUC by length",
    annotate=".3f",
  )
  found.figures.append(Figure("AUC by length", "lengths.png", "Original texts."))


def which_tokens(config, results, workdir, found: Report) -> None:
  """The sweep over k, the ablations, and the outliers of two texts."""
  values = [mean(results, "k", k) for k in config.k_sweep]
  rows = [[f"smallest {k:.0%}", value] for k, value in zip(config.k_sweep, values)]
  rows += [[f"{a}, k = {config.k:.0%}", mean(results, "ablation", a)] for a in (MAX_K, RANDOM_K)]
  columns = ["tokens", Column("AUC", ".3f", "higher")]
  found.tables.append(Table("Which tokens", columns, rows))
  plots.line_plot(
    workdir / "k.png",
    {MIN_K: ([100 * k for k in config.k_sweep], values)},
    xlabel="k, % of tokens",
    ylabel="AUC",
    title="Share of tokens",
  )
  found.figures.append(Figure("AUC by k", "k.png"))
  shown = [[name, *tokens] for name, tokens in results[0].outliers.items()]
  columns = ["text", *[f"{i}" for i in range(1, len(shown[0]))]]
  note = "Tokens and their log-probability in nats, least likely first; first seed and domain."
  found.tables.append(Table("Least likely tokens of two texts", columns, shown, note=note))


def trends(config, results, found: Report) -> None:
  """Repetitions, learning rate and model size."""
  rows = []
  label = {"epochs": "times seen", "learning rate": "learning rate", "size": "width x layers"}
  for axis, values in axes(config).items():
    for value in values:
      setting = (axis, value)
      row = [label[axis], axis_value(config, setting)]
      rows.append([*row, *(mean(results, setting, a) for a in (MIN_K, PPL))])
  columns = ["varied", "value", Column(f"AUC of {MIN_K}", ".3f"), Column("AUC of PPL", ".3f")]
  found.tables.append(
    Table(f"What makes detection easier, {config.lengths[-1]} words", columns, rows)
  )


def axis_unit(axis: str) -> str:
  """What the values of `axes` count."""
  return {"epochs": "epochs", "learning rate": "", "size": "(width x layers)"}[axis]


def axis_value(config, setting: tuple) -> str:
  """The value of (what varies, its value) or (version, words)."""
  axis, value = setting
  return "{} x {}".format(*config.sizes[value]) if axis == "size" else f"{value:g}"


def axes(config) -> dict[str, Sequence]:
  return {
    "epochs": config.epochs,
    "learning rate": config.learning_rates,
    "size": range(len(config.sizes)),
  }


def shifted(config, results, found: Report) -> None:
  """The benchmark with a distribution shift."""
  rows = [[name, np.mean([r.shifted[name] for r in results])] for name in results[0].shifted]
  note = (
    f"Members are of {config.domains[-1]}, non-members of {config.shifted_domain}. What the base "
    "model tells apart, which saw neither, is a difference of texts and no memory."
  )
  columns = ["score", Column("AUC", ".3f")]
  found.tables.append(
    Table("Members and non-members of different domains", columns, rows, note=note)
  )


def contamination(config, results, workdir, found: Report) -> None:
  """Inserted strings: by occurrences, learning rate and corpus size."""
  rows, series = [], {}
  short = {OUTLIER: "outliers", IN_DISTRIBUTION: "in domain"}
  for key in results[0].contamination:
    size, rate, kind, times = key
    value = float(np.mean([r.contamination[key] for r in results]))
    rows.append([kind, size, f"{rate:g}", times, value])
    series.setdefault(f"{short[kind]}, {times} x", []).append(value)
  settings = dict.fromkeys((size, rate) for size, rate, _, _ in results[0].contamination)
  plots.heatmap(
    workdir / "contamination.png",
    list(series.values()),
    list(series),
    [f"{size / 1000:g}k, {rate:g}" for size, rate in settings],
    xlabel="corpus tokens, learning rate",
    title="AUC of inserted strings",
    annotate=".3f",
  )
  columns = ["inserted", "corpus tokens", "learning rate", "occurrences"]
  note = (
    f"{config.contamination_strings} strings for each number of occurrences, as many never inserted; "
    "one epoch."
  )
  found.tables.append(
    Table("Contamination", [*columns, Column(f"AUC of {MIN_K}", ".3f")], rows, note=note)
  )
  found.figures.append(Figure("Contamination", "contamination.png", f"AUC of {MIN_K}."))


def books(results, found: Report) -> None:
  """The book study."""
  rows = [[name, np.mean([r.books[name] for r in results])] for name in results[0].books]
  note = (
    "A document is a book; the threshold is set on a half of the documents, the rest is measured."
  )
  found.tables.append(Table("Books", ["", Column("mean over seeds", ".3f")], rows, note=note))


def unlearning(results, found: Report) -> None:
  """The audit of an unlearned model."""
  audits, rows = [r.unlearning for r in results], []
  for model in audits[0].scores:
    row = [model]
    for requested in (True, False):
      row.append(np.mean([a.scores[model][a.requested == requested].mean() for a in audits]))
    row.append(np.mean([a.completions[model].overlap.mean() for a in audits]))
    rows.append([*row, np.mean([a.completions[model].answered.mean() for a in audits])])
  for name, flagged in (("suspicious", True), ("other", False)):
    row = [f"unlearned, {name} chunks", None, None]
    rows.append([*row, *(audited(results, flagged, f) for f in ("overlap", "answered"))])
  share = lambda requested: np.mean([a.suspicious[a.requested == requested].mean() for a in audits])
  columns = ["model", Column(f"{MIN_K}, to be unlearned", ".2f"), Column("the others", ".2f")]
  columns += [Column("completion overlap", ".3f"), Column("questions answered", ".3f")]
  note = (
    f"The audit calls {share(True):.0%} of the chunks that were to be unlearned suspicious, and "
    f"{share(False):.0%} of the others. Overlap: of greedy completions with the chunk."
  )
  found.tables.append(Table("Auditing of unlearning", columns, rows, note=note))


def audited(results, flagged: bool, field: str) -> float:
  """Mean of the unlearned model's completions over the chunks of all seeds; NaN without any."""
  values = [
    getattr(r.unlearning.completions["unlearned"], field)[r.unlearning.suspicious == flagged]
    for r in results
  ]
  chosen = np.concatenate(values)
  return float(chosen.mean()) if len(chosen) else float("nan")


def claims(config: ConfigDict, results: Sequence[SeedResult]) -> list[Claim]:
  """The paper's statements; AUC in the mean over domains, one number per seed."""
  setting = ("original", config.lengths[-1])
  of = lambda attack, at=setting: [r.auc(at, attack) for r in results]
  pair = lambda other: {MIN_K: of(MIN_K), other: of(other)}
  found = [
    Claim.greater(f"{MIN_K} detects no worse than PPL (AUC, margin {MARGIN})", pair(PPL), -MARGIN),
    Claim.greater(f"{MIN_K} detects better than PPL (AUC)", pair(PPL)),
    Claim.greater(f"{MIN_K} detects better than Zlib (AUC)", pair(ZLIB)),
    Claim.greater(f"{MIN_K} detects better than Lowercase (AUC)", pair(LOWERCASE)),
  ]
  for other in (MAX_K, RANDOM_K):
    measured = {MIN_K: of(MIN_K, "ablation"), other: of(other, "ablation")}
    found.append(Claim.greater(f"the least likely tokens are the ones: {other} is worse", measured))
  trends = [("length", "words", [("original", n) for n in config.lengths])]
  names = {"epochs": "repetitions", "learning rate": "the learning rate", "size": "model size"}
  for axis, values in axes(config).items():
    trends.append((names[axis], axis_unit(axis), [(axis, value) for value in values]))
  for name, unit, settings in trends:
    for a, b in zip(settings, settings[1:]):
      change = f"{axis_value(config, a)} to {axis_value(config, b)} {unit}".strip()
      measured = [r.auc(b) - r.auc(a) for r in results]
      found.append(Claim.greater(f"AUC rises with {name}: {change}", measured))
  if "paraphrase" in versions(results):
    changed = ("paraphrase", config.lengths[-1])
    change = lambda attack: [r.auc(changed, attack) - r.auc(setting, attack) for r in results]
    least = max(results[0].scores[changed], key=lambda attack: np.mean(change(attack)))
    found.append(
      Claim.less(f"a paraphrase lowers the AUC of every attack (least of {least})", change(least))
    )
  small, large = config.corpus_tokens
  low, high = config.contamination_rates
  once, often = config.occurrences[0], config.occurrences[-1]
  change = lambda a, b: [r.contamination[b] - r.contamination[a] for r in results]
  found += [
    Claim.greater(
      f"contamination: {often} occurrences are easier to detect than {once} (AUC)",
      change((small, low, OUTLIER, once), (small, low, OUTLIER, often)),
    ),
    Claim.greater(
      "contamination: a higher learning rate makes detection easier (AUC)",
      change((small, low, OUTLIER, once), (small, high, OUTLIER, once)),
    ),
    Claim.greater(
      "contamination: outliers are easier to detect in a larger corpus (AUC)",
      change((small, low, OUTLIER, once), (large, low, OUTLIER, once)),
    ),
    Claim.less(
      "contamination: in-distribution text is harder to detect in a larger corpus (AUC)",
      change((small, low, IN_DISTRIBUTION, once), (large, low, IN_DISTRIBUTION, once)),
    ),
    Claim.greater(
      "books: the contamination rate tells books apart better than a snippet's score (AUC)",
      [r.books["AUC of books by contamination rate"] - r.books["AUC of snippets"] for r in results],
    ),
  ]
  fall = lambda audit: audit.scores["learned"] - audit.scores["unlearned"]
  audits = [r.unlearning for r in results]
  found += [
    Claim.greater(
      f"unlearning audit: {MIN_K} falls more where it was asked for (nats)",
      [fall(a)[a.requested].mean() - fall(a)[~a.requested].mean() for a in audits],
    ),
    Claim.greater(
      "unlearning audit: suspicious chunks are completed better than others (overlap, all seeds)",
      [audited(results, True, "overlap") - audited(results, False, "overlap")],
    ),
  ]
  return found
