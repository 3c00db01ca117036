"""Any number of drafting policies on the same decisions, without running the models again.

Speculative decoding draws a draft Y_i ~ q, accepts it with probability min(1, p / q), else takes X_i
from norm(max(p - q, 0)). Read backwards, the same joint distribution is: draw the text X_i ~ p first;
then X_i was the draft and accepted with probability min(1, q(X_i) / p(X_i)); else the draft was
rejected, Y_i ~ norm(max(q - p, 0)). While drafts are accepted they are the text. So one text of the
target with one decision for every position, and what the draft would go on with behind each rejected
token, hold everything that a policy can come to see: every policy is replayed exactly, on common
random numbers, and a position is decided at most once in each replay.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.cache import roll_back, take_rows
from common.decoding.generation import Sampling, adjust
from common.decoding.speculative import Draft, Policy, Statistics
from common.evaluation.log_likelihood import whole_batches
from common.models.decoder import Decoder, KVCache
from projects.specdec_pp.training_data import Texts, run_texts

Array = jax.Array

# Rejected positions that are drafted on from at once.
_BATCH = 1024


class DecisionLog(NamedTuple):
  """Decisions of every position of some texts, and what the draft saw.

  Attributes:
    accepted: whether the draft at this position is, if all of the round before it are,
      bool [rows, seq].
    tokens: the draft at this position, int32 [rows, seq].
    hidden: the draft's state that predicted it, float32 [rows, seq, width].
    after_tokens: drafts behind a rejected one, int32 [rows, seq, max_drafts - 1].
    after_hidden: the states that predicted them, [rows, seq, max_drafts - 1, width]; the first is
      the state at the rejected token itself. Both are 0 where the draft is accepted.
    num_tokens: a row's rounds begin before this position, int32 [rows].
    draft_head: what the draft's logits are a product of, [width, vocab].
  """

  accepted: Array
  tokens: Array
  hidden: Array
  after_tokens: Array
  after_hidden: Array
  num_tokens: Array
  draft_head: Array


def decision_log(
  target: Decoder,
  draft: Decoder,
  texts: Texts,
  *,
  new_tokens: int,
  max_drafts: int,
  key: Array,
  sampling: Sampling,
) -> DecisionLog:
  """Decides every position of texts that the target wrote.

  Args:
    target, draft: decoders with one vocabulary.
    texts: from `continue_prompts`.
    new_tokens: of each text; the last `max_drafts` + 1 are for rounds that began before.
    max_drafts: of a round, at least 2.
    key: of the decisions, the rejected drafts and those behind them.
    sampling: as of the texts.
  """
  decide_key, draft_key = jax.random.split(key)
  draft_graph, draft_state = nnx.split(draft)
  accepted, tokens, hidden, cache, positions = _decide(
    *nnx.split(target),
    draft_graph,
    draft_state,
    *texts,
    decide_key,
    new_tokens,
    max_drafts,
    sampling,
  )
  rows, columns = np.nonzero(~np.asarray(accepted))
  shape = (*accepted.shape, max_drafts - 1)
  after_tokens = np.zeros(shape, np.int32)
  after_hidden = np.zeros((*shape, hidden.shape[-1]), np.float32)
  for i, batch in enumerate(whole_batches(list(zip(rows, columns)), _BATCH)):
    row, column = np.array(batch).T
    after_tokens[row, column], after_hidden[row, column] = _draft_on(
      draft_graph,
      draft_state,
      cache,
      positions[row, column],
      tokens[row, column],
      row,
      column + texts.tokens.shape[1] - new_tokens,
      jax.random.fold_in(draft_key, i),
      max_drafts - 1,
      sampling,
    )
  lengths = texts.segment_ids[:, -new_tokens:].sum(axis=1)
  return DecisionLog(
    accepted,
    tokens,
    hidden,
    jnp.asarray(after_tokens),
    jnp.asarray(after_hidden),
    jnp.minimum(lengths, new_tokens - max_drafts - 1),
    draft.head_kernel,
  )


@functools.partial(jax.jit, static_argnums=(0, 2, 7, 8, 9))
def _decide(
  target_graph,
  target_state,
  draft_graph,
  draft_state,
  tokens,
  segment_ids,
  key,
  new: int,
  max_drafts: int,
  sampling: Sampling,
):
  """Decisions, drafts and states [rows, new], the draft's cache of the texts, and positions."""
  target, draft = nnx.merge(target_graph, target_state), nnx.merge(draft_graph, draft_state)
  predicts = slice(-new - 1, -1)  # The state before a token predicts it.
  target_hidden, _ = run_texts(target, tokens, segment_ids)
  rows, length = tokens.shape
  dtype = draft.embed_tokens.embedding.dtype
  cache = KVCache.empty(draft.config, rows, length + max_drafts, dtype)
  hidden, cache = run_texts(draft, tokens, segment_ids, cache)
  log_p = jax.nn.log_softmax(adjust(target.logits(target_hidden[:, predicts]), sampling))
  log_q = jax.nn.log_softmax(adjust(draft.logits(hidden[:, predicts]), sampling))
  text = tokens[:, -new:]
  of_text = lambda logs: jnp.take_along_axis(logs, text[..., None], axis=-1)[..., 0]
  accept_key, reject_key = jax.random.split(key)
  log_uniform = jnp.log(jax.random.uniform(accept_key, text.shape))
  # Nothing is accepted behind the end of a text.
  accepted = (log_uniform < of_text(log_q) - of_text(log_p)) & (segment_ids[:, -new:] != 0)
  excess = jnp.maximum(jnp.exp(log_q) - jnp.exp(log_p), 0.0)
  # Where p = q nothing is rejected; behind the end of a text anything will do.
  excess = jnp.where(excess.sum(axis=-1, keepdims=True) > 0, excess, jnp.exp(log_q))
  rejected = jax.random.categorical(reject_key, jnp.log(excess))
  drafts = jnp.where(accepted, text, rejected).astype(jnp.int32)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  return accepted, drafts, hidden[:, predicts].astype(jnp.float32), cache, positions[:, -new:]


