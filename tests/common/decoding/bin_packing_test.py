"""Packers against brute force and bounds."""

import itertools
import math

import numpy as np
import pytest

from common.decoding.bin_packing import best_fit_decreasing, fewest_bins, one_per_bin
from common.errors import UserError


def brute_force(lengths, capacity) -> int:
  """The fewest bins, over all assignments."""
  for count in range(1, len(lengths) + 1):
    for bins in itertools.product(range(count), repeat=len(lengths)):
      if np.bincount(bins, weights=lengths).max() <= capacity:
        return count


def check(bins, lengths, capacity):
  assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
  assert all(0 < sum(lengths[i] for i in items) <= capacity for items in bins)
  assert len(bins) >= math.ceil(sum(lengths) / capacity)


def test_the_fullest_bin_that_fits_first_bin_on_ties():
  # 6 and 5 open a bin each; 4 fills the first; 3 and a 2 fill the second; a 2 is left.
  assert best_fit_decreasing([5, 2, 6, 4, 3, 2], 10) == [[2, 3], [0, 4, 1], [5]]
  # The bins of 7 are equally full.
  assert best_fit_decreasing([7, 7, 3, 3], 10) == [[0, 2], [1, 3]]
  # The emptiest bin would be the other one.
  assert best_fit_decreasing([8, 6, 1], 10) == [[0, 2], [1]]


@pytest.mark.parametrize("seed", range(12))
def test_packers_against_brute_force(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 13, size=rng.integers(1, 8)).tolist()
  capacity = max(lengths) + int(rng.integers(0, 4))
  fewest = brute_force(lengths, capacity)
  for packer in (best_fit_decreasing, fewest_bins, one_per_bin):
    check(packer(lengths, capacity), lengths, capacity)
  assert len(fewest_bins(lengths, capacity)) == fewest
  assert fewest <= len(best_fit_decreasing(lengths, capacity)) <= 11 / 9 * fewest + 4


def test_the_integer_program_finds_what_best_fit_does_not():
  # 6 + 3 + 3 and 5 + 5 + 2 are two full bins; best fit begins with 6 + 5 and 5 + 3 + 3.
  lengths, capacity = [6, 5, 5, 3, 3, 2], 12
  assert len(best_fit_decreasing(lengths, capacity)) == 3
  exact = fewest_bins(lengths, capacity)
  check(exact, lengths, capacity)
  assert len(exact) == 2


def test_many_items_stay_within_the_bound():
  lengths = np.random.default_rng(0).integers(1, 512, 2000).tolist()
  bins = best_fit_decreasing(lengths, 512)
  check(bins, lengths, 512)
  assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / 512) + 4


@pytest.mark.parametrize("packer", [best_fit_decreasing, fewest_bins, one_per_bin])
def test_bad_input(packer):
  with pytest.raises(UserError, match="at least one token"):
    packer([], 4)
  with pytest.raises(UserError, match="at least one token"):
    packer([2, 0], 4)
  with pytest.raises(UserError, match="a prompt has 5 tokens and a row 4"):
    packer([2, 5], 4)


def test_no_proof_in_time():
  lengths = np.random.default_rng(0).integers(100, 300, 60).tolist()
  with pytest.raises(UserError, match="60 prompts was proved optimal"):
    fewest_bins(lengths, 500, time_limit=0.01)
