"""Dynamic sparse trees: which candidates a pass verifies, and how many prompt tokens stand behind each.

Section 3.2 of the paper (steps C.1 to C.4). a[i, r] is the probability that the candidate of rank r
of prompt token i + 1 is the true token. With k prompt tokens' guesses at hand (state k),

  value(v) = prod_i a[i, r_i]            of a node with path r_1, ..., r_d, d <= k
  f(k, c)  = sum of the c highest values, the expected number of accepted candidates
  q(v)     = value(v) - sum of its children's values, the probability that v is accepted last

and after v is accepted the next state is n_v, the number of prompt tokens behind it; after none the
root's, m. tau = 1 + sum_k pi_k f(k, c_k), pi the stationary distribution of that chain.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from common.decoding.prompt_tree import RANKS, Tree
from common.errors import UserError


class Candidates(NamedTuple):
  """Nodes of a candidate tree, the most probable first; the root is not one of them.

  Attributes:
    paths: ranks from the root to each node.
    values: [nodes], float64.
  """

  paths: list[tuple[int, ...]]
  values: np.ndarray

  def first(self, count: int) -> "Candidates":
    """The best tree of fewer nodes."""
    return Candidates(self.paths[:count], self.values[:count])

  @property
  def expected(self) -> float:
    """f, the expected number of accepted candidates."""
    return float(self.values.sum())

  @property
  def last_accepted(self) -> np.ndarray:
    """q, [nodes]; 1 - sum is the probability that nothing is accepted."""
    index = {path: i for i, path in enumerate(self.paths)}
    q = self.values.copy()
    for path, value in zip(self.paths, self.values):
      if len(path) > 1:
        q[index[path[:-1]]] -= value
    return q


class TreeSet(NamedTuple):
  """The trees of states 0, ..., m and what is expected of them.

  Attributes:
    trees: see `prompt_tree`.
    counts: candidates in each, [m + 1].
    stationary: pi, [m + 1].
    tokens_per_pass: tau.
  """

  trees: list[Tree]
  counts: list[int]
  stationary: np.ndarray
  tokens_per_pass: float


def check_accuracies(accuracies: np.ndarray) -> None:
  """Raises UserError for what is no table of probabilities [m, RANKS]."""
  good = accuracies.ndim == 2 and accuracies.shape[1] == RANKS and np.isfinite(accuracies).all()
  if not good or accuracies.min() < 0 or accuracies.sum(1).max() > 1 + 1e-6:
    raise UserError(
      f"accuracies of shape {accuracies.shape}: expected finite probabilities [m, {RANKS}], rows "
      "that sum to at most 1; measure them again"
    )


def candidate_tree(accuracies: np.ndarray, depth: int, count: int) -> Candidates:
  """The `count` paths of highest value (C.1): no tree of as many nodes has a higher f.

  Args:
    accuracies: [m, RANKS].
    depth: k, of the longest path.
    count: nodes, fewer if there are no more of this depth.
  """
  children = lambda path, value: [
    (-value * a, (*path, rank)) for rank, a in enumerate(accuracies[len(path)])
  ]
  # Shorter paths first among equals, so that a parent comes before its child of accuracy 1.
  entry = lambda item: (item[0], len(item[1]), item[1])
  frontier = [entry(item) for item in children((), 1.0)] if depth else []
  heapq.heapify(frontier)
  paths, values = [], []
  while frontier and len(paths) < count:
    negative, length, path = heapq.heappop(frontier)
    paths.append(path)
    values.append(-negative)
    if length < depth:
      for item in children(path, -negative):
        heapq.heappush(frontier, entry(item))
  return Candidates(paths, np.array(values, np.float64))


def allocate_prompts(
  last_accepted: np.ndarray, expected: Sequence[float], limit: int, *, ensemble: int = 1
) -> np.ndarray:
  """How many prompt tokens stand behind every candidate (C.3), int [nodes], each 1 to m.

  From m each on, the node with the smallest loss q(v) (f(n_v) - f(n_v - 1)) gives one up while there
  are more inputs than the limit.

  Args:
    last_accepted: q, [nodes].
    expected: f of states 0, ..., m, [m + 1].
    limit: inputs that the candidates and their prompt tokens may take.
    ensemble: EPTs, inputs of a prompt token.

  Raises:
    ValueError: the limit has no room for a prompt token behind every candidate.
  """
  nodes, distances = len(last_accepted), len(expected) - 1
  if nodes * (1 + ensemble) > limit:
    raise ValueError(f"{nodes} candidates with a prompt token each need more than {limit} inputs")
  prompts = np.full(nodes, distances)
  loss = lambda v, n: last_accepted[v] * (expected[n] - expected[n - 1])
  heap = [(loss(v, distances), v) for v in range(nodes)] if distances > 1 else []
  heapq.heapify(heap)
  while nodes + ensemble * prompts.sum() > limit:
    _, v = heapq.heappop(heap)
    prompts[v] -= 1
    if prompts[v] > 1:
      heapq.heappush(heap, (loss(v, prompts[v]), v))
  return prompts


def transitions(
  last_accepted: Sequence[np.ndarray], prompts: Sequence[np.ndarray], distances: int
) -> np.ndarray:
  """P[k, j]: probability that state j follows state k (C.4), [m + 1, m + 1].

  Args:
    last_accepted, prompts: q and n_v of every state's candidates, [m + 1][nodes].
    distances: m; the state after nothing is accepted.
  """
  chain = np.zeros((distances + 1, distances + 1))
  for k, (q, n) in enumerate(zip(last_accepted, prompts)):
    np.add.at(chain[k], n, q)
    chain[k, distances] += 1 - q.sum()
  return chain


def stationary_distribution(chain: np.ndarray, start: int) -> np.ndarray:
  """pi = pi P, of the states that are reached from `start`, [states]."""
  # With a chance to stay the chain is not periodic, and pi is the same.
  lazy = (np.eye(len(chain)) + chain) / 2
  pi = np.linalg.matrix_power(lazy, 2**20)[start]
  return pi / pi.sum()


def ghost_chain_value(none: np.ndarray, chain: np.ndarray, expected: np.ndarray) -> float:
  """The official code's expected acceptance, in which nothing accepted is a state of its own.

  It has value 0 and is followed by state m; where the merged chain (`transitions`) takes the step
  from state m, whose value f(m) is not 0. For parity only.

  Args:
    none: probability that nothing is accepted in states 1, ..., m, [m].
    chain: of state j after state k otherwise, [m, m].
    expected: f of states 1, ..., m, [m].
  """
  distances = len(none)
  full = np.zeros((distances + 1, distances + 1))
  full[1:, 0], full[1:, 1:] = none, chain
  full[0, distances] = 1
  return float(stationary_distribution(full, distances)[1:] @ expected)


def dynamic_trees(
  accuracies: np.ndarray, counts: Sequence[int], limit: int, *, ensemble: int = 1, monotone=True
) -> TreeSet:
  """The trees of all states with given numbers of candidates.

  Args:
    accuracies: [m, RANKS].
    counts: c_0 = 0, c_1, ..., c_m.
    limit: inputs that the candidates and their prompt tokens may take; a pass has 1 + m e more, the
      root and its prompt tokens.
    ensemble: e.
    monotone: prompts are allocated by the running maximum of f; f itself (the official rule) is not
      monotone where a state of more guesses has fewer candidates, and then takes prompt tokens from
      the most probable nodes first.
  """
  distances = len(accuracies)
  candidates = [candidate_tree(accuracies, k, c) for k, c in enumerate(counts)]
  expected = np.array([c.expected for c in candidates])
  ranking = np.maximum.accumulate(expected) if monotone else expected
  q = [c.last_accepted for c in candidates]
  prompts = [allocate_prompts(x, ranking, limit, ensemble=ensemble) for x in q]
  trees = [{(): distances} | dict(zip(c.paths, n.tolist())) for c, n in zip(candidates, prompts)]
  pi = stationary_distribution(transitions(q, prompts, distances), distances)
  return TreeSet(trees, [len(c.paths) for c in candidates], pi, float(1 + pi @ expected))


def search(accuracies: np.ndarray, size: int, *, ensemble: int = 1) -> TreeSet:
  """The counts c_1, ..., c_m of highest tau for a pass of `size` inputs, by coordinate ascent.

  Raises:
    UserError: the accuracies are no probabilities; a size without room for the root, its prompt
      tokens and a candidate.
  """
  check_accuracies(accuracies)
  limit = room(size, len(accuracies), ensemble)
  most = limit // (1 + ensemble)
  build = lambda counts: dynamic_trees(accuracies, counts, limit, ensemble=ensemble)
  # c_1 has no depth to trade: all ranks that fit.
  counts = [0, min(most, RANKS), *[most] * (len(accuracies) - 1)]
  best, improved = build(counts), True
  while improved:
    improved = False
    for k in range(1, len(counts)):
      for count in range(1, (min(most, RANKS) if k == 1 else most) + 1):
        tried = build([*best.counts[:k], count, *best.counts[k + 1 :]])
        if tried.tokens_per_pass > best.tokens_per_pass + 1e-12:
          best, improved = tried, True
  return best


def room(size: int, distances: int, ensemble: int = 1) -> int:
  """Inputs of a pass for candidates and their prompt tokens.

  Raises:
    UserError: there is no room for one of each.
  """
  limit = size - 1 - distances * ensemble
  if limit < 1 + ensemble:
    raise UserError(
      f"size={size}: a root with {distances} prompt tokens and a candidate with one take "
      f"{size - limit + 1 + ensemble} inputs; expected at least so many"
    )
  return limit


def static_trees(accuracies: np.ndarray, size: int, *, ensemble: int = 1) -> TreeSet:
  """The best tree whose every node has all m prompt tokens: the state is always m."""
  distances = len(accuracies)
  count = room(size, distances, ensemble) // (1 + distances * ensemble)
  candidates = candidate_tree(accuracies, distances, count)
  tree = {(): distances} | {path: distances for path in candidates.paths}
  return _one_state(tree, candidates)


def random_trees(
  accuracies: np.ndarray, like: TreeSet, size: int, seed: int, *, ensemble: int = 1
) -> TreeSet:
  """Trees of as many candidates and inputs as `like`, grown and given prompt tokens at random."""
  rng = np.random.default_rng(seed)
  distances, limit = len(accuracies), room(size, len(accuracies), ensemble)
  trees, q, prompts, expected = [], [], [], []
  for k, count in enumerate(like.counts):
    paths, frontier = [], [(r,) for r in range(RANKS)] if k else []
    for _ in range(count):
      path = frontier.pop(rng.integers(len(frontier)))
      paths.append(path)
      frontier += [(*path, r) for r in range(RANKS)] if len(path) < k else []
    values = [np.prod([accuracies[i, r] for i, r in enumerate(path)]) for path in paths]
    grown = Candidates(paths, np.array(values))
    n = np.ones(count, int)
    while count and count + ensemble * (n.sum() + 1) <= limit and n.min() < distances:
      n[rng.choice(np.flatnonzero(n < distances))] += 1
    trees.append({(): distances} | dict(zip(paths, n.tolist())))
    q.append(grown.last_accepted)
    prompts.append(n)
    expected.append(grown.expected)
  pi = stationary_distribution(transitions(q, prompts, distances), distances)
  return TreeSet(trees, list(like.counts), pi, float(1 + pi @ np.array(expected)))


def head_trees(accuracies: np.ndarray, size: int) -> TreeSet:
  """The best tree of `size` nodes for heads, which guess at every distance behind every node."""
  distances = len(accuracies)
  candidates = candidate_tree(accuracies, distances, size - 1)
  tree = {(): distances} | {path: distances for path in candidates.paths}
  return _one_state(tree, candidates)


def _one_state(tree: Tree, candidates: Candidates) -> TreeSet:
  """A tree all of whose nodes lead to state m, which is the first."""
  distances = tree[()]
  counts = [0] * distances + [len(candidates.paths)]
  pi = np.eye(distances + 1)[distances]
  return TreeSet([{(): distances}] * distances + [tree], counts, pi, 1 + candidates.expected)


def best_size(
  sizes: Sequence[int], tokens_per_pass: Callable[[int], float], seconds: Sequence[float]
) -> int:
  """The size of highest tau(N) / L(N) (C.5).

  Args:
    sizes: N, inputs of a pass.
    tokens_per_pass: tau of a size.
    seconds: L(N), of each size.
  """
  speeds = [tokens_per_pass(size) / second for size, second in zip(sizes, seconds)]
  return sizes[int(np.argmax(speeds))]
