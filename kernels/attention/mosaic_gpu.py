"""FlashAttention (Dao 2023; Shah et al. 2024) for Hopper GPUs: the scores never leave the chip.

A block has two warpgroups with 64 queries each, and a third one that brings keys and values into shared
memory ahead of them. Scores are made and used 128 keys at a time; a row's softmax is corrected as
larger scores turn up. Blocks of queries and keys that do not meet, because of causality, the sliding
window or packed segments, are neither read nor computed: every block of queries has a range of key
blocks, known before the kernel starts. Where all queries may attend to all keys the mask is left out.

Gradients are those of the reference: it makes the scores again and keeps them, so that training takes
memory with the square of the tokens. `jax.experimental.pallas.ops.gpu.attention_mgpu` has a causal
forward kernel and no causal gradients; it knows no segments, window or ALiBi, and takes tokens in
multiples of its blocks.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import xla
from kernels.attention.masks import (
  Rule,
  Span,
  Tokens,
  all_may_attend,
  block_spans,
  blocks_that_meet,
  may_attend,
)

Array = jax.Array

_WARPGROUPS = 2  # That compute.
_ROWS = 64  # Queries of a warpgroup: a tile of the tensor cores.
_QUERY_BLOCK = _WARPGROUPS * _ROWS
_KEY_BLOCK = 128
_CHANNELS = 64  # A swizzled row of 128 bytes; heads are padded to a multiple.
_MAX_CHANNELS = 128  # Sums and products of more do not fit in a warpgroup's registers.
_STAGES = 2  # Blocks of keys and values in shared memory.
_MEMORY_REGISTERS = 40
_LOG2_E = math.log2(math.e)
# A score that is not allowed: finite, so that differences of two are 0 and not NaN.
_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)

# Where the numbers of the rows and of the columns of a product of the tensor cores are.
_OF_ROWS, _OF_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_cast = plgpu.layout_cast


def unsupported(query: Array, key: Array, value: Array, bias: Array | None) -> str | None:
  """Why these arguments of `api.attention` have no kernel here, or None."""
  for name, x in (("query", query), ("key", key), ("value", value)):
    if x.dtype != jnp.bfloat16:
      return f"{name} of {x.dtype}, expected bfloat16"
    if x.shape[-1] > _MAX_CHANNELS:
      return f"{name} with heads of {x.shape[-1]}, expected at most {_MAX_CHANNELS}"
  if bias is not None:
    return "a mask or a bias"
  return None


def attention(
  query: Array,
  key: Array,
  value: Array,
  queries: Tokens,
  keys: Tokens,
  rule: Rule,
  *,
  alibi_slopes: Array | None,
  bias: Array | None,
  scale: float,
) -> Array:
  """As `api.attention`, for arguments that `unsupported` has nothing against."""
  assert bias is None
  slopes = None if alibi_slopes is None else alibi_slopes.astype(jnp.float32)
  return _attention(query, key, value, queries, keys, slopes, rule, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(query, key, value, queries, keys, slopes, rule: Rule, scale: float) -> Array:
  batch, heads, seq, _ = query.shape
  value_dim = value.shape[3]
  channels = -(-max(query.shape[3], value_dim) // _CHANNELS) * _CHANNELS
  # Padding belongs to segment 0: no query sees it, and it sees no key.
  pad_queries = functools.partial(_pad, multiple=_QUERY_BLOCK)
  pad_keys = functools.partial(_pad, multiple=_KEY_BLOCK)
  wide = functools.partial(_pad, multiple=channels, axis=3)
  whole = lambda tokens: Tokens(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in tokens))
  queries = Tokens(*(pad_queries(x, axis=1) for x in whole(queries)))
  keys = Tokens(*(pad_keys(x, axis=1) for x in whole(keys)))
  query = wide(pad_queries(query, axis=2))
  key, value = (wide(pad_keys(x, axis=2)) for x in (key, value))
  arrays = [query, key, value, jnp.stack(queries, 1), jnp.stack(keys, 1)]
  arrays += _blocks(queries, keys, rule)
  if slopes is not None:
    arrays.append(slopes)
  tile = (plgpu.TilingTransform((8, _CHANNELS)), plgpu.SwizzleTransform(128))
  out = plgpu.kernel(
    functools.partial(_kernel, rule=rule, scale=scale, tile=tile),
    out_type=jax.ShapeDtypeStruct(query.shape, query.dtype),
    grid=(heads, query.shape[2] // _QUERY_BLOCK, batch),
    grid_names=("head", "block", "batch"),
    num_threads=_WARPGROUPS + 1,
    thread_name="warpgroup",
    scratch_types=[
      plgpu.SMEM((_WARPGROUPS, _ROWS, channels), query.dtype, transforms=tile),
      plgpu.SMEM((_WARPGROUPS, _ROWS, _KEY_BLOCK), query.dtype, transforms=tile),
      plgpu.SMEM((_WARPGROUPS, 2, _ROWS), jnp.int32),
      plgpu.Barrier(num_arrivals=2, num_barriers=_WARPGROUPS),
    ],
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
    ),
    kernel_name="attention_forward",
  )(*arrays)
  return out[:, :, :seq, :value_dim]


def _attention_forward(query, key, value, queries, keys, slopes, rule: Rule, scale: float):
  out = _attention(query, key, value, queries, keys, slopes, rule, scale)
  return out, (query, key, value, queries, keys, slopes)


def _attention_backward(rule: Rule, scale: float, residuals, d_out):
  query, key, value, queries, keys, slopes = residuals

  def reference(query, key, value):
    return xla.attention(
      query, key, value, queries, keys, rule, alibi_slopes=slopes, bias=None, scale=scale
    )

  gradients = jax.vjp(reference, query, key, value)[1](d_out)
  # Slopes are constants of the architecture.
  return *gradients, None, None, None if slopes is None else jnp.zeros_like(slopes)


_attention.defvjp(_attention_forward, _attention_backward)


def _pad(x: Array, *, multiple: int, axis: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


def _blocks(queries: Tokens, keys: Tokens, rule: Rule) -> list[Array]:
  """What the kernel knows of blocks beforehand.

  Returns:
    int32 [2, batch, query blocks], the first key block of each block of queries and how many; and
    int32 [batch, query blocks, key blocks], 1 where every query may attend to every key.
  """
  meet = blocks_that_meet(queries, keys, rule, _QUERY_BLOCK, _KEY_BLOCK)
  first = jnp.argmax(meet, axis=2)
  end = meet.shape[2] - jnp.argmax(meet[:, :, ::-1], axis=2)
  # The pipeline takes at least one step; what it finds is forbidden.
  count = jnp.where(meet.any(axis=2), end - first, 1)
  row = Span(*(x[:, :, None] for x in block_spans(queries, _QUERY_BLOCK)))
  column = Span(*(x[:, None, :] for x in block_spans(keys, _KEY_BLOCK)))
  whole = all_may_attend(row, column, rule)
  return [jnp.stack([first, count]).astype(jnp.int32), whole.astype(jnp.int32)]


def _kernel(query, key, value, query_ids, key_ids, ranges, whole, *refs, rule, scale, tile):
  *slopes, out, q, weights, q_ids, barrier = refs
  head, block, batch = (lax.axis_index(name) for name in ("head", "block", "batch"))
  warpgroup = lax.axis_index("warpgroup")
  kv_head = lax.div(head, query.shape[1] // key.shape[1])
  channels = q.shape[2]
  first, count = ranges[0, batch, block], ranges[1, batch, block]
  slope = slopes[0][head] * _LOG2_E if slopes else None

  def attend(indices, k, v, k_ids, carry):
    sums, largest, total = carry

    def score(accumulator):
      plgpu.wgmma(accumulator, q.at[warpgroup], k.T)
      return accumulator[...]

    scores = pl.run_scoped(score, plgpu.ACC((_ROWS, _KEY_BLOCK), jnp.float32))
    scores = scores * (scale * _LOG2_E)
    down = lambda x: lax.broadcast_in_dim(x, scores.shape, [0])
    across = lambda x: lax.broadcast_in_dim(x, scores.shape, [1])
    q_tokens = lambda: Tokens(*(down(_cast(q_ids[warpgroup, i], _OF_ROWS)) for i in range(2)))
    k_tokens = lambda: Tokens(*(across(_cast(k_ids[i], _OF_COLUMNS)) for i in range(2)))
    if slope is not None:
      distance = q_tokens().positions - k_tokens().positions
      scores = scores - distance.astype(jnp.float32) * slope
    scores = lax.cond(
      whole[batch, block, first + indices[0]] == 1,
      lambda scores: scores,
      lambda scores: jnp.where(may_attend(q_tokens(), k_tokens(), rule), scores, _FORBIDDEN),
      scores,
    )
    now = jnp.maximum(largest, scores.max(axis=1))
    # Where every key so far is forbidden this is 1, and of no account: see below.
    p = jnp.exp2(scores - down(now))
    correction = jnp.exp2(largest - now)
    weights[warpgroup] = p.astype(weights.dtype)
    plgpu.commit_smem()

    def weigh(accumulator):
      plgpu.wgmma(accumulator, weights.at[warpgroup], v)
      return accumulator[...]

    weighted = pl.run_scoped(weigh, plgpu.ACC((_ROWS, channels), jnp.float32))
    sums = sums * lax.broadcast_in_dim(correction, sums.shape, [0]) + weighted
    return sums, now, total * correction + p.sum(axis=1)

  def compute(pipeline):
    rows = pl.ds(block * _QUERY_BLOCK + warpgroup * _ROWS, _ROWS)
    arrived = barrier.at[warpgroup]
    plgpu.copy_gmem_to_smem(query.at[batch, head, rows], q.at[warpgroup], arrived)
    plgpu.copy_gmem_to_smem(query_ids.at[batch, :, rows], q_ids.at[warpgroup], arrived)
    plgpu.barrier_wait(arrived)
    of_rows = lambda value: _cast(jnp.full((_ROWS,), value, jnp.float32), _OF_ROWS)
    sums = _cast(jnp.zeros((_ROWS, channels), jnp.float32), plgpu.Layout.WGMMA)
    sums, largest, total = pipeline((sums, of_rows(_FORBIDDEN), of_rows(0.0)))
    # A row that may attend to nothing gives zeros.
    share = jnp.where(largest > _FORBIDDEN / 2, 1 / total, 0.0)
    mean = sums * lax.broadcast_in_dim(share, sums.shape, [0])
    q[warpgroup] = mean.astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q.at[warpgroup], out.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)

  of_keys = plgpu.BlockSpec(
    (None, None, _KEY_BLOCK, channels),
    lambda k: (batch, kv_head, first + k, 0),
    transforms=tile,
  )
  plgpu.emit_pipeline_warp_specialized(
    attend,
    grid=(count,),
    memory_registers=_MEMORY_REGISTERS,
    in_specs=[
      of_keys,
      of_keys,
      plgpu.BlockSpec((None, 2, _KEY_BLOCK), lambda k: (batch, 0, first + k)),
    ],
    max_concurrent_steps=_STAGES,
    wg_axis="warpgroup",
    num_compute_wgs=_WARPGROUPS,
    compute_context=compute,
  )(key, value, key_ids)
