"""Attention of public kernels on TPU, counted: JAX's splash and flash attention, tokamax's splash.

What a kernel does under a condition is counted as often as its grid makes it true. Splash goes over
all pairs of blocks, `pair_regions`: it starts and ends a sum once for each block of queries (of keys,
for their gradients) and works on the pairs that causality leaves. By hand, of its forward kernel on
v5e with blocks of 512, in bundles: 64 x (197 + 423) + 288 x 1187 + 512 x 65 of the rest of a step +
514 x 35 around it + 21 before and behind make 432827, which is the count. JAX's older flash attention
goes over the same pairs.

Tokamax's forward kernel goes over the pairs that causality leaves and no others, and has a region of
its own for pairs that need no mask. By hand, on v6e with blocks of 1024: 32 x (197 + 149) + 48 x 2825
without a mask + 32 x 2978 with one + 80 x 68 of the rest of a step + 82 x 47 around it + 63 before and
behind make 251325. Its backward kernel goes over all pairs: with the same blocks 32 x (133 + 103) +
48 x 5436 + 32 x 5579 + 128 x 190 + 130 x 37 + 28 make 476166. Its `dot_product_attention` takes no
segment ids and transposes its arguments, so that the kernel beneath is called.

Each takes the best of its blocks, splash of its two backward passes too, tokamax's of two schedulers
and, beside the best forward kernel, of the blocks of the backward one.
"""

import functools
import itertools

from benchmarks.kernels.tpu_schedule import bound, schedule  # isort: skip

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from common.compilation.topology import CHIPS

HEADS, DIM = 8, 128
# Queries, keys, and keys that are worked on at once.
BLOCKS = [(512, 512, 512), (512, 1024, 512), (1024, 1024, 512)]
# Tokamax tunes itself over blocks of 1024 and more; of 2048 queries take longer on v5e and v6e.
TOKAMAX_BLOCKS = [(512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024)]
# Less than any region of these kernels.
SMALL_REGION = 24


def jax_peers(chip: str, seq: int, segments: bool, backward: bool) -> dict[str, dict]:
  """The best bounds of JAX's kernels for one row of causal self-attention, by their names.

  Args:
    chip: "v5e", "v5p" or "v6e".
    seq: tokens.
    segments: their ids are an argument.
    backward: the gradients of all three arguments; splash attention only.
  """
  found = {"splash": best_splash(chip, seq, segments, backward)}
  return found if backward else found | {"flash": best_flash(chip, seq, segments)}


def gradients(attend):
  """Of the sum of what `attend` returns, in q, k and v."""
  loss = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32))
  return jax.grad(loss, (0, 1, 2))


def best_splash(chip: str, seq: int, segments: bool, backward: bool) -> dict:
  found = []
  for blocks in BLOCKS:
    for fused in (False, True) if backward else (False,):
      program = splash_program(blocks, seq, backward, fused)
      if one := count(chip, program, blocks, seq, segments, pair_regions(chip, blocks, seq), {}):
        found.append(one | {"blocks": blocks, "fused": fused})
  return min(found, key=lambda one: one["bound_us"])


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


def best_flash(chip: str, seq: int, segments: bool) -> dict:
  found = []
  for blocks in BLOCKS:
    of_queries, of_keys, at_once = blocks
    sizes = flash.BlockSizes(block_q=of_queries, block_k_major=of_keys, block_k=at_once, block_b=1)

    def attend(q, k, v, *ids, sizes=sizes):
      ids = [flash.SegmentIds(x, x) for x in ids]
      options = dict(causal=True, sm_scale=DIM**-0.5, block_sizes=sizes)
      return flash.flash_attention(q, k, v, None, *ids, **options)

    if one := count(chip, attend, blocks, seq, segments, pair_regions(chip, blocks, seq), {}):
      found.append(one | {"blocks": blocks})
  return min(found, key=lambda one: one["bound_us"])


