"""The decision of section 3.1 on a synthetic acceptance process, solved exactly.

Every drafted token is easy with probability `easy_share`, else hard, independently; an easy (hard)
one is accepted with probability alpha_easy (alpha_hard). After k drafts, `easy` of them easy, all
are accepted with probability

    C = alpha_easy^easy alpha_hard^(k - easy).

A round costs c1 per draft and c2 for the target's pass, and gives the accepted drafts and one token
more. The policy sees the kind of every drafted token. The least cost per token, lambda, is where the
best round breaks even (a renewal-reward process):

    0 = c2 - lambda + V(0),    V(k, easy) = min(0, c1 - lambda C alpha + E V(k + 1, easy')),

alpha the mean acceptance; 0 is to stop. Gains only shrink as C does, so that the first step which
does not pay is the last: stop where C <= c1 / (lambda alpha), which is a threshold on 1 - C.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

_BISECTIONS = 40


class AcceptanceProcess(NamedTuple):
  """The synthetic process: three probabilities; equal alphas are i.i.d. acceptance."""

  easy_share: float
  alpha_easy: float
  alpha_hard: float


class Optimum(NamedTuple):
  """The best policy.

  Attributes:
    cost: lambda, the least cost per token, float32 [].
    stops: whether to stop after k drafts of which `easy` were, bool [max_drafts, max_drafts + 1];
      only easy <= k is meant.
    all_accepted: C of the same states.
    threshold: h, stop where 1 - C >= h, float32 [].
  """

  cost: Array
  stops: Array
  all_accepted: Array
  threshold: Array


@functools.partial(jax.jit, static_argnames="max_drafts")
def solve(process: AcceptanceProcess, c1: float, c2: float, *, max_drafts: int) -> Optimum:
  """Dynamic programming inside bisection for lambda.

  Args:
    process: of the acceptances.
    c1, c2: cost of a pass of the draft and of the target.
    max_drafts: of a round.
  """
  share = process.easy_share
  alpha = share * process.alpha_easy + (1 - share) * process.alpha_hard
  k, easy = jnp.arange(max_drafts)[:, None], jnp.arange(max_drafts + 1)
  hard = jnp.maximum(k - easy, 0)
  all_accepted = process.alpha_easy ** jnp.minimum(easy, k) * process.alpha_hard**hard

  def rounds(cost):
    """V(0), and whether to stop in each state."""

    def back(value, accepted):
      after = share * jnp.roll(value, -1) + (1 - share) * value
      going_on = c1 - cost * accepted * alpha + after
      return jnp.minimum(going_on, 0.0), going_on >= 0

    value, stops = jax.lax.scan(back, jnp.zeros(max_drafts + 1), all_accepted, reverse=True)
    return value[0], stops

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    pays = c2 - middle + rounds(middle)[0] < 0  # A round costs less: lambda is smaller.
    return jnp.where(pays, low, middle), jnp.where(pays, middle, high)

  # Without drafts a token costs c2.
  _, cost = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros(()), jnp.float32(c2)))
  return Optimum(cost, rounds(cost)[1], all_accepted, 1 - c1 / (cost * alpha))


def tokens_per_call(alpha: Array, length: Array) -> Array:
  """Expected tokens of a round of K drafts with i.i.d. acceptance: (1 - alpha^(K + 1)) / (1 - alpha).

  Args:
    alpha: below 1, broadcastable with length.
    length: K.
  """
  return (1 - alpha ** (length + 1)) / (1 - alpha)


def cost_per_token(alpha: Array, length: Array, c1: float, c2: float) -> Array:
  """Of constant K on i.i.d. acceptance, as `tokens_per_call`."""
  return (c1 * length + c2) / tokens_per_call(alpha, length)
