"""Benchmarks from JSON lines: WikiMIA's, BookMIA's, and dated documents of one's own."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from projects.min_k_prob.benchmark import Benchmark, Document

# The lengths of WikiMIA in words.
LENGTHS = (32, 64, 128, 256)
_LAYOUTS = (("input", "label"), ("snippet", "label", "book"), ("text", "date"))


def read_jsonl(source: str) -> list[dict]:
  """Records of `file:PATH`, all of one of the layouts {"input", "label"} (WikiMIA), {"snippet",
  "label", "book"} (BookMIA) and {"text", "date"}.

  Raises:
    UserError: no such scheme or file; a line that is not JSON or lacks a field, or whose label is
      not 0 or 1.
  """
  scheme, _, name = source.partition(":")
  if scheme != "file" or not name:
    raise UserError(f"data={source!r}: expected file:PATH of JSON lines")
  path = pathlib.Path(name).expanduser()
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as e:
    reason = getattr(e, "strerror", None) or e
    raise UserError(f"cannot read {path}: {reason}; expected a file of JSON lines") from None
  records = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      records.append(_record(line, f"{path}:{number}"))
      if records[-1].keys() != records[0].keys():
        raise UserError(f"{path}:{number}: has other fields than the first line: mend it")
  if not records:
    raise UserError(f"{path} is empty: expected {_expected()}")
  return records


def _record(line: str, place: str) -> dict:
  try:
    record = json.loads(line)
  except ValueError as e:
    raise UserError(f"{place}: not JSON ({e}): mend or drop the line") from None
  fields = record if isinstance(record, dict) else {}
  layout = next((layout for layout in _LAYOUTS if all(f in fields for f in layout)), None)
  if layout is None:
    raise UserError(f"{place}: has {', '.join(fields) or 'no fields'}; expected {_expected()}")
  text = record[layout[0]]
  if not isinstance(text, str) or not text.strip():
    raise UserError(f"{place}: {layout[0]!r} is {str(text)[:40]!r}, expected text: drop the line")
  if "label" in layout and record["label"] not in (0, 1):
    raise UserError(
      f"{place}: 'label' is {record['label']!r}, expected 1 (member) or 0 (not): mend it"
    )
  return {field: record[field] for field in layout}


def _expected() -> str:
  return " or ".join("{" + ", ".join(layout) + "}" for layout in _LAYOUTS)


def labelled(records: Sequence[dict]) -> Benchmark:
  """Texts of any length from WikiMIA's or BookMIA's records; repeated texts are kept once."""
  field = "input" if "input" in records[0] else "snippet"
  distinct = {record[field]: record for record in records}
  names = [str(r.get("book", i)) for i, r in enumerate(distinct.values())]
  members = np.array([bool(r["label"]) for r in distinct.values()])
  return Benchmark(list(distinct), members, names)


def dated(records: Sequence[dict]) -> list[Document]:
  """Documents of {"text", "date"} records, for `benchmark.split_by_date`."""
  return [{"name": str(i)} | record for i, record in enumerate(records)]


def by_length(benchmark: Benchmark) -> dict[int, Benchmark]:
  """The benchmark by the largest of LENGTHS that a text has in words, ascending.

  Scores do not compare between lengths. Texts below the shortest length are one group, under 0.
  """
  words = np.array([len(text.split()) for text in benchmark.texts])
  place = np.searchsorted(LENGTHS, words, side="right")
  lengths = np.array([0, *LENGTHS])[place]
  return {int(n): benchmark.select(lengths == n) for n in np.unique(lengths)}
