"""TPU slices to compile for, without a TPU: libtpu's compiler and the chips' published numbers."""

import dataclasses
import importlib.util
import re

import jax
from jax.experimental import topologies

from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip.

  Attributes:
    hbm_bytes: memory.
    flops_per_second: peak of bfloat16 matrix products.
    bytes_per_second: bandwidth of the memory.
    shapes: slices that exist, for the error message.
    two_cores: both TensorCores work as one device.
  """

  hbm_bytes: float
  flops_per_second: float
  bytes_per_second: float
  shapes: tuple[str, ...]
  two_cores: bool = False


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "4x4x4")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "8x8", "16x16")
CHIPS = {
  "v4": Chip(32 * 2**30, 275e12, 1228e9, _CUBES, two_cores=True),
  "v5e": Chip(16 * 2**30, 197e12, 819e9, _SQUARES),
  "v5p": Chip(95 * 2**30, 459e12, 2765e9, _CUBES, two_cores=True),
  "v6e": Chip(32 * 2**30, 918e12, 1640e9, _SQUARES),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice that programs can be compiled for.

  Attributes:
    name: such as "v5p:2x2x4".
    chip: what it is made of.
    devices: one for each chip; they compile and cannot run.
  """

  name: str
  chip: Chip
  devices: list[jax.Device]


def tpu_slice(name: str) -> Slice:
  """The slice FAMILY:SHAPE, such as "v5e:4x4" or "v5p:2x2x4".

  Raises:
    UserError: there is no such slice, or libtpu is not installed.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  chip = CHIPS.get(match[1]) if match else None
  if chip is None or match[2].count("x") != chip.shapes[0].count("x"):
    raise UserError(f"unknown TPU slice {name!r}; {_choices(chip and match[1])}")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "compiling for a TPU needs its compiler: .venv/bin/pip install libtpu==0.0.52 (no TPU needed)"
    )
  options = {"chip_config_name": "megacore"} if chip.two_cores else {}
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  except jax.errors.JaxRuntimeError as e:
    if "INVALID_ARGUMENT" not in str(e):
      raise
    raise UserError(f"no TPU slice has the shape {name!r}; {_choices(match[1])}") from None
  return Slice(name, chip, topology.devices)


def _choices(family: str | None = None) -> str:
  families = [family] if family else CHIPS
  return "there are " + "; ".join(
    f"{family}: {', '.join(f'{family}:{shape}' for shape in CHIPS[family].shapes)}"
    for family in families
  )
