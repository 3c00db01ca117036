"""A bag's count potential as one factor: its exact messages in O(m log^2 m).

The factor is exp(-lambda (sum_i y_i - s)^2). Its message to y_i needs the distribution of the sum of
the *other* members of the bag, given what they say. A binary tree over the members gives all of them
at once: upwards, the distribution of every node's sum is the convolution of its children's; downwards,
a node's potential is its parent's, averaged over its sibling's sum (Tarlow et al., 2012, section 3).

The odds are tilted first, y_i by exp(t y_i) and the potential by exp(-t sum_i y_i), which changes no
marginal. With t at the saddle point, both peak at the same sum: the products neither underflow nor
live in the rounding errors of the Fourier transforms.
"""

import jax
import jax.numpy as jnp

# Nodes of up to this many members convolve by shifts and products of positive numbers, whose
# relative error is small everywhere; larger ones by Fourier transforms, whose error is 1e-7 of the
# peak.
_DIRECT = 8


def saddle_point(
  log_odds: jax.Array, count: jax.Array, lambda_: jax.Array, steps: int = 24
) -> jax.Array:
  """The tilt t with  t + 2 lambda (sum_i sigmoid(l_i + t) - s) = 0, by bisection.

  log_odds [B, M] (-inf: padding), count [B], lambda_ [B] -> [B]. Left of the root the value is
  negative, right of it positive; any t is exact, the root is the best conditioned.
  """
  size = jnp.isfinite(log_odds).sum(axis=1)
  bounds = (-2 * lambda_ * (size - count), 2 * lambda_ * count)

  def halve(_, bounds):
    low, high = bounds
    t = (low + high) / 2
    total = jax.nn.sigmoid(log_odds + t[:, None]).sum(axis=1)
    above = t + 2 * lambda_ * (total - count) > 0
    return jnp.where(above, low, t), jnp.where(above, t, high)

  low, high = jax.lax.fori_loop(0, steps, halve, bounds)
  return (low + high) / 2


@jax.jit
def bag_messages(log_odds: jax.Array, count: jax.Array, lambda_: jax.Array) -> jax.Array:
  """Log odds that the count potential sends to every member.

  Args:
    log_odds: float [B, M], of every member without its bag; -inf where padded; M a power of two.
    count: float [B], s.
    lambda_: float [B], weight of the potential.

  Returns:
    float [B, M], arbitrary but finite where padded. In float32 the part beyond t is cut at +-87.
  """
  t = saddle_point(log_odds, count, lambda_)
  tilted = log_odds + t[:, None]
  # [B, nodes, members + 1]: the distribution of every node's sum.
  sums = [jnp.stack([jax.nn.sigmoid(-tilted), jax.nn.sigmoid(tilted)], axis=-1)]
  while sums[-1].shape[1] > 1:
    sums.append(_convolve(sums[-1][:, ::2], sums[-1][:, 1::2]))
  total = jnp.arange(log_odds.shape[1] + 1, dtype=log_odds.dtype)
  log_potential = -lambda_[:, None] * (total - count[:, None]) ** 2 - t[:, None] * total
  size = jnp.isfinite(log_odds).sum(axis=1)
  log_potential = jnp.where(total <= size[:, None], log_potential, -jnp.inf)
  potential = jnp.exp(log_potential - log_potential.max(axis=1, keepdims=True))[:, None]
  for level in reversed(sums[:-1]):
    left, right = level[:, ::2], level[:, 1::2]
    both = jnp.stack([_correlate(potential, right), _correlate(potential, left)], axis=2)
    potential = both.reshape(level.shape)
    potential /= potential.max(axis=-1, keepdims=True)  # Only ratios matter.
  # Not 0, nor the negative noise of transforms.
  potential = jnp.maximum(potential, jnp.finfo(potential.dtype).tiny)
  return t[:, None] + jnp.log(potential[..., 1]) - jnp.log(potential[..., 0])


def _convolve(a: jax.Array, b: jax.Array) -> jax.Array:
  """sum_j a[j] b[c - j]: [..., k+1] twice -> [..., 2k+1]."""
  k = a.shape[-1] - 1
  if k <= _DIRECT:
    shifted = lambda j: jnp.pad(b, [(0, 0)] * (b.ndim - 1) + [(j, k - j)])
    return sum(a[..., j : j + 1] * shifted(j) for j in range(k + 1))
  length = 2 * k + 2  # Even, and with the factors of a power of two nearby.
  product = jnp.fft.rfft(a, length) * jnp.fft.rfft(b, length)
  return jnp.maximum(jnp.fft.irfft(product, length)[..., : 2 * k + 1], 0)


def _correlate(potential: jax.Array, b: jax.Array) -> jax.Array:
  """sum_j b[j] potential[c + j]: [..., 2k+1] and [..., k+1] -> [..., k+1]."""
  k = b.shape[-1] - 1
  if k <= _DIRECT:
    return sum(b[..., j : j + 1] * potential[..., j : j + k + 1] for j in range(k + 1))
  length = 2 * k + 2
  product = jnp.fft.rfft(potential, length) * jnp.conj(jnp.fft.rfft(b, length))
  return jnp.fft.irfft(product, length)[..., : k + 1]
