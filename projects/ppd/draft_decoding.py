"""Speculative decoding whose draft model is decoded with prompt tokens (section 4.3 of the paper).

The two add up: prompt tokens let the draft model write its K drafts in fewer passes, speculation
lets the target verify them in one. Greedy text is the target's, whatever both guess.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.cache import roll_back
from common.decoding.generation import Sampling, adjust, is_stop, prepare, until_stop
from common.decoding.parallel_prompt import Acceptance, Guesses, one_round, read_prompts
from common.decoding.prompt_tokens import (
  PromptTokens,
  check_prompt_tokens,
  prompt_logits,
  with_prompt_tokens,
)
from common.decoding.prompt_tree import Trees
from common.errors import UserError
from common.models.decoder import Decoder, KVCache

Array = jax.Array


class DraftStatistics(NamedTuple):
  """What a run cost, int32 [batch] each.

  Attributes:
    target_calls: passes of the target, but for its prompt.
    draft_calls: passes of the draft model, but for its prompt.
    accepted: drafts.
  """

  target_calls: Array
  draft_calls: Array
  accepted: Array


def draft_and_verify(
  target: Decoder,
  draft: Decoder,
  prompt_tokens: PromptTokens,
  trees: Trees,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  drafts: int,
  stop_tokens: int | Sequence[int] | None = None,
) -> tuple[list[list[int]], DraftStatistics]:
  """Greedy `generate` of the target.

  Args:
    target, draft: decoders with one vocabulary.
    prompt_tokens, trees: trained on the draft.
    prompts, max_new_tokens, stop_tokens: as of `generate`.
    drafts: K, that the target verifies in a pass.

  Raises:
    UserError: as `generate`; the vocabularies differ; no drafts; prompt tokens of another model.
  """
  if draft.config.vocab_size != target.config.vocab_size:
    raise UserError(
      f"the draft has {draft.config.vocab_size} tokens, the target {target.config.vocab_size}: "
      "expected one vocabulary; take models of one family"
    )
  if drafts < 1:
    raise UserError(f"drafts={drafts}: expected at least 1")
  check_prompt_tokens(draft, prompt_tokens)
  behind = drafts + 3 * len(prompt_tokens.embeddings) + 1
  for model in (target, draft):
    tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens + behind, stop_tokens)
  target_parts = nnx.split(target)
  draft_parts = nnx.split(with_prompt_tokens(draft, prompt_tokens))
  new, statistics = _generate(
    *(target_parts[0], draft_parts[0], target_parts[1], draft_parts[1], prompt_tokens, trees),
    *(tokens, segment_ids, stop, max_new_tokens, drafts),
  )
  return [until_stop(row, stop) for row in np.asarray(new).tolist()], statistics


class _Run(NamedTuple):
  """Between two rounds of a batch.

  Attributes:
    target: cache of all tokens but the last, which is the root of `guesses`.
    new: int32 [batch, max_new_tokens + drafts + 1].
    count, done: int32 and bool [batch].
  """

  target: KVCache
  guesses: Guesses
  new: Array
  count: Array
  done: Array
  statistics: DraftStatistics


@functools.partial(jax.jit, static_argnums=(0, 1, 9, 10))
def _generate(
  target_graph,
  draft_graph,
  target_state,
  draft_state,
  prompt_tokens,
  trees: Trees,
  tokens,
  segment_ids,
  stop,
  max_new_tokens: int,
  drafts: int,
):
  batch, length = tokens.shape
  width = trees.paths.shape[2]
  room = length + max_new_tokens + 2 * (drafts + width) + max(trees.sources.shape[1], width)
  greedy = lambda logits: adjust(logits, Sampling())
  rules = (Acceptance(), prompt_tokens, prompt_logits, greedy)
  key = jax.random.key(0)  # Greedy roots are drawn from one token.
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  model = nnx.merge(target_graph, target_state)
  dtype = model.embed_tokens.embedding.dtype
  cache = KVCache.empty(model.config, batch, room, dtype)
  x, cache = model.run_blocks(tokens, positions, segment_ids, cache)
  first = jnp.argmax(model.head(x[:, -1:])[:, 0], axis=-1).astype(jnp.int32)
  draft = nnx.merge(draft_graph, draft_state)
  guesses = read_prompts(draft, trees, tokens, segment_ids, room, key, *rules)
  zeros = jnp.zeros(batch, jnp.int32)
  start = _Run(
    target=roll_back(cache, jnp.full(batch, length, jnp.int32)),
    guesses=_continue(
      guesses, guesses.cache.length, first, guesses.positions, guesses.root == first
    ),
    new=jnp.full((batch, max_new_tokens + drafts + 1), stop[0], jnp.int32).at[:, 0].set(first),
    count=zeros + 1,
    done=is_stop(first, stop) | (max_new_tokens == 1),
    statistics=DraftStatistics(zeros, zeros, zeros),
  )

  def draft_round(loop):
    guesses, written, count, calls, done = loop
    model = nnx.merge(draft_graph, draft_state)
    skips = done | (count > drafts)
    guesses, emitted = one_round(model, trees, guesses, skips, key, *rules)
    at = jnp.minimum(count, drafts)
    added = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
      written, emitted.tokens, at
    )
    written = jnp.where(skips[:, None], written, added)
    active = (~skips).astype(jnp.int32)
    return guesses, written, count + active * (emitted.accepted + 1), calls + active, done

  def next_round(run: _Run) -> _Run:
    before, root = run.guesses.cache.length, run.guesses.root
    # One token more than is verified: then the draft's cache has all that are.
    buffer = jnp.zeros((batch, drafts + width + 1), jnp.int32)
    guesses, written, count, calls, _ = jax.lax.while_loop(
      lambda loop: jnp.any(~loop[4] & (loop[2] <= drafts)),
      draft_round,
      (run.guesses, buffer, zeros, zeros, run.done),
    )
    column = jnp.arange(drafts + 1)
    logits, cache = nnx.merge(target_graph, target_state)(
      jnp.concatenate([root[:, None], written[:, :drafts]], axis=1),
      positions=run.guesses.positions[:, None] + column,
      segment_ids=jnp.broadcast_to(~run.done[:, None], (batch, drafts + 1)).astype(jnp.int32),
      cache=run.target,
    )
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    agrees = written[:, :drafts] == best[:, :drafts]
    accepted = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1).astype(jnp.int32)
    # Accepted drafts are the target's best tokens, and its next one follows.
    token = jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
    grown = jnp.where(run.done, 0, accepted + 1)
    # If the draft model foresaw that one as well, its guesses still hold.
    holds = (accepted == drafts) & (count == drafts + 1) & (written[:, drafts] == token)
    row_length = run.target.length + grown
    written_at = jnp.minimum(run.count, max_new_tokens)
    new = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
      run.new, best, written_at
    )
    stopped = is_stop(best, stop) & (column <= accepted[:, None])
    total = run.count + grown
    active = (~run.done).astype(jnp.int32)
    return _Run(
      target=roll_back(cache, row_length),
      guesses=_continue(
        guesses,
        before + grown,
        jnp.where(run.done, root, token),
        run.guesses.positions + grown,
        holds | run.done,
      ),
      new=jnp.where(run.done[:, None], run.new, new),
      count=total,
      done=run.done | jnp.any(stopped, axis=1) | (total >= max_new_tokens),
      statistics=DraftStatistics(
        run.statistics.target_calls + active,
        run.statistics.draft_calls + calls,
        run.statistics.accepted + active * accepted,
      ),
    )

  end = jax.lax.while_loop(lambda run: ~jnp.all(run.done), next_round, start)
  return end.new[:, :max_new_tokens], end.statistics


def _continue(guesses: Guesses, length: Array, root: Array, positions: Array, holds: Array):
  """The draft behind the target's token; guesses that do not hold are state 0.

  Args:
    guesses: whose cache has the text before the root, and perhaps more.
    length: of the cache without the rest, int32 [batch].
    root, positions: int32 [batch].
    holds: bool [batch], whether the guesses were made behind the same text.
  """
  return Guesses(
    cache=roll_back(guesses.cache, length),
    root=root,
    candidates=guesses.candidates,
    available=jnp.where(holds, guesses.available, 0),
    positions=positions,
  )
