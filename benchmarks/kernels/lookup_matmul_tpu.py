"""Vector-quantized weights on TPU: the kernel, XLA's lookup and bfloat16, counted, not timed.

  .venv/bin/python -m benchmarks.kernels.lookup_matmul_tpu

No TPU is needed. A product takes at least the larger of its scheduled cycles over the clock and of its
HBM bytes over the bandwidth, the preparation of the codebooks included; the packed bound is the time of
the packed indices, the codebooks and the activations alone. Activations are bfloat16, codebooks float16.
XLA's lookup does not depend on the rows, and is counted at one. Chips of two cores (v5p) share the work,
and each core's cycles are counted; what XLA gives to SparseCores is not.
"""

import functools
import json
import pathlib

from benchmarks.kernels.tpu_schedule import HERTZ, SLICES, schedule  # isort: skip

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.lookup_schedule import lookup_loops
from common import cli
from common.compilation.topology import CHIPS
from common.reporting.report import environment
from kernels.lookup_matmul.api import index_bits, lookup_matmul
from kernels.lookup_matmul.packing import packed_shape

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/lookup_matmul_tpu.json", "result")

SQUARE, DOWN = (4096, 4096), (11008, 4096)  # Inputs and outputs of Llama-2-7B's projections.
CASES = [  # Shape, centroids of each stage, outputs of a vector.
  *((SQUARE, (256,), v) for v in (2, 8)),
  *((SQUARE, (4096,), v) for v in (6, 8)),
  (SQUARE, (4096, 256), 8),
  (SQUARE, (65536,), 8),
  (DOWN, (256,), 8),
  (DOWN, (4096,), 8),
]
ROWS = (1, 16)


def arguments(shape, centroids, v, rows) -> list[jax.ShapeDtypeStruct]:
  inputs, columns = shape
  array = jax.ShapeDtypeStruct
  stages = [
    (array(packed_shape(inputs, k, -(-columns // v)), jnp.uint32), array((1, k, v), jnp.float16))
    for k in centroids
  ]
  return [array((rows, inputs), jnp.bfloat16), *(a for stage in stages for a in stage)]


def packed_bytes(shape, centroids, v, rows) -> float:
  """What must be read and written: indices, codebooks, x and the result."""
  inputs, columns = shape
  indices = sum(inputs * -(-columns // v) * index_bits(k) / 8 for k in centroids)
  return indices + sum(centroids) * v * 2 + rows * (inputs * 2 + columns * 4)


def bound(chip, function, shapes, loops=()) -> dict:
  """The time that a program takes at least, and what it is bound by."""
  cycles, hbm_bytes = schedule(function, shapes, chip, loops=loops)
  limits = {
    "schedule": sum(cycles.values()) / HERTZ[chip] * 1e6,
    "memory": hbm_bytes / CHIPS[chip].bytes_per_second * 1e6,
  }
  limit = max(limits, key=limits.get)
  return {
    "cycles": cycles, "hbm_bytes": hbm_bytes, "bound_us": limits[limit], "limit": limit
  }  # fmt: skip


def product(columns, implementation):
  return lambda *arrays: lookup_matmul(*arrays, columns=columns, implementation=implementation)


@functools.cache
def xla(chip, shape, centroids, v) -> dict:
  return bound(chip, product(shape[1], "xla"), arguments(shape, centroids, v, rows=1))


@functools.cache
def dense(chip, shape, rows) -> dict:
  dot = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32)
  array = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
  return bound(chip, dot, [array(rows, shape[0]), array(*shape)])


def decode(chip, shape, centroids, v, rows) -> dict:
  shapes = arguments(shape, centroids, v, rows)
  floor = packed_bytes(shape, centroids, v, rows)
  of_kernels = {f"lookup_matmul_k{k}": lookup_loops(shape[0], k, v) for k in centroids}
  return {
    "chip": chip,
    "shape": shape,
    "centroids": centroids,
    "vector": v,
    "rows": rows,
    "packed_bytes": floor,
    "packed_us": floor / CHIPS[chip].bytes_per_second * 1e6,
    "kernel": bound(chip, product(shape[1], "mosaic_tpu"), shapes, of_kernels),
    "xla_one_row": xla(chip, shape, centroids, v),
    "bfloat16": dense(chip, shape, rows),
  }


def main(_) -> None:
  cli.prepare_jax(compile_only=True)
  results = [decode(chip, *case, rows) for chip in SLICES for case in CASES for rows in ROWS]
  table = Table("chip", "weights", "centroids", "vector", "rows", "packed us", "kernel us", "limit",
                "XLA at one row / kernel", "bfloat16 / kernel")  # fmt: skip
  for r in results:
    kernel = r["kernel"]
    table.add_row(
      r["chip"],
      " x ".join(map(str, r["shape"])),
      " + ".join(map(str, r["centroids"])),
      str(r["vector"]),
      str(r["rows"]),
      f"{r['packed_us']:.2f}",
      f"{kernel['bound_us']:.1f}",
      kernel["limit"],
      f"{r['xla_one_row']['bound_us'] / kernel['bound_us']:.1f}",
      f"{r['bfloat16']['bound_us'] / kernel['bound_us']:.2f}",
    )
  Console(width=140).print(table)
  text = json.dumps({"environment": environment(), "results": results}, indent=1)
  pathlib.Path(_OUT.value).write_text(text + "\n")


if __name__ == "__main__":
  cli.run_app(main)
