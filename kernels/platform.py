"""Where a process runs."""

from collections.abc import Collection

import jax

HOPPER = ("9.0",)  # Compute capabilities of GPUs with wgmma, which newer ones have no more.


def has_one_tpu(kinds: Collection[str] = ()) -> bool:
  """Whether the process has one TPU and nothing else, of the given kinds if there are any.

  A kernel is not cut over several devices by the compiler.
  """
  devices = jax.devices()
  if len(devices) != 1 or devices[0].platform != "tpu":
    return False
  return not kinds or devices[0].device_kind in kinds


def has_one_gpu(compute_capabilities: Collection[str]) -> bool:
  """Whether the process has one NVIDIA GPU of one of these capabilities, "9.0", and nothing else."""
  devices = jax.devices()
  if len(devices) != 1 or devices[0].platform != "gpu":
    return False
  return getattr(devices[0], "compute_capability", None) in compute_capabilities
