"""Seconds of a pass by its number of inputs, L(N), on the device that the program runs on (C.5)."""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.decoder import Decoder, KVCache

Array = jax.Array


def pass_seconds(
  model: Decoder, sizes: Sequence[int], *, context: int, repeats: int
) -> list[float]:
  """L(N) of every size: the median of passes over a cache of one row.

  The sizes take turns, so that what else the machine does meets all alike.

  Args:
    model: the language model, or the draft.
    sizes: N.
    context: tokens in the cache.
    repeats: passes of each size that count.
  """
  graphdef, state = nnx.split(model)
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, 1, context + max(sizes), dtype)
  cache.segment_ids = cache.segment_ids.at[:, :context].set(1)
  cache.length = jnp.full(1, context, jnp.int32)
  inputs = {n: (jnp.zeros((1, n), jnp.int32), jnp.tri(n, dtype=bool)[None]) for n in sizes}
  seconds = {n: [] for n in sizes}
  for turn in range(repeats + 1):
    for n, (tokens, mask) in inputs.items():
      start = time.perf_counter()
      jax.block_until_ready(tree_pass(graphdef, state, tokens, cache, mask))
      if turn:  # The first compiles.
        seconds[n].append(time.perf_counter() - start)
  return [float(np.median(seconds[n])) for n in sizes]


@functools.partial(jax.jit, static_argnums=0)
def tree_pass(graphdef, state, tokens: Array, cache: KVCache, mask: Array) -> tuple[Array, KVCache]:
  """The best token behind every input int32 [batch, N], and the cache with the inputs in it."""
  logits, cache = nnx.merge(graphdef, state)(tokens, cache=cache, mask=mask)
  return jnp.argmax(logits, axis=-1), cache


def clocked(decode: Callable, prompts: Sequence[list[int]]) -> tuple[list, float]:
  """decode([prompt]) for every prompt, one after the other, with the clock running.

  Returns:
    What it returned for each, and seconds for all.
  """
  jax.block_until_ready(decode(prompts[:1]))  # Compiles.
  start = time.perf_counter()
  found = [jax.block_until_ready(decode([prompt])) for prompt in prompts]
  return found, time.perf_counter() - start
