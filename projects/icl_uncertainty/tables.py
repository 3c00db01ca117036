"""The tables, plots and claims of the experiments, from predictions alone."""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.icl_uncertainty.metrics import Evaluation, by_position, icl_score

FRESH, META, NO_POSITIONS = "infinite pool", "meta-trained", "no positions"
MEAN_ONLY, RANDOM_LENGTHS = "mean only", "random lengths"
BAYES, POOL_BAYES, PLUG_IN = "Bayes", "Bayes of the pool", "ridge, plug-in sigma"

IN_DISTRIBUTION = "in distribution"
NOISE_SHIFT, WEIGHT_SHIFT = "larger sigma", "larger w"
SCALE_SHIFT, MEAN_SHIFT = "larger x", "shifted x"

LATE = 8  # Positions t >= 8 count as late: more labels than a task has numbers.

_by_position = jax.jit(jax.vmap(by_position))

Scores = dict[str, np.ndarray]  # {metric: [seeds, T]}


def report(config: ConfigDict, workdir: pathlib.Path, sets: dict[str, Evaluation]) -> Report:
  """Everything; see the parts."""
  scores = {
    set_name: {name: score(evaluation, name) for name in evaluation.predictions}
    for set_name, evaluation in sets.items()
  }
  result = Report(tables=[], figures=[], claims=[])
  in_distribution(config, workdir, scores[IN_DISTRIBUTION], result)
  task_shift(config, workdir, sets, scores, result)
  covariate_shift(config, workdir, scores, result)
  length_shift(config, workdir, scores[IN_DISTRIBUTION], result)
  return result


def score(evaluation: Evaluation, name: str) -> Scores:
  """`by_position` of one predictor; what needs a sd is NaN for a model that was not trained to it."""
  prompts, bayes = evaluation.prompts, evaluation.predictions[BAYES]
  truth = np.asarray(prompts.truth)
  found = _by_position(evaluation.predictions[name], bayes, truth, prompts.y)
  stacked = jax.tree.map(np.asarray, found)
  if name == MEAN_ONLY:
    needs_sd = set(stacked) - {"squared error", "squared error to Bayes"}
    stacked |= {metric: np.full_like(stacked[metric], np.nan) for metric in needs_sd}
  return stacked


def positions(config: ConfigDict) -> dict[str, slice]:
  """Bands of positions t, which counts from 1."""
  return {
    "early": slice(0, 2 * config.dim),
    "late": slice(LATE - 1, config.length),
    "beyond": slice(config.length, config.longest),
  }


def mean(values: np.ndarray) -> float | None:
  """Over everything; None (a dash) where nothing was measured."""
  return None if np.isnan(values).any() else float(np.mean(values))


def icl_scores(config: ConfigDict, evaluation: Evaluation, name: str) -> np.ndarray:
  """`icl_score` at t = T of every seed."""
  sd = evaluation.predictions[name].sd[..., config.length - 1]
  return np.array([float(icl_score(*pair)) for pair in zip(sd, evaluation.prompts.sigma)])


def in_distribution(config: ConfigDict, workdir, scores: dict[str, Scores], result: Report) -> None:
  """(a) Every predictor beside Bayes."""
  bands = positions(config)
  early, late = bands["early"], bands["late"]
  rows = []
  for name, found in scores.items():
    cells = [
      mean(found[metric][:, late])
      for metric in ("squared error", "squared error to Bayes", "sd error to Bayes")
    ]
    gaps = [mean(found["NLL gap"][:, band]) for band in (early, late)]
    cells += [*gaps, mean(found["coverage"][:, late]), mean(found["CRPS"][:, late])]
    rows.append([name, *cells])
  within = f"t = {LATE} ... {config.length}"
  result.tables.append(
    Table(
      "(a) In distribution",
      [
        "predictor",
        Column("squared error", ".4f"),
        Column("to Bayes mean", ".4f"),
        Column("sd to Bayes", ".4f"),
        Column(f"NLL gap, t <= {2 * config.dim}", ".3f"),
        Column("NLL gap", ".3f"),
        Column("coverage", ".3f"),
        Column("CRPS", ".3f"),
      ],
      rows,
      note=f"{within} unless said otherwise; {config.test_prompts} fresh prompts, {config.seeds} "
      "seeds. The NLL gap is to Bayes, in nats; coverage is of mean +- 1.96 sd.",
    )
  )
  shown = [t for t in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100) if t <= config.length]
  metrics = [m for m in scores[FRESH] if m != "NLL"]
  result.tables.append(
    Table(
      "(a) The model of the infinite pool, by position",
      ["t", *(Column(metric, ".4f") for metric in metrics)],
      [[t, *(mean(scores[FRESH][metric][:, t - 1]) for metric in metrics)] for t in shown],
      note="Means over prompts and seeds.",
    )
  )
  t = np.arange(1, config.length + 1)
  names = [FRESH, pool_name(config.pools[0]), PLUG_IN, "ridge, mean sigma"]
  gap = {name: (t, scores[name]["NLL gap"].mean(0)[: config.length]) for name in names}
  plots.line_plot(
    workdir / "in_distribution.png",
    gap,
    xlabel="position t",
    ylabel="NLL gap to Bayes, nats",
    title="In distribution",
  )
  result.figures.append(Figure("In distribution", "in_distribution.png", "Mean over the seeds."))
  gap = lambda name, band: scores[name]["NLL gap"][:, band].mean(1)
  result.claims.extend(
    [
      Claim.less(f"the NLL gap to Bayes is below 0.1 nats at t >= {LATE}", gap(FRESH, late), 0.1),
      Claim.less(
        f"the NLL gap is below that of ridge with plug-in sigma at t <= {2 * config.dim}",
        {FRESH: gap(FRESH, early), PLUG_IN: gap(PLUG_IN, early)},
      ),
      Claim.less(
        "training for the sd too does not cost the mean: squared error to Bayes below 1.5 times "
        f"that of training for the mean only, at t >= {LATE}",
        [
          a / b
          for a, b in zip(
            *(scores[n]["squared error to Bayes"][:, late].mean(1) for n in (FRESH, MEAN_ONLY))
          )
        ],
        1.5,
      ),
    ]
  )


