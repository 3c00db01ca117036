"""Where a process runs."""

from collections.abc import Collection

import jax


def has_one_tpu(kinds: Collection[str] = ()) -> bool:
  """Whether the process has one TPU and nothing else, of the given kinds if there are any.

  A kernel is not cut over several devices by the compiler.
  """
  devices = jax.devices()
  if len(devices) != 1 or devices[0].platform != "tpu":
    return False
  return not kinds or devices[0].device_kind in kinds
