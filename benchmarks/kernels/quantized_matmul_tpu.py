"""Weight-only products on TPU: the kernel, XLA, bfloat16, qwix and tokamax, counted, not timed.

  .venv/bin/python -m benchmarks.kernels.quantized_matmul_tpu
  .venv/bin/python -m benchmarks.kernels.quantized_matmul_tpu --only=kernels
  .venv/bin/python -m benchmarks.kernels.quantized_matmul_tpu --render

No TPU is needed. Decoding: a product takes at least the larger of its scheduled cycles over the clock
and of its HBM bytes over the bandwidth; the packed bound is the time of the packed weights, scales
and activations alone. Codes have zero points and bfloat16 scales; see `quantized_matmul_peers` for the
libraries'. Prefill: a product of many rows also takes at least its multiplications at the matrix
units' published peak, of 8-bit integers twice that of bfloat16; utilisation is that time, of
bfloat16, over the bound. Chips of two cores (v5p) share the work, and each core's cycles are counted.
"""

import functools
import pathlib

from benchmarks.kernels.tpu_schedule import HERTZ, SLICES, schedule  # isort: skip

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.kernels import quantized_matmul_peers, results
from benchmarks.kernels.quantized_matmul_cases import (
  DECODING,
  PREFILL,
  SMALL_REGION,
  arguments,
  packed_bytes,
  regions,
)
from common import cli
from common.compilation.topology import CHIPS
from kernels.integer_matmul.api import integer_matmul
from kernels.quantized_matmul.api import quantized_matmul

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/quantized_matmul_tpu.json", "result")
PARTS = (results.KERNELS, "qwix", "tokamax")
_ONLY = flags.DEFINE_multi_enum("only", PARTS, PARTS, "run these, keep the others' results")
_RENDER = flags.DEFINE_bool("render", False, "only print the tables of the results that there are")


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
  return lambda x, *weights: quantized_matmul(x, *weights, bits=bits, implementation=implementation)


def decode(chip, shape, bits, rows, group) -> dict:
  packed = arguments(shape, bits, rows, group)
  dense = [packed[0], jax.ShapeDtypeStruct(shape, jnp.bfloat16)]
  floor = packed_bytes(packed, bits)
  return {
    "packed_bytes": floor,
    "packed_us": floor / CHIPS[chip].bytes_per_second * 1e6,
    "kernel": bound(chip, product(bits, "mosaic_tpu"), packed, regions(chip, shape, bits)),
    "kernel_symmetric": symmetric(chip, shape, bits, rows, group),
    "xla": bound(chip, product(bits, "xla"), packed),
    "bfloat16": bound(chip, dot, dense),
  }


def symmetric(chip, shape, bits, rows, group) -> dict:
  """The kernel's bound without zero points, to compare with libraries that have none."""
  packed = arguments(shape, bits, rows, group, symmetric=True)
  return bound(chip, product(bits, "mosaic_tpu"), packed, regions(chip, shape, bits))


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
  return found


def print_tables(found) -> None:
  heads = ["chip", "weights", "bits", "group", "rows", "packed, us", "kernel, us",
           "kernel / packed", "limit", "bytes", "XLA / kernel", "bfloat16 / kernel",
           "qwix / kernel", "symmetric kernel, us", "qwix / symmetric kernel",
           "tokamax / symmetric kernel"]  # fmt: skip
  rows = []
  for r in (r for r in found["decoding"] if "kernel" in r):
    kernel = r["kernel"]
    rows.append([
      r["chip"],
      " x ".join(map(str, r["shape"])),
      str(r["bits"]),
      str(r["group"][0]),
      str(r["rows"]),
      f"{r['packed_us']:.2f}",
      f"{kernel['bound_us']:.2f}",
      f"{kernel['bound_us'] / r['packed_us']:.2f}",
      kernel["limit"],
      f"{kernel['hbm_bytes'] / r['packed_bytes']:.3f}",
      *(results.over(r, name, "kernel") for name in ("xla", "bfloat16", "qwix")),
      f"{r['kernel_symmetric']['bound_us']:.2f}",
      *(results.over(r, name, "kernel_symmetric") for name in ("qwix_symmetric", "tokamax")),
    ])  # fmt: skip
  results.print_table(heads, rows)
  heads = ["chip", "weights", "bfloat16, us", "limit", "utilisation",
           "W4's / bfloat16's utilisation", "bfloat16 / W8A8 time"]  # fmt: skip
  rows = []
  for r in found["prefill"]:
    dense = r["bfloat16"]
    rows.append([
      r["chip"],
      " x ".join(map(str, r["shape"])),
      f"{dense['bound_us']:.1f}",
      dense["limit"],
      f"{dense['utilisation']:.0%}",
      f"{r['w4']['utilisation'] / dense['utilisation']:.2f}",
      results.over(r, "bfloat16", "w8a8"),
    ])  # fmt: skip
  results.print_table(heads, rows)


def main(_) -> None:
  cli.prepare_jax(compile_only=True)
  path = pathlib.Path(_OUT.value)
  parts = () if _RENDER.value else results.runnable(_ONLY.value)
  found = results.load(path, needed=results.KERNELS not in parts)
  results.say_where(found, parts)
  names = ("chip", "shape", "bits", "rows", "group")
  wanted = [dict(zip(names, (chip, *case))) for chip in SLICES for case in DECODING]
  found["decoding"] = results.cases(found.get("decoding", []), wanted)
  for case, result in zip(wanted, found["decoding"]) if parts else ():
    if results.KERNELS in parts:
      result |= decode(**case)
    if "qwix" in parts:
      result |= quantized_matmul_peers.qwix_peers(**case)
    if "tokamax" in parts:
      result |= quantized_matmul_peers.tokamax_peers(**case)
    results.save(found, path)
  if results.KERNELS in parts:
    wanted = [dict(chip=chip, shape=shape, rows=rows) for chip in SLICES for shape, rows in PREFILL]
    found["prefill"] = results.cases(found.get("prefill", []), wanted)
    for case, result in zip(wanted, found["prefill"]):
      result |= prefill(**case)
      results.save(found, path)
  print_tables(found)


if __name__ == "__main__":
  cli.run_app(main)
