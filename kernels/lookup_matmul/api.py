"""Matrix product with vector-quantized weights: indices into codebooks of short vectors."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.lookup_matmul import mosaic_tpu, xla
from kernels.lookup_matmul.packing import (
  group_rows,
  index_bits,
  pack_indices,
  packed_shape,
  unpack_indices,
)
from kernels.lookup_matmul.xla import lookup
from kernels.partitioning import (
  TensorParallel,
  of_rows,
  on_parts,
  part,
  tensor_size,
  weight_axes,
)
from kernels.platform import has_tpu

__all__ = ["index_bits", "lookup", "lookup_matmul", "pack_indices", "unpack_indices"]

Array = jax.Array

_MOSAIC_TPU_KINDS = ("TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite")
# Of a codebook, for the kernel to be picked: XLA may look up in larger ones on SparseCores (v5p), and how
# long that takes has not been counted.
_MAX_CENTROIDS = 8192
_IMPLEMENTATIONS = ("xla", "mosaic_tpu")


def lookup_matmul(
  x: Array,
  planes: Array,
  codebooks: Array,
  residual_planes: Array | None = None,
  residual_codebooks: Array | None = None,
  *,
  columns: int,
  tensor_parallel: TensorParallel | None = None,
  implementation: Literal["xla", "mosaic_tpu"] | None = None,
) -> Array:
  """Computes x @ W for W = codebook[index] (+ residual_codebook[residual_index]).

  Args:
    x: [..., in], float32 or bfloat16.
    planes: packed indices, uint32 (`pack_indices` of [in, ceil(out / v)]).
    codebooks: [groups, k, v], any float type; groups divides in, k is a power of two from 2 to
      65536.
    residual_planes, residual_codebooks: of the second stage, or None.
    columns: out.
    tensor_parallel: "columns" or "inputs", whichever of W the mesh axis "tensor" cuts; None if
      neither. For mosaic_tpu: XLA sees how the arrays lie.
    implementation: "xla" for any arguments and platform, "mosaic_tpu" for a few rows on TPU (see its
      `unsupported`). None picks mosaic_tpu where it supports the arguments, for up to 8192 centroids,
      on one TPU, or each TPU's part of them on a mesh of TPUs (`jax.set_mesh`), which cuts x's first
      dimension and W (`kernels/partitioning.py`), unless the mesh has a tensor axis and W is whole.

  Returns:
    float32 [..., out], accumulated in float32. With bfloat16 x the weights are rounded to bfloat16:
    by xla the sum of the stages, by mosaic_tpu each stage.

  Raises:
    ValueError: an argument has an unsupported value, shape or type, or the implementation that is
      named does not support them.
  """
  if implementation is not None and implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"implementation {implementation!r} is not supported; supported: {', '.join(_IMPLEMENTATIONS)}"
    )
  if x.ndim == 0 or x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 or bfloat16 [..., in]")
  if (residual_planes is None) != (residual_codebooks is None):
    raise ValueError("residual_planes and residual_codebooks go together")
  stages = [("planes", planes, codebooks)]
  if residual_planes is not None:
    stages.append(("residual_planes", residual_planes, residual_codebooks))
  for name, packed, books in stages:
    if books.ndim != 3 or not books.shape[0] or x.shape[-1] % books.shape[0]:
      raise ValueError(f"codebooks {books.shape}, expected [groups, k, v] for {x.shape[-1]} inputs")
    k, v = books.shape[1:]
    if not 2 <= k <= 65536 or k != 2 ** index_bits(k):
      raise ValueError(f"{k} centroids, expected a power of two from 2 to 65536")
    expected = packed_shape(x.shape[-1], k, -(-columns // v))
    if packed.dtype != jnp.uint32 or packed.shape != expected:
      raise ValueError(f"{name} are {packed.dtype} {packed.shape}, expected uint32 {expected}")
  weights = [(packed, books) for _, packed, books in stages]
  inputs_cut, columns_cut = _cut(x, weights, columns, tensor_parallel)
  x_spec = of_rows(x, inputs_cut)
  specs = [
    (
      PartitionSpec(inputs_cut, None, columns_cut),
      PartitionSpec(inputs_cut if len(books) > 1 else ()),
    )
    for _, books in weights
  ]
  problems = (
    mosaic_tpu.unsupported(part(x, x_spec), part(books, spec))
    for (_, books), (_, spec) in zip(weights, specs)
  )
  problem = next(filter(None, problems), None)
  if implementation == "mosaic_tpu" and problem:
    raise ValueError(f"mosaic_tpu does not support {problem}; implementation=None or 'xla' does")
  if implementation is None:
    pays = not problem and all(books.shape[1] <= _MAX_CENTROIDS for _, books in weights)
    # To gather a weight, or to compute all of it everywhere, costs more than XLA's product of parts.
    pays = pays and (tensor_size() == 1 or bool(inputs_cut or columns_cut))
    implementation = "mosaic_tpu" if pays and has_tpu(_MOSAIC_TPU_KINDS) else "xla"
  if implementation == "xla":
    return xla.lookup_matmul(x, planes, codebooks, residual_planes, residual_codebooks, columns)
  columns //= tensor_size() if columns_cut else 1

  def multiply(x, weights):
    y = sum(mosaic_tpu.lookup_matmul(x, packed, books, columns) for packed, books in weights)
    return jax.lax.psum(y, inputs_cut) if inputs_cut else y

  return on_parts(multiply, (x_spec, specs), of_rows(x, columns_cut))(x, weights)


def _cut(x: Array, weights, columns: int, tensor_parallel: TensorParallel | None):
  """As `weight_axes`; groups of packed inputs and vectors stay whole."""
  inputs = x.shape[-1]
  can_be = {
    "inputs": inputs % group_rows(inputs) == 0,
    "columns": all(columns % books.shape[2] == 0 for _, books in weights),
  }
  return weight_axes(
    tensor_parallel if can_be.get(tensor_parallel, True) else None,
    inputs=tuple(size for packed, books in weights for size in (len(packed), len(books))),
    columns=tuple(packed.shape[2] for packed, _ in weights),
  )
