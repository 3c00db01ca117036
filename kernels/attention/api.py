"""Multi-head attention: the one public function for many queries."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.attention import mosaic_gpu, mosaic_tpu, xla
from kernels.attention.masks import Rule, Tokens
from kernels.partitioning import batch_axes, on_parts, tensor_axes, tensor_size
from kernels.platform import has_tpu

Array = jax.Array

_IMPLEMENTATIONS = {"xla": xla, "mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}


def attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  positions: Array | None = None,
  segment_ids: Array | None = None,
  key_positions: Array | None = None,
  key_segment_ids: Array | None = None,
  causal: bool = True,
  sliding_window: int | None = None,
  alibi_slopes: Array | None = None,
  mask: Array | None = None,
  bias: Array | None = None,
  scale: float | None = None,
  implementation: Literal["xla", "mosaic_tpu", "mosaic_gpu"] | None = None,
) -> Array:
  """softmax(scale query key^T + bias) value (Vaswani et al. 2017, section 3.2.1).

  A query attends to keys of its own segment, if `causal` only to positions up to its own, and with
  a sliding window only to the last so many of these. One that may attend to nothing gives zeros.

  Args:
    query: [batch, heads, seq, key_dim], float32 or bfloat16.
    key: [batch, kv_heads, keys, key_dim]; consecutive query heads share one of them.
    value: [batch, kv_heads, keys, value_dim].
    positions, segment_ids: int32 [batch, seq] of the queries, or [1, seq] for all rows; by default
      0, 1, ... and 1. Segment 0 is padding.
    key_positions, key_segment_ids: int32 [batch, keys] or [1, keys]; by default the queries', or 0, 1, ... and
      1 where there are other numbers of keys and queries.
    causal: see above.
    sliding_window: positions that a query sees, its own included.
    alibi_slopes: [heads]; slope * (key's position - query's) is added to the scores. Constants: the
      kernels give them no gradient.
    mask: bool, broadcastable to [batch, heads, seq, keys]: False forbids besides all else, as for
      the tree of a speculative decoder.
    bias: added to the scores, broadcastable likewise. With a mask or a bias the gradients are those
      of "xla", which keep the scores.
    scale: 1 / sqrt(key_dim) by default.
    implementation: "xla" for any platform; "mosaic_tpu" and "mosaic_gpu" (Hopper, bfloat16, neither
      mask nor bias, gradients as of "xla"), whose scores never leave the chip. None picks mosaic_tpu
      for 128 queries or more on one TPU, or on a mesh of them (`jax.set_mesh`), which then cuts batch
      and heads (`kernels/partitioning.py`); mosaic_gpu, which has not run on a GPU yet, has to be named.

  Returns:
    [batch, heads, seq, value_dim] in query's dtype; scores and softmax are float32.

  Raises:
    ValueError: shapes that do not belong together, or what the named implementation lacks.
  """
  if implementation is not None and implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"implementation {implementation!r} is not supported; supported: {', '.join(_IMPLEMENTATIONS)}"
    )
  _check_shapes(query, key, value)
  if sliding_window is not None and sliding_window < 1:
    raise ValueError(f"sliding_window={sliding_window} must be positive")
  batch, heads, seq, _ = query.shape
  count = key.shape[2]
  if alibi_slopes is not None and alibi_slopes.shape != (heads,):
    raise ValueError(f"alibi_slopes have shape {alibi_slopes.shape}, expected {(heads,)}")
  if seq == count:
    key_positions = positions if key_positions is None else key_positions
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
  queries = _tokens("", positions, segment_ids, batch, seq)
  keys = _tokens("key_", key_positions, key_segment_ids, batch, count)
  for name, x in (("mask", mask), ("bias", bias)):
    if x is not None and jnp.broadcast_shapes(x.shape, (batch, heads, seq, count)) != (
      batch, heads, seq, count
    ):  # fmt: skip
      raise ValueError(f"{name} {x.shape} does not broadcast to {(batch, heads, seq, count)}")
  if mask is not None:
    bias = jnp.where(mask, 0.0 if bias is None else bias, -jnp.inf)
  problems = {
    "mosaic_tpu": mosaic_tpu.unsupported(query, key, value),
    "mosaic_gpu": mosaic_gpu.unsupported(query, key, value, bias),
  }
  if problem := problems.get(implementation):
    raise ValueError(
      f"{implementation} does not support {problem}; implementation=None or 'xla' does"
    )
  if implementation is None:
    if not problems["mosaic_tpu"] and seq >= mosaic_tpu.LANES and has_tpu():
      implementation = "mosaic_tpu"
    else:
      implementation = "xla"
  run = functools.partial(
    _run,
    _IMPLEMENTATIONS[implementation],
    rule=Rule(causal, sliding_window),
    scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
  )
  arrays = (query, key, value, queries, keys, alibi_slopes, bias)
  return _on_mesh(run, *arrays) if implementation == "mosaic_tpu" else run(*arrays)


def _run(implementation, query, key, value, queries, keys, slopes, bias, *, rule, scale) -> Array:
  return implementation.attention(
    query, key, value, queries, keys, rule, alibi_slopes=slopes, bias=bias, scale=scale
  )


def _on_mesh(run, query, key, value, queries, keys, slopes, bias) -> Array:
  """`run`, batch and heads cut over the current mesh; tokens are whole."""
  batch, heads = query.shape[:2]
  # Fewer heads of keys than devices are there more than once, if that makes all heads divisible.
  copies = math.lcm(key.shape[1], tensor_size()) // key.shape[1]
  if copies > 1 and heads % (copies * key.shape[1]) == 0:
    key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
  rows, of_heads = batch_axes(batch), tensor_axes(heads, key.shape[1])
  operand = PartitionSpec(rows, of_heads)
  one_or_all = lambda size, axes: axes if size > 1 else None
  tokens = lambda x: Tokens(*(PartitionSpec(one_or_all(len(y), rows)) for y in x))
  of_bias = PartitionSpec()
  if bias is not None:
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    of_bias = PartitionSpec(one_or_all(len(bias), rows), one_or_all(bias.shape[1], of_heads))
  specs = (
    operand,
    operand,
    operand,
    tokens(queries),
    tokens(keys),
    PartitionSpec(of_heads),
    of_bias,
  )
  return on_parts(run, specs, operand)(query, key, value, queries, keys, slopes, bias)


def _check_shapes(query: Array, key: Array, value: Array) -> None:
  if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
    raise ValueError(
      f"expected [batch, heads, tokens, channels], got query {query.shape}, key {key.shape}, "
      f"value {value.shape}"
    )
  if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
    raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not match")
  if query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
    raise ValueError(
      f"query {query.shape} needs as many channels as key {key.shape}, and a multiple of its heads"
    )
  if 0 in (*query.shape, *key.shape, *value.shape):
    raise ValueError(f"nothing to attend: query {query.shape}, key {key.shape}")


def _tokens(prefix: str, positions, segment_ids, batch: int, count: int) -> Tokens:
  for name, x in (("positions", positions), ("segment_ids", segment_ids)):
    if x is not None and x.shape not in ((batch, count), (1, count)):
      raise ValueError(f"{prefix}{name} have shape {x.shape}, expected {(batch, count)}")
  if positions is None:
    positions = jnp.arange(count)[None]
  if segment_ids is None:
    segment_ids = jnp.ones((1, count), jnp.int32)
  return Tokens(positions.astype(jnp.int32), segment_ids.astype(jnp.int32))
