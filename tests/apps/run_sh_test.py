"""run.sh and run_tests.sh in a copy of the checkout, with a stand-in for Python and pip."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

CHECKOUT = pathlib.Path(__file__).parents[2]

# Answers what setup_env.sh asks, logs what it is told to do, and as .venv's Python prints how
# run.sh called it.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *version_info*) exit ${FAKE_OLD:-0} ;;
  *ensurepip*) exit ${FAKE_NO_VENV:-0} ;;
  *difflib*) exec REAL_PYTHON "$@" ;;
  "-m venv "*) echo venv >> "$FAKE_LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip "*) echo pip >> "$FAKE_LOG"; exit ${FAKE_PIP:-0} ;;
  *) echo "$PWD|$PYTHONPATH|$JAX_PLATFORMS|$*" ;;
esac
"""


@pytest.fixture
def shell(tmp_path):
  root = tmp_path / "check out"
  for name in ("apps/list.py", "apps/reproduce.py", "projects/awq/main.py", "requirements.txt"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()
  for name in ("run.sh", "run_tests.sh", "setup_env.sh"):
    shutil.copy(CHECKOUT / name, root)
  bin_dir = tmp_path / "bin"
  bin_dir.mkdir()
  fake = bin_dir / "python3"
  fake.write_text(FAKE_PYTHON.replace("REAL_PYTHON", sys.executable))
  fake.chmod(0o755)
  for tool in ("bash", "cmp", "cp", "mv", "mkdir", "cat", "dirname", "basename"):
    (bin_dir / tool).symlink_to(shutil.which(tool))
  cwd = tmp_path / "cwd"
  cwd.mkdir()

  def run(script, *args, **env):
    env = {"PATH": str(bin_dir), "FAKE_LOG": str(tmp_path / "log"), **env}
    command = [os.path.relpath(root / script, cwd), *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

  run.root, run.cwd = root, cwd
  run.log = lambda: (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []
  return run


def test_a_paper_runs_in_the_users_folder_with_its_arguments(shell):
  code, out, _ = shell("run.sh", "awq", "--workdir=a b", "--config.bits=3")
  root, cwd = shell.root, shell.cwd
  assert (code, out) == (
    0,
    f"{cwd}|{root}||-P -m projects.awq.main --workdir=a b --config.bits=3\n",
  )
  _, out, _ = shell("run.sh", "list", PYTHONPATH="/mine")
  assert out == f"{cwd}|{root}:/mine||-P -m apps.list\n"


def test_the_environment_is_set_up_once_and_again_when_requirements_change(shell):
  _, _, err = shell("run.sh", "list")
  assert err.startswith("setting up .venv") and shell.log() == ["venv", "pip"]
  assert shell("run.sh", "list")[2] == "" and shell.log() == ["venv", "pip"]
  (shell.root / "requirements.txt").write_text("jax==0.10.2\n")
  shell("run_tests.sh")
  assert shell.log() == ["venv", "pip"] * 2


def test_a_failed_setup_is_one_error_and_is_redone(shell):
  code, out, err = shell("run.sh", "list", FAKE_PIP="1")
  assert code == 2 and out == "" and "error: installing requirements.txt failed" in err
  assert shell("run.sh", "list")[0] == 0 and shell.log() == ["venv", "pip"] * 2


@pytest.mark.parametrize(
  "env, message",
  [
    ({"FAKE_OLD": "1"}, "error: Python 3.11 or newer is needed"),
    ({"FAKE_NO_VENV": "1"}, "error: python3 lacks venv or pip"),
  ],
)
def test_an_unfit_python_is_one_line(shell, env, message):
  code, out, err = shell("run.sh", "list", **env)
  assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1
  assert not (shell.root / ".venv").exists()


@pytest.mark.parametrize(
  "name, message",
  [
    ("awk", "error: there is no paper or app 'awk'; did you mean awq? see ./run.sh list\n"),
    ("../x y", "error: there is no paper or app '../x y'; see ./run.sh list\n"),
    ("*", "error: there is no paper or app '*'; see ./run.sh list\n"),
  ],
)
def test_an_unknown_name_is_one_line_and_installs_nothing(shell, name, message):
  assert shell("run.sh", name) == (2, "", message)
  assert shell.log() == []


def test_usage(shell):
  code, out, err = shell("run.sh", "--help")
  assert code == 0 and out.startswith("usage: ./run.sh PAPER") and err == ""
  assert shell("run.sh") == (2, "", out)
  assert shell.log() == []


def test_the_tests_run_in_the_checkout_on_the_cpu(shell):
  code, out, _ = shell("run_tests.sh", "-k", "a b", JAX_PLATFORMS="tpu")
  assert (code, out) == (0, f"{shell.root}||cpu|-m pytest -k a b\n")
