"""What was measured as tables, plots and claims."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.radd.likelihood import Bound
from projects.radd.sampling import expected_calls

LAMBDA, AO, SEDD, AR = "RADD lambda-DCE", "RADD AO", "SEDD", "autoregressive"

# Names of the estimators, and their reference.
LOSS_NAMES = {"t_dse": "t-DSE", "t_dce": "t-DCE", "lambda_dce": "lambda-DCE", "k_dce": "k-DCE (AO)"}
REFERENCE = "lambda_dce"


class Setting(NamedTuple):
  """Attributes: steps, T; cached, whether calls are skipped."""

  steps: int
  cached: bool


class Sampled(NamedTuple):
  """Samples of one sampler.

  Attributes:
    tokens: int32 [samples, seq].
    calls: network evaluations of each row, int32 [samples].
    seconds: of wall time, compiled already.
    perplexity: under the judge.
    unigram_entropy: of the tokens' frequencies, nats; collapsed samples have little.
  """

  tokens: np.ndarray
  calls: np.ndarray
  seconds: float
  perplexity: float
  unigram_entropy: float


class Run(NamedTuple):
  """One seed.

  Attributes:
    parameters: of every model.
    bounds: {model: {source: t-DSE bound}}, on the same masks for all models.
    autoregressive: {source: perplexity} of the baseline.
    losses: {loss: bound} of one network, RADD lambda-DCE, on the first source.
    orders: {model: {order: perplexity}} on the first source.
    samples: {Setting: Sampled} of RADD lambda-DCE.
    samplers: {name: Sampled} at one T.
    text: the first source's windows, judged as samples are.
    infilled: (original, infilled) texts.
    kept: share of the known tokens that infilling left alone.
  """

  parameters: Mapping[str, int]
  bounds: Mapping[str, Mapping[str, Bound]]
  autoregressive: Mapping[str, float]
  losses: Mapping[str, Bound]
  orders: Mapping[str, Mapping[str, float]]
  samples: Mapping[Setting, Sampled]
  samplers: Mapping[str, Sampled]
  text: Sampled
  infilled: Sequence[tuple[str, str]]
  kept: float


class Chain(NamedTuple):
  """A Markov chain, nats per sequence.

  Attributes:
    entropy: of the source, the least bound.
    untrained, trained: the network's exact bounds.
  """

  entropy: float
  untrained: float
  trained: float


def report(
  config: ConfigDict, runs: Sequence[Run], chains: Sequence[Chain], workdir: pathlib.Path
) -> Report:
  result = Report(tables=[], figures=[], claims=[])
  perplexities(config, runs, result)
  losses_of_one_network(config, runs, result)
  fixed_orders(config, runs, result)
  if chains:
    known_conditionals(config, chains, result)
  cached_sampling(config, runs, workdir, result)
  other_samplers(config, runs, result)
  return result


def mean(values) -> float:
  return float(np.mean(list(values)))


def sd(values: Sequence[float]) -> float | None:
  return float(np.std(values, ddof=1)) if len(values) > 1 else None


def perplexities(config, runs: Sequence[Run], result: Report) -> None:
  """Bounds in the training domain and elsewhere."""
  sources = list(config.evaluation_sources)
  first = sources[0]
  rows = []
  for name in (AR, SEDD, LAMBDA, AO):
    exactly = name == AR
    values = lambda source, name=name: [
      run.autoregressive[source] if name == AR else run.bounds[name][source].perplexity
      for run in runs
    ]
    errors = [] if exactly else [run.bounds[name][first].standard_error for run in runs]
    rows.append(
      [name, runs[0].parameters[name], *(mean(values(s)) for s in sources), sd(values(first))]
      + [mean(errors) if errors else None]
    )
  result.tables.append(
    Table(
      "Perplexity, or its upper bound",
      [
        "model",
        "parameters",
        *[Column(s, ".2f", "lower") for s in sources],
        Column(f"sd over seeds, {first}", ".2f"),
        Column("Monte-Carlo error", ".2f"),
      ],
      rows,
      note=(
        f"Mean of {len(runs)} seeds, t-DSE with {config.bound_draws} draws for every window, the same "
        f"masks for all models. Trained on {config.train_source}: the other sources are zero-shot."
      ),
    )
  )
  perplexity = lambda name: np.array([run.bounds[name][first].perplexity for run in runs])
  for name in (LAMBDA, AO):
    result.claims.append(
      Claim.less(
        f"{name} needs no time: its bound is at most 1 % above SEDD's ({first}, ratio of "
        "perplexities)",
        perplexity(name) / perplexity(SEDD),
        1.01,
      )
    )
  result.claims.append(
    Claim.less(
      f"the autoregressive model has the lowest perplexity ({first})",
      {
        "autoregressive": [run.autoregressive[first] for run in runs],
        "best diffusion model": np.min([perplexity(n) for n in (LAMBDA, AO, SEDD)], axis=0),
      },
    )
  )


def losses_of_one_network(config, runs: Sequence[Run], result: Report) -> None:
  """The four losses estimate one number."""
  rows, worst = [], np.zeros(len(runs))
  for loss, name in LOSS_NAMES.items():
    bounds = [run.losses[loss] for run in runs]
    references = [run.losses[REFERENCE] for run in runs]
    z = np.array(
      [(b.nll - r.nll) / np.hypot(b.nll_error, r.nll_error) for b, r in zip(bounds, references)]
    )
    if loss != REFERENCE:
      worst = np.maximum(worst, abs(z))
    rows.append(
      [name, mean(b.nll for b in bounds), mean(b.nll_error for b in bounds)]
      + [None if loss == REFERENCE else float(abs(z).max())]
    )
  result.tables.append(
    Table(
      f"The four losses of one network ({LAMBDA}, {config.evaluation_sources[0]})",
      [
        "loss",
        Column("nats per token", ".4f"),
        Column("standard error", ".4f"),
        Column("largest difference to lambda-DCE, standard errors", ".2f"),
      ],
      rows,
      note=(
        f"{config.bound_draws} draws for every window, other masks for every loss. The t losses leave "
        "out the times below 0.001."
      ),
    )
  )
  result.claims.append(
    Claim.less(
      "the four losses agree within Monte-Carlo error (largest difference to lambda-DCE, in standard "
      "errors)",
      worst,
      3.0,
    )
  )


def fixed_orders(config, runs: Sequence[Run], result: Report) -> None:
  names = list(runs[0].orders)
  orders = list(runs[0].orders[names[0]])
  first = config.evaluation_sources[0]
  result.tables.append(
    Table(
      f"Perplexity in a fixed order ({first})",
      ["model", *[Column(order, ".2f") for order in orders], Column("bound, any order", ".2f")],
      [
        [name, *(mean(run.orders[name][order] for run in runs) for order in orders)]
        + [mean(run.bounds[name][first].perplexity for run in runs)]
        for name in names
      ],
      note="Exact for that order, one network call per token.",
    )
  )


def known_conditionals(config, chains: Sequence[Chain], result: Report) -> None:
  result.tables.append(
    Table(
      f"A Markov chain of {config.chain_length} tokens out of {config.chain_vocab}",
      ["chain", *[Column(c, ".4f") for c in ("entropy", "bound, untrained", "bound, trained")]],
      [[f"{i}", *chain] for i, chain in enumerate(chains)],
      note=(
        "Nats per sequence; the bound is its expectation over all sequences and masks. With the true "
        "conditional distributions it is the entropy."
      ),
    )
  )
  result.claims.append(
    Claim.less(
      "the bound comes down to the entropy of a known source, within 2 %",
      [chain.trained / chain.entropy - 1 for chain in chains],
      0.02,
    )
  )


def cached_sampling(config, runs: Sequence[Run], workdir: pathlib.Path, result: Report) -> None:
  """Network calls, wall time, equality and quality against T."""
  counts, length = list(config.sampling_steps), config.seq_len
  over = lambda count, cached, field: [
    getattr(run.samples[Setting(count, cached)], field) for run in runs
  ]
  calls = np.array([np.mean(over(count, True, "calls")) for count in counts])
  expected = np.array([expected_calls(count, length) for count in counts])
  rows = []
  for count, measured, formula in zip(counts, calls, expected):
    plain, cached = over(count, False, "seconds"), over(count, True, "seconds")
    rows.append(
      [count, float(measured), float(formula), mean(plain), mean(cached)]
      + [mean(np.array(plain) / np.array(cached))]
      + [mean(over(count, False, "perplexity")), mean(over(count, True, "perplexity"))]
      + [mean(over(count, True, "unigram_entropy"))]
    )
  result.tables.append(
    Table(
      f"Sampling with and without cache ({LAMBDA}, Tweedie)",
      [
        "T",
        Column("NFE, cached", ".2f"),
        Column("E-NFE, formula", ".2f"),
        Column("seconds, uncached", ".3f"),
        Column("seconds, cached", ".3f"),
        Column("speed-up", ".2f"),
        Column("generative perplexity, uncached", ".2f"),
        Column("generative perplexity, cached", ".2f"),
        Column("unigram entropy", ".3f"),
      ],
      rows,
      note=(
        f"{config.samples} samples of {length} tokens for each of {len(runs)} seeds, judged by "
        f"{config.judge or 'the autoregressive model of the same seed'}. NFE are network evaluations "
        "of a sequence. Real text: generative perplexity "
        f"{mean(run.text.perplexity for run in runs):.2f}, unigram entropy "
        f"{mean(run.text.unigram_entropy for run in runs):.3f}."
      ),
    )
  )
  same = [
    np.mean(
      [
        np.mean(run.samples[Setting(c, True)].tokens == run.samples[Setting(c, False)].tokens)
        for c in counts
      ]
    )
    for run in runs
  ]
  total = lambda run, cached: sum(
    run.samples[Setting(c, cached)].seconds for c in counts if c >= 2 * length
  )
  quality = lambda run, count, cached: run.samples[Setting(count, cached)].perplexity
  result.claims.extend(
    [
      Claim.greater("equal seeds give equal text, cached or not (share of tokens)", same, 0.999),
      Claim.less(
        "network calls follow the formula within 2 % (relative difference, one value for each T)",
        abs(calls / expected - 1) if config.schedule == "log_linear" else [np.nan],
        0.02,
      ),
      Claim.greater(
        "the cache makes sampling more than 1.5 times as fast with T of twice the length or more",
        [total(run, False) / total(run, True) for run in runs],
        1.5,
      ),
      Claim.less(
        "generative perplexity is equal with the cache (largest relative difference over T)",
        [max(abs(quality(r, c, True) / quality(r, c, False) - 1) for c in counts) for r in runs],
        0.01,
      ),
      Claim.less(
        f"samples improve with T (generative perplexity, T = {counts[-1]} over T = {counts[0]})",
        [quality(run, counts[-1], True) / quality(run, counts[0], True) for run in runs],
        1.0,
      ),
    ]
  )
  curve = lambda cached, field: [mean(np.mean(v) for v in over(c, cached, field)) for c in counts]
  names = {"uncached": False, "cached": True}
  for file, field, xlabel in (
    ("perplexity_by_calls.png", "calls", "network evaluations of a sequence"),
    ("perplexity_by_seconds.png", "seconds", "seconds for all samples"),
  ):
    plots.line_plot(
      workdir / file,
      {name: (curve(c, field), curve(c, "perplexity")) for name, c in names.items()},
      xlabel=xlabel,
      ylabel="generative perplexity",
      title=f"RADD, T = {', '.join(map(str, counts))}",
      log="x",
    )
    result.figures.append(
      Figure(f"Quality against {xlabel}", file, "Each point is a T; both samplers give one text.")
    )
  plots.line_plot(
    workdir / "calls_by_steps.png",
    {"measured": (counts, calls), "T (1 - (1 - 1/T)^l)": (counts, expected)},
    xlabel="steps T",
    ylabel="network evaluations",
    title=f"Calls of the cached sampler, l = {length}",
    log="x",
  )
  result.figures.append(Figure("Network evaluations against T", "calls_by_steps.png"))


def other_samplers(config, runs: Sequence[Run], result: Report) -> None:
  rows = [
    [name]
    + [mean(np.mean(run.samplers[name].calls) for run in runs)]
    + [mean(getattr(run.samplers[name], f) for run in runs) for f in ("seconds", "perplexity")]
    + [mean(run.samplers[name].unigram_entropy for run in runs)]
    for name in runs[0].samplers
  ]
  result.tables.append(
    Table(
      f"Samplers at T = {config.compared_steps}",
      [
        "sampler",
        Column("NFE", ".2f"),
        Column("seconds", ".3f"),
        Column("generative perplexity", ".2f"),
        Column("unigram entropy", ".3f"),
      ],
      rows,
      note=f"{LAMBDA} where no model is named. Top-p trades diversity for perplexity.",
    )
  )
  result.tables.append(
    Table(
      "Infilling",
      ["text", "its middle half sampled anew"],
      [[repr(text) for text in pair] for pair in runs[0].infilled],
      note=f"{mean(run.kept for run in runs):.0%} of the given tokens are unchanged.",
    )
  )
