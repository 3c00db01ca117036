"""Tables as named NumPy columns, and the checks that a statistical method needs of them.

  FILE.csv, FILE.csv.gz    comma-separated UTF-8 with a header line; empty, NA and NaN are missing
  FILE.tsv, FILE.tsv.gz    the same, separated by tabs
  FILE.parquet
  sklearn:NAME             a set bundled with scikit-learn; its outcome is the column `target`

A numeric column is float64 and NaN where missing; any other is an object array of str and None
where missing.
"""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from common.cli import closest
from common.errors import UserError

Table = dict[str, np.ndarray]

SKLEARN_SETS = ("breast_cancer", "diabetes", "digits", "iris", "wine")
_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


def read_table(path: str | pathlib.Path, columns: Sequence[str] | None = None) -> Table:
  """Reads a table; see the module's docstring for the formats.

  Args:
    path: a file, or `sklearn:NAME`.
    columns: the names to keep, in this order; None keeps all in the file's order.

  Returns:
    {name: [rows]}, float64 or object, at least one row; rows in the file's order.

  Raises:
    UserError: no such file, format or column; a file that cannot be parsed; two columns with one
      name; no rows.
  """
  if str(path).startswith("sklearn:"):
    table = _load_sklearn(str(path).removeprefix("sklearn:"))
  else:
    table = _read_file(pathlib.Path(path).expanduser())
  if columns is None:
    return table
  for name in columns:
    if name not in table:
      raise UserError(f"{path} has no column {name!r}; {closest(name, table)}")
  return {name: table[name] for name in columns}


def is_numeric(column: np.ndarray) -> bool:
  """Whether a column that `read_table` returned holds numbers, not text."""
  return column.dtype != object


def is_missing(column: np.ndarray) -> np.ndarray:
  """Which entries are NaN or None. [rows] -> bool [rows]."""
  return np.isnan(column) if is_numeric(column) else np.array([x is None for x in column], bool)


