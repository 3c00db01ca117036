"""The command line that every paper and app shares.

A paper's whole binary, `projects/awq/main.py`:

    from common import cli

    if __name__ == "__main__":
      cli.run("awq")

Its `config.py` has `PRESETS`, a tuple of names with "default" among them, and
`get_config(preset) -> ml_collections.ConfigDict`, called only with one of those names. A field
without a value is `config_dict.placeholder(type)`, so that `--config.field=` knows its type. The
docstring of `config.py` is part of `--help`. Its `experiment.py` has `run(config, workdir) ->
Report`; it is imported by name once the command line is known to be right, so that `--help` and
errors need not wait for JAX. For `--compile_only=SLICE` a `compile_steps.py` beside it has
`compile_steps(config, devices) -> list[Step]` (`common.compilation`).

A paper whose method estimates something from a table has an `estimate.py` as well, with flags of its
own and `main(argv)`: `./run.sh SLUG --data=FILE` runs it instead, and its docstring is the help.

An app's `main(argv)` is run by `cli.run_app(main)`. What the user can mend (`UserError`, a bad
flag) is one line on stderr and exit code 2; Ctrl-C is exit code 130; anything else keeps its
traceback.

Paths on the command line are relative to the user's current folder; a config file that is not
there is looked up in the checkout.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import glob
import importlib
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from common.errors import UserError
from common.paths import cache_dir
from common.training import distributed

_HELP = ("-h", "--help")


def run(slug: str) -> NoReturn:
  """Runs the paper `projects/SLUG` as the command line says, and exits."""
  on_data = any(re.fullmatch("--?data(=.*)?", arg) for arg in sys.argv[1:])
  if on_data and importlib.util.find_spec(f"projects.{slug}.estimate"):
    estimate = importlib.import_module(f"projects.{slug}.estimate")
    sys.modules["__main__"].__doc__ = estimate.__doc__
    run_app(estimate.main)
  config_file = pathlib.Path(importlib.util.find_spec(f"projects.{slug}.config").origin)
  root = config_file.parents[2]
  flags.DEFINE_string("workdir", None, f"folder of the results (default: runs/{slug}-PRESET)")
  flags.DEFINE_list("mesh", None, "sizes of the mesh axes data, fsdp, tensor, such as fsdp=-1")
  flags.DEFINE_string("compile_only", None, "TPU slice to compile the steps for, such as v5p:2x2x4")
  config_flag = preset = None

  def parse(argv: list[str]) -> list[str]:
    nonlocal config_flag, preset
    # --config is taken out first: which --config.field flags exist depends on the file it names.
    first = flags.FlagValues()
    flags.DEFINE_string("config", "", "FILE:PRESET", flag_values=first)
    first.set_gnu_getopt(True)
    rest = first([arg for arg in argv if arg not in _HELP], known_only=True)
    file, _, preset = first.config.partition(":")
    preset = preset or "default"
    module = load_config_module(_config_path(file, root) if file else config_file)
    config = get_config(module, preset)
    if set(argv) & set(_HELP):
      print(_paper_help(slug, module, preset, config))
      sys.exit(0)
    defaults = _fields(config)
    _check_fields(rest, defaults)
    config_flag = config_flags.DEFINE_config_dict("config", config, sys_argv=rest)
    args = parse_flags(rest)
    _check_tuples(_fields(config_flag.value), defaults)
    if len(args) > 1:
      raise UserError(f"unexpected argument {args[1]!r}; flags are --name=value, see --help")
    return args

  def main(_) -> int | None:
    config = config_flag.value
    if flags.FLAGS.compile_only is not None:
      prepare_jax(compile_only=True)
      return _compile_only(slug, config, flags.FLAGS.compile_only)
    workdir = pathlib.Path(flags.FLAGS.workdir or root / "runs" / f"{slug}-{preset}").absolute()
    with writable_folder(workdir):
      prepare_jax()
      distributed.initialize()
      with on_mesh(flags.FLAGS.mesh):
        experiment = importlib.import_module(f"projects.{slug}.experiment")
        from common.reporting import report as reporting

        start = time.perf_counter()
        result = experiment.run(config, workdir)
        seconds = time.perf_counter() - start
      report = dataclasses.replace(
        result,
        project=slug,
        preset=preset,
        config=config.to_dict(),
        environment=reporting.environment(),
        seconds=seconds,
      )
      if not _is_first_process():
        return
      from common.reporting.measurements import discard_measurements

      reporting.write_report(report, workdir)
      discard_measurements(workdir)
    reporting.print_report(report)
    print(f"written to {workdir}")

  run_app(main, parse)


def run_app(
  main: Callable[[list[str]], int | None],
  parse: Callable[[list[str]], list[str]] | None = None,
) -> NoReturn:
  """Parses the flags, runs main(program and positional arguments) and exits with what it returns.

  What the user can mend becomes one line on stderr and exit code 2.
  """
  try:
    app.run(main, flags_parser=parse or parse_flags)
  except (UserError, flags.Error) as e:
    print("error:", *str(e).split(), file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:  # A reader such as `head` has seen enough; nor is there one at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses absl flags anywhere on the command line; returns the program and the other arguments.

  `--help` prints the docstring of the main module.
  """
  if set(argv) & set(_HELP):
    print((sys.modules["__main__"].__doc__ or "").strip())
    sys.exit(0)
  flags.FLAGS.set_gnu_getopt(True)
  args = flags.FLAGS(argv)
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = -1  # Warnings; absl would also show the INFO logs of Orbax and Grain.
  return args


