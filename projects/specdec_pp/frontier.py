"""What drafting costs: discard and verification rates, modelled speed, the area between frontiers."""

from typing import NamedTuple

import numpy as np

from common.decoding.speculative import Statistics

# Points of the grid on which two frontiers are compared.
_GRID = 65


class Rates(NamedTuple):
  """Costs per generated token, float64 [...].

  Attributes:
    discard: drafted tokens that were rejected or behind a rejected one.
    verification: passes of the target.
    drafting: passes of the draft.
  """

  discard: np.ndarray
  verification: np.ndarray
  drafting: np.ndarray


def rates(statistics: Statistics) -> Rates:
  """Costs per token over all rows. statistics: [..., rows] each -> [...]."""
  calls, drafted, accepted = (np.asarray(x, np.float64).sum(axis=-1) for x in statistics)
  generated = accepted + calls  # Every call gives the accepted drafts and a token more.
  return Rates((drafted - accepted) / generated, calls / generated, drafted / generated)


def of_rows(statistics: Statistics, rows: np.ndarray | slice) -> Statistics:
  """Those of some prompts. statistics: [..., rows] each."""
  return Statistics(*(np.asarray(x)[..., rows] for x in statistics))


def modelled_speedup(costs: Rates, ratio: float) -> np.ndarray:
  """Over the target alone, a pass of which costs `ratio` (c2 / c1) passes of the draft."""
  return ratio / (costs.drafting + ratio * costs.verification)


class Comparison(NamedTuple):
  """Two frontiers over the discard rates that both reach.

  Attributes:
    area: mean of baseline less ours, target passes per token.
    above: the largest excess of ours over the baseline, target passes per token.
  """

  area: float
  above: float


def compare_frontiers(ours: Rates, baseline: Rates) -> Comparison:
  """Verification rate as a function of the discard rate, linear between policies.

  Between two of its policies a frontier is what choosing among them at random attains.
  """
  low = max(ours.discard.min(), baseline.discard.min())
  high = min(ours.discard.max(), baseline.discard.max())
  grid = np.linspace(low, high, _GRID)
  gap = verification_at(baseline, grid) - verification_at(ours, grid)
  return Comparison(float(gap.mean()), float(-gap.min()))


def verification_at(costs: Rates, discard: np.ndarray | float) -> np.ndarray:
  """Verification rate of a frontier at given discard rates. costs: [policies] each."""
  order = np.argsort(costs.discard)
  return np.interp(discard, costs.discard[order], costs.verification[order])


def bootstrap_area(
  ours: Statistics, baseline: Statistics, *, resamples: int, seed: int
) -> tuple[float, float]:
  """95 % interval of `Comparison.area` over prompts, which both share: [policies, rows] each."""
  rng = np.random.default_rng(seed)
  rows = np.asarray(ours.drafted).shape[-1]
  areas = []
  for _ in range(resamples):
    chosen = rng.integers(rows, size=rows)
    drawn = rates(of_rows(ours, chosen)), rates(of_rows(baseline, chosen))
    areas.append(compare_frontiers(*drawn).area)
  return tuple(np.quantile(areas, (0.025, 0.975)).tolist())
