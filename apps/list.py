"""usage: ./run.sh list

Lists the papers: slug, claims held in the committed default run, title, family.

A paper is a folder of projects/ with a main.py. Its README.md says what it is in two fixed lines,
the first and the third, the second of which splits at " · " with the family first:

    # AWQ: Activation-aware Weight Quantization

    **Family:** post-training quantization · MLSys 2024 · arXiv 2306.00978
"""

import dataclasses
import pathlib
import sys

from common import cli
from common.errors import UserError
from common.reporting.report import load_report

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Paper:
  slug: str
  title: str
  family: str
  source: str  # Venue and identifiers, as in the README.
  folder: pathlib.Path

  def status(self) -> str:
    """Claims held in results/default.json: "2/3", "–" without one, "?" if it is unreadable."""
    path = self.folder / "results" / "default.json"
    try:
      return load_report(path).claims_held if path.exists() else "–"
    except UserError:
      return "?"


def find_papers(root: pathlib.Path = ROOT) -> list[Paper]:
  """Returns the papers of a checkout, by slug."""
  return [_read(main.parent) for main in sorted((root / "projects").glob("*/main.py"))]


def _read(folder: pathlib.Path) -> Paper:
  readme = folder / "README.md"
  lines = readme.read_text(encoding="utf-8").splitlines() if readme.exists() else []
  title = lines[0].removeprefix("#").strip() if lines else ""
  family, _, source = (lines[2] if len(lines) > 2 else "").partition(" · ")
  label = "**Family:**"
  return Paper(
    slug=folder.name,
    title=title or folder.name,
    family=family.removeprefix(label).strip() if family.startswith(label) else "",
    source=source.strip() if family.startswith(label) else "",
    folder=folder,
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"list takes no argument, but got {argv[1]!r}")
  papers = find_papers()
  if not papers:
    print("no papers yet: projects/ is empty", file=sys.stderr)
  rows = [(p.slug, p.status(), p.title, p.family) for p in papers]
  widths = [max(map(len, column)) for column in zip(*rows)]
  for row in rows:
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
  cli.run_app(main)
