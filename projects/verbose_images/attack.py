"""PGD on images whose captions are re-generated in every iteration.

One program serves the method, its ablations and the baselines: they differ in numbers only. It runs
as a whole on the device; each row of a batch is an attack of its own.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.decoding.generation import Sampling, fold_in
from projects.verbose_images.defences import NO_TRANSFORM, Transform, apply_transform
from projects.verbose_images.generation import (
  NO_BIAS,
  Captions,
  caption_images,
  row_sampling,
  sample_keys,
)
from projects.verbose_images.verbose_images import (
  Losses,
  Objective,
  Weights,
  all_layers,
  diversity_loss,
  eos_loss,
  nicg_loss,
  project,
  sponge_loss,
  total_loss,
  uncertainty_loss,
  update_weights,
)
from projects.verbose_images.vlm import CaptionModel, of_steps, teacher_forced

Array = jax.Array

# "paper": H is the last layer's state of every generated token, and all losses are over these.
# "code": the official code, whose losses include the prefix, and whose H is |h| of all layers.
Variant = Literal["paper", "code"]


class Attacked(NamedTuple):
  """What an attack found.

  Attributes:
    images: the selected ones, float32 [batch, height, width, channels].
    length: their mean length when they were selected, float32 [batch] (optimistic: a maximum).
    clean_length: of the clean images under the same keys, with which the selection begins.
    lengths: mean length of the samples of every iteration, float32 [iterations, batch].
    losses: of every iteration, each [iterations, batch].
    weights: of every iteration, each [iterations, batch].
  """

  images: Array
  length: Array
  clean_length: Array
  lengths: Array
  losses: Losses
  weights: Weights


class Budget(NamedTuple):
  """Numbers that bound an attack.

  Attributes:
    eps: radius of the ball in the maximum norm, pixels from 0 to 1.
    step_size: of one iteration of sign-gradient descent, likewise.
    cap: tokens of a caption at most.
  """

  eps: float
  step_size: float
  cap: int


class _State(NamedTuple):
  """Between two iterations: the perturbation, the text of teacher forcing, and the best so far."""

  delta: Array
  tokens: Array
  steps: Array
  weights: Weights
  best_delta: Array
  best_length: Array


def losses_of(
  model: CaptionModel, images: Array, tokens: Array, steps: Array, variant: Variant
) -> Losses:
  """All losses of images under a text, each float32 [batch].

  Args:
    images: [batch, height, width, channels].
    tokens: int32 [batch, width], y.
    steps: int32 [batch], N.
    variant: see `Variant`.
  """
  forced = teacher_forced(model, images, tokens)
  mask = jnp.arange(tokens.shape[1]) < steps[:, None]
  logits, hidden = of_steps(forced, model.num_prefix)
  if variant == "paper":
    meant, features, rows = logits, hidden, mask
    meant_mask = mask
  else:
    # Every position of the prefix, and that of every token.
    meant = forced.logits
    meant_mask = jnp.pad(mask, ((0, 0), (model.num_prefix, 0)), constant_values=True)
    features = all_layers(forced.hidden)
    rows = jnp.tile(meant_mask, (1, len(forced.hidden)))
  return Losses(
    eos=eos_loss(meant, meant_mask, model.eos),
    uncertainty=uncertainty_loss(meant, meant_mask),
    diversity=diversity_loss(features, rows),
    nicg=nicg_loss(logits, tokens, mask, model.eos),
    sponge=sponge_loss(forced.activations),
  )


def attack(
  model: CaptionModel,
  images: Array,
  key: Array,
  objective: Objective,
  budget: Budget,
  *,
  width: int,
  iterations: int,
  samples: int,
  sampling: Sampling,
  transform: Transform = NO_TRANSFORM,
  variant: Variant = "paper",
) -> Attacked:
  """Lengthens captions by sign-gradient descent, and selects the longest on the way.

  Every iteration descends once under the longest caption of the iteration before, generates `samples`
  captions, and keeps the image if their mean length is the largest yet, which begins with that of the
  clean image.

  Args:
    model: the victim; white box.
    images: clean, [batch, height, width, channels] in [0, 1].
    key: of the start and of all captions.
    objective: what is minimised.
    budget: numbers; others do not compile again.
    width: tokens that arrays have room for, at least the cap.
    iterations, samples: how many.
    sampling: how captions are drawn.
    transform: a defence that the attack goes through; its random numbers are drawn anew each time.
    variant: of the losses.
  """
  graphdef, params = nnx.split(model)
  rows = row_sampling(sampling, len(images) * samples)
  return attack_step(
    graphdef,
    params,
    images,
    key,
    objective,
    budget,
    rows,
    transform,
    width,
    iterations,
    samples,
    variant,
  )


@functools.partial(jax.jit, static_argnums=(0, 8, 9, 10, 11))
def attack_step(
  graphdef,
  params,
  images,
  key,
  objective,
  budget,
  sampling,
  transform,
  width,
  iterations,
  samples,
  variant,
) -> Attacked:
  """`attack` as one program; `sampling` is a `RowSampling` of [batch * samples]."""
  batch = len(images)
  eps = jnp.float32(budget.eps)
  start_key, text_key, transform_key = jax.random.split(key, 3)
  keys = sample_keys(text_key, batch, samples)

  def seen(delta, iteration):
    """What the model is given."""
    return apply_transform(images + delta, transform, jax.random.fold_in(transform_key, iteration))

  def captions(delta, iteration) -> Captions:
    model = nnx.merge(graphdef, params)
    fresh = fold_in(keys.reshape(-1), iteration).reshape(keys.shape)
    return caption_images(
      model, seen(delta, iteration), fresh, sampling, budget.cap, width, NO_BIAS
    )

  def longest(text: Captions):
    """Tokens and steps of the longest sample of each row."""
    best = jnp.argmax(text.lengths, axis=1)
    take = lambda x: jax.vmap(lambda row, i: row[i])(x, best)
    return take(text.tokens), take(text.steps)

  def objective_of(delta, state: _State, iteration):
    model = nnx.merge(graphdef, params)
    losses = losses_of(model, seen(delta, iteration), state.tokens, state.steps, variant)
    weights = update_weights(
      state.weights, losses, iteration, objective.temporal, objective.smoothing
    )
    return jnp.sum(total_loss(losses, weights, objective)), (losses, weights)

  def iterate(state: _State, iteration):
    gradient, (losses, weights) = jax.grad(objective_of, has_aux=True)(
      state.delta, state, iteration
    )
    delta = project(state.delta - budget.step_size * jnp.sign(gradient), images, eps)
    text = captions(delta, iteration)
    length = jnp.mean(text.lengths.astype(jnp.float32), axis=1)
    better = length > state.best_length
    tokens, steps = longest(text)
    state = _State(
      delta=delta,
      tokens=tokens,
      steps=steps,
      weights=jax.lax.stop_gradient(weights),
      best_delta=jnp.where(better[:, None, None, None], delta, state.best_delta),
      best_length=jnp.maximum(length, state.best_length),
    )
    return state, (length, losses, weights)

  clean = captions(jnp.zeros_like(images), 0)
  tokens, steps = longest(clean)
  noise = jax.random.uniform(start_key, images.shape, minval=-1.0, maxval=1.0)
  start = _State(
    delta=project(eps * noise, images, eps),
    tokens=tokens,
    steps=steps,
    weights=Weights(jnp.ones(batch), jnp.ones(batch)),
    best_delta=jnp.zeros_like(images),
    best_length=jnp.mean(clean.lengths.astype(jnp.float32), axis=1),
  )
  state, (lengths, losses, weights) = jax.lax.scan(iterate, start, jnp.arange(1, iterations + 1))
  selected = images + state.best_delta
  return Attacked(selected, state.best_length, start.best_length, lengths, losses, weights)


def random_noise(images: Array, key: Array, eps: Array) -> Array:
  """The same budget without a direction: +eps or -eps at every pixel, clipped to valid ones."""
  signs = jax.random.rademacher(key, images.shape, jnp.float32)
  return images + project(eps * signs, images, eps)
