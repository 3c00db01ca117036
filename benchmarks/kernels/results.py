"""Results of a benchmark in a JSON file, saved case by case, so that a part of it can run again alone."""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.reporting.report import environment

KERNELS = "kernels"  # The benchmark's own programs; its other parts are named after libraries.


def load(path: pathlib.Path, needed: bool) -> dict[str, Any]:
  """What the file holds, or nothing if there is none.

  Raises:
    UserError: there is none, and it is needed.
  """
  if path.exists():
    return json.loads(path.read_text())
  if needed:
    raise UserError(f"there is no {path}: count all first, without --only and --render")
  return {}


def cases(saved: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The wanted cases in their order, each with what was saved of it; others are left out."""
  as_saved = json.loads(json.dumps(wanted))  # Tuples are lists in a file.
  return [
    next((result for result in saved if case.items() <= result.items()), case) for case in as_saved
  ]


def save(results: dict[str, Any], path: pathlib.Path) -> None:
  """Writes the file, whole or not at all."""
  new = path.with_suffix(".new")
  new.write_text(json.dumps(results, indent=1) + "\n")
  new.replace(path)


def runnable(parts: Sequence[str]) -> list[str]:
  """The parts whose library is installed; says in a line which are left out."""
  missing = [part for part in parts if part != KERNELS and not importlib.util.find_spec(part)]
  if missing:
    print(
      f"not installed: {', '.join(missing)}; what there is of it stays as it was. "
      ".venv/bin/pip install -r benchmarks/requirements.txt",
      file=sys.stderr,
    )
  return [part for part in parts if part not in missing]


def say_where(results: dict[str, Any], parts: Sequence[str]) -> None:
  """Records what the numbers of these parts depend on besides the code."""
  for part in parts:
    version = {} if part == KERNELS else {part: importlib.metadata.version(part)}
    results.setdefault("environment", {})[part] = environment() | version


def print_table(heads: list[str], rows: list[list[str]]) -> None:
  """Prints a table of Markdown."""
  print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
  for row in rows:
    print(f"| {' | '.join(row)} |")
  print()


def over(result: dict[str, Any], name: str, of: str) -> str:
  """The bound of one program over another's, empty if there is none."""
  return f"{result[name]['bound_us'] / result[of]['bound_us']:.2f}" if name in result else ""