@functools.cache
def best_tokamax(chip: str, seq: int, segments: bool, backward: bool) -> dict:
  """Of the gradients the blocks of the backward kernel are chosen, beside the best forward's."""
  if backward:
    forward = best_tokamax(chip, seq, segments, False)
    tried = [(forward["blocks"], forward["experimental"], blocks) for blocks in TOKAMAX_BLOCKS]
  else:
    tried = itertools.product(TOKAMAX_BLOCKS, (False, True), [None])
  found = []
  for blocks, experimental, of_gradients in tried:
    program = tokamax_program(seq, blocks, experimental, of_gradients)
    regions, grid = tokamax_regions(chip, seq, blocks, of_gradients)
    if one := count(chip, program, of_gradients or blocks, seq, segments, regions, grid):
      settings = {"blocks": blocks, "experimental": experimental, "of_gradients": of_gradients}
      found.append(one | settings)
  return min(found, key=lambda one: one["bound_us"])


def tokamax_program(seq: int, blocks, experimental: bool, of_gradients):
  """Forward, or the gradients if there are blocks of theirs."""
  from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernels
  from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

  sizes = dict(zip(("block_q", "block_kv", "block_kv_compute"), blocks))
  if of_gradients:
    names = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes |= dict(zip(names, of_gradients))
  config = kernels.SplashConfig(**sizes, use_experimental_scheduler=experimental)
  mask = masks.CausalMask((seq, seq), shard_count=1)
  kernel = kernels.make_splash_mha(mask, config=config, q_seq_shards=1)

  def attend(q, k, v, *ids):
    ids = [kernels.SegmentIds(x[0], x[0]) for x in ids]
    return kernel(q[0] * DIM**-0.5, k[0], v[0], *ids)

  return gradients(attend) if of_gradients else attend


def pair_regions(chip: str, blocks: tuple[int, int, int], seq: int) -> dict[str, list[int]]:
  """How often one core starts a sum, works on a pair and ends a sum, by what the names contain."""
  of_queries, of_keys, _ = blocks
  queries, keys = seq // of_queries, seq // of_keys
  pairs, _ = causal_pairs(blocks, seq)
  by_queries, by_keys = (
    [HEADS * n, HEADS * pairs, HEADS * n] for n in (queries, keys)
  )  # fmt: skip
  forward = [n // cores(chip) for n in by_queries]
  # A single block of keys is worked on, and its sum started and ended, in every step.
  alone = forward[:1] if keys == 1 else forward
  return {"fwd": forward, "flash": alone, "dkv": by_keys, "dq": by_queries}


def tokamax_regions(chip: str, seq: int, blocks, of_gradients) -> tuple[dict, dict]:
  """How often one core starts a sum, works without and with a mask and ends it; the steps forward."""

  def each(blocks, sums):
    pairs, whole = causal_pairs(blocks, seq)
    return [HEADS * n for n in (sums, whole, pairs - whole, sums)]

  share = lambda n: n // cores(chip)
  regions = {"fwd": [share(n) for n in each(blocks, seq // blocks[0])]}
  if of_gradients:
    regions["dkv"] = each(of_gradients, seq // of_gradients[1])
  return regions, {"fwd": share(HEADS * causal_pairs(blocks, seq)[0])}


def causal_pairs(blocks: tuple[int, int, int], seq: int) -> tuple[int, int]:
  """Pairs of a block of queries and one of keys: those that meet, and those without a mask."""
  of_queries, of_keys, _ = blocks
  pairs = [(i, j) for i in range(0, seq, of_queries) for j in range(0, seq, of_keys)]
  meet = sum(j < i + of_queries for i, j in pairs)
  return meet, sum(j + of_keys <= i + 1 for i, j in pairs)


def cores(chip: str) -> int:
  """Those that share the heads of a kernel which lets them."""
  return 2 if CHIPS[chip].two_cores else 1


def count(chip, program, blocks, seq, segments, regions, grids) -> dict | None:
  """The bound of a program; None where the blocks are too large for it or the chip."""
  if max(blocks) > seq:
    return None
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  qkv = array(jnp.bfloat16, 1, HEADS, seq, DIM)
  shapes = (qkv, qkv, qkv) + (array(jnp.int32, 1, seq),) * segments
  try:
    cycles, hbm_bytes = schedule(program, shapes, chip, regions, SMALL_REGION, grids=grids)
  except jax.errors.JaxRuntimeError:  # Too large for the chip's memory.
    return None
  return bound(chip, sum(cycles.values()), hbm_bytes)
