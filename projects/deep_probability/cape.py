"""CaPE, calibrated probability estimation: the targets of its calibration epochs, and its schedule.

A network p_hat(x) that was trained on outcomes y with cross-entropy, and stopped early, is trained
further. Epochs 0, c + 1, 2 (c + 1), ... are calibration epochs: their cross-entropy is not against
y but against q, the share of y = 1 among training points of similar p_hat. The c epochs between
two of them are ordinary. q is computed once per calibration epoch, from the network as it is at
its start and in inference mode, and is a constant for the gradient.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# What an epoch trains on.
LABELS = 0  # The outcomes.
REDRAWN = 1  # Fresh outcomes from the true probabilities: the "infinite data" control.
BIN = 2  # CaPE-bin.
KDE = 3  # CaPE-kde.


def cross_entropy(z: Array, q: Array) -> Array:
  """-[q log p_hat + (1 - q) log(1 - p_hat)] of p_hat = sigmoid(z); its derivative is p_hat - q.

  Args:
    z: log odds, the difference of the network's two logits, [n].
    q: targets in [0, 1]: outcomes, or empirical probabilities, [n].

  Returns:
    nats, [n].
  """
  return -(q * jax.nn.log_sigmoid(z) + (1 - q) * jax.nn.log_sigmoid(-z))


def bin_targets(p_hat: Array, y: Array, num_bins: Array | int) -> Array:
  """CaPE-bin: q_i is the share of y = 1 in the bin of p_hat_i, of B bins with equal counts.

  Bin b holds the sorted p_hat from int(b n / B) to int((b + 1) n / B) - 1.

  Args:
    p_hat: probabilities, [n].
    y: outcomes, 0 or 1, [n].
    num_bins: B, from 1 to n; may be traced.

  Returns:
    Of p_hat's dtype, in the order of the arguments, [n].
  """
  n = len(p_hat)
  order = jnp.argsort(p_hat, stable=True)
  # The largest b with int(b n / B) <= i, in whole numbers.
  bins = ((jnp.arange(n) + 1) * num_bins - 1) // n
  total = lambda x: jax.ops.segment_sum(x, bins, num_segments=n, indices_are_sorted=True)
  share = total(y[order].astype(p_hat.dtype)) / jnp.maximum(total(jnp.ones_like(p_hat)), 1)
  return jax.lax.stop_gradient(jnp.zeros_like(p_hat).at[order].set(share[bins]))


def kde_targets(p_hat: Array, y: Array, sigma: Array | float, window: int) -> Array:
  """CaPE-kde: q_i is a kernel average of y over the neighbours of p_hat_i.

    q_i = sum_j phi((p_j - p_i) / sigma) y_j / sum_j phi((p_j - p_i) / sigma)

  over the sorted j in [i - w, i + w), as far as they exist; phi is the normal density.

  Args:
    p_hat: probabilities, [n].
    y: outcomes, 0 or 1, [n].
    sigma: width of the kernel, in units of probability; may be traced.
    window: w.

  Returns:
    Of p_hat's dtype, in the order of the arguments, [n].
  """
  n = len(p_hat)
  order = jnp.argsort(p_hat, stable=True)
  p, outcome = p_hat[order], y[order].astype(p_hat.dtype)
  neighbour = jnp.arange(n)[:, None] + jnp.arange(-window, window)
  inside = (neighbour >= 0) & (neighbour < n)
  neighbour = jnp.clip(neighbour, 0, n - 1)
  weight = jnp.where(inside, jnp.exp(-(((p[neighbour] - p[:, None]) / sigma) ** 2) / 2), 0)
  share = (weight * outcome[neighbour]).sum(axis=1) / weight.sum(axis=1)
  return jax.lax.stop_gradient(jnp.zeros_like(p_hat).at[order].set(share))


def epoch_kind(targets: Array | int, epoch: Array | int, ordinary_epochs: Array | int) -> Array:
  """What an epoch trains on: CaPE calibrates where epoch mod (c + 1) = 0, and else takes labels.

  Args:
    targets: LABELS, REDRAWN, BIN or KDE.
    epoch: from 0.
    ordinary_epochs: c, the ordinary epochs between two calibration epochs.

  Returns:
    LABELS, REDRAWN, BIN or KDE, int [].
  """
  ordinary = (jnp.asarray(targets) >= BIN) & (epoch % (ordinary_epochs + 1) != 0)
  return jnp.where(ordinary, LABELS, targets)
