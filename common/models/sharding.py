"""Where every array lies on the mesh: one table of logical axes, and rules from them to the mesh.

A dimension of a parameter has a logical name, found by the end of the parameter's own name:
`blocks.3.attention.q_proj.kernel` is ("embed", "heads"). Rules map logical axes to the axes of the
mesh (`common.training.mesh`). The same names occur in the optimizer's moments and in checkpoints,
so one function serves parameters, train states and packed weights, stacked or not.

Activations follow from the parameters by propagation; `constrain` marks the few where the compiler
would otherwise choose to gather them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from common.errors import UserError
from kernels.partitioning import TENSOR_AXIS, TensorParallel

PyTree = Any
Table = Mapping[str, tuple[str | None, ...]]
Rules = Mapping[str, tuple[str, ...]]

# The end of a name -> its axes. The longest matching end counts. `*` is one name.
PARAMETERS: Table = {
  # Transformer blocks: decoder, encoder, encoder-decoder, vision transformer.
  "q_proj.kernel": ("embed", "heads"),
  "k_proj.kernel": ("embed", "kv_heads"),
  "v_proj.kernel": ("embed", "kv_heads"),
  "o_proj.kernel": ("heads", "embed"),
  "gate_proj.kernel": ("embed", "mlp"),
  "up_proj.kernel": ("embed", "mlp"),
  "in_proj.kernel": ("embed", "mlp"),
  "down_proj.kernel": ("mlp", "embed"),
  "q_proj.bias": ("heads",),
  "k_proj.bias": ("kv_heads",),
  "v_proj.bias": ("kv_heads",),
  "gate_proj.bias": ("mlp",),
  "up_proj.bias": ("mlp",),
  # Embeddings and heads.
  "embed_tokens.embedding": ("vocab", "embed"),
  "embed_positions.embedding": (None, "embed"),
  "embed_token_types.embedding": (None, "embed"),
  "relative_bias.embedding": (None, "heads"),
  "project_in.kernel": (None, "embed"),
  "project_out.kernel": ("embed", None),
  "lm_head.kernel": ("embed", "vocab"),
  "lm_head.dense.kernel": ("embed", None),
  "lm_head.decoder.kernel": ("embed", "vocab"),
  "lm_head.decoder.bias": ("vocab",),
  "lm_head.bias": ("vocab",),
  "pooler.kernel": ("embed", None),
  "sequence_dense.kernel": ("embed", None),
  "sequence_classifier.kernel": ("embed", None),
  "token_classifier.kernel": ("embed", None),
  "classifier.kernel": ("embed", None),
  "class_classifier.kernel": ("embed", None),
  "distillation_classifier.kernel": ("embed", None),
  # Images.
  "embed_patches.kernel": (None, None, None, "embed"),
  "embed_positions": (None, None, "embed"),
  "class_token": (None, None, "embed"),
  "distillation_token": (None, None, "embed"),
  "relative_position_bias": (None, "heads"),
  "merging.reduction.kernel": (None, "embed"),
  "conv.kernel": (None, None, None, "channels"),
}

# Logical axis -> the mesh axes that it is cut over. An axis that is not here is not cut.
RULES: Rules = {
  "batch": ("data", "fsdp"),
  "embed": ("fsdp",),
  "channels": ("fsdp",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
}

CACHE_ENTRY = ("batch", "kv_heads", None, None)

# The parts of a packed weight (`common.quantization`) are cut like the kernel that they replace.
_PACKED = (".weight.values", ".weight.scales", ".weight.zero_points")


def logical_axes(name: str, ndim: int, table: Table = PARAMETERS) -> tuple[str | None, ...]:
  """Logical axes of the parameter `name`, one for each of its `ndim` dimensions.

  Scalars and vectors that the table does not list (norms, biases of the residual stream, counters)
  are whole on every device. In a stack of blocks (`common.models.scan`) "layers" comes first.

  Args:
    name: dotted; the optimizer's prefixes and NNX's "value" do not matter.
    ndim: number of dimensions.
    table: `PARAMETERS`, or with a project's own rows: `PARAMETERS | {...}`.

  Raises:
    ValueError: a matrix that the table does not list, or lists with other dimensions.
  """
  parts = [part for part in name.split(".") if part != "value"]
  name = ".".join(parts)
  stacked = "blocks" in parts and not parts[parts.index("blocks") + 1].isdigit()
  layers = ("layers",) if stacked else ()
  ending = next((end for end in _PACKED if name.endswith(end)), "")
  key = name.removesuffix(ending) + ".kernel" if ending else name
  ends = [".".join(key.split(".")[i:]) for i in range(key.count(".") + 1)]
  axes = next((table[end] for end in ends if end in table), None)
  dims = ndim - len(layers)
  if axes is None:
    if dims > 1:
      raise ValueError(
        f"no logical axes for {name} ({ndim} dimensions): add a row to the table of "
        "common/models/sharding.py, or pass one with it"
      )
    axes = (None,) * dims
  if dims <= 0:
    return (None,) * ndim  # A scalar beside a parameter, such as a step count.
  if len(axes) != dims:
    raise ValueError(f"{name} has {ndim} dimensions; its logical axes are {layers + axes}")
  return layers + axes


def tensor_parallel(path: str) -> TensorParallel | None:
  """Which dimension of the kernel [in, out] of the linear at `path` the tensor axis cuts."""
  try:
    axes = logical_axes(f"{path}.kernel", 2)
  except ValueError:
    return None  # Of a model that the table does not know.
  inputs, columns = (TENSOR_AXIS in RULES.get(axis, ()) for axis in axes)
  return "inputs" if inputs else "columns" if columns else None


def shardings(
  tree: PyTree, mesh: jax.sharding.Mesh, *, table: Table = PARAMETERS, rules: Rules = RULES
) -> PyTree:
  """A NamedSharding for every array of parameters, an optimizer's state or a whole TrainState.

  Args:
    tree: arrays or jax.ShapeDtypeStructs.
    mesh: of `make_mesh`.
    table: logical axes by name.
    rules: mesh axes by logical axis; `RULES | {"vocab": ()}` leaves a vocabulary whole.

  Raises:
    UserError: a mesh axis does not divide a dimension.
    ValueError: see `logical_axes`.
  """

  def place(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return _sharding(name, x.shape, logical_axes(name, x.ndim, table), mesh, rules)

  return jax.tree.map_with_path(place, tree)


def cache_shardings(cache: PyTree, mesh: jax.sharding.Mesh, *, rules: Rules = RULES) -> PyTree:
  """Shardings of a KVCache: its rows like the batch, its heads like the key and value heads.

  Raises:
    UserError: a mesh axis does not divide the batch or the number of key/value heads.
  """

  def place(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if name.startswith(("keys", "values")):
      axes = ("layers",) * (x.ndim - len(CACHE_ENTRY)) + CACHE_ENTRY
    else:
      axes = ("batch", None)[: x.ndim]
    return _sharding(f"cache.{name}", x.shape, axes, mesh, rules)

  return jax.tree.map_with_path(place, cache)


def batch_sharding(mesh: jax.sharding.Mesh, *, rules: Rules = RULES) -> NamedSharding:
  """Rows over the batch's mesh axes; for every array of a batch and for `train`."""
  return NamedSharding(mesh, PartitionSpec(rules["batch"]))


