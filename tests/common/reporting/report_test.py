import dataclasses
import io
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.reporting import report as reporting
from common.reporting.report import Claim, Column, Figure, Report, Table, load_report, write_report


@pytest.fixture
def report():
  rows = [["FP16", 5.25, None], ["RTN | naive", np.float32(7.5), math.inf], ["AWQ", 6.25, 6.2]]
  return Report(
    tables=[
      Table("Perplexity", ["method", Column("ours", ".2f", "lower"), "paper"], rows, note="3 bits")
    ],
    figures=[Figure("Loss", "loss.png", "by step")],
    claims=[
      Claim.less("AWQ beats RTN", {"awq": [6.2, 6.3, 7.2], "rtn": [7.0, 7.1, 7.0]}),
      Claim.greater("speed-up", [1.2, math.nan], 1.5),
    ],
    project="awq",
    preset="tiny",
    config={"bits": 3, "seeds": (0, 1), "lr": 0.1, "model": None},
    environment={"jax": "0.10.2"},
    seconds=12.5,
  )


def test_a_claim_tests_the_mean_over_seeds_strictly():
  assert Claim.less("", [1.0, 2.9], 2.0).holds
  assert not Claim.less("", [1.0, 3.0], 2.0).holds
  assert Claim.greater("", [1.0, 3.1], 2.0).holds
  assert not Claim.greater("", [1.0, 3.0], 2.0).holds


def test_a_claim_on_two_methods_tests_their_paired_difference():
  claim = Claim.less("", {"awq": [6.2, 6.3, 7.2], "rtn": [7.0, 7.1, 7.0]}, -0.4)
  assert claim.values == pytest.approx([-0.8, -0.8, 0.2])
  assert claim.holds and claim.seeds_agreeing == 2
  assert claim.rule == "mean over seeds of (awq - rtn) < -0.4"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [Claim.less, Claim.greater])
def test_a_claim_with_a_non_finite_measurement_never_holds(make, bad):
  assert not make("", [bad, 0.0], 0.5).holds
  assert not make("", {"a": [bad], "b": [0.0]}).holds
  with pytest.raises(ValueError, match="not finite"):
    make("", [0.0], bad)


@pytest.mark.parametrize(
  "measured", [[], {"a": [1.0]}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": [1], "b": [1], "c": [1]}]
)
def test_a_claim_needs_measurements_on_the_same_seeds(measured):
  with pytest.raises(ValueError):
    Claim.less("", measured)


def test_a_ragged_table_is_refused():
  with pytest.raises(ValueError, match="2 columns"):
    Table("t", ["a", "b"], [[1]])


def test_the_best_of_a_column_ignores_absent_and_non_finite_cells():
  rows = [[None, "x"], [math.nan, 1], [-math.inf, 3], [2.0, 2], [1.0, True]]
  table = Table("t", [Column("a", better="lower"), Column("b", better="higher")], rows)
  assert [table.best(0), table.best(1)] == [1.0, 3]
  assert [[bold for _, bold in row] for row in table.texts()] == [
    [False, False],
    [False, False],
    [False, True],
    [False, False],
    [True, False],
  ]


def test_a_report_is_read_back_as_written(report, tmp_path):
  write_report(report, tmp_path)
  again = load_report(tmp_path / "report.json")
  assert again.to_json() == report.to_json()
  assert again.tables[0].rows[1] == ["RTN | naive", 7.5, math.inf]
  assert math.isnan(again.claims[1].measured[1])
  assert again.config == {"bits": 3, "seeds": [0, 1], "lr": 0.1, "model": None}
  assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_the_json_is_strict_and_states_the_rule(report, tmp_path):
  write_report(report, tmp_path)

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
  first, second = data["claims"]
  assert first["rule"] == "mean over seeds of (awq - rtn) < 0" and first["holds"]
  assert (first["seeds_agreeing"], first["seeds"]) == (2, 3)
  assert second["measured"] == [1.2, "NaN"] and second["holds"] is False


@given(st.lists(st.floats(), min_size=1), st.floats(allow_nan=False, allow_infinity=False))
def test_any_measurement_survives_json(measured, threshold):
  report = Report(claims=[Claim.less("c", measured, threshold)])
  data = json.loads(json.dumps(report.to_json(), allow_nan=False))
  again = reporting._restore(data["claims"][0]["measured"])
  np.testing.assert_array_equal(again, measured)


@pytest.mark.parametrize(
  "change",
  [
    lambda d: d.pop("claims"),
    lambda d: d["claims"][0].pop("measured"),
    lambda d: d["claims"][1].update(holds=True),
    lambda d: d["tables"][0]["rows"][0].pop(),
    lambda d: d.update(figures=[{"nonsense": 1}]),
    lambda d: d.update(seconds=None),
  ],
)
def test_a_malformed_or_doctored_report_is_a_user_error(report, tmp_path, change):
  data = report.to_json()
  change(data)
  path = tmp_path / "report.json"
  path.write_text(json.dumps(data))
  with pytest.raises(UserError, match="is not a report"):
    load_report(path)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"project": "awq"', "\xff"])
def test_a_file_that_is_no_report_is_a_user_error(tmp_path, text):
  path = tmp_path / "report.json"
  path.write_bytes(text.encode("latin-1"))
  with pytest.raises(UserError):
    load_report(path)
  with pytest.raises(UserError, match="No such file"):
    load_report(tmp_path / "absent.json")


def test_an_interrupted_write_keeps_the_old_report(report, tmp_path, monkeypatch):
  write_report(report, tmp_path)
  before = (tmp_path / "report.json").read_text()

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError):
    write_report(dataclasses.replace(report, seconds=99.0), tmp_path)
  assert (tmp_path / "report.json").read_text() == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_markdown_has_every_part_and_keeps_its_columns(report):
  text = reporting.to_markdown(report)
  row = next(line for line in text.splitlines() if "RTN" in line and line.startswith("|"))
  assert row == "| RTN \\| naive | 7.50 | inf |"
  assert "| FP16 | **5.25** | – |" in text
  assert "- ✓ **AWQ beats RTN**: mean -0.4667 (&lt; 0), 2/3 seeds agree" in text
  assert "![Loss](loss.png)" in text and "- jax: 0.10.2" in text and "3 bits" in text


def test_printing_off_a_terminal_folds_and_cuts_nothing(report, monkeypatch):
  long = "a rather long remark [bold] " * 12
  table = Table("A table whose title is wider than its cells", ["n", "remark"], [[1, long]])
  out = io.StringIO()
  monkeypatch.setattr(sys, "stdout", out)
  reporting.print_report(dataclasses.replace(report, tables=[*report.tables, table]))
  text = out.getvalue()
  assert long.strip() in text and table.title in text and "\x1b" not in text
  assert "✓ AWQ beats RTN" in text and "✗ speed-up" in text and "Claims held: 1/2" in text


def test_the_environment_names_versions_and_device():
  environment = reporting.environment()
  assert environment["backend"] == "cpu"
  assert environment["jax"] and environment["flax"] and environment["device_count"] >= 1