@functools.partial(jax.jit, static_argnums=(0, 8, 9))
def _draft_on(
  graphdef, state, cache, positions, tokens, rows, slots, key, count: int, sampling: Sampling
):
  """Drafts `count` tokens behind each of some tokens that a text does not have.

  Args:
    graphdef, state: of the draft model.
    cache: of the texts.
    positions, tokens: of those tokens, int32 [n].
    rows, slots: where in the cache each would be, int32 [n].
    key: of the drafts.
    count: of them.
    sampling: how they are drawn.

  Returns:
    int32 [n, count], and the states that predicted them, float32 [n, count, width].
  """
  model = nnx.merge(graphdef, state)
  ones = jnp.ones((len(rows), 1), jnp.int32)

  def step(carry, i):
    token, cache = carry
    x, cache = model.run_blocks(token[:, None], (positions + i)[:, None], ones, cache)
    hidden = model.head_input(x)[:, 0]
    logits = adjust(model.logits(hidden), sampling)
    token = jax.random.categorical(jax.random.fold_in(key, i), logits).astype(jnp.int32)
    return (token, cache), (token, hidden.astype(jnp.float32))

  cache = roll_back(take_rows(cache, rows), slots)
  _, (new, hidden) = jax.lax.scan(step, (tokens, cache), jnp.arange(count))
  return new.swapaxes(0, 1), hidden.swapaxes(0, 1)


