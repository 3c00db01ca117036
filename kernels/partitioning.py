"""Kernels on a mesh: every device runs the kernel on its part of the arrays.

The compiler does not cut a kernel over devices; `jax.shard_map` does, over the mesh of `jax.set_mesh`.
(`jax.experimental.custom_partitioning`, which would follow the shardings that the compiler infers, has no
implementation on TPU.) What is cut over which axis follows from what a dimension is and from the axes'
names, those of `common.training.mesh`:

data, fsdp  rows of a batch; weights are whole, fsdp's slices are gathered before use
tensor      heads; columns or inputs of a weight

The compiler moves arrays that lie otherwise. A dimension that the axes do not divide is whole on every
device: it is gathered where it is cut, and the devices all compute the same.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("data", "fsdp")
TENSOR_AXIS = "tensor"

Axes = tuple[str, ...]
TensorParallel = Literal["columns", "inputs"]


def open_axes() -> dict[str, int]:
  """Sizes of the current mesh's axes that the compiler cuts over: no longer those of `jax.shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types)
  return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def can_cut(mesh: jax.sharding.AbstractMesh) -> bool:
  """Whether every axis of more than one device has a known name, or is `jax.shard_map`'s already."""
  known = (*BATCH_AXES, TENSOR_AXIS)
  return all(
    size == 1 or kind == AxisType.Manual or (kind == AxisType.Auto and name in known)
    for (name, size), kind in zip(mesh.shape_tuple, mesh.axis_types)
  )


def tensor_size() -> int:
  """Devices along the tensor axis."""
  return open_axes().get(TENSOR_AXIS, 1)


def batch_axes(rows: int) -> Axes:
  """The axes that so many rows are cut over: those that divide them."""
  axes, count = (), 1
  for axis in BATCH_AXES:
    size = open_axes().get(axis, 1)
    if size > 1 and rows % (count * size) == 0:
      axes, count = (*axes, axis), count * size
  return axes


def tensor_axes(*sizes: int) -> Axes:
  """The tensor axis if it divides dimensions of these sizes, which are cut together; else ()."""
  count = tensor_size()
  divides = all(size % count == 0 for size in sizes)
  return (TENSOR_AXIS,) if count > 1 and sizes and divides else ()


def weight_axes(
  tensor_parallel: TensorParallel | None, *, inputs: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[Axes, Axes]:
  """The axes that the inputs and that the columns of a weight are cut over.

  Args:
    tensor_parallel: which of them the tensor axis cuts (Shoeybi et al. 2019, section 3); None for
      neither.
    inputs, columns: sizes of the dimensions of several arrays that would be cut together. Of size 1
      is what all parts share.

  Raises:
    ValueError: tensor_parallel is something else.
  """
  if tensor_parallel not in (None, "columns", "inputs"):
    raise ValueError(
      f"tensor_parallel={tensor_parallel!r} is not supported; supported: columns, inputs, None"
    )
  several = lambda sizes: [size for size in sizes if size != 1]
  return (
    tensor_axes(*several(inputs)) if tensor_parallel == "inputs" else (),
    tensor_axes(*several(columns)) if tensor_parallel == "columns" else (),
  )


def of_rows(x: jax.Array, last: Axes = ()) -> PartitionSpec:
  """Of x [..., channels]: rows along the first dimension, channels along the axes `last`."""
  if x.ndim == 1:
    return PartitionSpec(last)
  return PartitionSpec(batch_axes(len(x)), *(None,) * (x.ndim - 2), last)


def part(x: jax.Array, spec: PartitionSpec, dtype: Any = None) -> jax.ShapeDtypeStruct:
  """What a device has of x."""
  axes, shape = open_axes(), list(x.shape)
  for i, cut in enumerate(spec):
    names = (cut,) if isinstance(cut, str) else cut or ()
    shape[i] //= math.prod(axes[name] for name in names)
  return jax.ShapeDtypeStruct(tuple(shape), x.dtype if dtype is None else dtype)


def on_parts(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
  """`function` on each device's part of its arguments; itself where there is one device.

  Args:
    function: of arrays; without values that differ by device in what `out_specs` has whole.
    in_specs, out_specs: PartitionSpecs of open axes, as of `jax.shard_map`.
  """
  axes = open_axes()
  if math.prod(axes.values()) == 1:
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
  )
