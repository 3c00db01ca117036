"""The report's plots and the cost table: losses, flatness, errors over layers and tokens."""

import dataclasses

import numpy as np

from common.compilation.topology import CHIPS
from common.models.decoder import DecoderConfig
from common.models.llama_sizes import LLAMA_SIZES
from common.quantization.calibration import run_block
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.flatquant.flatness import block_magnitudes, flatness_gap
from projects.flatquant.kronecker import factor_pair, multiplications, seconds_per_token
from projects.flatquant.methods import fixed_blocks

# The model whose cost is shown beside the measured one's, and the chip of the latency model.
COST_MODEL, COST_CHIP = "meta-llama/Llama-2-7b-hf", "v5e"


def plot_methods(where: str, excess: dict[str, list[float]], workdir, report: Report) -> None:
  """Bars of the loss above full precision."""
  file = f"methods_{where}.png"
  plots.bar_plot(
    workdir / file,
    list(excess),
    {"excess loss": [float(np.mean(v)) for v in excess.values()]},
    errors={"excess loss": [float(np.std(v)) for v in excess.values()]},
    ylabel="excess loss, nats per token",
    title=where.replace("_", ", ") + " model",
    log=True,
  )
  caption = "Above full precision; mean and standard deviation over seeds."
  report.figures.append(Figure(f"Loss of quantization, {where}", file, caption))


