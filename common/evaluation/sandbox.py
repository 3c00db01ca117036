"""Runs a Python program that nobody has read, such as one that a model wrote.

The program runs in a fresh interpreter (standard library only) with an empty environment, an empty
folder to work in, no input, discarded output, and limits on time, on its processes (64), on the
memory of each, on open files and the size of files. On Linux, namespaces (by the command `unshare`)
keep it from everything else: it sees no other process, has no network, sees of the file system the
interpreter and the system's libraries, read-only, and cannot gain privileges. Its folder (64 MiB,
in memory) and every process that it started vanish when it ends.

Where namespaces are not to be had (macOS, most containers), a program runs only with
`isolate=False`, which asks for the limits alone: it can then read and write what you can (what the
user nobody can, when you are root), use the network, and leave files behind, and processes that
called `setsid`. Do that only on a machine that you can throw away.

"Passed" means that the last line was reached: the interpreter then writes a random word, unknown
beforehand, to a file. Exit code 0 counts for nothing, so a program that exits early, kills itself
or lets a fork go on in its place has failed. This guards against programs that go wrong and that
end early on purpose. Test and tested code share an interpreter, so it does not guard against a
program written to cheat: one that finds the word in the frames above it, or returns objects that
equal everything. Nor is it a virtual machine: a hole in the kernel is a hole in it.
"""

import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

from common.errors import UserError

REASONS = ("wrong", "error", "timed out", "out of memory", "exited early")

_NOBODY = 65534
_GRACE = 60.0  # Seconds to start and to end.

# The first process: it lays out the file system, starts the program, waits for it, and says on
# stderr how it ended. In a PID namespace every other process dies with this one.
_KEEPER = """
import ctypes, json, os, resource, signal, sys

isolate, uid, root, visible, timeout, memory, command = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True) if isolate else None

def call(name, *args):
  convert = {str: os.fsencode, int: ctypes.c_long}
  if getattr(libc, name)(*(convert.get(type(a), lambda a: a)(a) for a in args)) != 0:
    raise OSError(ctypes.get_errno(), name + ": " + os.strerror(ctypes.get_errno()))

def enter_new_root():
  nosuid_nodev, bind_all, recursive, detach = 2 | 4, 4096 | 16384, 0x8000, 2
  call("mount", "none", root, "tmpfs", nosuid_nodev, "size=1m,mode=755")
  os.makedirs(root + "/sandbox")
  for path in visible:
    os.makedirs(root + path, exist_ok=True)
    call("mount", path, root + path, None, bind_all, None)
  read_only = (ctypes.c_uint64 * 4)(1 | nosuid_nodev)
  call("syscall", 442, -100, root, recursive, read_only, 32)  # mount_setattr
  call("mount", "none", root + "/sandbox", "tmpfs", nosuid_nodev, "size=64m,mode=1777")
  os.chdir(root)
  call("pivot_root", ".", ".")
  call("umount2", ".", detach)
  os.chdir("/sandbox")

def confine():
  limits = dict(AS=memory, CPU=int(timeout) + 2, FSIZE=2**24, NOFILE=64, NPROC=64, CORE=0)
  for name, limit in limits.items():
    name = getattr(resource, "RLIMIT_" + name)
    most = resource.getrlimit(name)[1]
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    try:
      resource.setrlimit(name, (limit, limit))
    except (ValueError, OSError):
      if isolate:  # Some systems know no such limit.
        raise
  if isolate:
    for capability in range(64):
      libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: none is left after exec.
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
  if uid:
    os.setgroups([])
    try:
      os.setgid(uid)
      os.setuid(uid)
    except OSError:  # Not every uid exists in a container.
      os.setgid(65534)
      os.setuid(65534)

def end_program(*_):
  os.write(2, b"late\\n")
  os.kill(program, signal.SIGKILL)

os.umask(0o022)
enter_new_root() if isolate else os.chdir(root)
program = os.fork()
if program == 0:
  confine()
  os.execv(command[0], command)
signal.signal(signal.SIGALRM, end_program)
signal.setitimer(signal.ITIMER_REAL, timeout)
ended = None
while ended != program:
  ended, status = os.wait()
signal.setitimer(signal.ITIMER_REAL, 0)
os.write(2, b"ended %d\\n" % os.waitstatus_to_exitcode(status))
if not isolate:
  os.killpg(0, signal.SIGKILL)
"""

# The second process: its input is the word and the program; it inherits /dev/null as stdout.
_RUNNER = """
import os, sys, types

def run(report, write=os.write, leave=os._exit, getpid=os.getpid):
  word, _, program = sys.stdin.buffer.read().partition(b"\\n")
  os.set_inheritable(report, False)
  write(2, b"ready\\n")
  os.dup2(1, 0)
  os.dup2(1, 2)
  pid, module = getpid(), types.ModuleType("program")
  sys.modules["program"] = module
  try:
    exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
  except BaseException as e:
    e.__traceback__ = None  # Frees the memory that its frames hold.
    kinds = {AssertionError: b"wrong", MemoryError: b"out of memory", SystemExit: b"exited early"}
    word = next((name for kind, name in kinds.items() if isinstance(e, kind)), b"error")
    if getpid() == pid:
      write(report, word + b"\\n")
      write(report, f"{type(e).__name__}: {e}"[:200].encode(errors="replace"))
    leave(1)
  if getpid() == pid:  # A fork speaks for nobody.
    write(report, word)
  leave(0)

run(int(sys.argv.pop()))
"""