def pool_name(size: int) -> str:
  return f"pool of {size}"


def task_shift(config: ConfigDict, workdir, sets, scores, result: Report) -> None:
  """(b) Tasks that the training did not have, and models that saw few tasks."""
  pools = [pool_name(size) for size in config.pools]
  late, last = positions(config)["late"], config.length - 1
  rows = []
  for set_name in (IN_DISTRIBUTION, NOISE_SHIFT, WEIGHT_SHIFT):
    evaluation = sets[set_name]
    for name in (FRESH, *pools, BAYES, PLUG_IN):
      found = scores[set_name][name]
      cells = [mean(found[metric][:, late]) for metric in ("squared error", "NLL")]
      sd = float(evaluation.predictions[name].sd[..., last].mean())
      slope = float(icl_scores(config, evaluation, name).mean())
      rows.append([set_name, name, *cells, float(evaluation.prompts.sigma.mean()), sd, slope])
  low, high = config.shifted_noise
  result.tables.append(
    Table(
      "(b) Task shift",
      [
        "tasks",
        "predictor",
        Column("squared error", ".4f"),
        Column("NLL", ".3f"),
        Column("mean sigma", ".3f"),
        Column("mean sd", ".3f"),
        Column("ICL score", ".3f"),
      ],
      rows,
      note=f"Larger sigma: U[{low:g}, {high:g}]; larger w: N(0, {config.shifted_weights:g}^2 I). "
      f"Errors at t = {LATE} ... {config.length}, the rest at t = {config.length}. The ICL score "
      "is the slope of the predicted sd on sigma. Bayes has the training prior.",
    )
  )

  rows = []
  for name in (*pools, FRESH):
    own = scores.get(name, scores[IN_DISTRIBUTION])
    own_gap = own[name]["NLL gap"]
    if POOL_BAYES in own:
      own_gap = own[name]["NLL"] - own[POOL_BAYES]["NLL"]
    elif name != FRESH:
      own_gap = np.array([np.nan])
    fresh_gap = scores[IN_DISTRIBUTION][name]["NLL gap"][:, late]
    rows.append(
      [
        name,
        None if np.isnan(own_gap).any() else float(own_gap[:, late].mean()),
        float(fresh_gap.mean()),
        float(icl_scores(config, sets[IN_DISTRIBUTION], name).mean()),
      ]
    )
  result.tables.append(
    Table(
      "(b) Diversity of the training tasks",
      [
        "training tasks",
        Column("NLL gap, own tasks", ".3f"),
        Column("NLL gap, fresh tasks", ".3f"),
        Column("ICL score, fresh tasks", ".3f"),
      ],
      rows,
      note="On its own tasks a pool is compared with Bayes over its members. Gaps at "
      f"t = {LATE} ... {config.length}.",
    )
  )

  # Predicted sd in eight bins of the true sigma, over both ranges of it.
  series = {}
  for name in (FRESH, pools[0], BAYES):
    pairs = [
      (sets[s].prompts.sigma.ravel(), sets[s].predictions[name].sd[..., last].ravel())
      for s in (IN_DISTRIBUTION, NOISE_SHIFT)
    ]
    sigma, sd = (np.concatenate(values) for values in zip(*pairs))
    bins = np.array_split(np.argsort(sigma), 16)
    series[name] = ([sigma[b].mean() for b in bins], [sd[b].mean() for b in bins])
  truth = series[BAYES][0]
  plots.line_plot(
    workdir / "task_shift.png",
    series | {"sd = sigma": (truth, truth)},
    xlabel="sigma of the prompt",
    ylabel=f"predicted sd at t = {config.length}",
    title="In-context or in-weight",
  )
  result.figures.append(
    Figure("Task shift", "task_shift.png", "Fresh tasks, within and above the training range.")
  )

  fresh = sets[IN_DISTRIBUTION]
  at_last = fresh.predictions[FRESH].sd[..., last]
  correlation = [np.corrcoef(*pair)[0, 1] for pair in zip(at_last, fresh.prompts.sigma)]
  score_of = lambda name: icl_scores(config, fresh, name)
  shifted = sets[NOISE_SHIFT].predictions[FRESH].sd[..., last].mean(1)
  few = pool_name(config.pools[0])
  high = config.noise_high
  result.claims.extend(
    [
      Claim.greater(
        f"the predicted sd at t = {config.length} correlates with sigma at 0.8", correlation, 0.8
      ),
      Claim.less(
        f"the ICL score of the {few} is below half that of the infinite pool, on fresh tasks",
        {few: score_of(few), "half of the infinite pool": 0.5 * score_of(FRESH)},
      ),
      Claim.greater(
        f"with sigma above the training range the predicted sd exceeds the range's end, {high:g}",
        shifted,
        high,
      ),
    ]
  )


