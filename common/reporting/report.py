"""What a paper's run reports: tables, figures, and claims that can fail.

`experiment.run(config, workdir)` returns `Report(tables=[...], figures=[...], claims=[...])`;
`common.cli` fills in the rest, prints it and writes `report.json` and `report.md`.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from common.errors import UserError

Cell = str | int | float | None

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclasses.dataclass(frozen=True)
class Column:
  """A table column: `format` is a format spec for its numbers (".2f"), `better` bolds the best."""

  name: str
  format: str = ""
  better: Literal["", "lower", "higher"] = ""

  def text(self, cell: Cell) -> str:
    """Returns the cell as shown; an absent one is a dash."""
    if cell is None:
      return "–"
    if isinstance(cell, str | bool):
      return str(cell)
    return format(cell, self.format or ("" if isinstance(cell, int) else ".4g"))


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells, one per column; a column may be given by its name alone.

  Raises:
    ValueError: a row does not have one cell per column.
  """

  title: str
  columns: Sequence[Column | str]
  rows: Sequence[Sequence[Cell]]
  note: str = ""

  def __post_init__(self):
    columns = [Column(c) if isinstance(c, str) else c for c in self.columns]
    rows = [[_plain(cell) for cell in row] for row in self.rows]
    for row in rows:
      if len(row) != len(columns):
        raise ValueError(f"table {self.title!r}: {len(columns)} columns, but a row is {row}")
    object.__setattr__(self, "columns", columns)
    object.__setattr__(self, "rows", rows)

  def best(self, column: int) -> float | None:
    """Returns the best finite number of a column that says which is better, else None."""
    values = [row[column] for row in self.rows if _is_finite(row[column])]
    better = self.columns[column].better
    if not better or not values:
      return None
    return min(values) if better == "lower" else max(values)

  def texts(self) -> list[list[tuple[str, bool]]]:
    """Returns the cells as (text, whether it is the best of its column)."""
    best = [self.best(i) for i in range(len(self.columns))]
    return [
      [(c.text(cell), b is not None and cell == b) for c, cell, b in zip(self.columns, row, best)]
      for row in self.rows
    ]


