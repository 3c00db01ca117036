"""Deferral rules from token probabilities, and how a deferral rule is judged.

A rule gives every input x a score; the small model's answer is kept where the score is high, and x
goes to the large model where score < threshold. With s_i = log p_1(y_i | x, y_<i) of the small
model's greedy output y of n tokens (section 3 of the paper):

  Chow-Sum          sum_i s_i                   the sequence's log-likelihood; defers long outputs
  Chow-Average      (1/n) sum_i s_i             keeps long ones
  Chow-Quantile-a   the a-quantile of {s_i}     a = 0: the least confident token

Shapes: `n` inputs, `tokens` slots of an output. A mask [n, tokens] says which slots hold tokens.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

ALPHAS = tuple(i / 10 for i in range(11))


def chow_sum(log_probs: Array, mask: Array) -> Array:
  """Chow-Sum, float32 [n], in nats. log_probs: float32 [n, tokens]; mask: bool [n, tokens]."""
  return jnp.sum(log_probs, axis=1, where=mask)


def chow_average(log_probs: Array, mask: Array) -> Array:
  """Chow-Average, float32 [n], in nats per token; arguments as of `chow_sum`."""
  return jnp.mean(log_probs, axis=1, where=mask)


@jax.jit
def chow_quantile(log_probs: Array, mask: Array, alphas: Array) -> Array:
  """Chow-Quantile for several alphas, float32 [n, alphas].

  Between order statistics the quantile is interpolated linearly (`numpy.quantile`'s default):
  alpha (n - 1) is its place among the sorted tokens. Low alphas are the least confident tokens.

  Args:
    log_probs, mask: as of `chow_sum`.
    alphas: float32 [alphas], each in [0, 1].
  """
  # +inf sorts behind every token; it is never read for a row that has one.
  ordered = jnp.sort(jnp.where(mask, log_probs, jnp.inf), axis=1)
  place = alphas * (jnp.sum(mask, axis=1, keepdims=True) - 1)
  low = jnp.floor(place).astype(jnp.int32)
  high = jnp.ceil(place).astype(jnp.int32)
  at = lambda index: jnp.take_along_axis(ordered, index, axis=1)
  return at(low) + (place - low) * (at(high) - at(low))


def length_score(mask: Array) -> Array:
  """The length-only rule, float32 [n]: minus the number of tokens, so that long ones go first."""
  return -jnp.sum(mask, axis=1).astype(jnp.float32)


def entropy_score(entropies: Array, mask: Array, aggregate: Literal["mean", "max"]) -> Array:
  """Minus the mean or the largest predictive entropy of the output's tokens, float32 [n], nats.

  Args:
    entropies: float32 [n, tokens], of the distribution that each token was chosen from.
    mask: bool [n, tokens].
  """
  if aggregate == "mean":
    return -jnp.mean(entropies, axis=1, where=mask)
  return -jnp.max(entropies, axis=1, where=mask, initial=0.0)


def deferral_curve(scores: Array, small: Array, large: Array) -> Array:
  """Mean quality of the cascade that defers the k inputs of lowest score, float32 [n + 1].

  Among equal scores every order is as likely as any other, and the curve is the mean over them:
  every input of a tie gains the tie's mean gain.

  Args:
    scores: float32 [n], high where the small model's answer is to be kept.
    small, large: float32 [n], quality of either model's answer.

  Returns:
    Element k is the quality at deferral rate k / n; the ends are the two models' own.
  """
  order = jnp.argsort(scores)
  ordered = scores[order]
  total = jnp.pad(jnp.cumsum((large - small)[order]), (1, 0))
  first = jnp.searchsorted(ordered, ordered, side="left")
  end = jnp.searchsorted(ordered, ordered, side="right")
  gain = (total[end] - total[first]) / (end - first)
  return jnp.mean(small) + jnp.pad(jnp.cumsum(gain), (1, 0)) / len(scores)


@functools.partial(jax.jit, static_argnames="rule")
def auc_dc(
  scores: Array, small: Array, large: Array, *, rule: Literal["trapezoid", "step"] = "trapezoid"
) -> Array:
  """Area under the deferral curve over deferral rates from 0 to 1, float32 [].

    trapezoid   1/n sum_{k=0}^{n-1} (Q(k) + Q(k+1)) / 2
    step        1/n sum_{k=0}^{n-1} Q(k)

  with Q the deferral curve. Arguments as of `deferral_curve`.
  """
  curve = deferral_curve(scores, small, large)
  return jnp.mean(curve[:-1] if rule == "step" else (curve[:-1] + curve[1:]) / 2)


def random_auc_dc(small: Array, large: Array) -> Array:
  """Expected area under the random rule's curve, a straight line, float32 []."""
  return (jnp.mean(small) + jnp.mean(large)) / 2


def oracle_score(small: Array, large: Array) -> Array:
  """Minus the true gain, float32 [n]: no other score has a larger AUC-DC."""
  return small - large


@functools.partial(jax.jit, static_argnames="resamples")
def bootstrap_gains(
  scores: Array, small: Array, large: Array, key: Array, *, resamples: int
) -> Array:
  """Percent gain in AUC-DC over random of every rule in bootstrap resamples of the inputs.

  All rules see the same resamples, so that differences between rules are paired.

  Args:
    scores: float32 [rules, n].
    small, large: float32 [n].
    key: typed PRNG key [].

  Returns:
    float32 [resamples, rules].
  """
  n = len(small)

  def one(key):
    rows = jax.random.randint(key, (n,), 0, n)
    gain = lambda score: percent_gain(score[rows], small[rows], large[rows])
    return jax.vmap(gain)(scores)

  return jax.lax.map(one, jax.random.split(key, resamples))


@jax.jit
def percent_gain(scores: Array, small: Array, large: Array) -> Array:
  """100 (AUC-DC / AUC-DC of random - 1), float32 []."""
  return 100 * (auc_dc(scores, small, large) / random_auc_dc(small, large) - 1)


def threshold_for_rate(scores: Array, rate: float) -> Array:
  """The threshold that defers `rate` of calibration inputs (score < threshold), float32 [].

  Args:
    scores: float32 [n], of calibration inputs.
    rate: in [0, 1]; 0 gives -inf and 1 gives +inf.
  """
  count = round(rate * len(scores))
  return jnp.pad(jnp.sort(scores), 1, constant_values=(-jnp.inf, jnp.inf))[
    0 if count == 0 else count + 1
  ]
