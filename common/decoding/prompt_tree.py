"""Trees of candidates and prompt tokens as gather tables, and their file.

A tree is a dict {path: prompts}: a path is the ranks of a candidate and of its ancestors, () the
root; `prompts` is the length of the chain of prompt tokens behind it. The inputs of a pass are the
nodes, root first, and then the chains, node by node.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from common.errors import UserError

Array = jax.Array
Tree = Mapping[tuple[int, ...], int]
ChainMask = Literal["ensemble", "decoder", "encoder"]

# Candidates at each distance.
RANKS = 10


class Trees(NamedTuple):
  """One tree for every state k = 0, ..., m, padded to `inputs` tokens and `nodes` nodes.

  Attributes:
    sources: what each input is, int32 [m + 1, inputs]: 0 the root, 1 + RANKS (depth - 1) + rank a
      candidate, 1 + RANKS m + e i + j EPT j of P_{i + 1}, -1 padding.
    depths: of each input behind the root, in positions, int32 [m + 1, inputs].
    mask: bool [m + 1, inputs, inputs], which inputs each of them may attend to.
    parents: int32 [m + 1, nodes]; -1 for the root and for padding.
    paths: inputs from the root to each node, int32 [m + 1, nodes, m + 1]; the rest repeats it.
    available: the state after a node is accepted, int32 [m + 1, nodes].
    prompt_slots: inputs of the chain behind each node, int32 [m + 1, nodes, m, e]; 0 if not there.
    chain: bool [m e, m e], the mask inside a whole chain.
  """

  sources: Array
  depths: Array
  mask: Array
  parents: Array
  paths: Array
  available: Array
  prompt_slots: Array
  chain: Array


def chain_mask(distances: int, ensemble: int, kind: ChainMask) -> np.ndarray:
  """Which EPTs of a chain attend to which, bool [m e, m e]; row i e + j is EPT j of P_{i + 1}.

  Args:
    distances: m.
    ensemble: e.
    kind: `ensemble`, EPT j to EPT j of this and earlier prompt tokens; `decoder`, to all EPTs before
      it; `encoder`, to the EPTs of its own prompt token.
  """
  token, member = np.divmod(np.arange(distances * ensemble), max(ensemble, 1))
  rules = {
    "ensemble": (member[:, None] == member) & (token[:, None] >= token),
    "decoder": np.tri(len(token), dtype=bool),
    "encoder": token[:, None] == token,
  }
  if kind not in rules:
    raise UserError(f"mask {kind!r}: expected one of {', '.join(rules)}")
  return rules[kind]


def inputs_of(tree: Tree, ensemble: int = 1) -> int:
  """Tokens of a pass with this tree."""
  return len(tree) + ensemble * sum(tree.values())


def tree_tables(
  trees: Sequence[Tree],
  *,
  ensemble: int = 1,
  kind: ChainMask = "ensemble",
  size: int | None = None,
  nodes: int | None = None,
) -> Trees:
  """Tables of the trees of states 0, ..., m.

  Args:
    trees: tree k has paths of length k at most, each with its prefixes; m is their number less one.
    ensemble: e; 0 for a decoder without prompt tokens.
    kind: of the mask inside a chain.
    size, nodes: inputs and nodes that all trees are padded to, by default those of the largest;
      sets of trees of one size and as many nodes share a compilation.

  Raises:
    ValueError: a path without its prefix, too long or with a rank that there is not; a chain longer
      than m; a tree larger than `size` or `nodes`.
  """
  distances = len(trees) - 1
  for state, tree in enumerate(trees):
    _check(tree, state, distances)
  inputs = max(inputs_of(tree, ensemble) for tree in trees)
  if size is not None and inputs > size:
    raise ValueError(f"a tree has {inputs} inputs, more than size={size}")
  most = max(map(len, trees))
  if nodes is not None and most > nodes:
    raise ValueError(f"a tree has {most} nodes, more than nodes={nodes}")
  inputs, nodes = size or inputs, nodes or most
  chain = chain_mask(distances, ensemble, kind)
  tables = [_table(tree, distances, ensemble, chain, inputs, nodes) for tree in trees]
  stacked = [jnp.asarray(np.stack(arrays)) for arrays in zip(*tables)]
  return Trees(*stacked, chain=jnp.asarray(chain))


def _check(tree: Tree, state: int, distances: int) -> None:
  if () not in tree:
    raise ValueError(f"the tree of state {state} has no root ()")
  for path, prompts in tree.items():
    if len(path) > state or path[:-1] not in tree or not all(0 <= r < RANKS for r in path):
      raise ValueError(f"path {path} of state {state}: expected its prefix and ranks below {RANKS}")
    if not 0 <= prompts <= distances:
      raise ValueError(f"path {path} has {prompts} prompt tokens, expected 0 to {distances}")


def _table(tree: Tree, distances: int, ensemble: int, chain: np.ndarray, inputs: int, nodes: int):
  """The fields of `Trees` but the last, for one state."""
  order = sorted(tree, key=lambda path: (len(path), path))
  index = {path: i for i, path in enumerate(order)}
  sources = np.full(inputs, -1, np.int32)
  depths = np.zeros(inputs, np.int32)
  mask = np.eye(inputs, dtype=bool)  # Padding sees itself: a row of nothing would be no softmax.
  parents = np.full(nodes, -1, np.int32)
  paths = np.zeros((nodes, distances + 1), np.int32)
  available = np.zeros(nodes, np.int32)
  slots = np.zeros((nodes, distances, ensemble), np.int32)
  end = len(order)
  for i, path in enumerate(order):
    depth = len(path)
    ancestors = [index[path[:n]] for n in range(depth + 1)]
    sources[i] = 1 + RANKS * (depth - 1) + path[-1] if path else 0
    depths[i] = depth
    mask[i, ancestors] = True
    parents[i] = index[path[:-1]] if path else -1
    paths[i] = ancestors + [i] * (distances - depth)
    available[i] = tree[path]
    count = tree[path] * ensemble
    behind = np.arange(end, end + count)
    which = np.arange(count)
    sources[behind] = 1 + RANKS * distances + which
    depths[behind] = depth + 1 + which // max(ensemble, 1)
    mask[np.ix_(behind, ancestors)] = True
    mask[np.ix_(behind, behind)] = chain[:count, :count]
    slots[i, : tree[path]] = behind.reshape(-1, ensemble) if count else 0
    end += count
  return sources, depths, mask, parents, paths, available, slots


def save_prompts(path: pathlib.Path, prompt_tokens: NamedTuple, trees: Trees) -> None:
  """Writes trained prompt tokens and their trees as one safetensors file."""
  arrays = {f"prompt_tokens.{k}": v for k, v in prompt_tokens._asdict().items()}
  arrays |= {f"trees.{k}": v for k, v in trees._asdict().items()}
  save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)


def load_prompts(path: str | pathlib.Path) -> tuple[dict[str, Array], Trees]:
  """Reads a file of `save_prompts`.

  Returns:
    The fields of `PromptTokens`, and the trees.

  Raises:
    UserError: it cannot be read, lacks an array, or has arrays that do not belong together.
  """
  try:
    arrays = load_file(pathlib.Path(path).expanduser())
  except Exception as e:  # The library raises its own errors besides those of files.
    raise UserError(
      f"cannot read the prompt tokens {path}: {e}; expected a file of save_prompts"
    ) from None
  names = [f"prompt_tokens.{n}" for n in ("embeddings", "bias", "gate")]
  for name in [*names, *(f"trees.{n}" for n in Trees._fields)]:
    if name not in arrays:
      raise UserError(f"{path} has no {name}: expected a file of save_prompts")
  for name in names:
    if not np.isfinite(arrays[name]).all():
      raise UserError(f"{path}: {name} has NaN or infinite values: train the prompt tokens again")
  trees = Trees(*(arrays[f"trees.{n}"] for n in Trees._fields))
  embeddings = arrays[names[0]]
  shapes_fit = (
    embeddings.ndim == 3
    and trees.prompt_slots.ndim == 4
    and trees.prompt_slots.shape[2:] == embeddings.shape[:2]
    and trees.mask.shape == (*trees.sources.shape, trees.sources.shape[-1])
    and trees.paths.shape == (*trees.parents.shape, embeddings.shape[0] + 1)
    and len(trees.chain) == embeddings.shape[0] * embeddings.shape[1]
  )
  if not shapes_fit:
    raise UserError(f"{path}: trees and prompt tokens do not belong together: write them anew")
  fields = {name.partition(".")[2]: jnp.asarray(arrays[name]) for name in names}
  return fields, Trees(*map(jnp.asarray, trees))
