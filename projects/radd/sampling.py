"""Sampling from the reverse process, with few network calls (section 3.4 and algorithms 1 and 2).

In a step from t to t - dt every masked position is unmasked with probability rho, whatever the
network says; its token is then drawn from c(x)[i]. Where a sequence did not change, c(x) did not
either: of T steps, a sequence of length l needs the network in

  E-NFE(T) = T (1 - (1 - 1/T)^l)  <= min(T, l)

on average (log-linear schedule). So a step draws first which positions it unmasks, and calls the
network for the sequences that have any: the calls that caching c(x) saves, and nothing to keep.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import Sampling, adjust
from common.errors import UserError
from projects.radd.radd import SCHEDULES, check_choice, mask_probability

Array = jax.Array
Rule = Literal["tweedie", "euler"]
RULES = ("tweedie", "euler")
DIRECT = Sampling(temperature=1.0)

# Sampling ends at this time, where the last step unmasks what is left.
LAST_TIME = 1e-5
# The network runs on batch, batch / 2, batch / 4 or batch / 8 rows, the least that suffices.
HALVINGS = 3


class Steps(NamedTuple):
  """A plan of the reverse process; steps beyond `count` are not taken.

  Attributes:
    rho: probability that a step unmasks a masked position, float32 [steps].
    noise: total noise at the beginning of each step, for a time-conditioned network [steps].
    count: int32 [].
  """

  rho: Array
  noise: Array
  count: Array


class Samples(NamedTuple):
  """Attributes: tokens, int32 [batch, seq]; calls, network evaluations of each row, int32 [batch]."""

  tokens: Array
  calls: Array


def unmask_probability(rule: Rule, schedule: str, t: Array, dt: Array) -> Array:
  """rho of a step from t to t - dt.

  tweedie  (exp(-noise(t - dt)) - exp(-noise(t))) / (1 - exp(-noise(t)))
  euler    dt rate(t) exp(-noise(t)) / (1 - exp(-noise(t)))
  """
  noise = SCHEDULES[schedule].noise
  if rule == "euler":
    return dt * SCHEDULES[schedule].rate(t) / jnp.expm1(noise(t))
  before, after = mask_probability(noise(t)), mask_probability(noise(t - dt))
  return (before - after) / before


def make_steps(
  num_steps: int,
  *,
  rule: Rule = "tweedie",
  schedule: str = "log_linear",
  padded_to: int | None = None,
) -> Steps:
  """Steps at uniform times from 1 to `LAST_TIME`; the last unmasks everything.

  Args:
    num_steps: T.
    rule, schedule: of rho. Euler's is cut at 1.
    padded_to: length of the arrays; plans of one length share a compilation.

  Raises:
    UserError: an unknown rule or schedule, or no step, or more than fit.
  """
  check_choice("rule", rule, RULES)
  check_choice("schedule", schedule, SCHEDULES)
  length = num_steps if padded_to is None else padded_to
  if not 0 < num_steps <= length:
    raise UserError(f"num_steps={num_steps}: expected 1 to {length}")
  times = jnp.linspace(1.0, LAST_TIME, num_steps + 1)
  dt = (1 - LAST_TIME) / num_steps
  rho = jnp.clip(unmask_probability(rule, schedule, times[:-1], dt), 0, 1).at[-1].set(1.0)
  noise = SCHEDULES[schedule].noise(times[:-1])
  pad = lambda x: jnp.pad(x, (0, length - num_steps))
  return Steps(pad(rho), pad(noise), jnp.int32(num_steps))


def expected_calls(num_steps: int, length: int) -> float:
  """E-NFE(T) of the log-linear schedule."""
  return num_steps * (1 - (1 - 1 / num_steps) ** length)


def all_masked(batch: int, length: int, mask_token: int) -> Array:
  return jnp.full((batch, length), mask_token, jnp.int32)


def infilling(tokens: Array, known: Array, mask_token: int) -> Array:
  """What conditional sampling begins with: given tokens are kept, the others are M.

  Args:
    tokens: int32 [batch, seq]; those not known do not matter.
    known: bool [seq] or [batch, seq], such as a prefix and a suffix.

  Raises:
    UserError: a known token is not in the vocabulary.
  """
  known = np.broadcast_to(known, tokens.shape)
  given = np.asarray(tokens)[known]
  if given.size and not (0 <= given.min() and given.max() < mask_token):
    raise UserError(
      f"known tokens are {given.min()} to {given.max()}; the model has 0 to {mask_token - 1}: is "
      "the tokenizer another model's?"
    )
  return jnp.asarray(np.where(known, tokens, mask_token), jnp.int32)


def sample(
  model: nnx.Module,
  x: Array,
  key: Array,
  steps: Steps,
  *,
  sampling: Sampling = DIRECT,
  cached: bool = True,
) -> Samples:
  """Runs the reverse process from x; positions that are not masked never change.

  Args:
    model: a `Denoiser`.
    x: int32 [batch, seq], of `all_masked` or `infilling`.
    key: equal keys give equal tokens, cached or not.
    steps: of `make_steps`.
    sampling: top-p or top-k of c(x)[i].
    cached: call the network only for sequences that change in a step. It does not suit a network
      that reads the time: its c(x) changes in every step.

  Raises:
    UserError: a cached run of a time-conditioned network.
  """
  if cached and model.embed_noise is not None:
    raise UserError("a time-conditioned network cannot be cached: expected cached=False")
  graphdef, state = nnx.split(model)
  return _sample(graphdef, state, x, key, steps, sampling, cached)


def sample_any_order(
  model: nnx.Module, x: Array, key: Array, order: Array, *, sampling: Sampling = DIRECT
) -> Samples:
  """One token per network call, in the order of each row.

  Args:
    model, x, key, sampling: as of `sample`.
    order: a permutation of the positions for each row, int32 [batch, seq]; masked ones are filled.
  """
  graphdef, state = nnx.split(model)
  return _sample_any_order(graphdef, state, x, key, order, sampling)


def random_orders(key: Array, batch: int, length: int) -> Array:
  """A uniformly random permutation for each row, int32 [batch, length]."""
  return jnp.argsort(jax.random.uniform(key, (batch, length)), axis=1)


def draw_tokens(log_c: Array, keys: Array, sampling: Sampling) -> Array:
  """Tokens of every position, int32 [rows, seq]; in float32, or low-precision noise sharpens them.

  Args:
    log_c: float32 [rows, seq, V].
    keys: of every row [rows], so that its tokens do not depend on the others of a batch.
  """
  draw = lambda row, key: jax.random.categorical(key, adjust(row, sampling))
  return jax.vmap(draw)(log_c, keys).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _sample(graphdef, state, x, key, steps, sampling, cached) -> Samples:
  model = nnx.merge(graphdef, state)
  batch, length = x.shape
  sizes = sorted({batch >> i for i in range(HALVINGS + 1)} - {0}) if cached else [batch]

  def predict(size, x, noise, order, keys):
    """Tokens drawn from c(x) for the first `size` rows of the order; the other rows stay."""
    rows = order[:size]
    log_c = model(x[rows], jnp.broadcast_to(noise, (size,)))
    return x.at[rows].set(draw_tokens(log_c, keys[rows], sampling))

  def step(n, carry):
    x, calls = carry
    mask_key, token_key = jax.random.split(jax.random.fold_in(key, n))
    u = jax.random.uniform(mask_key, (batch, length))
    unmasked = (x == model.mask_token) & (u < steps.rho[n])
    changes = jnp.any(unmasked, axis=1)
    keys = jax.random.split(token_key, batch)
    order = jnp.argsort(~changes)  # Rows that change come first.
    operands = (x, steps.noise[n], order, keys)
    if cached:
      branches = [lambda x, *_: x] + [functools.partial(predict, size) for size in sizes]
      # The least size that holds all rows that change.
      branch = jnp.searchsorted(jnp.array([0, *sizes]), changes.sum())
      drawn = jax.lax.switch(branch, branches, *operands)
    else:
      drawn = predict(batch, *operands)
    calls = calls + (changes if cached else 1)
    return jnp.where(unmasked, drawn, x), calls

  return Samples(*jax.lax.fori_loop(0, steps.count, step, (x, jnp.zeros(batch, jnp.int32))))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _sample_any_order(graphdef, state, x, key, order, sampling) -> Samples:
  model = nnx.merge(graphdef, state)
  batch, length = x.shape

  def step(j, carry):
    x, calls = carry
    at = order[:, j]
    row = jnp.arange(batch)
    masked = x[row, at] == model.mask_token
    log_c = model(x)[row, at][:, None]
    keys = jax.random.split(jax.random.fold_in(key, j), batch)
    tokens = draw_tokens(log_c, keys, sampling)[:, 0]
    return x.at[row, at].set(jnp.where(masked, tokens, x[row, at])), calls + masked

  return Samples(*jax.lax.fori_loop(0, length, step, (x, jnp.zeros(batch, jnp.int32))))
