"""Plots in one style: Agg, readable on a phone, distinguishable without colour.

Every function saves one PNG and keeps no global state (no pyplot). matplotlib is imported on the
first plot, so that importing an experiment stays quick.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

PathLike = str | os.PathLike

# Okabe & Ito's palette, without its yellow (too pale on white): distinct to color-blind readers.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
_LINES = ["-", "--", "-.", ":"]
_STYLE = {
  "font.size": 11.5,
  "axes.titlesize": 12,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.alpha": 0.3,
  "lines.linewidth": 1.8,
  "lines.markersize": 5,
  "legend.frameon": False,
  "legend.fontsize": 10,
}


def line_plot(
  path: PathLike,
  series: Mapping[str, Sequence[Sequence[float]]],
  *,
  xlabel: str,
  ylabel: str,
  title: str = "",
  log: str = "",
) -> None:
  """Plots {name: (x, y) or (x, y, err)}, err shaded as y ± err; `log` is "", "x", "y" or "xy"."""
  with _axes(path, title, xlabel, ylabel) as axes:
    for i, (name, (x, y, *err)) in enumerate(series.items()):
      color = _COLORS[i % len(_COLORS)]
      axes.plot(
        x,
        y,
        label=name,
        color=color,
        marker=_MARKERS[i % len(_MARKERS)] if len(x) <= 30 else None,
        linestyle=_LINES[i % len(_LINES)],
      )
      if err:
        y, err = np.asarray(y), np.asarray(err[0])
        axes.fill_between(x, y - err, y + err, color=color, alpha=0.15, linewidth=0)
    if "x" in log:
      axes.set_xscale("log")
    if "y" in log:
      axes.set_yscale("log")
    if len(series) > 1:
      axes.legend()


def bar_plot(
  path: PathLike,
  groups: Sequence[str],
  series: Mapping[str, Sequence[float]],
  *,
  ylabel: str,
  errors: Mapping[str, Sequence[float]] | None = None,
  title: str = "",
  log: bool = False,
) -> None:
  """Plots one bar per group and series: {name: one value per group}, `errors` likewise."""
  with _axes(path, title, "", ylabel) as axes:
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
      axes.bar(
        np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width,
        values,
        width,
        label=name,
        color=_COLORS[i % len(_COLORS)],
        yerr=None if errors is None else errors.get(name),
        capsize=3,
        edgecolor="white",
      )
    tilt = max(map(len, groups)) * len(groups) > 60
    axes.set_xticks(
      range(len(groups)), groups, rotation=30 if tilt else 0, ha="right" if tilt else "center"
    )
    axes.grid(axis="x", visible=False)
    if log:
      axes.set_yscale("log")
    if len(series) > 1:
      axes.legend()


def interval_plot(
  path: PathLike,
  names: Sequence[str],
  series: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
  *,
  xlabel: str,
  title: str = "",
) -> None:
  """Plots estimates with intervals, a row per name: {label: ([names], (low, high) [names, 2])}."""
  rows = np.arange(len(names))[::-1]  # Read from top to bottom.
  height = 1.2 + len(names) * (0.22 + 0.13 * len(series))
  with _axes(path, title, xlabel, "", height) as axes:
    for i, (label, (estimates, intervals)) in enumerate(series.items()):
      low, high = np.asarray(intervals).T
      axes.errorbar(
        estimates,
        rows + 0.6 * ((len(series) - 1) / 2 - i) / len(series),
        xerr=[estimates - low, high - estimates],
        fmt=_MARKERS[i % len(_MARKERS)],
        color=_COLORS[i % len(_COLORS)],
        label=label,
        capsize=2.5,
      )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(rows, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)
    if len(series) > 1:
      axes.figure.legend(loc="outside lower center", ncols=len(series))


def reliability_plot(
  path: PathLike,
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str = "",
) -> None:
  """Plots {name: (mean forecast, observed share) of each bin}; a calibrated one is diagonal."""
  with _axes(path, title, "forecast probability", "observed share", 4.6) as axes:
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for i, (name, (predicted, observed)) in enumerate(series.items()):
      filled = np.isfinite(predicted)
      axes.plot(
        np.asarray(predicted)[filled],
        np.asarray(observed)[filled],
        label=name,
        color=_COLORS[i % len(_COLORS)],
        marker=_MARKERS[i % len(_MARKERS)],
        linestyle=_LINES[i % len(_LINES)],
        linewidth=1.2,
      )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.legend()


def heatmap(
  path: PathLike,
  matrix: Sequence[Sequence[float]],
  row_labels: Sequence[str],
  column_labels: Sequence[str],
  *,
  xlabel: str = "",
  ylabel: str = "",
  title: str = "",
  annotate: str = "",
) -> None:
  """Plots a matrix [rows, columns]; `annotate` is the format spec of the numbers shown in cells."""
  matrix = np.asarray(matrix, dtype=float)
  with _axes(path, title, xlabel, ylabel) as axes:
    image = axes.imshow(matrix, cmap="cividis", aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    tilt = sum(map(len, column_labels)) > 45
    axes.set_xticks(
      range(len(column_labels)),
      column_labels,
      rotation=45 if tilt else 0,
      ha="right" if tilt else "center",
    )
    axes.set_yticks(range(len(row_labels)), row_labels)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if annotate:
      middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
      for (i, j), value in np.ndenumerate(matrix):
        # cividis runs from dark to light.
        color = "black" if value > middle else "white"
        axes.text(j, i, format(value, annotate), ha="center", va="center", color=color, fontsize=9)


@contextlib.contextmanager
def _axes(path: PathLike, title: str, xlabel: str, ylabel: str, height: float = 3.4) -> Iterator:
  """Gives the axes of a new figure and saves it to `path`."""
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(5, height), dpi=180, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    yield axes
    figure.savefig(pathlib.Path(path), format="png")
