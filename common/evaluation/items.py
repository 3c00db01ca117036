"""Items of a benchmark, read from a JSON-lines file."""

import gzip
import json
import os
import pathlib
from collections.abc import Callable, Sequence

from common.errors import UserError


def read_items(
  path: str | os.PathLike,
  fields: Sequence[str],
  check: Callable[[dict[str, str]], str | None] = lambda item: None,
) -> list[dict[str, str]]:
  """Reads one JSON object per line; empty lines are skipped, other fields dropped.

  Args:
    path: a .jsonl file, or .jsonl.gz.
    fields: that every item must have, each a string that is not empty.
    check: says what is wrong with an item, None for nothing.

  Raises:
    UserError: the file is missing, damaged or empty; the first line that is wrong is named.
  """
  path = pathlib.Path(path).expanduser()
  try:
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    with opened as f:
      lines = f.read().split(b"\n")
  except (OSError, EOFError) as e:
    reason = getattr(e, "strerror", None) or e
    raise UserError(f"cannot read {path}: {reason}; expected JSON lines, or .gz of them") from None
  items = []
  for i, line in enumerate(lines, 1):
    if line.strip():
      items.append(_item(line, fields, f"{path}:{i}"))
      if wrong := check(items[-1]):
        raise UserError(f"{path}:{i}: {wrong}: mend or drop the line")
  if not items:
    raise UserError(f"{path} has no items: expected one JSON object with {_names(fields)} per line")
  return items


def _item(line: bytes, fields: Sequence[str], place: str) -> dict[str, str]:
  try:
    item = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise UserError(
      f"{place}: not JSON ({e}); expected an object with {_names(fields)}: mend or drop the line"
    ) from None
  if not isinstance(item, dict):
    raise UserError(
      f"{place}: expected an object with {_names(fields)}, got {line[:40]!r}: mend it"
    )
  for field in fields:
    value = item.get(field)
    if not isinstance(value, str) or not value:
      raise UserError(
        f"{place}: {field!r} is {str(value)[:40]!r}, expected text; "
        f"items need {_names(fields)}: mend or drop the line"
      )
  return {field: item[field] for field in fields}


def _names(fields: Sequence[str]) -> str:
  return ", ".join(fields)
