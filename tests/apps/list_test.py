import json
import subprocess
import sys

from apps import list as listing
from common.reporting.report import Claim, Report

README = (
  "# AWQ: Activation-aware\n\n**Family:** quantization · MLSys 2024 · arXiv 2306.00978\n\nText"
)


def _paper(root, slug, readme=None, result=None):
  folder = root / "projects" / slug
  (folder / "results").mkdir(parents=True)
  (folder / "main.py").touch()
  if readme is not None:
    (folder / "README.md").write_text(readme)
  if result is not None:
    (folder / "results" / "default.json").write_text(result)


def test_papers_are_read_from_their_readmes(tmp_path):
  _paper(tmp_path, "zz", "")
  _paper(tmp_path, "awq", README)
  _paper(tmp_path, "bare")
  _paper(tmp_path, "prose", "# Prose\n\nNo family here · or there")
  (tmp_path / "projects" / "__pycache__").mkdir()
  papers = {p.slug: (p.title, p.family, p.source) for p in listing.find_papers(tmp_path)}
  assert papers == {
    "awq": ("AWQ: Activation-aware", "quantization", "MLSys 2024 · arXiv 2306.00978"),
    "bare": ("bare", "", ""),
    "prose": ("Prose", "", ""),
    "zz": ("zz", "", ""),
  }
  assert list(papers) == sorted(papers)


def test_without_projects_there_are_no_papers(tmp_path):
  assert listing.find_papers(tmp_path) == []


def test_the_status_is_that_of_the_committed_run(tmp_path):
  report = Report(claims=[Claim.less("a", [1], 2), Claim.less("b", [3], 2)])
  _paper(tmp_path, "done", result=json.dumps(report.to_json()))
  _paper(tmp_path, "never")
  _paper(tmp_path, "torn", result='{"claims": [')
  status = {p.slug: p.status() for p in listing.find_papers(tmp_path)}
  assert status == {"done": "1/2", "never": "–", "torn": "?"}


def test_one_aligned_line_per_paper(tmp_path, monkeypatch, capsys):
  _paper(tmp_path, "awq", README)
  _paper(tmp_path, "longer_slug")
  papers = listing.find_papers(tmp_path)
  monkeypatch.setattr(listing, "find_papers", lambda: papers)
  listing.main(["list"])
  assert capsys.readouterr().out.splitlines() == [
    "awq          –  AWQ: Activation-aware  quantization",
    "longer_slug  –  longer_slug",
  ]


def test_the_command_takes_no_argument():
  command = [sys.executable, "-m", "apps.list", "awq"]
  done = subprocess.run(command, cwd=listing.ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (2, "error: list takes no argument, but got 'awq'\n")
