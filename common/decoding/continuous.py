"""Continuous batching: the rows of one batch start and end at different times (Orca, Yu et al. 2022).

The batch has a fixed number of slots, each a row of the KV cache with a length, a last token and a
sampling of its own. New prompts are read packed, several in a row, and moved into free slots
(`admit`); then all slots go on together, a few tokens (`decode`), a round of drafts (`speculate`) or
a tree of candidates (`verify_trees`) at a time. Only the shape of the packed rows changes, so that there are few compilations; which
request is in which slot is known to the host alone.

As in prepacked prefill (`prepacking.py`), the last token of a text is never in the cache: it opens the next step.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.decoding import parallel_prompt, speculative
from common.decoding.cache import append, length_of, roll_back
from common.decoding.generation import RowSampling, adjust_rows, categorical, fold_in
from common.decoding.parallel_prompt import Acceptance, Guesses
from common.decoding.prepacking import PackedPrompts, read_packed
from common.decoding.prompt_tokens import PromptTokens, prompt_logits
from common.decoding.prompt_tree import RANKS, Trees
from common.decoding.pruned_cache import (
  Compression,
  Observed,
  PrunedCache,
  compress,
  observe,
  pruned_slots,
)
from common.decoding.speculative import Pair, Stop, one_round
from common.models.decoder import Decoder, KVCache

Array = jax.Array

# Slot 0 of every row stays empty: a draft model reads the last two tokens again, and a text of one
# token has none before it.
FIRST_SLOT = 1


class Slots(NamedTuple):
  """The batch between two steps.

  Attributes:
    pair: caches, last two tokens and position of each row; without a draft model its cache is None.
    keys: [slots], constant over a request: its randomness depends on the position alone, and so not
      on what else is in the batch.
    sampling: of each row.
    candidates, available: of parallel-prompt decoding, as in `parallel_prompt.Guesses`; None without.
  """

  pair: Pair
  keys: Array
  sampling: RowSampling
  candidates: Array | None = None
  available: Array | None = None


class NewTokens(NamedTuple):
  """What a step gave.

  Attributes:
    tokens: int32 [slots, n], of which the first `counts` are meant.
    counts: int32 [slots]; 0 for rows that take no part.
    log_probs: of the tokens under the model's own distribution, before any adjustment, float32
      [slots, n].
    top_tokens, top_log_probs: the most likely ones, int32 and float32 [slots, n, top].
    accepted: int32 [slots], drafts among the tokens.
    drafted: int32 [slots].
    all_log_probs: of the whole vocabulary after temperature, before the bias, for the first token;
      float32 [slots, vocab].
  """

  tokens: Array
  counts: Array
  log_probs: Array
  top_tokens: Array
  top_log_probs: Array
  accepted: Array
  drafted: Array
  all_log_probs: Array


class Pruning(NamedTuple):
  """The caches of prompts are made smaller (`pruned_cache.py`), each as it comes. Hashable.

  Attributes:
    compression: how; without quantization, whose buffer all rows would have to empty at once.
    prompt_room: tokens of a prompt at most.
    new_tokens: for which every row has room.
  """

  compression: Compression
  prompt_room: int
  new_tokens: int


def empty_slots(
  model: Decoder,
  count: int,
  max_length: int,
  draft: Decoder | None = None,
  pruning: Pruning | None = None,
  trees: Trees | None = None,
) -> Slots:
  """Slots with room for texts of `max_length` tokens, written over by one step more.

  With pruning the model's cache has the room that it says instead; with trees the rows have
  candidates, which are drafts of another kind.
  """
  candidates = available = None
  if trees is not None:
    candidates = jnp.zeros((count, trees.prompt_slots.shape[2], RANKS), jnp.int32)
    available = jnp.zeros(count, jnp.int32)

  def cache(model):
    dtype = model.embed_tokens.embedding.dtype
    empty = KVCache.empty(model.config, count, FIRST_SLOT + max_length, dtype)
    return roll_back(empty, jnp.full(count, FIRST_SLOT, jnp.int32))

  return Slots(
    pair=Pair(
      target=cache(model) if pruning is None else _empty_pruned(model, count, pruning),
      draft=None if draft is None else cache(draft),
      last=jnp.zeros((count, 2), jnp.int32),
      positions=jnp.zeros(count, jnp.int32),
    ),
    keys=jax.random.split(jax.random.key(0), count),
    sampling=RowSampling(jnp.zeros(count), jnp.zeros(count, jnp.int32), jnp.ones(count)),
    candidates=candidates,
    available=available,
  )


def _empty_pruned(model: Decoder, count: int, pruning: Pruning) -> PrunedCache:
  graphdef, state = nnx.split(model)

  def one(state):
    ids = jnp.zeros((count, pruning.prompt_room), jnp.int32)
    observed = observe(nnx.merge(graphdef, state), ids, ids)
    return compress(observed, ids, pruning.compression, pruning.new_tokens)

  shapes = jax.eval_shape(one, state)
  cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  pruned = pruned_slots(_kept_tokens(pruning), pruning.compression)
  full = jnp.full(count, _kept_tokens(pruning) - pruned, jnp.int32)
  return dataclasses.replace(cache, length=jnp.int32(pruned), full_length=full)


def _kept_tokens(pruning: Pruning) -> int:
  """Slots of a prompt that eviction leaves."""
  compression = pruning.compression
  evicts = compression.evict is not None and compression.capacity < pruning.prompt_room
  return compression.capacity if evicts else pruning.prompt_room


class NewTexts(NamedTuple):
  """What goes into free slots with its prompts; arrays as long as there are slots, [slots].

  Attributes:
    at: int32, the slot of each prompt.
    last: int32 [slots, 2], the prompts' last two tokens.
    keys: of their randomness.
    sampling: of each.
  """

  at: Array
  last: Array
  keys: Array
  sampling: RowSampling


@functools.partial(jax.jit, static_argnums=(0, 2, 8), donate_argnums=4)
def admit(
  target_graph,
  target_state,
  draft_graph,
  draft_state,
  slots: Slots,
  packed: PackedPrompts,
  texts: NewTexts,
  count: Array,
  pruning: Pruning | None = None,
) -> Slots:
  """Reads packed prompts in one pass, and moves them into free slots.

  It compiles once for a shape of the packed rows, whatever the number of prompts.

  Args:
    target_graph, target_state, draft_graph, draft_state: the models; None without a draft.
    slots: its buffers are taken over.
    packed: prompts without their last tokens; those that say where each is are as long as `texts`.
    texts: what belongs to them.
    count: int32 [], how many of them are meant.
    pruning: of the model's cache, as of `empty_slots`.
  """
  starts = jnp.argmax(
    packed.segment_ids[packed.prompt_rows] == packed.prompt_segments[:, None], axis=1
  )
  width = packed.tokens.shape[1]
  behind = jnp.arange(width)

  def put_cache(graph, state, old: KVCache) -> KVCache:
    read = read_packed(nnx.merge(graph, state), packed)

    def put(i, old: KVCache) -> KVCache:
      row, start, at, length = (
        x[i] for x in (packed.prompt_rows, starts, texts.at, packed.lengths)
      )
      # What follows the prompt in its row, or comes round from the front, is not attended to.
      piece = lambda x: jnp.roll(x[row], -start, axis=-2)[None]
      write = lambda old, new: jax.lax.dynamic_update_slice(
        old, piece(new).astype(old.dtype), (at, 0, FIRST_SLOT, 0)
      )
      segment_ids = jnp.zeros(old.segment_ids.shape[1], jnp.int32)
      segment_ids = segment_ids.at[FIRST_SLOT : FIRST_SLOT + width].set(behind < length)
      here = (at, slice(FIRST_SLOT, FIRST_SLOT + width))
      return KVCache(
        keys=[write(*pair) for pair in zip(old.keys, read.keys)],
        values=[write(*pair) for pair in zip(old.values, read.values)],
        positions=old.positions.at[here].set(behind),
        segment_ids=old.segment_ids.at[at].set(segment_ids),
        length=old.length.at[at].set(FIRST_SLOT + length),
      )

    return jax.lax.fori_loop(0, count, put, old)

  def put_pruned(old: PrunedCache) -> PrunedCache:
    model = nnx.merge(target_graph, target_state)
    observed = observe(model, packed.tokens, packed.segment_ids, packed.positions)
    missing = pruning.prompt_room - width

    def put(i, old: PrunedCache) -> PrunedCache:
      row, start, at, length = (
        x[i] for x in (packed.prompt_rows, starts, texts.at, packed.lengths)
      )

      def at_the_end(x):
        """A prompt's part of a packed row, padded on the left with what does not count."""
        wide = jnp.pad(x[row], ((0, 0), (missing, 0), (0, 0)))
        return jnp.roll(wide, width - start - length, axis=1)[None]

      one = Observed(None, *([at_the_end(x) for x in part] for part in observed[1:]))
      valid = jnp.arange(pruning.prompt_room) >= pruning.prompt_room - length
      ids = valid.astype(jnp.int32)[None]
      new = compress(one, ids, pruning.compression, pruning.new_tokens)
      write = lambda old, new: old.at[at].set(new[0].astype(old.dtype))
      fields = ("keys", "values", "channels", "full_keys", "full_values")
      parts = {f: jax.tree.map(write, getattr(old, f), getattr(new, f)) for f in fields}
      return dataclasses.replace(
        old,
        **parts,
        starts=write(old.starts, new.starts),
        full_length=old.full_length.at[at].set(new.full_length),
      )

    return jax.lax.fori_loop(0, count, put, old)

  # Rows that are not meant are out of range.
  at = jnp.where(jnp.arange(len(texts.at)) < count, texts.at, len(texts.at))
  put = lambda old, new: old.at[at].set(new, mode="drop")
  pair = slots.pair
  return Slots(
    pair=Pair(
      target=put_pruned(pair.target)
      if pruning is not None
      else put_cache(target_graph, target_state, pair.target),
      draft=None if pair.draft is None else put_cache(draft_graph, draft_state, pair.draft),
      last=put(pair.last, texts.last),
      positions=put(pair.positions, packed.lengths),
    ),
    keys=put(slots.keys, texts.keys),
    sampling=RowSampling(*map(put, slots.sampling, texts.sampling)),
    candidates=slots.candidates,
    # A row's first pass is its root and the prompt tokens behind it.
    available=None if slots.available is None else slots.available.at[at].set(0, mode="drop"),
  )


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def decode(
  graphdef, state, slots: Slots, active: Array, bias: Array | None, steps: int, top: int
) -> tuple[Slots, NewTokens]:
  """Some tokens for every active row.

  Args:
    graphdef, state: of a decoder.
    slots: its buffers are taken over.
    active: bool [slots]; the others stay as they are.
    bias: float32 [slots, vocab] added to the logits of the sampling; -inf forbids a token. It stays
      the same: where a row's depends on the text, `steps` must be 1.
    steps: tokens of each row.
    top: most likely tokens to report.
  """
  model = nnx.merge(graphdef, state)
  one = active.astype(jnp.int32)

  def step(slots: Slots, _):
    pair = slots.pair
    x, cache = append(pair.target, model, pair.last[:, 1:], pair.positions[:, None], one[:, None])
    logits = model.head(x)[:, 0]
    biased = logits if bias is None else logits + bias
    key = fold_in(slots.keys, pair.positions)
    token = categorical(key, adjust_rows(biased, slots.sampling))
    last = jnp.stack([pair.last[:, 1], token], axis=1)
    after = Pair(
      target=roll_back(cache, length_of(pair.target) + one),
      draft=pair.draft,
      last=jnp.where(active[:, None], last, pair.last),
      positions=pair.positions + one,
    )
    tempered = logits / _temperature(slots.sampling)
    return slots._replace(pair=after), (token, *_scores(logits, token, top), tempered)

  slots, (tokens, log_probs, top_tokens, top_log_probs, tempered) = jax.lax.scan(
    step, slots, length=steps
  )
  by_slot = lambda x: jnp.moveaxis(x, 0, 1)
  return slots, NewTokens(
    tokens=by_slot(tokens),
    counts=one * steps,
    log_probs=by_slot(log_probs),
    top_tokens=by_slot(top_tokens),
    top_log_probs=by_slot(top_log_probs),
    accepted=jnp.zeros_like(one),
    drafted=jnp.zeros_like(one),
    all_log_probs=jax.nn.log_softmax(tempered[0]),
  )


