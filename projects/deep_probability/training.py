"""Training: SGD with momentum, a rate that falls on plateaus, the best validation epoch kept."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from projects.deep_probability import cape, losses
from projects.deep_probability.networks import Network, Weights, initialise, log_odds

Array = jax.Array

# Rows of a forward pass without gradients.
_CHUNK = 1024


class Recipe(NamedTuple):
  """What tells the methods apart. Numbers only: one compiled program serves all of them.

  Attributes:
    learning_rate: at the start.
    targets: cape.LABELS, REDRAWN, BIN or KDE.
    num_bins: B of CaPE-bin.
    sigma: of CaPE-kde, in units of probability.
    ordinary_epochs: c, between two calibration epochs.
    focal_gamma, entropy_beta, mmce_beta: of `losses`; 0 is cross-entropy.
    mmce_power: 1 is MMCE as defined, 2 as the paper's code computes it; see `losses.mmce`.
    adversarial_eps: half of the loss is at x + eps sign(gradient of the loss by x); 0: none of it.
  """

  learning_rate: float
  targets: int = cape.LABELS
  num_bins: int = 10
  sigma: float = 0.05
  ordinary_epochs: int = 2
  focal_gamma: float = 0.0
  entropy_beta: float = 0.0
  mmce_beta: float = 0.0
  mmce_power: float = 2.0
  adversarial_eps: float = 0.0


class Settings(NamedTuple):
  """What the methods share.

  Attributes:
    epochs: E.
    batch_size: at most; an epoch has ceil(n / batch_size) batches of equal size, and leaves out
      the few rows of its shuffle that remain.
    window: w of CaPE-kde.
    momentum, weight_decay: of SGD; decay is added to the gradient.
    factor, patience, smallest_rate: the learning rate is multiplied by `factor` after more than
      `patience` epochs without a validation loss 1e-4 better, relatively, than the best.
  """

  epochs: int
  batch_size: int = 256
  window: int = 100
  momentum: float = 0.9
  weight_decay: float = 5e-4
  factor: float = 0.5
  patience: int = 5
  smallest_rate: float = 1e-6


class Draw(NamedTuple):
  """A draw of outcomes for all N inputs, and a split of them. Stacked, it has an axis of draws.

  Attributes:
    y: outcomes, 0 or 1, float32 [N].
    p: true probabilities, float32 [N]; read by REDRAWN only.
    train, validation, test: rows, int32 [n], [m] and [k], k may be 0.
  """

  y: Array
  p: Array
  train: Array
  validation: Array
  test: Array


class Trained(NamedTuple):
  """What training leaves behind; entry 0 of the E + 1 is the start.

  Attributes:
    best: weights of the smallest validation cross-entropy.
    best_epoch: int [].
    validation_loss: cross-entropy against the outcomes, [E + 1].
    validation, test: log odds of these rows, [E + 1, m] and [E + 1, k].
  """

  best: Weights
  best_epoch: Array
  validation_loss: Array
  validation: Array
  test: Array


@functools.partial(jax.jit, static_argnames="network")
def starts(network: Network, keys: Array) -> Weights:
  """New weights of every draw; keys [draws]."""
  return jax.vmap(functools.partial(initialise, network))(keys)


@functools.partial(jax.jit, static_argnames=("network", "settings"))
def train(
  start: Weights,
  keys: Array,
  x: Array,
  draws: Draw,
  recipe: Recipe,
  *,
  network: Network,
  settings: Settings,
) -> Trained:
  """Trains one method on all draws at once.

  Args:
    start: stacked, [draws, ...].
    keys: of shuffles and redrawn outcomes, [draws].
    x: inputs of all draws, [N, ...], float32 or uint8.
    draws: stacked, [draws, ...].
    recipe: of the method.
    network, settings: static.

  Returns:
    Stacked, [draws, ...].
  """
  one = functools.partial(train_one, network=network, settings=settings)
  return jax.vmap(one, in_axes=(0, 0, None, 0, None))(start, keys, x, draws, recipe)


def train_one(
  start: Weights,
  key: Array,
  x: Array,
  draw: Draw,
  recipe: Recipe,
  *,
  network: Network,
  settings: Settings,
) -> Trained:
  """`train` of a single draw, not jitted."""
  n, m = len(draw.train), len(draw.validation)
  steps = -(-n // settings.batch_size)
  y = draw.y[draw.train]  # [n], in the order of draw.train throughout.
  held_out = jnp.concatenate([draw.validation, draw.test])
  sgd = optax.chain(
    optax.add_decayed_weights(settings.weight_decay), optax.trace(settings.momentum)
  )
  # optax counts the epochs without progress up to `patience`, PyTorch and the paper beyond it.
  plateau = contrib.reduce_on_plateau(
    factor=settings.factor,
    patience=settings.patience + 1,
    rtol=1e-4,
    min_scale=settings.smallest_rate / recipe.learning_rate,
  )
  infer = functools.partial(_infer, network, x=x)

  def epoch_targets(weights, epoch, key):
    kind = cape.epoch_kind(recipe.targets, epoch, recipe.ordinary_epochs)
    # Inference over the training set, in calibration epochs only.
    p_hat = jax.lax.cond(
      kind >= cape.BIN,
      lambda: jax.nn.sigmoid(infer(weights, draw.train)),
      lambda: jnp.zeros(n, y.dtype),
    )
    choices = (
      lambda: y,
      lambda: jax.random.bernoulli(key, draw.p[draw.train]).astype(y.dtype),
      lambda: cape.bin_targets(p_hat, y, recipe.num_bins),
      lambda: cape.kde_targets(p_hat, y, recipe.sigma, settings.window),
    )
    return jax.lax.switch(kind, choices)

  def run_epoch(carry, epoch):
    weights, momentum, rate, best, best_loss = carry
    shuffle_key, redraw_key = jax.random.split(jax.random.fold_in(key, epoch))
    q = epoch_targets(weights, epoch, redraw_key)
    batches = jax.random.permutation(shuffle_key, n)[: n // steps * steps].reshape(steps, -1)

    def step(carry, batch):
      weights, momentum = carry
      gradient, statistics = _gradient(
        network, weights, x[draw.train[batch]], q[batch], y[batch], recipe
      )
      update, momentum = sgd.update(gradient, momentum, weights.params)
      params = jax.tree.map(
        lambda w, u: w - recipe.learning_rate * rate.scale * u, weights.params, update
      )
      return (Weights(params, statistics), momentum), None

    (weights, momentum), _ = jax.lax.scan(step, (weights, momentum), batches)
    z = infer(weights, held_out)
    loss = cape.cross_entropy(z[:m], draw.y[draw.validation]).mean()
    _, rate = plateau.update((), rate, value=loss)
    # A NaN is no improvement: a run that diverges keeps what it had.
    better = loss < best_loss
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), weights, best)
    carry = weights, momentum, rate, best, jnp.where(better, loss, best_loss)
    return carry, (loss, z)

  z = infer(start, held_out)
  loss = cape.cross_entropy(z[:m], draw.y[draw.validation]).mean()
  carry = start, sgd.init(start.params), plateau.init(start.params), start, loss
  carry, (epoch_losses, epoch_z) = jax.lax.scan(run_epoch, carry, jnp.arange(settings.epochs))
  validation_loss = jnp.append(loss, epoch_losses)
  z = jnp.concatenate([z[None], epoch_z])
  # As kept: the first smallest, NaN aside.
  best_epoch = jnp.where(jnp.isnan(validation_loss), jnp.inf, validation_loss).argmin()
  return Trained(carry[3], best_epoch, validation_loss, z[:, :m], z[:, m:])


def _gradient(network: Network, weights: Weights, x: Array, q: Array, y: Array, recipe: Recipe):
  """Gradient of the recipe's loss by the parameters, and the statistics afterwards."""
  if x.dtype == jnp.uint8:
    x = x.astype(jnp.float32) / 255

  def loss(params, x):
    z, statistics = log_odds(network, Weights(params, weights.statistics), x, train=True)
    value = losses.focal(z, q, recipe.focal_gamma) - recipe.entropy_beta * losses.entropy(z)
    penalty = jax.lax.cond(
      recipe.mmce_beta > 0, losses.mmce, lambda *_: 0.0, z, y, recipe.mmce_power
    )
    return value.mean() + recipe.mmce_beta * penalty, statistics

  def at_point(number, carry):
    total, statistics, point = carry
    (gradient, by_x), after = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights.params, point)
    statistics = jax.tree.map(lambda s, a: jnp.where(number == 0, a, s), statistics, after)
    moved = x + recipe.adversarial_eps * jnp.sign(by_x)
    return jax.tree.map(jnp.add, total, gradient), statistics, moved

  # At x and, if adversarial, at the point that x is moved to; one program for both.
  points = jnp.where(recipe.adversarial_eps > 0, 2, 1)
  start = jax.tree.map(jnp.zeros_like, weights.params), weights.statistics, x
  total, statistics, _ = jax.lax.fori_loop(0, points, at_point, start)
  return jax.tree.map(lambda g: g / points, total), statistics


def _infer(network: Network, weights: Weights, rows: Array, *, x: Array) -> Array:
  """Log odds of the rows in inference mode, a chunk at a time; rows [r] -> [r]."""
  forward = lambda rows: log_odds(network, weights, x[rows], train=False)[0]
  if len(rows) <= _CHUNK:
    return forward(rows)
  padded = jnp.pad(rows, (0, -len(rows) % _CHUNK)).reshape(-1, _CHUNK)
  return jax.lax.map(forward, padded).reshape(-1)[: len(rows)]


@functools.partial(jax.jit, static_argnames="network")
def predict(network: Network, weights: Weights, x: Array) -> Array:
  """Log odds of x [n, ...] in inference mode, float32 [n]."""
  return log_odds(network, weights, x, train=False)[0]
