import signal
import textwrap

import pytest

from apps import reproduce
from apps.list import find_papers
from common.errors import UserError
from common.reporting.report import load_report

CONFIG = """
  from ml_collections import ConfigDict

  PRESETS = ("default", "tiny")


  def get_config(preset):
    return ConfigDict({"bits": 4, "seeds": (0, 1)})
"""
# A paper's binary as `reproduce` sees it, without JAX: quick, and each can fail in its own way.
MAIN = """
  import json
  import os
  import pathlib
  import sys

  preset = sys.argv[1].rpartition(":")[2]
  workdir = pathlib.Path(sys.argv[2].removeprefix("--workdir="))
  claim = {{"statement": "c", "measured": [1.0], "relation": "<", "threshold": 2.0, "holds": True}}
  report = {{"project": "p", "preset": preset, "tables": [], "figures": [], "claims": [claim],
    "environment": {{}}, "seconds": 1.0, "config": {{"bits": 4, "seeds": [0, 1]}}}}
  with open(workdir / "started", "a") as f:
    f.write("x")
  {body}
  (workdir / "report.json").write_text(json.dumps(report))
"""
BODIES = {
  "good": "pass",
  "error": "sys.exit('error: no such model')",
  "killed": "os.kill(os.getpid(), 9)",
  "silent": "sys.exit(0)",
}


@pytest.fixture
def root(tmp_path):
  for slug, body in BODIES.items():
    folder = tmp_path / "projects" / slug
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(textwrap.dedent(MAIN.format(body=body)))
    (folder / "config.py").write_text(textwrap.dedent(CONFIG))
  return tmp_path


@pytest.fixture
def papers(root):
  return {paper.slug: paper for paper in find_papers(root)}


def test_every_paper_runs_though_some_fail(papers, tmp_path, capsys):
  runs = {r.slug: r for r in reproduce.reproduce([*papers.values()], "tiny", tmp_path / "out")}
  assert list(runs) == sorted(BODIES)
  assert runs["good"].report.claims_held == "1/1" and runs["good"].error == ""
  assert runs["error"].error == "exit code 1: error: no such model"
  assert runs["error"].log_tail == "error: no such model"
  assert runs["killed"].error == f"killed by signal {signal.SIGKILL:d}: no output"
  assert "cannot read the report" in runs["silent"].error
  lines = capsys.readouterr().err.splitlines()
  assert [line.split(":")[0] for line in lines if line] == [
    "✗ error",
    "✓ good",
    "✗ killed",
    "✗ silent",
  ]


def test_without_keep_going_the_first_failure_is_the_last_run(papers, tmp_path):
  chosen = [papers["good"], papers["error"], papers["killed"]]
  runs = reproduce.reproduce(chosen, "tiny", tmp_path / "out", keep_going=False)
  assert [run.slug for run in runs] == ["good", "error"]


def test_a_finished_paper_is_not_run_again_unless_its_config_changed(papers, root, tmp_path):
  out = tmp_path / "out"
  starts = []

  def go(preset="tiny", **kwargs):
    reproduce.reproduce([papers["good"]], preset, out, **kwargs)
    starts.append(len((out / "good" / "started").read_text()))

  go()
  go()
  go(force=True)
  go(preset="default")
  config = root / "projects" / "good" / "config.py"
  config.write_text(config.read_text().replace('"bits": 4', '"bits": 33'))
  go(preset="default")
  assert starts == [1, 1, 2, 3, 4]


def test_a_failed_run_does_not_show_an_earlier_report(papers, root, tmp_path):
  out = tmp_path / "out"
  reproduce.reproduce([papers["good"]], "tiny", out)
  main = root / "projects" / "good" / "main.py"
  main.write_text(main.read_text().replace("\npass", "\nsys.exit(3)"))
  (run,) = reproduce.reproduce([papers["good"]], "tiny", out, force=True)
  assert run.report is None and run.error.startswith("exit code 3")
  with pytest.raises(UserError):
    load_report(out / "good" / "report.json")


def test_choosing_papers(papers):
  everything = [*papers.values()]
  assert reproduce.choose(everything, []) == everything
  assert reproduce.choose(everything, ["silent", "good", "silent"]) == [
    papers["silent"],
    papers["good"],
  ]
  with pytest.raises(UserError, match="no paper 'god'; did you mean good?"):
    reproduce.choose(everything, ["god"])
  with pytest.raises(UserError, match="no papers"):
    reproduce.choose([], [])


@pytest.mark.parametrize("slugs, code", [(["good"], 0), (["good", "error"], 1)])
def test_main_writes_the_page_and_tells_failure_by_its_exit_code(
  papers, tmp_path, monkeypatch, slugs, code
):
  out = tmp_path / "out"
  monkeypatch.setattr(reproduce, "find_papers", lambda: [*papers.values()])
  flags = {"_PRESET": "tiny", "_WORKDIR": str(out), "_FORCE": False, "_KEEP_GOING": True}
  for name, value in flags.items():
    monkeypatch.setattr(reproduce, name, type("Flag", (), {"value": value}))
  assert reproduce.main(["reproduce", *slugs]) == code
  page = (out / "index.html").read_text()
  assert all(f'id="{slug}"' in page for slug in slugs)
  assert ("error: no such model" in page) == (code == 1)


def test_an_interrupt_ends_the_paper_that_runs(papers, tmp_path, monkeypatch):
  started = []

  class Popen:
    def __init__(self, *args, **kwargs):
      self.calls = []
      started.append(self)

    def wait(self):
      self.calls.append("wait")
      if self.calls == ["wait"]:
        raise KeyboardInterrupt

    def terminate(self):
      self.calls.append("terminate")

  monkeypatch.setattr(reproduce.subprocess, "Popen", Popen)
  with pytest.raises(KeyboardInterrupt):
    reproduce.reproduce([papers["good"]], "tiny", tmp_path / "out")
  assert started[0].calls == ["wait", "terminate", "wait"]