def load_config_module(path: pathlib.Path) -> types.ModuleType:
  """Imports a config file.

  Raises:
    UserError: there is none, it is not Python, or it lacks PRESETS or get_config.
  """
  spec = importlib.util.spec_from_file_location("config", path)
  if spec is None or not path.is_file():
    raise UserError(f"there is no config file {path}; expected FILE.py or FILE.py:PRESET")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as e:
    raise UserError(f"{path}, line {e.lineno}: {e.msg}") from None
  for name in ("PRESETS", "get_config"):
    if not hasattr(module, name):
      raise UserError(f"config file {path} does not define {name}; see projects/awq/config.py")
  return module


def get_config(module: types.ModuleType, preset: str) -> ConfigDict:
  """Returns a preset of a config module.

  Raises:
    UserError: there is no such preset, or the file refuses it with a ValueError.
  """
  if preset not in module.PRESETS:
    raise UserError(
      f"{module.__file__} has no preset {preset!r}; it has {', '.join(module.PRESETS)}"
    )
  try:
    return module.get_config(preset)
  except ValueError as e:
    raise UserError(f"{module.__file__}, preset {preset!r}: {e}") from e


def prepare_jax(*, compile_only: bool = False) -> None:
  """Sets the environment that JAX reads when imported; what the user has set stays.

  Without an accelerator JAX is told so, or an installed libtpu complains while it looks for one.
  Compiled programs are kept in the cache folder.

  Args:
    compile_only: nothing will run: the accelerators are left alone.

  Raises:
    UserError: the cache folder cannot be made.
  """
  quiet = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_COMPILATION_CACHE_DIR": str(cache_dir("xla")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    # XLA's CPU scheduler otherwise starts whatever it can, such as dequantizing every layer of a
    # packed model at once, and holds all results in memory until they are used.
    # Its YNNPACK fusions take 1.4 to 2.5 times as long as Eigen for the few rows of a decode step
    # (8 rows, kernels of [512, 512] to [1280, 512], two cores).
    "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    " --xla_cpu_experimental_ynn_fusion_type=",
  }
  if sys.platform == "linux" and not _any_device("accel*", "vfio/[0-9]*"):
    quiet |= {
      "TPU_ACCELERATOR_TYPE": "v5litepod-4",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # It is used as a compiler only.
    }
    if not _any_device("nvidia*", "kfd", "dxg"):  # NVIDIA, AMD, and GPUs under WSL.
      quiet["JAX_PLATFORMS"] = "cpu"
  if compile_only:
    os.environ["JAX_PLATFORMS"] = "cpu"
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  _keep_freed_memory()


def on_mesh(sizes: list[str] | None) -> contextlib.AbstractContextManager:
  """The mesh of the flag --mesh, over all devices; nothing without the flag.

  Models that are loaded within lie on it, and the compiler cuts what is computed from them.

  Raises:
    UserError: there is no such mesh, or it would span several processes.
  """
  if sizes is None:
    return contextlib.nullcontext()
  import jax

  from common.training.mesh import make_mesh, mesh_axes

  if jax.process_count() > 1:
    raise UserError(
      f"--mesh cuts over the devices of one process, but there are {jax.process_count()}: run it on "
      "one machine"
    )
  return jax.set_mesh(make_mesh(mesh_axes(sizes)))


