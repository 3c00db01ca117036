"""Where a process runs."""

from collections.abc import Collection

import jax
from jax.experimental.pallas import tpu as pltpu

from kernels.partitioning import can_cut

HOPPER = ("9.0",)  # Compute capabilities of GPUs with wgmma, which newer ones have no more.


def has_tpu(kinds: Collection[str] = ()) -> bool:
  """Whether what is traced now is for TPUs, of the given kinds if there are any, that kernels run on.

  These are the devices of the current mesh (`jax.set_mesh`), which may be of a slice that is only
  compiled for, with axes that `partitioning` cuts kernels over; without a mesh the process's only one.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    devices = jax.devices()
    device = devices[0] if len(devices) == 1 else None
  else:
    device = mesh.abstract_device if can_cut(mesh) else None
  return (
    device is not None and device.platform == "tpu" and (not kinds or device.device_kind in kinds)
  )


def tpu_chip() -> pltpu.TpuInfo | None:
  """What is compiled for: the process's chip, or that of the mesh in use; None if it is no TPU."""
  return pltpu.get_tpu_info() if pltpu.is_tpu_device() else None


def has_one_gpu(compute_capabilities: Collection[str]) -> bool:
  """Whether the process has one NVIDIA GPU of one of these capabilities, "9.0", and nothing else."""
  devices = jax.devices()
  if len(devices) != 1 or devices[0].platform != "gpu":
    return False
  return getattr(devices[0], "compute_capability", None) in compute_capabilities
