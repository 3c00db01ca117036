"""Outlier Suppression (Wei et al., NeurIPS 2022, arXiv 2209.13325), a baseline.

Gamma migration divides a norm's outputs by its gain, which the next weights take (scale="gamma" of
`Settings`). Token-wise clipping then looks for the range of all static quantizers at once: the
quantile of each token's largest and smallest value, so that a few tokens with sharp outliers are
clipped. Its learned second stage is training, and left out.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


@jax.jit
def token_wise_range(x: Array, quantile: Array | float) -> tuple[Array, Array]:
  """Quantile over tokens of their largest value, and 1 - quantile of their smallest, [] and [].

  Args:
    x: [..., in]; each row is a token.
    quantile: in [0, 1].
  """
  x = x.astype(jnp.float32)
  low, high = x.min(axis=-1), x.max(axis=-1)
  return jnp.quantile(low, 1 - quantile), jnp.quantile(high, quantile)


def clipping_quantiles(num_steps: int) -> list[float]:
  """1 and below it in steps of 0.005 (the paper: 10 steps at 8 bits, 20 at 6)."""
  return [1 - 0.005 * step for step in range(num_steps + 1)]


def least_loss(
  candidates: Iterable[float],
  quantize: Callable[[float], nnx.Module],
  loss: Callable[[nnx.Module], float],
) -> tuple[nnx.Module, float]:
  """The quantized model with the least loss on the calibration set, and its candidate.

  Args:
    candidates: values of a hyper-parameter; the first of equals wins.
    quantize: the model with one of them.
    loss: of a quantized model.
  """
  best = None
  for candidate in candidates:
    model = quantize(candidate)
    value = loss(model)
    # The first candidate stays where no loss is a number.
    if best is None or value < best[0]:
      best = value, model, candidate
  return best[1:]
