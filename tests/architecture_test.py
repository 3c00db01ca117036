"""The rules of the house, read from the sources."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What the code of each folder may import, itself aside.
ALLOWED = {
  "kernels": set(),
  "common": {"kernels"},
  "projects": {"kernels", "common"},
  "apps": {"kernels", "common", "projects"},
}
FOLDERS = {*ALLOWED, "benchmarks", "tests"}
SOURCES = [p for folder in ALLOWED for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of the modules that a file imports, wherever in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative imports hide where a name comes from"
      found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_source_file_keeps_the_rules(path):
  folder, *rest = path.relative_to(ROOT).parts
  for name in imports(path):
    top, _, below = name.partition(".")
    if top in FOLDERS - {folder}:
      assert top in ALLOWED[folder], f"{folder} must not import {name}"
    if folder == top == "projects" and below:
      assert below.split(".")[0] == rest[0], f"a project must not import {name}"
  assert path.name != "utils.py"
  assert len(path.read_text().splitlines()) <= 500, "two subjects?"


def test_the_rules_are_about_something():
  assert len(SOURCES) > 40
  assert "common.errors" in imports(ROOT / "common" / "cli.py")


@pytest.mark.parametrize("main", sorted((ROOT / "projects").glob("*/main.py")), ids=str)
def test_a_project_is_complete(main):
  slug = main.parent.name
  for name in ("README.md", "config.py", "experiment.py", "results/default.json"):
    assert (main.parent / name).is_file(), f"{slug} lacks {name}"
  assert (ROOT / "tests" / "projects" / f"{slug}_test.py").is_file()
