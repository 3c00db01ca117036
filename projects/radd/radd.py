"""RADD: absorbing discrete diffusion models the conditional distributions of clean data.

Ou et al., "Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean
Data" (ICLR 2025, arXiv 2406.03736).

The forward process replaces every token of x by the mask token M = V independently with probability
1 - exp(-noise(t)). The concrete score of a masked position i is (Theorem 1)

  p_t(x with x_i := a) / p_t(x) = 1 / (exp(noise(t)) - 1) * p_0(x_i = a | the unmasked tokens of x),

so time enters as a known scalar only, and a network c(x)[i, a] without time input can learn the
conditional distributions of clean data. Four losses of it are the same upper bound of -log p(x)
(section 3.3). Each is one function below, of `log_c`, the drawn mask and its noise level.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError

Array = jax.Array
Loss = Literal["t_dse", "t_dce", "lambda_dce", "k_dce"]
LOSSES = ("t_dse", "t_dce", "lambda_dce", "k_dce")

# `network(noisy, noise, key)`: int32 [batch, seq] with M at masked positions, the total noise of
# every row [batch] (a time-free network ignores it), a key for dropout -> log c [batch, seq, V].
Network = Callable[[Array, Array, Array | None], Array]

# Times of the t losses are drawn from [SMALLEST_TIME, 1]; the noise that a time-conditioned network
# is told ends where the log-linear schedule ends.
SMALLEST_TIME = 1e-3
LARGEST_MASK_PROBABILITY = 1 - 1e-3


class Schedule(NamedTuple):
  """Total noise of the forward process and its derivative, functions of the time in [0, 1]."""

  noise: Callable[[Array], Array]
  rate: Callable[[Array], Array]


def log_linear(eps: float = 1e-3) -> Schedule:
  """noise(t) = -log(1 - (1 - eps) t): a token is masked with probability (1 - eps) t."""
  return Schedule(
    noise=lambda t: -jnp.log1p(-(1 - eps) * t), rate=lambda t: (1 - eps) / (1 - (1 - eps) * t)
  )


def geometric(smallest: float = 1e-4, largest: float = 20.0) -> Schedule:
  """noise(t) = smallest^(1 - t) largest^t."""
  noise = lambda t: smallest ** (1 - t) * largest**t
  return Schedule(noise=noise, rate=lambda t: noise(t) * jnp.log(largest / smallest))


SCHEDULES = {"log_linear": log_linear(), "geometric": geometric()}


def mask_probability(noise: Array) -> Array:
  """1 - exp(-noise), precise for little noise."""
  return -jnp.expm1(-noise)


def noise_of(probability: Array) -> Array:
  """The inverse of `mask_probability`; finite for 1 too."""
  return -jnp.log1p(-jnp.minimum(probability, LARGEST_MASK_PROBABILITY))


def low_discrepancy_times(key: Array, batch: int) -> Array:
  """One offset for equidistant times: frac(u + j / batch), scaled to [SMALLEST_TIME, 1]."""
  u = jax.random.uniform(key)
  return (1 - SMALLEST_TIME) * ((u + jnp.arange(batch) / batch) % 1) + SMALLEST_TIME


def stratified_probabilities(key: Array, batch: int) -> Array:
  """One mask probability in each of `batch` equal parts of (0, 1]: (j + 1 - u_j) / batch."""
  # 1 - u, as u may be 0 and is never 1.
  return (jnp.arange(batch) + 1 - jax.random.uniform(key, (batch,))) / batch


def mask_independently(key: Array, probability: Array, length: int) -> Array:
  """Masks every position of row j with probability[j]; bool [batch, length]."""
  return jax.random.uniform(key, (len(probability), length)) < probability[:, None]


def mask_exactly(key: Array, k: Array, length: int) -> Array:
  """Masks a uniformly random set of k[j] positions of row j; bool [batch, length]."""
  rank = jnp.argsort(jax.random.uniform(key, (len(k), length)), axis=1).argsort(axis=1)
  return rank < k[:, None]


def target_log_probability(log_c: Array, x: Array) -> Array:
  """log c[i, x_i], float32 [batch, seq]."""
  return jnp.take_along_axis(log_c, x[..., None], axis=-1)[..., 0]


def masked_cross_entropy(log_c: Array, x: Array, masked: Array) -> Array:
  """Sum over the masked positions of -log c[i, x_i], nats [batch]; 0 where nothing is masked."""
  return -jnp.sum(target_log_probability(log_c, x), axis=1, where=masked)


def t_dse(log_c: Array, x: Array, masked: Array, noise: Array, rate: Array) -> Array:
  """Denoising score entropy (SEDD's loss) with the score s = c / (exp(noise) - 1), nats [batch].

    rate * sum over masked i of  sum_a s[i, a] - r log s[i, x_i] + r (log r - 1),
    r = 1 / (exp(noise) - 1)

  Only here c need not be normalised.

  Args:
    log_c: float32 [batch, seq, V].
    x: the clean tokens, int32 [batch, seq].
    masked: bool [batch, seq].
    noise, rate: of the schedule at each row's time, [batch].
  """
  ratio = 1 / jnp.expm1(noise)[:, None]
  log_score = log_c + jnp.log(ratio)[..., None]
  entropy = jnp.sum(jnp.exp(log_score), axis=-1) - ratio * target_log_probability(log_score, x)
  entropy = entropy + ratio * (jnp.log(ratio) - 1)
  return rate * jnp.sum(entropy, axis=1, where=masked)


def t_dce(log_c: Array, x: Array, masked: Array, noise: Array, rate: Array) -> Array:
  """Denoising cross-entropy over time: rate / (exp(noise) - 1) * sum of -log c[i, x_i]."""
  return rate / jnp.expm1(noise) * masked_cross_entropy(log_c, x, masked)


def lambda_dce(log_c: Array, x: Array, masked: Array, probability: Array) -> Array:
  """Cross-entropy over the mask probability lambda: 1 / lambda * sum of -log c[i, x_i]."""
  return masked_cross_entropy(log_c, x, masked) / probability


def k_dce(log_c: Array, x: Array, masked: Array, k: Array) -> Array:
  """Any-order autoregression (AO), k masked tokens: length / k * sum of -log c[i, x_i]."""
  return x.shape[1] / k * masked_cross_entropy(log_c, x, masked)


def sequence_losses(
  loss: Loss,
  network: Network,
  mask_token: int,
  x: Array,
  key: Array,
  schedule: str = "log_linear",
) -> Array:
  """One draw of a loss for every row: its expectation bounds -log p(x), nats [batch].

  Args:
    loss: which one. Only t_dse suits a network whose c is not normalised.
    network: see `Network`.
    mask_token: M.
    x: clean tokens below V, int32 [batch, seq].
    key: of the noise levels (spread evenly over the rows), the masks and dropout.
    schedule: of the t losses, a name in `SCHEDULES`.
  """
  batch, length = x.shape
  level_key, mask_key, dropout_key = jax.random.split(key, 3)
  if loss in ("t_dse", "t_dce"):
    t = low_discrepancy_times(level_key, batch)
    noise, rate = SCHEDULES[schedule].noise(t), SCHEDULES[schedule].rate(t)
    masked = mask_independently(mask_key, mask_probability(noise), length)
    function, level = {"t_dse": t_dse, "t_dce": t_dce}[loss], (noise, rate)
  elif loss == "lambda_dce":
    probability = stratified_probabilities(level_key, batch)
    masked = mask_independently(mask_key, probability, length)
    function, level, noise = lambda_dce, (probability,), noise_of(probability)
  else:
    k = jax.random.randint(level_key, (batch,), 1, length + 1)
    masked = mask_exactly(mask_key, k, length)
    function, level, noise = k_dce, (k,), noise_of(k / length)
  log_c = network(jnp.where(masked, mask_token, x), noise, dropout_key)
  return function(log_c, x, masked, *level)


def check_choice(name: str, value: str, choices) -> None:
  """Refuses an unknown name.

  Raises:
    UserError: `value` is not among the choices.
  """
  if value not in choices:
    raise UserError(f"{name}={value!r} is not supported; expected one of {', '.join(choices)}")
