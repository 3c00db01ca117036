"""Losses of the baselines that change training: focal, entropy-regularised, MMCE.

All take log odds z [n] of the event, p_hat = sigmoid(z).
"""

import jax
import jax.numpy as jnp

Array = jax.Array

MMCE_WIDTH = 0.4


def focal(z: Array, q: Array, gamma: Array | float) -> Array:
  """-[q (1 - p)^gamma log p + (1 - q) p^gamma log(1 - p)]; gamma = 0 is cross-entropy.

  Lin et al., "Focal Loss for Dense Object Detection" (2017).

  Args:
    z: [n]; q: targets in [0, 1], [n]; gamma: at least 0.

  Returns:
    nats, [n].
  """
  log_p, log_not = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
  # As exponentials of finite logarithms: the gradient of 0 ** gamma would be NaN.
  return -(q * jnp.exp(gamma * log_not) * log_p + (1 - q) * jnp.exp(gamma * log_p) * log_not)


def entropy(z: Array) -> Array:
  """Entropy of the forecast, nats, [n]; its multiple is subtracted from the cross-entropy.

  Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output Distributions" (2017).
  """
  p = jax.nn.sigmoid(z)
  return -(p * jax.nn.log_sigmoid(z) + (1 - p) * jax.nn.log_sigmoid(-z))


def mmce(z: Array, y: Array, power: Array | float = 1.0) -> Array:
  """The weighted maximum mean calibration error of the predicted class's confidence r.

    MMCE^2 =   sum_{right i, j} (1 - r_i) (1 - r_j) k_ij / n_right^(2 power)
             + sum_{wrong i, j} r_i r_j k_ij / n_wrong^(2 power)
             - 2 sum_{right i, wrong j} (1 - r_i) r_j k_ij / (n_right n_wrong)^power

  with k_ij = exp(-|r_i - r_j| / 0.4). A side without members contributes nothing. Kumar et al.,
  "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings" (2018).

  Args:
    z: [n]; y: outcomes, 0 or 1, [n].
    power: 1 is the definition. The paper's code takes means and divides them by the squared counts
      once more, which is 2, and makes the term smaller by about the size of the batch.

  Returns:
    [], with a finite gradient also where it is 0.
  """
  confidence = jax.nn.sigmoid(jnp.abs(z))
  right = (z > 0) == (y == 1)
  share = lambda side: side / jnp.maximum(side.sum(), 1).astype(z.dtype) ** power
  gap = share(right) * (1 - confidence) - share(~right) * confidence
  kernel = jnp.exp(-jnp.abs(confidence[:, None] - confidence[None, :]) / MMCE_WIDTH)
  return jnp.sqrt(jnp.maximum(gap @ kernel @ gap, 0) + 1e-10)