def check_complete(table: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
  """Refuses missing values in the named columns.

  Raises:
    UserError: names every column that has some, with their number.
  """
  counts = {name: int(is_missing(table[name]).sum()) for name in dict.fromkeys(names)}
  counts = {name: count for name, count in counts.items() if count}
  if counts:
    listed = ", ".join(f"{name!r} in {count}" for name, count in counts.items())
    rows = len(next(iter(table.values())))
    raise UserError(f"missing values: column {listed} of {rows} rows; fill or drop those rows")


def numeric(table: Mapping[str, np.ndarray], name: str, *, missing: bool = False) -> np.ndarray:
  """A column of finite numbers.

  Args:
    table: what `read_table` returned.
    name: a column of it.
    missing: whether missing values are allowed; they stay NaN.

  Returns:
    float64 [rows].

  Raises:
    UserError: the column holds text or an infinity, or misses values though it must not.
  """
  column = table[name]
  if not is_numeric(column):
    row, value = next((i, x) for i, x in enumerate(column) if x is not None and not _is_number(x))
    raise UserError(f"column {name!r} must be numbers, but row {row + 1} has {value!r}")
  if np.isinf(column).any():
    raise UserError(
      f"column {name!r} is infinite in {np.isinf(column).sum()} of {len(column)} rows (first in "
      f"row {np.isinf(column).argmax() + 1}); expected finite numbers"
    )
  if not missing:
    check_complete(table, [name])
  return column


def encode(table: Mapping[str, np.ndarray], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
  """The regressors of a model: numeric columns as they are, text as indicators of its levels.

  The first level in alphabetical order is the reference and has no indicator.

  Args:
    table: what `read_table` returned.
    names: columns of it.

  Returns:
    float64 [rows, regressors] and the regressors' names, such as "age" and "party[green]".

  Raises:
    UserError: a column that misses values, is infinite, or is constant.
  """
  check_complete(table, names)
  columns, labels = [], []
  for name in names:
    levels, codes = np.unique(table[name], return_inverse=True)
    if len(levels) == 1:
      raise UserError(f"column {name!r} is constant ({levels[0]!r}): it explains nothing; drop it")
    if is_numeric(table[name]):
      columns.append(numeric(table, name))
      labels.append(name)
    else:
      columns += [(codes == i).astype(np.float64) for i in range(1, len(levels))]
      labels += [f"{name}[{level}]" for level in levels[1:]]
  rows = len(next(iter(table.values())))
  return np.stack(columns, axis=1) if columns else np.empty((rows, 0)), labels


def covariate_names(
  table: Mapping[str, np.ndarray], given: Sequence[str] | None, others: Sequence[str]
) -> list[str]:
  """The covariates that a user named, or all columns but `others`.

  Args:
    table: what `read_table` returned.
    given: names of columns, or nothing.
    others: columns of another role, such as the outcome.

  Raises:
    UserError: a column of either that the table lacks, or that is in both.
  """
  names = list(given or [name for name in table if name not in others])
  for name in (*others, *names):
    if name not in table:
      raise UserError(f"the table has no column {name!r}; {closest(name, table)}")
  for name in others:
    if name in names:
      raise UserError(f"column {name!r} is also among the covariates; take it out")
  return names


def check_covariates(x: np.ndarray) -> np.ndarray:
  """An array of finite numbers, float64 [rows, columns].

  Raises:
    UserError: not numbers, not two dimensions, empty, missing or infinite values.
  """
  try:
    x = np.asarray(x, np.float64)
  except (TypeError, ValueError):
    raise UserError("x must be numbers; encode text columns as indicators") from None
  if x.ndim != 2 or not x.size:
    raise UserError(f"x is of shape {x.shape}; expected [rows, columns], at least one of each")
  if not np.isfinite(x).all():
    bad = np.flatnonzero(~np.isfinite(x).all(axis=0))[0]
    raise UserError(
      f"column {bad} of x has {(~np.isfinite(x[:, bad])).sum()} missing or infinite values; fill "
      "them or drop those rows"
    )
  return x


def _read_file(path: pathlib.Path) -> Table:
  # Late: importing pyarrow takes as long as reading a small table.
  import pyarrow as pa
  from pyarrow import csv, parquet

  if not path.name.lower().endswith(_SUFFIXES):
    raise UserError(
      f"cannot read {path}: it must be one of {', '.join(_SUFFIXES)}, or sklearn:NAME"
    )
  if not path.is_file():
    raise UserError(f"no such file: {path}")
  try:
    if path.name.lower().endswith(".parquet"):
      data = parquet.ParquetFile(path).read()
    else:
      with pa.input_stream(str(path), compression="detect") as stream:
        text = stream.read()
      data = csv.read_csv(
        pa.BufferReader(text),
        # One block: a column's type is inferred from all of its rows.
        read_options=csv.ReadOptions(block_size=max(len(text), 1), use_threads=False),
        parse_options=csv.ParseOptions(
          delimiter="\t" if path.name.lower().endswith((".tsv", ".tsv.gz")) else ",",
          newlines_in_values=True,
        ),
        convert_options=csv.ConvertOptions(strings_can_be_null=True),
      )
  except (pa.ArrowException, OSError) as e:
    raise UserError(f"cannot read {path} as a table: {str(e).splitlines()[0]}") from None
  names = data.column_names
  twice = next((name for name in names if names.count(name) > 1), None)
  if twice is not None:
    raise UserError(f"{path} has two columns named {twice!r}; rename one")
  if not data.num_rows:
    raise UserError(f"{path} has no rows below its header")
  return {name: _to_numpy(column) for name, column in zip(names, data.columns)}


def _to_numpy(column) -> np.ndarray:
  """A pyarrow column as float64 with NaN, or as an object array of str with None."""
  import pyarrow as pa

  kind = column.type
  if pa.types.is_dictionary(kind):
    column, kind = column.cast(kind.value_type), kind.value_type
  if any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)):
    return column.cast(pa.float64(), safe=False).to_numpy()
  if pa.types.is_boolean(kind) or pa.types.is_null(kind):
    return np.array([np.nan if x is None else x for x in column.to_pylist()], np.float64)
  values = np.empty(len(column), object)
  values[:] = [None if x is None else str(x) for x in column.to_pylist()]
  return values


def _load_sklearn(name: str) -> Table:
  if name not in SKLEARN_SETS:
    raise UserError(f"unknown table 'sklearn:{name}'; {closest(name, SKLEARN_SETS)}")
  from sklearn import datasets

  data = getattr(datasets, f"load_{name}")()
  features = {str(n): x.astype(np.float64) for n, x in zip(data.feature_names, data.data.T)}
  return features | {"target": data.target.astype(np.float64)}


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True
