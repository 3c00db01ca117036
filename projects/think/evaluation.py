"""What a compressed prompt costs the tokens behind it, for many settings with few compilations.

Keys whose dropped channels are zero give the same logits as keys without these channels
(`tests/common/decoding/pruned_cache_test.py` compares both). So here prompts keep their shapes, the
number of channels is a traced number, and one program serves all ratios and scores. Evicted tokens
are really left out, and quantized keys and values are those that the codes stand for.

Arrays of all blocks are stacked: [blocks, rows, heads, tokens, channels].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from common.decoding import pruned_cache, quantized_cache
from common.decoding.eviction import Eviction, keep_slots_of, take_slots
from common.models.decoder import Decoder, KVCache
from projects.think.think import kept_mask, pruning_error

Array = jax.Array


class Prompts(NamedTuple):
  """Prompts and their continuations.

  Attributes:
    tokens: int32 [rows, seq], prompt and continuation.
    segment_ids: int32 [rows, seq], 0 for padding on the left.
    length: tokens of a prompt, padding included.
    scored: bool [seq - length], continuation tokens whose successor is asked for. Never the last.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  length: int
  scored: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Prefill:
  """A pass over prompts and continuations with all keys.

  Attributes:
    query: [blocks, rows, heads, seq, head_dim].
    keys, values: [blocks, rows, kv_heads, slots, head_dim], the prompts' (or what is left of them).
    valid: bool [rows, slots].
    prompt_valid: bool [rows, prompt], of the prompts before eviction.
    logits: float32 [rows, seq - prompt, vocab] of the continuations.
    positions: int32 [rows, seq - prompt] of the continuations.
  """

  query: Array
  keys: Array
  values: Array
  valid: Array
  prompt_valid: Array
  logits: Array
  positions: Array


class Cost(NamedTuple):
  """Per row, means over the scored tokens, float32 [rows].

  Attributes:
    kl: KL(dense cache || compressed cache) of the next token, nats.
    nll: of the token that follows, nats.
    correct: whether it is the most likely one.
  """

  kl: np.ndarray
  nll: np.ndarray
  correct: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(graphdef, state, tokens, segment_ids, length):
  model = nnx.merge(graphdef, state)
  observed = pruned_cache.observe(model, tokens, segment_ids)
  keys, values = (jnp.stack(x)[..., :length, :] for x in (observed.keys, observed.values))
  valid = segment_ids[:, :length] != 0
  return Prefill(
    query=jnp.stack(observed.query),
    keys=keys,
    values=values,
    valid=valid,
    prompt_valid=valid,
    logits=model.head(observed.hidden[:, length:]),
    positions=pruned_cache.positions_of(segment_ids)[:, length:],
  )


def prefill(model: Decoder, prompts: Prompts) -> Prefill:
  """Reads prompts and continuations once."""
  graphdef, state = nnx.split(model)
  return _prefill(graphdef, state, prompts.tokens, prompts.segment_ids, prompts.length)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def evict(prefill: Prefill, scores: Eviction, capacity: int, window: int) -> Prefill:
  """What an eviction leaves of the prompts' keys and values."""
  prompt = prefill.keys.shape[3]

  def block(query, keys, values):
    slots = keep_slots_of(
      scores(query[:, :, :prompt], keys, prefill.valid, window), prefill.valid, capacity, window
    )
    return take_slots(keys, slots), take_slots(values, slots)

  keys, values = jax.vmap(block)(prefill.query, prefill.keys, prefill.values)
  count = jnp.minimum(prefill.valid.sum(axis=1), capacity)
  valid = jnp.arange(capacity) >= capacity - count[:, None]
  return dataclasses.replace(prefill, keys=keys, values=values, valid=valid)


@functools.partial(jax.jit, static_argnums=1)
def key_mask(prefill: Prefill, scores: pruned_cache.ChannelScores, kept, window) -> Array:
  """The channels of the keys that stay, bool [blocks, rows, kv_heads, head_dim].

  Args:
    prefill: after eviction.
    scores: of channels.
    kept: int32 [], T.
    window: int32 [], the prompt's last queries that count.
  """
  prompt = prefill.prompt_valid.shape[1]
  counts = prefill.prompt_valid & (jnp.arange(prompt) >= prompt - window)
  score = lambda query, keys: scores(query[:, :, :prompt], keys, counts, prefill.valid)
  return kept_mask(jax.vmap(score)(prefill.query, prefill.keys), kept)


