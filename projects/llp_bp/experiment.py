"""Belief propagation beside the baselines on random bags, over data sets, bag sizes and seeds."""

import dataclasses
import pathlib
import zlib
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from sklearn.metrics import roc_auc_score

from common.errors import UserError
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.llp_bp import data, llp_bp, losses, training
from projects.llp_bp.llp_bp import Bagged, Candidate, Options

CARDINALITY, CONTROL, ORACLE = "BP, cardinality", "BP, no covariate edges", "supervised oracle"
BASELINES = {
  "DLLP": losses.dllp_loss,
  "EasyLLP": losses.easyllp_loss,
  "GenBags": losses.genbags_loss,
  "LLP-VAT": losses.llp_vat_loss,
  "LLP-FC": losses.llp_fc_loss,
  "random labels": losses.pseudo_label_loss,
}


def after(rounds: int) -> str:
  """The name of the method after so many rounds."""
  return f"BP, {rounds} round{'s' if rounds > 1 else ''}"


class Quality(NamedTuple):
  """A classifier, on the test rows and on the bags that it was trained with."""

  auc: float
  accuracy: float
  bag_error: float  # Mean |mean prediction - share of positives| of the training bags.


class PseudoLabels(NamedTuple):
  """What belief propagation gave the training rows, against their hidden labels."""

  auc: float  # Of mu.
  accuracy: float  # Of the labels.
  chosen: Candidate