def replay(
  log: DecisionLog, policies: Sequence[Policy], *, max_drafts: int, sampling: Sampling
) -> Statistics:
  """What policies with the same functions cost: thresholds or lengths of one kind.

  Args:
    log: of the texts.
    policies: which differ in their state only; their states are alike in shape.
    max_drafts: of a round at most; not more than the log has.
    sampling: of the log.

  Returns:
    int32 [policies, rows] each.
  """
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.state for p in policies))
  functions = policies[0].stop, policies[0].observe
  return _replay(log, _first_rejections(log.accepted), state, *functions, max_drafts, sampling)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _replay(log, first_rejections, state, stop, observe, max_drafts, sampling) -> Statistics:
  row = jnp.arange(len(log.accepted))
  zeros = jnp.zeros(len(row), jnp.int32)

  def one_policy(state):
    def one_round(loop):
      state, begin, statistics = loop
      done = begin >= log.num_tokens
      rejection = first_rejections[row, begin]

      def draft(loop):
        step, state, stopped, lengths = loop
        at = jnp.minimum(begin + step - 1, log.tokens.shape[1] - 1)
        behind = jnp.clip(begin + step - rejection - 2, 0, log.after_tokens.shape[2] - 1)
        on_text = at <= rejection
        token = jnp.where(on_text, log.tokens[row, at], log.after_tokens[row, rejection, behind])
        hidden = jnp.where(
          on_text[:, None], log.hidden[row, at], log.after_hidden[row, rejection, behind]
        )
        lengths = jnp.where(stopped, lengths, step)
        logits = adjust(hidden @ log.draft_head.astype(jnp.float32), sampling)
        state, stop_here = stop(state, Draft(step, token, logits, hidden))
        return step + 1, state, stopped | stop_here, lengths

      _, state, _, lengths = jax.lax.while_loop(
        lambda loop: (loop[0] <= max_drafts) & ~jnp.all(loop[2]),
        draft,
        (jnp.int32(1), state, done, zeros),
      )
      accepted = jnp.minimum(rejection - begin, lengths)
      one = (~done).astype(jnp.int32)
      statistics = Statistics(
        statistics.target_calls + one,
        statistics.drafted + lengths,
        statistics.accepted + one * accepted,
      )
      state = observe(state, lengths, one * accepted)
      return state, begin + one * (accepted + 1), statistics

    start = (state, zeros, Statistics(zeros, zeros, zeros))
    unfinished = lambda loop: jnp.any(loop[1] < log.num_tokens)
    return jax.lax.while_loop(unfinished, one_round, start)[2]

  return jax.vmap(one_policy)(state)


@functools.partial(jax.jit, static_argnames="max_drafts")
def oracle(log: DecisionLog, *, max_drafts: int) -> Statistics:
  """Drafts in every round exactly what will be accepted, none if nothing is: int32 [rows] each."""
  first_rejections, row = _first_rejections(log.accepted), jnp.arange(len(log.accepted))
  zeros = jnp.zeros(len(row), jnp.int32)

  def one_round(loop):
    begin, calls, accepted = loop
    one = (begin < log.num_tokens).astype(jnp.int32)
    run = one * jnp.minimum(first_rejections[row, begin] - begin, max_drafts)
    return begin + one * (run + 1), calls + one, accepted + run

  unfinished = lambda loop: jnp.any(loop[0] < log.num_tokens)
  _, calls, accepted = jax.lax.while_loop(unfinished, one_round, (zeros, zeros, zeros))
  return Statistics(calls, accepted, accepted)


def _first_rejections(accepted: Array) -> Array:
  """The first position at or behind each whose draft is rejected; the last if there is none."""
  last = accepted.shape[1] - 1
  rejected = jnp.where(accepted, last, jnp.arange(last + 1))
  return jax.lax.cummin(rejected, axis=1, reverse=True)


@functools.partial(jax.jit, static_argnames="sampling")
def draft_confidence(log: DecisionLog, *, sampling: Sampling) -> Array:
  """q of every draft that `scored_drafts` has, float32 [rows, seq - 1]."""
  logits = adjust(log.hidden[:, :-1] @ log.draft_head.astype(jnp.float32), sampling)
  chosen = jnp.take_along_axis(logits, log.tokens[:, :-1, None], axis=-1)[..., 0]
  return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def scored_drafts(log: DecisionLog) -> tuple[Array, Array]:
  """The state at every draft as an input, [rows, seq - 1, width], and whether it was accepted."""
  accepted = log.accepted[:, :-1]
  at_draft = jnp.where(accepted[..., None], log.hidden[:, 1:], log.after_hidden[:, :-1, 0])
  return at_draft, accepted
