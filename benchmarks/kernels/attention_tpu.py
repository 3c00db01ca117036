"""Attention on TPU: the kernels and XLA, counted in the compiler's schedule, not timed.

  .venv/bin/python -m benchmarks.kernels.attention_tpu

No TPU is needed. A program takes at least the larger of its scheduled cycles over the clock and of
its HBM bytes over the bandwidth. Training: causal self-attention of 8 heads of 128, one row of 4096
tokens, bfloat16, with segment ids; the floor is the products of the blocks of 512 x 512 that
causality leaves, at the matrix units' peak. Decoding: 8 rows over caches of 4096 slots of 128
channels; the floor is the bytes of the slots and of their scales. Chips of two cores (v5p): a
kernel's grid is shared by both; XLA's cycles are those of one core.
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
from kernels.attention.api import attention
from kernels.decode_attention.api import decode_attention

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/attention_tpu.json", "result")

HEADS, DIM, BLOCK = 8, 128, 512
ROWS, SLOTS, PAGE = 8, 4096, 128
# Products of [block, dim] matrices for a block of scores: forward 2, backward 3 and 4.
FORWARD, BACKWARD = 2, 7


def bound(chip, cycles: float, hbm_bytes: float) -> dict:
  compute = cycles / HERTZ[chip]
  memory = hbm_bytes / CHIPS[chip].bytes_per_second
  return {
    "cycles": cycles,
    "hbm_bytes": hbm_bytes,
    "bound_us": max(compute, memory) * 1e6,
    "limit": "memory" if memory > compute else "schedule",
  }


def training(chip: str, seq: int, backward: bool) -> dict:
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  qkv, ids = array(jnp.bfloat16, 1, HEADS, seq, DIM), array(jnp.int32, 1, seq)

  def program(implementation):
    def attend(q, k, v, ids):
      return attention(q, k, v, segment_ids=ids, implementation=implementation)

    loss = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32))
    return jax.grad(loss, (0, 1, 2)) if backward else attend

  blocks = seq // BLOCK
  products = (FORWARD + BACKWARD if backward else FORWARD) * blocks * (blocks + 1) / 2
  flops = HEADS * products * 2 * BLOCK * BLOCK * DIM
  result = {
    "chip": chip,
    "case": f"{'gradients' if backward else 'forward'}, {seq} tokens",
    "floor_us": flops / CHIPS[chip].flops_per_second * 1e6,
  }
  shapes = (qkv, qkv, qkv, ids)
  # Of the two branches of a step's loop, the one without the mask is taken for so many blocks, on
  # average, and the other one once, on the diagonal.
  unmasked = (blocks - 1) / 2
  for name, regions in (("mosaic_tpu", [unmasked]), ("xla", [])):
    cycles, hbm_bytes = schedule(program(name), shapes, chip, regions)
    result[name] = bound(chip, sum(cycles.values()), hbm_bytes)
  return result


def decoding(chip: str, dtype, paged: bool, kv_heads: int) -> dict:
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  shape = (ROWS * SLOTS // PAGE, kv_heads, PAGE) if paged else (ROWS, kv_heads, SLOTS)
  quantized = jnp.issubdtype(dtype, jnp.integer)
  options = {}
  if paged:
    options["page_table"] = array(jnp.int32, ROWS, SLOTS // PAGE)
  if quantized:
    options |= {name: array(jnp.float32, *shape) for name in ("key_scales", "value_scales")}
  names = tuple(options)
  kv = array(dtype, *shape, DIM)
  shapes = (array(jnp.bfloat16, ROWS, 32, DIM), kv, kv, array(jnp.int32, ROWS), *options.values())

  def program(implementation):
    return lambda q, k, v, lengths, *rest: decode_attention(
      q, k, v, lengths, implementation=implementation, **dict(zip(names, rest))
    )

  bits = {jnp.bfloat16: 16, jnp.int8: 8, jnp.int4: 4}[dtype]
  slots = 2 * ROWS * SLOTS * kv_heads
  floor = slots * (DIM * bits / 8 + (4 if quantized else 0))
  result = {
    "chip": chip,
    "case": f"{jnp.dtype(dtype).name}, {'pages' if paged else 'rows'}, {kv_heads} kv heads",
    "floor_us": floor / CHIPS[chip].bytes_per_second * 1e6,
  }
  for name in ("mosaic_tpu", "xla"):
    cycles, hbm_bytes = schedule(program(name), shapes, chip)
    if name == "mosaic_tpu" and paged:
      # The text has the whole pool as an operand for every page of a step.
      hbm_bytes = floor
    result[name] = bound(chip, sum(cycles.values()), hbm_bytes)
  return result


def main(_) -> None:
  cli.prepare_jax(compile_only=True)
  results = []
  for chip in SLICES:
    results += [training(chip, 4096, False), training(chip, 4096, True)]
    results += [
      decoding(chip, jnp.bfloat16, False, 8),
      decoding(chip, jnp.bfloat16, False, 32),
      decoding(chip, jnp.bfloat16, True, 8),
      decoding(chip, jnp.int8, False, 8),
      decoding(chip, jnp.int8, True, 8),
      decoding(chip, jnp.int4, False, 8),
    ]
  table = Table("chip", "case", "floor us", "kernel us", "of floor", "limit", "XLA / kernel")
  for r in results:
    kernel = r["mosaic_tpu"]
    table.add_row(
      r["chip"],
      r["case"],
      f"{r['floor_us']:.1f}",
      f"{kernel['bound_us']:.1f}",
      f"{kernel['bound_us'] / r['floor_us']:.2f}",
      kernel["limit"],
      f"{r['xla']['bound_us'] / kernel['bound_us']:.2f}",
    )
  Console(width=120).print(table)
  text = json.dumps({"environment": environment(), "results": results}, indent=1)
  pathlib.Path(_OUT.value).write_text(text + "\n")


if __name__ == "__main__":
  cli.run_app(main)
