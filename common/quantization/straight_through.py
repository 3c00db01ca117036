"""Straight-through estimators: rounding that gradients pass, and LSQ's learned step size.

Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons"
(2013); Esser et al., "Learned Step Size Quantization" (2020).
"""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def straight_through(x: Array, quantized: Array) -> Array:
  """The value of `quantized` with the gradient of x. The two have one shape."""
  return x + jax.lax.stop_gradient(quantized - x)


def round_ste(x: Array) -> Array:
  """x rounded to the nearest integer, ties to even; its gradient is that of x."""
  return straight_through(x, jnp.round(x))


def clip_ste(x: Array, low: Array | float, high: Array | float) -> Array:
  """x clipped to [low, high]; the gradient passes on the closed range and is 0 outside.

  (`jnp.clip` halves it at the ends, where rounded codes lie.)
  """
  inside = (x >= low) & (x <= high)
  return jnp.where(inside, x, jax.lax.stop_gradient(jnp.clip(x, low, high)))


def scale_gradient(x: Array, factor: float | Array) -> Array:
  """x, with its gradient multiplied by `factor`."""
  fixed = jax.lax.stop_gradient(x)
  return fixed + factor * (x - fixed)


def lsq(
  x: Array, step: Array, code_range: tuple[int, int], *, gradient_scale: float = 1.0
) -> Array:
  """LSQ's quantizer, s round(clip(x / s, q_min, q_max)); x's shape.

  Its gradients are the paper's (section 2.1): by x, 1 where x / s is in the range and 0 outside;
  by s, round(x / s) - x / s in the range, and q_min or q_max outside. An offset is the caller's:
  `lsq(x - offset, ...) + offset` learns it as LSQ+ does.

  Args:
    x: weights or activations.
    step: s > 0, broadcastable to x.
    code_range: (q_min, q_max).
    gradient_scale: of the step, see `lsq_gradient_scale`.
  """
  step = scale_gradient(step, gradient_scale)
  return round_ste(clip_ste(x / step, *code_range)) * step


def lsq_gradient_scale(values_per_step: int, q_max: int) -> float:
  """g = 1 / sqrt(N q_max), which balances a step's updates with those of the weights.

  Args:
    values_per_step: N, how many values share the step.
    q_max: the largest code.
  """
  return 1.0 / math.sqrt(values_per_step * q_max)


def lsq_initial_step(x: Array, q_max: int, axis=None, *, factor: float = 2.0) -> Array:
  """Step to start from, factor * mean|x| / sqrt(q_max); reduced axes are kept with size 1.

  Args:
    x: weights, or the activations of a calibration batch.
    q_max: the largest code.
    axis: axes that share a step; None for all.
    factor: 2 in the paper.
  """
  return factor * jnp.mean(jnp.abs(x), axis=axis, keepdims=True) / math.sqrt(q_max)
