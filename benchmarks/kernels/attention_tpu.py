"""Attention on TPU: the kernels, XLA, JAX's own kernels and tokamax's, counted and not timed.

  .venv/bin/python -m benchmarks.kernels.attention_tpu
  .venv/bin/python -m benchmarks.kernels.attention_tpu --only=kernels
  .venv/bin/python -m benchmarks.kernels.attention_tpu --render

No TPU is needed. A program takes at least the larger of its scheduled cycles over the clock and of
its HBM bytes over the bandwidth. Training: causal self-attention of 8 heads of 128, one row of 4096
tokens, bfloat16; the floor is the products of the blocks of 512 x 512 that causality leaves, at the
matrix units' peak. "packed" is four prompts of 1024 in that row, its floor four times the bound of
one prompt. Decoding: 8 rows over caches of 4096 slots of 128 channels; the floor is the bytes of
the slots and of their scales. Chips of two cores (v5p): a kernel's grid is shared by both where it says
that it may be; XLA's cycles are those of one core, and so are those of the peers' backward kernels.

What a kernel does under a condition is counted as often as its grid makes it true. Ours loops over
the blocks of keys of a block of queries: `visits` plays this loop on the blocks that `masks` finds.
For the public kernels see `attention_peers`.
"""

import pathlib

from benchmarks.kernels.tpu_schedule import SLICES, bound, schedule  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.kernels import attention_peers, results
from benchmarks.kernels.attention_peers import DIM, HEADS, cores, gradients
from common import cli
from common.compilation.topology import CHIPS
from kernels.attention import masks
from kernels.attention.api import attention
from kernels.decode_attention.api import decode_attention

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/attention_tpu.json", "result")
PARTS = (results.KERNELS, "jax", "tokamax")
_ONLY = flags.DEFINE_multi_enum("only", PARTS, PARTS, "run these, keep the others' results")
_RENDER = flags.DEFINE_bool("render", False, "only print the tables of the results that there are")