@functools.partial(jax.jit, static_argnums=(0, 2, 9, 10, 11), donate_argnums=4)
def speculate(
  target_graph,
  target_state,
  draft_graph,
  draft_state,
  slots: Slots,
  active: Array,
  bias: Array | None,
  limit: Array,
  policy: Any,
  stop_drafting: Stop,
  max_drafts: int,
  top: int,
) -> tuple[Slots, NewTokens]:
  """A round of drafts and its verification for every active row.

  Args:
    target_graph, target_state, draft_graph, draft_state: the models.
    slots, active, top: as of `decode`.
    bias: as of `decode`, added to both models' logits. Rows whose bias depends on the text need a
      limit of 0.
    limit: int32 [slots], a row's drafts at most.
    policy, stop_drafting: see `speculative.Policy`; the state is not carried over rounds.
    max_drafts: at most.
  """

  def adjusted(logits):
    if bias is not None:
      logits = logits + bias.reshape(len(bias), *(1,) * (logits.ndim - 2), -1)
    return adjust_rows(logits, slots.sampling)

  key = fold_in(slots.keys, slots.pair.positions)
  pair, emitted, _ = one_round(
    nnx.merge(target_graph, target_state),
    nnx.merge(draft_graph, draft_state),
    slots.pair,
    ~active,
    (fold_in(key, 0), fold_in(key, 1)),
    policy,
    stop_drafting,
    max_drafts,
    adjusted,
    limit,
  )
  return slots._replace(pair=pair), _of_round(emitted, emitted.drafted, active, slots.sampling, top)