class Outcome(NamedTuple):
  """One data set, bag size and seed."""

  quality: dict[str, Quality]
  pseudo: dict[str, PseudoLabels]
  candidates: list[Candidate]  # Of round 1.
  proportion_auc: float  # Of the bag's share as the score of its training rows.
  switches: dict[str, tuple[float, float]]  # AUC of mu and of the classifier.


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Runs every data set, bag size and seed; sets that are not there are skipped with a note."""
  if unknown := set(config.baselines) - set(BASELINES):
    raise UserError(f"no baseline {', '.join(sorted(unknown))}; there are {', '.join(BASELINES)}")
  report = Report(tables=[], figures=[], claims=[])
  sets = {}
  for name in config.datasets:
    try:
      sets[name] = data.load(name)
    except UserError as e:
      report.tables.append(Table(f"Not run: {name}", ["reason"], [[str(e)]]))
  cells = [
    (name, m, seed) for name in sets for m in config.bag_sizes for seed in range(config.seeds)
  ]
  outcomes = {}
  for name, m, seed in track(cells, "data sets, bag sizes, seeds", console=Console(stderr=True)):
    outcomes[name, m, seed] = measure(config, name, *sets[name], m, seed)
  for name in sets:
    of_set = {
      m: [outcomes[name, m, seed] for seed in range(config.seeds)] for m in config.bag_sizes
    }
    quality_table(name, of_set, workdir, report)
    pseudo_label_table(name, of_set, report)
    candidate_table(name, of_set, report)
    if config.switches_at in of_set:
      switch_table(name, config.switches_at, of_set[config.switches_at], report)
    claims(config, name, of_set, report)
  return report


def method_options(config: ConfigDict, dataset: str) -> Options:
  """The fields of the config that are options of the method; images have a network of their own."""
  names = {field.name for field in dataclasses.fields(Options)}
  options = Options(**{name: config[name] for name in names})
  return dataclasses.replace(options, encoder="cnn") if dataset == "cifar10" else options


def measure(config: ConfigDict, name: str, x, y, m: int, seed: int) -> Outcome:
  """Runs all methods on one split with one draw of bags."""
  rng = np.random.default_rng([zlib.crc32(name.encode()), m, seed])
  if len(y) > config.max_rows:
    rows = rng.permutation(len(y))[: config.max_rows]
    x, y = x[rows], y[rows]
  # The same split for all bag sizes.
  parts = data.split(x, y, (config.validation_share, config.test_share), seed)
  bags = data.random_bags(len(parts.y), m, rng)
  parts = parts._replace(x=parts.x[bags >= 0], y=parts.y[bags >= 0])
  bags = bags[bags >= 0]
  counts = np.bincount(bags, weights=parts.y)
  # The learners get this; parts.y is for the oracle and for measuring.
  bagged = Bagged(
    parts.x, bags, counts, parts.validation_x, parts.validation_y.astype(np.float32), training.auc
  )
  options = method_options(config, name)
  key = jax.random.key(seed)
  quality, pseudo = {}, {}

  def add(method, trained, labelled=None):
    p, train_p = (llp_bp.predict(trained, rows, options)[0] for rows in (parts.test_x, parts.x))
    sizes = np.bincount(bags)
    bag_error = np.abs(np.bincount(bags, weights=train_p) - counts) / sizes
    quality[method] = Quality(
      roc_auc_score(parts.test_y, p), np.mean((p >= 0.5) == parts.test_y), bag_error.mean()
    )
    if labelled is not None:
      pseudo[method] = PseudoLabels(
        roc_auc_score(parts.y, labelled.probability),
        np.mean((labelled.target >= 0.5) == parts.y),
        labelled.chosen,
      )

  rounds = llp_bp.bootstrap(key, bagged, options)
  for number, done in enumerate(rounds, 1):
    add(after(number), done.trained, done)
  once = dataclasses.replace(options, rounds=1)
  if options.bag_factor == "quadratic":
    cardinality = dataclasses.replace(once, bag_factor="cardinality")
    done = llp_bp.bootstrap(key, bagged, cardinality)[0]
    add(CARDINALITY, done.trained, done)
  # Without edges mu is the bag's proportion, which hard labels would round to all 0 or all 1.
  without_edges = dataclasses.replace(
    once, lambda_s=(0.0,), neighbours=options.neighbours[:1], pseudo_labels="soft"
  )
  done = llp_bp.bootstrap(key, bagged, without_edges)[0]
  add(CONTROL, done.trained, done)

  batches = training.pack_bags(bags, counts, options.batch_rows, options.steps, rng)
  for method in config.baselines:
    random = llp_bp.pseudo_labels(rng.random(len(bags)), bags, counts, "top")
    strength = {"LLP-VAT": config.vat_strength, "random labels": options.lambda_a}.get(method, 0.0)
    add(
      method,
      llp_bp.train_classifier(
        key, bagged, batches, random, BASELINES[method], options, strength=strength
      ),
    )
  add(
    ORACLE,
    llp_bp.train_classifier(
      key, bagged, batches, parts.y, losses.pseudo_label_loss, options, strength=0.0
    ),
  )
  switches = {}
  if m == config.switches_at:
    switches = try_switches(key, bagged, parts, batches, once, rounds[0])
  proportion_auc = roc_auc_score(parts.y, (counts / np.bincount(bags))[bags])
  return Outcome(quality, pseudo, rounds[0].candidates, proportion_auc, switches)


def try_switches(
  key, bagged: Bagged, parts: data.Split, batches, options: Options, first: llp_bp.Round
) -> dict[str, tuple[float, float]]:
  """One round at what round 1 chose, with one switch of the method thrown at a time."""
  chosen = dataclasses.replace(
    options,
    neighbours=(first.chosen.neighbours,),
    lambda_s=(first.chosen.lambda_s,),
    lambda_bag=(first.chosen.lambda_bag,),
  )
  changes = {
    "none": {},
    "no bag term": {"lambda_bag": (0.0,)},
    "no covariate edges": {"lambda_s": (0.0,), "pseudo_labels": "soft"},
    "neighbours by cosine": {"metric": "cosine"},
    "RBF kernel": {"kernel": "rbf"},
    "Matern kernel": {"kernel": "matern"},
    "cardinality factor": {"bag_factor": "cardinality"},
    "no aggregate loss": {"lambda_a": 0.0},
    "soft labels": {"pseudo_labels": "soft"},
    "top s_B of each bag": {"pseudo_labels": "top"},
  }
  result = {}
  for name, change in changes.items():
    changed = dataclasses.replace(chosen, **change)
    if set(change) <= {"lambda_a", "pseudo_labels"}:
      probability = first.probability
    else:
      probability = llp_bp.choose_beliefs(bagged.x, bagged.validation_x, bagged, changed)[2]
    target = llp_bp.pseudo_labels(
      probability, bagged.bags, bagged.counts, changed.pseudo_labels, changed.tau
    )
    trained = llp_bp.train_classifier(
      key, bagged, batches, target, losses.pseudo_label_loss, changed
    )
    p = llp_bp.predict(trained, parts.test_x, changed)[0]
    result[name] = roc_auc_score(parts.y, probability), roc_auc_score(parts.test_y, p)
  return result


def quality_table(name: str, of_set: dict, workdir: pathlib.Path, report: Report) -> None:
  """Test AUC, accuracy and bag error of every method, and the plot of AUC by bag size."""
  rows, curves = [], {}
  for m, outcomes in of_set.items():
    for method in outcomes[0].quality:
      values = np.array([o.quality[method] for o in outcomes])
      spread = values[:, 0].std(ddof=1) if len(values) > 1 else None
      auc, accuracy, bag_error = values.mean(axis=0)
      rows.append([m, method, auc, spread, accuracy, bag_error])
      curves.setdefault(method, []).append((np.log2(m), auc, spread or 0.0))
  report.tables.append(
    Table(
      f"{name}: classifiers",
      [
        "bag size",
        "method",
        Column("test AUC", ".3f"),
        Column("sd", ".3f"),
        Column("test accuracy", ".3f"),
        Column("bag error", ".3f"),
      ],
      rows,
      note=(
        f"Mean over {len(next(iter(of_set.values())))} seeds, and the standard deviation of the AUC. "
        "Bag error: mean |mean prediction - share| of the training bags. Every method has the same "
        "network, steps and candidates, chosen by AUC on the labelled validation part."
      ),
    )
  )
  last = max((method for method in curves if method.startswith("BP, ")), key=_rounds)
  shown = [last, CARDINALITY, "DLLP", "EasyLLP", "LLP-VAT", ORACLE]
  file = f"{name}_auc.png"
  plots.line_plot(
    workdir / file,
    {method: tuple(zip(*curves[method])) for method in shown if method in curves},
    xlabel="log2 of the instances per bag",
    ylabel="test AUC",
    title=f"{name}: classifier by bag size",
  )
  report.figures.append(
    Figure(f"{name}: test AUC", file, "Mean and standard deviation over the seeds.")
  )


def _rounds(method: str) -> int:
  words = method.split()
  return int(words[1]) if words[1].isdigit() else 0


def pseudo_label_table(name: str, of_set: dict, report: Report) -> None:
  """Pseudo labels on the training rows, and the convergence of the candidate chosen."""
  rows = []
  for m, outcomes in of_set.items():
    share = float(np.mean([o.proportion_auc for o in outcomes]))
    rows.append([m, "bag proportion", share, None, None, None, None])
    for method in outcomes[0].pseudo:
      found = [o.pseudo[method] for o in outcomes]
      chosen = [p.chosen for p in found]
      rows.append(
        [
          m,
          method,
          float(np.mean([p.auc for p in found])),
          float(np.mean([p.accuracy for p in found])),
          f"{sum(c.converged for c in chosen)}/{len(chosen)}",
          max(c.residual for c in chosen),
          max(c.iterations for c in chosen),
        ]
      )
  report.tables.append(
    Table(
      f"{name}: pseudo labels of the training rows",
      [
        "bag size",
        "method",
        Column("AUC of mu", ".3f"),
        Column("accuracy", ".3f"),
        "converged",
        Column("largest residual", ".1e"),
        "most iterations",
      ],
      rows,
      note="Against hidden labels; convergence of the candidate that each seed chose.",
    )
  )


def candidate_table(name: str, of_set: dict, report: Report) -> None:
  """The grid of round 1: validation AUC and seeds that converged."""
  sizes = list(of_set)
  columns = ["k", "lambda_s", "lambda_bag"]
  for m in sizes:
    columns += [Column(f"AUC, m = {m}", ".3f", "higher"), f"converged, m = {m}"]
  rows = []
  for i, candidate in enumerate(of_set[sizes[0]][0].candidates):
    row = [candidate.neighbours, round(candidate.lambda_s, 6), candidate.lambda_bag]
    for m in sizes:
      same = [o.candidates[i] for o in of_set[m]]
      row += [
        float(np.mean([c.score for c in same])),
        f"{sum(c.converged for c in same)}/{len(same)}",
      ]
    rows.append(row)
  note = (
    "AUC on the validation rows of the mean mu of their k nearest training rows; mean of seeds."
  )
  report.tables.append(Table(f"{name}: candidates of round 1", columns, rows, note=note))


def switch_table(name: str, m: int, outcomes: list[Outcome], report: Report) -> None:
  rows = [
    [switch, *np.mean([o.switches[switch] for o in outcomes], axis=0)]
    for switch in outcomes[0].switches
  ]
  columns = ["change", Column("AUC of mu", ".3f"), Column("test AUC", ".3f")]
  note = (
    "One round at the candidate that each seed chose for the method as it is; mean of seeds. One "
    "round only and the learned embedding are in the tables above."
  )
  report.tables.append(Table(f"{name}: switches, bags of {m}", columns, rows, note=note))


def claims(config: ConfigDict, name: str, of_set: dict, report: Report) -> None:
  """The paper's claims, and the one about large bags."""
  best = after(config.rounds)
  for m, outcomes in of_set.items():
    auc = lambda method, outcomes=outcomes: [o.quality[method].auc for o in outcomes]
    where = f"{name}, bags of {m}"
    control = [o.proportion_auc for o in outcomes]
    mu = [o.pseudo[after(1)].auc for o in outcomes]
    report.claims.append(
      Claim.greater(
        f"The AUC of mu is 0.1 above that of the bag proportion ({where})",
        {"mu": mu, "proportion": control},
        0.1,
      )
    )
    if m >= 32:
      pairs = [(best, baseline) for baseline in config.baselines]
      if CARDINALITY in outcomes[0].quality:
        asked = [b for b in config.baselines if b in ("DLLP", "EasyLLP", "LLP-VAT")]
        pairs += [(CARDINALITY, baseline) for baseline in asked]
      for method, baseline in pairs:
        report.claims.append(
          Claim.greater(
            f"{method}: the test AUC is above that of {baseline} ({where})",
            {method: auc(method), baseline: auc(baseline)},
          )
        )
      if config.rounds > 1:
        report.claims.append(
          Claim.greater(
            f"Round {config.rounds} is not below round 1 ({where})",
            {best: auc(best), after(1): auc(after(1))},
            -1e-9,
          )
        )
    report.claims.append(
      Claim.less(
        f"The test AUC is not above that of the supervised oracle ({where})",
        {best: auc(best), ORACLE: auc(ORACLE)},
        1e-9,
      )
    )
  small, large = min(of_set), max(of_set)
  if small < large and config.baselines:
    gain = lambda m: [
      o.quality[best].auc - max(o.quality[b].auc for b in config.baselines) for o in of_set[m]
    ]
    report.claims.append(
      Claim.greater(
        f"The gain over the best baseline is larger at bags of {large} than of {small} ({name})",
        {f"bags of {large}": gain(large), f"bags of {small}": gain(small)},
      )
    )
