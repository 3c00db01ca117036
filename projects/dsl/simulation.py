"""Monte-Carlo experiments: designs with a known truth, drawn and estimated many times in one map."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from common.reporting.report import Column
from projects.dsl import baselines, dsl, moments
from projects.dsl.learners import Learner
from projects.dsl.moments import Estimate, Family
from projects.dsl.problem import OUTCOME, Data, Problem

# All of them in the order of the tables; "full": every document labelled by experts.
METHODS = ("full", "SO", "pooled", "SSL", "GSO", "DSL")


@dataclasses.dataclass(frozen=True)
class Design:
  """Something to draw data sets from.

  Attributes:
    draw: (key, *parameters) -> Data, float64; `expert` says which units are labelled.
    truth: coefficients of the population, [k].
    family: of the regression.
    gold: places of the gold variables.
    labels: how many units are labelled in every draw; None if that is left to chance.
  """

  draw: Callable[..., Data]
  truth: tuple[float, ...]
  family: Family
  gold: tuple[int, ...] = (OUTCOME,)
  labels: int | None = None


@dataclasses.dataclass(frozen=True)
class Replications:
  """What an estimator gave in every draw.

  Attributes:
    theta: [draws, k].
    errors: standard errors [draws, k].
    truth: [k].
    converged: bool [draws]; the others are of no account below, and counted in `failures`.
  """

  theta: np.ndarray
  errors: np.ndarray
  truth: np.ndarray
  converged: np.ndarray

  @property
  def failures(self) -> int:
    return int((~self.converged).sum())

  def block(self, index: int, blocks: int) -> "Replications":
    """The index-th of equally many draws."""
    part = slice(index, None, blocks)
    return Replications(self.theta[part], self.errors[part], self.truth, self.converged[part])

  def blocks(self, metric: str, j: int, blocks: int) -> list[float]:
    """A metric of coefficient j in each block of draws."""
    return [getattr(self.block(i, blocks), metric)(j) for i in range(blocks)]

  def bias(self, j: int) -> float:
    return float(self._values(j).mean() - self.truth[j])

  def standardised_bias(self, j: int) -> float:
    """|bias| in standard deviations of the estimator."""
    return abs(self.bias(j)) / float(self._values(j).std(ddof=1))

  def rmse(self, j: int) -> float:
    return float(np.sqrt(((self._values(j) - self.truth[j]) ** 2).mean()))

  def coverage(self, j: int, level: float = 0.95) -> float:
    """Share of confidence intervals that hold the truth."""
    reach = stats.norm.ppf((1 + level) / 2) * self.errors[self.converged, j]
    return float((np.abs(self._values(j) - self.truth[j]) <= reach).mean())

  def width(self, j: int) -> float:
    """Mean width of the 95 % interval."""
    return float(2 * stats.norm.ppf(0.975) * self.errors[self.converged, j].mean())

  def _values(self, j: int) -> np.ndarray:
    return self.theta[self.converged, j]


def replicate(
  design: Design,
  methods: Sequence[str],
  learner: Learner | str,
  *,
  draws: int,
  seed: int,
  folds: int = 5,
  parameters: tuple[float, ...] = (),
) -> dict[str, Replications]:
  """Draws data sets and estimates each by every method, with one split per draw.

  All draws are one compiled program. On a CPU a map over single draws is faster than one over
  batches, whose Newton iterations wait for the slowest draw.

  Args:
    design: what to draw.
    methods: "DSL", the names of `baselines.BASELINES`, "full" (every gold label known), and
      "ignoring pi" (DSL with equal probabilities).
    learner: a JAX learner, or "surrogate" or "zero".
    draws: Monte-Carlo draws.
    seed: of everything.
    folds: L.
    parameters: of the design's draws; other ones need no other program.

  Returns:
    {method: Replications}.
  """
  with jax.enable_x64():
    keys = jax.random.split(jax.random.key(seed), draws)
    estimates = estimate_draws(design, tuple(methods), learner, folds, keys, parameters)
    truth = np.asarray(design.truth)
    return {
      name: Replications(
        np.asarray(e.theta), np.asarray(_errors(e)), truth, np.asarray(e.converged)
      )
      for name, e in estimates.items()
    }


def fits(design: Design, model: dsl.DSL, *, draws: int, seed: int) -> list[dsl.Fit]:
  """Fits DSL, with any learner, to one draw at a time."""
  names = tuple(f"x{j}" for j in range(len(design.truth)))
  draw = jax.jit(lambda key: observed(design.draw(key), design.gold))
  with jax.enable_x64():
    keys = jax.random.split(jax.random.key(seed), draws)
    data = [jax.tree.map(np.asarray, draw(key)) for key in keys]
  return [model.fit(Problem(d, design.gold, names)) for d in data]


def replicate_with(design: Design, model: dsl.DSL, *, draws: int, seed: int) -> Replications:
  """`replicate` for DSL with any learner."""
  found = fits(design, model, draws=draws, seed=seed)
  return Replications(
    np.stack([fit.coefficients for fit in found]),
    np.stack([fit.standard_errors for fit in found]),
    np.asarray(design.truth),
    np.ones(draws, bool),
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def estimate_draws(
  design: Design,
  methods: tuple[str, ...],
  learner: Learner | str,
  folds: int,
  keys: Array,
  parameters: tuple[float, ...] = (),
) -> dict[str, Estimate]:
  """Every method's estimate in the draw of every key [draws]; leaves have that leading axis."""
  gold = design.gold

  def sample_of(name, full, data, predictions):
    if name in baselines.BASELINES:
      return baselines.baseline_sample(name, data, gold, predictions)
    if name == "full":
      return baselines.as_if_true(data, gold, dsl.gold_values(full, gold))
    if name == "ignoring pi":
      share = jnp.mean(data.labelled)
      data = data._replace(probability=jnp.full_like(data.probability, share))
    return dsl.doubly_robust_sample(data, gold, predictions)

  def of_draw(key):
    draw_key, split_key = jax.random.split(key)
    full = design.draw(draw_key, *parameters)
    data = observed(full, gold)
    predictions = dsl.predict_gold(split_key, data, gold, learner, folds, design.labels)
    samples = [sample_of(name, full, data, predictions) for name in methods]
    # Mapped over the methods too: the estimator is compiled once, not once a method.
    return jax.lax.map(
      lambda sample: moments.estimate(design.family, sample, data.clusters),
      jax.tree.map(lambda *leaves: jnp.stack(leaves), *samples),
    )

  estimates = jax.lax.map(of_draw, keys)
  return {
    name: jax.tree.map(lambda leaf, i=i: leaf[:, i], estimates) for i, name in enumerate(methods)
  }


