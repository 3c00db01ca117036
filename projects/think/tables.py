"""Tables, figures and claims of what was measured."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from common.reporting.plots import heatmap, line_plot
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.think.analysis import rank_for
from projects.think.study import RANDOM, SCORES, Measured

NORMS = ("l2 norm of keys", "l1 norm of keys")
QUERY = "query-driven"
PARTNERS = ("none", "SnapKV", "H2O", "KIVI")


def report(
  config: ConfigDict,
  studied: Mapping[str, dict],
  timed: Mapping[float, tuple],
  answered: Mapping[tuple, float],
  workdir: pathlib.Path,
) -> Report:
  """Everything that a run says.

  Args:
    studied: of "text" and "recall", what `experiment.study` returns; "grid", of `needle_grid`.
    timed: {ratio: seconds and bytes}.
    answered: {(capacity, ratio): LongBench score}.
    workdir: for the figures.
  """
  found, figures, claims = [], [], []
  for name in ("text", "recall"):
    if name in studied:
      study = studied[name]
      found += [
        score_table(config, name, study),
        partner_table(config, name, study),
        ablation_table(config, name, study),
        fact_table(name, study),
      ]
      figures += study_figures(config, name, study, workdir)
      claims += study_claims(config, name, study)
  if "text" in studied:
    claims.append(memory_claim(config, studied["text"]))
  if "grid" in studied:
    found.append(grid_table(config, studied["grid"]))
    figures.append(grid_figure(config, studied["grid"], workdir))
  if timed:
    found.append(time_table(config, timed))
  if answered:
    found.append(longbench_table(config, answered))
  return Report(tables=found, figures=figures, claims=claims)


def mean(measured: Sequence[Measured], field: str) -> float | None:
  values = [getattr(m, field) for m in measured]
  return None if None in values else float(np.mean(values))


def _row(measured: Sequence[Measured]) -> list[float | None]:
  return [mean(measured, field) for field in ("kl", "perplexity", "accuracy", "error")]


_COSTS = [
  Column("KL to the dense cache", ".4f"),
  Column("perplexity", ".3f"),
  Column("accuracy", ".3f"),
  Column("error of the logits", ".3f"),
]


def score_table(config: ConfigDict, name: str, study: dict) -> Table:
  results = study["results"]
  rows = [["–", "all channels", *_row(results["dense",])]]
  for ratio in config.ratios:
    for score in (*SCORES, RANDOM):
      rows.append([ratio, score, *_row(results["score", score, ratio])])
  return Table(
    f"Channels of the keys dropped: {name}",
    [Column("ratio", ".1f"), "score", *_COSTS],
    rows,
    f"Mean of {len(config.seeds)} seeds. Logits: of later queries and the pruned keys, relative.",
  )


def partner_table(config: ConfigDict, name: str, study: dict) -> Table:
  results, sizes = study["results"], study["bytes"]
  dense = sizes["none", 0.0]
  rows = []
  for partner in PARTNERS:
    for ratio in (0.0, *config.partner_ratios):
      if (partner, ratio) not in sizes:
        continue
      key = (partner, ratio)
      if partner == "none":
        key = ("score", QUERY, ratio) if ratio else ("dense",)
      if key in results:
        label = "ThinK" if ratio else "dense keys"
        cell = [partner, label, ratio, sizes[partner, ratio], sizes[partner, ratio] / dense]
        rows.append([*cell, *_row(results[key])[:3]])
  for ratio in config.partner_ratios:
    size = sizes["fewer tokens", ratio]
    cell = ["SnapKV", "fewer tokens, bytes of ThinK", ratio, size, size / dense]
    rows.append([*cell, *_row(results["fewer tokens", ratio])[:3]])
  columns = ["partner", "keys", Column("ratio", ".1f"), Column("bytes", ",d")]
  columns += [Column("of the dense cache", ".3f"), *_COSTS[:3]]
  return Table(f"With eviction and quantization: {name}", columns, rows, "Bytes of one prompt.")


def ablation_table(config: ConfigDict, name: str, study: dict) -> Table:
  results = study["results"]
  at = f"ratio {config.ablation_ratio:g}"
  rows = []
  for kind, what in (
    ("recent", f"recent tokens with all channels, {at}"),
    ("window", f"observation window, {at}"),
    ("values", "channels of the values dropped instead, ratio"),
    ("keys and values", "channels of both dropped, ratio"),
    ("per head", "selection per query head, ratio"),
  ):
    rows += [[what, key[1], *_row(m)] for key, m in results.items() if key[0] == kind]
  return Table(f"One thing changed: {name}", ["what", "value", *_COSTS], rows)


def fact_table(name: str, study: dict) -> Table:
  facts = study["facts"]
  values, tried = facts["singular values"], facts["exhaustive"]
  rows = [
    ["energy of the largest 10 % of key channels (a head)", float(np.mean(facts["energy shares"]))],
    ["channels of a head", values.shape[-1]],
    ["singular values for 90 % of the logits' energy", rank_for(values)],
    ["singular values for 99 % of the logits' energy", rank_for(values, 0.99)],
    ["heads on which all selections were tried", tried.matrices],
    ["share of them where greedy is the best selection", tried.optimal],
    ["greedy's error over the best one's", tried.error_ratio],
  ]
  return Table(f"Channels: {name}", ["what", Column("value", ".3f")], rows)


def grid_table(config: ConfigDict, grid: Mapping[float, np.ndarray]) -> Table:
  columns = [Column("ratio", ".1f"), "haystack"]
  columns += [Column(f"depth {depth:g}", ".3f") for depth in config.grid_depths]
  rows = [
    [ratio, length, *cells[i].tolist()]
    for ratio, cells in grid.items()
    for i, length in enumerate(config.grid_lengths)
  ]
  return Table("Needle in a haystack: accuracy", columns, rows)


def time_table(config: ConfigDict, timed: Mapping[float, tuple]) -> Table:
  columns = ["ratio", Column("milliseconds", ".2f"), Column("bytes", ",d")]
  rows = [[ratio, 1e3 * t.seconds, t.num_bytes] for ratio, t in timed.items()]
  title = f"Attention of one token over {config.timed_slots} slots, the heads of Llama-3-8B"
  return Table(title, columns, rows, "float32, one block, the fastest of 25.")


def longbench_table(config: ConfigDict, answered: Mapping[tuple, float]) -> Table:
  columns = ["tokens kept", "ratio", Column(config.longbench_metric, ".2f")]
  rows = [[c or "all", ratio, score] for (c, ratio), score in answered.items()]
  return Table(f"LongBench: {pathlib.Path(config.longbench).stem}", columns, rows)


def study_claims(config: ConfigDict, name: str, study: dict) -> list[Claim]:
  results = study["results"]
  high = [r for r in config.ratios if r >= 0.3]
  field = lambda key, f: np.array([getattr(m, f) for m in results[key]])
  error = lambda score, r: field(("score", score, r), "error")
  kl = lambda ratio: field(("score", QUERY, ratio), "kl")

  def worst(first, second) -> list[float]:
    """The largest log ratio of errors over the ratios, per seed: below 0 if first is always less."""
    return np.max([np.log(first(r) / second(r)) for r in high], axis=0).tolist()

  best_norm = lambda r: np.minimum(*(error(n, r) for n in NORMS))
  worst_norm = lambda r: np.maximum(*(error(n, r) for n in NORMS))
  main = ("score", QUERY, config.main_ratio)
  claims = [
    Claim.less(
      f"{name}: query-driven channels have less error than those by either norm, every ratio >= 0.3",
      worst(lambda r: error(QUERY, r), best_norm),
    ),
    Claim.less(
      f"{name}: both norms have less error than random channels, every ratio >= 0.3",
      worst(worst_norm, lambda r: error(RANDOM, r)),
    ),
  ]
  if name == "text":
    rise = field(main, "perplexity") / field(("dense",), "perplexity") - 1
    claims.append(
      Claim.less(
        f"text: perplexity rises by less than 2 % at ratio {config.main_ratio}", rise, 0.02
      )
    )
  else:
    fall = field(("dense",), "accuracy") - field(main, "accuracy")
    claims.append(
      Claim.less(
        f"recall: accuracy falls by less than 0.02 at ratio {config.main_ratio}", fall, 0.02
      )
    )
  if {0.4, 0.6, 0.8} <= set(config.ratios):
    bend = (kl(0.8) - kl(0.6)) - (kl(0.6) - kl(0.4))
    claims.append(Claim.greater(f"{name}: degradation accelerates past ratio 0.6", bend))
  ratio = config.partner_ratios[0]
  claims.append(
    Claim.less(
      f"{name}: SnapKV with ThinK at ratio {ratio} loses less than 0.02 accuracy to SnapKV",
      field(("SnapKV", 0.0), "accuracy") - field(("SnapKV", ratio), "accuracy"),
      0.02,
    )
  )
  claims.append(
    Claim.less(
      f"{name}: SnapKV with ThinK at ratio {ratio} is nearer to the dense cache than SnapKV with "
      "fewer tokens and the same bytes",
      {
        "ThinK": field(("SnapKV", ratio), "kl"),
        "fewer tokens": field(("fewer tokens", ratio), "kl"),
      },
    )
  )
  return claims


def memory_claim(config: ConfigDict, study: dict) -> Claim:
  sizes, ratio = study["bytes"], config.partner_ratios[0]
  saved = 1 - sizes["none", ratio] / sizes["none", 0.0]
  return Claim.greater(f"more than 20 % of the cache saved at ratio {ratio}", [saved], 0.2)


def study_figures(config: ConfigDict, name: str, study: dict, workdir) -> list[Figure]:
  results, facts = study["results"], study["facts"]
  scores = (*SCORES, RANDOM)
  field = "kl" if name == "text" else "accuracy"
  label = "KL to the dense cache, nats" if name == "text" else "accuracy of needles"
  series = {
    score: (
      list(config.ratios),
      [mean(results["score", score, r], field) for r in config.ratios],
      [
        float(np.std([getattr(m, field) for m in results["score", score, r]]))
        for r in config.ratios
      ],
    )
    for score in scores
  }
  path = f"{name}_ratios.png"
  log = "y" if name == "text" else ""
  line_plot(workdir / path, series, xlabel="pruning ratio of key channels", ylabel=label, log=log)
  figures = [Figure(f"{name}: cost by pruning ratio", path, "Shaded: standard deviation of seeds.")]
  ordered = np.sort(facts["norms"], axis=-1)[..., ::-1]
  ordered = (ordered / ordered.sum(-1, keepdims=True)).reshape(-1, ordered.shape[-1]).mean(0)
  values = facts["singular values"]
  values = (values / values.sum(-1, keepdims=True)).mean(0)
  at = np.arange(1, len(ordered) + 1)
  path = f"{name}_spectra.png"
  series = {"norms of key channels": (at, ordered), "singular values of logits": (at, values)}
  line_plot(workdir / path, series, xlabel="rank in the head", ylabel="share", log="y")
  figures.append(Figure(f"{name}: few channels and few directions", path))
  if name == "text":
    heads = facts["norms"].reshape(-1, facts["norms"].shape[-1])
    path = "text_channels.png"
    blocks, kv_heads, channels = facts["norms"].shape
    rows = [f"{b}.{h}" for b in range(blocks) for h in range(kv_heads)]
    columns = [str(c) if c % 8 == 0 else "" for c in range(channels)]
    heatmap(
      workdir / path, heads, rows, columns, xlabel="channel", ylabel="block.head", title="||k_j||"
    )
    figures.append(Figure("text: norms of key channels", path))
  return figures


def grid_figure(config: ConfigDict, grid: Mapping[float, np.ndarray], workdir) -> Figure:
  path = "needles.png"
  shown = [r for r in grid if r in (0.0, 0.4, 0.6, 0.8)]
  heatmap(
    workdir / path,
    np.concatenate([grid[r] for r in shown]),
    [f"{r:g}, {n}" for r in shown for n in config.grid_lengths],
    [f"{d:g}" for d in config.grid_depths],
    xlabel="depth of the needle",
    ylabel="ratio, haystack",
    title="Accuracy",
    annotate=".2f",
  )
  return Figure("Needles by pruning ratio, length and depth", path)