@contextlib.contextmanager
def writable_folder(path: pathlib.Path) -> Iterator[None]:
  """Makes the folder for the body; if the body fails, removes what it made and left empty.

  Raises:
    UserError: it cannot be made or written.
  """
  made = [p for p in (path, *path.parents) if not p.exists()]
  try:
    try:
      path.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
      raise UserError(f"cannot write to the folder {path}: {e.strerror}") from None
    yield
  except BaseException:
    with contextlib.suppress(OSError):  # Stops at the first folder that holds something.
      for folder in made:
        folder.rmdir()
    raise


def closest(name: str, options: Iterable[str]) -> str:
  """Returns a phrase that names the options nearest to `name`, or all when none is near."""
  options = sorted(options)
  # A field of a nested config is found by its own name as well.
  known = {option.rsplit(".", 1)[-1]: option for option in options} | {o: o for o in options}
  near = list(dict.fromkeys(known[k] for k in difflib.get_close_matches(name, known)))
  return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(options)}"


def _is_first_process() -> bool:
  import jax

  return jax.process_index() == 0


def _compile_only(slug: str, config: ConfigDict, topology: str) -> int:
  """Compiles the paper's steps for a TPU slice; the exit code says whether they fit."""
  name = f"projects.{slug}.compile_steps"
  if importlib.util.find_spec(name) is None:
    raise UserError(f"{slug} has no steps to compile: there is no projects/{slug}/compile_steps.py")
  from common.compilation.compile_only import compile_for

  module = importlib.import_module(name)
  return compile_for(topology, lambda devices: module.compile_steps(config, devices))


def _keep_freed_memory() -> None:
  """Tells glibc to reuse large buffers instead of returning them to the system.

  XLA's CPU backend frees its temporaries after every step; having the pages back, zeroed, can take
  as long as the arithmetic. Other C libraries are left alone.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is not None:
    mmap_threshold, trim_threshold = -3, -1  # Names of malloc.h.
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)


def _any_device(*patterns: str) -> bool:
  return any(glob.glob(f"/dev/{pattern}") for pattern in patterns)


def _config_path(file: str, root: pathlib.Path) -> pathlib.Path:
  path = pathlib.Path(file).expanduser()
  return root / path if not path.exists() and (root / path).exists() else path


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Returns {dotted name: value} of the leaves."""
  fields = {}
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      fields |= _fields(value, f"{prefix}{name}.")
    else:
      fields[prefix + name] = value
  return fields


def _check_fields(argv: list[str], fields: Iterable[str]) -> None:
  for arg in argv:
    match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
    if match and match[1] not in fields:
      raise UserError(f"unknown config field {match[1]!r}; {closest(match[1], fields)}")


def _check_tuples(fields: dict[str, Any], defaults: dict[str, Any]) -> None:
  """Checks the elements of tuples, which config_flags takes as they come."""
  for name, value in fields.items():
    if isinstance(value, tuple) and defaults[name]:
      wanted = {type(element) for element in defaults[name]}
      given = {type(element) for element in value}
      if not given <= wanted | ({int} if float in wanted else set()):
        kinds = " or ".join(sorted(kind.__name__ for kind in wanted))
        raise UserError(f"flag --config.{name}: expected a tuple of {kinds}, got {value!r}")


def _paper_help(slug: str, module: types.ModuleType, preset: str, config: ConfigDict) -> str:
  usage = (
    f"usage: ./run.sh {slug} [--config=FILE:PRESET] [--config.FIELD=VALUE ...] [--workdir=DIR]"
  )
  lines = [usage, "", *([module.__doc__.strip(), ""] if module.__doc__ else [])]
  lines += [f"presets of {module.__file__}: {', '.join(module.PRESETS)}"]
  lines += [f"fields, with their values in {preset!r}:"]
  lines += [f"  --config.{name}={value}" for name, value in _fields(config).items()]
  lines += [f"results go to --workdir (default: runs/{slug}-PRESET in the checkout)"]
  lines += ["--mesh=fsdp=-1 cuts models over all devices (axes data, fsdp, tensor; -1: the rest)"]
  lines += ["--compile_only=v5p:2x2x4 only compiles the steps for a TPU slice: do they fit?"]
  return "\n".join(lines)
