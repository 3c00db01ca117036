import dataclasses
import glob
import os
import re
import signal
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.checkpoints.orbax import TrainingCheckpoints
from common.errors import UserError
from common.training.loop import TrainingDiverged, train
from common.training.optimizer import make_optimizer
from common.training.train_step import init_train_state, make_train_step
from tests.common.training import tiny_run
from tests.common.training.tiny_run import (
  NUM_STEPS,
  STEP_FN,
  RandomRows,
  initial_state,
  kill_at,
  run,
)

# When the process is killed: before it saved anything; and, at a step drawn once, while the files
# of the save that just began are still being written.
KILLS = [("SIGKILL", 1), ("SIGKILL", int(np.random.default_rng(0).integers(2, 12)))]
STOPS = [("SIGTERM", 5)]


def _assert_same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _steps(workdir):
  names = os.listdir(workdir / "checkpoints")
  return sorted(int(name) for name in names if name.isdigit())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  return run(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module", autouse=True)
def processes(tmp_path_factory, same_compiler):
  """Starts the program once for each of KILLS and STOPS; they run beside the other tests."""
  started = {}
  for case in KILLS + STOPS:
    workdir = tmp_path_factory.mktemp("-".join(map(str, case)))
    args = [sys.executable, "-m", tiny_run.__name__, workdir, *map(str, case)]
    started[case] = (
      workdir,
      subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=same_compiler
      ),
    )
  yield started
  for _, process in started.values():
    process.kill()
    process.communicate()


def test_ctrl_c_stops_after_the_step_and_gives_the_handlers_back(tmp_path, uninterrupted):
  previous = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  with pytest.raises(SystemExit) as e:
    run(tmp_path, kill_at(signal.SIGINT, 2))
  assert e.value.code == 130
  assert _steps(tmp_path)[-1] == 3
  assert previous == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  _assert_same_bits(run(tmp_path), uninterrupted)


def test_the_second_ctrl_c_acts_at_once(tmp_path):
  def twice(position):
    if position == 2:
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, twice)
  assert _steps(tmp_path)[-1] == 2


def test_a_signal_in_the_last_step_still_ends_the_process(tmp_path):
  with pytest.raises(SystemExit):
    run(tmp_path, kill_at(signal.SIGTERM, NUM_STEPS - 1))
  assert _steps(tmp_path)[-1] == NUM_STEPS


def test_keeps_the_newest_and_a_finished_run_is_not_trained_again(tmp_path, uninterrupted):
  _assert_same_bits(run(tmp_path, keep=3), uninterrupted)
  assert _steps(tmp_path) == [8, 10, 12]

  def fail(position):
    raise AssertionError("asked for data")

  _assert_same_bits(run(tmp_path, fail), uninterrupted)
  with pytest.raises(UserError, match="holds a run of 12 steps already, more than num_steps=5"):
    run(tmp_path, num_steps=5)


def test_without_a_workdir(uninterrupted):
  rows = RandomRows()
  state = train(
    initial_state(), STEP_FN, (next(rows) for _ in range(20)), num_steps=NUM_STEPS, quiet=True
  )
  _assert_same_bits(state, uninterrupted)


def test_an_nnx_model_on_a_grain_pipeline(tmp_path):
  def batches():
    rows = grain.MapDataset.range(64).shuffle(seed=0).repeat()
    rows = rows.map(lambda i: {"x": np.float32([i / 64, 1]), "y": np.float32(3 * i / 64)})
    return iter(rows.to_iter_dataset().batch(8))

  graphdef, params = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Param)

  def loss_fn(params, batch, key):
    prediction = nnx.merge(graphdef, params)(batch["x"])[:, 0]
    return jnp.sum((prediction - batch["y"]) ** 2), jnp.float32(len(prediction))

  optimizer = make_optimizer(learning_rate=0.1, num_steps=60)
  step_fn = make_train_step(loss_fn, optimizer)

  def run_to(workdir, num_steps):
    state = init_train_state(params, optimizer, jax.random.key(0))
    return train(state, step_fn, batches(), num_steps=num_steps, workdir=workdir, quiet=True)

  whole = run_to(tmp_path / "whole", 60)
  run_to(tmp_path / "halves", 21)
  halves = run_to(tmp_path / "halves", 60)
  _assert_same_bits(halves, whole)
  model = nnx.merge(graphdef, whole.params)
  np.testing.assert_allclose(model(jnp.array([0.5, 1.0])), 1.5, atol=0.05)


