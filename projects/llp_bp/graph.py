"""The factor graph's structure: nearest-neighbour edges of the covariates, and bags."""

from typing import NamedTuple

import numpy as np
from sklearn.neighbors import KDTree, NearestNeighbors

KERNELS = ("constant", "rbf", "matern")


class Bags(NamedTuple):
  """Disjoint bags, grouped by size: group g has those of more than M_g / 2 and up to M_g members.

  M_g is a power of two, so that bags of any size pad to at most twice their instances and few
  shapes are compiled.
  """

  members: tuple[np.ndarray, ...]  # int32 [B_g, M_g]: rows of the instances, n where padded.
  size: tuple[np.ndarray, ...]  # float32 [B_g]
  count: tuple[np.ndarray, ...]  # float32 [B_g]: positives.
  place: np.ndarray  # int32 [n]: an instance's position in the groups' members, one after another.


class Edges(NamedTuple):
  """Directed edges sorted by target, each undirected edge twice.

  Padded to E = 2 n k of the largest k tried, whatever the number of mutual neighbours, so that one
  shape is compiled: the padding are edges of weight 0 from the last row to itself, which send no
  messages.
  """

  source: np.ndarray  # int32 [E]
  target: np.ndarray  # int32 [E]
  reverse: np.ndarray  # int32 [E]: the edge from target to source.
  weight: np.ndarray  # float32 [E]: U(x_source, x_target), 0 for bag mates listed in `bag_weight`.
  bag_weight: tuple[np.ndarray, ...] = ()  # float32 [B_g, M_g, M_g]: U between bag mates.


def group_bags(bags: np.ndarray, counts: np.ndarray) -> Bags:
  """Groups instances by bag and bags by size.

  Args:
    bags: int [n], the bag of every instance, 0 ... B-1, each of them at least once.
    counts: [B], positives in every bag.
  """
  n, sizes = len(bags), np.bincount(bags, minlength=len(counts))
  order = np.argsort(bags, kind="stable")
  starts = np.cumsum(sizes) - sizes
  padded_size = 1 << np.ceil(np.log2(sizes)).astype(int)
  members, group_sizes, group_counts = [], [], []
  place, offset = np.empty(n + 1, np.int32), 0
  for width in np.unique(padded_size):
    group = np.flatnonzero(padded_size == width)
    column = np.arange(width)
    position = np.minimum(starts[group, None] + column, n - 1)
    rows = np.where(column < sizes[group, None], order[position], n).astype(np.int32)
    place[rows.ravel()] = offset + np.arange(rows.size)  # Padding goes to the last entry.
    offset += rows.size
    members.append(rows)
    group_sizes.append(sizes[group].astype(np.float32))
    group_counts.append(np.asarray(counts, np.float32)[group])
  return Bags(tuple(members), tuple(group_sizes), tuple(group_counts), place[:n])


def tree_order(x: np.ndarray) -> np.ndarray:
  """An order of the rows of x [n, d] in which near rows are near in memory, int64 [n].

  That of the leaves of a k-d tree. Searching and passing messages in it takes the time of a cache, in
  any other order that of memory. In more than 15 dimensions, where the search uses no tree, the
  rows stay as they are.
  """
  return KDTree(x).get_arrays()[1] if x.shape[1] <= 15 else np.arange(len(x))


def nearest(
  x: np.ndarray, k: int, queries: np.ndarray | None = None, metric: str = "euclidean"
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest rows of x, exactly: a tree in few dimensions, else block by block.

  Args:
    x: [n, d], standardised.
    k: neighbours, below n.
    queries: [q, d]; None takes the rows of x, without themselves.
    metric: "euclidean" or "cosine".

  Returns:
    distances float64 [q, k] and rows int64 [q, k].
  """
  return NearestNeighbors(n_neighbors=k, metric=metric, n_jobs=-1).fit(x).kneighbors(queries)


def neighbour_edges(
  neighbours: tuple[np.ndarray, np.ndarray],
  *,
  kernel: str = "constant",
  width: float = 1.0,
  max_distance: float = np.inf,
  largest: int | None = None,
) -> Edges:
  """The k-nearest-neighbour graph, symmetric and without duplicates.

  Args:
    neighbours: distances and rows [n, k] from `nearest`.
    kernel: U(d): "constant" 1, "rbf" exp(-d^2 / 2), "matern" (1 + sqrt(3) d) exp(-sqrt(3) d), of
      distances divided by `width`.
    width, max_distance: in units of the median distance to a neighbour, so that they carry over
      between data sets and embeddings; no edge is longer than `max_distance`.
    largest: the k to pad for; by default that of the neighbours.
  """
  distance, rows = neighbours
  n, k = rows.shape
  first = np.repeat(np.arange(n), k)
  second, distance = rows.ravel(), distance.ravel()
  distance = distance / max(np.median(distance), np.finfo(np.float64).tiny)
  near = distance <= max_distance
  first, second, distance = first[near], second[near], distance[near]
  _, unique = np.unique(
    np.minimum(first, second) * n + np.maximum(first, second), return_index=True
  )
  first, second, distance = first[unique], second[unique], distance[unique] / width
  weight = {
    "constant": np.ones_like(distance),
    "rbf": np.exp(-(distance**2) / 2),
    "matern": (1 + 3**0.5 * distance) * np.exp(-(3**0.5) * distance),
  }[kernel]
  edges = len(first)
  source, target = np.concatenate([first, second]), np.concatenate([second, first])
  order = np.argsort(target, kind="stable")
  rank = np.empty(2 * edges, np.int64)
  rank[order] = np.arange(2 * edges)
  reverse = rank[(order + edges) % (2 * edges)] if edges else order
  padding = 2 * n * max(k, largest or k) - 2 * edges
  loop = np.full(padding, n - 1)
  as_int = lambda parts: np.concatenate(parts).astype(np.int32)
  return Edges(
    as_int([source[order], loop]),
    as_int([target[order], loop]),
    as_int([reverse, 2 * edges + np.arange(padding)]),
    np.concatenate([weight, weight, np.zeros(padding)])[
      np.concatenate([order, 2 * edges + np.arange(padding)])
    ].astype(np.float32),
  )


def merge_bag_mates(edges: Edges, bags: Bags) -> Edges:
  """Moves the weights of edges inside bags to `bag_weight`.

  In the pairwise graph bag mates are joined already; a neighbour edge adds to that edge's coupling.
  """
  sizes = [rows.size for rows in bags.members]
  first_place = np.cumsum([0, *sizes])
  weight, dense = edges.weight.copy(), []
  for rows, start in zip(bags.members, first_place):
    width = rows.shape[1]
    place = bags.place.astype(np.int64) - start
    inside = (place >= 0) & (place < rows.size)
    bag = np.where(inside, place // width, -1)
    mates = (bag[edges.source] == bag[edges.target]) & inside[edges.target] & (edges.weight > 0)
    matrix = np.zeros((*rows.shape, width), np.float32)
    target, source = place[edges.target[mates]], place[edges.source[mates]]
    matrix[target // width, target % width, source % width] = edges.weight[mates]
    weight[mates] = 0
    dense.append(matrix)
  return edges._replace(weight=weight, bag_weight=tuple(dense))
