"""Weight-only products on TPU: the kernel, XLA and bfloat16, counted, not timed.

  .venv/bin/python -m benchmarks.kernels.quantized_matmul_tpu

No TPU is needed. Decoding: a product takes at least the larger of its scheduled cycles over the clock
and of its HBM bytes over the bandwidth; the packed bound is the time of the packed weights, scales
and activations alone. Codes have zero points and bfloat16 scales. Prefill: a product of many rows
also takes at least its multiplications at the matrix units' published peak, of 8-bit integers twice
that of bfloat16; utilisation is that time, of bfloat16, over the bound. Chips of two cores (v5p)
share the work, and each core's cycles are counted.
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

from common import cli
from common.compilation.topology import CHIPS
from common.reporting.report import environment
from kernels.integer_matmul.api import integer_matmul
from kernels.quantized_matmul import tpu_operands
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import pack, packed_dtype

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/quantized_matmul_tpu.json", "result")

# Inputs and outputs of Llama-2-7B's and Llama-2-70B's projections.
SQUARE, DOWN, UP = (4096, 4096), (11008, 4096), (4096, 11008)
SQUARE_70B, DOWN_70B, UP_70B = (8192, 8192), (28672, 8192), (8192, 28672)
DECODING = [  # Shape, bits, rows, and how many inputs and outputs share a scale.
  *((SQUARE, 4, rows, (128, 1)) for rows in (1, 16, 32, 64)),
  *((SQUARE, 2, rows, (128, 1)) for rows in (16, 32, 64)),
  *((SQUARE, 3, rows, (128, 1)) for rows in (1, 16, 32, 64)),
  *((SQUARE, 8, rows, (128, 1)) for rows in (16, 64)),
  (DOWN, 4, 16, (128, 1)),
  (DOWN, 3, 16, (128, 1)),
  *((shape, 4, rows, (128, 1)) for shape in (SQUARE_70B, UP_70B, DOWN_70B) for rows in (16, 64)),
  *((SQUARE, 4, rows, (32, 1)) for rows in (4, 16)),
  *((SQUARE, 4, rows, (64, 1)) for rows in (8, 16)),
]
PREFILL = [(shape, 2048) for shape in (SQUARE, UP)]
# More than the pipeline's own conditions within a step have, less than the kernel's.
SMALL_REGION = 24


def arguments(shape, bits, rows, group=(128, 1)):
  inputs, columns = shape
  groups = (inputs // group[0], columns // group[1])
  array = jax.ShapeDtypeStruct
  return [
    array((rows, inputs), jnp.bfloat16),
    jax.eval_shape(lambda codes: pack(codes, bits, signed=False), array(shape, jnp.int32)),
    array(groups, jnp.bfloat16),
    array(groups, packed_dtype(8 if bits == 3 else bits, signed=False)),
  ]


def packed_bytes(arrays, bits) -> float:
  """What must be read and written: codes, scales, zero points, x and the result."""
  x, _, scales, zeros = arrays
  (rows, inputs), columns = x.shape, arrays[1].shape[-1]
  per_group = 2 + jnp.iinfo(zeros.dtype).bits / 8
  return inputs * columns * bits / 8 + scales.size * per_group + rows * (inputs + columns) * 2


def bound(chip, function, shapes, regions=(), floor_us=0.0) -> dict:
  """The time that a program takes at least, and what it is bound by."""
  cycles, hbm_bytes = schedule(function, shapes, chip, regions, SMALL_REGION)
  limits = {
    "schedule": sum(cycles.values()) / HERTZ[chip] * 1e6,
    "memory": hbm_bytes / CHIPS[chip].bytes_per_second * 1e6,
    "matrix unit": floor_us,
  }
  limit = max(limits, key=limits.get)
  return {
    "cycles": cycles, "hbm_bytes": hbm_bytes, "bound_us": limits[limit], "limit": limit
  }  # fmt: skip


def dot(x, w):
  return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def product(bits, implementation):
  return lambda x, values, scales, zeros: quantized_matmul(
    x, values, scales, zeros, bits=bits, implementation=implementation
  )


def decode(chip, shape, bits, rows, group) -> dict:
  packed = arguments(shape, bits, rows, group)
  dense = [packed[0], jax.ShapeDtypeStruct(shape, jnp.bfloat16)]
  floor = packed_bytes(packed, bits)
  return {
    "chip": chip,
    "shape": shape,
    "bits": bits,
    "rows": rows,
    "group": group,
    "packed_bytes": floor,
    "packed_us": floor / CHIPS[chip].bytes_per_second * 1e6,
    "kernel": bound(chip, product(bits, "mosaic_tpu"), packed, regions(chip, shape, bits)),
    "xla": bound(chip, product(bits, "xla"), packed),
    "bfloat16": bound(chip, dot, dense),
  }


def regions(chip, shape, bits) -> list[int]:
  """How often one core splits activations, starts a sum and ends it (the kernels' `_kernel`)."""
  cores, columns, blocks = tpu_operands.grid(shape, 128, bits)
  # A core alone does both halves of the columns, and splits the activations for each.
  halves = 1 if CHIPS[chip].two_cores else cores
  if blocks == 1:
    return [halves]
  return [halves * blocks, halves * columns, halves * columns]


def prefill(chip, shape, rows) -> dict:
  """4-bit and W8A8 products as `implementation=None` multiplies them on this chip, and bfloat16."""
  inputs, columns = shape
  array = jax.ShapeDtypeStruct
  x, *packed = arguments(shape, 4, rows)
  peak = 2 * rows * inputs * columns / CHIPS[chip].flops_per_second * 1e6
  integers = [array(shape, jnp.int8), array((1, columns), jnp.bfloat16)]
  w8a8 = functools.partial(
    integer_matmul,
    activation_bits=8,
    implementation="mosaic_tpu" if chip == "v5p" else "xla",
  )
  found = {
    "bfloat16": bound(chip, dot, [x, array(shape, jnp.bfloat16)], floor_us=peak),
    "w4": bound(chip, product(4, None), [x, *packed], floor_us=peak),
    "w8a8": bound(chip, w8a8, [x, *integers], floor_us=peak / 2),
  }
  for result in found.values():
    result["utilisation"] = peak / result["bound_us"]
  return {"chip": chip, "shape": shape, "rows": rows, **found}


def main(_) -> None:
  cli.prepare_jax(compile_only=True)
  decoding = [decode(chip, *case) for chip in SLICES for case in DECODING]
  table = Table("chip", "weights", "bits", "group", "rows", "packed us", "kernel us", "of packed",
                "limit", "bytes", "XLA / kernel", "bfloat16 / kernel")  # fmt: skip
  for r in decoding:
    kernel = r["kernel"]
    table.add_row(
      r["chip"],
      " x ".join(map(str, r["shape"])),
      str(r["bits"]),
      " x ".join(map(str, r["group"])),
      str(r["rows"]),
      f"{r['packed_us']:.2f}",
      f"{kernel['bound_us']:.2f}",
      f"{kernel['bound_us'] / r['packed_us']:.2f}",
      kernel["limit"],
      f"{kernel['hbm_bytes'] / r['packed_bytes']:.3f}",
      f"{r['xla']['bound_us'] / kernel['bound_us']:.2f}",
      f"{r['bfloat16']['bound_us'] / kernel['bound_us']:.2f}",
    )
  Console(width=140).print(table)
  filled = [prefill(chip, *case) for chip in SLICES for case in PREFILL]
  table = Table("chip", "weights", "rows", "bfloat16 us", "limit", "utilisation", "W4 / bfloat16",
                "bfloat16 / W8A8")  # fmt: skip
  for r in filled:
    dense = r["bfloat16"]
    table.add_row(
      r["chip"],
      " x ".join(map(str, r["shape"])),
      str(r["rows"]),
      f"{dense['bound_us']:.1f}",
      dense["limit"],
      f"{dense['utilisation']:.0%}",
      f"{r['w4']['utilisation'] / dense['utilisation']:.2f}",
      f"{dense['bound_us'] / r['w8a8']['bound_us']:.2f}",
    )
  Console(width=140).print(table)
  text = json.dumps(
    {"environment": environment(), "decoding": decoding, "prefill": filled}, indent=1
  )
  pathlib.Path(_OUT.value).write_text(text + "\n")


if __name__ == "__main__":
  cli.run_app(main)