@functools.partial(jax.jit, static_argnums=1)
def value_mask(prefill: Prefill, scores: Callable, output_kernels: Array, kept) -> Array:
  """As `key_mask`, of the values. output_kernels: [blocks, heads * head_dim, dim]."""
  score = lambda values, kernel: scores(values, kernel, prefill.valid)
  return kept_mask(jax.vmap(score)(prefill.values, output_kernels), kept)


@jax.jit
def drop(prefill: Prefill, keys: Array, values: Array, recent) -> Prefill:
  """Zeroes channels of all but the `recent` (int32 []) last tokens of keys and of values.

  Args:
    keys, values: masks, bool [blocks, rows, kv_heads, head_dim].
  """
  slots = prefill.keys.shape[3]
  full = (jnp.arange(slots) >= slots - recent)[:, None]
  zero = lambda x, mask: jnp.where(full | mask[..., None, :], x, 0)
  return dataclasses.replace(
    prefill, keys=zero(prefill.keys, keys), values=zero(prefill.values, values)
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantize(prefill: Prefill, bits: int, group: int, recent: int) -> Prefill:
  """KIVI: all but the recent tokens as their codes stand for. Of prompts without padding.

  Args:
    bits, group: of the codes; `group` divides the tokens that are not recent.
  """
  pruned = prefill.keys.shape[3] - recent

  def rounded(x, quantizer):
    packed = quantizer(x[:, :, :pruned], bits=bits, group=group)
    old = quantized_cache.dequantize(packed, x.dtype)
    return jnp.concatenate([old, x[:, :, pruned:]], axis=2)

  return dataclasses.replace(
    prefill,
    keys=jax.vmap(lambda x: rounded(x, quantized_cache.quantize_keys))(prefill.keys),
    values=jax.vmap(lambda x: rounded(x, quantized_cache.quantize_values))(prefill.values),
  )


@functools.partial(jax.jit, static_argnums=0)
def _cost(graphdef, state, prefill: Prefill, new: Array, scored: Array) -> Cost:
  model = nnx.merge(graphdef, state)
  rows, extra, slots = len(new), new.shape[1], prefill.keys.shape[3]
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))
  segments = jnp.pad(prefill.valid, ((0, 0), (0, extra))).astype(jnp.int32)
  cache = KVCache(
    keys=[pad(x) for x in prefill.keys],
    values=[pad(x) for x in prefill.values],
    positions=jnp.zeros((rows, slots + extra), jnp.int32),  # All before the continuation.
    segment_ids=segments,
    length=jnp.int32(slots),
  )
  logits, _ = model(new, positions=prefill.positions, cache=cache)
  log_p, log_q = (jax.nn.log_softmax(x[:, :-1]) for x in (prefill.logits, logits))
  targets = new[:, 1:]
  weights = scored[:-1] / jnp.sum(scored[:-1])
  kl = optax.losses.kl_divergence_with_log_targets(log_q, log_p)
  nll = -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
  correct = jnp.argmax(log_q, axis=-1) == targets
  return Cost(kl @ weights, nll @ weights, correct @ weights)


def cost(model: Decoder, prefill: Prefill, prompts: Prompts) -> Cost:
  """The continuations behind the (compressed) prompts, teacher-forced."""
  graphdef, state = nnx.split(model)
  return Cost(
    *map(
      np.asarray,
      _cost(graphdef, state, prefill, prompts.tokens[:, prompts.length :], prompts.scored),
    )
  )


@jax.jit
def logit_error(prefill: Prefill, mask: Array, recent) -> Array:
  """Relative Frobenius error of the continuation's attention logits, mean over rows, heads, blocks.

  Over the keys that are pruned, sqrt of `think.pruning_error`: the queries are not those that the
  channels were chosen by.
  """
  _, _, heads, seq, _ = prefill.query.shape
  slots = prefill.keys.shape[3]
  pruned = (jnp.arange(slots) < slots - recent) & prefill.valid
  keys = jnp.where(pruned[:, None, :, None], prefill.keys, 0)
  group = heads // keys.shape[2]
  repeat = lambda x: jnp.repeat(x, group, axis=2)
  query = prefill.query[..., seq - prefill.positions.shape[1] :, :]
  return jnp.mean(jnp.sqrt(pruning_error(query, repeat(keys), repeat(mask))))
