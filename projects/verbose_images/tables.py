"""What was measured as tables, plots and claims."""

import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.verbose_images.measures import Measured, l2_distance, paired_interval, ssim
from projects.verbose_images.outcomes import (
  FIXED,
  FULL,
  NICG_NAME,
  NOISE,
  ORIGINAL,
  SINGLE,
  SPONGE_NAME,
  Ablations,
  Defended,
  SeedRun,
)

# Defences that the claim is about: transforms of the input and the token budget.
NOT_CLAIMED = ("EOS bias schedule", "repetition and entropy monitor")
CLAIMED_SCORE = "perplexity, whole caption"
# MS-COCO with BLIP-2; quoted from memory of the paper.
PAPER = {ORIGINAL: 8.82, NOISE: 9.55, SPONGE_NAME: 22.53, NICG_NAME: 103.54, FULL: 226.72}


def report(
  config: ConfigDict,
  runs: Sequence[SeedRun],
  ablations: Ablations,
  transfer: Sequence[tuple],
  adaptive: dict[str, Defended],
  workdir: pathlib.Path,
) -> Report:
  result = Report(tables=[], figures=[], claims=[])
  lengths(config, runs, workdir, result)
  costs(config, runs, result)
  if config.ablate_losses:
    losses_and_weights(config, runs, ablations, result)
  settings(runs, ablations, transfer, workdir, result)
  decodings(runs, result)
  defences(config, runs, adaptive, workdir, result)
  detectors(runs, result)
  return result


def conditions(run: SeedRun) -> dict[str, Measured]:
  """Everything in the main table, measured with the same keys."""
  names = [name for name in (SPONGE_NAME, NICG_NAME, FULL) if name in run.found]
  return {ORIGINAL: run.original, NOISE: run.noise} | {n: run.found[n].measured for n in names}


def images_of(run: SeedRun, name: str) -> np.ndarray:
  if name == ORIGINAL:
    return run.images
  return run.noise_images if name == NOISE else run.found[name].images


def pooled(runs: Sequence[SeedRun], of) -> np.ndarray:
  """of(run), [images], of all seeds one after the other."""
  return np.concatenate([of(run) for run in runs])


def mean(values) -> float:
  return float(np.mean(list(values)))


def lengths(config, runs: Sequence[SeedRun], workdir: pathlib.Path, result: Report) -> None:
  """The main table: every method under the same budget."""
  original = pooled(runs, lambda run: run.original.length)
  rows = []
  for name in conditions(runs[0]):
    length = pooled(runs, lambda run, name=name: conditions(run)[name].length)
    low, high = paired_interval(length, original, config.resamples)
    selected = None
    if name in runs[0].found:
      selected = mean(pooled(runs, lambda run, name=name: run.found[name].selected))
    words, capped = (
      mean(mean(getattr(conditions(run)[name], field).ravel()) for run in runs)
      for field in ("words", "capped")
    )
    interval = "–" if name == ORIGINAL else f"{low:.1f} to {high:.1f}"
    ratio = length.mean() / original.mean()
    rows.append([name, length.mean(), words, ratio, interval, capped, selected, PAPER[name]])
  result.tables.append(
    Table(
      "Length of captions",
      [
        "images",
        Column("tokens", ".1f"),
        Column("words", ".1f"),
        Column("ratio to original", ".2f"),
        "tokens more than original, 95 %",
        Column("share at the cap", ".2f"),
        Column("tokens at selection", ".1f"),
        Column("paper (BLIP-2, COCO)", ".1f"),
      ],
      rows,
      note=(
        f"{len(original)} images ({len(runs)} seeds), eps {config.eps:g}/255, {config.iterations} "
        f"iterations, cap {config.cap}, {config.samples} captions each with fresh keys. Selection is the "
        "maximum over iterations and optimistic. The interval is a paired bootstrap over images."
      ),
    )
  )
  per_seed = lambda name: [conditions(run)[name].length.mean() for run in runs]
  ratios = [a / b for a, b in zip(per_seed(FULL), per_seed(ORIGINAL))]
  result.claims.append(
    Claim.greater("captions of verbose images are over 3 times as long (ratio)", ratios, 3.0)
  )
  for name in (NOISE, SPONGE_NAME, NICG_NAME):
    if name in conditions(runs[0]):
      measured = {FULL: per_seed(FULL), name: per_seed(name)}
      result.claims.append(Claim.greater(f"verbose images beat {name} (tokens)", measured))
  iterations = np.arange(1, config.iterations + 1)
  history = lambda name: mean_history(runs, name)
  series = {
    n: (iterations, history(n)) for n in (FULL, NICG_NAME, SPONGE_NAME) if n in runs[0].found
  }
  plots.line_plot(
    workdir / "iterations.png",
    series,
    xlabel="iteration",
    ylabel="largest mean length so far (tokens)",
    title="Length by iterations, at selection",
  )
  result.figures.append(Figure("Length by iterations", "iterations.png"))