class Outcome(NamedTuple):
  """How a program ended.

  Attributes:
    passed: its last line was reached.
    reason: one of `REASONS` when it failed ("wrong" is an AssertionError), or "".
    detail: the exception, exit code or signal. The program has a say in it.
  """

  passed: bool
  reason: str = ""
  detail: str = ""


def run_program(
  program: str, *, timeout: float = 10.0, memory_bytes: int = 2**30, isolate: bool = True
) -> Outcome:
  """Runs a program to its end or its limits; see the head of this file for what keeps it in.

  Args:
    program: source code.
    timeout: seconds on the clock.
    memory_bytes: address space of each of its processes (at most 64).
    isolate: keep it in namespaces of its own. False asks for the limits alone.

  Raises:
    UserError: this machine cannot isolate programs, or not start them at all.
  """
  if not 0 < timeout < math.inf or memory_bytes < 2**26:
    raise UserError(
      f"timeout={timeout}, memory_bytes={memory_bytes}: expected a time above 0 s and at least 64 MiB"
    )
  if isolate:
    require_isolation()
  return _run(program, timeout, memory_bytes, isolate)


def require_isolation() -> None:
  """Raises a UserError when this machine cannot isolate programs."""
  if problem := isolation_problem():
    raise UserError(
      f"programs cannot be isolated on this machine ({problem}): use Linux where namespaces are "
      "allowed; or pass isolate=False on a machine that you can throw away, such as a container"
    )


@functools.cache
def isolation_problem() -> str | None:
  """Why this machine cannot isolate programs, or None when it can."""
  if sys.platform != "linux" or not shutil.which("unshare"):
    return "it is not Linux, or has no command `unshare`"
  try:
    outcome = _run("", 30.0, 2**30, isolate=True)
  except UserError as e:
    return str(e)
  return None if outcome.passed else f"an empty program ended so: {outcome}"


def _run(program: str, timeout: float, memory_bytes: int, isolate: bool) -> Outcome:
  python, word = os.path.realpath(sys._base_executable), secrets.token_hex(16).encode()
  root_user, uid = os.geteuid() == 0, 0
  if root_user:  # A uid of its own, as the number of processes is counted by uid.
    uid = 2**30 + secrets.randbelow(2**30) if isolate else _NOBODY
  system = ("/usr", "/bin", "/lib", "/lib64", "/nix/store", os.path.realpath(sys.base_prefix))
  command = [python, "-I", "-S", "-c"]
  launcher = []
  if isolate:
    launcher = [shutil.which("unshare"), "--mount", "--pid", "--fork", "--kill-child", "--net"]
    launcher += ["--ipc", "--uts"] + ([] if root_user else ["--user", "--map-root-user"])
  with (
    tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    tempfile.TemporaryFile() as source,
    tempfile.TemporaryFile() as report,
    tempfile.TemporaryFile() as log,
  ):
    if uid and not isolate:
      os.chown(folder, uid, uid)
    source.write(word + b"\n" + program.encode(errors="replace"))
    source.seek(0)
    visible = [path for path in system if os.path.isdir(path)]
    runner = [*command, _RUNNER, str(report.fileno())]
    settings = [isolate, uid, os.path.realpath(folder), visible, timeout, memory_bytes, runner]
    process = subprocess.Popen(
      [*launcher, *command, _KEEPER, json.dumps(settings)],
      stdin=source,
      stdout=subprocess.DEVNULL,
      stderr=log,
      pass_fds=[report.fileno()],
      env={},
      cwd="/",
      start_new_session=True,
    )
    try:
      process.wait(timeout + _GRACE)  # The keeper keeps the time; this is for when it cannot.
    except subprocess.TimeoutExpired:
      pass
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said, lines = (os.pread(f.fileno(), 2**16, 0).decode(errors="replace") for f in (report, log))
  return _judge(said, lines.splitlines(), word.decode())


def _judge(said: str, log: list[str], word: str) -> Outcome:
  """Judges by what the runner reported and the keeper logged."""
  if "ready" not in log:
    errors = [line for line in log if not line.startswith(("late", "ended "))]
    raise UserError(f"cannot start {sys._base_executable}: {errors[-1] if errors else 'too slow'}")
  code = next((int(line.split()[1]) for line in log if line.startswith("ended ")), None)
  if "late" in log or code == -signal.SIGXCPU:
    return Outcome(False, "timed out")
  if code is None:
    return Outcome(False, "exited early", "the sandbox was killed")
  if said == word and code == 0:
    return Outcome(True)
  reason, _, detail = said.partition("\n")
  if reason in REASONS:
    return Outcome(False, reason, detail)
  return Outcome(False, "exited early", f"signal {-code}" if code < 0 else f"exit code {code}")
