"""Speculative decoding: a draft model proposes tokens, the target model verifies them in one pass.

Leviathan et al. (2023), Chen et al. (2023): of drafts y_1, ..., y_K from q, y_i is accepted with
probability min(1, p_i(y_i) / q_i(y_i)) while all before it are; at the first rejection a token from
norm(max(p_i - q_i, 0)) takes its place, and if all are accepted one from p_{K+1} follows. The tokens
are distributed as the target's own. A greedy choice is a distribution with all mass on one token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.cache import append, length_of, roll_back
from common.decoding.generation import (
  Sampling,
  adjust,
  categorical,
  fold_in,
  is_stop,
  prepare,
  sampling_and_key,
  until_stop,
)
from common.errors import UserError
from common.models.decoder import Decoder, KVCache

Array = jax.Array


def verify(
  drafts: Array,
  draft_logits: Array,
  target_logits: Array,
  lengths: Array,
  key: Array,
) -> tuple[Array, Array]:
  """Accepts drafts so that the tokens follow the target's distribution exactly.

  Args:
    drafts: int32 [batch, K].
    draft_logits: what they were sampled from, adjusted (`generation.adjust`), [batch, K, vocab].
    target_logits: the target's, adjusted, at each draft and behind the last, [batch, K + 1, vocab].
    lengths: int32 [batch], drafts of each row, at most K.
    key: of the decisions; one, or one for each row, [batch].

  Returns:
    int32 [batch]: how many drafts are accepted, and the token that follows them.
  """
  count = drafts.shape[1]
  p, q = jax.nn.log_softmax(target_logits), jax.nn.log_softmax(draft_logits)
  of_draft = lambda logs: jnp.take_along_axis(logs, drafts[..., None], axis=-1)[..., 0]
  accept_key, token_key = _split(key)
  # log u < log p - log q; a draft that q could not have made is not there to be accepted.
  ratio = of_draft(p[:, :count]) - of_draft(q)
  accepted = jnp.log(_uniform(accept_key, drafts.shape)) < ratio
  accepted &= jnp.arange(count) < lengths[:, None]
  number = jnp.sum(jnp.cumprod(accepted, axis=1), axis=1).astype(jnp.int32)
  row = jnp.arange(len(drafts))
  behind = jnp.exp(p[row, number])
  # A row whose drafts are all accepted takes a token from p itself, as if q were 0.
  rejected = jnp.exp(q[row, jnp.minimum(number, count - 1)])
  rejected = jnp.where((number < lengths)[:, None], rejected, 0.0)
  rest = jnp.maximum(behind - rejected, 0.0)
  # p = q up to rounding leaves nothing, and was rejected by rounding alone.
  rest = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, behind)
  return number, categorical(token_key, jnp.log(rest))


class Draft(NamedTuple):
  """What a policy sees of the token that was just drafted.

  Attributes:
    step: int32 [], 1 for the first token of a round.
    token: int32 [batch].
    logits: that it was sampled from, adjusted, float32 [batch, vocab].
    hidden: the draft model's last hidden state (behind its final norm) at the token before it, the
      input that predicted it, [batch, width].
  """

  step: Array
  token: Array
  logits: Array
  hidden: Array


# (state, draft) -> (state, which rows stop drafting, bool [batch]), and (state, drafts of each row,
# accepted of each row) -> state, after the verification of a round.
Stop = Callable[[Any, Draft], tuple[Any, Array]]
Observe = Callable[[Any, Array, Array], Any]


class Policy(NamedTuple):
  """When to stop drafting. Hashable functions: they are static under jit.

  Attributes:
    stop: called for every drafted token.
    observe: called after every round.
    state: what both start from, a pytree; parameters of a learned policy are in it.
  """

  stop: Stop
  observe: Observe = lambda state, drafts, accepted: state
  state: Any = ()


def constant(length: int) -> Policy:
  """Always `length` drafts."""
  return Policy(_stop_at, state=jnp.int32(length))


def _stop_at(length, draft):
  return length, jnp.broadcast_to(draft.step >= length, draft.token.shape)


class Statistics(NamedTuple):
  """What a run cost, int32 [batch] each.

  Attributes:
    target_calls: passes of the target model in which the row took part, but for its prompt.
    drafted: tokens, as many as passes of the draft model.
    accepted: of them.
  """

  target_calls: Array
  drafted: Array
  accepted: Array


def speculative_generate(
  target: Decoder,
  draft: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  policy: Policy,
  max_drafts: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
  stop_tokens: int | Sequence[int] | None = None,
) -> tuple[list[list[int]], Statistics]:
  """`generation.generate` of the target, faster where the draft is good.

  Args:
    target, draft: decoders with one vocabulary, quantized or not.
    prompts, max_new_tokens, key, sampling, stop_tokens: as of `generate`.
    policy: when a round of drafts ends.
    max_drafts: of a round at most, whatever the policy says.

  Returns:
    The new tokens of each row, and what they cost.

  Raises:
    UserError: as `generate`; the vocabularies differ; `max_drafts` is not positive.
    ValueError: sampling without a key.
  """
  sampling, key = sampling_and_key(sampling, key)
  if draft.config.vocab_size != target.config.vocab_size:
    raise UserError(
      f"the draft model has {draft.config.vocab_size} tokens, the target {target.config.vocab_size}; "
      "speculative decoding needs one vocabulary"
    )
  if max_drafts < 1:
    raise UserError(f"max_drafts={max_drafts} must be positive")
  # The last round may write so many tokens more than are wanted.
  for model in (target, draft):
    tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens + max_drafts, stop_tokens)
  (target_graph, target_state), (draft_graph, draft_state) = nnx.split(target), nnx.split(draft)
  new, counts = _speculative(
    target_graph,
    target_state,
    draft_graph,
    draft_state,
    tokens,
    segment_ids,
    key,
    stop,
    policy.state,
    policy.stop,
    policy.observe,
    max_new_tokens,
    max_drafts,
    sampling,
  )
  return [until_stop(row, stop) for row in np.asarray(new).tolist()], counts


class Pair(NamedTuple):
  """Both models between two rounds.

  Attributes:
    target: cache of all tokens but the last.
    draft: a `KVCache` of the same, which may lack one more.
    last: int32 [batch, 2], the last two tokens, neither of which the draft's pass relies on.
    positions: int32 [batch], of the last token.
  """

  target: Any
  draft: KVCache
  last: Array
  positions: Array


class Emitted(NamedTuple):
  """What a round gave each row.

  Attributes:
    tokens: int32 [batch, max_drafts + 1], of which the first `accepted` + 1 are meant.
    accepted: int32 [batch], drafts among them.
    drafted: int32 [batch].
    logits: the target's, as it gave them, float32 [batch, max_drafts + 1, vocab].
  """

  tokens: Array
  accepted: Array
  drafted: Array
  logits: Array


def one_round(
  target: Decoder,
  draft: Decoder,
  pair: Pair,
  done: Array,
  keys: tuple[Array, Array],
  policy: Any,
  stop_drafting: Stop,
  max_drafts: int,
  adjusted: Callable[[Array], Array],
  limit: Array | None = None,
) -> tuple[Pair, Emitted, Any]:
  """Drafts, verifies, and rolls both caches back to what is accepted.

  The target reads as many tokens as the longest row needs, rounded up to a width that there is a
  pass for (`verification_widths`).

  Args:
    target, draft: the models.
    pair: before the round; both caches have a length for each row and room for max_drafts + 1.
    done: bool [batch], rows that take no part: they stay as they are.
    keys: of the drafts and of their verification; each one, or one for each row, [batch].
    policy: state of the policy.
    stop_drafting: `Policy.stop`.
    max_drafts: at most.
    adjusted: logits [batch, ..., vocab] -> what tokens are sampled from (`generation.adjust`).
    limit: int32 [batch], a row's drafts at most; 0 makes its round an ordinary step.

  Returns:
    The pair after the round, what it gave, and the policy's state after drafting.
  """
  draft_key, verify_key = keys
  drafted = _draft(draft, pair, done, policy, stop_drafting, max_drafts, draft_key, adjusted, limit)
  lengths = drafted.lengths if limit is None else jnp.minimum(drafted.lengths, limit)
  lengths = jnp.where(done, 0, lengths)
  column = jnp.arange(max_drafts + 1)
  # A row's unused drafts are padding.
  used = (column <= lengths[:, None]) & ~done[:, None]
  tokens = jnp.concatenate([pair.last[:, 1:], drafted.tokens], axis=1)
  positions = pair.positions[:, None] + column

  def read(width: int, _, state):
    logits, cache = state
    ids = (a[:, :width] for a in (tokens, positions, used.astype(jnp.int32)))
    x, cache = append(cache, target, *ids)
    return logits.at[:, :width].set(target.head(x)), cache

  # Without a limit every row has a draft.
  widths = [w for w in verification_widths(max_drafts) if w > 1 or limit is not None]
  narrowest = jnp.sum(jnp.array(widths[:-1], jnp.int32) <= lengths.max())
  logits = jnp.zeros((*tokens.shape, target.config.vocab_size), jnp.float32)
  cache = pair.target
  for i, width in enumerate(widths):
    # A loop of one turn or none writes the cache in place; a branch would copy all of it.
    turns = (narrowest == i).astype(jnp.int32)
    logits, cache = jax.lax.fori_loop(0, turns, functools.partial(read, width), (logits, cache))
  accepted, token = verify(drafted.tokens, drafted.logits, adjusted(logits), lengths, verify_key)
  emitted = jnp.where(column == accepted[:, None], token[:, None], _pad(drafted.tokens))
  grown = jnp.where(done, 0, accepted + 1)
  before = jnp.take_along_axis(
    jnp.concatenate([pair.last[:, 1:], emitted], axis=1), accepted[:, None], axis=1
  )
  last = jnp.concatenate([before, token[:, None]], axis=1)
  after = Pair(
    target=roll_back(cache, length_of(pair.target) + grown),
    draft=roll_back(drafted.cache, pair.draft.length + grown),
    last=jnp.where(done[:, None], pair.last, last),
    positions=pair.positions + grown,
  )
  return after, Emitted(emitted, accepted, lengths, logits), drafted.policy


def verification_widths(max_drafts: int) -> list[int]:
  """Tokens of a target's pass: 1, ..., max_drafts + 1, each about twice the one before.

  A pass costs more with every token where it is not bound by reading the weights, and every width
  is compiled.
  """
  widths = [max_drafts + 1]
  while widths[-1] > 1:
    widths.append((widths[-1] + 1) // 2)
  return widths[::-1]


class _Run(NamedTuple):
  """Between two rounds of a batch.

  Attributes:
    new: int32 [batch, max_new_tokens + max_drafts + 1].
    count: int32 [batch], how many of them there are.
    done: bool [batch].
  """

  pair: Pair
  new: Array
  count: Array
  done: Array
  key: Array
  policy: Any
  statistics: Statistics


@functools.partial(jax.jit, static_argnums=(0, 2, 9, 10, 11, 12, 13))
def _speculative(
  target_graph,
  target_state,
  draft_graph,
  draft_state,
  tokens,
  segment_ids,
  key,
  stop,
  policy_state,
  stop_drafting,
  observe,
  max_new_tokens: int,
  max_drafts: int,
  sampling: Sampling,
):
  batch, length = tokens.shape
  room = length + max_new_tokens + max_drafts + 2
  target_model = lambda: nnx.merge(target_graph, target_state)
  draft_model = lambda: nnx.merge(draft_graph, draft_state)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)

  def read_prompt(model):
    dtype = model.embed_tokens.embedding.dtype
    cache = KVCache.empty(model.config, batch, room, dtype)
    # Only the keys and values of the prompt are wanted; its last token opens the first round.
    _, cache = model.run_blocks(tokens, positions, segment_ids, cache)
    return roll_back(cache, jnp.full(batch, length - 1, jnp.int32))

  zeros = jnp.zeros(batch, jnp.int32)
  start = _Run(
    pair=Pair(
      target=read_prompt(target_model()),
      draft=read_prompt(draft_model()),
      last=tokens[:, -2:],
      positions=positions[:, -1],
    ),
    new=jnp.full((batch, max_new_tokens + max_drafts + 1), stop[0], jnp.int32),
    count=zeros,
    done=jnp.zeros(batch, bool),
    key=key,
    policy=policy_state,
    statistics=Statistics(zeros, zeros, zeros),
  )

  def next_round(run: _Run) -> _Run:
    key, *keys = jax.random.split(run.key, 3)
    pair, emitted, policy = one_round(
      target_model(),
      draft_model(),
      run.pair,
      run.done,
      keys,
      run.policy,
      stop_drafting,
      max_drafts,
      lambda logits: adjust(logits, sampling),
    )
    tokens, accepted, drafted, _ = emitted
    # The buffer has room for a whole round behind the last token that is wanted.
    written = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
      run.new, tokens, jnp.minimum(run.count, max_new_tokens)
    )
    count = run.count + jnp.where(run.done, 0, accepted + 1)
    stopped = is_stop(tokens, stop) & (jnp.arange(max_drafts + 1) <= accepted[:, None])
    calls, all_drafted, all_accepted = run.statistics
    return _Run(
      pair=pair,
      new=jnp.where(run.done[:, None], run.new, written),
      count=count,
      done=run.done | jnp.any(stopped, axis=1) | (count >= max_new_tokens),
      key=key,
      policy=observe(policy, drafted, accepted),
      statistics=Statistics(
        calls + (~run.done).astype(jnp.int32),
        all_drafted + drafted,
        all_accepted + jnp.where(run.done, 0, accepted),
      ),
    )

  end = jax.lax.while_loop(lambda run: ~jnp.all(run.done), next_round, start)
  return end.new[:, :max_new_tokens], end.statistics


class _Drafted(NamedTuple):
  tokens: Array  # int32 [batch, max_drafts]
  logits: Array  # float32 [batch, max_drafts, vocab]
  lengths: Array  # int32 [batch]
  cache: KVCache
  policy: Any


def _draft(
  model: Decoder,
  pair: Pair,
  done: Array,
  policy: Any,
  stop_drafting: Stop,
  max_drafts: int,
  key: Array,
  adjusted: Callable[[Array], Array],
  limit: Array | None,
) -> _Drafted:
  """Drafts until every row has stopped. A row that stopped goes on, and its tokens are not meant."""
  batch, vocab = len(done), model.config.vocab_size

  def propose(i, hidden, stopped, policy, tokens, logits):
    """One token from the hidden state of the one before it."""
    chosen_from = adjusted(model.logits(hidden))
    token = categorical(fold_in(key, i), chosen_from)
    policy, stop = stop_drafting(policy, Draft(i + 1, token, chosen_from, hidden))
    stop = stop if limit is None else stop | (i + 1 >= limit)
    tokens, logits = tokens.at[:, i].set(token), logits.at[:, i].set(chosen_from)
    return token, stopped | stop, policy, tokens, logits

  # After a round whose drafts were all accepted the draft's cache lacks the last of them: the first
  # pass reads two tokens, of which the first is mostly there already and is written again.
  cache = roll_back(pair.draft, pair.draft.length - 1)
  # A text of one token has padding before it.
  alone = pair.positions == 0
  segments = jnp.ones((batch, 2), jnp.int32).at[:, 0].set(jnp.where(alone, 0, 1))
  positions = jnp.maximum(pair.positions[:, None] + jnp.array([-1, 0]), 0)
  hidden, cache = _hidden(model, pair.last, positions, segments, cache)
  tokens = jnp.zeros((batch, max_drafts), jnp.int32)
  logits = jnp.zeros((batch, max_drafts, vocab), jnp.float32)
  first = propose(0, hidden, done, policy, tokens, logits)

  def unfinished(loop):
    i, (_, stopped, *_), _, _ = loop
    return (i < max_drafts) & ~jnp.all(stopped)

  def step(loop):
    i, (token, stopped, policy, tokens, logits), lengths, cache = loop
    segments = (~stopped).astype(jnp.int32)[:, None]
    positions = (pair.positions + i)[:, None]
    hidden, cache = _hidden(model, token[:, None], positions, segments, cache)
    lengths = jnp.where(stopped, lengths, i + 1)
    proposed = propose(i, hidden, stopped, policy, tokens, logits)
    return i + 1, proposed, lengths, cache

  ones = jnp.ones(batch, jnp.int32)
  _, (_, _, policy, tokens, logits), lengths, cache = jax.lax.while_loop(
    unfinished, step, (jnp.int32(1), first, ones, cache)
  )
  return _Drafted(tokens, logits, lengths, cache, policy)


def _hidden(model, tokens, positions, segments, cache) -> tuple[Array, KVCache]:
  """The last token's hidden state behind the final norm, [batch, width]."""
  x, cache = model.run_blocks(tokens, positions, segments, cache)
  return model.head_input(x[:, -1:])[:, 0], cache


def _pad(tokens: Array) -> Array:
  return jnp.pad(tokens, ((0, 0), (0, 1)))


def _split(key: Array) -> tuple[Array, Array]:
  if key.ndim:
    pairs = jax.vmap(jax.random.split)(key)
    return pairs[:, 0], pairs[:, 1]
  first, second = jax.random.split(key)
  return first, second


def _uniform(key: Array, shape: tuple[int, int]) -> Array:
  if key.ndim:
    return jax.vmap(lambda k: jax.random.uniform(k, shape[1:]))(key)
  return jax.random.uniform(key, shape)
