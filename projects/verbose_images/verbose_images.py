"""Verbose images: the losses, their temporal weights and the projection.

A captioning model draws y_1 ... y_N from p_1 ... p_N, each over V tokens, given an image x + delta with
||delta||_inf <= eps. What lengthens y (section 3 of the paper), each to be minimised:

  L1 = 1/N sum_t p_t[EOS]                     delayed EOS
  L2 = sum_t KL(U || p_t)                     uncertainty of every token, U uniform
  L3 = - ||H||_*                              diversity of the tokens, H their hidden states [N, dim]
  L  = lambda_1 L1 + L2 + lambda_2 L3,        lambda_1 = |L2 / (L1 T1(t))|, lambda_2 = |L2 / (L3 T2(t))|
  T1(t) = 10 ln t - 20,  T2(t) = 0.5 ln t + 1 at iteration t = 1, 2, ..., and each lambda is smoothed:
  lambda <- m lambda + (1 - m) new

Functions take batches; a row is an image with a problem of its own. Positions that are no step of a
row's text are masked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# T1 changes its sign between t = 7 and t = 8.
SMALLEST_DECAY = 1e-3
# Singular values below this share of the largest have no direction in float32.
RANK_TOLERANCE = 1e-5


def eos_loss(logits: Array, mask: Array, eos: int) -> Array:
  """L1, the mean probability of EOS, float32 [batch].

  Args:
    logits: float32 [batch, steps, vocab].
    mask: bool [batch, steps], which steps are meant.
    eos: the token.
  """
  probability = jax.nn.softmax(logits)[..., eos]
  return _masked_mean(probability, mask)


def uncertainty_loss(logits: Array, mask: Array) -> Array:
  """L2 = sum_t KL(U || p_t) = sum_t [ -log V - mean_v log p_t(v) ], float32 [batch]; as `eos_loss`."""
  divergence = -jnp.log(logits.shape[-1]) - jnp.mean(jax.nn.log_softmax(logits), axis=-1)
  return jnp.sum(jnp.where(mask, divergence, 0), axis=-1)


def diversity_loss(hidden: Array, mask: Array) -> Array:
  """L3 = - ||H||_*, float32 [batch].

  Args:
    hidden: float32 [batch, steps, dim].
    mask: bool [batch, steps]; rows of zeros change no singular value.
  """
  return -nuclear_norm(jnp.where(mask[..., None], hidden, 0))


def all_layers(hidden: Array) -> Array:
  """H of the official code: |h| of the embeddings and all layers, one below the other.

  Args:
    hidden: [layers + 1, batch, steps, dim].

  Returns:
    [batch, (layers + 1) * steps, dim].
  """
  layers, batch, steps, dim = hidden.shape
  return jnp.abs(hidden).swapaxes(0, 1).reshape(batch, layers * steps, dim)


@jax.custom_vjp
def nuclear_norm(matrices: Array) -> Array:
  """||H||_*, the sum of singular values, of float32 [batch, rows, columns].

  Its gradient is U V^T over the singular values that are not negligible: a subgradient, where the
  derivative of the decomposition is NaN for values that are equal or zero.
  """
  return jnp.sum(jnp.linalg.svd(matrices, compute_uv=False), axis=-1)


def _nuclear_norm_forward(matrices):
  u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
  kept = s > RANK_TOLERANCE * jnp.max(s, axis=-1, keepdims=True)
  return jnp.sum(s, axis=-1), (u * kept[..., None, :]) @ vt


def _nuclear_norm_backward(subgradient, cotangent):
  return (cotangent[..., None, None] * subgradient,)


nuclear_norm.defvjp(_nuclear_norm_forward, _nuclear_norm_backward)


def nicg_loss(logits: Array, tokens: Array, mask: Array, eos: int) -> Array:
  """NICGSlowDown (Chen et al. 2022): EOS delay and broken dependency, in logits; float32 [batch].

    1/N sum_t (z_t[EOS] - E_{v~p_t} z_t[v]) + 1/N sum_t (z_t[y_t] - E_{v~p_t} z_t[v])

  Args:
    logits, mask, eos: as of `eos_loss`.
    tokens: int32 [batch, steps], y.
  """
  expected = jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return _masked_mean(logits[..., eos] + chosen - 2 * expected, mask)


def sponge_loss(activations: list[Array]) -> Array:
  """Sponge samples (Shumailov et al. 2021): - sum over layers of ||a||_2, float32 [batch].

  Args:
    activations: of each layer, [batch, ...].
  """
  norms = [jnp.linalg.norm(a.reshape(len(a), -1), axis=-1) for a in activations]
  return -sum(norms)


class Objective(NamedTuple):
  """What an attack minimises; numbers, so that one program serves all.

  Attributes:
    eos, uncertainty, diversity: 1 or 0, which of the three losses take part.
    nicg, sponge: 1 or 0, the losses of the baselines.
    temporal: 1 weighs by T1 and T2, 0 by 1 in their place.
    smoothing: m; 1 keeps the weights of the first iteration.
  """

  eos: float = 0.0
  uncertainty: float = 0.0
  diversity: float = 0.0
  nicg: float = 0.0
  sponge: float = 0.0
  temporal: float = 1.0
  smoothing: float = 0.9


VERBOSE = Objective(eos=1.0, uncertainty=1.0, diversity=1.0)
FIXED_WEIGHTS = VERBOSE._replace(temporal=0.0, smoothing=1.0)
NICG = Objective(nicg=1.0)
SPONGE = Objective(sponge=1.0)


class Losses(NamedTuple):
  """float32 [batch] each: L1, L2, L3 and those of the baselines."""

  eos: Array
  uncertainty: Array
  diversity: Array
  nicg: Array
  sponge: Array


class Weights(NamedTuple):
  """lambda_1 and lambda_2, float32 [batch]."""

  eos: Array
  diversity: Array


def temporal_decay(iteration: Array) -> tuple[Array, Array]:
  """(T1, T2) at iteration 1, 2, ...; |T1| is at least `SMALLEST_DECAY`."""
  log_t = jnp.log(jnp.asarray(iteration, jnp.float32))
  first = 10 * log_t - 20
  guarded = jnp.where(first < 0, -1.0, 1.0) * jnp.maximum(jnp.abs(first), SMALLEST_DECAY)
  return guarded, 0.5 * log_t + 1


def balanced_weights(losses: Losses, decay: tuple[Array, Array]) -> Weights:
  """lambda_1 = |L2 / (L1 T1)| and lambda_2 = |L2 / (L3 T2)|, without a gradient."""
  first, second = decay
  weights = Weights(
    eos=jnp.abs(losses.uncertainty / (losses.eos * first)),
    diversity=jnp.abs(losses.uncertainty / (losses.diversity * second)),
  )
  return jax.lax.stop_gradient(weights)


def update_weights(
  old: Weights, losses: Losses, iteration: Array, temporal: Array, smoothing: Array
) -> Weights:
  """The weights of an iteration: smoothed, but for the first, which has no past.

  Args:
    old: of the iteration before.
    losses: of this one.
    iteration: from 1 on.
    temporal, smoothing: see `Objective`.
  """
  decay = [jnp.where(temporal > 0, t, 1.0) for t in temporal_decay(iteration)]
  new = balanced_weights(losses, decay)
  m = jnp.where(iteration == 1, 0.0, smoothing)
  return jax.tree.map(lambda a, b: m * a + (1 - m) * b, old, new)


def total_loss(losses: Losses, weights: Weights, objective: Objective) -> Array:
  """L, float32 [batch]."""
  return (
    objective.eos * weights.eos * losses.eos
    + objective.uncertainty * losses.uncertainty
    + objective.diversity * weights.diversity * losses.diversity
    + objective.nicg * losses.nicg
    + objective.sponge * losses.sponge
  )


def project(
  delta: Array, images: Array, eps: Array, low: Array | float = 0.0, high: Array | float = 1.0
) -> Array:
  """Clips the perturbation to valid pixels and to the ball: |delta| <= eps, low <= x + delta <= high.

  Args:
    delta, images: [..., height, width, channels]; images lie within low and high.
    eps: of the ball, in the images' unit.
    low, high: of valid pixels, numbers or of each channel.
  """
  return jnp.clip(jnp.clip(delta, low - images, high - images), -eps, eps)


def _masked_mean(values: Array, mask: Array) -> Array:
  total = jnp.sum(jnp.where(mask, values, 0), axis=-1)
  return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)
