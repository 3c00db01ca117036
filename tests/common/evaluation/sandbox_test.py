"""What a program can do in the sandbox, and what it cannot."""

import errno
import math
import os
import pathlib
import secrets
import socket
import sys
import tempfile
import time

import pytest

from common.errors import UserError
from common.evaluation import sandbox
from common.evaluation.sandbox import isolation_problem


def run(program, timeout=10.0, **options):
  """In namespaces where they are to be had, or else under limits alone."""
  isolate = isolation_problem() is None
  try:
    return sandbox.run_program(program, timeout=timeout, isolate=isolate, **options)
  except UserError as e:
    if not isolate and "cannot start" in str(e):  # As nobody, from a folder of root's alone.
      pytest.skip(str(e))
    raise


@pytest.fixture
def isolated():
  if problem := isolation_problem():
    pytest.skip(f"no namespaces: {problem}")


def named(name):
  """Processes of that name, a moment later."""
  for _ in range(100):
    found = []
    for comm in pathlib.Path("/proc").glob("[0-9]*/comm"):
      try:
        found += [comm] if comm.read_text().strip() == name else []
      except OSError:
        pass
    if not found:
      return []
    time.sleep(0.02)
  return found


def rename(name):
  """Source that names the process, and those it forks."""
  return f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


@pytest.mark.parametrize(
  "program, reason, detail",
  [
    ("", "", ""),
    ("import math, sys, typing, re, collections\nassert math.pi > 3", "", ""),
    ("import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: int\nassert A(1) == A(1)", "", ""),
    ("print('ü' * 20_000_000)", "", ""),
    ("import sys\nassert sys.stdin.read() == ''", "", ""),
    ("import os\nos.lseek(0, 0, 0)\nassert os.read(0, 99) == b''", "", ""),
    ("import os\nos.mkdir('a')\nopen('a/b', 'w').write('c')\nos.chmod('a', 0)", "", ""),
    ("if __name__ == '__main__': assert 0", "", ""),
    ("assert 1 == 2, 'numbers'", "wrong", "AssertionError: numbers"),
    ("def f(:", "error", "SyntaxError: "),
    ("x = '\0'", "error", ""),
    ("{}['a']", "error", "KeyError: 'a'"),
    ("def f(): f()\nf()", "error", "RecursionError: "),
    ("input()", "error", "EOFError: "),
    ("import numpy", "error", "ModuleNotFoundError: "),
    ("import common", "error", "ModuleNotFoundError: "),
    ("class E(Exception):\n  def __str__(self): return 1 / 0\nraise E", "error", ""),
    ("open('a', 'wb').write(bytes(2**25))", "error", "OSError: "),
    ("import os\nfor _ in range(99): os.dup(0)",
     "error", "OSError: "),
    ("x = bytearray(2**31)", "out of memory", "MemoryError: "),
    ("x = []\nwhile True: x.append(bytearray(2**24))", "out of memory", "MemoryError: "),
  ],
)  # fmt: skip
def test_ends(program, reason, detail):
  outcome = run(program, memory_bytes=2**28)
  assert (outcome.passed, outcome.reason) == (not reason, reason), outcome
  assert outcome.detail.startswith(detail)


@pytest.mark.parametrize(
  "program",
  [
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import os; os._exit(0)",
    "import os; os.kill(os.getpid(), 9)",
    "import os; os.abort()",
    "import os\nif os.fork(): os._exit(0)",
    "import atexit, os\natexit.register(os._exit, 0)\nassert 0",
    "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\nassert 0",
    "import sys\nsys.stdout.close(); sys.stderr.close(); sys.exit()",
    "import os\nos.closerange(0, 64); os._exit(0)",
    "import os\nfor i in range(3, 64):\n  try: os.write(i, b'passed')\n  except OSError: pass\n"
    "os._exit(0)",
    "import os\nos.execv('/bin/true', ['true'])",
    "import os, signal\nos.kill(os.getppid(), signal.SIGINT); os._exit(0)",
    "import threading, os\nthreading.Timer(0, lambda: os._exit(0)).start()\nimport time; time.sleep(9)",
    "def check(f):\n  try: f()\n  except BaseException: raise\ncheck(lambda: exec('raise SystemExit(0)'))",
  ],
)  # fmt: skip
def test_an_early_end_is_no_pass(program):
  outcome = run(program)
  assert not outcome.passed and outcome.reason in sandbox.REASONS, outcome


def test_forks_and_threads_of_an_honest_program():
  assert run("import os\nif not os.fork(): assert 0").passed
  assert run("import os\npid = os.fork()\nif not pid: os._exit(3)\nos.waitpid(pid, 0)").passed
  sleeper = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
  assert run(sleeper).passed


