"""Decode attention for Hopper GPUs: of each row only the blocks of slots that it has are read.

The step is bound by the bytes of the cache if all multiprocessors read it: the blocks of a row are
split evenly among as many parts as it takes (flash-decoding, Dao et al. 2023), each of which brings
keys and values into shared memory some blocks ahead, and XLA joins the parts by their log-sum-exp.
The query heads that share a kv head are rows of one tile of the tensor cores, whose other rows are
no one's: nothing is bound by them. Codes of an int8 or int4 cache are widened on the chip; a key's
scale is applied to its score and a value's to its weight, not to their channels.
"""

import math

import jax
import jax.numpy as jnp
from jax import dtypes, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.quantized_matmul.gpu_operands import register_layout

Array = jax.Array

_ROWS = 64  # Of a tile of the tensor cores.
_BLOCK = 64  # Slots that are scored at once.
_TILE_ROWS = 8  # Of a tile in shared memory, which TMA copies as a whole.
_MAX_CHANNELS = 128  # Sums and products of more do not fit in a warpgroup's registers.
_VECTOR = 8  # Codes that a thread widens at once.
_PARTS = 2 * 132  # At least, if there are enough blocks: two for each multiprocessor of an H100.
_MIN_BLOCKS = 4  # Of a part of the longest row, so that reading ahead pays.
_MAX_STAGES = 8  # Blocks in shared memory.
_SHARED_BYTES = 110 * 2**10  # Of each of two parts on a multiprocessor.
_LOG2_E = math.log2(math.e)
# A score that is not allowed: finite, so that differences of two are 0 and not NaN.
_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)

# Where the numbers of the rows and of the columns of a product of the tensor cores are.
_OF_ROWS, _OF_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def unsupported(query: Array, keys: Array, values: Array, page_table: Array | None) -> str | None:
  """Why these arguments of `api.decode_attention` have no kernel here, or None."""
  if query.dtype != jnp.bfloat16:
    return f"query of {query.dtype}, expected bfloat16"
  group = query.shape[1] // keys.shape[1]
  if group > _ROWS:
    return f"{group} query heads of each kv head, expected at most {_ROWS}"
  for name, x in (("keys", keys), ("values", values)):
    channels = x.shape[3]
    if x.dtype == jnp.float32:
      return f"{name} of float32, expected bfloat16, int8 or int4"
    if _is_codes(x) and channels not in (32, 64, 128):
      return f"{name} of {x.dtype} with {channels} channels, expected 32, 64 or 128"
    if channels % 16 or channels > _MAX_CHANNELS:
      return f"{name} with {channels} channels, expected a multiple of 16, at most {_MAX_CHANNELS}"
  size = keys.shape[2]
  if page_table is None:
    if size % _TILE_ROWS and size > _BLOCK:
      return f"a cache of {size} slots, expected a multiple of {_TILE_ROWS}"
    return None
  # Codes have scales, of which TMA writes 128 bytes at a time.
  parts = (32,) if _is_codes(keys) or _is_codes(values) else (_TILE_ROWS, 16, 32)
  if size % _BLOCK and size not in parts:
    expected = ", ".join(map(str, parts))
    return f"pages of {size} slots, expected {expected} or a multiple of {_BLOCK}"
  return None