def test_says_when_the_data_runs_out():
  rows = RandomRows()
  with pytest.raises(UserError, match="the data ran out after 3 of 12 steps"):
    train(initial_state(), STEP_FN, (next(rows) for _ in range(3)), num_steps=NUM_STEPS, quiet=True)


def test_a_checkpoint_of_another_model(tmp_path):
  run(tmp_path)
  state = initial_state()
  params = jax.tree.map(lambda x: jnp.concatenate([x, x]), state.params)
  with pytest.raises(UserError, match=r"is of another model or optimizer: params\.") as e:
    train(
      dataclasses.replace(state, params=params),
      STEP_FN,
      RandomRows(),
      num_steps=NUM_STEPS,
      workdir=tmp_path,
    )
  assert "\n" not in str(e.value)


class _Spoil:
  """A step_fn whose metrics or parameters go bad at one step only, then look healthy again."""

  def __init__(self, step, **bad):
    self.step, self.bad, self.steps = step, bad, 0

  def __call__(self, state, batch):
    state, metrics = STEP_FN(state, batch)
    self.steps += 1
    if self.steps == self.step:
      metrics |= {k: jnp.float32(v) for k, v in self.bad.items() if k in metrics}
      if "params" in self.bad:
        params = jax.tree.map(lambda x: x.at[0].set(self.bad["params"]), state.params)
        state = dataclasses.replace(state, params=params)
    return state, metrics


@pytest.mark.parametrize("bad", [{"loss": np.nan}, {"loss": np.inf}, {"grad_norm": np.inf}])
def test_a_non_finite_step_stops_the_run_and_the_good_checkpoint_stays(tmp_path, bad):
  with pytest.raises(TrainingDiverged, match="training diverged at step 7: loss") as e:
    train(
      initial_state(),
      _Spoil(7, **bad),
      RandomRows(),
      num_steps=NUM_STEPS,
      workdir=tmp_path,
      save_every=3,
      log_every=100,
      quiet=True,
    )
  assert e.value.step == 7
  assert f"the last good checkpoint is {tmp_path}/checkpoints/6" in str(e.value)
  assert "\n" not in str(e.value)
  assert _steps(tmp_path) == [3, 6]


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
  with pytest.raises(TrainingDiverged, match="step 2: .* parameters not finite; nothing was saved"):
    train(
      initial_state(),
      _Spoil(2, params=np.inf),
      RandomRows(),
      num_steps=2,
      workdir=tmp_path,
      quiet=True,
    )
  assert _steps(tmp_path) == []


def test_a_learning_rate_too_high_is_reported():
  optimizer = optax.sgd(1e38)
  state = init_train_state(initial_state().params, optimizer, jax.random.key(0))
  step_fn = make_train_step(tiny_run.loss_fn, optimizer)
  with pytest.raises(TrainingDiverged, match="try a lower learning rate"):
    train(state, step_fn, RandomRows(), num_steps=NUM_STEPS, quiet=True)


def test_waits_for_the_device_only_where_it_logs(monkeypatch):
  fetched = []
  device_get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(len(x)) or device_get(x))
  train(initial_state(), STEP_FN, RandomRows(), num_steps=12, log_every=5, quiet=True)
  assert fetched == [1, 4, 5, 2]


