"""Estimates with their intervals, one row per coefficient, methods side by side."""

import pathlib
from collections.abc import Sequence

import numpy as np

from projects.dsl.dsl import Fit

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v")


def interval_plot(path: pathlib.Path, fits: Sequence[Fit], *, xlabel: str, title: str = "") -> None:
  """Saves a PNG with the 95 % intervals of fits of one regression, read from top to bottom."""
  from matplotlib.figure import Figure

  names = fits[0].names
  rows = np.arange(len(names))[::-1]
  height = 1.2 + len(names) * (0.22 + 0.13 * len(fits))
  figure = Figure(figsize=(5.4, height), dpi=180, layout="constrained")
  axes = figure.subplots()
  for i, fit in enumerate(fits):
    low, high = fit.confidence_intervals().T
    axes.errorbar(
      fit.coefficients,
      rows + 0.6 * ((len(fits) - 1) / 2 - i) / len(fits),
      xerr=[fit.coefficients - low, high - fit.coefficients],
      fmt=_MARKERS[i % len(_MARKERS)],
      color=_COLORS[i % len(_COLORS)],
      label=fit.method,
      markersize=5,
      linewidth=1.6,
      capsize=2.5,
    )
  axes.axvline(0, color="black", linewidth=0.8)
  axes.set_yticks(rows, names)
  axes.set_ylim(-0.6, len(names) - 0.4)
  axes.set(xlabel=xlabel, title=title)
  axes.grid(axis="x", alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  if len(fits) > 1:
    figure.legend(loc="outside lower center", ncols=len(fits), frameon=False, fontsize=9)
  figure.savefig(path, format="png")
