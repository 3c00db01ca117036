"""Tables from files: types, missing values, and errors that name the column."""

import gzip

import numpy as np
import pytest

from common.data import tabular
from common.errors import UserError

CSV = 'y,age,party,note\n1,30,green,"two\nlines"\n0,,red,\nNA,41.5,green,"a, b"\n'


@pytest.fixture
def table(tmp_path):
  (tmp_path / "t.csv").write_text(CSV)
  return tabular.read_table(tmp_path / "t.csv")


def test_types_and_missing_values(table):
  assert list(table) == ["y", "age", "party", "note"]
  np.testing.assert_array_equal(table["y"], [1, 0, np.nan])
  np.testing.assert_array_equal(table["age"], [30, np.nan, 41.5])
  assert table["age"].dtype == np.float64
  assert table["party"].tolist() == ["green", "red", "green"]
  assert table["note"].tolist() == ["two\nlines", None, "a, b"]
  np.testing.assert_array_equal(tabular.is_missing(table["age"]), [False, True, False])
  np.testing.assert_array_equal(tabular.is_missing(table["note"]), [False, True, False])


@pytest.mark.parametrize("suffix", ["csv.gz", "tsv", "parquet"])
def test_every_format_reads_the_same(suffix, table, tmp_path):
  path = tmp_path / f"other.{suffix}"
  if suffix == "csv.gz":
    path.write_bytes(gzip.compress(("\ufeff" + CSV).encode()))
  elif suffix == "tsv":
    path.write_text(
      'y\tage\tparty\tnote\n1\t30\tgreen\t"two\nlines"\n0\t\tred\t\n\t41.5\tgreen\ta, b\n'
    )
  else:
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {
      "y": pa.array([1, 0, None], pa.int32()),
      "age": [30, None, 41.5],
      "party": pa.array(["green", "red", "green"]).dictionary_encode(),
      "note": ["two\nlines", None, "a, b"],
    }
    parquet.write_table(pa.table(arrays), path)
  other = tabular.read_table(path)
  assert list(other) == list(table)
  for name, column in table.items():
    assert other[name].dtype == column.dtype
    np.testing.assert_array_equal(other[name], column)


def test_a_type_is_inferred_from_every_row(tmp_path):
  rows = ["1"] * 300_000 + ["2.5", "true"]
  (tmp_path / "long.csv").write_text("\n".join(["x,z", *(f"{r},{r}" for r in rows[:-1])]))
  assert tabular.read_table(tmp_path / "long.csv")["x"][-1] == 2.5
  (tmp_path / "mixed.csv").write_text("\n".join(["x,z", *(f"{r},1" for r in rows)]))
  mixed = tabular.read_table(tmp_path / "mixed.csv")
  with pytest.raises(UserError, match="'x' must be numbers, but row 300002 has 'true'"):
    tabular.numeric(mixed, "x")


def test_booleans_are_numbers_and_empty_columns_missing(tmp_path):
  (tmp_path / "t.csv").write_text("flag,none\ntrue,\nfalse,\n")
  table = tabular.read_table(tmp_path / "t.csv")
  np.testing.assert_array_equal(table["flag"], [1.0, 0.0])
  assert np.isnan(table["none"]).all()


def test_columns_are_chosen_and_close_names_offered(table, tmp_path):
  assert list(tabular.read_table(tmp_path / "t.csv", ["party", "y"])) == ["party", "y"]
  with pytest.raises(UserError, match="no column 'agee'; did you mean age?"):
    tabular.read_table(tmp_path / "t.csv", ["y", "agee"])


def test_numbers_are_finite_and_complete(table):
  with pytest.raises(UserError, match="column 'y' in 1, 'age' in 1 of 3 rows"):
    tabular.check_complete(table, ["y", "age", "party"])
  with pytest.raises(UserError, match="column 'age' in 1 of 3 rows"):
    tabular.numeric(table, "age")
  assert np.isnan(tabular.numeric(table, "age", missing=True)[1])
  with pytest.raises(UserError, match="column 'x' is infinite in 1 of 3 rows .first in row 2"):
    tabular.numeric({"x": np.array([1, np.inf, np.nan])}, "x", missing=True)


def test_text_becomes_indicators_without_the_first_level(table):
  columns = {"party": table["party"], "x": np.array([1.0, 2.0, 5.0])}
  regressors, names = tabular.encode(columns, ["x", "party"])
  assert names == ["x", "party[red]"]
  np.testing.assert_array_equal(regressors, [[1, 0], [2, 1], [5, 0]])
  assert tabular.encode(columns, [])[0].shape == (3, 0)
  with pytest.raises(UserError, match="'c' is constant"):
    tabular.encode({"c": np.ones(3)}, ["c"])
  with pytest.raises(UserError, match="'note' in 1 of 3 rows"):
    tabular.encode(table, ["note"])


@pytest.mark.parametrize("name", tabular.SKLEARN_SETS)
def test_bundled_sets(name):
  table = tabular.read_table(f"sklearn:{name}")
  assert {len(c) for c in table.values()} == {len(table["target"])}
  assert len(table) > 4 and all(np.isfinite(c).all() for c in table.values())


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("t.xlsx", "", "must be one of .csv"),
    ("t.csv", "", "cannot read .* as a table"),
    ("t.csv", "a,b\n", "no rows"),
    ("t.csv", "a,b\n1,2,3\n", "Expected 2 columns, got 3"),
    ("t.csv", "a,a\n1,2\n", "two columns named 'a'"),
    ("t.parquet", "not parquet", "cannot read .* as a table"),
  ],
)
def test_bad_files_are_named(name, text, message, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message):
    tabular.read_table(tmp_path / name)


def test_files_and_sets_that_are_not_there(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    tabular.read_table(tmp_path / "absent.csv")
  with pytest.raises(UserError, match="did you mean diabetes?"):
    tabular.read_table("sklearn:diabets")


def test_covariates_are_named_or_all_the_others():
  table = {"y": np.zeros(2), "a": np.zeros(2), "b": np.zeros(2)}
  assert tabular.covariate_names(table, None, ["y"]) == ["a", "b"]
  assert tabular.covariate_names(table, ["b"], ["y"]) == ["b"]
  for given, others, message in (
    (["c"], ["y"], "no column 'c'"),
    (None, ["z"], "no column 'z'"),
    (["a", "y"], ["y"], "'y' is also among the covariates"),
  ):
    with pytest.raises(UserError, match=message):
      tabular.covariate_names(table, given, others)


def test_covariates_are_finite_numbers():
  x = tabular.check_covariates([[1, 2], [3, 4]])
  assert x.dtype == np.float64 and x.shape == (2, 2)
  for bad, message in (
    ([["a"]], "must be numbers"),
    ([1.0, 2.0], r"expected \[rows, columns\]"),
    (np.empty((0, 3)), "at least one of each"),
    ([[1, np.nan], [2, np.inf]], "column 1 of x has 2 missing or infinite"),
  ):
    with pytest.raises(UserError, match=message):
      tabular.check_covariates(bad)
