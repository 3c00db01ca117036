"""Baselines at an equal number of completions: sampling, and diverse beam search."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.cache import take_rows
from common.decoding.generation import (
  RowSampling,
  Sampling,
  adjust_rows,
  categorical,
  is_stop,
  start,
  step,
)
from common.errors import UserError
from common.evaluation.log_likelihood import whole_batches
from projects.icn.icn import Prober

Array = jax.Array


class DiverseBeams(NamedTuple):
  """Beams of all rows, in groups.

  Attributes:
    tokens: int32 [batch, groups, beams, max_new_tokens].
    scores: float32 [batch, groups, beams], sum(log p); the dissimilarity is not part of it.
  """

  tokens: Array
  scores: Array


def sample_answers(
  prober: Prober, prompts: list[str], count: int, samplings: list[Sampling], key: Array, batch: int
) -> list[list[list[str]]]:
  """`count` independent answers to every prompt by each sampling, [samplings][prompts][count].

  One program serves all samplings, whose numbers are those of its rows.

  Args:
    prober: of the model; its `max_new_tokens` and stop tokens hold.
    prompts: without explored answers.
    count: answers of each.
    samplings: temperature, top-k, top-p.
    key: of the draws.
    batch: rows sampled at once.
  """
  graphdef, state = nnx.split(prober.model)
  padded = prober.padded(prober.encode(prompts))
  jobs = [(i, s) for s in samplings for i in range(len(prompts)) for _ in range(count)]
  texts = []
  for i, chunk in enumerate(whole_batches(jobs, batch)):
    rows = np.array([row for row, _ in chunk], np.int32)
    numbers = zip(*[(s.temperature, s.top_k, s.top_p) for _, s in chunk])
    sampling = RowSampling(
      *(np.array(x, t) for x, t in zip(numbers, (np.float32, np.int32, np.float32)))
    )
    new = sample_branches(
      graphdef,
      state,
      *padded,
      rows,
      jax.random.fold_in(key, i),
      prober.stop,
      sampling,
      prober.max_new_tokens,
    )
    texts += [prober.text(tokens) for tokens in np.asarray(new).tolist()]
  by_prompt = [texts[i : i + count] for i in range(0, len(jobs), count)]
  return [by_prompt[i : i + len(prompts)] for i in range(0, len(by_prompt), len(prompts))]


@functools.partial(jax.jit, static_argnums=(0, 8))
def sample_branches(
  graphdef, state, tokens, segment_ids, rows, key, stop, sampling: RowSampling, count: int
) -> Array:
  """Sampled continuations of prompts that are read once, int32 [branches, count].

  Args:
    tokens, segment_ids: int32 [prompts, seq], padded on the left.
    rows: int32 [branches], the prompt of each branch.
    key: of the draws.
    stop: int32 [stops], tokens that end a branch; what stands behind one is not meant.
    sampling: of each branch.
    count: tokens of a branch.
  """
  logits, progress = start(nnx.merge(graphdef, state), tokens, segment_ids, count)
  progress = progress._replace(
    cache=take_rows(progress.cache, rows), positions=progress.positions[rows]
  )
  draw = lambda i, logits: categorical(jax.random.fold_in(key, i), adjust_rows(logits, sampling))
  first = draw(0, logits[rows])
  new = jnp.full((len(rows), count), stop[0], jnp.int32).at[:, 0].set(first)

  def unfinished(loop):
    i, token, _, _ = loop
    return (i < count) & ~jnp.all(is_stop(token, stop))

  def decode(loop):
    i, token, new, progress = loop
    logits, progress = step(nnx.merge(graphdef, state), progress, token)
    token = jnp.where(is_stop(token, stop), token, draw(i, logits))
    return i + 1, token, new.at[:, i].set(token), progress

  return jax.lax.while_loop(unfinished, decode, (1, first, new, progress))[2]


def diverse_beam_answers(
  prober: Prober, prompts: list[str], *, groups: int, beams: int, penalty: float
) -> list[list[str]]:
  """The groups * beams texts of diverse beam search, likeliest first, [prompts][groups * beams].

  Raises:
    UserError: more beams than the vocabulary has tokens.
  """
  if beams > prober.model.config.vocab_size:
    raise UserError(f"{beams} beams: expected at most the vocabulary's tokens")
  graphdef, state = nnx.split(prober.model)
  found = diverse_beam_search(
    graphdef,
    state,
    *prober.padded(prober.encode(prompts)),
    prober.stop,
    jnp.float32(penalty),
    groups,
    beams,
    prober.max_new_tokens,
  )
  tokens, scores = (np.asarray(x).reshape(len(prompts), groups * beams, -1) for x in found)
  order = np.argsort(-scores[..., 0], axis=1, kind="stable")
  return [[prober.text(row[i].tolist()) for i in o] for row, o in zip(tokens, order)]


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8))
def diverse_beam_search(
  graphdef,
  state,
  tokens: Array,
  segment_ids: Array,
  stop: Array,
  penalty: Array,
  groups: int,
  beams: int,
  max_new_tokens: int,
) -> DiverseBeams:
  """Diverse beam search with Hamming dissimilarity (Vijayakumar et al., 2018).

  Groups choose one after the other at every step. A group ranks continuations by sum(log p) minus
  `penalty` times how often groups before it chose the token at this step. A text that ended stays
  as it is. One group is beam search.

  Args:
    tokens, segment_ids: int32 [batch, seq], prompts padded on the left.
    stop: int32 [stops], tokens that end a text.
    penalty: float32 [], lambda.
    groups, beams: number of groups, and of beams in each.
    max_new_tokens: columns of the texts.
  """
  batch, width = len(tokens), groups * beams
  logits, progress = start(nnx.merge(graphdef, state), tokens, segment_ids, max_new_tokens)
  vocab = logits.shape[-1]
  of_beams = lambda x: jnp.repeat(x, width, axis=0)
  rows = jnp.repeat(jnp.arange(batch), width)
  progress = progress._replace(
    cache=take_rows(progress.cache, rows), positions=progress.positions[rows]
  )
  first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # One beam of a group has begun.
  beginning = DiverseBeams(
    jnp.full((batch, groups, beams, max_new_tokens), stop[0], jnp.int32),
    jnp.broadcast_to(first, (batch, groups, beams)),
  )

  def choose(chosen, group):
    """One group's step. chosen: float32 [batch, vocab], how often groups before took a token."""
    continued, scores = group  # [batch, beams, vocab], [batch, beams].
    ranked = (continued - penalty * chosen[:, None]).reshape(batch, -1)
    index = jax.lax.top_k(ranked, beams)[1]
    parent, token = index // vocab, index % vocab
    chosen = chosen + jnp.sum(jax.nn.one_hot(token, vocab), axis=1)
    kept = jnp.take_along_axis(continued.reshape(batch, -1), index, axis=1)
    return chosen, (parent, token.astype(jnp.int32), kept)

  def extend(i, texts: DiverseBeams, logits):
    """Adds token i to every text; also which beam of the flat batch each continues."""
    log_p = jax.nn.log_softmax(logits).reshape(batch, groups, beams, vocab)
    last = texts.tokens[..., jnp.maximum(i - 1, 0)]
    ended = is_stop(last, stop) & (i > 0)
    # An ended text has one continuation, its stop token again.
    stays = jnp.where(jnp.arange(vocab) == last[..., None], 0.0, -jnp.inf)
    continued = texts.scores[..., None] + jnp.where(ended[..., None], stays, log_p)
    by_group = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (continued, texts.scores))
    _, chosen = jax.lax.scan(choose, jnp.zeros((batch, vocab)), by_group)
    parent, token, scores = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), chosen)
    tokens = jnp.take_along_axis(texts.tokens, parent[..., None], axis=2).at[..., i].set(token)
    offset = jnp.arange(batch * groups).reshape(batch, groups, 1) * beams
    return DiverseBeams(tokens, scores), (offset + parent).reshape(-1)

  def unfinished(loop):
    i, texts, _, _ = loop
    last = texts.tokens[..., i - 1]
    return (i < max_new_tokens) & ~jnp.all(is_stop(last, stop))

  def decode(loop):
    i, texts, rows, progress = loop
    progress = progress._replace(cache=take_rows(progress.cache, rows))
    logits, progress = step(nnx.merge(graphdef, state), progress, texts.tokens[..., i - 1].ravel())
    texts, rows = extend(i, texts, logits)
    return i + 1, texts, rows, progress

  texts, rows = extend(0, beginning, of_beams(logits))
  return jax.lax.while_loop(unfinished, decode, (1, texts, rows, progress))[1]
