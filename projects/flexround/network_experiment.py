"""Part (a): ResNet and MobileNetV2 on digits, weights per tensor, the first and last layer 8 bits."""

import collections
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.quantization.activations import ActivationFormat
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings
from common.reporting import plots
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.flexround import convnets
from projects.flexround.methods import (
  ABLATIONS,
  Protocol,
  choose_learning_rate,
  initial_grids,
  quantize_unit,
)


class Outcome(NamedTuple):
  """A quantized network on the test images.

  Attributes:
    accuracy: top-1.
    logit_error: mean squared difference of its logits from full precision's.
    block_error: geometric mean over the blocks between the first and last unit of the mean
      squared error of their outputs, on the calibration set.
  """

  accuracy: float
  logit_error: float
  block_error: float


def compare_on_networks(config: ConfigDict, workdir, report: Report) -> None:
  """Adds the tables, the figure and the claims of all networks to the report."""
  for i, (name, all_bits) in enumerate(config.networks.items()):
    # The ablations are of the first network only.
    methods = [m for m in config.network_methods if i == 0 or m not in list(ABLATIONS)[1:]]
    outcomes, full = collections.defaultdict(list), []
    activations = collections.defaultdict(list)
    rates = {}
    for j, seed in enumerate(config.network_seeds):
      digits = convnets.load(seed)
      model = convnets.train(name, digits, num_steps=config.train_steps, seed=seed)
      full.append(accuracy(convnets.logits(model, digits.test_images), digits))
      setting = (config, model, digits, seed)
      if not rates:
        rates = sweep(config, model, digits, min(all_bits))
      for bits in (*all_bits, *(config.network_other_bits if j == 0 else ())):
        protocol = make_protocol(config, bits)
        grids = network_grids(model, protocol)
        for method in methods:
          outcomes[bits, method].append(quantize(method, *setting, protocol, rates, grids))
      if i == 0 and j < config.activation_seeds:
        for label, drop in (("B", 0.0), ("Q", 0.5)):
          protocol = make_protocol(config, config.activation_bits, activations=True, drop=drop)
          grids = network_grids(model, protocol)
          for method in ("RTN", "AdaRound", "FlexRound"):
            # Nothing of RTN depends on the protocol.
            if method != "RTN" or label == "B":
              shown = method if method == "RTN" else f"{label} + {method}"
              result = quantize(method, *setting, protocol, rates, grids)
              activations[config.activation_bits, shown].append(result)
    chosen = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
    note = (
      f"Mean over {len(config.network_seeds)} seeds; where no sd is shown, one seed. Full "
      f"precision: top-1 {np.mean(full):.4f}. Rates chosen on the calibration error of one block: "
      f"{chosen}."
    )
    report.tables.append(table(f"{name} on digits, weights per tensor", outcomes, note))
    if activations:
      note = f"{config.activation_seeds} seeds. B: BRECQ's protocol; Q: QDrop's."
      bits = config.activation_bits
      report.tables.append(table(f"{name} on digits, W{bits}A{bits}", activations, note))
    report.claims.extend(claims(name, all_bits, outcomes))
    plot(name, all_bits, outcomes, methods, workdir, report)


def make_protocol(
  config: ConfigDict, bits: int, *, activations: bool = False, drop: float = 0.0
) -> Protocol:
  """Per-tensor asymmetric weights; with `activations`, inputs of as many bits learned by LSQ."""
  return Protocol(
    IntegerFormat(bits, axis=None),
    "search",
    ReconstructionSettings(config.network_steps, config.image_batch_size, drop),
    ActivationFormat(bits, "per_tensor") if activations else None,
    config.layer_wise,
  )


def edge_protocol(protocol: Protocol) -> Protocol:
  """The first and the last layer's: 8 bits."""
  formats = IntegerFormat(8, axis=None), protocol.activations
  if protocol.activations is not None:
    formats = formats[0], ActivationFormat(8, "per_tensor")
  return dataclasses.replace(protocol, format=formats[0], activations=formats[1], start="min_max")


def network_grids(model: convnets.ConvNet, protocol: Protocol) -> list:
  """Where all methods start, per unit."""
  places = convnets.units(model)
  grids = []
  for i, (path, _) in enumerate(places):
    edge = i in (0, len(places) - 1)
    unit = convnets.unit_at(model, path)
    grids.append(initial_grids(unit, edge_protocol(protocol) if edge else protocol))
  return grids