def observed(full: Data, gold: tuple[int, ...]) -> Data:
  """Hides the gold values of units that are not labelled."""
  values = dsl.gold_values(full, gold) * full.labelled[:, None]
  x, y = dsl.replace_gold(full, gold, values)
  return full._replace(x=x, y=y)


def expert(key: Array, probability: Array, count: int | None = None) -> tuple[Array, Array]:
  """Draws who is labelled.

  Args:
    key: of the draw.
    probability: [n].
    count: draw exactly so many, all alike, instead of each unit on its own.

  Returns:
    R and pi rescaled to the mean of R, each [n].
  """
  uniform = jax.random.uniform(key, probability.shape)
  if count is None:
    labelled = (uniform < probability).astype(probability.dtype)
  else:
    labelled = (jnp.argsort(uniform) < count).astype(probability.dtype)
  return labelled, probability * jnp.mean(labelled) / jnp.mean(probability)


def flipped(key: Array, labels: Array, error: Array) -> Array:
  """Labels of 0 and 1, each turned round with its own probability."""
  return jnp.where(jax.random.uniform(key, labels.shape) < error, 1 - labels, labels)


@functools.cache  # An equal design is the same one, and needs no other program.
def logistic_outcome(
  units: int = 4000, labels: int = 500, *, unequal: tuple[float, float] | None = None
) -> Design:
  """Documents whose label is regressed on three covariates; the surrogate errs with x_1.

  Y ~ Bernoulli(sigmoid(-0.5 + 0.8 x_1 - 0.5 x_2)); Q turns Y round with probability
  error + excess 1{x_1 > 0}; these two are the parameters of the draws, 0.05 and 0.25 by default.

  Args:
    units: N.
    labels: expert labels.
    unequal: probabilities of labelling where Q = 1 and where Q = 0, instead of `labels`.
  """
  truth = (-0.5, 0.8, -0.5, 0.0)

  def draw(key, error=0.05, excess=0.25):
    x_key, y_key, q_key, r_key = jax.random.split(key, 4)
    x = jnp.column_stack([jnp.ones(units), jax.random.normal(x_key, (units, 3))])
    p = jax.nn.sigmoid(x @ jnp.array(truth))
    y = (jax.random.uniform(y_key, (units,)) < p).astype(p.dtype)
    q = flipped(q_key, y, error + excess * (x[:, 1] > 0))
    if unequal is None:
      labelled, probability = expert(r_key, jnp.full(units, labels / units), labels)
    else:
      labelled, probability = expert(r_key, jnp.where(q > 0, *unequal))
    features = jnp.column_stack([q, x[:, 1:]])
    return Data(x, y, q[:, None], features, labelled, probability)

  return Design(draw, truth, "logistic", labels=labels if unequal is None else None)


