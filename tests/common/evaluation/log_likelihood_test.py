"""Bucketed scores against scores of single rows."""

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.evaluation import log_likelihood
from common.evaluation.log_likelihood import bucket_length, log_likelihoods
from tests.common.models.small_decoders import ARCHITECTURES, logits, random_decoder


@pytest.fixture(scope="module")
def model():
  return random_decoder(ARCHITECTURES["llama"])


def test_rows_of_all_buckets_one_by_one(model):
  rng = np.random.default_rng(0)
  text = lambda length: rng.integers(0, 64, length).tolist()
  pairs = [(text(a), text(b)) for a, b in ((1, 1), (30, 3), (31, 2), (50, 9), (2, 20), (60, 1))]
  compiled = log_likelihood._score._cache_size()
  results = log_likelihoods(model, pairs, batch_size=2, max_length=48)
  assert log_likelihood._score._cache_size() == compiled + 2  # Lengths 32 and 48.
  for (context, continuation), (total, _) in zip(pairs, results):
    row = [*context, *continuation][-49:]
    values = np.asarray(jax.nn.log_softmax(logits(model, np.array([row[:-1]]))[0]))
    targets = row[-len(continuation) :]
    at = range(len(row) - 1 - len(continuation), len(row) - 1)
    expected = sum(values[i, target] for i, target in zip(at, targets))
    assert total == pytest.approx(expected, rel=1e-4)


def test_bad_input(model):
  assert log_likelihoods(model, []) == []
  for pair in (([], [1]), ([1], [])):
    with pytest.raises(ValueError, match="non-empty"):
      log_likelihoods(model, [pair])
  with pytest.raises(UserError, match="9 tokens and the model takes 8"):
    log_likelihoods(model, [([1], [2] * 9)], max_length=8)


def test_buckets():
  lengths = {bucket_length(n, 1000) for n in range(1, 1001)}
  assert lengths == {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000}
  assert all(n <= bucket_length(n, 1000) for n in range(1, 1001))
  assert bucket_length(1000) == 1024
