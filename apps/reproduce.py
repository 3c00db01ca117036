"""usage: ./run.sh reproduce [SLUG ...] [flags]

Runs papers one after the other (all by default) and writes one HTML page with every claim, table
and plot. Each run's report, figures and log.txt go to WORKDIR/SLUG. A paper whose report there was
made with the same config is not run again.

  --preset=NAME     preset of every paper (default: default)
  --workdir=DIR     where the results go (default: runs/reproduce in the checkout)
  --force           run again what is finished
  --nokeep_going    stop at the first run that fails

Exit code: 0 if every run finished (its claims may fail), 1 if a run failed, 2 for a bad argument.
"""

import dataclasses
import datetime
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from apps.list import ROOT, Paper, find_papers
from common import cli
from common.errors import UserError
from common.reporting.html import Run, write_page
from common.reporting.report import Report, load_report, plain_json

_PRESET = flags.DEFINE_string("preset", "default", "preset of every paper")
_WORKDIR = flags.DEFINE_string("workdir", None, "where the results go")
_FORCE = flags.DEFINE_bool("force", False, "run again what is finished")
_KEEP_GOING = flags.DEFINE_bool("keep_going", True, "go on after a run that fails")

_LOG_LINES = 30


def choose(papers: Sequence[Paper], slugs: Sequence[str]) -> list[Paper]:
  """Returns the papers named, all if none is.

  Raises:
    UserError: there is no such paper, or there are none at all.
  """
  known = {paper.slug: paper for paper in papers}
  if not known:
    raise UserError("there are no papers: projects/ is empty")
  for slug in slugs:
    if slug not in known:
      raise UserError(f"there is no paper {slug!r}; {cli.closest(slug, known)}")
  return [known[slug] for slug in dict.fromkeys(slugs)] or list(papers)


def finished_report(paper: Paper, preset: str, workdir: pathlib.Path) -> Report | None:
  """Returns the report in `workdir` if the preset as it is now would give the same config."""
  try:
    report = load_report(workdir / "report.json")
    config = cli.get_config(cli.load_config_module(paper.folder / "config.py"), preset)
  except UserError:
    return None
  same = report.preset == preset and report.config == plain_json(config.to_dict())
  return report if same else None


def run_paper(paper: Paper, preset: str, workdir: pathlib.Path) -> Run:
  """Runs a paper's binary in its own process, its output in WORKDIR/log.txt.

  Raises:
    UserError: the workdir cannot be written.
  """
  root = paper.folder.parents[1]
  command = [sys.executable, "-P", "-m", f"projects.{paper.slug}.main"]
  command += [f"--config={paper.folder / 'config.py'}:{preset}", f"--workdir={workdir}"]
  path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
  log = workdir / "log.txt"
  with cli.writable_folder(workdir):
    # An earlier report would pass for the result of this run if it failed.
    (workdir / "report.json").unlink(missing_ok=True)
    with log.open("wb") as out:
      process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
      )
      try:
        code = process.wait()
      except BaseException:
        process.terminate()
        process.wait()
        raise
  run = Run(paper.slug, paper.title, paper.family, workdir)
  if code == 0:
    try:
      return dataclasses.replace(run, report=load_report(workdir / "report.json"))
    except UserError as e:
      return dataclasses.replace(run, error=str(e))
  text = log.read_text(encoding="utf-8", errors="replace")
  lines = [line.rstrip() for line in text.splitlines() if line.strip()]
  what = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
  return dataclasses.replace(
    run,
    error=f"{what}: {lines[-1] if lines else 'no output'}",
    log_tail="\n".join(lines[-_LOG_LINES:]),
  )


def reproduce(
  papers: Sequence[Paper],
  preset: str,
  workdir: pathlib.Path,
  *,
  force: bool = False,
  keep_going: bool = True,
) -> list[Run]:
  """Runs the papers, shows progress, and returns what became of each one reached."""
  from rich.console import Console
  from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

  columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
  columns.append(TextColumn("{task.fields[eta]}", markup=False))
  # As wide as needed off a terminal: a log line is never folded.
  console = Console(stderr=True, highlight=False, soft_wrap=True)
  runs = []
  with Progress(*columns, console=console, transient=True) as progress:
    whole = progress.add_task("", eta="")
    for i, paper in enumerate(papers):
      left = sum(_last_seconds(p) for p in papers[i:])
      progress.update(whole, description=f"{i}/{len(papers)} papers", eta=_eta(left, "left"))
      task = progress.add_task(paper.slug, eta=_eta(_last_seconds(paper), "in all"))
      folder = workdir / paper.slug
      start = time.perf_counter()
      report = None if force else finished_report(paper, preset, folder)
      if report:
        run, took = Run(paper.slug, paper.title, paper.family, folder, report), "finished before"
      else:
        run = run_paper(paper, preset, folder)
        took = f"{time.perf_counter() - start:.0f} s"
      progress.remove_task(task)
      runs.append(run)
      mark, what = "✗", run.error
      if run.report:
        mark, what = "✓", f"{run.report.claims_held} claims held"
      progress.console.print(f"{mark} {paper.slug}: {what} ({took})", markup=False)
      if run.report is None and not keep_going:
        break
  return runs


def main(argv: list[str]) -> int:
  papers = choose(find_papers(), argv[1:])
  workdir = pathlib.Path(_WORKDIR.value or ROOT / "runs" / "reproduce").absolute()
  with cli.writable_folder(workdir):
    runs = reproduce(
      papers, _PRESET.value, workdir, force=_FORCE.value, keep_going=_KEEP_GOING.value
    )
    write_page(runs, workdir / "index.html")
  print(f"written to {workdir / 'index.html'}")
  return int(any(run.report is None for run in runs))


def _last_seconds(paper: Paper) -> float:
  """How long the committed default run took, 0 if there is none."""
  try:
    return load_report(paper.folder / "results" / "default.json").seconds
  except UserError:
    return 0.0


def _eta(seconds: float, what: str) -> str:
  return f"about {datetime.timedelta(seconds=round(seconds))} {what}" if seconds else ""


if __name__ == "__main__":
  cli.run_app(main)