def accuracy(
  design: Design, parameters: tuple[float, ...] = (), *, draws: int = 20, seed: int = 0
) -> float:
  """Share of a binary outcome's surrogates that are right."""
  with jax.enable_x64():
    keys = jax.random.split(jax.random.key(seed), draws)
    return float(_share_right(design, keys, parameters))


@functools.partial(jax.jit, static_argnums=0)
def _share_right(design: Design, keys: Array, parameters: tuple[float, ...]) -> Array:
  def of_draw(key):
    data = design.draw(key, *parameters)
    return jnp.mean(data.y == data.surrogates[:, 0])

  return jnp.mean(jax.lax.map(of_draw, keys))


def linear_model(
  predicted: str, units: int = 4000, labels: int = 500, *, family: Family = "linear"
) -> Design:
  """y on x_1, x_2 with the outcome, the covariate x_1, or both labelled by experts.

  Surrogates err with the other variables: of x_1 it is 0.7 x_1 + 0.3 x_2 + noise, of y (linear) it
  is 0.8 y + 0.4 x_2 + noise, of y (logistic) a label turned round more often where x_2 > 0.

  Args:
    predicted: "outcome", "covariate" or "both".
    units: N.
    labels: expert labels.
    family: of the regression.
  """
  truth = (0.3, 1.0, -0.5) if family == "linear" else (-0.3, 0.8, -0.5)
  gold = {"outcome": (OUTCOME,), "covariate": (1,), "both": (OUTCOME, 1)}[predicted]

  def draw(key):
    keys = jax.random.split(key, 6)
    normal = lambda key: jax.random.normal(key, (units,))
    x_2 = normal(keys[0])
    x_1 = 0.5 * x_2 + normal(keys[1])
    x = jnp.column_stack([jnp.ones(units), x_1, x_2])
    eta = x @ jnp.array(truth)
    q_x = 0.7 * x_1 + 0.3 * x_2 + 0.5 * normal(keys[2])
    if family == "linear":
      y = eta + (0.5 + 0.5 * jnp.abs(x_2)) * normal(keys[3])  # Heteroscedastic: HC errors matter.
      q_y = 0.8 * y + 0.4 * x_2 + 0.5 * normal(keys[4])
    else:
      y = (jax.random.uniform(keys[3], (units,)) < jax.nn.sigmoid(eta)).astype(eta.dtype)
      q_y = flipped(keys[4], y, 0.05 + 0.2 * (x_2 > 0))
    labelled, probability = expert(keys[5], jnp.full(units, labels / units), labels)
    surrogates = {OUTCOME: q_y, 1: q_x}
    known = {OUTCOME: y, 1: x_1}
    q = jnp.column_stack([surrogates[place] for place in gold])
    rest = [v for place, v in known.items() if place not in gold]
    return Data(x, y, q, jnp.column_stack([q, x_2, *rest]), labelled, probability)

  return Design(draw, truth, family, gold, labels)


