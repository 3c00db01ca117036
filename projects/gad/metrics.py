"""How far samples are from the model's distribution over grammatical texts."""

import collections
from collections.abc import Hashable, Mapping, Sequence

import numpy as np


def restricted(log_p: Mapping[Hashable, float]) -> dict[Hashable, float]:
  """log Q of the observed grammatical texts: the model's probabilities, normalised over them.

  Args:
    log_p: of each text under the model.
  """
  total = np.logaddexp.reduce(list(log_p.values()))
  return {text: value - total for text, value in log_p.items()}


def empirical_kl(samples: Sequence[Hashable], log_q: Mapping[Hashable, float]) -> float:
  """KL(frequencies of the samples || Q), nats. Samples that are no texts must be left out.

  With n samples of Q itself it is about (texts - 1) / 2n, not 0.
  """
  counts = collections.Counter(samples)
  share = {text: count / len(samples) for text, count in counts.items()}
  return sum(p * (float(np.log(p)) - log_q[text]) for text, p in share.items())


def window_kl(
  samples: Sequence[Hashable | None], log_q: Mapping[Hashable, float], ends: Sequence[int]
) -> list[float]:
  """`empirical_kl` over sliding windows of a quarter of the samples.

  Args:
    samples: texts in the order of sampling; None for one that was cut off.
    log_q: of `restricted`.
    ends: of the windows, exclusive.
  """
  width = max(1, len(samples) // 4)
  windows = [[s for s in samples[max(0, end - width) : end] if s is not None] for end in ends]
  return [empirical_kl(window, log_q) if window else float("nan") for window in windows]


def expected_probability(log_p: Sequence[float]) -> float:
  """log of the mean probability of samples under the model."""
  return float(np.logaddexp.reduce(log_p) - np.log(len(log_p)))


def total_variation(samples: Sequence[Hashable], q: Mapping[Hashable, float]) -> float:
  """Half of the L1 distance between the samples' frequencies and Q over all texts."""
  share = {text: 0.0 for text in q}
  for sample in samples:
    share[sample] += 1 / len(samples)
  return 0.5 * sum(abs(share[text] - p) for text, p in q.items())