@pytest.mark.parametrize(
  "program",
  [
    "while True: pass",
    "while True: print('x' * 10_000)",
    "import time\nwhile True:\n  try: time.sleep(60)\n  except BaseException: pass",
    "import signal\nfor s in (2, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
  ],
)
def test_time_is_limited(program):
  start = time.monotonic()
  outcome = run(program, timeout=0.3)
  assert outcome == (False, "timed out", "")
  assert time.monotonic() - start < 8


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("late", [False, True])
def test_a_fork_bomb_stays_inside(late):
  name = secrets.token_hex(6)
  bomb = """
pids = []
try:
  for _ in range(200):
    pids.append(os.fork())
    if not pids[-1]: time.sleep(60)
except OSError: pass
assert len(pids) < 64
"""
  outcome = run(
    rename(name) + bomb + ("time.sleep(60)" if late else ""), timeout=0.5 if late else 10
  )
  assert outcome.reason == ("timed out" if late else "")
  assert not named(name)


@pytest.mark.parametrize("late", [False, True])
def test_no_session_escapes(isolated, late):
  name = secrets.token_hex(6)
  escape = "if not os.fork():\n  os.setsid()\n  if not os.fork(): time.sleep(60)\n  os._exit(0)\n"
  outcome = run(
    rename(name) + escape + ("time.sleep(60)" if late else "os.wait()"), timeout=0.5 if late else 10
  )
  assert outcome.reason == ("timed out" if late else "")
  assert not named(name)


def test_the_environment_is_not_passed_on(monkeypatch):
  monkeypatch.setenv("SECRET", "1234")
  outcome = run("import os\nassert set(os.environ) <= {'LC_CTYPE'}, set(os.environ)")
  assert outcome.passed or sys.platform == "darwin", outcome
  assert run("import os\nassert 'SECRET' not in os.environ and 'HOME' not in os.environ").passed


def test_its_folder_goes(monkeypatch, tmp_path):
  tmp_path.chmod(0o755)
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  program = "import os\nopen('a', 'w').write('b')\nos.mkdir('c')\nopen('c/d', 'w')\n"
  assert run(program + "os.chmod('c', 0)\nos.chmod('.', 0)" * (os.geteuid() != 0)).reason == ""
  assert list(tmp_path.iterdir()) == []


def test_the_machine_is_out_of_sight(isolated, tmp_path):
  here = pathlib.Path(__file__).resolve()
  (tmp_path / "file").write_text("secret")
  (tmp_path / "file").chmod(0o666)
  program = f"""
import os
for path in {str(here)!r}, {str(tmp_path / "file")!r}, "/etc/passwd", "/proc/1/environ", "/dev/null":
  assert not os.path.exists(path), path
assert os.listdir() == []
def refused(function, *args):
  try: function(*args)
  except OSError as e: return True
for folder in "/", "/usr", os.path.dirname(os.__file__), {str(here.parent)!r}:
  assert refused(open, folder + "/planted", "w"), folder
  assert not os.path.exists(folder) or os.statvfs(folder).f_flag & os.ST_RDONLY, folder
assert refused(os.chroot, ".") and refused(os.setuid, 1)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(None, b"/usr", None, 32 | 4096, None) == -1  # Not to be made writable.
if libc.unshare(0x10000000 | 0x20000) == 0:  # Nor in namespaces of its own.
  assert libc.mount(None, b"/usr", None, 32 | 4096, None) == -1
  assert refused(open, "/usr/planted", "w")
"""
  assert run(program) == (True, "", "")
  assert not pathlib.Path("/usr/planted").exists() and not (here.parent / "planted").exists()


def test_there_is_no_network(isolated):
  with socket.create_server(("127.0.0.1", 0)) as server:
    program = (
      f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
    )
    outcome = run(program)
  assert outcome.reason == "error" and f"[Errno {errno.ENETUNREACH}]" in outcome.detail, outcome


def test_without_namespaces(monkeypatch):
  monkeypatch.setattr(sandbox, "isolation_problem", lambda: "no reason")
  monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("it ran"))
  with pytest.raises(UserError, match=r"\(no reason\).*isolate=False"):
    sandbox.run_program("")


def test_a_missing_command_is_found_out(monkeypatch):
  monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
  assert "unshare" in isolation_problem.__wrapped__()
  monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/bin/false")
  assert "cannot start" in isolation_problem.__wrapped__()


@pytest.mark.parametrize(
  "options", [{"timeout": 0}, {"timeout": math.nan}, {"timeout": math.inf}, {"memory_bytes": 9}]
)
def test_impossible_limits(options):
  with pytest.raises(UserError, match="expected a time above 0 s"):
    sandbox.run_program("", **options)


def test_limits_alone():
  try:
    assert sandbox.run_program("", isolate=False).passed
  except UserError as e:
    pytest.skip(str(e))
  assert sandbox.run_program("assert 0", isolate=False).reason == "wrong"
  assert sandbox.run_program("import os; os._exit(0)", isolate=False).reason == "exited early"
  assert sandbox.run_program("while 1: 0", timeout=0.3, isolate=False).reason == "timed out"
  escape = "import os\nos.setsid()\nwhile 1: 0"
  assert sandbox.run_program(escape, timeout=0.3, isolate=False).reason == "timed out"
