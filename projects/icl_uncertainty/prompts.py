"""Prompts of random linear-regression tasks, drawn on the device from a key.

  w ~ N(0, I_d),  sigma ~ P_sigma,  x_t ~ N(mu, c^2 I_d),  y_t = w' x_t + sigma eps_t.

`PromptDistribution` has every shift of the paper as a number, so that one compiled program serves
all of them: the range of sigma, the scale of w, the scale c and mean mu of the covariates, finite
pools of tasks, random lengths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from common.models.sharding import constrain

Array = jax.Array


class UniformNoise(NamedTuple):
  """sigma ~ U[low, high]."""

  low: Array | float
  high: Array | float

  def sample(self, key: Array) -> Array:
    return jax.random.uniform(key, minval=self.low, maxval=self.high)

  def weight_sd(self, sigma: Array) -> Array:
    """w ~ N(0, I) whatever sigma is."""
    return jnp.ones_like(sigma)

  def grid(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints of `size` equal cells and the logarithms of their probabilities, [size] each."""
    midpoints = self.low + (self.high - self.low) * (np.arange(size) + 0.5) / size
    return midpoints, np.full(size, -np.log(size))


class FiniteNoise(NamedTuple):
  """sigma is one of `values` [k], all equally likely."""

  values: Array

  def sample(self, key: Array) -> Array:
    return jax.random.choice(key, self.values)

  def weight_sd(self, sigma: Array) -> Array:
    """w ~ N(0, I) whatever sigma is."""
    return jnp.ones_like(sigma)

  def grid(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The values themselves, whatever `size` is."""
    values = np.asarray(self.values, float)
    return values, np.full(len(values), -np.log(len(values)))


class InverseGammaNoise(NamedTuple):
  """sigma^2 ~ InverseGamma(shape, scale) and w | sigma ~ N(0, sigma^2 I): the conjugate prior."""

  shape: Array | float
  scale: Array | float

  def sample(self, key: Array) -> Array:
    return jnp.sqrt(self.scale / jax.random.gamma(key, self.shape))

  def weight_sd(self, sigma: Array) -> Array:
    return sigma

  def grid(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-spaced sigmas between the 1e-9 and 1 - 1e-9 quantiles, and normalised log weights."""
    prior = scipy.stats.invgamma(self.shape, scale=self.scale)
    variance = np.geomspace(prior.ppf(1e-9), prior.isf(1e-9), size)
    log_weights = prior.logpdf(variance) + np.log(variance)  # Equal steps of log variance.
    return np.sqrt(variance), log_weights - scipy.special.logsumexp(log_weights)


Noise = UniformNoise | FiniteNoise | InverseGammaNoise


class PromptDistribution(NamedTuple):
  """Where prompts come from. Every leaf may be traced.

  Attributes:
    noise: the prior of sigma.
    pool_key: PRNG key of the tasks: task i is drawn from `fold_in(pool_key, i)`.
    pool_size: n, the tasks i < n; 0 draws i from 2^32 tasks, in effect a fresh one every time.
    weight_scale: multiplies w.
    covariate_scale: (low, high) of c, uniform and one for each prompt. Equal: no meta-training.
    covariate_shift: (low, high) of |mu|, uniform; its direction is uniform on the sphere.
    length: (shortest, longest) number of labels that a prompt's loss counts, uniform.
  """

  noise: Noise
  pool_key: Array
  pool_size: Array | int = 0
  weight_scale: Array | float = 1.0
  covariate_scale: tuple[Array | float, Array | float] = (1.0, 1.0)
  covariate_shift: tuple[Array | float, Array | float] = (0.0, 0.0)
  length: tuple[Array | int, Array | int] = (1_000_000, 1_000_000)


class Prompts(NamedTuple):
  """A batch of prompts.

  Attributes:
    x: covariates, float32 [batch, T, d].
    y: labels, float32 [batch, T].
    weights: w of each prompt's task, [batch, d].
    sigma: its noise level, [batch].
    counted: bool [batch, T], whether the label is within the prompt's length.
  """

  x: Array
  y: Array
  weights: Array
  sigma: Array
  counted: Array

  @property
  def truth(self) -> Array:
    """w' x_t, [..., T]."""
    return jnp.einsum("...td,...d->...t", self.x, self.weights)


def draw_tasks(distribution: PromptDistribution, indices: Array, dim: int) -> tuple[Array, Array]:
  """Tasks `indices` [n] of the pool: w [n, d] and sigma [n]."""

  def task(index):
    noise_key, weight_key = jax.random.split(jax.random.fold_in(distribution.pool_key, index))
    sigma = distribution.noise.sample(noise_key)
    scale = distribution.weight_scale * distribution.noise.weight_sd(sigma)
    return scale * jax.random.normal(weight_key, (dim,)), sigma

  return jax.vmap(task)(indices)


def sample_prompts(
  key: Array, distribution: PromptDistribution, batch: int, length: int, dim: int
) -> Prompts:
  """Draws `batch` prompts of T = `length` labels and d = `dim` covariates."""
  # Few calls of the generator: each is inlined, and takes long to compile.
  bits_key, normal_key = jax.random.split(key)
  indices, *bits = jax.random.bits(bits_key, (4, batch), jnp.uint32)
  scale, norm, share = ((b >> 8).astype(jnp.float32) * 2.0**-24 for b in bits)  # U[0, 1).
  normals = jax.random.normal(normal_key, (batch, length * (dim + 1) + dim))
  normals = constrain(normals, "batch", None)  # Rows are cut over the devices, if there is a mesh.
  x, noise, direction = jnp.split(normals, (length * dim, length * (dim + 1)), axis=1)

  size = jnp.asarray(distribution.pool_size, jnp.uint32)
  indices = jnp.where(size > 0, indices % jnp.maximum(size, 1), indices)
  weights, sigma = draw_tasks(distribution, indices, dim)

  uniform = lambda share, bounds: bounds[0] + (bounds[1] - bounds[0]) * share
  direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
  mean = uniform(norm, distribution.covariate_shift)[:, None] * direction
  scale = uniform(scale, distribution.covariate_scale)[:, None, None]
  x = scale * x.reshape(batch, length, dim) + mean[:, None]
  y = jnp.einsum("btd,bd->bt", x, weights) + sigma[:, None] * noise
  shortest, longest = distribution.length
  lengths = shortest + jnp.floor(share * (longest - shortest + 1))
  return Prompts(x, y, weights, sigma, jnp.arange(length) < lengths[:, None])
