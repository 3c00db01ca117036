import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from common.reporting import plots


def _draw(kind, path):
  if kind == "line":
    x = np.arange(1, 5)
    series = {"a": (x, x**2), "b": (x, x + 1.0, 0.5 * np.ones(4))}
    plots.line_plot(path, series, xlabel="x", ylabel="y", title="t", log="xy")
  elif kind == "bar":
    series = {"RTN": [1, 2], "AWQ": [0.5, 1]}
    plots.bar_plot(path, ["INT3", "INT4"], series, errors={"AWQ": [0.1, 0.1]}, ylabel="y")
  elif kind == "interval":
    series = {"OLS": ([1.0, -0.5], [[0.5, 1.5], [-1, 0]]), "DSL": ([0.9, 0], [[0, 2], [-1, 1]])}
    plots.interval_plot(path, ["x1", "x2"], series, xlabel="coefficient", title="t")
  elif kind == "reliability":
    series = {"raw": ([0.1, np.nan, 0.8], [0.2, np.nan, 0.6]), "scaled": ([0.2, 0.7], [0.2, 0.7])}
    plots.reliability_plot(path, series, title="t")
  else:
    matrix = [[0.0, np.nan], [1.0, 2.0]]
    plots.heatmap(path, matrix, ["a", "b"], ["c", "d"], title="t", annotate=".1f")


@pytest.mark.parametrize("kind", ["line", "bar", "interval", "reliability", "heatmap"])
def test_a_plot_is_a_png_and_leaves_no_global_state(kind, tmp_path):
  before = dict(matplotlib.rcParams)
  _draw(kind, tmp_path / "p.png")
  assert dict(matplotlib.rcParams) == before
  image = imread(tmp_path / "p.png")
  assert image.shape[1] >= 800 and image.std() > 0.01


def test_error_bands_and_annotations_are_drawn(tmp_path):
  x = [1, 2, 3]
  for name, series in {"plain": (x, x), "band": (x, x, [0.5] * 3)}.items():
    plots.line_plot(tmp_path / f"{name}.png", {"a": series}, xlabel="", ylabel="")
  for name, annotate in {"bare": "", "text": ".1f"}.items():
    plots.heatmap(tmp_path / f"{name}.png", [[1, 2]], ["r"], ["a", "b"], annotate=annotate)
  images = {p.stem: p.read_bytes() for p in tmp_path.iterdir()}
  assert images["plain"] != images["band"] and images["bare"] != images["text"]


def test_importing_plots_does_not_import_matplotlib():
  code = "import sys, common.reporting.plots; sys.exit('matplotlib' in sys.modules)"
  path = [p for p in sys.path if p]
  subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}"], check=True)
