"""Perplexity on non-overlapping windows, and paired comparison of two models on the same windows."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.evaluation.calibration import Interval, mean_interval

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class WindowLosses:
  """Negative log-likelihood of a model on windows of text.

  Attributes:
    nll: nats per window, summed over its predicted tokens, float64 [windows].
    tokens: predicted tokens per window (its length - 1).
    num_bytes: bytes of text of the predicted tokens per window [windows], or None. The first token
      of a window is not predicted: its bytes do not count.
  """

  nll: np.ndarray
  tokens: int
  num_bytes: np.ndarray | None = None

  @property
  def perplexity(self) -> float:
    """exp of the mean negative log-likelihood per token."""
    # NumPy's exp: infinite, not an error, for a model that is broken altogether.
    with np.errstate(over="ignore"):
      return float(np.exp(self.nll.sum() / (self.nll.size * self.tokens)))

  @property
  def nats_per_token(self) -> float:
    """Mean negative log-likelihood of a token: the logarithm of the perplexity."""
    return float(self.nll.mean() / self.tokens)

  @property
  def bits_per_byte(self) -> float:
    """Bits per byte of text: comparable across tokenizers."""
    if self.num_bytes is None:
      raise ValueError("the windows came without their number of bytes")
    return self.nll.sum() / math.log(2) / self.num_bytes.sum()


def window_losses(
  model: nnx.Module, windows: Array, *, num_bytes=None, batch_size: int = 16
) -> WindowLosses:
  """Scores every window with the model, from an empty context.

  Args:
    model: a decoder; called as model(tokens) -> (logits [batch, seq, vocab], cache).
    windows: int32 [windows, seq].
    num_bytes: bytes of text of all tokens but a window's first [windows], for bits per byte.
    batch_size: windows per forward pass.

  Raises:
    ValueError: there is no window, or nothing to predict in it.
  """
  graphdef, state = nnx.split(model)
  count, seq = windows.shape
  if not count or seq < 2:
    raise ValueError(f"window_losses needs windows of at least two tokens, got {windows.shape}")
  batch_size = min(batch_size, count)
  # The last batch is padded, so that one compilation serves all.
  padded = np.concatenate([windows, windows[: -count % batch_size]])
  batches = jnp.asarray(padded).reshape(-1, batch_size, seq)
  nll = np.concatenate([_nll(graphdef, state, batch) for batch in batches])[:count]
  return WindowLosses(nll.astype(np.float64), seq - 1, num_bytes)


def paired_difference(a: WindowLosses, b: WindowLosses) -> Interval:
  """Difference of two models on the same windows; pairing removes the windows' own spread.

  Raises:
    ValueError: the windows are not the same, or fewer than two.
  """
  if (a.nll.shape, a.tokens) != (b.nll.shape, b.tokens) or a.nll.size < 2:
    raise ValueError(
      f"expected two models on the same two or more windows, got {a.nll.size} of {a.tokens} tokens "
      f"and {b.nll.size} of {b.tokens}"
    )
  difference = (a.nll - b.nll) / a.tokens
  return mean_interval(difference)


@functools.partial(jax.jit, static_argnums=0)
def _nll(graphdef, state, tokens):
  logits, _ = nnx.merge(graphdef, state)(tokens)
  log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
  return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).sum(axis=(1, 2))
