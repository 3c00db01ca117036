"""Attention over a cache of two parts: keys with fewer channels, and keys with all of them."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from kernels.decode_attention.api import decode_attention

Array = jax.Array


def take_channels(x: Array, channels: Array) -> Array:
  """[batch, kv_heads, slots, head_dim] and int32 [batch, kv_heads, kept] -> [.., slots, kept]."""
  return jnp.take_along_axis(x, channels[:, :, None], axis=3)


def split_attention(
  query: Array,
  keys: Array,
  values: Array,
  channels: Array,
  full_keys: Array,
  full_values: Array,
  allowed: Array,
) -> Array:
  """Attention over a pruned and a full part; scores and softmax are float32.

  Args:
    query: [batch, heads, seq, head_dim].
    keys: [batch, kv_heads, slots, kept].
    values: [batch, kv_heads, slots, head_dim].
    channels: int32 [batch, kv_heads, kept].
    full_keys, full_values: [batch, kv_heads, full_slots, head_dim].
    allowed: bool [batch, seq, slots + full_slots].

  Returns:
    [batch, heads, seq, head_dim] in query's dtype.
  """
  batch, heads, seq, head_dim = query.shape
  kv_heads, slots = keys.shape[1:3]
  precision = "highest" if query.dtype == jnp.float32 else None
  product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  # The query heads of a group are rows of one product with the head that they share.
  grouped = query.reshape(batch, kv_heads, -1, head_dim)
  scores = jnp.concatenate(
    [
      product("bkqd,bksd->bkqs", take_channels(grouped, channels), keys),
      product("bkqd,bksd->bkqs", grouped, full_keys),
    ],
    axis=-1,
  )
  # The scale is that of the whole head: a score with fewer channels approximates the whole one.
  scores = (scores / math.sqrt(head_dim)).reshape(batch, heads, seq, -1)
  scores = jnp.where(allowed[:, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  weights = weights.reshape(batch, kv_heads, -1, scores.shape[-1])
  out = product("bkqs,bksd->bkqd", weights[..., :slots], values)
  out += product("bkqs,bksd->bkqd", weights[..., slots:], full_values)
  return out.reshape(query.shape).astype(query.dtype)


def split_decode_attention(
  query: Array,
  keys: Array,
  values: Array,
  channels: Array,
  full_keys: Array,
  full_values: Array,
  starts: Array,
  length: Array,
  full_length: Array,
  implementation: Literal["xla", "mosaic_tpu"] | None = None,
) -> Array:
  """`split_attention` of one query a row, by the decode kernel, which reads the written slots only.

  The kernel goes over each part, and the log-sum-exp of its scores says how much the part weighs.

  Args:
    query: [batch, heads, 1, head_dim].
    keys, values, channels, full_keys, full_values: as of `split_attention`.
    starts: int32 [batch], slots of padding, counted from the first of the pruned part on.
    length, full_length: int32 [batch], slots written of either part.
    implementation: see `decode_attention`.
  """
  batch, heads, _, head_dim = query.shape
  attend = functools.partial(
    decode_attention,
    scale=1 / math.sqrt(head_dim),
    return_log_sum_exp=True,
    implementation=implementation,
  )
  grouped = query.reshape(batch, keys.shape[1], -1, head_dim)
  left = take_channels(grouped, channels).reshape(batch, heads, -1)
  old, old_sum = attend(left, keys, values, length, starts=starts)
  full_starts = jnp.maximum(starts - length, 0)
  new, new_sum = attend(query[:, :, 0], full_keys, full_values, full_length, starts=full_starts)
  weights = jax.nn.softmax(jnp.stack([old_sum, new_sum]), axis=0)[..., None]
  out = weights[0] * old.astype(jnp.float32) + weights[1] * new.astype(jnp.float32)
  return out.astype(query.dtype)[:, :, None]
