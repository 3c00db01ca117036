"""Part (a): ResNet and MobileNetV2, weights per tensor, the first and last layer 8 bits.

The networks are small ones, trained on digits, or a checkpoint with the images of its classes.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from common.quantization.activations import ActivationFormat
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.flexround import convnets
from projects.flexround.convnets import Network
from projects.flexround.digits_networks import digits_network
from projects.flexround.methods import (
  ABLATIONS,
  Protocol,
  choose_learning_rate,
  initial_grids,
  quantize_unit,
)
from projects.flexround.vision_checkpoint import open_checkpoint


class Outcome(NamedTuple):
  """A quantized network.

  Attributes:
    accuracy, logit_error: see `convnets.Score`.
    block_error: geometric mean over the blocks between the first and last unit of the mean
      squared error of their outputs, on the calibration set.
  """

  accuracy: float
  logit_error: float | None
  block_error: float


# {(bits, method): of every seed}
Outcomes = dict[tuple[int, str], list[Outcome]]


def compare_on_digits(
  config: ConfigDict, workdir: pathlib.Path, measurements: Measurements, report: Report
) -> None:
  """Adds the tables, the figure and the claims of all small networks to the report."""
  for i, (name, all_bits) in enumerate(config.networks.items()):
    # The ablations and activations are of the first network only.
    methods = [m for m in config.network_methods if i == 0 or m not in list(ABLATIONS)[1:]]
    outcomes = compare(
      config,
      f"{name} on digits",
      functools.partial(digits_network, config, name),
      all_bits,
      methods,
      config.activation_seeds if i == 0 else 0,
      measurements,
      report,
    )
    report.claims.extend(claims(name, all_bits, outcomes))
    plot(name, all_bits, outcomes, methods, workdir, report)


def compare_on_images(config: ConfigDict, measurements: Measurements, report: Report) -> None:
  """Adds the tables and claims of a checkpoint on the images of its classes to the report.

  Raises:
    UserError: see `open_checkpoint`, or a width is not supported.
  """
  for bits in (*config.vision_bits, *config.network_other_bits):
    make_protocol(config, bits)
  network_of, note = open_checkpoint(config)
  title = f"{config.vision_model} on {config.images}"
  methods, seeds = config.network_methods, config.activation_seeds
  outcomes = compare(
    config, title, network_of, config.vision_bits, methods, seeds, measurements, report, note=note
  )
  name = pathlib.Path(config.vision_model).expanduser().name
  report.claims.extend(claims(name, config.vision_bits, outcomes))


def compare(
  config: ConfigDict,
  title: str,
  network_of: Callable[[int], Network],
  all_bits,
  methods,
  activation_seeds: int,
  measurements: Measurements,
  report: Report,
  *,
  note: str = "",
) -> Outcomes:
  """Adds the tables of a network to the report.

  Args:
    config: the seeds and the conditions.
    title: of the tables.
    network_of: the network of a seed.
    all_bits: of the weights.
    methods: that are compared.
    activation_seeds: with quantized activations on so many seeds.
    measurements: of the run.
    report: is added to.
    note: the end of the first table's note.

  Returns:
    Those of the first table.
  """
  outcomes, full = collections.defaultdict(list), []
  activations = collections.defaultdict(list)
  # Made when a measurement that is missing asks for it; all but the last are forgotten.
  network_of = functools.lru_cache(maxsize=1)(network_of)
  grids_of = functools.lru_cache(maxsize=1)(
    lambda seed, protocol: network_grids(network_of(seed).model, protocol)
  )
  rates = measurements.get(
    f"{title}, rates",
    lambda: sweep(config, network_of(config.network_seeds[0]), min(all_bits)),
  )

  def outcome(setting: str, method: str, seed: int, protocol: Protocol) -> Outcome:
    return measurements.get(
      f"{title}, {setting}, {method}, seed {seed}",
      lambda: quantize(method, network_of(seed), seed, protocol, rates, grids_of(seed, protocol)),
    )

  def accuracy(seed: int) -> float:
    network = network_of(seed)
    return network.score(network.model).accuracy

  for j, seed in enumerate(config.network_seeds):
    in_full = functools.partial(accuracy, seed)
    full.append(measurements.get(f"{title}, full precision, seed {seed}", in_full))
    for bits in dict.fromkeys((*all_bits, *(config.network_other_bits if j == 0 else ()))):
      protocol = make_protocol(config, bits)
      for method in methods:
        outcomes[bits, method].append(outcome(f"W{bits}", method, seed, protocol))
    if j < activation_seeds:
      bits = config.activation_bits
      for label, drop in (("B", 0.0), ("Q", 0.5)):
        protocol = make_protocol(config, bits, activations=True, drop=drop)
        for method in ("RTN", "AdaRound", "FlexRound"):
          # Nothing of RTN depends on the protocol.
          if method != "RTN" or label == "B":
            shown = method if method == "RTN" else f"{label} + {method}"
            setting = f"W{bits}A{bits}, protocol {label}"
            activations[bits, shown].append(outcome(setting, method, seed, protocol))
  chosen = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
  first_note = (
    f"Mean over {len(config.network_seeds)} seeds; where no sd is shown, one seed. Full "
    f"precision: top-1 {np.mean(full):.4f}. Rates chosen on the calibration error of one block: "
    f"{chosen}.{note}"
  )
  report.tables.append(table(f"{title}, weights per tensor", outcomes, first_note))
  if activations:
    protocols = f"{activation_seeds} seeds. B: BRECQ's protocol; Q: QDrop's."
    bits = config.activation_bits
    report.tables.append(table(f"{title}, W{bits}A{bits}", activations, protocols))
  return outcomes


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


def sweep(config: ConfigDict, network: Network, bits: int) -> dict[str, float]:
  """The rate of every learning method: the best on the first residual block."""
  rates, protocol = {}, make_protocol(config, bits)

  def at_first_block(index, edge, unit, x, run):
    if index == 1:
      for method, candidates in config.learning_rates.items():
        rates[method] = choose_learning_rate(
          method, candidates, unit, x, None, jax.random.key(0), protocol, run=run
        )
    return unit

  convnets.quantize_network(network.model, network.images, at_first_block)
  return rates


def quantize(method, network: Network, seed, protocol, rates, grids) -> Outcome:
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

  quantized = convnets.quantize_network(network.model, network.images, one)
  return Outcome(*network.score(quantized), float(np.exp(np.mean(np.log(errors)))))


def table(title: str, outcomes, note: str) -> Table:
  errors = {"logit_error": Column("logit MSE", ".4f"), "block_error": Column("block MSE", ".5f")}
  if any(r.logit_error is None for results in outcomes.values() for r in results):
    del errors["logit_error"]
  rows = []
  for (bits, method), results in outcomes.items():
    top1, *means = np.mean(
      [[getattr(r, n) for n in ("accuracy", *errors)] for r in results], axis=0
    )
    spread = float(np.std([r.accuracy for r in results], ddof=1)) if len(results) > 1 else None
    rows.append([method, bits, top1, spread, *means])
  top1 = (Column("top-1", ".4f"), Column("sd over seeds", ".4f"))
  return Table(title, ["method", "bits", *top1, *errors.values()], rows, note)


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
    if outcomes[bits, "FlexRound"] and outcomes[bits, "AdaRound"]:
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