def covariate_shift(config: ConfigDict, workdir, scores, result: Report) -> None:
  """(c) Covariates of another scale or mean than those of the training."""
  late = positions(config)["late"]
  rows = []
  for set_name in (IN_DISTRIBUTION, SCALE_SHIFT, MEAN_SHIFT):
    for name in (FRESH, META, BAYES):
      found = scores[set_name][name]
      rows.append(
        [set_name, name]
        + [mean(found[metric][:, late]) for metric in ("squared error", "NLL gap", "coverage")]
      )
  result.tables.append(
    Table(
      "(c) Covariate shift",
      [
        "covariates",
        "predictor",
        Column("squared error", ".4f"),
        Column("NLL gap", ".3f"),
        Column("coverage", ".3f"),
      ],
      rows,
      note=f"Larger x: N(0, {config.shifted_scale:g}^2 I); shifted x: N(mu, I), "
      f"|mu| = {config.shifted_mean:g}. t = {LATE} ... {config.length}. Bayes is the same formula "
      "whatever the covariates' law.",
    )
  )
  errors = lambda name, sets: [scores[s][name]["squared error"][:, late].mean() for s in sets]
  kinds = (IN_DISTRIBUTION, SCALE_SHIFT, MEAN_SHIFT)
  plots.bar_plot(
    workdir / "covariate_shift.png",
    kinds,
    {name: errors(name, kinds) for name in (FRESH, META, BAYES)},
    ylabel="squared error",
    title="Covariate shift",
    log=True,
  )
  result.figures.append(Figure("Covariate shift", "covariate_shift.png", "Mean over the seeds."))
  error = lambda name: scores[SCALE_SHIFT][name]["squared error"][:, late].mean(1)
  result.claims.append(
    Claim.greater(
      f"with x scaled by {config.shifted_scale:g} plain training errs more than meta-training",
      {FRESH: error(FRESH), META: error(META)},
    )
  )


def length_shift(config: ConfigDict, workdir, scores: dict[str, Scores], result: Report) -> None:
  """(d) Prompts longer than those of the training."""
  bands = positions(config)
  names = [FRESH, NO_POSITIONS, *(n for n in scores if n.startswith("window of"))]
  names += [RANDOM_LENGTHS] if RANDOM_LENGTHS in scores else []
  nll = lambda name, band: scores[name]["NLL"][:, bands[band]].mean(1)
  longer = f"{config.length} < t <= {config.longest}"
  result.tables.append(
    Table(
      "(d) Length shift",
      [
        "predictor",
        Column(f"NLL, t = {LATE} ... {config.length}", ".3f"),
        Column(f"NLL, {longer}", ".3f"),
      ],
      [[n, *(float(nll(n, band).mean()) for band in ("late", "beyond"))] for n in (*names, BAYES)],
      note=f"Trained on {config.length} labels"
      + (f"; {RANDOM_LENGTHS}: on 1 to {config.longest}." if config.random_lengths else "."),
    )
  )
  t = np.arange(LATE, config.longest + 1)
  plots.line_plot(
    workdir / "length_shift.png",
    {name: (t, scores[name]["NLL"].mean(0)[LATE - 1 :]) for name in (*names, BAYES)},
    xlabel=f"position t (training: up to {config.length})",
    ylabel="NLL, nats",
    title="Longer prompts",
  )
  result.figures.append(Figure("Length shift", "length_shift.png", "Mean over the seeds."))
  result.claims.append(
    Claim.less(
      f"at {longer} the NLL without positions is below that with positions",
      {NO_POSITIONS: nll(NO_POSITIONS, "beyond"), FRESH: nll(FRESH, "beyond")},
    )
  )
