"""Prefill and time to first token with the clock running, programs compiled before.

Every shape is rounded up to a bucket for padded and for packed prompts alike.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import PROMPT_BUCKET, Progress, bucket, step
from common.decoding.prepacking import (
  cache_room,
  pack,
  pad_to_buckets,
  unpacked_cache,
)
from common.models.decoder import Decoder
from projects.prepacking.batching import Batch
from projects.prepacking.prepacking import padded_cache


class Seconds(NamedTuple):
  """Of one batch, from token ids on the host.

  Attributes:
    prefill: until the cache of one prompt per row is there.
    first_token: until the first new tokens are on the host.
  """

  prefill: float
  first_token: float


class Timed(NamedTuple):
  """One way of batching: medians over the runs of the mean over its batches.

  Attributes:
    prefill, first_token: seconds per batch.
    prompts_per_second: until their first tokens.
    peak_bytes: of the largest batch, what its prefill allocates besides the parameters: as the
      compiler plans it.
    device_peak_bytes: the most that was in use on the device up to the method's first run, where
      the device counts; a method's own if it is more than that of the methods before it.
  """

  prefill: float
  first_token: float
  prompts_per_second: float
  peak_bytes: int
  device_peak_bytes: int | None


class Programs:
  """The programs of one model, each compiled once for a shape; their memory is known."""

  def __init__(self, model: Decoder):
    self._graphdef, self._state = nnx.split(model)
    self._compiled = {}

  def __call__(self, function: Callable, room: int, *arguments):
    """Runs function(graphdef, state, *arguments, room) and waits for it."""
    program = self._program(function, room, *arguments)
    return jax.block_until_ready(program(self._state, *arguments))

  def peak_bytes(self, function: Callable, room: int, *arguments) -> int:
    """Bytes of its results and of what it needs meanwhile."""
    plan = self._program(function, room, *arguments).memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes

  def _program(self, function, room, *arguments):
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
    key = function, room, shapes
    if key not in self._compiled:
      lowered = function.lower(self._graphdef, self._state, *arguments, room)
      self._compiled[key] = lowered.compile()
    return self._compiled[key]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _padded(graphdef, state, tokens, segment_ids, room):
  return padded_cache(nnx.merge(graphdef, state), tokens, segment_ids, room)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _packed(graphdef, state, packed, room):
  return unpacked_cache(nnx.merge(graphdef, state), packed, room)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _first(graphdef, state, lengths, last_tokens, cache, room):
  del room  # The cache's own.
  return step(nnx.merge(graphdef, state), Progress(cache, lengths), last_tokens)[0]


def read_batch(programs: Programs, batch: Batch, new_tokens: int) -> tuple[Seconds, np.ndarray]:
  """Reads a batch; returns its first new tokens, int32 [prompts], too."""
  start = time.perf_counter()
  room = _room(batch, new_tokens)
  cache = programs(*_prefill(batch, room))
  prefilled = time.perf_counter()
  lengths = np.array(batch.lengths, np.int32) - 1
  last_tokens = np.array([prompt[-1] for prompt in batch.prompts], np.int32)
  logits = programs(_first, room, lengths, last_tokens, cache)
  tokens = np.asarray(jnp.argmax(logits, axis=-1))
  return Seconds(prefilled - start, time.perf_counter() - start), tokens


def peak_bytes(programs: Programs, batch: Batch, new_tokens: int) -> int:
  """See `Timed`."""
  return programs.peak_bytes(*_prefill(batch, _room(batch, new_tokens)))


def time_methods(
  programs: Programs, methods: Mapping[str, Sequence[Batch]], new_tokens: int, repeats: int
) -> dict[str, Timed]:
  """Times ways of batching, run by run in turn, so that what else the machine does hits all alike.

  Args:
    methods: the batches of each, those of the least memory first.
    repeats: runs that count; one before them compiles and warms up.
  """
  runs, device_peaks = {name: [] for name in methods}, {}
  for _ in range(repeats + 1):
    for name, batches in methods.items():
      runs[name].append([read_batch(programs, batch, new_tokens)[0] for batch in batches])
      device_peaks.setdefault(name, _device_peak_bytes())
  timed = {}
  for name, batches in methods.items():
    per_run = np.array(runs[name][1:])  # [repeats, batches, 2]
    prefill, first_token = np.median(per_run.mean(axis=1), axis=0)
    prompts = sum(len(batch.prompts) for batch in batches) / len(batches)
    memory = max(peak_bytes(programs, batch, new_tokens) for batch in batches)
    rate = prompts / first_token
    timed[name] = Timed(float(prefill), float(first_token), rate, memory, device_peaks[name])
  return timed


def _device_peak_bytes() -> int | None:
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _prefill(batch: Batch, room: int) -> tuple:
  """What `Programs` takes."""
  if batch.bins is not None:
    return _packed, room, pad_to_buckets(pack(batch.prompts, batch.bins))
  length = bucket(max(max(batch.lengths) - 1, PROMPT_BUCKET))
  tokens, segment_ids = np.zeros((2, len(batch.prompts), length), np.int32)
  for row, prompt in enumerate(batch.prompts):
    tokens[row, length - len(prompt) + 1 :] = prompt[:-1]
    segment_ids[row, length - len(prompt) + 1 :] = 1
  return _padded, room, tokens, segment_ids


def _room(batch: Batch, new_tokens: int) -> int:
  """Slots of a row of the cache that decoding goes on from: a bucket and the new tokens."""
  return bucket(cache_room(batch.prompts, 0)) + new_tokens