def mean_history(runs: Sequence[SeedRun], name: str) -> np.ndarray:
  return np.mean([run.found[name].history.mean(axis=1) for run in runs], axis=0)


def costs(config, runs: Sequence[SeedRun], result: Report) -> None:
  """Latency, FLOPs, energy, size of the change and truth of the captions."""
  rows = []
  for name in conditions(runs[0]):
    measured = [conditions(run)[name] for run in runs]
    energy = [m.joules for m in measured]
    flops = mean(m.flops.mean() for m in measured) / 1e6
    first = mean(run.original.flops.mean() for run in runs) / 1e6
    quality = None
    if measured[0].quality is not None:
      quality = np.mean([m.quality for m in measured], axis=0).tolist()
    changed = [(run.images, images_of(run, name)) for run in runs]
    rows.append(
      [name, flops, flops / first, 1000 * mean(m.seconds for m in measured)]
      + [None if None in energy else mean(energy)]
      + [mean(mean(f(a, b)) for a, b in changed) for f in (ssim, l2_distance)]
      + (quality or [None] * 3)
    )
  accuracy = None
  if runs[0].clean_greedy.quality is not None:
    accuracy = mean(run.clean_greedy.quality.accuracy for run in runs)
  clean = "not known" if accuracy is None else f"{accuracy:.3f}"
  result.tables.append(
    Table(
      "Cost, size of the change, and what captions say",
      [
        "images",
        Column("MFLOPs per caption", ".2f"),
        Column("ratio", ".2f"),
        Column("ms per image", ".2f"),
        Column("joules per image", ".3f"),
        Column("SSIM", ".3f"),
        Column("L2", ".2f"),
        Column("attribute accuracy", ".3f"),
        Column("CHAIR_i", ".3f"),
        Column("CHAIR_s", ".3f"),
      ],
      rows,
      note=(
        f"Latency is wall time in batches of {config.batch_images} images, which last as long as the "
        "longest caption; joules are the processor's (RAPL), where it can be read. Attribute accuracy "
        f"of the models, {len(runs[0].clean.length)} held-out images each, greedy: {clean}."
      ),
    )
  )


