"""The three neural base learners: conditional Gaussian, simultaneous and multiple quantiles.

CGN  a network with a mean and a variance, trained by likelihood; quantiles mu + sigma Phi^-1(tau)
SQR  one network of (x, tau - 1/2), trained by pinball loss at random levels
MQR  one network with an output for every level, trained by pinball loss and the crossing penalty
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from projects.quantile_aggregation import losses, training
from projects.quantile_aggregation.aggregators import Settings

Kind = Literal["CGN", "SQR", "MQR"]

_VARIANCE_FLOOR = 1e-6


def init(key: jax.Array, kind: Kind, d: int, m: int, layers: int, width: int):
  inputs, outputs = {"CGN": (d, 2), "SQR": (d + 1, 1), "MQR": (d, m)}[kind]
  return training.init_mlp(key, [inputs, *[width] * layers, outputs])


def gaussian(params, x: jax.Array, **dropout) -> tuple[jax.Array, jax.Array]:
  """CGN's mean and variance, [n] each."""
  mean, raw = training.mlp(params, x, **dropout).T
  return mean, jax.nn.softplus(raw) + _VARIANCE_FLOOR


def gaussian_quantiles(mean: jax.Array, variance: jax.Array, levels: jax.Array) -> jax.Array:
  """mu + sigma Phi^-1(tau): [n], [n], [m] -> [n, m]."""
  return mean[:, None] + jnp.sqrt(variance)[:, None] * norm.ppf(levels)


def simultaneous(params, x: jax.Array, level: jax.Array, **dropout) -> jax.Array:
  """SQR's quantile of every row at its own level: [n, d], [n] -> [n]."""
  return training.mlp(params, jnp.column_stack([x, level - 0.5]), **dropout)[:, 0]


def quantiles(params, x: jax.Array, levels: jax.Array, kind: Kind) -> jax.Array:
  """Predictions of a network of any kind. [n, d], [m] -> [n, m]."""
  if kind == "CGN":
    return gaussian_quantiles(*gaussian(params, x), levels)
  if kind == "MQR":
    return training.mlp(params, x)
  at = lambda level: simultaneous(params, x, jnp.full(len(x), level))
  return jax.vmap(at, out_axes=1)(levels)


def loss(params, x, y, levels, key, settings: Settings, kind: Kind) -> jax.Array:
  """What a network of this kind minimises on a batch, a scalar."""
  dropout = {"dropout": settings.dropout, "key": key}
  if kind == "CGN":
    mean, variance = gaussian(params, x, **dropout)
    return 0.5 * (jnp.log(variance) + (y - mean) ** 2 / variance).mean()
  if kind == "SQR":
    level = jax.random.uniform(jax.random.fold_in(key, 1), y.shape)
    q = simultaneous(params, x, level, **dropout)
    return losses.pinball(q[:, None], y, level[:, None], settings.alpha).mean()
  q = training.mlp(params, x, **dropout)
  fit = losses.pinball(q, y, levels, settings.alpha).mean()
  return fit + settings.margin_weight * losses.crossing_penalty(q, settings.margins)


@functools.partial(jax.jit, static_argnames=("kind", "layers", "width", "batch_size", "max_rounds"))
def train(
  keys: jax.Array,
  train_data: tuple[jax.Array, jax.Array],
  masks: jax.Array,
  validation_data: tuple[jax.Array, jax.Array],
  levels: jax.Array,
  settings: Settings,
  rounds: jax.Array,
  patience: jax.Array,
  *,
  kind: Kind,
  layers: int,
  width: int,
  batch_size: int,
  max_rounds: int,
) -> training.Trained:
  """B networks at once; see `aggregators.train`. Data are (x [n, d], y [n])."""
  d, m = train_data[0].shape[1], len(levels)

  def validate(params):
    x, y = validation_data
    return losses.validation_loss(quantiles(params, x, levels, kind), y, levels)

  def one(key, mask, settings, rounds):
    init_key, key = jax.random.split(key)
    return training.minimise(
      lambda params, batch, key: loss(params, *batch, levels, key, settings, kind),
      validate,
      init(init_key, kind, d, m, layers, width),
      train_data,
      mask,
      key,
      learning_rate=settings.learning_rate,
      weight_decay=settings.weight_decay,
      batch_size=batch_size,
      rounds=jnp.minimum(rounds, max_rounds),
      patience=patience,
    )

  return jax.vmap(one)(keys, masks, settings, rounds)


@functools.partial(jax.jit, static_argnames="kind")
def predict(params, x: jax.Array, levels: jax.Array, *, kind: Kind) -> jax.Array:
  """Quantiles of every network in params [B, ...]: [n, d] -> [B, n, m]."""
  return jax.vmap(lambda one: quantiles(one, x, levels, kind))(params)
