"""Bin packing of prompts: which share a row, so that few rows of a given length hold all.

A packer takes the prompts' lengths and the capacity of a row, and returns the bins: lists of
prompts, in the order in which they lie in their row.
"""

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, sparse

from common.errors import UserError

Bins = list[list[int]]
Packer = Callable[[Sequence[int], int], Bins]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> Bins:
  """Each item, the longest first, goes into the fullest open bin in which it fits.

  Of equally long items the first comes first, of equally full bins the one that was opened first.
  Never more than 11/9 of the fewest bins, and 4.

  Args:
    lengths: tokens of each item.
    capacity: tokens of a bin.

  Raises:
    UserError: an item is empty, or longer than a bin.
  """
  _check(lengths, capacity)
  bins, open_bins = [], []  # (free tokens, bin), sorted
  for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    at = bisect.bisect_left(open_bins, (lengths[item], 0))
    if at == len(open_bins):
      free, index = capacity, len(bins)
      bins.append([])
    else:
      free, index = open_bins.pop(at)
    bins[index].append(item)
    bisect.insort(open_bins, (free - lengths[item], index))
  return bins


def fewest_bins(lengths: Sequence[int], capacity: int, *, time_limit: float = 60.0) -> Bins:
  """An optimal packing, by integer programming: for few items, as the time grows exponentially.

  With binary x_ij (item i is in bin j) and y_j (bin j is used):
  minimize sum_j y_j, subject to sum_j x_ij = 1 and sum_i lengths_i x_ij <= capacity y_j.

  Args:
    lengths, capacity: see `best_fit_decreasing`.
    time_limit: of the solver, in seconds.

  Raises:
    UserError: see `best_fit_decreasing`; no packing was proved optimal in time.
  """
  greedy = best_fit_decreasing(lengths, capacity)
  count, most = len(lengths), len(greedy)
  # No packing needs fewer bins than the tokens fill.
  if most <= -(-sum(lengths) // capacity):
    return greedy
  in_bins, used = count * most, np.eye(most)
  items = sparse.kron(
    np.eye(count), np.ones((1, most))
  )  # Of x, item by item, [count, count * most].
  weights = sparse.kron(np.asarray(lengths, float)[None], used)  # [most, count * most]
  constraints = [
    optimize.LinearConstraint(sparse.hstack([items, np.zeros((count, most))]), 1, 1),
    optimize.LinearConstraint(sparse.hstack([weights, -capacity * used]), -np.inf, 0),
  ]
  # Bins are alike: the i-th item goes into one of the first i + 1.
  item, index = np.divmod(np.arange(in_bins), most)
  upper = np.concatenate([index <= item, np.ones(most)])
  solution = optimize.milp(
    np.concatenate([np.zeros(in_bins), np.ones(most)]),
    integrality=1,
    bounds=optimize.Bounds(0, upper),
    constraints=constraints,
    options={"time_limit": time_limit},
  )
  if not solution.success:
    raise UserError(
      f"no packing of {count} prompts was proved optimal in {time_limit:g} s: expected fewer "
      "prompts; pack them with best_fit_decreasing, or raise time_limit"
    )
  chosen = solution.x[:in_bins].reshape(count, most).argmax(axis=1)
  bins = [np.flatnonzero(chosen == j).tolist() for j in range(most)]
  return [items for items in bins if items]


def one_per_bin(lengths: Sequence[int], capacity: int) -> Bins:
  """No packing: every item has a bin of its own. See `best_fit_decreasing`."""
  _check(lengths, capacity)
  return [[item] for item in range(len(lengths))]


def _check(lengths: Sequence[int], capacity: int) -> None:
  if not len(lengths) or min(lengths) < 1:
    raise UserError("every prompt needs at least one token")
  if max(lengths) > capacity:
    raise UserError(
      f"a prompt has {max(lengths)} tokens and a row {capacity}: expected rows as long as the "
      "longest prompt; raise the capacity"
    )
