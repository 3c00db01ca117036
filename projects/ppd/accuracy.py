"""How often the guesses are right, and what any tree makes of that: exact without decoding again.

Greedy text is the model's own whatever is guessed, and guesses behind a token depend on the text up
to it only, not on the tree that verified it. So the ranks of the true tokens at every position of
the greedy text are all that the acceptance of any tree depends on (`replay`).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding.generation import generate, pad_left
from common.decoding.parallel_prompt import Statistics
from common.decoding.prompt_tree import RANKS, Tree
from common.evaluation.log_likelihood import whole_batches
from common.models.decoder import Decoder
from projects.ppd.ppd import read_prefixes
from projects.ppd.training import Student, guesses

Array = jax.Array

# Texts whose prefixes are in memory together.
_TEXTS = 4


class GreedyTexts(NamedTuple):
  """Prompts, padded on the left, and the model's greedy continuations.

  Attributes:
    tokens, segment_ids: int32 [texts, prompt + new].
    new_tokens: generated tokens of each text.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  new_tokens: int


def continue_prompts(
  model: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int
) -> GreedyTexts:
  """Greedy texts of exactly `new_tokens` tokens: no stop token ends one."""
  found = []
  for batch in whole_batches(list(prompts), batch_size):
    found += generate(model, batch, max_new_tokens=new_tokens)
  tokens, segment_ids = pad_left(prompts)
  new = np.array(found[: len(prompts)], np.int32)
  return GreedyTexts(
    np.concatenate([tokens, new], axis=1),
    np.concatenate([segment_ids, np.ones_like(new)], axis=1),
    new_tokens,
  )


def guess_ranks(
  model: Decoder, students: Mapping[str, Student], parameters: dict[str, Any], texts: GreedyTexts
) -> dict[str, np.ndarray]:
  """Ranks of the true tokens among the guesses at every generated token.

  Args:
    model: that wrote the texts.
    students, parameters: by name.
    texts: of m tokens more than are measured.

  Returns:
    By name, int32 [texts, measured, m]: [t, i] is the rank of token t + i + 1 in what P_{i + 1},
    or head i + 1, guesses behind the text before token t. 0 is right.
  """
  (graphdef, state), specs = nnx.split(model), tuple(students.items())
  found = []
  for rows in whole_batches(list(range(len(texts.tokens))), _TEXTS):
    batch = texts.tokens[rows], texts.segment_ids[rows]
    found.append(
      jax.device_get(_ranks(graphdef, specs, state, parameters, *batch, texts.new_tokens))
    )
  count = len(texts.tokens)
  return {name: np.concatenate([part[name] for part in found])[:count] for name in students}


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def _ranks(graphdef, students, state, parameters, tokens, segment_ids, new_tokens):
  model, students = nnx.merge(graphdef, state), dict(students)
  distances = jax.tree.leaves(parameters)[0].shape[0]
  measured = new_tokens - distances
  first = tokens.shape[1] - new_tokens
  at = jnp.broadcast_to(first + jnp.arange(measured), (len(tokens), measured))
  room = distances * max(s.ensemble for s in students.values())
  prefixes = read_prefixes(model, tokens, segment_ids, at, room)
  ahead = at[..., None] + 1 + jnp.arange(distances)
  targets = jax.vmap(lambda row, slots: row[slots])(tokens, ahead).reshape(-1, distances)

  def rank(name):
    logits = guesses(model, students[name], parameters[name], prefixes)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return jnp.sum(logits > of_target, axis=-1, dtype=jnp.int32).reshape(*at.shape, distances)

  return {name: rank(name) for name in students}


def rank_frequencies(ranks: np.ndarray) -> np.ndarray:
  """a[i, r]: how often the token at distance i + 2 has rank r, [m, RANKS]. Top-n is a sum of them.

  Args:
    ranks: of `guess_ranks`, [..., m].
  """
  flat = ranks.reshape(-1, ranks.shape[-1])
  return np.stack([(flat == r).mean(0) for r in range(RANKS)], axis=1)


def replay(ranks: np.ndarray, sets: Sequence[Sequence[Tree]], *, nodes: int) -> list[Statistics]:
  """What decoding the texts with each set of trees costs.

  Args:
    ranks: of the texts, int32 [texts, measured, m]; the first token comes with the prompt.
    sets: trees of states 0, ..., m; a tree's prompts are the state behind each node.
    nodes: that all trees are padded to: as many sets of as many nodes share a compilation.

  Returns:
    As the engine counts, int32 [texts, m + 1].
  """
  tables = [_children(trees, nodes) for trees in sets]
  children, states = (jnp.asarray(np.stack(x)) for x in zip(*tables))
  found = jax.device_get(_replay(jnp.asarray(ranks), children, states))
  return [Statistics(*(x[i] for x in found)) for i in range(len(sets))]


def _children(trees: Sequence[Tree], nodes: int) -> tuple[np.ndarray, np.ndarray]:
  """Node behind each node by rank, int32 [m + 1, nodes, RANKS + 1], -1 for none; n_v of each."""
  children = np.full((len(trees), nodes, RANKS + 1), -1, np.int32)
  states = np.zeros((len(trees), nodes), np.int32)
  for k, tree in enumerate(trees):
    index = {path: i for i, path in enumerate(sorted(tree, key=len))}
    for path, i in index.items():
      states[k, i] = tree[path]
      if path:
        children[k, index[path[:-1]], path[-1]] = i
  return children, states


@jax.jit
def _replay(ranks, children, states):
  """accepted and states, int32 [sets, texts, m + 1] each."""
  measured, distances = ranks.shape[1:]
  capped = jnp.minimum(ranks, RANKS)  # A token that was not guessed is no node's.

  def row(ranks, children, states):
    def one_round(carry, _):
      t, k, accepted, counts = carry
      active = t < measured

      def down(i, walk):
        node, depth = walk
        child = children[k, node, ranks[jnp.minimum(t, measured - 1), i]]
        stops = (child < 0) | (depth < i)
        return jnp.where(stops, node, child), jnp.where(stops, depth, depth + 1)

      node, depth = jax.lax.fori_loop(0, distances, down, (jnp.int32(0), jnp.int32(0)))
      accepted = accepted.at[depth].add(active.astype(jnp.int32))
      counts = counts.at[k].add(active.astype(jnp.int32))
      return (t + depth + 1, states[k, node], accepted, counts), None

    none = jnp.zeros(distances + 1, jnp.int32)
    start = (jnp.int32(0), jnp.int32(distances), none, none)
    (_, _, accepted, counts), _ = jax.lax.scan(one_round, start, length=measured)
    return accepted, counts

  rows = jax.vmap(row, in_axes=(0, None, None))
  return jax.vmap(rows, in_axes=(None, 0, 0))(capped, children, states)