@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=2)
def verify_trees(
  graphdef,
  state,
  slots: Slots,
  active: Array,
  bias: Array | None,
  limit: Array,
  trees: Trees,
  prompt_tokens: PromptTokens,
  top: int,
) -> tuple[Slots, NewTokens]:
  """A pass of parallel-prompt decoding for every active row.

  A token is drawn at every node of the tree, and a candidate is accepted where it is the token that
  was drawn at its parent. So texts have the model's own distribution; they are those of `decode`, as a
  token's key depends on its position alone.

  Args:
    graphdef, state: of a decoder with prompt tokens (`with_prompt_tokens`).
    slots, active, top: as of `decode`.
    bias, limit: as of `speculate`; a limit of 0 leaves out the candidates.
    trees, prompt_tokens: see `parallel_prompt`.
  """
  nodes = trees.parents.shape[1]
  available = jnp.where(limit > 0, slots.available, 0)
  depths = trees.depths[available][:, :nodes]

  def drawn(logits):
    """All the probability of each node on one token, [slots, nodes, vocab]."""
    if bias is not None:
      logits = logits + bias[:, None]
    chosen_from = adjust_rows(logits, slots.sampling)
    tokens = jax.vmap(
      lambda logits, depth: categorical(fold_in(slots.keys, slots.pair.positions + depth), logits),
      in_axes=1,
      out_axes=1,
    )(chosen_from, depths)
    return jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], 0.0, -jnp.inf)

  pair = slots.pair
  guesses = Guesses(pair.target, pair.last[:, 1], slots.candidates, available, pair.positions)
  drafts = jnp.sum(trees.parents[available] >= 0, axis=1)
  after, emitted = parallel_prompt.one_round(
    nnx.merge(graphdef, state),
    trees,
    guesses,
    ~active,
    slots.keys,
    Acceptance(0.5, 0.5),  # Any below 1: probabilities are 0 and 1.
    prompt_tokens,
    prompt_logits,
    drawn,
  )
  before = jnp.concatenate([pair.last[:, 1:], emitted.tokens], axis=1)
  before = jnp.take_along_axis(before, emitted.accepted[:, None], axis=1)[:, 0]
  last = jnp.where(active[:, None], jnp.stack([before, after.root], axis=1), pair.last)
  slots = slots._replace(
    pair=Pair(after.cache, None, last, after.positions),
    candidates=after.candidates,
    available=after.available,
  )
  return slots, _of_round(emitted, drafts, active, slots.sampling, top)


def _of_round(
  emitted: speculative.Emitted | parallel_prompt.Emitted,
  drafted: Array,
  active: Array,
  sampling: RowSampling,
  top: int,
) -> NewTokens:
  log_probs, top_tokens, top_log_probs = _scores(emitted.logits, emitted.tokens, top)
  return NewTokens(
    tokens=emitted.tokens,
    counts=jnp.where(active, emitted.accepted + 1, 0),
    log_probs=log_probs,
    top_tokens=top_tokens,
    top_log_probs=top_log_probs,
    accepted=jnp.where(active, emitted.accepted, 0),
    drafted=jnp.where(active, drafted, 0),
    all_log_probs=jax.nn.log_softmax(emitted.logits[:, 0] / _temperature(sampling)),
  )


def _temperature(sampling: RowSampling) -> Array:
  """[slots, 1]; of a greedy row that of the model itself."""
  return jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]


def _scores(logits: Array, tokens: Array, top: int) -> tuple[Array, Array, Array]:
  """Log-probabilities of the tokens [...], and of the `top` most likely ones [..., top]."""
  logs = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]
  top_log_probs, top_tokens = jax.lax.top_k(logs, top)
  return chosen, top_tokens.astype(jnp.int32), top_log_probs