def losses_and_weights(config, runs, ablations: Ablations, result: Report) -> None:
  """Every subset of the losses, and weights with and without time."""
  original = mean(pooled(runs, lambda run: run.original.length))
  first = mean(runs[0].original.length)
  rows = [
    [name, found.measured.length.mean(), found.measured.length.mean() / first, 1]
    for name, found in ablations.losses.items()
  ]
  for name in (*SINGLE, FULL, FIXED):
    length = pooled(runs, lambda run, name=name: run.found[name].measured.length).mean()
    label = "L1 + L2 + L3, temporal weights" if name == FULL else name
    label = "L1 + L2 + L3, fixed weights" if name == FIXED else label
    rows.append([label, length, length / original, len(runs)])
  result.tables.append(
    Table(
      "Losses and weights",
      ["losses", Column("tokens", ".1f"), Column("ratio to original", ".2f"), "seeds"],
      rows,
      note="Fixed: the weights that balance the losses in the first iteration are kept.",
    )
  )
  full = pooled(runs, lambda run: run.found[FULL].measured.length)
  for name in SINGLE:
    difference = full - pooled(runs, lambda run, name=name: run.found[name].measured.length)
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    result.claims.append(
      Claim.greater(
        f"the full loss is no worse than {name} alone, within a standard error (paired difference over "
        "images, in standard errors)",
        [difference.mean() / error if error else 0.0],
        -1.0,
      )
    )
  per_seed = lambda name: [run.found[name].measured.length.mean() for run in runs]
  measured = {"temporal": per_seed(FULL), "fixed": per_seed(FIXED)}
  result.claims.append(Claim.greater("temporal weights beat fixed ones (tokens)", measured))


def settings(runs, ablations: Ablations, transfer, workdir: pathlib.Path, result: Report) -> None:
  """Budget, cap, and another model."""
  first = runs[0]
  original = first.original.captions.lengths
  columns = [Column("tokens", ".1f"), Column("original", ".1f"), Column("ratio to original", ".2f")]
  row = lambda name, length, clean: [name, length, clean, length / clean]
  rows = [
    row(f"{eps:g}/255", f.measured.length.mean(), original.mean())
    + [mean(ssim(first.images, f.images))]
    for eps, f in ablations.eps.items()
  ]
  result.tables.append(
    Table("Budget eps, first seed", ["eps", *columns, Column("SSIM", ".3f")], rows)
  )
  plots.line_plot(
    workdir / "eps.png",
    {"verbose images": (list(ablations.eps), [r[1] for r in rows])}
    | {"original": (list(ablations.eps), [r[2] for r in rows])},
    xlabel="eps (of 255)",
    ylabel="length (tokens)",
    title="Length by budget, first seed",
  )
  result.figures.append(Figure("Length by budget", "eps.png"))
  caps = {cap: f.measured.length.mean() for cap, f in ablations.cap.items()}
  rows = [row(cap, n, np.minimum(original, cap).mean()) for cap, n in caps.items()]
  result.tables.append(Table("Maximum length, first seed", ["cap", *columns], rows))
  if len(caps) > 1:
    steps = np.diff(list(caps.values()))
    result.claims.append(
      Claim.greater("longer caps give longer captions (smallest increase, tokens)", [steps.min()])
    )
  if transfer:
    rows = [
      [f"model {a} to model {b}", clean.mean(), verbose.mean(), verbose.mean() / clean.mean()]
      for a, b, clean, verbose in transfer
    ]
    names = [
      "from, to",
      Column("original", ".1f"),
      Column("verbose", ".1f"),
      Column("ratio", ".2f"),
    ]
    result.tables.append(Table("Black-box transfer", names, rows))


def decodings(runs: Sequence[SeedRun], result: Report) -> None:
  """Images made under the main decoding, captioned under others."""
  rows = []
  for name in runs[0].decodings:
    original, verbose = (
      pooled(runs, lambda run, i=i, name=name: run.decodings[name][i]).mean() for i in (0, 1)
    )
    rows.append([name, original, verbose, verbose / original])
  columns = [Column("original", ".1f"), Column("verbose", ".1f"), Column("ratio", ".2f")]
  result.tables.append(Table("Decoding", ["method", *columns], rows))


