"""Weight-only products of a decode step on TPU: the kernel, XLA and bfloat16, counted, not timed.

  .venv/bin/python -m benchmarks.kernels.quantized_matmul_tpu

No TPU is needed. A product takes at least the larger of its scheduled cycles over the clock and of
its HBM bytes over the bandwidth; the packed bound is the time of the packed weights, scales and
activations alone. Codes have zero points and bfloat16 scales in groups of 128. Chips of two cores
(v5p): the kernel's columns are shared by both; of XLA's cycles and bytes each core is given half.
"""

import json
import pathlib

from benchmarks.kernels.tpu_schedule import HERTZ, SLICES, schedule  # isort: skip

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from common import cli
from common.compilation.topology import CHIPS
from common.reporting.report import environment
from kernels.quantized_matmul import mosaic_tpu
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import packed_dtype

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/quantized_matmul_tpu.json", "result")

GROUP = 128
# Inputs and outputs of Llama-2-7B's projections.
SQUARE, DOWN = (4096, 4096), (11008, 4096)
CASES = [
  *((SQUARE, 4, rows) for rows in (1, 16, 32, 64)),
  (SQUARE, 2, 16),
  (SQUARE, 8, 16),
  (DOWN, 4, 16),
]


def arguments(shape, bits, rows):
  inputs, columns = shape
  codes = packed_dtype(bits, signed=False)
  array = jax.ShapeDtypeStruct
  return [
    array((rows, inputs), jnp.bfloat16),
    array(shape, codes),
    array((inputs // GROUP, columns), jnp.bfloat16),
    array((inputs // GROUP, columns), codes),
  ]


def packed_bytes(shape, bits, rows) -> float:
  """What must be read and written: codes, scales, zero points, x and the result."""
  inputs, columns = shape
  groups = inputs // GROUP * columns
  return inputs * columns * bits / 8 + groups * (2 + bits / 8) + rows * (inputs + columns) * 2


def measure(chip, shape, bits, rows) -> dict:
  def product(implementation):
    return lambda x, values, scales, zeros: quantized_matmul(
      x, values, scales, zeros, bits=bits, implementation=implementation
    )

  packed = arguments(shape, bits, rows)
  dense = [packed[0], jax.ShapeDtypeStruct(shape, jnp.bfloat16)]
  dot = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
  # The activations are split once in every block of inputs; zero points come off at the end.
  splits = shape[0] // mosaic_tpu.block_inputs(shape[0], GROUP)
  share = 0.5 if CHIPS[chip].two_cores else 1.0
  bandwidth = CHIPS[chip].bytes_per_second
  found = {"chip": chip, "shape": shape, "bits": bits, "rows": rows}
  found["packed_us"] = packed_bytes(shape, bits, rows) / bandwidth * 1e6
  for name, function, shapes, regions, part in (
    ("kernel", product("mosaic_tpu"), packed, [splits], 1.0),
    ("xla", product("xla"), packed, [], share),
    ("bfloat16", dot, dense, [], share),
  ):
    cycles, hbm_bytes = schedule(function, shapes, chip, regions)
    compute, memory = sum(cycles.values()) * part / HERTZ[chip], hbm_bytes / bandwidth
    found[name] = {
      "cycles": cycles,
      "hbm_bytes": hbm_bytes,
      "bound_us": max(compute, memory) * 1e6,
      "limit": "memory" if memory > compute else "schedule",
    }
  return found


def main(_) -> None:
  cli.prepare_jax(compile_only=True)
  results = [measure(chip, *case) for chip in SLICES for case in CASES]
  table = Table("chip", "weights", "bits", "rows", "packed us", "kernel us", "of packed", "limit",
                "bytes", "XLA / kernel", "bfloat16 / kernel")  # fmt: skip
  for r in results:
    kernel = r["kernel"]
    bound = kernel["bound_us"]
    floor = packed_bytes(r["shape"], r["bits"], r["rows"])
    table.add_row(
      r["chip"],
      " x ".join(map(str, r["shape"])),
      str(r["bits"]),
      str(r["rows"]),
      f"{r['packed_us']:.2f}",
      f"{bound:.2f}",
      f"{bound / r['packed_us']:.2f}",
      kernel["limit"],
      f"{kernel['hbm_bytes'] / floor:.3f}",
      f"{r['xla']['bound_us'] / bound:.2f}",
      f"{r['bfloat16']['bound_us'] / bound:.2f}",
    )
  Console(width=120).print(table)
  text = json.dumps({"environment": environment(), "results": results}, indent=1)
  pathlib.Path(_OUT.value).write_text(text + "\n")


if __name__ == "__main__":
  cli.run_app(main)
