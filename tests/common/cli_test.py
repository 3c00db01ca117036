import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from ml_collections import ConfigDict

from common import cli
from common.errors import UserError

CHECKOUT = pathlib.Path(cli.__file__).parents[1]
FILES = {
  "main.py": """
    from common import cli

    if __name__ == "__main__":
      cli.run("toy")
    """,
  "config.py": '''
    """The toy paper."""

    from ml_collections import ConfigDict, config_dict

    PRESETS = ("default", "tiny", "paper")


    def get_config(preset):
      if preset == "paper":
        raise ValueError("needs a TPU")
      return ConfigDict({
        "bits": 4, "seeds": (0, 1), "model": config_dict.placeholder(str),
        "quant": {"group": 128, "zero": True}, "fail": "",
      })
    ''',
  "experiment.py": """
    import os
    import signal
    import sys

    from common.errors import UserError
    from common.reporting.report import Claim, Report


    def die(path):
      path.touch()
      os.kill(os.getpid(), signal.SIGKILL)


    def run(config, workdir):
      print("jax imported early:", "jax" in sys.modules)
      if config.fail == "user":
        raise UserError("bits are\\n  wrong")
      if config.fail == "bug":
        raise RuntimeError("a bug")
      if config.fail == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
      if config.fail == "lock":
        config.unknown = 1
      if config.fail == "kill":
        from common.reporting.measurements import Measurements

        measurements = Measurements(workdir, config)
        measurements.get("first", lambda: print("measures the first"))
        measurements.get("second", lambda: (workdir / "once").exists() or die(workdir / "once"))
      if "jax" in sys.modules:
        print("mesh:", dict(sys.modules["jax"].sharding.get_mesh().shape))
      return Report(claims=[Claim.less("c", [config.bits] * len(config.seeds), 5)])
    """,
}


