"""Post-hoc deferral rules: a small network that learns, on held-out inputs, where deferral helps.

  Post-Hoc-Quantile     phi = quantiles of the token log-probabilities, their sum, mean, log n
  Post-Hoc-Embed-1      phi + the small model's final-layer decoder state, mean over the output
  Post-Hoc-Embed-1+2    phi + that + the large model's intermediate state at the first position

The target is one of

  diff01         [h_2 right] - [h_1 right]      squared loss
  diff_quality   m(h_2) - m(h_1)                squared loss
  correct1       [h_1 right]                    logistic loss

and the score is minus the predicted gain (of correct1, the log odds of the small model being
right). Shapes: `n` inputs, `features` numbers of each, `runs` networks from different keys.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.isotonic import IsotonicRegression

from projects.lm_cascades.deferral import auc_dc, chow_average, chow_quantile, chow_sum

Array = jax.Array
PyTree = dict
Target = Literal["diff01", "correct1", "diff_quality"]
TARGETS = ("diff01", "correct1", "diff_quality")

# Widths are filled with zeros to a multiple of this: feature sets of like width share a program.
_WIDTH = 32


class Labels(NamedTuple):
  """Quality of both models' answers, all float32 [n]: graded, and whether they are right (0/1)."""

  small: np.ndarray
  large: np.ndarray
  small_right: np.ndarray
  large_right: np.ndarray

  def take(self, rows: np.ndarray) -> "Labels":
    """The labels of some rows, int [m]."""
    return Labels(*(x[rows] for x in self))

  def target(self, name: Target) -> np.ndarray:
    """What the network is to predict, float32 [n]."""
    if name == "correct1":
      return self.small_right
    if name == "diff01":
      return self.large_right - self.small_right
    return self.large - self.small


class Network(nnx.Module):
  """Five linear layers; batch norm and ReLU follow all but the last. [n, features] -> [n]."""

  def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs):
    widths = [features, *[hidden] * 4]
    self.linears = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in zip(widths, widths[1:])])
    # Momentum 0.9: an epoch on a small set has few batches.
    self.norms = nnx.List([nnx.BatchNorm(hidden, momentum=0.9, rngs=rngs) for _ in self.linears])
    self.head = nnx.Linear(hidden, 1, rngs=rngs)

  def __call__(self, x: Array, *, train: bool) -> Array:
    for linear, norm in zip(self.linears, self.norms):
      x = nnx.relu(norm(linear(x), use_running_average=not train))
    return self.head(x)[:, 0]


class Scorer(NamedTuple):
  """`runs` fitted networks and the standardisation of their inputs.

  Attributes:
    params, statistics: of the networks, leaves [runs, ...].
    mean, scale: float32 [features], of the training rows.
    hidden: units of a hidden layer.
    sign: the score is sign * output: -1 where the output is a gain.
    best_epoch: int32 [runs], the epoch of the largest validation AUC-DC, from 0.
  """

  params: PyTree
  statistics: PyTree
  mean: np.ndarray
  scale: np.ndarray
  hidden: int
  sign: float
  best_epoch: np.ndarray


def quantile_features(log_probs: Array, mask: Array, num_quantiles: int = 11) -> np.ndarray:
  """phi of Post-Hoc-Quantile, float32 [n, num_quantiles + 3].

  Equally spaced quantiles from the minimum to the maximum, then sum, mean and log n.

  Args:
    log_probs: float32 [n, tokens], in nats.
    mask: bool [n, tokens].
  """
  quantiles = chow_quantile(log_probs, mask, np.linspace(0, 1, num_quantiles, dtype=np.float32))
  log_n = jnp.log(jnp.sum(mask, axis=1).astype(jnp.float32))
  columns = [chow_sum(log_probs, mask), chow_average(log_probs, mask), log_n]
  return np.asarray(jnp.column_stack([quantiles, *columns]))


def fit(
  features: np.ndarray,
  labels: Labels,
  *,
  target: Target,
  train: np.ndarray,
  validation: np.ndarray,
  key: Array,
  runs: int,
  hidden: int,
  learning_rate: float,
  batch_size: int,
  epochs: int,
) -> Scorer:
  """Fits `runs` networks; each keeps its weights of the epoch of the best validation AUC-DC.

  Args:
    features: float32 [n, features] of calibration inputs.
    labels: of the same inputs.
    target: what to predict.
    train, validation: int [rows], disjoint rows of the calibration inputs. A row that is listed
      twice is seen twice in an epoch.
    key: typed PRNG key [].

  Raises:
    ValueError: a feature is not finite.
  """
  if not np.isfinite(features).all():
    raise ValueError("features of a post-hoc rule hold NaN or infinite values")
  mean = features[train].mean(axis=0)
  spread = features[train].std(axis=0)
  scale = np.where(spread > 1e-6, spread, 1.0)
  logistic = target == "correct1"
  fitted = fit_networks(
    _standardise(features, mean, scale),
    labels.target(target).astype(np.float32),
    labels.small,
    labels.large,
    train,
    validation,
    jax.random.split(key, runs),
    learning_rate,
    logistic,
    hidden=hidden,
    batch_size=min(batch_size, len(train)),
    epochs=epochs,
  )
  params, statistics, best_epoch = fitted
  return Scorer(params, statistics, mean, scale, hidden, 1.0 if logistic else -1.0, best_epoch)


