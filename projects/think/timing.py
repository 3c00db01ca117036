"""Seconds of one token's attention over a pruned cache, by ratio."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.decoding.split_attention import split_attention, take_channels

HEADS, KV_HEADS, HEAD_DIM, RECENT = 32, 8, 128, 32  # Of Llama-3-8B.
_REPEATS = 25


class Timed(NamedTuple):
  """Attributes: seconds, of the fastest of the repeats (others wait for the machine); num_bytes of keys and values."""

  seconds: float
  num_bytes: int


def time_decoding(slots: int, dropped: int) -> Timed:
  """One row of `slots` tokens, `dropped` of whose 128 key channels are not there."""
  shape = (1, KV_HEADS, slots, HEAD_DIM)
  keys, values = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
  query = jax.random.normal(jax.random.key(2), (1, HEADS, 1, HEAD_DIM))
  channels = jnp.broadcast_to(jnp.arange(HEAD_DIM - dropped), (1, KV_HEADS, HEAD_DIM - dropped))
  old = slots - RECENT
  arguments = (
    query,
    take_channels(keys[:, :, :old], channels),
    values[:, :, :old],
    channels,
    keys[:, :, old:],
    values[:, :, old:],
    jnp.ones((1, 1, slots), bool),
  )
  attend = jax.jit(split_attention)
  attend(*arguments).block_until_ready()
  seconds = []
  for _ in range(_REPEATS):
    begin = time.perf_counter()
    attend(*arguments).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  _, old_keys, old_values, _, new_keys, new_values, _ = arguments
  num_bytes = sum(x.nbytes for x in (old_keys, old_values, new_keys, new_values))
  return Timed(min(seconds), num_bytes)
