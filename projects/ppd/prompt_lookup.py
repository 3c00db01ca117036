"""Prompt lookup decoding (Saxena 2023), a baseline without training: drafts copied from the text.

Of the last n tokens (n = 3, then 2, then 1) the first earlier occurrence is looked up, and what
followed it there is the draft. Greedy acceptance depends on the greedy text alone, so that the text
is all that is needed to count passes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

LONGEST_MATCH = 3


def lookup_acceptance_length(
  tokens: np.ndarray, segment_ids: np.ndarray, new_tokens: int, longest: int = 10
) -> float:
  """Tokens of a pass, over all texts.

  Args:
    tokens, segment_ids: greedy texts, int32 [texts, seq], padded on the left.
    new_tokens: generated ones; the first comes with the prompt.
    longest: drafts of a pass at most.
  """
  passes = np.asarray(_passes(tokens, segment_ids, new_tokens, longest))
  return float(len(tokens) * (new_tokens - 1) / passes.sum())


@functools.partial(jax.jit, static_argnums=(2, 3))
def _passes(tokens, segment_ids, new_tokens: int, longest: int):
  """Passes of each text behind its prompt, int32 [texts]."""
  return jax.vmap(lambda t, s: _passes_of_text(t, s, new_tokens, longest))(tokens, segment_ids)


def _passes_of_text(tokens: Array, segment_ids: Array, new_tokens: int, longest: int) -> Array:
  length = len(tokens)
  slots = jnp.arange(length)
  same = (tokens[:, None] == tokens) & (segment_ids[:, None] == 1) & (segment_ids == 1)
  # before[s, t]: tokens up to s that equal those up to t; after[s, t]: tokens from s and from t on.
  shift = lambda row: jnp.pad(row[:-1], (1, 0))
  extend = lambda row, equal: ((new := jnp.where(equal, shift(row) + 1, 0)), new)
  none = jnp.zeros(length, jnp.int32)
  before = jax.lax.scan(extend, none, same)[1]
  after = jax.lax.scan(extend, none, same[::-1, ::-1])[1][::-1, ::-1]
  # Of the matches before t the longest, of equally long ones the first.
  match = jnp.where(slots[:, None] < slots, jnp.minimum(before, LONGEST_MATCH), 0)
  source = jnp.argmax(match, axis=0)
  found = match.max(axis=0) > 0
  copied = after[jnp.minimum(source + 1, length - 1), jnp.minimum(slots + 1, length - 1)]
  # The draft ends where the known text does.
  drafted = jnp.minimum(longest, slots - source)
  accepted = jnp.where(found, jnp.minimum(copied, drafted), 0)

  def one_pass(carry):
    root, passes = carry
    return root + 1 + accepted[root], passes + 1

  first = jnp.int32(length - new_tokens)
  return jax.lax.while_loop(lambda c: c[0] < length - 1, one_pass, (first, jnp.int32(0)))[1]
