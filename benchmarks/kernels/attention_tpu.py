"""Attention on TPU: the kernels, XLA and JAX's own kernels, counted and not timed.

  .venv/bin/python -m benchmarks.kernels.attention_tpu

No TPU is needed. A program takes at least the larger of its scheduled cycles over the clock and of
its HBM bytes over the bandwidth. Training: causal self-attention of 8 heads of 128, one row of 4096
tokens, bfloat16; the floor is the products of the blocks of 512 x 512 that causality leaves, at the
matrix units' peak. "packed" is four prompts of 1024 in that row, its floor four times the bound of
one prompt. Decoding: 8 rows over caches of 4096 slots of 128 channels; the floor is the bytes of
the slots and of their scales. Chips of two cores (v5p): a kernel's grid is shared by both where it says
that it may be; XLA's cycles are those of one core, and so are those of splash's backward kernels.

What a kernel does under a condition is counted as often as its grid makes it true. Ours loops over
the blocks of keys of a block of queries: `visits` plays this loop on the blocks that `masks` finds.
Splash goes over all pairs of blocks, `peer_regions`: it starts and ends a sum once for each block
of queries (of keys, for their gradients) and works on the pairs that causality leaves. By hand, of
its forward kernel on v5e with blocks of 512, in bundles: 64 x (197 + 423) + 288 x 1187 + 512 x 65
of the rest of a step + 514 x 35 around it + 21 before and behind make 432827, which is the count.
Splash takes the best of `PEER_BLOCKS`, and of its two backward passes. JAX's older flash attention
goes over the same pairs and takes the best of the same blocks, forward.
"""

import json
import pathlib

from benchmarks.kernels.tpu_schedule import HERTZ, SLICES, schedule  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from rich.console import Console
from rich.table import Table

from common import cli
from common.compilation.topology import CHIPS
from common.reporting.report import environment
from kernels.attention import masks
from kernels.attention.api import attention
from kernels.decode_attention.api import decode_attention

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/attention_tpu.json", "result")

HEADS, DIM, BLOCK = 8, 128, 512
SEQ, PROMPT = 4096, 1024
# Queries, keys, and keys that are worked on at once.
PEER_BLOCKS = [(512, 512, 512), (512, 1024, 512), (1024, 1024, 512)]
# Less than any region of splash's kernels.
SMALL_REGION = 24
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


def training(chip: str, prompts: tuple[int, ...], segments: bool, backward: bool = False) -> dict:
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
  name = f"{'gradients' if backward else 'forward'}, {seq} tokens"
  name += f", {len(prompts)} packed" if len(prompts) > 1 else ", segment ids" * segments
  result = {
    "chip": chip,
    "case": name,
    "floor_us": flops / CHIPS[chip].flops_per_second * 1e6,
  }
  shapes = (qkv, qkv, qkv) + (ids,) * (len(prompts) > 1 or segments) + (ids,) * (len(prompts) > 1)
  regions, loops = visits(prompts)
  for name in ("mosaic_tpu", "xla"):
    cycles, hbm_bytes = schedule(program(name), shapes, chip, regions, loops=loops)
    result[name] = bound(chip, sum(cycles.values()), hbm_bytes)
  if len(prompts) == 1:
    result["splash"] = best_splash(chip, seq, segments, backward)
    if not backward:
      result["flash"] = best_flash(chip, seq, segments)
  return result


def gradients(attend):
  loss = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32))
  return jax.grad(loss, (0, 1, 2))


def visits(prompts: tuple[int, ...]) -> tuple[dict, dict]:
  """How often our kernels' regions run, and the trips of their loops, on average.

  Forward a trip takes two whole blocks of keys, or a loop of its own takes the one or two blocks
  there are; backward one loop takes one block at a time. See `tpu_blocks.visit`.
  """
  tokens = masks.Tokens(
    jnp.concatenate([jnp.arange(n) for n in prompts])[None],
    jnp.concatenate([jnp.full(n, i + 1) for i, n in enumerate(prompts)])[None],
  )
  meet = np.asarray(masks.blocks_that_meet(tokens, tokens, masks.Rule(), BLOCK, BLOCK))[0]
  spans = masks.block_spans(tokens, BLOCK)
  column = masks.Span(*(x[0, :, None] for x in spans))
  whole = np.asarray(masks.all_may_attend(column, masks.Span(*spans), masks.Rule()))
  trips = pairs = singles = 0
  for i, row in enumerate(meet):
    at = np.flatnonzero(row)
    for j in at[::2]:
      both = j + 1 in at and whole[i, j] and whole[i, j + 1]
      trips, pairs = trips + 1, pairs + both
      singles += 0 if both else 1 + (j + 1 in at)
  masked, every = (meet & ~whole).sum(), meet.sum()
  alone = singles - masked
  one_by_one = [(every - masked) / len(meet), masked / len(meet)]
  return (
    {"forward": [pairs / len(meet), alone / trips, masked / trips], "backward": one_by_one},
    {"forward": [trips / len(meet), singles / trips], "backward": [every / len(meet)]},
  )


