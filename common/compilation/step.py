"""A step of a program, ready to be compiled."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from common.training.mesh import AXES, make_mesh


class Step(NamedTuple):
  """What `compile_steps(config, devices)` of a paper lists.

  Attributes:
    name: what it does, and at which size.
    function: pure; may be jitted already, with donation and output shardings.
    arguments: pytrees of jax.ShapeDtypeStruct with shardings on one mesh.
    x64: compile with JAX's 64-bit types.
  """

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  x64: bool = False


def independent(
  name: str,
  function: Callable[..., Any],
  arguments: tuple[Any, ...],
  devices: Sequence[jax.Device],
  *,
  x64: bool = False,
) -> Step:
  """A step over replications that know nothing of each other, cut over the devices.

  Args:
    name: of the step.
    function: maps over the leading axis of every argument; so do its results.
    arguments: pytrees of jax.ShapeDtypeStruct [replications, ...]. Their number is rounded up to a
      multiple of the devices.
    devices: of the slice.
    x64: see `Step`.
  """
  mesh = make_mesh({"data": -1}, devices)
  spec = PartitionSpec(AXES)

  def place(x):
    replications = -(-x.shape[0] // len(devices)) * len(devices)
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct((replications, *x.shape[1:]), x.dtype, sharding=where)

  cut = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return Step(name, cut, jax.tree.map(place, arguments), x64)
