"""What sampling has learned of the future: a trie of the prefixes sampled so far.

A node u is a prefix of tokens behind the prompt. c~(u) is an upper bound of its expected future
grammaticality c(u), the probability that the model, left alone, completes it to a text of the
grammar (within the room there is):

    c~(u) = 1 for a prefix not yet looked behind;  1 for a text (its last token is EOS);
            0 for a prefix cut off by the limit of tokens, which is no text here;
            sum over the allowed next tokens a of P(a | u) c~(ua) for all others.

Of the allowed tokens that were never chosen at u only the sum of probabilities is kept: c~ is 1
behind each of them. So the trie has a node for each token sampled, whatever the vocabulary.
Probabilities are kept as logarithms.
"""

import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from common.errors import UserError

# How far up what a sample tells is brought: to the root (ASAp); or no node at all is told of its
# children's c~, so that c~ is the probability of the allowed next tokens, of every node of the
# sample ("none") or of the last one only ("last"; others keep c~ = 1).
Propagation = Literal["root", "none", "last"]

_FIELDS = ("parent", "token", "log_p", "log_success", "log_rest", "visits")


class Node:
  """A prefix.

  Attributes:
    log_p: log P(last token | prefix before it) under the model without masks.
    log_success: log c~.
    log_rest: log of the probability of allowed next tokens that are no children; None until the
      node is looked behind.
    children: of the tokens chosen here so far.
    visits: samples that chose its last token.
  """

  __slots__ = ("log_p", "log_success", "log_rest", "children", "visits")

  def __init__(self, log_p: float = 0.0):
    self.log_p = log_p
    self.log_success = 0.0
    self.log_rest: float | None = None
    self.children: dict[int, Node] = {}
    self.visits = 0


class Statistics(NamedTuple):
  """What a trie has seen.

  Attributes:
    nodes: prefixes.
    texts: different texts sampled.
    explored_mass: their probability under the model.
    success: c~ of the empty prefix, which bounds the probability of all texts.
  """

  nodes: int
  texts: int
  explored_mass: float
  success: float