def place(tree: PyTree, tree_shardings: PyTree) -> PyTree:
  """Abstract arrays (jax.ShapeDtypeStruct) with shardings, to compile or to restore onto."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    tree,
    tree_shardings,
  )


def cut_over_mesh(module: nnx.Module) -> nnx.Module:
  """Lays a model's arrays over the current mesh, in place; without one (`jax.set_mesh`) where they are.

  A matrix that `PARAMETERS` does not list is whole on every device.

  Raises:
    UserError: a mesh axis does not divide a dimension.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return module

  def cut(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    try:
      axes = logical_axes(name, x.ndim)
    except ValueError:
      axes = (None,) * x.ndim
    return jax.device_put(x, _sharding(name, x.shape, axes, mesh, RULES))

  nnx.update(module, jax.tree.map_with_path(cut, nnx.state(module)))
  return module


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Cuts an activation over the current mesh; without one (`jax.set_mesh`) the identity.

  Args:
    x: an array.
    axes: the logical axis of each dimension. One without a rule ("residual") is kept whole on
      every device; None, and one that the mesh does not divide, is left to the compiler.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  # Under shard_map some axes are manual: they are the caller's business.
  auto = {n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == jax.sharding.AxisType.Auto}

  def mesh_axes(axis, size):
    names = RULES.get(axis, ())
    if axis is None or not auto.issuperset(names):
      return PartitionSpec.UNCONSTRAINED
    divides = size % math.prod(mesh.shape[n] for n in names) == 0
    return names if divides else PartitionSpec.UNCONSTRAINED

  return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(mesh_axes, axes, x.shape)))


def _sharding(name, shape, axes, mesh: jax.sharding.Mesh, rules: Rules) -> NamedSharding:
  spec = []
  for i, (axis, size) in enumerate(zip(axes, shape)):
    names = tuple(n for n in rules.get(axis, ()) if mesh.shape[n] > 1) if size > 1 else ()
    count = math.prod(mesh.shape[n] for n in names)
    if size % count:
      wanted = " x ".join(f"{n}={mesh.shape[n]}" for n in names)
      raise UserError(
        f"the mesh axis {wanted} does not divide dimension {i} ({axis}) of {name}, which has size "
        f"{size} in {list(shape)}: choose another mesh, or leave the axis {axis!r} out of the rules"
      )
    spec.append(names or None)
  return NamedSharding(mesh, PartitionSpec(*spec))
