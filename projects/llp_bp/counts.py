"""Counts of bags from a table that repeats them in every row."""

import numpy as np

from common.data.tabular import Table, numeric
from common.errors import UserError


def bag_counts(table: Table, bag: str, column: str, *, proportion: bool) -> dict:
  """{bag: positives} of a column that repeats them, or their share, in every row of a bag.

  Raises:
    UserError: missing values, different values in one bag, or a share of no whole number.
  """
  values = numeric(table, column)
  labels, codes, sizes = np.unique(table[bag], return_inverse=True, return_counts=True)
  low, high = np.full(len(labels), np.inf), np.full(len(labels), -np.inf)
  np.minimum.at(low, codes, values)
  np.maximum.at(high, codes, values)
  if (low != high).any():
    b = int((low != high).argmax())
    raise UserError(
      f"column {column!r} has values from {low[b]:g} to {high[b]:g} in bag {labels[b]!r}; expected "
      "the same in all rows of a bag"
    )
  counts = low * sizes if proportion else low
  # Shares are often written with three digits or so.
  whole = np.round(counts)
  if proportion and (np.abs(counts - whole) > 0.25).any():
    b = int(np.abs(counts - whole).argmax())
    raise UserError(
      f"a share of {low[b]:g} in bag {labels[b]!r} is {counts[b]:g} of its {sizes[b]} rows; expected "
      "about a whole number: use --count, or write more digits"
    )
  return dict(zip(labels.tolist(), whole if proportion else counts))
