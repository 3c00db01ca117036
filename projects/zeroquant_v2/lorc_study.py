"""LoRC on top of rounding to nearest: its rank, its factors' bits, block sizes, the error's spectrum."""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.evaluation.perplexity import WindowLosses, paired_difference
from common.models.base import BaseModel
from common.quantization.linear import get_kernels
from common.quantization.low_rank import residual_energy
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.zeroquant_v2.evaluation import Evaluation, dense_kernels, dense_model
from projects.zeroquant_v2.methods import (
  factors_of,
  integer_format,
  quantize_model_weights,
  settings_of,
  stored_bits,
)

Array = jax.Array
spectrum = jax.jit(lambda error: -jnp.diff(residual_energy(error)))


class Scored(NamedTuple):
  """What is measured of a quantized model; `bits` are stored per weight."""

  losses: WindowLosses
  bits: float


def study_lorc(
  config: ConfigDict,
  bases: dict[str, BaseModel],
  evaluation: Evaluation,
  measurements: Measurements,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """Runs every part on every model."""
  full = {}
  for name, base in bases.items():
    score = functools.partial(evaluation.losses, base.model)
    full[name] = measurements.get(f"LoRC, {name}, full precision", score)
  for bits in config.rank_sweep_bits:
    sweep_ranks(config, bases, evaluation, measurements, bits, full, workdir, report)
  sweep_group_sizes(config, bases, evaluation, measurements, full, report)
  show_spectrum(config, bases, measurements, workdir, report)


def rounded(config: ConfigDict, base: BaseModel, bits: int, group_size: int):
  """Packed weights of every block, by rounding to nearest."""
  format = integer_format(bits, group_size, config.symmetric)
  return quantize_model_weights(base.model, None, settings_of(config, "RTN", format))


def measure_ranks(
  config, base: BaseModel, evaluation: Evaluation, bits: int, ranks: list[int]
) -> dict[int | str, Callable[[], Scored]]:
  """{rank, and "8, INT8" for 8-bit factors of the config's rank: how to measure it}."""
  weights = functools.cache(functools.partial(rounded, config, base, bits, -1))
  # Those of lower ranks are its first components.
  widest = functools.cache(lambda: factors_of(base.model, weights(), ranks[-1], 16))

  def score(factors) -> Scored:
    losses = evaluation.losses(dense_model(base.model, weights(), factors))
    return Scored(losses, stored_bits(weights(), factors))

  def truncated(rank: int) -> Scored:
    return score([{p: f.truncated(rank) for p, f in block.items()} for block in widest()])

  measures = {rank: functools.partial(truncated, rank) for rank in ranks}
  integer = lambda: score(factors_of(base.model, weights(), config.rank, 8))
  return measures | {f"{config.rank}, INT8": integer}


def sweep_ranks(
  config,
  bases,
  evaluation: Evaluation,
  measurements: Measurements,
  bits: int,
  full,
  workdir,
  report,
) -> None:
  """Loss against the rank, and against 8-bit factors at the config's rank."""
  ranks = sorted({0, config.rank, *config.ranks})
  losses, integer, rows, extra, extra_bits = {}, {}, [], {}, {}
  for name, base in bases.items():
    scored = {
      rank: measurements.get(f"LoRC, {name}, W{bits}A16, rank {rank}", measure)
      for rank, measure in measure_ranks(config, base, evaluation, bits, ranks).items()
    }
    for rank, (of_rank, stored) in scored.items():
      difference = paired_difference(of_rank, scored[0].losses) if rank else None
      rows.append(
        [
          name,
          rank,
          evaluation.mean_perplexity(of_rank),
          of_rank.nats_per_token - full[name].nats_per_token,
          difference and difference.mean,
          difference and difference.high,
          stored,
        ]
      )
    losses |= {(name, rank): scored[rank].losses for rank in ranks}
    plain, eight_bit = scored[0].bits, scored[f"{config.rank}, INT8"]
    integer[name] = eight_bit.losses
    # What the paper counts: values of the factors for each value of the weight.
    extra[name] = (scored[config.rank].bits - plain) / 16
    extra_bits[name] = eight_bit.bits / plain - 1
  report.tables.append(
    Table(
      f"LoRC's rank, RTN W{bits}A16",
      [
        "model",
        "rank",
        Column("mean perplexity", ".2f"),
        Column("excess nats", "+.4f"),
        Column("change by LoRC", "+.4f"),
        Column("its upper end (95 %)", "+.4f"),
        Column("bits", ".2f"),
      ],
      rows,
      note="A scale per output channel. Change: nats per token, paired over windows.",
    )
  )
  report.claims.extend(rank_claims(config, bits, list(bases), ranks, losses, integer, full))
  report.claims.extend(size_claims(config, bits, extra, extra_bits))
  file = f"rank_w{bits}.png"
  excess = lambda name, rank: losses[name, rank].nats_per_token - full[name].nats_per_token
  plots.line_plot(
    workdir / file,
    {name: (ranks, [excess(name, r) / excess(name, 0) for r in ranks]) for name in bases},
    xlabel="rank of the correction",
    ylabel="excess loss, relative to rank 0",
    title=f"RTN W{bits}A16 + LoRC",
  )
  report.figures.append(Figure(f"Loss against LoRC's rank, W{bits}A16", file))


def rank_claims(config, bits, names, ranks, losses, integer, full) -> list[Claim]:
  """What section 5 says of the rank; a measurement per model."""
  setting, rank = f"RTN W{bits}A16", config.rank
  mean = lambda r: np.mean([losses[name, r].nats_per_token for name in names])
  gain = lambda name, r: losses[name, 0].nats_per_token - losses[name, r].nats_per_token
  claims = [
    Claim.less(
      f"the loss falls from rank to rank (the largest change of the models' mean, {setting}, nats)",
      [max(mean(b) - mean(a) for a, b in zip(ranks, ranks[1:]))],
    ),
    Claim.less(
      f"rank {rank} lowers the loss significantly (upper end of the 95 % interval, {setting}, nats "
      "per token, per model)",
      [paired_difference(losses[name, rank], losses[name, 0]).high for name in names],
    ),
    Claim.greater(
      f"rank {rank} closes at least half of the gap to full precision ({setting}, share, per model)",
      [
        gain(name, rank) / (losses[name, 0].nats_per_token - full[name].nats_per_token)
        for name in names
      ],
      0.5,
    ),
    Claim.less(
      f"8-bit factors cost less than 5 % of what rank {rank} wins ({setting}, share, per model)",
      [
        (integer[name].nats_per_token - losses[name, rank].nats_per_token) / gain(name, rank)
        for name in names
      ],
      0.05,
    ),
  ]
  others = [r for r in ranks if 0 < r < ranks[-1]]
  if len(others) > 1:
    low, high = min(r for r in others if 2 * r >= rank), ranks[-1]
    claims.append(
      Claim.greater(
        f"the rank matters little: rank {low} wins at least 3/4 of rank {high} ({setting}, share, "
        "per model)",
        [gain(name, low) / gain(name, high) for name in names],
        0.75,
      )
    )
  return claims


def size_claims(config, bits, extra, extra_bits) -> list[Claim]:
  """What LoRC adds to the storage; the dictionaries are shares by model."""
  claims = [
    Claim.less(
      f"rank {config.rank} in 8-bit factors adds less than 10 % of the bits (RTN W{bits}A16, the "
      "largest model, share)",
      [min(extra_bits.values())],
      0.1,
    )
  ]
  # The same at all bits.
  if bits == config.rank_sweep_bits[0]:
    claims.append(
      Claim.less(
        f"rank {config.rank} adds less than 10 % of the weights' values (the largest model, share)",
        [min(extra.values())],
        0.1,
      )
    )
  return claims


def measure_group_size(
  config, base: BaseModel, evaluation: Evaluation, bits: int, size: int
) -> dict[int, Scored]:
  """One block size without and with LoRC, {rank: ...}."""
  weights, scored = rounded(config, base, bits, size), {}
  for rank in (0, config.rank):
    factors = factors_of(base.model, weights, rank, config.factor_bits)
    losses = evaluation.losses(dense_model(base.model, weights, factors))
    scored[rank] = Scored(losses, stored_bits(weights, factors))
  return scored


def sweep_group_sizes(
  config, bases, evaluation: Evaluation, measurements: Measurements, full, report: Report
) -> None:
  """Fine-grained block sizes with and without LoRC."""
  for bits in config.rank_sweep_bits:
    rows, found = [], {}
    for name, base in bases.items():
      for size in config.group_sizes:
        row = [name, "row" if size == -1 else size]
        scored = measurements.get(
          f"LoRC, {name}, W{bits}A16, block {row[1]}",
          functools.partial(measure_group_size, config, base, evaluation, bits, size),
        )
        for rank in (0, config.rank):
          losses, stored = scored[rank]
          found.setdefault((size, rank), []).append(losses.nats_per_token)
          row += [losses.nats_per_token - full[name].nats_per_token, stored]
        rows.append(row)
    report.tables.append(
      Table(
        f"Block sizes of fine-grained scales, RTN W{bits}A16",
        [
          "model",
          "block",
          Column("excess nats", "+.4f"),
          Column("bits", ".2f"),
          Column("excess nats, LoRC", "+.4f"),
          Column("bits, LoRC", ".2f"),
        ],
        rows,
        note=f"LoRC of rank {config.rank}, {config.factor_bits}-bit factors.",
      )
    )
    row, size = (-1, 0), config.group_sizes[-1]
    if size == -1 or row not in found:
      continue
    for statement, better, worse in (
      (f"FGQ {size} loses less than a scale per row", (size, 0), row),
      (f"LoRC helps FGQ {size}", (size, config.rank), (size, 0)),
    ):
      name = lambda key: f"block {key[0]}, rank {key[1]}"
      report.claims.append(
        Claim.less(
          f"{statement} (RTN W{bits}A16, nats per token, per model)",
          {name(key): found[key] for key in (better, worse)},
        )
      )


def measure_spectra(
  config, base: BaseModel, bits: int, index: int
) -> dict[str, tuple[Array, Array]]:
  """{path: spectra of E and of noise of the same shape} of one block, shares of the energy."""
  kernels = get_kernels(base.model.blocks[index])
  dense = dense_kernels(rounded(config, base, bits, -1)[index], {})
  spectra = {}
  for path, kernel in kernels.items():
    gaussian = np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
    spectra[path] = spectrum(kernel - dense[path]), spectrum(gaussian)
  return spectra


def show_spectrum(config, bases, measurements, workdir: pathlib.Path, report: Report) -> None:
  """Singular values of E of the widest model, beside those of noise of the same shape."""
  name = max(bases, key=lambda n: bases[n].model.config.hidden_size)
  middle = len(bases[name].model.blocks) // 2
  rows, series = [], {}
  for bits in config.rank_sweep_bits:
    measure = functools.partial(measure_spectra, config, bases[name], bits, middle)
    spectra = measurements.get(f"LoRC, {name}, W{bits}A16, spectra", measure)
    for path, (energy, noise) in spectra.items():
      first = lambda energies: float(energies[: config.rank].sum())
      rows.append([f"W{bits}", path, first(energy), first(noise)])
      if path == "mlp.up_proj":
        index = np.arange(1, len(energy) + 1)
        series[f"RTN W{bits}"] = (index, len(energy) * energy)
        series["Gaussian noise"] = (index, len(noise) * noise)
  report.tables.append(
    Table(
      f"Share of ||E||^2 in its first {config.rank} components, {name}, block {middle}",
      ["weights", "linear", Column("of E", ".3f"), Column("of Gaussian noise", ".3f")],
      rows,
      note="RTN with a scale per output channel; noise of the same shape.",
    )
  )
  plots.line_plot(
    workdir / "spectrum.png",
    series,
    xlabel="component of E",
    ylabel="energy, times their number",
    title=f"Spectrum of the error, mlp.up_proj, {name}",
    log="x",
  )
  report.figures.append(
    Figure("Spectrum of the rounding error", "spectrum.png", "A flat spectrum is at 1.")
  )