ESTIMATE = '''
"""The toy on a table."""

from absl import flags

_DATA = flags.DEFINE_string("data", None, "table")


def main(argv):
  print("estimates from", _DATA.value)
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("checkout")
  (root / "projects" / "toy").mkdir(parents=True)
  for name, text in FILES.items():
    (root / "projects" / "toy" / name).write_text(textwrap.dedent(text))
  return root


@pytest.fixture
def toy(root, tmp_path):
  """Runs the toy paper with flags from an empty folder."""
  cwd = tmp_path / "cwd"
  cwd.mkdir()

  def run(*flags):
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR",)}
    env |= {"PYTHONPATH": f"{root}:{CHECKOUT}", "FLAXWORKS_CACHE": str(tmp_path / "cache")}
    return subprocess.run(
      [sys.executable, "-P", "-m", "projects.toy.main", *flags],
      cwd=cwd,
      env=env,
      capture_output=True,
      text=True,
    )

  run.cwd = cwd
  return run


def test_a_run_writes_its_report_under_the_users_folder(toy):
  done = toy("--workdir=out", "--config.bits=3", "--noconfig.quant.zero", "--config.seeds=(4,5,6)")
  assert done.returncode == 0 and done.stderr == ""
  report = json.loads((toy.cwd / "out" / "report.json").read_text())
  assert (report["project"], report["preset"]) == ("toy", "default")
  assert report["config"] == {
    "bits": 3,
    "seeds": [4, 5, 6],
    "model": None,
    "quant": {"group": 128, "zero": False},
    "fail": "",
  }
  assert report["claims"][0]["measured"] == [3.0, 3.0, 3.0]
  assert report["environment"]["backend"] == "cpu" and report["seconds"] > 0
  assert "jax imported early: False" in done.stdout and "✓ c" in done.stdout


def test_a_run_may_lie_on_a_mesh(toy, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
  done = toy("--workdir=out", "--mesh=tensor=2,fsdp=-1")
  assert done.returncode == 0 and "mesh: {'data': 1, 'fsdp': 2, 'tensor': 2}" in done.stdout


def test_a_table_goes_to_the_papers_estimate(toy, root):
  refused = toy("--data=my.csv")
  assert refused.returncode == 2 and "data" in refused.stderr
  (root / "projects" / "toy" / "estimate.py").write_text(ESTIMATE)
  try:
    done = toy("--data=my.csv")
    assert (done.returncode, done.stdout) == (0, "estimates from my.csv\n")
    assert toy("--data=", "--help").stdout == "The toy on a table.\n"
    assert toy("--database=x").returncode == 2
  finally:
    (root / "projects" / "toy" / "estimate.py").unlink()


def test_results_go_to_runs_by_default_and_config_paths_may_be_of_the_checkout(toy, root):
  done = toy("--config.bits", "7", "--config=projects/toy/config.py:tiny")
  assert done.returncode == 0, done.stderr
  report = json.loads((root / "runs" / "toy-tiny" / "report.json").read_text())
  assert (report["preset"], report["config"]["bits"]) == ("tiny", 7)


def test_compile_only_needs_the_papers_steps(toy):
  done = toy("--compile_only=v5e:2x2")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.splitlines() == [
    "error: toy has no steps to compile: there is no projects/toy/compile_steps.py"
  ]


COMPILE_STEPS = """
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from common.compilation.step import Step
  from common.training.mesh import make_mesh


  def compile_steps(config, devices):
    where = NamedSharding(make_mesh({"fsdp": -1}, devices), PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((8, 128 * config.bits), jnp.float32, sharding=where)
    return [Step("total", jnp.sum, (x,))]
  """


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compile_only_prints_a_table_and_nothing_else(toy, root):
  file = root / "projects" / "toy" / "compile_steps.py"
  file.write_text(textwrap.dedent(COMPILE_STEPS))
  try:
    done = toy("--compile_only=v5e:2x2", "--config.bits=8")
    wrong = toy("--compile_only=v5e")
  finally:
    file.unlink()
  assert (done.returncode, done.stderr) == (0, "")
  assert "total on v5e:2x2" in done.stdout and "every step fits v5e:2x2" in done.stdout
  assert "all-reduce" in done.stdout
  assert not (root / "runs" / "toy-default").exists()
  assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
  assert "unknown TPU slice 'v5e'; there are v4: v4:2x2x1" in wrong.stderr


def test_half_set_cluster_variables_are_the_users_to_mend(toy, monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  done = toy()
  assert done.returncode == 2
  assert "JAX_NUM_PROCESSES is set, but JAX_COORDINATOR_ADDRESS" in done.stderr


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--config.bitz=3"], "unknown config field 'bitz'; did you mean bits?"),
    (["--config.quant.grup=3"], "unknown config field 'quant.grup'; did you mean quant.group"),
    (["--config.xyzzy=3"], "there are bits, fail, model, quant.group, quant.zero, seeds"),
    (["--config.to_dict=3"], "unknown config field 'to_dict'"),
    (["--config.bits=three"], "flag --config.bits=three"),
    (["--config.quant.zero=maybe"], "flag --config.quant.zero=maybe"),
    (["--config.seeds=a,b"], "--config.seeds: expected a tuple of int, got ('a,b',)"),
    (["--config=:tyny"], "has no preset 'tyny'; it has default, tiny, paper"),
    (["--config=projects/toy/config.py:paper"], "preset 'paper': needs a TPU"),
    (["--config=absent.py"], "there is no config file absent.py"),
    (["--config=/dev/null"], "there is no config file /dev/null"),
    (["--config"], "Missing value for flag --config"),
    (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    (["tiny"], "unexpected argument 'tiny'"),
    (["--config.fail=user"], "error: bits are wrong"),
    (["--mesh=two"], "--mesh=two: expected sizes of axes, such as data=2,tensor=8"),
    (["--mesh=model=2"], "unknown mesh axes model; there are data, fsdp, tensor"),
    (["--mesh=tensor=3"], "does not use the 1 devices exactly once"),
    (["--workdir=/dev/null/deep/er"], "cannot write to the folder /dev/null/deep/er: Not a dir"),
  ],
)
def test_what_the_user_can_mend_is_one_line(toy, flags, message):
  done = toy("--workdir=out/deep", *flags)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert message in done.stderr
  assert list(toy.cwd.iterdir()) == []  # Nothing half-written, no empty folder.


def test_a_bug_keeps_its_traceback_and_leaves_no_empty_folder(toy):
  done = toy("--workdir=out", "--config.fail=bug")
  assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr
  assert list(toy.cwd.iterdir()) == []


def test_the_config_is_locked(toy):
  done = toy("--workdir=out", "--config.fail=lock")
  assert done.returncode == 1 and "unknown" in done.stderr


def test_ctrl_c_is_one_line(toy):
  done = toy("--workdir=out", "--config.fail=interrupt")
  assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_killed_run_goes_on(toy):
  flags = "--workdir=out", "--config.fail=kill"
  killed = toy(*flags)
  assert killed.returncode == -9 and not (toy.cwd / "out" / "report.json").exists()
  done = toy(*flags)
  assert done.returncode == 0 and "going on with 1 measurements" in done.stderr
  assert "measures the first" not in done.stdout
  assert {p.name for p in (toy.cwd / "out").iterdir()} == {"once", "report.json", "report.md"}


def test_help_shows_fields_and_presets_without_importing_the_experiment(toy, root):
  done = toy("--help")
  assert (done.returncode, done.stderr) == (0, "")
  assert "The toy paper." in done.stdout and "default, tiny, paper" in done.stdout
  assert "--config.quant.group=128" in done.stdout and "jax imported" not in done.stdout


def test_importing_the_command_line_does_not_import_jax():
  code = f"import sys; sys.path[:0] = [{str(CHECKOUT)!r}]; import common.cli; "
  subprocess.run([sys.executable, "-c", code + "sys.exit('jax' in sys.modules)"], check=True)


def _write(path, text):
  path.write_text(text)
  return path


@pytest.mark.parametrize(
  "text, message",
  [
    ("PRESETS = (", "line 1"),
    ("PRESETS = ('default',)", "does not define get_config"),
    ("def get_config(preset): pass", "does not define PRESETS"),
  ],
)
def test_a_bad_config_file_is_a_user_error(tmp_path, text, message):
  with pytest.raises(UserError, match=message):
    cli.load_config_module(_write(tmp_path / "config.py", text))


def test_get_config_gives_the_named_preset(tmp_path):
  path = _write(
    tmp_path / "config.py",
    "from ml_collections import ConfigDict\nPRESETS = ('default', 'tiny')\n"
    "def get_config(preset): return ConfigDict({'name': preset})",
  )
  assert cli.get_config(cli.load_config_module(path), "tiny") == ConfigDict({"name": "tiny"})


@pytest.mark.parametrize(
  "devices, names",
  [
    ((), {"JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"}),
    (("nvidia*",), {"TPU_SKIP_MDS_QUERY"}),
    (("accel*",), set()),
  ],
)
def test_jax_is_told_of_absent_accelerators_only(monkeypatch, tmp_path, devices, names):
  environ = {"FLAXWORKS_CACHE": str(tmp_path)}
  monkeypatch.setattr(os, "environ", environ)
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(cli, "_any_device", lambda *patterns: bool(set(patterns) & set(devices)))
  cli.prepare_jax()
  assert environ.keys() & {"JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"} == names
  assert environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "xla")


def test_what_the_user_has_set_for_jax_stays(monkeypatch, tmp_path):
  environ = {"FLAXWORKS_CACHE": str(tmp_path), "JAX_PLATFORMS": "tpu"}
  monkeypatch.setattr(os, "environ", environ)
  monkeypatch.setattr(cli, "_any_device", lambda *patterns: False)
  cli.prepare_jax()
  assert environ["JAX_PLATFORMS"] == "tpu"


def test_a_folder_that_was_there_stays_and_one_with_files_too(tmp_path):
  (tmp_path / "old").mkdir()
  for folder, keep in ((tmp_path / "old", None), (tmp_path / "new" / "deep", "log.txt")):
    with pytest.raises(RuntimeError), cli.writable_folder(folder):
      if keep:
        (folder / keep).touch()
      raise RuntimeError
  assert (tmp_path / "old").is_dir() and (tmp_path / "new" / "deep" / "log.txt").exists()