def splash_program(blocks: tuple[int, int, int], seq: int, backward: bool, fused: bool):
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((seq, seq))] * HEADS)
  of_queries, of_keys, at_once = blocks
  sizes = dict(block_q=of_queries, block_kv=of_keys, block_kv_compute=at_once)
  if backward:
    sizes |= dict(
      block_q_dkv=of_queries, block_kv_dkv=of_keys, block_kv_dkv_compute=at_once,
      use_fused_bwd_kernel=fused
    )  # fmt: skip
    if not fused:
      sizes |= dict(block_q_dq=of_queries, block_kv_dq=of_keys)
  kernel = splash.make_splash_mha(
    mask, block_sizes=splash.BlockSizes(**sizes), head_shards=1, q_seq_shards=1
  )

  def attend(q, k, v, *ids):
    ids = [splash.SegmentIds(x[0], x[0]) for x in ids]
    return kernel(q[0] * DIM**-0.5, k[0], v[0], *ids)

  return gradients(attend) if backward else attend


def peer_regions(chip: str, blocks: tuple[int, int, int], seq: int) -> dict[str, list[int]]:
  of_queries, of_keys, _ = blocks
  queries, keys = seq // of_queries, seq // of_keys
  pairs = sum((i + 1) * of_queries > j * of_keys for i in range(queries) for j in range(keys))
  by_queries, by_keys = (
    [HEADS * n, HEADS * pairs, HEADS * n] for n in (queries, keys)
  )  # fmt: skip
  cores = 2 if CHIPS[chip].two_cores else 1
  forward = [n // cores for n in by_queries]
  # A single block of keys is worked on, and its sum started and ended, in every step.
  alone = forward[:1] if keys == 1 else forward
  return {"fwd": forward, "flash": alone, "dkv": by_keys, "dq": by_queries}


def best_splash(chip: str, seq: int, segments: bool, backward: bool) -> dict:
  found = []
  for blocks in PEER_BLOCKS:
    for fused in (False, True) if backward else (False,):
      program = splash_program(blocks, seq, backward, fused)
      if one := peer(chip, program, blocks, seq, segments):
        found.append(one | {"blocks": blocks, "fused": fused})
  return min(found, key=lambda one: one["bound_us"])


def best_flash(chip: str, seq: int, segments: bool) -> dict:
  found = []
  for blocks in PEER_BLOCKS:
    of_queries, of_keys, at_once = blocks
    sizes = flash.BlockSizes(block_q=of_queries, block_k_major=of_keys, block_k=at_once, block_b=1)

    def attend(q, k, v, *ids, sizes=sizes):
      ids = [flash.SegmentIds(x, x) for x in ids]
      options = dict(causal=True, sm_scale=DIM**-0.5, block_sizes=sizes)
      return flash.flash_attention(q, k, v, None, *ids, **options)

    if one := peer(chip, attend, blocks, seq, segments):
      found.append(one | {"blocks": blocks})
  return min(found, key=lambda one: one["bound_us"])


def peer(chip: str, program, blocks: tuple[int, int, int], seq: int, segments: bool) -> dict | None:
  """The bound of one of JAX's kernels; None where the blocks are too large for it or the chip."""
  if max(blocks) > seq:
    return None
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  qkv = array(jnp.bfloat16, 1, HEADS, seq, DIM)
  shapes = (qkv, qkv, qkv) + (array(jnp.int32, 1, seq),) * segments
  regions = peer_regions(chip, blocks, seq)
  try:
    cycles, hbm_bytes = schedule(program, shapes, chip, regions, SMALL_REGION)
  except jax.errors.JaxRuntimeError:  # Too large for the chip's memory.
    return None
  return bound(chip, sum(cycles.values()), hbm_bytes)


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
    whole = [
      training(chip, (SEQ,), segments, backward)
      for backward in (False, True)
      for segments in (False, True)
    ]
    one = training(chip, (PROMPT,), True)
    packed = training(chip, (PROMPT,) * (SEQ // PROMPT), True)
    packed["floor_us"] = SEQ // PROMPT * one["mosaic_tpu"]["bound_us"]
    results += [*whole, one, packed]
    results += [
      decoding(chip, jnp.bfloat16, False, 8),
      decoding(chip, jnp.bfloat16, False, 32),
      decoding(chip, jnp.bfloat16, True, 8),
      decoding(chip, jnp.int8, False, 8),
      decoding(chip, jnp.int8, True, 8),
      decoding(chip, jnp.int4, False, 8),
    ]
  table = Table("chip", "case", "floor us", "kernel us", "of floor", "limit", "XLA / kernel",
                "splash / kernel", "flash / kernel")  # fmt: skip
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
      *(
        f"{r[name]['bound_us'] / kernel['bound_us']:.2f}" if name in r else ""
        for name in ("splash", "flash")
      ),
    )
  Console(width=120).print(table)
  text = json.dumps({"environment": environment(), "results": results}, indent=1)
  pathlib.Path(_OUT.value).write_text(text + "\n")


if __name__ == "__main__":
  cli.run_app(main)
