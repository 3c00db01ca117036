"""Parallel prompt decoding: trained prompt tokens guess ahead, a tree verifies in the same pass.

Chen et al. (2024), arXiv 2405.18628. Behind the last verified token (the root) and behind every
candidate of a tree stands a chain of prompt tokens P_1, ..., P_n. P_i guesses the token at distance
i + 1, so that the pass that verifies a tree has the guesses behind whichever node it accepts. A
row that has the guesses of k prompt tokens is in state k, and takes the tree of that state, whose
candidates are at depths 1 to k. The keys and values of prompts and rejected candidates are dropped,
and text never attends to them: greedy text is the model's own, whatever the prompts guess.

With `propose` in place of the prompt tokens' logits the same engine serves heads on the root's
hidden state (Medusa, Cai et al. 2024).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.cache import keep_slots, roll_back
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
from common.decoding.prompt_tokens import (
  PromptTokens,
  check_prompt_tokens,
  prompt_logits,
  with_prompt_tokens,
)
from common.decoding.prompt_tree import RANKS, Trees
from common.errors import UserError
from common.models.decoder import Decoder, KVCache

Array = jax.Array


# (model, parameters, hidden state at the last accepted token [batch, width], at the EPTs behind it
# [batch, m, e, width]) -> logits of the tokens at distances 2 to m + 1, [batch, m, vocab].
Propose = Callable[[Decoder, Any, Array, Array], Array]


class Acceptance(NamedTuple):
  """Typical acceptance: a candidate passes if p(token) > min(epsilon, alpha exp(-H(p))).

  A greedy choice has all the probability on one token, and the rule is equality with it.

  Attributes:
    epsilon: posterior threshold.
    alpha: at most 1.
  """

  epsilon: float | Array = 0.09
  alpha: float | Array = 0.3


class Guesses(NamedTuple):
  """A row between two rounds.

  Attributes:
    cache: of all tokens but the root, with a length for each row.
    root: int32 [batch], the last token of the text.
    candidates: int32 [batch, m, RANKS], for the tokens behind the root, best first.
    available: int32 [batch], k: candidates at distances 1 to k are meant.
    positions: int32 [batch], of the root.
  """

  cache: KVCache
  root: Array
  candidates: Array
  available: Array
  positions: Array


class Emitted(NamedTuple):
  """What a round gave each row.

  Attributes:
    tokens: int32 [batch, m + 1], of which the first `accepted` + 1 are meant; the last of them is
      the new root.
    accepted: int32 [batch], candidates.
    logits: the model's, as it gave them, that each of the tokens was chosen from, float32
      [batch, m + 1, vocab].
  """

  tokens: Array
  accepted: Array
  logits: Array


class Statistics(NamedTuple):
  """Rounds of each row, int32 [batch, m + 1] each; a round is a pass of the model.

  Attributes:
    accepted: rounds that accepted 0, ..., m candidates.
    states: rounds that began in state 0, ..., m.
  """

  accepted: Array
  states: Array

  @property
  def passes(self) -> Array:
    """int32 [batch], without that of the prompt."""
    return self.accepted.sum(-1)

  @property
  def acceptance_length(self) -> float:
    """tau: tokens of a pass, over all rows; a pass without an accepted candidate has 1."""
    per_round = jnp.arange(1, self.accepted.shape[-1] + 1)
    return float((self.accepted * per_round).sum() / self.accepted.sum())

  @property
  def acceptance_rates(self) -> np.ndarray:
    """Share of passes that accept a candidate at distance 1, ..., m, [m]."""
    rounds = np.asarray(self.accepted).reshape(-1, self.accepted.shape[-1]).sum(0)
    return rounds[::-1].cumsum()[::-1][1:] / rounds.sum()


def typical_threshold(log_p: Array, acceptance: Acceptance) -> Array:
  """min(epsilon, alpha exp(-H)), [...]. log_p: [..., vocab]; -inf is a probability of 0."""
  p = jnp.exp(log_p)
  entropy = -jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, log_p, 0.0), 0.0), axis=-1)
  return jnp.minimum(acceptance.epsilon, acceptance.alpha * jnp.exp(-entropy))


def verify_tree(
  tokens: Array,
  log_p: Array,
  parents: Array,
  ancestors: Array,
  depths: Array,
  acceptance: Acceptance,
) -> tuple[Array, Array]:
  """The accepted node of every row: the deepest, of equally deep ones the most likely path.

  Args:
    tokens: of the nodes, int32 [batch, nodes]; the root is node 0.
    log_p: of the token behind each node, [batch, nodes, vocab].
    parents: int32 [batch, nodes]; -1 for what is no node.
    ancestors: bool [batch, nodes, nodes], which nodes are on a node's path, itself included.
    depths: int32 [batch, nodes].
    acceptance: the rule.

  Returns:
    int32 [batch] each: the node, and its depth, which is the number of accepted candidates.
  """
  row = jnp.arange(len(tokens))[:, None]
  parent = jnp.maximum(parents, 0)
  # The root follows from no node of the tree and was accepted before.
  is_root = jnp.arange(tokens.shape[1]) == 0
  of_token = jnp.where(is_root, 0.0, log_p[row, parent, tokens])
  threshold = jnp.take_along_axis(typical_threshold(log_p, acceptance), parent, axis=1)
  passes = is_root | ((parents >= 0) & (jnp.exp(of_token) > threshold))
  accepted = jnp.all(passes[:, None] | ~ancestors, axis=-1) & (is_root | (parents >= 0))
  depth = jnp.where(accepted, depths, -1)
  deepest = depth.max(axis=1)
  likelihood = jnp.sum(jnp.where(ancestors, of_token[:, None], 0.0), axis=-1)
  likelihood = jnp.where(depth == deepest[:, None], likelihood, -jnp.inf)
  return jnp.argmax(likelihood, axis=1).astype(jnp.int32), deepest


def next_root(key: Array, log_p: Array, acceptance: Acceptance) -> Array:
  """A token of each row, int32 [batch], from the part of p that typical acceptance would pass."""
  threshold = typical_threshold(log_p, acceptance)[:, None]
  return categorical(key, jnp.where(jnp.exp(log_p) < threshold, -jnp.inf, log_p))


def read_prompts(
  model: Decoder,
  trees: Trees,
  tokens: Array,
  segment_ids: Array,
  room: int,
  key: Array,
  acceptance: Acceptance,
  parameters: Any,
  propose: Propose,
  adjusted: Callable[[Array], Array],
) -> Guesses:
  """Reads prompts with a chain of prompt tokens behind each; the first token is the root.

  Args:
    model: with prompt tokens, if the trees have any.
    trees: see `Trees`.
    tokens, segment_ids: int32 [batch, seq], padded on the left.
    room: slots of the cache.
    key: of the roots.
    acceptance, parameters, propose, adjusted: see `one_round`.
  """
  batch, length = tokens.shape
  distances, ensemble = trees.prompt_slots.shape[2:]
  prompts = distances * ensemble
  ids = model.config.vocab_size + jnp.arange(prompts)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  behind = positions[:, -1:] + 1 + jnp.arange(prompts) // max(ensemble, 1)
  join = lambda text, rest: jnp.concatenate(
    [text, jnp.broadcast_to(rest, (batch, prompts)).astype(jnp.int32)], axis=1
  )
  mask = jnp.ones((1, length + prompts, length + prompts), bool)
  mask = mask.at[:, length:, length:].set(trees.chain)
  dtype = model.embed_tokens.embedding.dtype
  x, cache = model.run_blocks(
    join(tokens, ids),
    join(positions, behind),
    join(segment_ids, 1),
    KVCache.empty(model.config, batch, room, dtype),
    mask,
  )
  hidden = model.head_input(x[:, length - 1 :])
  text, rest = hidden[:, 0], hidden[:, 1:].reshape(batch, distances, ensemble, hidden.shape[-1])
  log_p = jax.nn.log_softmax(adjusted(model.logits(text)))
  return Guesses(
    cache=roll_back(cache, jnp.full(batch, length, jnp.int32)),
    root=next_root(key, log_p, acceptance),
    candidates=_candidates(propose(model, parameters, text, rest)),
    available=jnp.full(batch, distances, jnp.int32),
    positions=positions[:, -1] + 1,
  )


def one_round(
  model: Decoder,
  trees: Trees,
  guesses: Guesses,
  done: Array,
  key: Array,
  acceptance: Acceptance,
  parameters: Any,
  propose: Propose,
  adjusted: Callable[[Array], Array],
) -> tuple[Guesses, Emitted]:
  """Verifies a tree of candidates and guesses anew, in one pass.

  Args:
    model: with prompt tokens, if the trees have any.
    trees: see `Trees`.
    guesses: before the round; the cache has room for the inputs of a tree.
    done: bool [batch], rows that take no part: they stay as they are.
    key: of the new roots; one, or one for each row, [batch].
    acceptance: which candidates pass.
    parameters: of `propose`.
    propose: see `Propose`; `prompt_logits` with `PromptTokens`.
    adjusted: logits [batch, ..., vocab] -> what tokens are chosen from (`generation.adjust`).
  """
  batch, nodes = len(done), trees.parents.shape[1]
  tree = jax.tree.map(lambda x: x[guesses.available], trees._replace(chain=None))
  # The tokens that a tree is made of: the root, the candidates by distance and rank, the prompts.
  prompts = trees.chain.shape[0]
  ids = jnp.broadcast_to(model.config.vocab_size + jnp.arange(prompts), (batch, prompts))
  parts = [guesses.root[:, None], guesses.candidates.reshape(batch, -1), ids]
  source = jnp.maximum(tree.sources, 0)
  tokens = jnp.take_along_axis(jnp.concatenate(parts, axis=1), source, axis=1)
  start = guesses.cache.length
  x, cache = model.run_blocks(
    tokens,
    guesses.positions[:, None] + tree.depths,
    ((tree.sources >= 0) & ~done[:, None]).astype(jnp.int32),
    guesses.cache,
    tree.mask,
  )
  hidden = model.head_input(x)
  logits = model.logits(hidden[:, :nodes])
  log_p = jax.nn.log_softmax(adjusted(logits))
  best, accepted = verify_tree(
    tokens[:, :nodes],
    log_p,
    tree.parents,
    tree.mask[:, :nodes, :nodes],
    tree.depths[:, :nodes],
    acceptance,
  )
  accepted = jnp.where(done, 0, accepted)
  row = jnp.arange(batch)
  path = tree.paths[row, best]
  root = next_root(key, log_p[row, best], acceptance)
  kept = jnp.take_along_axis(tokens, path, axis=1)[:, 1:]
  column = jnp.arange(path.shape[1])
  emitted = jnp.pad(kept, ((0, 0), (0, 1)))
  emitted = jnp.where(column == accepted[:, None], root[:, None], emitted)
  chains = tree.prompt_slots[row, best]
  rest = jax.vmap(lambda states, slots: states[slots])(hidden, chains)
  grown = jnp.where(done, 0, accepted + 1)
  stays = lambda old, new: jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), old, new)
  after = Guesses(
    cache=keep_slots(cache, start, start[:, None] + path, grown),
    root=stays(guesses.root, root),
    candidates=stays(
      guesses.candidates, _candidates(propose(model, parameters, hidden[row, best], rest))
    ),
    available=stays(guesses.available, tree.available[row, best]),
    positions=guesses.positions + grown,
  )
  # Nodes are the first inputs, so that a path of inputs is one of nodes.
  return after, Emitted(emitted, accepted, logits[row[:, None], path])


def _candidates(logits: Array) -> Array:
  return jax.lax.top_k(logits, RANKS)[1].astype(jnp.int32)


def parallel_prompt_generate(
  model: Decoder,
  prompt_tokens: PromptTokens,
  trees: Trees,
  prompts: Sequence[Sequence[int]],
  **options,
) -> tuple[list[list[int]], Statistics]:
  """`generation.generate`, with trained prompt tokens that guess ahead.

  Args:
    model: a decoder, quantized or not.
    prompt_tokens: trained on it.
    trees: for as many prompt tokens and EPTs, see `prompt_tree.tree_tables`.
    prompts, options: as of `tree_generate`.

  Raises:
    UserError: as `tree_generate`; prompt tokens that do not fit the model or the trees.
  """
  check_prompt_tokens(model, prompt_tokens)
  distances, ensemble, _ = prompt_tokens.embeddings.shape
  if trees.prompt_slots.shape[2:] != (distances, ensemble):
    raise UserError(
      f"the trees have {trees.prompt_slots.shape[2:]} prompt tokens and EPTs, the prompt tokens "
      f"{(distances, ensemble)}: build the trees for these prompt tokens"
    )
  prompted = with_prompt_tokens(model, prompt_tokens)
  return tree_generate(
    prompted, trees, prompts, parameters=prompt_tokens, propose=prompt_logits, **options
  )


def tree_generate(
  model: Decoder,
  trees: Trees,
  prompts: Sequence[Sequence[int]],
  *,
  parameters: Any,
  propose: Propose,
  max_new_tokens: int,
  key: Array | None = None,
  sampling: Sampling | None = None,
  acceptance: Acceptance | None = None,
  stop_tokens: int | Sequence[int] | None = None,
) -> tuple[list[list[int]], Statistics]:
  """Generation with a tree of candidates in every pass. Greedy text is that of `generate`.

  Args:
    model: a decoder, with prompt tokens if the trees have any.
    trees: see `Trees`.
    prompts, max_new_tokens, key, stop_tokens: as of `generate`.
    parameters, propose: see `Propose`.
    sampling: greedy by default; otherwise candidates and roots are those of typical acceptance,
      which is not the model's own distribution.
    acceptance: its numbers.

  Returns:
    The new tokens of each row, and what they cost.

  Raises:
    UserError: as `generate`; the architecture or the vocabulary is not supported.
    ValueError: sampling without a key.
  """
  sampling, key = sampling_and_key(sampling, key)
  scaling = model.config.rope_scaling
  if scaling is not None and scaling.kind == "dynamic":
    raise UserError(
      "rope_scaling 'dynamic' depends on the longest position of a pass, candidates included: "
      "expected a model with another scaling"
    )
  if model.config.vocab_size < RANKS:
    raise UserError(f"the model has {model.config.vocab_size} tokens, expected at least {RANKS}")
  acceptance = acceptance or Acceptance()
  if not (0 < acceptance.alpha <= 1 and 0 < acceptance.epsilon <= 1):
    raise UserError(f"{acceptance}: expected epsilon and alpha in (0, 1]")
  # A chain behind the deepest candidate of the last round reaches twice the distance.
  distances = trees.prompt_slots.shape[2]
  tokens, segment_ids, stop = prepare(model, prompts, max_new_tokens + 2 * distances, stop_tokens)
  graphdef, state = nnx.split(model)
  numbers = Acceptance(*map(jnp.float32, acceptance))
  new, statistics = _tree_generate(
    graphdef,
    state,
    trees,
    tokens,
    segment_ids,
    key,
    stop,
    parameters,
    numbers,
    propose,
    max_new_tokens,
    sampling,
  )
  return [until_stop(row, stop) for row in np.asarray(new).tolist()], statistics


class _Run(NamedTuple):
  """Between two rounds of a batch. new: int32 [batch, max_new_tokens + m + 1]."""

  guesses: Guesses
  new: Array
  count: Array
  done: Array
  statistics: Statistics


@functools.partial(jax.jit, static_argnums=(0, 9, 10, 11))
def _tree_generate(
  graphdef,
  state,
  trees: Trees,
  tokens,
  segment_ids,
  key,
  stop,
  parameters,
  acceptance: Acceptance,
  propose: Propose,
  max_new_tokens: int,
  sampling: Sampling,
):
  batch, length = tokens.shape
  width = trees.paths.shape[2]  # m + 1
  # The last round begins with a token missing and may accept m; then it writes no more.
  inputs = max(trees.sources.shape[1], trees.chain.shape[0])
  room = length + max_new_tokens + width + inputs
  rules = (acceptance, parameters, propose, lambda logits: adjust(logits, sampling))
  guesses = read_prompts(
    nnx.merge(graphdef, state), trees, tokens, segment_ids, room, fold_in(key, 0), *rules
  )
  new = jnp.full((batch, max_new_tokens + width), stop[0], jnp.int32).at[:, 0].set(guesses.root)
  none = jnp.zeros((batch, width), jnp.int32)
  start = _Run(
    guesses,
    new,
    jnp.ones(batch, jnp.int32),
    is_stop(guesses.root, stop) | (max_new_tokens == 1),
    Statistics(none, none),
  )

  def next_round(loop):
    i, run = loop
    states = jax.nn.one_hot(run.guesses.available, width, dtype=jnp.int32)
    guesses, emitted = one_round(
      nnx.merge(graphdef, state), trees, run.guesses, run.done, fold_in(key, i), *rules
    )
    # The buffer has room for a whole round behind the last token that is wanted.
    at = jnp.minimum(run.count, max_new_tokens)
    written = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
      run.new, emitted.tokens, at
    )
    count = run.count + jnp.where(run.done, 0, emitted.accepted + 1)
    stopped = is_stop(emitted.tokens, stop) & (jnp.arange(width) <= emitted.accepted[:, None])
    counted = (~run.done).astype(jnp.int32)[:, None]
    lengths = jax.nn.one_hot(emitted.accepted, width, dtype=jnp.int32)
    return i + 1, _Run(
      guesses,
      jnp.where(run.done[:, None], run.new, written),
      count,
      run.done | jnp.any(stopped, axis=1) | (count >= max_new_tokens),
      Statistics(
        run.statistics.accepted + counted * lengths, run.statistics.states + counted * states
      ),
    )

  unfinished = lambda loop: ~jnp.all(loop[1].done)
  _, end = jax.lax.while_loop(unfinished, next_round, (jnp.int32(1), start))
  return end.new[:, :max_new_tokens], end.statistics
