"""The sensitivity study (section 3): rounding to nearest, weights or activations, class by class."""

import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from common.models.base import BaseModel
from common.models.decoder import Decoder
from common.models.outliers import inject_outliers
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.zeroquant_v2.evaluation import (
  Evaluation,
  activation_format,
  degradation_class,
  dense_model,
  parse_setting,
)
from projects.zeroquant_v2.methods import integer_format, quantize_model_weights, settings_of

# {(model, variant, draw, setting, symmetric): (nats per token, mean perplexity)} of what is rounded;
# the setting of full precision is "W16A16".
Losses = dict[tuple[str, str, int, str, bool], tuple[float, float]]


def sensitivity_study(
  config: ConfigDict,
  bases: dict[str, BaseModel],
  evaluation: Evaluation,
  measurements: Measurements,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """Adds the table of degradations, a plot of them over sizes, and the claims."""
  losses: Losses = {}
  copies = [("natural", 0), *(("outlier", draw) for draw in config.outlier_draws)]
  for name, base in bases.items():
    for variant, draw in copies:
      copy = functools.cache(functools.partial(copy_of, config, base.model, variant, draw))
      for setting in ("W16A16", *config.sensitivity):
        # The copies with outliers are for the comparison of weights and activations.
        both = variant == "natural" and setting in config.symmetric_sensitivity
        for symmetric in (False, True) if both else (False,):
          losses[name, variant, draw, setting, symmetric] = measurements.get(
            f"sensitivity, {name}, {variant} {draw}, {setting}{', symmetric' if symmetric else ''}",
            functools.partial(measure_rounded, config, copy, evaluation, setting, symmetric),
          )
  variants = ["natural", *(["outlier"] if config.outlier_draws else [])]
  for variant in variants:
    report.tables.append(degradation_table(config, list(bases), variant, losses))
  report.claims.extend(sensitivity_claims(config, bases, variants, losses))
  if len(bases) > 1 and {"W4A16", "W16A4"} & set(config.sensitivity):
    plot_sizes(config, bases, variants[-1], losses, workdir, report)


def copy_of(config: ConfigDict, model: Decoder, variant: str, draw: int) -> Decoder:
  """The model, or one of the same function with a draw of outlier channels."""
  if variant == "natural":
    return model
  return inject_outliers(model, jax.random.key(draw), gain=config.outlier_gain)


def measure_rounded(
  config: ConfigDict,
  copy: Callable[[], Decoder],
  evaluation: Evaluation,
  setting: str,
  symmetric: bool,
) -> tuple[float, float]:
  """(nats per token, mean perplexity) of a copy, rounded."""
  losses = evaluation.losses(round_to_nearest(config, copy(), setting, symmetric))
  return losses.nats_per_token, evaluation.mean_perplexity(losses)


def round_to_nearest(config: ConfigDict, model, setting: str, symmetric: bool):
  """A dense copy with weights per output channel and activations per token."""
  bits, activation_bits = parse_setting(setting)
  weights = None
  if bits != 16:
    format = integer_format(bits, -1, symmetric)
    weights = quantize_model_weights(model, None, settings_of(config, "RTN", format))
  return dense_model(model, weights, activations=activation_format(activation_bits, symmetric))


def over_draws(config, losses: Losses, name, variant, setting, symmetric, index) -> list[float]:
  """Nats (index 0) or perplexity (1) of every draw of a variant."""
  draws = config.outlier_draws if variant == "outlier" else (0,)
  return [losses[name, variant, draw, setting, symmetric][index] for draw in draws]


def rises(config, losses: Losses, name, variant, setting, symmetric, index) -> np.ndarray:
  """The same above full precision."""
  value = lambda setting, symmetric: np.array(
    over_draws(config, losses, name, variant, setting, symmetric, index)
  )
  return value(setting, symmetric) - value("W16A16", False)


def degradation_table(config: ConfigDict, names, variant: str, losses: Losses) -> Table:
  """Rise of the mean perplexity and its class, per model and setting."""
  rows = []
  for name in names:
    full = float(np.mean(over_draws(config, losses, name, variant, "W16A16", False, 1)))
    rows.append([name, "W16A16", full, None, None, None, None])
    for setting in config.sensitivity:
      cells = []
      for symmetric in (False, True):
        if (name, variant, 0, setting, symmetric) in losses or not symmetric:
          rise = float(rises(config, losses, name, variant, setting, symmetric, 1).mean())
          cells += [rise, degradation_class(rise)]
        else:
          cells += [None, None]
      rows.append([name, setting, full + cells[0], *cells])
  columns = [
    "model",
    "setting",
    Column("mean perplexity", ".2f"),
    Column("rise, asymmetric", "+.2f"),
    "class, asymmetric",
    Column("rise, symmetric", "+.2f"),
    "class, symmetric",
  ]
  note = "RTN; weights per output channel, activations per token; perplexity of asymmetric formats."
  if variant == "outlier":
    note += f" Mean of {len(config.outlier_draws)} draws of outlier channels."
  return Table(f"Sensitivity, {variant} models", columns, rows, note)


def sensitivity_claims(config: ConfigDict, bases, variants, losses: Losses) -> list[Claim]:
  """What section 3 finds, of the settings that the config has."""
  names, claims = list(bases), []
  has = lambda *settings: set(settings) <= set(config.sensitivity)
  every = lambda variant, setting, symmetric=False: [
    value
    for name in names
    for value in over_draws(config, losses, name, variant, setting, symmetric, 0)
  ]
  if has("W8A16"):
    rise = [rises(config, losses, n, "natural", "W8A16", False, 1).mean() for n in names]
    claims.append(
      Claim.less("8-bit weights are Class-1 (rise of the mean perplexity, per model)", rise, 0.1)
    )
  if has("W4A16"):
    rise = [rises(config, losses, n, "natural", "W4A16", False, 1).mean() for n in names]
    claims.append(
      Claim.greater("4-bit weights are not (rise of the mean perplexity, per model)", rise, 0.1)
    )
  for setting in ("W4A16", "W16A8"):
    if setting in config.symmetric_sensitivity:
      claims.append(
        Claim.less(
          f"asymmetric formats lose less than symmetric ones ({setting}, nats per token, per model)",
          {
            "asymmetric": every("natural", setting),
            "symmetric": every("natural", setting, True),
          },
        )
      )
  for variant in variants:
    for weights, activations in (("W8A16", "W16A8"), ("W4A16", "W16A4")):
      if has(weights, activations):
        claims.append(
          Claim.greater(
            f"activations are more sensitive than weights ({activations} against {weights}, "
            f"{variant} models, nats per token, per model and draw)",
            {activations: every(variant, activations), weights: every(variant, weights)},
          )
        )
  opts = widths_of_family(bases, "opt")
  if len(opts) > 1 and has("W16A8"):
    variant = variants[-1]
    rise = lambda name: rises(config, losses, name, variant, "W16A8", False, 0).tolist()
    claims.append(
      Claim.greater(
        f"8-bit activations cost a larger OPT more ({variant} models, nats per token)",
        {opts[-1]: rise(opts[-1]), opts[0]: rise(opts[0])},
      )
    )
  return claims


def widths_of_family(bases: dict[str, BaseModel], family: str) -> list[str]:
  """Names of a family's models, from the narrowest to the widest."""
  width = {name: base.model.config.hidden_size for name, base in bases.items()}
  return sorted((n for n, b in bases.items() if b.model.config.family == family), key=width.get)


def plot_sizes(config, bases, variant: str, losses: Losses, workdir, report: Report) -> None:
  """Nats above full precision over widths; of 8 bits there is little to see."""
  shown = [s for s in ("W4A16", "W16A4") if s in config.sensitivity]
  series = {}
  for family in sorted({base.model.config.family for base in bases.values()}):
    names = widths_of_family(bases, family)
    for setting in shown:
      rise = [rises(config, losses, n, variant, setting, False, 0) for n in names]
      series[f"{family} {setting}"] = (
        [bases[name].model.config.hidden_size for name in names],
        [float(r.mean()) for r in rise],
      )
  file = "sensitivity_sizes.png"
  plots.line_plot(
    workdir / file,
    series,
    xlabel="hidden size",
    ylabel="excess loss, nats per token",
    title=f"RTN, {variant} models",
    log="y",
  )
  report.figures.append(
    Figure(f"Sensitivity over sizes, {variant} models", file, "Mean over draws of outliers.")
  )