BLOCK, SEQ, PROMPT = 512, 4096, 1024
ROWS, SLOTS, PAGE = 8, 4096, 128
TRAINING = [  # Prompts, whether their ids are arguments, and whether the gradients are counted.
  *(((SEQ,), segments, backward) for backward in (False, True) for segments in (False, True)),
  ((PROMPT,), True, False),
  ((PROMPT,) * (SEQ // PROMPT), True, False),
]
DECODING = [  # Type of the cache, whether it is in pages, and heads of keys.
  (jnp.bfloat16, False, 8),
  (jnp.bfloat16, False, 32),
  (jnp.bfloat16, True, 8),
  (jnp.int8, False, 8),
  (jnp.int8, True, 8),
  (jnp.int4, False, 8),
]
# Products of [block, dim] matrices for a block of scores.
FORWARD, BACKWARD = 2, 5


def training_name(prompts: tuple[int, ...], segments: bool, backward: bool) -> str:
  name = f"{'gradients' if backward else 'forward'}, {sum(prompts)} tokens"
  return name + (f", {len(prompts)} packed" if len(prompts) > 1 else ", segment ids" * segments)


def training(chip: str, prompts: tuple[int, ...], segments: bool, backward: bool) -> dict:
  """Attention over one row of these prompts, whose ids are arguments if there are `segments`."""
  seq = sum(prompts)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  qkv, ids = array(jnp.bfloat16, 1, HEADS, seq, DIM), array(jnp.int32, 1, seq)

  def program(implementation):
    def attend(q, k, v, *tokens):
      names = dict(zip(("segment_ids", "positions"), tokens))
      return attention(q, k, v, implementation=implementation, **names)

    return gradients(attend) if backward else attend

  blocks = [n // BLOCK for n in prompts]
  products = (FORWARD + BACKWARD if backward else FORWARD) * sum(n * (n + 1) / 2 for n in blocks)
  flops = HEADS * products * 2 * BLOCK * BLOCK * DIM
  result = {"floor_us": flops / CHIPS[chip].flops_per_second * 1e6}
  shapes = (qkv, qkv, qkv) + (ids,) * (len(prompts) > 1 or segments) + (ids,) * (len(prompts) > 1)
  regions, loops = visits(chip, prompts)
  for name in ("mosaic_tpu", "xla"):
    cycles, hbm_bytes = schedule(program(name), shapes, chip, regions, loops=loops)
    result[name] = bound(chip, sum(cycles.values()), hbm_bytes)
  return result


def visits(chip: str, prompts: tuple[int, ...]) -> tuple[dict, dict]:
  """How often one core runs our kernels' regions, and the trips of their loops, on average.

  Forward one loop takes two whole blocks of keys at a time; one that is left over comes with a masked
  block or alone, and another loop takes the masked ones that remain. Backward both loops take one
  block at a time, and the sums of a head's keys start with its first block of queries and end with
  its last. See `tpu_blocks.visit`.
  """
  tokens = masks.Tokens(
    jnp.concatenate([jnp.arange(n) for n in prompts])[None],
    jnp.concatenate([jnp.full(n, i + 1) for i, n in enumerate(prompts)])[None],
  )
  meet = np.asarray(masks.blocks_that_meet(tokens, tokens, masks.Rule(), BLOCK, BLOCK))[0]
  spans = masks.block_spans(tokens, BLOCK)
  column = masks.Span(*(x[0, :, None] for x in spans))
  whole = np.asarray(masks.all_may_attend(column, masks.Span(*spans), masks.Rule()))
  wholes, every = (whole & meet).sum(1), meet.sum(1)
  left = wholes % 2
  together = left * (every > wholes)
  heads = HEADS // cores(chip)
  forward = [heads * int(n.sum()) for n in (together, left - together)]
  masked = every - wholes
  return (
    {"forward": forward, "backward": [heads, heads]},
    {
      "forward": [float(n.mean()) for n in (wholes // 2, masked - together)],
      "backward": [float(n.mean()) for n in (wholes, masked)],
    },
  )


def decoding_name(dtype, paged: bool, kv_heads: int) -> str:
  return f"{jnp.dtype(dtype).name}, {'pages' if paged else 'rows'}, {kv_heads} kv heads"


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
  result = {"floor_us": floor / CHIPS[chip].bytes_per_second * 1e6}
  for name in ("mosaic_tpu", "xla"):
    # A core begins to copy once; the rest of a step is done in all of them.
    regions = {"pages": [1]} if name == "mosaic_tpu" else {}
    cycles, hbm_bytes = schedule(program(name), shapes, chip, regions)
    if name == "mosaic_tpu" and paged:
      hbm_bytes = floor  # The program does not tell what of the pool the kernel copies.
    result[name] = bound(chip, sum(cycles.values()), hbm_bytes)
  return result


def print_table(found) -> None:
  heads = ["chip", "case", "floor, us", "kernel, us", "kernel / floor", "limit", "XLA / kernel",
           "splash / kernel", "flash / kernel", "tokamax / kernel"]  # fmt: skip
  rows = []
  for r in (r for r in found["results"] if "mosaic_tpu" in r):
    kernel = r["mosaic_tpu"]
    rows.append([
      r["chip"],
      r["case"],
      f"{r['floor_us']:.1f}",
      f"{kernel['bound_us']:.1f}",
      f"{kernel['bound_us'] / r['floor_us']:.2f}",
      kernel["limit"],
      *(results.over(r, name, "mosaic_tpu") for name in ("xla", "splash", "flash", "tokamax")),
    ])  # fmt: skip
  results.print_table(heads, rows)


def main(_) -> None:
  cli.prepare_jax(compile_only=True)
  path = pathlib.Path(_OUT.value)
  parts = () if _RENDER.value else results.runnable(_ONLY.value)
  found = results.load(path, needed=results.KERNELS not in parts)
  results.say_where(found, parts)
  names = [training_name(*case) for case in TRAINING] + [decoding_name(*case) for case in DECODING]
  wanted = [{"chip": chip, "case": name} for chip in SLICES for name in names]
  found["results"] = results.cases(found.get("results", []), wanted)
  by_name = {(result["chip"], result["case"]): result for result in found["results"]}
  for chip in SLICES if parts else ():
    for prompts, segments, backward in TRAINING:
      result = by_name[chip, training_name(prompts, segments, backward)]
      if results.KERNELS in parts:
        result |= training(chip, prompts, segments, backward)
        if len(prompts) > 1:
          one = by_name[chip, training_name(prompts[:1], segments, backward)]
          result["floor_us"] = len(prompts) * one["mosaic_tpu"]["bound_us"]
      row = chip, prompts[0], segments, backward
      if "jax" in parts and len(prompts) == 1:
        result |= attention_peers.jax_peers(*row)
      if "tokamax" in parts and len(prompts) == 1:
        result["tokamax"] = attention_peers.best_tokamax(*row)
      results.save(found, path)
    for case in DECODING if results.KERNELS in parts else ():
      by_name[chip, decoding_name(*case)].update(decoding(chip, *case))
      results.save(found, path)
  print_table(found)


if __name__ == "__main__":
  cli.run_app(main)
