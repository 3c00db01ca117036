"""The policies that SpecDec++ is compared with; constant lengths are in `common`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.decoding.speculative import Draft, Policy
from projects.specdec_pp.specdec_pp import AcceptanceHead, acceptance_probability

Array = jax.Array


def heuristic(batch: int, initial: int = 5) -> Policy:
  """Hugging Face's schedule: two more drafts after a round without rejection, else one fewer.

  Args:
    batch: rows, each with a length of its own.
    initial: drafts of the first round (Hugging Face's default).
  """
  return Policy(_reached, _adjust_length, jnp.full(batch, initial, jnp.int32))


def _reached(length: Array, draft: Draft) -> tuple[Array, Array]:
  return length, draft.step >= length


def _adjust_length(length: Array, drafts: Array, accepted: Array) -> Array:
  return jnp.where(accepted == drafts, length + 2, jnp.maximum(length - 1, 1))


class RandomLength(NamedTuple):
  """State of `random_length`.

  Attributes:
    key: of the rounds to come.
    length: of this round, int32 [batch].
    longest: int32 [].
  """

  key: Array
  length: Array
  longest: Array


def random_length(key: Array, batch: int, longest: int) -> Policy:
  """A control: every round of every row has a length drawn uniformly from 1 to `longest`."""
  state = RandomLength(key, jnp.zeros(batch, jnp.int32), jnp.int32(longest))
  return Policy(_reached_random, _draw, _draw(state, None, None))


def _reached_random(state: RandomLength, draft: Draft) -> tuple[RandomLength, Array]:
  return state, draft.step >= state.length


def _draw(state: RandomLength, drafts, accepted) -> RandomLength:
  del drafts, accepted  # It learns nothing.
  key, use = jax.random.split(state.key)
  length = jax.random.randint(use, state.length.shape, 1, state.longest + 1)
  return state._replace(key=key, length=length)


def current_token(head: AcceptanceHead) -> Policy:
  """Stops where the head's likelier class for the newest scored token is rejection (a < 1/2)."""
  return Policy(_rejection_likelier, state=head)


def _rejection_likelier(head: AcceptanceHead, draft: Draft) -> tuple[AcceptanceHead, Array]:
  return head, (draft.step > 1) & (acceptance_probability(head, draft.hidden) < 0.5)


def confidence(threshold: float) -> Policy:
  """Stops behind a token to which the draft itself gave less than this probability: no head."""
  return Policy(_unsure, state=jnp.float32(threshold))


def _unsure(threshold: Array, draft: Draft) -> tuple[Array, Array]:
  log_q = jax.nn.log_softmax(draft.logits)
  of_token = jnp.take_along_axis(log_q, draft.token[:, None], axis=-1)[:, 0]
  return threshold, of_token < jnp.log(threshold)
