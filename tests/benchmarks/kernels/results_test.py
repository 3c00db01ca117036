"""Results of a benchmark, saved case by case."""

import pytest

from benchmarks.kernels import results
from common.errors import UserError


def test_a_part_leaves_the_rest_of_a_case(tmp_path):
  path = tmp_path / "results.json"
  wanted = [{"chip": chip, "shape": (8, 4)} for chip in ("a", "b")]
  found = {"products": results.cases([], wanted)}
  for result in found["products"]:
    result |= {"kernel": 1}
  results.save(found, path)
  found = results.load(path, needed=True)
  # Another order, and another case.
  wanted = [wanted[1], {"chip": "b", "shape": (4, 4)}]
  found["products"] = results.cases(found["products"], wanted)
  found["products"][0] |= {"peer": 2}
  results.save(found, path)
  assert results.load(path, needed=True)["products"] == [
    {"chip": "b", "shape": [8, 4], "kernel": 1, "peer": 2},
    {"chip": "b", "shape": [4, 4]},
  ]
  assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_results_that_are_needed_are_asked_for(tmp_path):
  assert results.load(tmp_path / "none.json", needed=False) == {}
  with pytest.raises(UserError, match="count all first"):
    results.load(tmp_path / "none.json", needed=True)
