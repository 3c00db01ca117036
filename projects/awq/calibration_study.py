"""How much the calibration text matters, to AWQ and to GPTQ: its domain and its size."""

import functools
from collections.abc import Callable

import numpy as np

from common.evaluation.perplexity import WindowLosses, paired_difference
from common.models.base import BaseModel
from common.models.decoder import Decoder
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.awq.methods import awq, awq_settings, calibration, gptq, integer_format


def calibration_robustness(
  base: BaseModel,
  workdir,
  config,
  evaluation,
  measurements: Measurements,
  report: Report,
) -> None:
  """Loss when the calibration domain is not the evaluation domain (the paper's Figure 8b)."""
  format = integer_format(config, config.bits)
  model = base.model
  names = [domain.split(":")[-1] for domain in config.domains]
  full = measurements.get("robustness, full precision", lambda: evaluation.losses_by_domain(model))
  compared = {
    "AWQ": lambda tokens: awq(model, tokens, awq_settings(config, format)),
    "GPTQ": lambda tokens: gptq(model, tokens, format),
  }

  def measure(quantize, source, draw) -> dict[str, WindowLosses]:
    tokens = calibration(config, base, source, config.calibration_samples, draw)
    return evaluation.losses_by_domain(quantize(tokens))

  penalties, rows = {}, []
  for name, quantize in compared.items():
    matrix = np.zeros((config.matrix_draws, len(names), len(names)))
    for draw in range(config.matrix_draws):
      for i, source in enumerate(config.domains):
        losses = measurements.get(
          f"robustness, {name}, calibrated on {source}, draw {draw}",
          functools.partial(measure, quantize, source, draw),
        )
        for j, domain in enumerate(config.domains):
          matrix[draw, i, j] = paired_difference(losses[domain], full[domain]).mean
    # For each evaluation domain: calibrated elsewhere, minus calibrated on it.
    own = np.diagonal(matrix, axis1=1, axis2=2)
    elsewhere = (matrix.sum(axis=1) - own) / (len(names) - 1)
    penalties[name] = (elsewhere - own).mean(axis=1).tolist()
    for source, row in zip(names, matrix.mean(axis=0).tolist()):
      rows.append([name, source, *row])
    file = f"robustness_{name.lower()}.png"
    plots.heatmap(
      workdir / file,
      matrix.mean(axis=0),
      names,
      names,
      xlabel="evaluated on",
      ylabel="calibrated on",
      title=f"{name}, INT{format.bits}: nats per token above full precision",
      annotate=".3f",
    )
    report.figures.append(Figure(f"Calibration robustness of {name}", file))
  report.tables.append(
    Table(
      f"Calibrated on one domain, evaluated on another, INT{format.bits}, natural model",
      ["method", "calibrated on", *[Column(f"on {n}", ".4f") for n in names]],
      rows,
      note=f"Nats per token above full precision, mean of {config.matrix_draws} draws.",
    )
  )
  report.claims.append(
    Claim.less(
      "AWQ loses less than GPTQ when calibrated on another domain "
      f"(INT{format.bits}, natural model, nats per token off-domain minus on-domain)",
      {"AWQ": penalties["AWQ"], "GPTQ": penalties["GPTQ"]},
    )
  )


def sample_efficiency(
  base: BaseModel,
  variants: dict[str, Callable[[], Decoder]],
  workdir,
  config,
  evaluation,
  measurements: Measurements,
  report: Report,
) -> None:
  """Loss against the number of calibration sequences (the paper's Figure 8a)."""
  format = integer_format(config, config.bits)
  variant, model = list(variants.items())[-1]
  model = functools.cache(model)
  full = measurements.get("sample sizes, full precision", lambda: evaluation.losses(model()))
  source = ",".join(config.domains)
  compared = {
    "AWQ": lambda tokens: awq(model(), tokens, awq_settings(config, format)),
    "GPTQ": lambda tokens: gptq(model(), tokens, format),
  }

  def measure(quantize, size, seed) -> WindowLosses:
    return evaluation.losses(quantize(calibration(config, base, source, size, seed)))

  sizes, seeds = list(config.sample_sizes), config.seeds[: config.sample_draws]
  excess = {name: np.zeros((len(sizes), len(seeds))) for name in compared}
  for i, size in enumerate(sizes):
    for j, seed in enumerate(seeds):
      for name, quantize in compared.items():
        loss = measurements.get(
          f"sample sizes, {size}, {name}, seed {seed}",
          functools.partial(measure, quantize, size, seed),
        )
        excess[name][i, j] = paired_difference(loss, full).mean
  plots.line_plot(
    workdir / "sample_efficiency.png",
    {name: (sizes, values.mean(axis=1), values.std(axis=1)) for name, values in excess.items()},
    xlabel=f"calibration sequences of {config.calibration_length} tokens",
    ylabel="excess loss, nats per token",
    title=f"INT{format.bits}, {variant} model",
    log="x",
  )
  report.figures.append(
    Figure(
      "Sample efficiency",
      "sample_efficiency.png",
      f"Above full precision; mean and standard deviation of {len(seeds)} calibration draws.",
    )
  )
  means = [values.mean(axis=1).tolist() for values in excess.values()]
  report.tables.append(
    Table(
      f"Calibration set size, INT{format.bits}, {variant} model",
      ["sequences", *[Column(name, ".4f") for name in excess]],
      [list(row) for row in zip(sizes, *means)],
      note=f"Nats per token above full precision, mean of {len(seeds)} draws.",
    )
  )