def decode_attention(
  query: Array,
  keys: Array,
  values: Array,
  starts: Array,
  lengths: Array,
  *,
  page_table: Array | None,
  key_scales: Array | None,
  value_scales: Array | None,
  alibi_slopes: Array | None,
  scale: float,
) -> tuple[Array, Array]:
  """As `api.decode_attention`, with the sliding window within `starts`; also the log-sum-exp."""
  batch, heads, key_dim = query.shape
  _, kv_heads, size, value_dim = values.shape
  group = heads // kv_heads
  rows = -(-group // _TILE_ROWS) * _TILE_ROWS
  arrays = {"keys": keys, "values": values}
  for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
    if scales is not None:
      arrays[name] = scales.astype(jnp.float32)
  if page_table is None:
    slots = max(size, _BLOCK)
    if size < _BLOCK:
      pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, _BLOCK - size)] + [(0, 0)] * (x.ndim - 3))
      arrays = {name: pad(x) for name, x in arrays.items()}
  else:
    slots = page_table.shape[1] * size
  parts = max(1, min(-(-_PARTS // (batch * kv_heads)), -(-slots // _BLOCK) // _MIN_BLOCKS))
  query_rows = jnp.pad(
    query.reshape(batch, kv_heads, group, key_dim), ((0, 0), (0, 0), (0, rows - group), (0, 0))
  )
  operands = {"query": query_rows, "starts": starts, "lengths": lengths}
  if page_table is not None:
    operands["page_table"] = page_table
  if alibi_slopes is not None:
    slopes = jnp.pad(alibi_slopes.reshape(kv_heads, group), ((0, 0), (0, _ROWS - group)))
    operands["slopes"] = slopes.astype(jnp.float32)
  names = (*operands, *arrays)
  means, sums = plgpu.kernel(
    lambda *refs: _kernel(dict(zip(names, refs)), *refs[len(names) :], scale=scale),
    out_type=[
      jax.ShapeDtypeStruct((parts, batch, kv_heads, rows, value_dim), jnp.float32),
      jax.ShapeDtypeStruct((parts, batch, kv_heads, rows), jnp.float32),
    ],
    grid=(kv_heads, parts, batch),
    grid_names=("head", "part", "batch"),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
    ),
    kernel_name="decode_attention",
  )(*operands.values(), *arrays.values())
  means, sums = means[:, :, :, :group], sums[:, :, :, :group]
  log_sum_exp = jax.nn.logsumexp(sums, axis=0)
  # A row without slots has zeros in all its parts.
  share = jnp.exp(sums - jnp.where(jnp.isneginf(log_sum_exp), 0, log_sum_exp))
  out = jnp.sum(share[..., None] * means, axis=0).astype(query.dtype)
  return out.reshape(batch, heads, value_dim), log_sum_exp.reshape(batch, heads)


def _is_codes(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.integer)


def _tile(channels: int):
  """How a matrix of bfloat16 with rows of `channels` lies in shared memory for the tensor cores."""
  swizzle = next(n for n in (128, 64, 32) if 2 * channels % n == 0)  # Bytes of a row of a tile.
  return plgpu.TilingTransform((_TILE_ROWS, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def _kernel(refs: dict, out, log_sum_exp, *, scale: float) -> None:
  """One part of a row and kv head.

  Args:
    refs: query [batch, kv_heads, rows, key_dim], starts and lengths [batch], page_table, slopes
      [kv_heads, 64], and the cache: keys, values, key_scales, value_scales.
    out: [parts, batch, kv_heads, rows, value_dim].
    log_sum_exp: [parts, batch, kv_heads, rows].
    scale: of the scores.
  """
  head, part, batch = (lax.axis_index(name) for name in ("head", "part", "batch"))
  query, table, cache = refs["query"], refs.get("page_table"), _cache(refs)
  rows, size, value_dim = query.shape[2], cache["keys"].shape[2], out.shape[4]
  start, length = jnp.maximum(refs["starts"][batch], 0), refs["lengths"][batch]
  # The part's share of the blocks that have slots of the row.
  first = lax.div(start, _BLOCK)
  blocks = jnp.maximum(lax.div(length + _BLOCK - 1, _BLOCK) - first, 0)
  share = lax.div(blocks + out.shape[0] - 1, out.shape[0])
  first += part * share
  count = jnp.clip(blocks - part * share, 0, share)
  scratch, stages = _scratch(refs)

  def accumulate(q, weights, wide, slopes, buffers, arrived, q_arrived):
    def fetch(step):
      stage = lax.rem(step, stages)
      at_once = min(size, _BLOCK)
      for i in range(0, _BLOCK, at_once):
        row, slots = _place(first + step, i, size, table, batch, length)
        for name, x in cache.items():
          target = buffers[name].at[stage, pl.ds(i, at_once)]
          plgpu.copy_gmem_to_smem(x.at[row, head, slots], target, arrived.at[stage])

    def attend(step, carry):
      stage = lax.rem(step, stages)
      plgpu.barrier_wait(arrived.at[stage])
      block = {name: buffer.at[stage] for name, buffer in buffers.items()}
      begin = (first + step) * _BLOCK
      slots = plgpu.layout_cast(lax.iota(jnp.int32, _BLOCK), _OF_COLUMNS)
      slots += begin if table is not None else _within(begin, size)
      # What the cache's last block repeats of the one before is that one's.
      span = jnp.maximum(start, begin), length
      carry = _attend(carry, q, weights, block, wide, slots, span, slopes, scale)
      # The products have ended: another block can take this one's place.
      pl.when(step + stages < count)(lambda: fetch(step + stages))
      return carry

    lax.fori_loop(0, jnp.minimum(count, stages), lambda step, _: fetch(step), None)
    # Rows behind those of the query have what was there before, and are not stored.
    plgpu.copy_gmem_to_smem(query.at[batch, head], q.at[pl.ds(0, rows)], q_arrived)
    if slopes is not None:
      plgpu.copy_gmem_to_smem(refs["slopes"].at[head], slopes, q_arrived)
    plgpu.barrier_wait(q_arrived)
    of_rows = lambda value: plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), _OF_ROWS)
    sums = plgpu.layout_cast(jnp.zeros((_ROWS, value_dim), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, count, attend, (sums, of_rows(_FORBIDDEN), of_rows(0.0)))

  sums, largest, total = pl.run_scoped(accumulate, **scratch)
  some = largest > _FORBIDDEN / 2
  # A row that may attend to nothing gives zeros.
  of_mean = jnp.where(some, 1 / total, 0.0)
  of_row = jnp.where(some, largest * (1 / _LOG2_E) + jnp.log(total), -jnp.inf)

  def store(means, of_rows):
    means[...] = sums * lax.broadcast_in_dim(of_mean, sums.shape, [0])
    of_rows[...] = of_row
    plgpu.commit_smem()
    stored = pl.ds(0, rows)
    plgpu.copy_smem_to_gmem(means.at[stored], out.at[part, batch, head])
    plgpu.copy_smem_to_gmem(of_rows.at[stored], log_sum_exp.at[part, batch, head])
    plgpu.wait_smem_to_gmem(0)

  # Where the blocks were, which have all been used.
  pl.run_scoped(
    store, plgpu.SMEM((_ROWS, value_dim), jnp.float32), plgpu.SMEM((_ROWS,), jnp.float32)
  )


def _cache(refs: dict) -> dict:
  """Of the kernel's references those to what a slot has."""
  names = ("keys", "values", "key_scales", "value_scales")
  return {name: refs[name] for name in names if name in refs}


def _scratch(refs: dict) -> tuple[dict, int]:
  """What a part has in shared memory, by name, and how many blocks of slots are among it."""
  cache, key_dim, value_dim = _cache(refs), refs["query"].shape[3], refs["values"].shape[3]
  matrix = lambda rows, columns, tile: plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=tile)
  wide = {
    name: matrix(_BLOCK, cache[name].shape[3], _tile(cache[name].shape[3]))
    for name in ("keys", "values")
    if _is_codes(cache[name])
  }
  fixed = 2 * _ROWS * (key_dim + _BLOCK) + 2 * _BLOCK * sum(x.shape[1] for x in wide.values())
  of_slot = sum(math.prod(x.shape[3:]) * dtypes.itemsize_bits(x.dtype) for x in cache.values()) // 8
  stages = min((_SHARED_BYTES - fixed) // (_BLOCK * of_slot), _MAX_STAGES)
  buffers = {
    name: plgpu.SMEM(
      (stages, _BLOCK, *x.shape[3:]),
      x.dtype,
      transforms=_tile(x.shape[3]) if x.dtype == jnp.bfloat16 else (),
    )
    for name, x in cache.items()
  }
  copies = len(cache) * (_BLOCK // min(refs["keys"].shape[2], _BLOCK))
  scratch = {
    "q": matrix(_ROWS, key_dim, _tile(key_dim)),
    "weights": matrix(_ROWS, _BLOCK, _tile(value_dim)),
    "wide": wide,
    "slopes": plgpu.SMEM((_ROWS,), jnp.float32) if "slopes" in refs else None,
    "buffers": buffers,
    "arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    "q_arrived": plgpu.Barrier(num_arrivals=2 if "slopes" in refs else 1),
  }
  return scratch, stages


def _within(slot, size: int):
  """Where to begin a block of a cache, whose last block may begin within the one before."""
  return jnp.minimum(slot, size - _BLOCK)


def _place(block, i: int, size: int, table, batch, length):
  """Row of the cache, or page, and slots there of the copy of slots `i`, ... of a block."""
  at_once = min(size, _BLOCK)
  if table is None:
    return batch, pl.ds(_within(block * _BLOCK, size), at_once)
  # A page behind the row's last is not the row's, and perhaps not in the table.
  page = jnp.minimum(lax.div(block * _BLOCK + i, size), lax.div(length - 1, size))
  # Written so that it can be seen to be a multiple of a tile.
  first = lax.rem(block, size // _BLOCK) * _BLOCK if size > _BLOCK else 0
  return table[batch, page], pl.ds(first, at_once)


def _attend(carry, q, weights, block: dict, wide: dict, slots, span, slopes, scale: float):
  """The softmax so far (FlashAttention), with a block of slots.

  Args:
    carry: weighted sums of values [64, value_dim], largest scores [64] and sums of weights [64], of
      the rows of the query.
    q: reference, [64, key_dim]; weights: reference to memory for [64, 64], bfloat16.
    block: references to keys, values and their scales.
    wide: references to memory for keys and values that are codes.
    slots: int32 [64], of the block. span: the first slot that counts, and the row's length.
    slopes: None, or reference, [64].
    scale: of the scores.
  """
  sums, largest, total = carry
  k, v = (_widened(block[name], wide.get(name)) for name in ("keys", "values"))

  def product(a, b):
    def multiply(accumulator):
      plgpu.wgmma(accumulator, a, b)
      return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((_ROWS, b.shape[1]), jnp.float32))

  scores = product(q, k.T) * (scale * _LOG2_E)
  down = lambda x: lax.broadcast_in_dim(plgpu.layout_cast(x, _OF_ROWS), scores.shape, [0])
  across = lambda x: lax.broadcast_in_dim(plgpu.layout_cast(x, _OF_COLUMNS), scores.shape, [1])
  if "key_scales" in block:
    scores = scores * across(block["key_scales"][...])
  slots, (start, length) = across(slots), span
  if slopes is not None:
    distance = (slots - (length - 1)).astype(jnp.float32)
    scores = scores + down(slopes[...]) * _LOG2_E * distance
  scores = jnp.where((slots >= start) & (slots < length), scores, _FORBIDDEN)
  now = jnp.maximum(largest, scores.max(axis=1))
  # Where every slot so far is forbidden this is 1, and of no account: see `_kernel`.
  p = jnp.exp2(scores - down(now))
  correction = jnp.exp2(largest - now)
  total = total * correction + p.sum(axis=1)
  if "value_scales" in block:
    p = p * across(block["value_scales"][...])
  weights[...] = p.astype(weights.dtype)
  plgpu.commit_smem()
  sums = sums * lax.broadcast_in_dim(correction, sums.shape, [0]) + product(weights, v)
  return sums, now, total


def _widened(x, target):
  """Keys or values as bfloat16, codes (exactly) in `target`."""
  if target is None:
    return x
  codes = plgpu.layout_cast(x[...], register_layout(x.shape[1], _VECTOR))
  target[...] = codes.astype(target.dtype)
  plgpu.commit_smem()
  return target
