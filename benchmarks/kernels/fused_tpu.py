"""What papers put around integer products on TPU, in a kernel and through XLA, counted, not timed.

  .venv/bin/python -m benchmarks.kernels.fused_tpu

No TPU is needed. A program takes at least the larger of its scheduled cycles over the clock and of its
HBM bytes over the bandwidth, if every operation's memory traffic overlaps with the others' work.

Around a weight-only product (4 bits, groups of 128): a scale and a shift of x, a low-rank matrix beside
W, both. XLA puts them into operations before and behind the kernel. `fused` is one kernel that took no
cycles more than the product alone, and read the new arrays once. `in turn` is a pessimistic bound: no
memory traffic overlaps with the operations around the kernel.

Kronecker transforms with quantization: the kernel and XLA, and `floor`, x, factors, codes and scales
moved once.
"""

import json
import pathlib

from benchmarks.kernels.tpu_schedule import HERTZ, SLICES, schedule  # isort: skip

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.quantized_matmul_cases import SMALL_REGION, SQUARE, arguments, regions
from common import cli
from common.compilation.topology import CHIPS
from common.reporting.report import environment
from kernels.kronecker_quantize.api import kronecker_quantize
from kernels.quantized_matmul.api import quantized_matmul

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/fused_tpu.json", "result")

# Ranks of LoRC in ZeroQuant-V2, and eight times that.
AROUND = {
  "nothing": {},
  "scale, shift": {"scale": True},
  "rank 8": {"rank": 8},
  "rank 64": {"rank": 64},
  "scale, shift, rank 64": {"scale": True, "rank": 64},
}
PRODUCT_ROWS = 16
# FlatQuant's factors of Llama-2-7B's 4096 and 11008 and of Llama-2-70B's 28672 inputs, rows, and whether
# XLA's program is counted too: it compiles that of many rows and an uneven factor for minutes.
KRONECKER = [
  *(((64, 64), rows, True) for rows in (1, 16, 2048)),
  ((86, 128), 16, True),
  ((86, 128), 2048, False),
  ((128, 224), 2048, False),
]


def product(chip: str, scale: bool = False, rank: int = 0) -> dict:
  """Cycles, bytes and microseconds of one product of 4096 x 4096 weights."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  inputs, columns = SQUARE
  packed = arguments(SQUARE, 4, PRODUCT_ROWS)
  around = {}
  if scale:
    around |= {"input_scale": array(inputs), "input_shift": array(inputs)}
  if rank:
    around["low_rank"] = (array(inputs, rank), array(rank, columns))
  leaves, tree = jax.tree.flatten(around)

  def function(x, values, scales, zeros, *leaves):
    return quantized_matmul(
      x, values, scales, zeros, bits=4, implementation="mosaic_tpu", **tree.unflatten(leaves)
    )

  of_kernel = {"quantized_matmul": regions(chip, SQUARE, 4)}
  cycles, hbm_bytes = schedule(function, [*packed, *leaves], chip, of_kernel, SMALL_REGION)
  microseconds = lambda cycles: cycles / HERTZ[chip] * 1e6
  kernel = microseconds(sum(n for name, n in cycles.items() if "quantized_matmul" in name))
  others = microseconds(sum(cycles.values())) - kernel
  memory = hbm_bytes / CHIPS[chip].bytes_per_second * 1e6
  return {
    "cycles": cycles,
    "hbm_bytes": hbm_bytes,
    "bound_us": max(kernel + others, memory),
    "in_turn_us": max(kernel, memory) + others,
    "kernel_us": kernel,
    "others_us": others,
    "added_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
  }


def products(chip: str) -> list[dict]:
  """What is around a product, beside the product alone."""
  found = {name: product(chip, **around) for name, around in AROUND.items()}
  alone = found["nothing"]
  for name, result in found.items():
    hbm_bytes = alone["hbm_bytes"] + result["added_bytes"]
    memory = hbm_bytes / CHIPS[chip].bytes_per_second * 1e6
    result |= {
      "chip": chip,
      "around": name,
      "fused_bytes": hbm_bytes,
      "fused_us": max(alone["kernel_us"], memory),
      "fused_in_turn_us": max(alone["kernel_us"], memory) + alone["others_us"],
    }
  return list(found.values())


def kronecker(chip: str, factors: tuple[int, int], rows: int, with_xla: bool) -> dict:
  """The kernel, and XLA's program for the same arrays."""
  n1, n2 = factors
  array = jax.ShapeDtypeStruct
  low = jnp.bfloat16
  shapes = [array((rows, n1 * n2), low), array((n1, n1), low), array((n2, n2), low)]
  floor = rows * (3 * n1 * n2 + 4) + 2 * (n1 * n1 + n2 * n2)
  found = {"chip": chip, "factors": factors, "rows": rows, "floor_bytes": floor}
  found["floor_us"] = floor / CHIPS[chip].bytes_per_second * 1e6
  for implementation in ("mosaic_tpu", "xla") if with_xla else ("mosaic_tpu",):
    function = lambda *arrays, implementation=implementation: kronecker_quantize(
      *arrays, bits=4, implementation=implementation
    )
    cycles, hbm_bytes = schedule(function, shapes, chip)
    limits = {
      "schedule": sum(cycles.values()) / HERTZ[chip] * 1e6,
      "memory": hbm_bytes / CHIPS[chip].bytes_per_second * 1e6,
    }
    limit = max(limits, key=limits.get)
    found[implementation] = {
      "cycles": cycles,
      "hbm_bytes": hbm_bytes,
      "bound_us": limits[limit],
      "limit": limit,
    }
  return found


def main(_) -> None:
  cli.prepare_jax(compile_only=True)
  console = Console(width=140)
  found = {"environment": environment(), "products": [], "kronecker": []}
  for chip in SLICES:
    found["products"] += products(chip)
  table = Table("chip", "around", "fused us", "XLA us", "in turn us", "bytes", "in turn / fused")
  for r in found["products"]:
    table.add_row(
      r["chip"],
      r["around"],
      f"{r['fused_us']:.2f}",
      f"{r['bound_us']:.2f}",
      f"{r['in_turn_us']:.2f}",
      f"{r['hbm_bytes'] / r['fused_bytes']:.3f}",
      f"{r['in_turn_us'] / r['fused_in_turn_us']:.3f}",
    )
  console.print(table)
  table = Table("chip", "factors", "rows", "floor us", "kernel us", "limit", "of floor", "bytes",
                "XLA / kernel")  # fmt: skip
  for chip in SLICES:
    for factors, rows, with_xla in KRONECKER:
      r = kronecker(chip, factors, rows, with_xla)
      found["kronecker"].append(r)
      kernel = r["mosaic_tpu"]
      table.add_row(
        chip,
        " x ".join(map(str, factors)),
        str(rows),
        f"{r['floor_us']:.2f}",
        f"{kernel['bound_us']:.2f}",
        kernel["limit"],
        f"{kernel['bound_us'] / r['floor_us']:.2f}",
        f"{kernel['hbm_bytes'] / r['floor_bytes']:.3f}",
        f"{r['xla']['bound_us'] / kernel['bound_us']:.2f}" if with_xla else "",
      )
  console.print(table)
  pathlib.Path(_OUT.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  cli.run_app(main)
