"""Labels of instances from the counts of their bags, on NumPy arrays."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from common.data.tabular import check_covariates
from common.errors import UserError
from projects.llp_bp import graph, llp_bp, training
from projects.llp_bp.belief_propagation import BAG_FACTORS


class BagClassifier:
  """A classifier of instances, learnt from bags of which only the number of positives is known.

  Args:
    options: see `llp_bp.Options`; given as keywords, such as `BagClassifier(rounds=1, lambda_s=(0.1,))`.
      The default bag factor is "cardinality", in time and memory linear in the instances.
    validation_share: of the bags. They are not learnt from: the candidates of belief propagation
      and of the network are those that predict the counts of these bags best.
    seed: of the held-out bags and the training.

  After `fit`:
    rounds_: one `llp_bp.Round` per round, with all candidates, the chosen one, its convergence
      report (residual, iterations, converged), marginals and pseudo labels.
    training_rows_: [n'], rows of x in the other bags; the marginals and pseudo labels are theirs.
    converged_: whether the chosen belief propagation converged in all rounds. If not the marginals
      are those of the last iteration.
  """

  def __init__(self, *, validation_share: float = 0.1, seed: int = 0, **options):
    known = {field.name for field in dataclasses.fields(llp_bp.Options)}
    if unknown := set(options) - known:
      raise UserError(
        f"no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
      )
    if not 0 < validation_share < 1:
      raise UserError(f"validation_share is {validation_share}; expected a share between 0 and 1")
    self.options = llp_bp.Options(**{"bag_factor": "cardinality"} | options)
    _check_options(self.options)
    self.validation_share, self.seed = validation_share, seed

  def fit(
    self,
    x: np.ndarray,
    bags: Sequence,
    counts: Mapping | Sequence[int],
  ) -> "BagClassifier":
    """Fits the classifier.

    Args:
      x: [n, d] numbers; text columns as indicators.
      bags: [n], the bag of every row: numbers or text.
      counts: positives of every bag: {bag: count}, or [B] in the sorted order of the bags.

    Raises:
      UserError: missing values, wrong shapes, a constant column, fewer than two bags, an empty
        bag, a bag without a count, a count that is not a whole number from 0 to the bag's size, or
        fewer rows than neighbours.
    """
    x = check_covariates(x)
    constant = np.flatnonzero(x.min(axis=0) == x.max(axis=0))
    if len(constant):
      raise UserError(f"column {constant[0]} of x is constant: it explains nothing; drop it")
    codes, counts = check_bags(bags, counts, len(x))
    sizes = np.bincount(codes)
    self._mean, self._scale = x.mean(axis=0), x.std(axis=0)
    z = self._standardise(x)
    rng = np.random.default_rng(self.seed)
    held_out = np.zeros(len(counts), bool)
    held_out[rng.permutation(len(counts))[: max(1, round(self.validation_share * len(counts)))]] = 1
    train = ~held_out[codes]
    largest = max(self.options.neighbours)
    if train.sum() <= largest:
      raise UserError(
        f"{train.sum()} rows to learn from for {largest} neighbours; give more rows, or fewer "
        "neighbours"
      )
    renumbered = np.cumsum(~held_out) - 1, np.cumsum(held_out) - 1
    validation = (
      renumbered[1][codes[~train]].astype(np.int32),
      counts[held_out].astype(np.float32),
      sizes[held_out].astype(np.float32),
    )
    data = llp_bp.Bagged(
      z[train],
      renumbered[0][codes[train]],
      counts[~held_out],
      z[~train],
      validation,
      training.bag_fit,
    )
    self.rounds_ = llp_bp.bootstrap(jax.random.key(self.seed), data, self.options)
    self.training_rows_ = np.flatnonzero(train)
    self.converged_ = all(done.chosen.converged for done in self.rounds_)
    return self

  def predict_proba(self, x: np.ndarray) -> np.ndarray:
    """[n, 2]: probabilities of 0 and 1.

    Raises:
      UserError: missing or infinite values, another number of columns, or not fitted.
    """
    if not hasattr(self, "rounds_"):
      raise UserError("this BagClassifier is not fitted; call fit first")
    x = check_covariates(x)
    if x.shape[1] != len(self._mean):
      raise UserError(f"x has {x.shape[1]} columns; the classifier has {len(self._mean)}")
    p = llp_bp.predict(self.rounds_[-1].trained, self._standardise(x), self.options)[0]
    return np.stack([1 - p, p], axis=1)

  def predict(self, x: np.ndarray) -> np.ndarray:
    """Labels [n], 0 or 1: whether the probability is `options.tau` or more."""
    return (self.predict_proba(x)[:, 1] >= self.options.tau).astype(int)

  def _standardise(self, x: np.ndarray) -> np.ndarray:
    return ((x - self._mean) / self._scale).astype(np.float32)


def check_bags(
  bags: Sequence, counts: Mapping | Sequence[int], n: int
) -> tuple[np.ndarray, np.ndarray]:
  """The bags as codes 0 ... B-1 [n] and the counts [B] in that order.

  Raises:
    UserError: what `BagClassifier.fit` lists about bags and counts.
  """
  bags = np.asarray(bags)
  if bags.shape != (n,):
    raise UserError(f"bags is of shape {bags.shape}; expected one bag for each of the {n} rows")
  if bags.dtype == object and any(bag is None for bag in bags):
    raise UserError("bags has missing values (None); drop those rows")
  if bags.dtype.kind == "f" and not np.isfinite(bags).all():
    raise UserError(f"bags has {(~np.isfinite(bags)).sum()} missing values; drop those rows")
  labels, codes = np.unique(bags, return_inverse=True)
  labels = labels.tolist()
  if isinstance(counts, Mapping):
    if empty := [bag for bag in counts if bag not in set(labels)]:
      raise UserError(f"bag {empty[0]!r} has a count but no rows; drop it, or add its rows")
    if uncounted := [bag for bag in labels if bag not in counts]:
      raise UserError(f"bag {uncounted[0]!r} has no count; give one, or drop its rows")
    counts = [counts[bag] for bag in labels]
  try:
    counts = np.asarray(counts, np.float64)
  except (TypeError, ValueError):
    raise UserError("counts must be numbers: the positives of every bag") from None
  if counts.shape != (len(labels),):
    raise UserError(
      f"counts is of shape {counts.shape}, but {len(labels)} bags have rows; expected one count for "
      "each; drop the counts of empty bags"
    )
  sizes = np.bincount(codes)
  bad = ~((counts >= 0) & (counts <= sizes) & (counts == np.round(counts)))
  if bad.any():
    b = int(bad.argmax())
    raise UserError(
      f"the count of bag {labels[b]!r} is {counts[b]:g}; expected a whole number from 0 to its "
      f"{sizes[b]} rows"
    )
  if len(labels) < 2:
    raise UserError("there is 1 bag; expected at least 2: some are held out for validation")
  return codes, counts


def _check_options(options: llp_bp.Options) -> None:
  choices = {
    "bag_factor": BAG_FACTORS,
    "pseudo_labels": llp_bp.PSEUDO_LABELS,
    "kernel": graph.KERNELS,
    "metric": ("euclidean", "cosine"),
    "encoder": ("mlp", "cnn"),
  }
  for name, allowed in choices.items():
    if getattr(options, name) not in allowed:
      raise UserError(f"{name} is {getattr(options, name)!r}; expected {' or '.join(allowed)}")
  for name in ("neighbours", "lambda_s", "lambda_bag", "learning_rate", "weight_decay", "hidden"):
    values = getattr(options, name)
    if not isinstance(values, tuple) or not values or not all(np.isfinite(v) for v in values):
      raise UserError(f"{name} is {values!r}; expected a tuple of numbers, such as (5, 10)")
    if min(values) < (1 if name in ("neighbours", "hidden") else 0):
      raise UserError(f"{name} is {values}; expected no negative numbers, and no 0 neighbours")
  if not 0 <= options.damping < 1:
    raise UserError(f"damping is {options.damping}; expected a share from 0 to below 1")
  if options.rounds < 1 or not 1 <= options.validations <= options.steps:
    raise UserError(
      f"rounds={options.rounds}, steps={options.steps}, validations={options.validations}; expected "
      "at least 1 of each, and no more validations than steps"
    )
