"""Beam search, with the rules of Hugging Face's `generate(num_beams=..., do_sample=False)`.

Every step scores all continuations of a row's running beams by sum(log p), and takes the best. Of
those that end, the ones among the best `num_beams` enter the row's pool of hypotheses, where

  score = sum(log p) / length ** length_penalty        (length counts the stop token)

and the worst leave; the best that do not end run on. A row is done when its pool is full and its
best running beam, scored at its present length, is no better than the worst of the pool. That is
a heuristic if length_penalty > 0, since a longer text divides by more; `early_stopping="never"`
scores the beam at the length that favours it most, which no text that it becomes can beat.

All rows and beams are one batch on the device, [batch * num_beams], and the beams of a row share
the padding of its prompt.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import Progress, is_stop, prepare, start, step, until_stop
from common.errors import UserError
from common.models.decoder import Decoder
from common.models.encoder_decoder import EncoderDecoder

Array = jax.Array


class Hypothesis(NamedTuple):
  """A finished text.

  Attributes:
    tokens: the new ones, without the stop token.
    score: sum(log p) / length ** length_penalty, in nats; the stop token counts in both.
  """

  tokens: list[int]
  score: float


class Beams(NamedTuple):
  """The beams of all rows, best first. A score of -inf marks a beam or a hypothesis as missing.

  Attributes:
    tokens: int32 [batch, beams, max_new_tokens], of the running beams.
    scores: float32 [batch, beams], their sum(log p).
    finished: int32 [batch, beams, max_new_tokens], of the pool of hypotheses.
    finished_scores: float32 [batch, beams].
    done: bool [batch], the row's pool changes no more.
  """

  tokens: Array
  scores: Array
  finished: Array
  finished_scores: Array
  done: Array


def beam_search(
  model: Decoder | EncoderDecoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  num_beams: int,
  length_penalty: float = 1.0,
  early_stopping: bool | Literal["never"] = False,
  stop_tokens: int | Sequence[int] | None = None,
  num_return: int = 1,
) -> list[list[Hypothesis]]:
  """Continues every prompt, or generates a target for every source, by beam search.

  One compilation serves every call with the same padded length, batch and static numbers; another
  `length_penalty` or other stop tokens (as many) do not compile again.

  Args:
    model: a decoder or an encoder-decoder, quantized or not.
    prompts: token ids, of any lengths; the sources of an encoder-decoder.
    max_new_tokens: tokens to add at most.
    num_beams: texts that a row follows at a time; 1 is greedy.
    length_penalty: above 0 favours long texts, below 0 short ones.
    early_stopping: True, a row is done as soon as its pool is full; False, when its best running
      beam is no better at its present length; "never", when it cannot become better, at
      `max_new_tokens` if length_penalty > 0 and at its present length else.
    stop_tokens: each ends a text. By default none for a decoder, and the end-of-sequence token of
      an encoder-decoder.
    num_return: hypotheses to return per row.

  Returns:
    Per row its hypotheses, best first: `num_return`, or all if there are fewer texts than that.

  Raises:
    UserError: `num_beams` is not positive, `num_return` is not within 1 to `num_beams`,
      `early_stopping` is none of the three, `length_penalty` is out of range, or what `generate`
      raises.
  """
  if num_beams < 1:
    raise UserError(f"num_beams={num_beams} must be positive; 1 is greedy")
  if not 1 <= num_return <= num_beams:
    raise UserError(
      f"num_return={num_return} must be within 1 to num_beams={num_beams}: a row keeps no more "
      "hypotheses than beams"
    )
  if early_stopping not in (False, True, "never"):
    raise UserError(f"early_stopping={early_stopping!r} must be False, True or 'never'")
  tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens, stop_tokens)
  with np.errstate(over="ignore"):
    norms = (np.arange(1, max_new_tokens + 1) ** float(length_penalty)).astype(np.float32)
  if not all((norms > 0) & np.isfinite(norms)):
    raise UserError(
      f"length_penalty={length_penalty}: {max_new_tokens} ** length_penalty must be a positive "
      "float32; 0 compares sums, 1 means"
    )
  early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
  graphdef, state = nnx.split(model)
  finished, scores = _beam_search(
    graphdef, state, tokens, segment_ids, stop, norms, num_beams, early_stopping
  )
  rows = zip(np.asarray(finished)[:, :num_return].tolist(), np.asarray(scores).tolist())
  return [
    [Hypothesis(until_stop(t, stop), s) for t, s in zip(texts, row) if s > -math.inf]
    for texts, row in rows
  ]


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _beam_search(graphdef, state, tokens, segment_ids, stop, norms, num_beams, early_stopping):
  """The pool: tokens int32 [batch, num_beams, max_new_tokens] and scores [batch, num_beams].

  Args:
    stop: int32 [stops], -1 for none.
    norms: float32 [max_new_tokens], what the scores of texts of 1, 2, ... tokens are divided by.
  """
  batch, max_new_tokens = len(tokens), len(norms)
  # The prompt is read once; its beams begin as copies of its cache.
  logits, progress = start(nnx.merge(graphdef, state), tokens, segment_ids, max_new_tokens)
  copies = lambda x: jnp.repeat(x, num_beams, axis=0) if x.ndim else x
  logits, progress = jax.tree.map(copies, (logits, progress))
  empty = jnp.broadcast_to(stop[0], (batch, num_beams, max_new_tokens))
  missing = jnp.full((batch, num_beams), -jnp.inf)
  # One beam a row has begun, or else all would find the same texts.
  beams = Beams(empty, missing.at[:, 0].set(0.0), empty, missing, jnp.zeros(batch, bool))

  def unfinished(loop):
    i, beams, _, _ = loop
    return (i < max_new_tokens) & ~jnp.all(beams.done)

  def decode(loop):
    i, beams, rows, progress = loop
    token = jax.lax.dynamic_index_in_dim(beams.tokens, i - 1, axis=2, keepdims=False)
    progress = _take_rows(progress, rows)
    logits, progress = step(nnx.merge(graphdef, state), progress, token.reshape(-1))
    beams, rows = _extend(beams, logits, i, stop, norms, early_stopping)
    return i + 1, beams, rows, progress

  beams, rows = _extend(beams, logits, 0, stop, norms, early_stopping)
  beams = jax.lax.while_loop(unfinished, decode, (1, beams, rows, progress))[1]
  return beams.finished, beams.finished_scores


def _take_rows(progress: Progress, rows: Array) -> Progress:
  """Gives each beam the cache of the beam that it continues. rows: int32 [batch * beams].

  Only keys and values are moved: positions, padding and the source are the same for all beams of a
  row.
  """
  take = lambda layers: jax.tree.map(lambda x: x[rows], layers)
  cache = progress.cache
  cache = dataclasses.replace(cache, keys=take(cache.keys), values=take(cache.values))
  return progress._replace(cache=cache)


def _extend(
  beams: Beams, logits, i, stop, norms, early_stopping: bool | Literal["never"]
) -> tuple[Beams, Array]:
  """Adds token `i` to every text.

  Args:
    logits: float32 [batch * beams, vocab].
    i: index of the token, from 0.
    stop, norms, early_stopping: as of `_beam_search`.

  Returns:
    The beams, and which row of the logits' batch each of them continues, int32 [batch * beams].
  """
  batch, num_beams = beams.scores.shape
  vocab = logits.shape[-1]
  scores = jax.nn.log_softmax(logits).reshape(batch, num_beams, vocab) + beams.scores[:, :, None]
  # A beam has at most as many ends as there are stop tokens: num_beams candidates run on for sure.
  count = min(1 + len(stop), vocab) * num_beams
  scores, indices = jax.lax.top_k(scores.reshape(batch, -1), count)
  parents, token = indices // vocab, (indices % vocab).astype(jnp.int32)
  tokens = _take(beams.tokens, parents).at[:, :, i].set(token)
  ends = is_stop(token, stop) | (i + 1 == len(norms))

  running, best = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), num_beams)
  rows = jnp.arange(batch)[:, None] * num_beams + _take(parents, best)

  enters = ends & (jnp.arange(count) < num_beams) & ~beams.done[:, None]
  entering = jnp.where(enters, scores / norms[i], -jnp.inf)
  pool_scores = jnp.concatenate([beams.finished_scores, entering], axis=1)
  pool_scores, kept = jax.lax.top_k(pool_scores, num_beams)
  pool = _take(jnp.concatenate([beams.finished, tokens], axis=1), kept)

  # The worst of a pool that is not full is -inf.
  worst = pool_scores[:, -1]
  # The norms grow or fall steadily with the length, and sums of log p are not positive.
  norm = jnp.maximum(norms[i], norms[-1]) if early_stopping == "never" else norms[i]
  done = beams.done | (running[:, 0] / norm <= worst)
  if early_stopping is True:
    done |= worst > -jnp.inf
  return Beams(_take(tokens, best), running, pool, pool_scores, done), rows.reshape(-1)


def _take(x: Array, indices: Array) -> Array:
  """Per row of the batch: x[:, indices]. x: [batch, n, ...]; indices: int32 [batch, m]."""
  return jax.vmap(lambda row, chosen: row[chosen])(x, indices)
