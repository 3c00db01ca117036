import math

import numpy as np
import pytest

from common.evaluation.perplexity import WindowLosses, paired_difference, window_losses
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  logits,
  random_decoder,
  random_tokens,
)


@pytest.fixture(scope="module")
def model():
  return random_decoder(ARCHITECTURES["llama"])


def test_losses_against_float64(model):
  windows = random_tokens(model.config, 7, 12)
  # Seven windows in batches of four: the last batch is padded.
  losses = window_losses(model, windows, batch_size=4)
  values = np.asarray(logits(model, windows), np.float64)
  log_probs = values - np.log(np.exp(values).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_probs[:, :-1], windows[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(losses.nll, -picked.sum(1), rtol=1e-5)
  assert losses.nll.shape == (7,) and losses.tokens == 11
  assert losses.perplexity == pytest.approx(math.exp(-picked.mean()), rel=1e-5)
  assert losses.nats_per_token == pytest.approx(-picked.mean(), rel=1e-5)


def test_batches_do_not_mix(model):
  windows = random_tokens(model.config, 7, 12)
  whole = window_losses(model, windows, batch_size=7).nll
  for batch_size in (1, 3, 100):
    # The same sums in batches of another shape.
    np.testing.assert_allclose(
      window_losses(model, windows, batch_size=batch_size).nll, whole, rtol=1e-5
    )
  with pytest.raises(ValueError, match="at least two tokens"):
    window_losses(model, windows[:0])
  with pytest.raises(ValueError, match="at least two tokens"):
    window_losses(model, windows[:, :1])


def test_a_model_broken_altogether_has_infinite_perplexity():
  assert WindowLosses(np.array([1e5]), 10).perplexity == math.inf


def test_bits_per_byte():
  losses = WindowLosses(np.array([math.log(2) * 30, math.log(2) * 50]), 10, np.array([20, 20]))
  assert losses.bits_per_byte == pytest.approx(2.0)
  with pytest.raises(ValueError):
    _ = WindowLosses(np.ones(2), 10).bits_per_byte


def test_paired_difference_is_a_t_interval():
  a = WindowLosses(np.array([10.0, 20.0, 30.0, 44.0]), 10)
  b = WindowLosses(np.array([9.0, 18.0, 29.0, 40.0]), 10)
  result = paired_difference(a, b)
  difference = np.array([0.1, 0.2, 0.1, 0.4])
  half = 3.182446 * difference.std(ddof=1) / 2  # Student's t, 3 degrees of freedom, 97.5 %.
  assert result.mean == pytest.approx(0.2)
  assert (result.low, result.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)
  for other in (WindowLosses(b.nll[:1], 10), WindowLosses(b.nll, 11)):
    with pytest.raises(ValueError, match="the same two or more windows"):
      paired_difference(a, other)
  with pytest.raises(ValueError, match="two or more"):
    paired_difference(WindowLosses(a.nll[:1], 10), WindowLosses(b.nll[:1], 10))
