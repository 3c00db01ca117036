"""Upper bounds of -log p(x), with their Monte-Carlo error, and exact likelihoods in a fixed order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from projects.radd.radd import Loss, sequence_losses

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Bound:
  """Draws of a loss on windows of text.

  Attributes:
    draws: nats per window, float64 [windows, draws]; their expectation bounds -log p(window).
    tokens: of a window.
  """

  draws: np.ndarray
  tokens: int

  @property
  def nll(self) -> float:
    """Nats per token."""
    return float(self.draws.mean()) / self.tokens

  @property
  def nll_error(self) -> float:
    """Standard error of `nll` over masks and noise levels, for these windows.

    Levels are spread evenly over a window's draws, which this leaves out: it is not too small.
    """
    windows, draws = self.draws.shape
    variance = self.draws.var(axis=1, ddof=1).mean() / (windows * draws)
    return float(np.sqrt(variance)) / self.tokens

  @property
  def perplexity(self) -> float:
    return float(np.exp(self.nll))

  @property
  def standard_error(self) -> float:
    """Of `perplexity`."""
    return self.perplexity * self.nll_error


def bound(
  model: nnx.Module,
  windows: np.ndarray,
  key: Array,
  *,
  draws: int,
  loss: Loss = "lambda_dce",
  schedule: str = "log_linear",
) -> Bound:
  """Estimates the bound on windows of text.

  Args:
    model: a `Denoiser`; a time-conditioned one needs the loss t_dse.
    windows: int32 [windows, seq].
    key: equal keys give equal masks, so that models are compared on the same ones.
    draws: of every window, at least 2.
    loss: t_dse, t_dce, lambda_dce or k_dce.
    schedule: of the t losses.

  Raises:
    UserError: a token that the model lacks, or a loss that does not bound its likelihood.
  """
  check_tokens(windows, model.mask_token)
  if model.embed_noise is not None and loss != "t_dse":
    raise UserError(f"loss={loss!r} is no bound for a time-conditioned network: expected t_dse")
  graphdef, state = nnx.split(model)
  values = _bound(graphdef, state, jnp.asarray(windows), key, draws, loss, schedule)
  return Bound(np.asarray(values, np.float64), windows.shape[1])


def ordered_nll(model: nnx.Module, windows: np.ndarray, order: np.ndarray) -> np.ndarray:
  """-log p(x) of the model as an autoregressive one in a given order, nats [windows].

  Exact for that order: token by token, one network call each.

  Args:
    model: a time-free `Denoiser`.
    windows: int32 [windows, seq].
    order: a permutation of the positions, int32 [seq] (forward is 0, 1, ...).

  Raises:
    UserError: a token that the model lacks, a time-conditioned model, or no permutation.
  """
  check_tokens(windows, model.mask_token)
  if model.embed_noise is not None:
    raise UserError("a fixed order needs a time-free network: expected one without noise input")
  if not np.array_equal(np.sort(order), np.arange(windows.shape[1])):
    raise UserError(f"order must be a permutation of 0 to {windows.shape[1] - 1}, got {order}")
  graphdef, state = nnx.split(model)
  nll = _ordered_nll(graphdef, state, jnp.asarray(windows), jnp.asarray(order))
  return np.asarray(nll, np.float64)


def check_tokens(tokens: np.ndarray, mask_token: int) -> None:
  """A clean token equal to M would read the mask's meaningless channel.

  Raises:
    UserError: a token is not in the vocabulary.
  """
  if tokens.min() < 0 or tokens.max() >= mask_token:
    raise UserError(
      f"the text has tokens {tokens.min()} to {tokens.max()}; the model has 0 to {mask_token - 1} "
      f"({mask_token} is the mask): is the tokenizer another model's?"
    )


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _bound(graphdef, state, windows, key, draws, loss, schedule):
  """float32 [windows, draws]."""
  model = nnx.merge(graphdef, state)
  network = lambda noisy, noise, key: model(noisy, noise)  # Without dropout.

  def one(inputs):
    window, key = inputs
    copies = jnp.broadcast_to(window, (draws, *window.shape))
    return sequence_losses(loss, network, model.mask_token, copies, key, schedule)

  return jax.lax.map(one, (windows, jax.random.split(key, len(windows))))


@functools.partial(jax.jit, static_argnums=0)
def _ordered_nll(graphdef, state, windows, order):
  model = nnx.merge(graphdef, state)
  rank = jnp.argsort(order)

  def add(total, j):
    noisy = jnp.where(rank < j, windows, model.mask_token)
    log_c = model(noisy)[:, order[j]]
    token = windows[:, order[j], None]
    return total - jnp.take_along_axis(log_c, token, axis=1)[:, 0], None

  zeros = jnp.zeros(len(windows), jnp.float32)
  return jax.lax.scan(add, zeros, jnp.arange(windows.shape[1]))[0]