def measure_flatness(settings, draw, learned) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{transform: (gap to a flat line, sorted channel magnitudes)} of `draw.model`.

  The gaps, [2], are of activations and weights, means over sites and blocks; the magnitudes,
  [hidden], are of the first block's inputs, of equal norm, so that the curves can be compared.

  Args:
    settings: of the method.
    draw: with the model and the tokens of its activations.
    learned: the model's blocks with FlatQuant's transforms.
  """
  hadamards = {"sites": ("P_a", "P_o", "P_v", "P_h", "P_ug", "P_d"), "clip": False, "scale": False}
  variants = {
    "original": fixed_settings(settings, sites=(), clip=False, scale=False),
    "Hadamard": fixed_settings(settings, **hadamards),
  }
  blocks = {n: fixed_blocks(draw.model, draw.tokens, s) for n, s in variants.items()}
  blocks["FlatQuant"] = learned
  measured = {}
  for method, flats in blocks.items():
    x, context = draw.model.stem(draw.tokens)
    found = []
    for i, (flat, block) in enumerate(zip(flats, draw.model.blocks)):
      magnitudes = block_magnitudes(flat, x, context)
      found += [[float(flatness_gap(m)) for m in pair] for pair in magnitudes.values()]
      if i == 0:
        curve = np.asarray(magnitudes["P_a"][0])
        curve = curve / np.sqrt(np.mean(curve**2))
      x = run_block(block, x, context)
    measured[method] = np.mean(found, axis=0), curve
  return measured


def compare_flatness(where: str, measured, workdir, report: Report) -> None:
  """Plot, table and claim of what `measure_flatness` found."""
  gaps = {method: gap for method, (gap, _) in measured.items()}
  series = {method: (np.arange(len(curve)), curve) for method, (_, curve) in measured.items()}
  file = f"flatness_{where}.png"
  plots.line_plot(
    workdir / file,
    series,
    xlabel="channel, largest first",
    ylabel="magnitude / root mean square",
    title="Inputs of q, k, v, first block",
    log="y",
  )
  report.figures.append(Figure(f"Flatness, {where}", file, "A flat line would be at 1."))
  columns = ["transform", Column("activations", ".3f", "lower"), Column("weights", ".3f", "lower")]
  rows = [[method, *gap.tolist()] for method, gap in gaps.items()]
  note = (
    "Distance of the channels' norms to the flat line of equal norm, relative to that norm; mean "
    "over sites and blocks, first seed."
  )
  report.tables.append(Table(f"Flatness, {where}", columns, rows, note))
  report.claims.append(
    Claim.less(
      f"FlatQuant's activations are flatter than a Hadamard transform's ({where}, distance)",
      {"FlatQuant": [gaps["FlatQuant"][0]], "Hadamard": [gaps["Hadamard"][0]]},
    )
  )


def plot_landscape(where: str, landscapes, workdir, report: Report) -> None:
  """Error of the block outputs over layers, and over layers and tokens: {method: [layers, seq]}."""
  names = ("RTN", "SmoothQuant", "QuaRot", "FlatQuant")
  errors = {name: np.log10(landscapes[name]) for name in names}
  layers = [str(layer) for layer in range(1, len(errors["RTN"]) + 1)]
  file = f"error_layers_{where}.png"
  plots.heatmap(
    workdir / file,
    [error.mean(axis=1) for error in errors.values()],
    list(errors),
    layers,
    xlabel="layer",
    title="log10 of the block outputs' relative error",
    annotate=".2f",
  )
  report.figures.append(Figure(f"Error over layers, {where}", file, "Held-out text, first seed."))
  file = f"error_tokens_{where}.png"
  groups = np.array_split(np.arange(errors["RTN"].shape[1]), 5)
  difference = errors["FlatQuant"] - errors["QuaRot"]
  plots.heatmap(
    workdir / file,
    np.stack([difference[:, group].mean(axis=1) for group in groups], axis=1),
    layers,
    [f"{group[0]}-{group[-1]}" for group in groups],
    xlabel="token",
    ylabel="layer",
    title="log10 of FlatQuant's error / QuaRot's",
    annotate=".2f",
  )
  report.figures.append(Figure(f"Error over layers and tokens, {where}", file))


def fixed_settings(settings, **changes):
  """Hadamard transforms, or none."""
  return dataclasses.replace(settings, matrices="hadamard", left_size=None, **changes)


def online_cost(config: DecoderConfig) -> Table:
  """Multiplications of the online transforms per token, and a lower bound of their time."""
  rows = []
  chip = CHIPS[COST_CHIP]
  for name, model in (("this model", config), ("Llama-2-7B", LLAMA_SIZES[COST_MODEL])):
    width = model.num_heads * model.head_dim
    linears = model.hidden_size * (width + 2 * model.num_kv_heads * model.head_dim)
    linears += width * model.hidden_size + 3 * model.hidden_size * model.intermediate_size
    shapes = {
      "P_a, P_ug": (model.hidden_size, factor_pair(model.hidden_size)[0], 2),
      "P_d": (model.intermediate_size, factor_pair(model.intermediate_size)[0], 1),
    }
    for site, (n, n1, count) in shapes.items():
      speed = {"flops_per_second": chip.flops_per_second, "bytes_per_second": chip.bytes_per_second}
      ours, dense = count * multiplications(n, n1), count * n * n
      fused, unfused = (seconds_per_token(n, n1, fused=f, **speed) for f in (True, False))
      sizes = f"{n1} x {n // n1}"
      cells = [ours, dense, ours / linears, 1e9 * count * fused, 1e9 * count * unfused]
      rows.append([name, site, sizes, *cells])
    heads = width * model.num_heads
    keys = (model.num_heads + model.num_kv_heads) * model.head_dim**2
    rows.append([name, "P_o", f"{model.num_heads}", heads, width**2, heads / linears, None, None])
    rows.append([name, "P_h", f"{model.head_dim}", keys, None, keys / linears, None, None])
  columns = [
    "model",
    "transform",
    "factors",
    "multiplications",
    "dense",
    Column("share of the linears'", ".4f"),
    Column("fused, ns", ".2f"),
    Column("unfused, ns", ".2f"),
  ]
  note = (
    "Per token and block. Times: lower bounds of transform and 4-bit quantization on one "
    f"{COST_CHIP} chip in bfloat16, the slower of arithmetic and memory at peak; not measured."
  )
  return Table("Cost of the online transforms", columns, rows, note)