class Trie:
  """The prefixes sampled behind one prompt under one grammar.

  Attributes:
    root: the empty prefix.
    eos: the token that ends a text.
    max_nodes: beyond as many, the least visited subtrees are collapsed to their c~. They are
      explored anew when they are sampled again, while the c~ that they had stays a bound: every
      c~ stays above c and never rises.
  """

  def __init__(self, eos: int, max_nodes: int = 1_000_000):
    """Raises UserError if there is no room for a node."""
    if max_nodes < 1:
      raise UserError(f"max_nodes={max_nodes}: expected at least one")
    self.root, self.eos, self.max_nodes = Node(), eos, max_nodes
    self.num_nodes = 1

  def insert(self, node: Node, token: int, log_p: np.ndarray, allowed: np.ndarray) -> Node:
    """The child of a node for a token chosen there for the first time.

    Args:
      node: looked behind or not.
      token: allowed.
      log_p: float [vocab], of the tokens behind the node.
      allowed: bool [vocab].
    """
    child = node.children[token] = Node(float(log_p[token]))
    self.num_nodes += 1
    rest = allowed.copy()
    rest[list(node.children)] = False
    node.log_rest = _log_sum(log_p[rest])
    return child

  def update(self, path: list[Node], propagation: Propagation = "root") -> None:
    """Learns from a sample, once all of it is inserted.

    Args:
      path: from the root to EOS, or to the prefix that was cut off.
      propagation: see `Propagation`.
    """
    for node in path:
      node.visits += 1
    inner = {"root": path[-2::-1], "none": path[:-1], "last": path[-2:-1]}[propagation]
    for node in inner:
      below = [
        c.log_p + (c.log_success if propagation == "root" else 0.0) for c in node.children.values()
      ]
      # Rounding, and what collapsed subtrees knew, must not raise it.
      node.log_success = min(node.log_success, _log_sum(np.array([node.log_rest, *below])))
    if self.num_nodes > self.max_nodes:
      self._collapse()

  def statistics(self) -> Statistics:
    texts, mass = 0, 0.0
    pending = [(self.root, 0.0)]
    while pending:
      node, log_p = pending.pop()
      for token, child in node.children.items():
        total = log_p + child.log_p
        if token == self.eos:
          texts, mass = texts + 1, mass + np.exp(total)
        pending.append((child, total))
    return Statistics(self.num_nodes, texts, float(mass), float(np.exp(self.root.log_success)))

  def _collapse(self) -> None:
    """Drops the children of rarely visited nodes until half of the nodes are left.

    No node is visited more often than its parent, so that one bound of visits cuts whole subtrees.
    """
    inner = [node for node in _nodes(self.root) if node.log_rest is not None]
    children = np.array([len(node.children) for node in inner])
    visits = np.array([node.visits for node in inner])
    order = np.argsort(-visits, kind="stable")
    kept = np.searchsorted(np.cumsum(children[order]), self.max_nodes // 2)
    bound = visits[order[min(kept, len(order) - 1)]]
    for node in inner:
      if node.visits <= bound:
        # As if it had not been looked behind, but for its c~.
        node.children, node.log_rest = {}, None
    self.num_nodes = sum(1 for _ in _nodes(self.root))

  def save(self, path: pathlib.Path, identity: str) -> None:
    """Writes the trie, whole or not at all.

    Args:
      path: of an .npz file.
      identity: names the model, prompt, grammar and limit of tokens, to be given to `load`.
    """
    columns = {name: [] for name in _FIELDS}
    pending = [(self.root, -1, -1)]
    while pending:
      node, parent, token = pending.pop()
      index = len(columns["parent"])
      rest = np.nan if node.log_rest is None else node.log_rest
      row = (parent, token, node.log_p, node.log_success, rest, node.visits)
      for name, value in zip(_FIELDS, row):
        columns[name].append(value)
      # The last one is taken first: children come back in their order.
      pending += [(child, index, t) for t, child in reversed(node.children.items())]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
      with part.open("wb") as file:
        np.savez_compressed(
          file, identity=identity, eos=self.eos, max_nodes=self.max_nodes, **columns
        )
      os.replace(part, path)
    finally:
      part.unlink(missing_ok=True)

  @classmethod
  def load(cls, path: pathlib.Path, identity: str) -> "Trie":
    """Reads a trie.

    Raises:
      UserError: the file cannot be read, lacks a field, is of another model, prompt or grammar, or
        has NaN or infinite numbers where there can be none.
    """
    try:
      with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
      raise UserError(f"cannot read the trie {path}: {e}; delete it to begin anew") from None
    if missing := {*_FIELDS, "identity", "eos", "max_nodes"} - arrays.keys():
      raise UserError(f"{path} is no trie: it lacks {', '.join(sorted(missing))}")
    if str(arrays["identity"]) != identity:
      raise UserError(
        f"{path} was sampled for {arrays['identity']}, not {identity}: give its own, or begin anew"
      )
    for name in ("log_p", "log_success", "log_rest"):
      wrong = arrays[name] > 1e-6 if name == "log_rest" else ~(arrays[name] <= 1e-6)
      if wrong.any():
        raise UserError(
          f"{path}: {name} has NaN or is above 0; expected logarithms of probabilities"
        )
    trie = cls(int(arrays["eos"]), int(arrays["max_nodes"]))
    nodes: list[Node] = []
    for parent, token, log_p, log_success, rest, visits in zip(
      *(arrays[name].tolist() for name in _FIELDS)
    ):
      node = trie.root if parent < 0 else Node(log_p)
      if parent >= len(nodes):
        raise UserError(f"{path} is no trie: a node comes before its parent")
      if parent >= 0:
        nodes[parent].children[token] = node
      node.log_success, node.visits = log_success, visits
      node.log_rest = None if np.isnan(rest) else rest
      nodes.append(node)
    trie.num_nodes = len(nodes)
    return trie


def _log_sum(log_p: np.ndarray) -> float:
  """log of a sum of probabilities, in float64; of many numbers ten times as fast as logaddexp."""
  most = float(log_p.max(initial=-np.inf))
  if most == -np.inf:
    return most
  return most + float(np.log(np.sum(np.exp(log_p - most, dtype=np.float64))))


def _nodes(root: Node) -> Iterator[Node]:
  """All nodes, without recursion: a trie is as deep as a text is long."""
  pending = [root]
  while pending:
    node = pending.pop()
    yield node
    pending += node.children.values()
