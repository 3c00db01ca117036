"""The four methods at the paper's settings, with a scale per row and fine-grained, with and without
LoRC (sections 4 and 5)."""

import functools
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from common.models.base import BaseModel
from common.models.decoder import Decoder
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.zeroquant_v2.evaluation import (
  Evaluation,
  activation_format,
  calibration,
  dense_model,
  parse_setting,
)
from projects.zeroquant_v2.methods import (
  factors_of,
  integer_format,
  quantize_model_weights,
  settings_of,
  stored_bits,
)
from projects.zeroquant_v2.zeroquant_v2 import ZeroQuantSettings

Array = jax.Array
ROW = "row"


class Cell(NamedTuple):
  """One method at one setting on one model.

  Attributes:
    nats: per token, one per calibration draw.
    perplexity: mean over draws of the mean over corpora.
    bits: stored per weight.
  """

  nats: list[float]
  perplexity: float
  bits: float


# {(setting, scales, method, rank): cell}
Cells = dict[tuple[str, str, str, int], Cell]


def scales_name(group_size: int) -> str:
  """What the tables call a scale per output channel, or per block of inputs."""
  return ROW if group_size == -1 else f"FGQ {group_size}"


def compare_methods(
  config: ConfigDict,
  bases: dict[str, BaseModel],
  evaluation: Evaluation,
  measurements: Measurements,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """Adds a table per model, a plot of the first one, and the claims."""
  cells, full = {}, {}
  for name in config.method_models:
    score = functools.partial(evaluation.losses, bases[name].model)
    losses = measurements.get(f"methods, {name}, full precision", score)
    full[name] = losses.nats_per_token
    cells[name] = measure(config, name, bases[name], evaluation, measurements)
    report.tables.append(
      method_table(config, name, full[name], evaluation.mean_perplexity(losses), cells[name])
    )
  report.claims.extend(method_claims(config, cells, full))
  first = config.method_models[0]
  plot_methods(config, first, full[first], cells[first], workdir, report)


def measure(
  config: ConfigDict, name: str, base: BaseModel, evaluation: Evaluation, measurements: Measurements
) -> Cells:
  """Every method at every setting, for every calibration draw of one model."""
  draws = {seed: calibration(config, base, seed) for seed in config.seeds}
  cells = {}
  for setting, group_size in config.method_settings:
    bits, activation_bits = parse_setting(setting)
    activations = activation_format(activation_bits)
    format = integer_format(bits, group_size, config.symmetric)
    scales = scales_name(group_size)
    for method in config.methods:
      settings = settings_of(config, method, format, activations)
      # Rounding to nearest does not look at the calibration text: one draw is all draws.
      found = [
        measurements.get(
          f"methods, {name}, {setting}, {scales}, {method}, seed {seed}",
          functools.partial(measure_draw, config, base.model, evaluation, settings, tokens, seed),
        )
        for seed, tokens in list(draws.items())[: 1 if method == "RTN" else None]
      ]
      found = found * len(draws) if method == "RTN" else found
      for rank in (0, config.rank):
        loss, perplexity, stored = zip(*[of_draw[rank] for of_draw in found])
        cells[setting, scales, method, rank] = Cell(
          list(loss), float(np.mean(perplexity)), stored[0]
        )
  return cells


def measure_draw(
  config: ConfigDict,
  model: Decoder,
  evaluation: Evaluation,
  settings: ZeroQuantSettings,
  tokens: Array,
  seed: int,
) -> dict[int, tuple[float, float, float]]:
  """{rank of LoRC: (nats per token, mean perplexity, bits per weight)} of one draw."""
  weights = quantize_model_weights(model, tokens, settings, seed)
  measured = {}
  for rank in (0, config.rank):
    factors = factors_of(model, weights, rank, config.factor_bits)
    losses = evaluation.losses(dense_model(model, weights, factors, settings.activations))
    bits = stored_bits(weights, factors)
    measured[rank] = losses.nats_per_token, evaluation.mean_perplexity(losses), bits
  return measured


def method_table(config: ConfigDict, name, full: float, full_perplexity: float, cells: Cells):
  """Rows of setting, scales and method; columns without and with LoRC."""
  rows = [["W16A16", None, "full precision", full_perplexity, 0.0, None, 16.0, None, None, None]]
  for setting, scales, method, rank in cells:
    if rank:
      continue
    plain, corrected = (cells[setting, scales, method, r] for r in (0, config.rank))
    rows.append(
      [
        setting,
        scales,
        method,
        plain.perplexity,
        float(np.mean(plain.nats)) - full,
        float(np.std(plain.nats, ddof=1)) if len(plain.nats) > 1 and method != "RTN" else None,
        plain.bits,
        corrected.perplexity,
        float(np.mean(corrected.nats)) - full,
        corrected.bits,
      ]
    )
  return Table(
    f"Methods, {name}",
    [
      "setting",
      "scales",
      "method",
      Column("mean perplexity", ".2f"),
      Column("excess nats", "+.4f"),
      Column("sd over draws", ".4f"),
      Column("bits", ".2f"),
      Column("mean perplexity, LoRC", ".2f"),
      Column("excess nats, LoRC", "+.4f"),
      Column("bits, LoRC", ".2f"),
    ],
    rows,
    note=(
      f"Mean of {len(config.seeds)} calibration draws; LoRC of rank {config.rank}, "
      f"{config.factor_bits}-bit factors. Excess nats: per token, above full precision."
    ),
  )


def method_claims(
  config: ConfigDict, cells: dict[str, Cells], full: dict[str, float]
) -> list[Claim]:
  """What sections 4 and 5 find; a measurement per model and calibration draw."""
  claims, unit = [], "nats per token, per model and draw"
  formats = [(setting, scales_name(size)) for setting, size in config.method_settings]
  values = lambda *key: [v for of_model in cells.values() for v in of_model[key].nats]
  for setting, scales in formats:
    best = [
      min(of_model[setting, scales, method, 0].nats[i] for method in config.methods) - full[name]
      for name, of_model in cells.items()
      for i in range(len(config.seeds))
    ]
    where = f"{setting}, {scales}, {unit}"
    claims.append(
      Claim.greater(f"the best of the methods does not recover full precision ({where})", best)
    )
    # The order that the paper finds.
    if scales == ROW and setting.endswith("A16"):
      for better, worse in (("ZQ-Local", "RTN"), ("ZQ-Global", "ZQ-Local"), ("GPTQ", "ZQ-Local")):
        if {better, worse} <= set(config.methods):
          both = {method: values(setting, scales, method, 0) for method in (better, worse)}
          claims.append(Claim.less(f"{better} loses less than {worse} ({where})", both))
    if scales != ROW and (setting, ROW) in formats:
      for method in config.methods:
        both = {s: values(setting, s, method, 0) for s in (scales, ROW)}
        claims.append(Claim.less(f"fine-grained scales help {method} ({where})", both))
    for method in config.methods:
      both = {f"rank {r}": values(setting, scales, method, r) for r in (config.rank, 0)}
      claims.append(Claim.less(f"LoRC helps {method} ({where})", both))
  return claims


def plot_methods(config, name, full: float, cells: Cells, workdir, report: Report) -> None:
  """Excess loss of every method at the last setting."""
  setting = config.method_settings[-1][0]
  series, errors = {}, {}
  for scales in [scales_name(size) for s, size in config.method_settings if s == setting]:
    for rank in (0, config.rank):
      label = f"{scales} + LoRC" if rank else scales
      excess = [
        np.array(cells[setting, scales, method, rank].nats) - full for method in config.methods
      ]
      series[label] = [float(e.mean()) for e in excess]
      errors[label] = [float(e.std()) for e in excess]
  file = "methods.png"
  plots.bar_plot(
    workdir / file,
    config.methods,
    series,
    errors=errors,
    ylabel="excess loss, nats per token",
    title=f"{setting}, {name}",
  )
  caption = "Above full precision; mean and standard deviation over calibration draws."
  report.figures.append(Figure(f"Methods with and without LoRC, {name}", file, caption))