def test_prints_lines_where_stdout_is_not_a_terminal(capsys):
  train(initial_state(), STEP_FN, RandomRows(), num_steps=12, log_every=6, description="tiny")
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in lines] == [f"tiny: step {i}/12" for i in (1, 6, 12)]
  assert re.fullmatch(r"tiny: step 6/12  loss \d\.\d{4}  [\d,]+ tokens/s  0:00:\d\d left", lines[1])


def test_shows_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  train(initial_state(), STEP_FN, RandomRows(), num_steps=12, description="tiny")
  out = capsys.readouterr().out
  assert "12/12" in out and "tokens/s" in out and "━" in out


def test_tensorboard_and_evaluation(tmp_path):
  calls = []

  def eval_fn(state):
    calls.append(int(state.step))
    return {"accuracy": 0.5}

  run(tmp_path, eval_fn=eval_fn, eval_every=5)
  assert calls == [5, 10, 12]
  (file,) = glob.glob(f"{tmp_path}/tensorboard/*")
  with open(file, "rb") as f:
    events = f.read()
  for tag in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "eval/accuracy"):
    assert tag.encode() in events


def test_the_checkpoint_holds_the_data_position(tmp_path):
  run(tmp_path)
  with TrainingCheckpoints(tmp_path / "checkpoints") as checkpoints:
    restored, iterator_state = checkpoints.restore_latest(initial_state())
  assert restored.step == NUM_STEPS
  assert iterator_state == {"position": NUM_STEPS}


_TWO_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from common.training.loop import train
from common.training.train_step import make_train_step
from tests.common.training.tiny_run import *

compiled = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, duration, fun_name="", **kwargs:
    compiled.append(fun_name) if "backend_compile" in event else None)

def final(workdir, devices):
  mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
  rows = NamedSharding(mesh, P("data"))
  place = lambda params: jax.device_put(params, rows)
  shardings = jax.tree.map(lambda x: x.sharding, initial_state(place))
  step_fn = make_train_step(loss_fn, OPTIMIZER, accumulate_steps=2, state_shardings=shardings)
  for num_steps in (NUM_STEPS // 2, NUM_STEPS):
    state = train(initial_state(place), step_fn, RandomRows(), num_steps=num_steps,
                  workdir=workdir, batch_sharding=rows, quiet=True)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
  return state.params

one, two = final(sys.argv[1], jax.devices()[:1]), final(sys.argv[2], jax.devices())
assert compiled.count("jit(step_fn)") == 2, compiled
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
  assert len(b.sharding.device_set) == 2 and not b.is_fully_replicated
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
"""


def test_sharded_over_two_devices_as_on_one(tmp_path):
  """Parameters and batch cut over the devices, resumed half-way, compiled once."""
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  done = subprocess.run(
    [sys.executable, "-c", _TWO_DEVICES, tmp_path / "one", tmp_path / "two"],
    env=os.environ | flags,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", KILLS, ids=str)
def test_a_killed_run_continues_bit_for_bit(processes, uninterrupted, case):
  workdir, process = processes[case]
  _, err = process.communicate()
  assert process.returncode == -signal.SIGKILL, err
  saved = max(_steps(workdir), default=0)
  assert saved in ((0,) if case[1] == 1 else (case[1] - 2, case[1]))
  asked = []
  _assert_same_bits(run(workdir, asked.append), uninterrupted)
  assert asked == list(range(saved, NUM_STEPS))


@pytest.mark.parametrize("case", STOPS, ids=str)
def test_a_terminated_run_saves_its_step_and_continues_bit_for_bit(processes, uninterrupted, case):
  workdir, process = processes[case]
  out, err = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM, err
  assert err == "", "neither a traceback nor the libraries' logs"
  assert "stopped by SIGTERM at step 6, saved in" in out.splitlines()[-1]
  assert _steps(workdir)[-1] == 6
  _assert_same_bits(run(workdir), uninterrupted)