def predict(scorer: Scorer, features: np.ndarray) -> np.ndarray:
  """Scores, high where the small model's answer is to be kept, float32 [runs, n]."""
  x = _standardise(features, scorer.mean, scorer.scale)
  outputs = _predict(scorer.params, scorer.statistics, x, hidden=scorer.hidden)
  return scorer.sign * np.asarray(outputs)


def calibrate(scores: np.ndarray, gain: np.ndarray) -> IsotonicRegression:
  """E[gain | score] as a falling function of the score, by isotonic regression.

  Its `predict` turns any rule's scores into expected gains, to be compared with the price of a
  call of the large model: defer where the gain is above the price.

  Args:
    scores: float [n] of calibration inputs, none of them used to fit the rule.
    gain: float [n], m(h_2) - m(h_1).
  """
  return IsotonicRegression(increasing=False, out_of_bounds="clip").fit(scores, gain)


def _standardise(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Zero mean and unit variance, filled with zeros to a multiple of `_WIDTH` columns."""
  x = ((features - mean) / scale).astype(np.float32)
  return np.pad(x, ((0, 0), (0, -x.shape[1] % _WIDTH)))


def _graphdef(features: int, hidden: int) -> nnx.GraphDef:
  network = nnx.eval_shape(lambda: Network(features, hidden, rngs=nnx.Rngs(0)))
  return nnx.split(network, nnx.Param, nnx.BatchStat)[0]


@functools.partial(jax.jit, static_argnames="hidden")
def _predict(params, statistics, x, *, hidden):
  graphdef = _graphdef(x.shape[1], hidden)
  return jax.vmap(lambda p, s: nnx.merge(graphdef, p, s)(x, train=False))(params, statistics)


@functools.partial(jax.jit, static_argnames=("hidden", "batch_size", "epochs"))
def fit_networks(
  x,
  target,
  small,
  large,
  train,
  validation,
  keys,
  learning_rate,
  logistic,
  *,
  hidden,
  batch_size,
  epochs,
):
  """Parameters, running statistics and best epoch of a network per key; rows x [n, features]."""
  graphdef = _graphdef(x.shape[1], hidden)
  # Adam's step is scaled afterwards, so that the learning rate is an argument, not a constant.
  adam = optax.scale_by_adam()

  def loss_fn(params, statistics, rows):
    # A copy: the running statistics that batch norm writes belong to this trace.
    network = nnx.merge(graphdef, params, statistics, copy=True)
    output = network(x[rows], train=True)
    y = target[rows]
    losses = jnp.where(
      logistic, optax.sigmoid_binary_cross_entropy(output, y), jnp.square(output - y)
    )
    # The running statistics leave as auxiliary output: no gradient goes through them.
    return jnp.mean(losses), nnx.state(network, nnx.BatchStat)

  def step(carry, rows):
    params, statistics, moments = carry
    grads, statistics = jax.grad(loss_fn, has_aux=True)(params, statistics, rows)
    updates, moments = adam.update(grads, moments)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    return (params, statistics, moments), None

  def epoch(carry, i):
    (params, statistics, moments), best, key = carry
    key, use = jax.random.split(key)
    rows = jax.random.permutation(use, train)[: len(train) // batch_size * batch_size]
    state, _ = jax.lax.scan(step, (params, statistics, moments), rows.reshape(-1, batch_size))
    output = nnx.merge(graphdef, *state[:2])(x[validation], train=False)
    score = jnp.where(logistic, output, -output)
    auc = auc_dc(score, small[validation], large[validation])
    now = (auc, state[0], state[1], i)
    best = jax.tree.map(lambda new, old: jnp.where(auc > best[0], new, old), now, best)
    return (state, best, key), None

  def one(key):
    init, key = jax.random.split(key)
    network = Network(x.shape[1], hidden, rngs=nnx.Rngs(init))
    _, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
    best = (-jnp.inf, params, statistics, 0)
    carry = ((params, statistics, adam.init(params)), best, key)
    (_, best, _), _ = jax.lax.scan(epoch, carry, jnp.arange(epochs))
    return best[1:]

  return jax.vmap(one)(keys)
