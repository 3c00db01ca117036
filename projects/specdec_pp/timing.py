"""Decoding with the clock running: the engine's statistics, tokens per second, seconds of a pass."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.decoding.generation import Sampling, generate
from common.decoding.speculative import Policy, Statistics, constant, speculative_generate
from common.evaluation.log_likelihood import whole_batches
from common.models.decoder import Decoder, KVCache
from projects.specdec_pp.frontier import Rates, rates
from projects.specdec_pp.specdec_pp import AcceptanceHead, threshold_policy

Array = jax.Array

_REPEATS = 15
# Verification reads the drafts of a round and the token before them.
_VERIFIED = 9


class PassCosts(NamedTuple):
  """Seconds of one pass for one row: a token of the draft, `_VERIFIED` tokens of the target."""

  draft: float
  target: float

  @property
  def ratio(self) -> float:
    """c2 / c1."""
    return self.target / self.draft


def measured_costs(target: Decoder, draft: Decoder, config: ConfigDict) -> PassCosts:
  """The median of some passes over a cache of the config's length."""
  length = config.prompt_length + config.new_tokens
  return PassCosts(
    _seconds_of_pass(draft, 1, length + _VERIFIED),
    _seconds_of_pass(target, _VERIFIED, length + _VERIFIED),
  )


def _seconds_of_pass(model: Decoder, new: int, length: int) -> float:
  graphdef, state = nnx.split(model)
  cache = KVCache.empty(model.config, 1, length, model.embed_tokens.embedding.dtype)
  tokens = jnp.zeros((1, new), jnp.int32)
  seconds = []
  for _ in range(_REPEATS + 1):
    start = time.perf_counter()
    jax.block_until_ready(_pass(graphdef, state, tokens, cache))
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds[1:]))  # The first compiles.


@functools.partial(jax.jit, static_argnums=0)
def _pass(graphdef, state, tokens, cache):
  return nnx.merge(graphdef, state)(tokens, cache=cache)


def engine_statistics(
  config: ConfigDict,
  target: Decoder,
  draft: Decoder,
  prompts: list[list[int]],
  policy: Policy,
  key: Array,
  stop_token: int | None,
) -> Statistics:
  """Decodes all prompts, `engine_batch` at a time; int32 [rows] each."""
  found = [
    speculative_generate(
      target,
      draft,
      batch,
      max_new_tokens=config.new_tokens,
      policy=policy,
      max_drafts=config.max_drafts,
      key=jax.random.fold_in(key, i),
      sampling=Sampling(config.temperature, top_p=config.top_p),
      stop_tokens=stop_token,
    )[1]
    for i, batch in enumerate(whole_batches(prompts, config.engine_batch))
  ]
  return Statistics(*(jnp.concatenate(parts)[: len(prompts)] for parts in zip(*found)))


class Timed(NamedTuple):
  """One way of decoding; costs None for the target alone."""

  name: str
  tokens_per_second: float
  costs: Rates | None


def timed_decoding(
  config: ConfigDict,
  target: Decoder,
  draft: Decoder,
  prompts: list[list[int]],
  head: AcceptanceHead,
  length: int,
  stop_token: int | None,
) -> list[Timed]:
  """The target alone, the best constant length and SpecDec++, on the same prompts.

  Prompts are evenly spaced over the sources. Every way runs twice; the first run compiles.
  """
  spaced = np.linspace(0, len(prompts) - 1, min(len(prompts), config.timed_prompts)).astype(int)
  chosen = [prompts[i] for i in spaced]
  options = {
    "max_new_tokens": config.timed_tokens,
    "key": jax.random.key(0),
    "sampling": Sampling(config.temperature, top_p=config.top_p),
    "stop_tokens": stop_token,
  }

  def clocked(decode, *arguments, **more):
    decode(*arguments, **more)
    start = time.perf_counter()
    found = jax.block_until_ready(decode(*arguments, **more))
    return found, time.perf_counter() - start

  texts, seconds = clocked(generate, target, chosen, **options)
  timed = [Timed("target alone", sum(map(len, texts)) / seconds, None)]
  adaptive = threshold_policy(
    head,
    config.main_threshold,
    batch=len(chosen),
    shortest=config.min_drafts,
    longest=config.max_drafts,
    stop_token=-1 if stop_token is None else stop_token,
  )
  # The constant length has no passes wider than its own rounds.
  ways = {
    f"constant K={length}": (constant(length), length),
    f"SpecDec++ h={config.main_threshold:g}": (adaptive, config.max_drafts),
  }
  for name, (policy, longest) in ways.items():
    (texts, statistics), seconds = clocked(
      speculative_generate,
      target,
      draft,
      chosen,
      policy=policy,
      max_drafts=longest,
      **options,
    )
    timed.append(Timed(name, sum(map(len, texts)) / seconds, rates(statistics)))
  return timed
