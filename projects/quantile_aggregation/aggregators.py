"""Deep quantile aggregation (sections 3 and 4): weights, their resolutions, and how they are learnt.

Base predictions z are [n, p, m]: n rows, p models, m levels. One output at level k is

  coarse   sum_j  w_j    z_jk       weights [p]
  medium   sum_j  w_jk   z_jk       weights [p, m]
  fine     sum_jl w_jlk  z_jl       weights [p, m, m]
  factored the fine form with w_jlk = u_j v_lk, weights [p] and [m, m]

A softmax over models (over models and levels l in the fine form) makes every output a convex
combination. Global weights are parameters and begin at 0; local weights are a network of x.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from projects.quantile_aggregation import losses, training
from projects.quantile_aggregation.isotonic import ISOTONISERS

BATCH = 512  # Rows that are predicted at once.

Resolution = Literal["coarse", "medium", "fine", "factored"]


class Form(NamedTuple):
  """Which aggregator: what is fixed while it is trained.

  Attributes:
    resolution: see the head of this file.
    local: weights depend on x.
    normalise: softmax weights.
    isotoniser: a name of `ISOTONISERS`, applied to every prediction.
    isotonise_in_training: apply it to what the loss sees too ("grad").
    layers, width: of the network of local weights.
  """

  resolution: Resolution = "fine"
  local: bool = True
  normalise: bool = True
  isotoniser: str = "sort"
  isotonise_in_training: bool = False
  layers: int = 2
  width: int = 64


class Settings(NamedTuple):
  """What is searched, one number each (or [S], one per setting).

  Attributes:
    learning_rate, weight_decay, dropout: of the training.
    alpha: of the Huberised pinball loss.
    margin_weight: of the crossing penalty.
    margins: [m, m], the gaps it asks for.
  """

  learning_rate: jax.Array
  weight_decay: jax.Array
  dropout: jax.Array
  alpha: jax.Array
  margin_weight: jax.Array
  margins: jax.Array


def num_weights(resolution: Resolution, p: int, m: int) -> int:
  """Logits per row."""
  return {"coarse": p, "medium": p * m, "fine": p * m * m, "factored": p + m * m}[resolution]


def weights(logits: jax.Array, resolution: Resolution, p: int, m: int, normalise: bool = True):
  """Logits [..., num_weights] as weights: [..., p], [..., p, m] or [..., p, m, m].

  In the fine form logits run over (model, level l, output level k), the last fastest.
  """
  softmax = jax.nn.softmax if normalise else lambda x, axis: x
  lead = logits.shape[:-1]
  if resolution == "coarse":
    return softmax(logits, axis=-1)
  if resolution == "medium":
    return softmax(logits.reshape(*lead, p, m), axis=-2)
  if resolution == "fine":
    return softmax(logits.reshape(*lead, p * m, m), axis=-2).reshape(*lead, p, m, m)
  models = softmax(logits[..., :p], axis=-1)
  levels = softmax(logits[..., p:].reshape(*lead, m, m), axis=-2)
  return models[..., :, None, None] * levels[..., None, :, :]


def combine(z: jax.Array, w: jax.Array, resolution: Resolution) -> jax.Array:
  """Weighted base predictions: z [n, p, m], w with or without a leading [n] -> [n, m]."""
  subscripts = {"coarse": "...p,...pm->...m", "medium": "...pm,...pm->...m"}
  subscript = subscripts.get(resolution, "...plk,...pl->...k")
  return jnp.einsum(subscript, w, z, precision="highest")


def init(key: jax.Array, form: Form, d: int, p: int, m: int):
  """Parameters: logits at 0, or a network from x [d] to logits."""
  outputs = num_weights(form.resolution, p, m)
  if not form.local:
    return jnp.zeros(outputs)
  return training.init_mlp(key, [d, *[form.width] * form.layers, outputs])


def aggregate(params, z: jax.Array, x: jax.Array, form: Form, *, dropout=0.0, key=None):
  """Aggregated quantiles before isotonisation. z [n, p, m], x [n, d] -> [n, m]."""
  p, m = z.shape[-2:]
  logits = training.mlp(params, x, dropout=dropout, key=key) if form.local else params
  return combine(z, weights(logits, form.resolution, p, m, form.normalise), form.resolution)


def objective(q: jax.Array, y: jax.Array, levels: jax.Array, settings: Settings, form: Form):
  """Mean pinball loss + margin_weight * crossing penalty, a scalar.

  The penalty is on the raw quantiles: isotonic ones cross nowhere.
  """
  penalty = losses.crossing_penalty(q, settings.margins)
  if form.isotonise_in_training:
    q = ISOTONISERS[form.isotoniser](q)
  fit = losses.pinball(q, y, levels, settings.alpha).mean()
  return fit + settings.margin_weight * penalty


@functools.partial(jax.jit, static_argnames=("form", "batch_size", "max_rounds"))
def train(
  keys: jax.Array,
  train_data: tuple[jax.Array, jax.Array, jax.Array],
  masks: jax.Array,
  validation_data: tuple[jax.Array, jax.Array, jax.Array],
  levels: jax.Array,
  settings: Settings,
  rounds: jax.Array,
  patience: jax.Array,
  *,
  form: Form,
  batch_size: int,
  max_rounds: int,
) -> training.Trained:
  """B aggregators at once, each with its own settings, training rows and number of rounds.

  Args:
    keys: [B].
    train_data, validation_data: (z [n, p, m], x [n, d], y [n]); NaN in y for no row.
    masks: [B, n] bool, the rows that each is trained on.
    levels: [m].
    settings: leaves [B, ...].
    rounds: [B] int32, at most so many rounds of `training.STEPS_PER_ROUND` steps.
    patience: int32, rounds without improvement on the validation data before it stops.
  """
  (p, m), d = train_data[0].shape[1:], train_data[1].shape[1]

  def loss(params, batch, key, settings):
    z, x, y = batch
    q = aggregate(params, z, x, form, dropout=settings.dropout, key=key)
    return objective(q, y, levels, settings, form)

  def validate(params):
    z, x, y = validation_data
    q = ISOTONISERS[form.isotoniser](aggregate(params, z, x, form))
    return losses.validation_loss(q, y, levels)

  def one(key, mask, settings, rounds):
    init_key, key = jax.random.split(key)
    return training.minimise(
      lambda params, batch, key: loss(params, batch, key, settings),
      validate,
      init(init_key, form, d, p, m),
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


@functools.partial(jax.jit, static_argnames=("form", "isotonise"))
def predict(params, z: jax.Array, x: jax.Array, *, form: Form, isotonise: bool = True):
  """Quantiles [n, m] of z [n, p, m] and x [n, d].

  In batches of rows: a local fine aggregator has p m^2 weights for every row.
  """

  def row(inputs):
    return aggregate(params, *[a[None] for a in inputs], form)[0]

  q = jax.lax.map(row, (z, x), batch_size=BATCH)
  return ISOTONISERS[form.isotoniser](q) if isotonise else q


def batch_size(n: int) -> int:
  """The paper's 2^(3 + floor(log10 n))."""
  return 2 ** (3 + math.floor(math.log10(n)))