def clustered_panel(
  groups: int = 80, periods: int = 25, labels: int = 500, *, effects: int, robust: bool
) -> Design:
  """A panel with errors that are alike within a group.

  Args:
    groups: of units.
    periods: units of each group.
    labels: expert labels.
    effects: 0, 1 (groups) or 2 (groups and periods) fixed effects; with 0 there are none in truth.
    robust: whether errors are computed by group.
  """
  units = groups * periods
  group = np.repeat(np.arange(groups), periods).astype(np.int32)
  period = np.tile(np.arange(periods), groups).astype(np.int32)

  def draw(key):
    keys = jax.random.split(key, 7)
    shared = jax.random.normal(keys[0], (groups,))[group]
    x = shared + jax.random.normal(keys[1], (units,))
    noise = 0.7 * jax.random.normal(keys[2], (groups,))[group] if effects == 0 else 0.0
    # A trend of each group's own: alike within a group, and not a fixed effect.
    trend = jax.random.normal(keys[3], (groups,))[group] * (period / periods - 0.5)
    fixed = (shared if effects > 0 else 0.0) + (0.1 * period if effects > 1 else 0.0)
    y = 0.5 * x + fixed + noise + trend + jax.random.normal(keys[4], (units,))
    q = 0.8 * y + 0.3 * x + 0.5 * jax.random.normal(keys[5], (units,))
    labelled, probability = expert(keys[6], jnp.full(units, labels / units), labels)
    columns = [x] if effects else [jnp.ones(units), x]
    return Data(
      jnp.column_stack(columns),
      y,
      q[:, None],
      jnp.column_stack([q, x]),
      labelled,
      probability,
      jnp.asarray(group) if robust else None,
      jnp.asarray(np.stack([group, period][:effects], axis=1)) if effects else None,
    )

  return Design(draw, (0.5,) if effects else (0.0, 0.5), "linear", labels=labels)


def resampled(
  x: np.ndarray,
  y: np.ndarray,
  surrogates: np.ndarray,
  features: np.ndarray,
  family: Family,
  labels: int,
) -> Design:
  """Draws units with replacement from real data, whose own regression is the truth.

  Args:
    x: design [n, k].
    y: outcome [n], the gold variable.
    surrogates: [n].
    features: [n, p].
    family: of the regression.
    labels: expert labels per draw.
  """
  with jax.enable_x64():
    arrays = tuple(np.asarray(a, np.float64) for a in (x, y, surrogates, features))
    x, y, q, features = arrays
    weight = jnp.zeros(len(y))
    sample = moments.Sample(*map(jnp.asarray, (x, y, x, y)), weight)
    truth = tuple(np.asarray(_estimate(family, sample).theta).tolist())

  def draw(key):
    row_key, r_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (len(y),), 0, len(y))
    take = lambda a: jnp.asarray(a)[rows]
    labelled, probability = expert(r_key, jnp.full(len(y), labels / len(y)), labels)
    return Data(take(x), take(y), take(q)[:, None], take(features), labelled, probability)

  return Design(draw, truth, family, labels=labels)


def metric_columns() -> list[Column]:
  return [
    Column("bias", "+.4f"),
    Column("bias / sd", ".2f"),
    Column("RMSE", ".4f"),
    Column("coverage", ".3f"),
    Column("width", ".4f"),
    "no root",
  ]


def metrics(result: Replications, j: int) -> list[float]:
  """The cells of `metric_columns` for coefficient j."""
  return [
    result.bias(j),
    result.standardised_bias(j),
    result.rmse(j),
    result.coverage(j),
    result.width(j),
    result.failures,
  ]


_estimate = functools.partial(jax.jit, static_argnums=0)(moments.estimate)


def _errors(estimate: Estimate) -> Array:
  return jnp.sqrt(jnp.diagonal(estimate.covariance, axis1=-2, axis2=-1))
