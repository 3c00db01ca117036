import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.training import distributed
from common.training.mesh import make_mesh
from tests.common.training import spmd_run

CHECKOUT = pathlib.Path(__file__).parents[3]
EXPLICIT = {
  "JAX_COORDINATOR_ADDRESS": "localhost:1234",
  "JAX_NUM_PROCESSES": "2",
  "JAX_PROCESS_ID": "0",
}
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
  "environment, expected",
  [
    ({}, None),
    (EXPLICIT, "explicit"),
    (EXPLICIT | SLURM, "explicit"),
    (SLURM, "slurm"),
    (SLURM | {"SLURM_NTASKS": "1"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # A shell of salloc.
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"}, "tpu"),
    ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}, "tpu"),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
  ],
)
def test_launcher_is_found_in_the_environment(environment, expected):
  assert distributed.launcher({"TPU_SKIP_MDS_QUERY": "1"} | environment) == expected


def test_hosts_of_a_tpu_vm_come_from_its_metadata(monkeypatch):
  monkeypatch.setattr(distributed, "_tpu_vm_workers", lambda environment: 4)
  assert distributed.launcher({}) == "tpu"
  assert distributed.launcher({"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_half_set_variables_are_named():
  with pytest.raises(UserError, match="JAX_PROCESS_ID is not: set all three"):
    distributed.launcher({k: v for k, v in EXPLICIT.items() if k != "JAX_PROCESS_ID"})


@pytest.mark.parametrize(
  "change",
  [{"JAX_PROCESS_ID": "2"}, {"JAX_NUM_PROCESSES": "two"}, {"JAX_COORDINATOR_ADDRESS": "a"}],
)
def test_contradictory_variables_are_refused(change):
  with pytest.raises(UserError, match="must be HOST:PORT"):
    distributed.initialize(EXPLICIT | change)


def test_a_single_process_starts_nothing():
  assert distributed.initialize({"TPU_SKIP_MDS_QUERY": "1"}) is False


@pytest.fixture(scope="module")
def one_device_losses(tmp_path_factory):
  mesh = make_mesh({}, jax.devices()[:1])
  return spmd_run.run(tmp_path_factory.mktemp("one"), mesh)[1]


def start(arguments, devices: int, environment=None):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    **(environment or {}),
  }
  command = [sys.executable, "-m", "tests.common.training.spmd_run", *map(str, arguments)]
  pipe = subprocess.PIPE
  return subprocess.Popen(
    command, cwd=CHECKOUT, env=environment, stdout=pipe, stderr=pipe, text=True
  )


def finish(processes) -> dict:
  """Waits for all, and returns what the first one printed."""
  try:
    outputs = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, error) in zip(processes, outputs):
    assert process.returncode == 0, error[-2000:]
  return json.loads(outputs[0][0].splitlines()[-1])


def check_curve(result: dict, expected: list[float]):
  assert result["devices"] == 8
  assert result["shard"] == [2, 16, 32]  # Of [layers, 32, 64]: cut by fsdp and by tensor.
  assert len(expected) == 20 and expected[-1] < expected[0] - 0.2
  np.testing.assert_allclose(result["losses"], expected, rtol=0, atol=1e-5)


def test_eight_devices_train_as_one_and_restore_onto_other_meshes(one_device_losses, tmp_path):
  result = finish([start([tmp_path, "2,2,2", "restore"], devices=8)])
  check_curve(result, one_device_losses)


def test_two_processes_train_as_one(one_device_losses, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [
    start(
      [tmp_path, "2,2,2"],
      devices=4,
      environment={
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
      },
    )
    for index in range(2)
  ]
  check_curve(finish(processes), one_device_losses)