@dataclasses.dataclass(frozen=True)
class Figure:
  """A PNG that the experiment saved; `path` is relative to the workdir."""

  name: str
  path: str
  caption: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement of the paper, tested on what was measured. Use `Claim.less` or `Claim.greater`.

  measured: one number per seed; or {name: numbers} of exactly two methods measured on the same
    seeds, whose paired difference, first minus second, is the number that is tested.

  The rule is the same for every claim: it holds when the *mean over the seeds* is strictly below
  (above) the threshold. How many seeds agree one by one is reported beside it. A claim with a NaN
  or an infinity among its measurements never holds.

  Raises:
    ValueError: nothing was measured, not two methods on the same seeds, or no finite threshold.
  """

  statement: str
  measured: Sequence[float] | Mapping[str, Sequence[float]]
  relation: Literal["<", ">"]
  threshold: float

  def __post_init__(self):
    if isinstance(self.measured, Mapping):
      measured = {name: [float(v) for v in values] for name, values in self.measured.items()}
      sizes = {len(values) for values in measured.values()}
      if len(measured) != 2 or len(sizes) != 1:
        raise ValueError(f"claim {self.statement!r} needs two methods with equally many seeds")
    else:
      measured = [float(v) for v in self.measured]
    object.__setattr__(self, "measured", measured)
    object.__setattr__(self, "threshold", float(self.threshold))
    if not self.values:
      raise ValueError(f"claim {self.statement!r} has no measurements")
    if not math.isfinite(self.threshold):
      raise ValueError(f"claim {self.statement!r}: the threshold {self.threshold} is not finite")
    if self.relation not in ("<", ">"):
      raise ValueError(f"claim {self.statement!r}: relation {self.relation!r} is not < or >")

  @classmethod
  def less(cls, statement, measured, threshold: float = 0.0) -> "Claim":
    """Claims that mean(measured), or mean(first - second), is below the threshold."""
    return cls(statement, measured, "<", threshold)

  @classmethod
  def greater(cls, statement, measured, threshold: float = 0.0) -> "Claim":
    """Claims that mean(measured), or mean(first - second), is above the threshold."""
    return cls(statement, measured, ">", threshold)

  @functools.cached_property
  def values(self) -> list[float]:
    """The tested number of each seed."""
    if isinstance(self.measured, Mapping):
      first, second = self.measured.values()
      return [a - b for a, b in zip(first, second)]
    return self.measured

  @property
  def mean(self) -> float:
    return sum(self.values) / len(self.values)

  @property
  def seeds_agreeing(self) -> int:
    return sum(self._passes(v) for v in self.values)

  @property
  def holds(self) -> bool:
    return self._passes(self.mean)  # One non-finite value makes the mean non-finite.

  @property
  def rule(self) -> str:
    """The test in words, such as "mean over seeds of (awq - rtn) < 0"."""
    what = "measured"
    if isinstance(self.measured, Mapping):
      what = "({} - {})".format(*self.measured)
    return f"mean over seeds of {what} {self.relation} {self.threshold:g}"

  @property
  def outcome(self) -> str:
    """The test with its numbers: "mean -0.31 (< 0), 2/3 seeds agree: -0.4, -0.6, 0.07"."""
    values = ", ".join(f"{v:.4g}" for v in self.values)
    return (
      f"mean {self.mean:.4g} ({self.relation} {self.threshold:g}), "
      f"{self.seeds_agreeing}/{len(self.values)} seeds agree: {values}"
    )

  def _passes(self, value: float) -> bool:
    if not math.isfinite(value):
      return False
    return value < self.threshold if self.relation == "<" else value > self.threshold


@dataclasses.dataclass(frozen=True)
class Report:
  """The result of one run. An experiment fills the first three; `common.cli` the others."""

  tables: Sequence[Table] = ()
  figures: Sequence[Figure] = ()
  claims: Sequence[Claim] = ()
  project: str = ""
  preset: str = ""
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0

  @property
  def claims_held(self) -> str:
    """Claims that hold, of those tested: "2/3"."""
    return f"{sum(c.holds for c in self.claims)}/{len(self.claims)}"

  def to_json(self) -> dict[str, Any]:
    """Returns the report as JSON values; NaN and infinities become strings, as JSON has none."""
    return plain_json(
      {
        "project": self.project,
        "preset": self.preset,
        "tables": [dataclasses.asdict(t) for t in self.tables],
        "figures": [dataclasses.asdict(f) for f in self.figures],
        "claims": [
          {
            "statement": c.statement,
            "measured": c.measured,
            "relation": c.relation,
            "threshold": c.threshold,
            "holds": c.holds,
            "rule": c.rule,
            "mean": c.mean,
            "seeds_agreeing": c.seeds_agreeing,
            "seeds": len(c.values),
          }
          for c in self.claims
        ],
        "environment": self.environment,
        "seconds": self.seconds,
        "config": self.config,
      }
    )


def environment() -> dict[str, Any]:
  """Returns what the numbers of this run depend on besides the code: versions and hardware."""
  import jax  # Late: reading reports (list, reproduce) must not wait for JAX.

  devices = jax.devices()
  return {
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    "backend": jax.default_backend(),
    "device": devices[0].device_kind,
    "device_count": len(devices),
    "cpu_count": os.cpu_count(),
    "platform": platform.platform(),
    "commit": _commit(),
  }


def write_report(report: Report, workdir: pathlib.Path) -> None:
  """Writes report.md, then report.json, each whole or not at all; the JSON marks a finished run."""
  write_text(workdir / "report.md", to_markdown(report))
  write_text(
    workdir / "report.json", json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
  )


def load_report(path: pathlib.Path) -> Report:
  """Reads a report.json.

  Raises:
    UserError: there is none, it is malformed, or a `holds` contradicts the measurements beside it.
  """
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
    claims = []
    for c in data["claims"]:
      claim = Claim(c["statement"], _restore(c["measured"]), c["relation"], c["threshold"])
      if claim.holds != c["holds"]:
        raise ValueError(f"claim {claim.statement!r} does not follow from its measurements")
      claims.append(claim)
    return Report(
      tables=[
        Table(
          title=t["title"],
          columns=[Column(**c) for c in t["columns"]],
          rows=_restore(t["rows"]),
          note=t["note"],
        )
        for t in data["tables"]
      ],
      figures=[Figure(**f) for f in data["figures"]],
      claims=claims,
      project=data["project"],
      preset=data["preset"],
      config=data["config"],
      environment=data["environment"],
      seconds=float(data["seconds"]),
    )
  except OSError as e:
    raise UserError(f"cannot read the report {path}: {e.strerror}") from None
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    reason = f"no {e}" if isinstance(e, KeyError) else e
    raise UserError(f"{path} is not a report: {reason}") from None


def print_report(report: Report) -> None:
  """Prints the tables and claims, in colour on a terminal, unwrapped when piped to a file."""
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table as RichTable
  from rich.text import Text

  # Off a terminal Rich assumes 80 columns and would fold the tables of a log file.
  console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
  console.print(f"[bold]{escape(report.project)}[/] (preset {escape(report.preset)})")
  for table in report.tables:
    grid = RichTable()
    for i, column in enumerate(table.columns):
      numeric = any(isinstance(row[i], int | float) for row in table.rows)
      grid.add_column(escape(column.name), justify="right" if numeric else "left", overflow="fold")
    for row in table.texts():
      grid.add_row(*[Text(text, style="bold" if best else "") for text, best in row])
    # Not the grid's own title and caption: those are folded to the width of a narrow grid.
    console.print(f"\n[bold]{escape(table.title)}[/]")
    console.print(grid)
    if table.note:
      console.print(escape(table.note))
  if report.claims:
    console.print(f"\n[bold]Claims held: {report.claims_held}[/]")
  for claim in report.claims:
    mark = "[bold green]✓[/]" if claim.holds else "[bold red]✗[/]"
    console.print(f"{mark} {escape(claim.statement)}\n    {escape(claim.outcome)}")
  console.print(f"\n{report.seconds:.1f} s")


def to_markdown(report: Report) -> str:
  """Returns the report as GitHub-flavoured Markdown, figures by their relative paths."""
  lines = [f"# {report.project} (preset `{report.preset}`)", ""]
  if report.claims:
    lines += [f"## Claims held: {report.claims_held}", ""]
    for c in report.claims:
      lines.append(f"- {'✓' if c.holds else '✗'} **{_md(c.statement)}**: {_md(c.outcome)}")
    lines.append("")
  for table in report.tables:
    lines += [f"## {table.title}", ""]
    lines.append(_md_row([_md(c.name) for c in table.columns]))
    lines.append(_md_row(["---"] * len(table.columns)))
    for row in table.texts():
      lines.append(_md_row([f"**{_md(text)}**" if best else _md(text) for text, best in row]))
    lines += ["", *([table.note, ""] if table.note else [])]
  for figure in report.figures:
    lines += [f"## {figure.name}", "", f"![{figure.name}]({figure.path})", ""]
    lines += [figure.caption, ""] if figure.caption else []
  lines += ["## Run", "", f"- seconds: {report.seconds:.1f}"]
  lines += [f"- {key}: {value}" for key, value in report.environment.items()]
  return "\n".join(lines) + "\n"


def write_text(path: pathlib.Path, text: str) -> None:
  """`write_bytes` of UTF-8."""
  write_bytes(path, text.encode("utf-8"))


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Replaces the file `path` in one step, so that no reader ever sees half of it."""
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    part.write_bytes(data)
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def plain_json(value: Any) -> Any:
  """Returns `value` as what `json.loads` would give back; what JSON lacks becomes a string."""
  value = _plain(value)
  if isinstance(value, Mapping):
    return {str(k): plain_json(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain_json(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
  return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def _restore(value: Any) -> Any:
  """Turns the strings that stand for non-finite numbers back into floats."""
  if isinstance(value, dict):
    return {k: _restore(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_restore(v) for v in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
  """Turns a NumPy or JAX scalar into Python's."""
  return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _is_finite(cell: Cell) -> bool:
  return isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell)


def _md(text: str) -> str:
  return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _md_row(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _commit() -> str | None:
  """The checkout's commit, "-dirty" if files differ from it; None outside a git checkout."""
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
  try:
    done = subprocess.run(
      command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None