def calibration_images(config: ConfigDict, digits: convnets.Digits, seed: int) -> jax.Array:
  rows = np.random.default_rng(seed).permutation(convnets.NUM_TRAIN)[: config.calibration_images]
  return digits.train_images[rows]


def sweep(config: ConfigDict, model, digits, bits: int) -> dict[str, float]:
  """The rate of every learning method: the best on the first residual block."""
  rates, protocol = {}, make_protocol(config, bits)

  def at_first_block(index, edge, unit, x, run):
    if index == 1:
      for method, candidates in config.learning_rates.items():
        rates[method] = choose_learning_rate(
          method, candidates, unit, x, None, jax.random.key(0), protocol, run=run
        )
    return unit

  convnets.quantize_network(
    model, calibration_images(config, digits, config.network_seeds[0]), at_first_block
  )
  return rates


def quantize(method, config, model, digits, seed, protocol, rates, grids) -> Outcome:
  """Quantizes the network by one method and tests it."""
  errors = []
  rate = rates.get("FlexRound" if method in ABLATIONS else method)

  def one(index, edge, unit, x, run):
    key = jax.random.fold_in(jax.random.key(seed), index)
    conditions = edge_protocol(protocol) if edge else protocol
    # At 8 bits there is next to nothing to learn.
    used = "RTN" if edge else method
    result = quantize_unit(used, unit, x, None, key, conditions, rate, run=run, grids=grids[index])
    if not edge:
      errors.append(result.error)
    return result.unit

  images = calibration_images(config, digits, seed)
  quantized = convnets.quantize_network(model, images, one)
  logits = convnets.logits(quantized, digits.test_images)
  target = convnets.logits(model, digits.test_images)
  return Outcome(
    accuracy(logits, digits),
    float(jnp.mean((logits - target) ** 2)),
    float(np.exp(np.mean(np.log(errors)))),
  )


def accuracy(logits: jax.Array, digits: convnets.Digits) -> float:
  return float(jnp.mean(logits.argmax(axis=-1) == digits.test_labels))


def table(title: str, outcomes, note: str) -> Table:
  rows = []
  for (bits, method), results in outcomes.items():
    means = np.mean(results, axis=0)
    spread = float(np.std([r.accuracy for r in results], ddof=1)) if len(results) > 1 else None
    rows.append([method, bits, means[0], spread, means[1], means[2]])
  columns = [
    "method",
    "bits",
    Column("top-1", ".4f"),
    Column("sd over seeds", ".4f"),
    Column("logit MSE", ".4f"),
    Column("block MSE", ".5f"),
  ]
  return Table(title, columns, rows, note)


def claims(name: str, all_bits, outcomes) -> list[Claim]:
  """FlexRound >= AdaRound >= RTN in top-1, and FlexRound's blocks are nearer than AdaRound's."""
  found = []
  for bits in all_bits:

    def pair(field, first, second, bits=bits):
      return {m: [getattr(r, field) for r in outcomes[bits, m]] for m in (first, second)}

    where = f"{name}, W{bits} per tensor, top-1"
    pairs = [("FlexRound", "AdaRound"), ("FlexRound", "AdaQuant"), ("AdaRound", "RTN")]
    found += [
      Claim.greater(f"{a} is more accurate than {b} ({where})", pair("accuracy", a, b))
      for a, b in pairs
      if outcomes[bits, a] and outcomes[bits, b]
    ]
    found.append(
      Claim.less(
        f"FlexRound's blocks are nearer to the originals than AdaRound's ({name}, W{bits}, MSE)",
        pair("block_error", "FlexRound", "AdaRound"),
      )
    )
  return found


def plot(name: str, all_bits, outcomes, methods, workdir, report: Report) -> None:
  file = f"{name.lower()}_logit_error.png"
  series, errors = {}, {}
  for bits in all_bits:
    values = [[r.logit_error for r in outcomes[bits, method]] for method in methods]
    series[f"W{bits}"] = [float(np.mean(v)) for v in values]
    errors[f"W{bits}"] = [float(np.std(v)) for v in values]
  plots.bar_plot(
    workdir / file,
    list(methods),
    series,
    errors=errors,
    ylabel="logit MSE",
    title=f"{name} on digits, weights per tensor",
    log=True,
  )
  report.figures.append(
    Figure(f"{name}: distance from full precision", file, "Mean and sd over seeds, test images.")
  )
