"""Start-up of a run on several machines: JAX's distributed runtime, from the environment.

  TPU slices   nothing to set; every host of the slice runs the same command
  SLURM        nothing to set under `srun`; one process per task
  elsewhere    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, JAX_PROCESS_ID for each process

Each process then reads its own shard of the data (`token_batches`), and the mesh spans all devices.
"""

import glob
import importlib.util
import os
import urllib.request
from collections.abc import Mapping

from common.errors import UserError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
  """Who started several processes: "explicit", "tpu", "slurm", or None for a single process.

  Raises:
    UserError: some of the explicit variables are set, but not all.
  """
  given = [name for name in _EXPLICIT if environment.get(name)]
  if given:
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
      raise UserError(f"{', '.join(given)} is set, but {', '.join(missing)} is not: set all three")
    return "explicit"
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
  slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
  if "," in hosts or slices != "1" or (not hosts and _tpu_vm_workers(environment) > 1):
    return "tpu"
  # A shell inside of an allocation has the job's variables but not the step's.
  if all(name in environment for name in _SLURM) and environment.get("SLURM_NTASKS", "1") != "1":
    return "slurm"
  return None


def initialize(environment: Mapping[str, str] = os.environ) -> bool:
  """Joins the processes of this run; call it before anything else asks JAX for devices.

  Returns:
    Whether there are several processes.

  Raises:
    UserError: the variables contradict each other, or the coordinator did not answer.
  """
  started_by = launcher(environment)
  if started_by is None:
    return False
  import jax  # Only now: the command line must not wait for it.

  arguments = {}
  if started_by == "explicit":
    address, count, index = (environment[name] for name in _EXPLICIT)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)) or ":" not in address:
      raise UserError(
        f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT, and JAX_PROCESS_ID={index} one of "
        f"0 .. JAX_NUM_PROCESSES - 1 (JAX_NUM_PROCESSES={count})"
      )
    arguments = {
      "coordinator_address": address,
      "num_processes": int(count),
      "process_id": int(index),
    }
  try:
    jax.distributed.initialize(**arguments)
  except jax.errors.JaxRuntimeError as e:
    where = environment.get("JAX_COORDINATOR_ADDRESS", "the coordinator")
    raise UserError(
      f"the processes of this run did not all reach {where}: {str(e).splitlines()[0]}; "
      "start all of them, with the same address"
    ) from e
  return jax.process_count() > 1


def _tpu_vm_workers(environment: Mapping[str, str]) -> int:
  """Hosts of this TPU slice, which a Cloud TPU VM learns from its metadata server; elsewhere 1."""
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  if not chips or "TPU_SKIP_MDS_QUERY" in environment or not importlib.util.find_spec("libtpu"):
    return 1
  server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
  path = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
  request = urllib.request.Request(f"http://{server}/{path}", headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=2) as answer:
      return answer.read().decode().count(",") + 1
  except OSError:  # Not on Google Cloud.
    return 1
