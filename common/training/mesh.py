"""The device mesh: three named axes that every model and every paper share.

data    copies of the whole model; each sees other rows of the batch
fsdp    rows of the batch too, and each device keeps a slice of every weight, gathered before use
tensor  slices of heads, MLP channels and vocabulary; activations are summed, weights stay put
"""

import math
from collections.abc import Mapping, Sequence

import jax

from common.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_axes(sizes: Sequence[str]) -> dict[str, int]:
  """The value of a flag --mesh, ["data=2", "tensor=8"] -> {"data": 2, "tensor": 8}."""
  try:
    return {axis: int(size) for axis, size in (part.split("=") for part in sizes)}
  except ValueError:
    raise UserError(
      f"--mesh={','.join(sizes)}: expected sizes of axes, such as data=2,tensor=8"
    ) from None


def make_mesh(
  axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Arranges devices in a mesh (data, fsdp, tensor).

  On TPU slices neighbours in the mesh are neighbours in the slice. Run the training inside
  `with jax.set_mesh(mesh):`, so that the models know it too.

  Args:
    axes: size of each axis; one that is left out has size 1, and one may be -1: all the devices
      that the others leave.
    devices: by default all of all processes.

  Raises:
    UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  unknown = sorted(set(axes) - set(AXES))
  if unknown:
    raise UserError(f"unknown mesh axes {', '.join(unknown)}; there are {', '.join(AXES)}")
  sizes = {axis: axes.get(axis, 1) for axis in AXES}
  product = math.prod(size for size in sizes.values() if size != -1)
  rest = [axis for axis in AXES if sizes[axis] == -1]
  if len(rest) == 1 and product > 0 and len(devices) % product == 0:
    sizes[rest[0]] = len(devices) // product
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
    given = ", ".join(f"{axis}={axes.get(axis, 1)}" for axis in AXES)
    raise UserError(
      f"a mesh of {given} does not use the {len(devices)} devices exactly once: the sizes must "
      "multiply to their number (one of them may be -1: what is left)"
    )
  # Auto: the compiler places what the program leaves open.
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)
