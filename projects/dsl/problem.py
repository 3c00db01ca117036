"""The regression that a user asks for, as arrays: which columns experts label, who is labelled."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from common.cli import closest
from common.data.tabular import check_complete, encode, is_missing, numeric
from common.errors import UserError

OUTCOME = -1


class Data(NamedTuple):
  """n units; gold values are 0 where `labelled` is 0.

  Attributes:
    x: design [n, k], gold values in the columns that experts label.
    y: outcome [n].
    surrogates: machine-made labels [n, v], one for each gold variable; None if they do not pair.
    features: what g is learnt from, [n, p].
    labelled: R, 0 or 1, [n].
    probability: pi, of mean R, [n].
    clusters: int [n], in 0 ... clusters - 1; None if units are independent.
    groups: int [n, 1 or 2], in 0 ... groups - 1, of one- or two-way fixed effects; None without.
  """

  x: Array
  y: Array
  surrogates: Array | None
  features: Array
  labelled: Array
  probability: Array
  clusters: Array | None = None
  groups: Array | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
  """What to estimate.

  Attributes:
    data: float64 NumPy arrays.
    gold: of each gold variable, its column of the design, or OUTCOME.
    names: of the coefficients, [k].
  """

  data: Data
  gold: tuple[int, ...]
  names: tuple[str, ...]


def regression(
  table: Mapping[str, np.ndarray],
  *,
  outcome: str,
  covariates: Sequence[str] = (),
  gold: Sequence[str] | None = None,
  surrogates: Sequence[str] = (),
  features: Sequence[str] = (),
  probability: str | None = None,
  clusters: str | None = None,
  effects: Sequence[str] = (),
  by: str | None = None,
  drop_missing: bool = False,
) -> Problem:
  """Sets out a regression of `outcome` on `covariates`, of which experts labelled some for a few.

  Args:
    table: named columns [n], as `common.data.tabular.read_table` returns them.
    outcome: name of the outcome.
    covariates: names; text becomes indicators of its levels but the first. None at all, with an
      intercept: the outcome's mean, such as the prevalence of a class.
    gold: which of the outcome and the covariates experts label (default: the outcome); numbers,
      missing where the unit is not labelled.
    surrogates: machine-made labels of the gold variables, known for every unit. One for each, in
      the same order, where a surrogate is to stand in for its gold variable.
    features: further columns that help to predict the gold variables.
    probability: column of the probabilities, chosen by the researcher, with which units were drawn
      for labelling; by default all are equal.
    clusters: column of clusters for cluster-robust errors.
    effects: one or two columns of fixed effects, which replace the intercept.
    by: column whose levels' means of the outcome are wanted, in place of covariates.
    drop_missing: drop units with a missing value in any other column than the gold ones, before
      probabilities are rescaled to the labelled share.

  Raises:
    UserError: an unknown column, or one that is constant, not numeric, infinite or incomplete;
      nothing labelled, or a unit labelled in part; probabilities out of (0, 1].
  """
  table = {name: np.asarray(column) for name, column in table.items()}
  gold = (outcome,) if gold is None else tuple(gold)
  named = [outcome, *covariates, *gold, *surrogates, *features, *effects]
  observed = [
    c for c in dict.fromkeys([*named, probability, clusters, by]) if c not in (None, *gold)
  ]
  for name in [*gold, *observed]:
    if name not in table:
      raise UserError(f"the table has no column {name!r}; {closest(name, table)}")
  for name in gold:
    if name != outcome and name not in covariates:
      raise UserError(
        f"the gold column {name!r} is neither the outcome ({outcome!r}) nor a covariate; "
        f"experts label variables of the regression: pass it as one"
      )
  if outcome in covariates or len(set(covariates)) < len(covariates):
    raise UserError("a column is named twice among the outcome and the covariates")
  if len(effects) > 2 or (by is not None and (covariates or effects)):
    raise UserError("expected at most two effects, and neither they nor covariates beside `by`")
  if drop_missing:
    keep = ~np.any([is_missing(table[name]) for name in observed], axis=0)
    table = {name: column[keep] for name, column in table.items()}
  check_complete(table, observed)

  targets = {name: numeric(table, name, missing=True) for name in gold}
  present = np.array([~np.isnan(column) for column in targets.values()])
  labelled = present.all(axis=0)
  if present.any(axis=0).sum() != labelled.sum():
    raise UserError(
      f"{present.any(axis=0).sum() - labelled.sum()} rows have some of {', '.join(gold)} but not "
      "all; a labelled row needs every gold column"
    )
  if not labelled.any():
    raise UserError(f"no row has {' and '.join(gold)}: expert labels are needed for some rows")
  targets = {name: np.where(labelled, column, 0.0) for name, column in targets.items()}

  rows = len(labelled)
  columns, names = [], []
  if by is not None:
    levels, codes = np.unique(table[by], return_inverse=True)
    columns = [(codes == i).astype(np.float64) for i in range(len(levels))]
    names = [f"{by}[{level}]" for level in levels]
  elif not effects:
    columns, names = [np.ones(rows)], ["(intercept)"]
  places = {outcome: OUTCOME}
  for name in covariates:
    if name in gold:
      places[name] = len(columns)
      encoded, labels = targets[name][:, None], [name]
    else:
      encoded, labels = encode(table, [name])
    columns, names = columns + list(encoded.T), names + labels
  if not columns:
    raise UserError("fixed effects leave nothing to estimate without covariates; name some")

  others = [
    c for c in dict.fromkeys([*surrogates, outcome, *covariates, *features]) if c not in gold
  ]
  others += [by] if by is not None and by not in others else []
  if not others:
    raise UserError("nothing to predict the expert labels from: name a surrogate or features")
  paired = len(surrogates) == len(gold)
  return Problem(
    Data(
      x=np.stack(columns, axis=1),
      y=targets[outcome] if outcome in gold else numeric(table, outcome),
      surrogates=np.stack([numeric(table, s) for s in surrogates], axis=1) if paired else None,
      features=encode(table, others)[0],
      labelled=labelled.astype(np.float64),
      probability=_probabilities(table, probability, labelled),
      clusters=None if clusters is None else _codes(table[clusters]),
      groups=np.stack([_codes(table[e]) for e in effects], axis=1) if effects else None,
    ),
    tuple(places[name] for name in gold),
    tuple(names),
  )


def _probabilities(table, name: str | None, labelled: np.ndarray) -> np.ndarray:
  """pi of every unit, rescaled so that its mean is the labelled share, [n]."""
  if name is None:
    return np.full(len(labelled), labelled.mean())
  probability = numeric(table, name)
  if not ((probability > 0) & (probability <= 1)).all():
    raise UserError(
      f"column {name!r} must be probabilities in (0, 1], but is between {probability.min():g} and "
      f"{probability.max():g}; a unit that could never be labelled cannot be corrected for"
    )
  return probability * labelled.mean() / probability.mean()


def _codes(column: np.ndarray) -> np.ndarray:
  return np.unique(column, return_inverse=True)[1].astype(np.int32)
