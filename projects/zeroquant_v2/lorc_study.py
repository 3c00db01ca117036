"""LoRC on top of rounding to nearest: its rank, its factors' bits, block sizes, the error's spectrum."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.evaluation.perplexity import paired_difference
from common.models.base import BaseModel
from common.quantization.linear import get_kernels
from common.quantization.low_rank import bits_per_weight, residual_energy
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.zeroquant_v2.evaluation import Evaluation, dense_kernels, dense_model, nats
from projects.zeroquant_v2.methods import (
  factors_of,
  integer_format,
  quantize_model_weights,
  settings_of,
)

spectrum = jax.jit(lambda error: -jnp.diff(residual_energy(error)))


def study_lorc(
  config: ConfigDict,
  bases: dict[str, BaseModel],
  evaluation: Evaluation,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """Runs every part on every model."""
  full = {name: evaluation.losses(base.model) for name, base in bases.items()}
  for bits in config.rank_sweep_bits:
    sweep_ranks(config, bases, evaluation, bits, full, workdir, report)
  sweep_group_sizes(config, bases, evaluation, full, report)
  show_spectrum(config, bases, workdir, report)


def rounded(config: ConfigDict, base: BaseModel, bits: int, group_size: int):
  """Packed weights of every block, by rounding to nearest."""
  format = integer_format(bits, group_size, config.symmetric)
  return quantize_model_weights(base.model, None, settings_of(config, "RTN", format))


def stored(weights, factors) -> float:
  """Bits per weight of a model's blocks."""
  flat = lambda blocks: [value for block in blocks for value in block.values()]
  return bits_per_weight(flat(weights), flat(factors))


def sweep_ranks(config, bases, evaluation: Evaluation, bits: int, full, workdir, report) -> None:
  """Loss against the rank, and against 8-bit factors at the config's rank."""
  ranks = sorted({0, config.rank, *config.ranks})
  losses, integer, rows, extra, extra_bits = {}, {}, [], {}, {}
  for name, base in bases.items():
    weights = rounded(config, base, bits, -1)
    widest = factors_of(base.model, weights, ranks[-1], 16)
    for rank in ranks:
      factors = [{p: f.truncated(rank) for p, f in block.items()} for block in widest]
      losses[name, rank] = evaluation.losses(dense_model(base.model, weights, factors))
      difference = paired_difference(losses[name, rank], losses[name, 0]) if rank else None
      rows.append(
        [
          name,
          rank,
          evaluation.mean_perplexity(losses[name, rank]),
          nats(losses[name, rank]) - nats(full[name]),
          difference and difference.mean,
          difference and difference.high,
          stored(weights, factors),
        ]
      )
      if rank == config.rank:
        # What the paper counts: values of the factors for each value of the weight.
        extra[name] = (rows[-1][-1] - stored(weights, [])) / 16
    factors = factors_of(base.model, weights, config.rank, 8)
    integer[name] = evaluation.losses(dense_model(base.model, weights, factors))
    extra_bits[name] = stored(weights, factors) / stored(weights, []) - 1
    rows.append(
      [
        name,
        f"{config.rank}, INT8",
        evaluation.mean_perplexity(integer[name]),
        nats(integer[name]) - nats(full[name]),
        paired_difference(integer[name], losses[name, 0]).mean,
        paired_difference(integer[name], losses[name, 0]).high,
        stored(weights, factors),
      ]
    )
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
  excess = lambda name, rank: nats(losses[name, rank]) - nats(full[name])
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
  mean = lambda r: np.mean([nats(losses[name, r]) for name in names])
  gain = lambda name, r: nats(losses[name, 0]) - nats(losses[name, r])
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
      [gain(name, rank) / (nats(losses[name, 0]) - nats(full[name])) for name in names],
      0.5,
    ),
    Claim.less(
      f"8-bit factors cost less than 5 % of what rank {rank} wins ({setting}, share, per model)",
      [(nats(integer[name]) - nats(losses[name, rank])) / gain(name, rank) for name in names],
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


def sweep_group_sizes(config, bases, evaluation: Evaluation, full, report: Report) -> None:
  """Fine-grained block sizes with and without LoRC."""
  for bits in config.rank_sweep_bits:
    rows, measured = [], {}
    for name, base in bases.items():
      for size in config.group_sizes:
        weights = rounded(config, base, bits, size)
        row = [name, "row" if size == -1 else size]
        for rank in (0, config.rank):
          factors = factors_of(base.model, weights, rank, config.factor_bits)
          losses = evaluation.losses(dense_model(base.model, weights, factors))
          measured.setdefault((size, rank), []).append(nats(losses))
          row += [nats(losses) - nats(full[name]), stored(weights, factors)]
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
    if size == -1 or row not in measured:
      continue
    for statement, better, worse in (
      (f"FGQ {size} loses less than a scale per row", (size, 0), row),
      (f"LoRC helps FGQ {size}", (size, config.rank), (size, 0)),
    ):
      name = lambda key: f"block {key[0]}, rank {key[1]}"
      report.claims.append(
        Claim.less(
          f"{statement} (RTN W{bits}A16, nats per token, per model)",
          {name(key): measured[key] for key in (better, worse)},
        )
      )


def show_spectrum(config, bases, workdir: pathlib.Path, report: Report) -> None:
  """Singular values of E of the widest model, beside those of noise of the same shape."""
  name = max(bases, key=lambda n: bases[n].model.config.hidden_size)
  base = bases[name]
  middle = len(base.model.blocks) // 2
  kernels = get_kernels(base.model.blocks[middle])
  rows, series = [], {}
  for bits in config.rank_sweep_bits:
    weights = rounded(config, base, bits, -1)[middle]
    rounded_kernels = dense_kernels(weights, {})
    for path, kernel in kernels.items():
      energy = np.asarray(spectrum(kernel - rounded_kernels[path]))
      gaussian = np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
      noise = np.asarray(spectrum(gaussian))
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