def defences(config, runs, adaptive: dict[str, Defended], workdir, result: Report) -> None:
  """Length behind every defence; 1 is the original's."""
  original = pooled(runs, lambda run: run.original.length).mean()
  undefended = pooled(runs, lambda run: run.found[FULL].measured.length).mean()
  clean = pooled(runs, lambda run: run.clean.length).mean()
  rows = [["none", undefended, undefended / original, clean, None if _unknown(runs) else 0.0]]
  ratios, losses = {}, {}
  for name in runs[0].defences:
    of = lambda field, name=name: [getattr(run.defences[name], field) for run in runs]
    length = np.concatenate(of("attacked")).mean()
    loss = None if _unknown(runs) else mean(of("accuracy_loss"))
    rows.append([name, length, length / original, np.concatenate(of("clean")).mean(), loss])
    ratios[name], losses[name] = length / original, loss
  result.tables.append(
    Table(
      "Defences that the attack does not know",
      [
        "defence",
        Column("tokens", ".1f"),
        Column("recovery ratio", ".2f"),
        Column("tokens, clean images", ".1f"),
        Column("loss of attribute accuracy", ".3f"),
      ],
      rows,
      note=(
        "Recovery ratio: length of verbose images behind the defence over that of the original images "
        "without it. Clean: images that are not attacked."
      ),
    )
  )
  if not _unknown(runs):
    allowed = [n for n in ratios if n not in NOT_CLAIMED and losses[n] < 0.05]
    best = min(allowed, key=ratios.get, default=None)
    of = lambda run: run.defences[best].attacked.mean() / run.original.length.mean()
    result.claims.append(
      Claim.less(
        f"a transform or budget that loses under 5 points of accuracy ({best}) brings the length below "
        "1.5 times the original",
        [of(run) if best else np.inf for run in runs],
        1.5,
      )
    )
  first = runs[0].original.length.mean()
  rows = []
  for name, found in adaptive.items():
    unaware = runs[0].defences[name].attacked.mean() if name in runs[0].defences else None
    rows.append([name, unaware, found.attacked.mean(), found.attacked.mean() / first])
    rows[-1].append(found.accuracy_loss)
  plain = runs[0].found[FULL].measured.length.mean()
  rows.insert(0, ["none", plain, plain, plain / first, None])
  result.tables.append(
    Table(
      "Adaptive attack through the defence, first seed",
      [
        "defence",
        Column("tokens, unaware attack", ".1f"),
        Column("tokens, adaptive attack", ".1f"),
        Column("recovery ratio, adaptive", ".2f"),
        Column("loss of attribute accuracy", ".3f"),
      ],
      rows,
      note="Rounding passes gradients straight through. Fine-tuning: attacked as any model, white box.",
    )
  )
  groups = list(ratios)
  plots.interval_plot(
    workdir / "defences.png",
    groups,
    {
      "verbose images": _bars(runs, groups, "attacked"),
      "clean images": _bars(runs, groups, "clean"),
    },
    xlabel="tokens, range of seeds",
    title="Behind a defence",
  )
  result.figures.append(Figure("Defences", "defences.png"))


def _unknown(runs: Sequence[SeedRun]) -> bool:
  """Whether nobody knows what applies to the images."""
  return runs[0].clean.quality is None


def _bars(runs: Sequence[SeedRun], names: Sequence[str], field: str):
  """Mean over seeds, and the range of the seeds."""
  values = np.array([[getattr(run.defences[n], field).mean() for run in runs] for n in names])
  return values.mean(axis=1), np.column_stack([values.min(axis=1), values.max(axis=1)])


def detectors(runs: Sequence[SeedRun], result: Report) -> None:
  """How well captions that reached the cap are told from those of clean images."""
  capped = [run for run in runs if run.detectors]
  if not capped:
    return
  rows = [
    [name]
    + [mean(getattr(run.detectors[name], field) for run in capped) for field in ("auroc", "tpr")]
    for name in capped[0].detectors
  ]
  result.tables.append(
    Table(
      "Detectors of captions that reached the cap",
      ["score", Column("AUROC", ".3f", "higher"), Column("TPR at 1 % FPR", ".2f", "higher")],
      rows,
      note=f"Mean of {len(capped)} seeds in which any did.",
    )
  )
  result.claims.append(
    Claim.greater(
      f"a detector ({CLAIMED_SCORE}) tells capped captions from clean ones (AUROC)",
      [run.detectors[CLAIMED_SCORE].auroc for run in capped],
      0.9,
    )
  )
