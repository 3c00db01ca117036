"""Matrix product with weight-only quantized weights: the one public function."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.partitioning import (
  TensorParallel,
  of_rows,
  on_parts,
  part,
  tensor_size,
  weight_axes,
)
from kernels.platform import has_tpu
from kernels.quantized_matmul import mosaic_gpu, mosaic_tpu, xla
from kernels.quantized_matmul.packing import SUPPORTED_BITS, WORD_ROWS, packed_dtype

Array = jax.Array

# Chips whose matrix unit multiplies 8-bit integers.
_MOSAIC_TPU_KINDS = ("TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite")
_IMPLEMENTATIONS = {"xla": xla, "mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu}


def quantized_matmul(
  x: Array,
  values: Array,
  scales: Array,
  zero_points: Array | None = None,
  *,
  bits: int,
  low_rank: tuple[Array, Array] | None = None,
  input_scale: Array | None = None,
  input_shift: Array | None = None,
  tensor_parallel: TensorParallel | None = None,
  implementation: Literal["xla", "mosaic_tpu", "mosaic_gpu"] | None = None,
) -> Array:
  """Computes x @ W for W [in, out] stored in low-bit codes, and what methods put around it:

    x~ = (x - z) / s,     y = x~ W + (x~ A) B

  s alone is SmoothQuant's (Xiao et al. 2023, equation 3), with z it is Outlier Suppression+'s (Wei et
  al. 2023, section 4.1): W is then diag(s) times the original weight, and z times that is in the bias.
  A B is LoRC's of the error of W (ZeroQuant-V2, section 5), or QLLM's while it learns (section 4.2).
  It stands beside W, and so takes x~.

  Args:
    x: [..., in], float32 or bfloat16.
    values: packed codes of W: [in, out] in a native 2-, 4- or 8-bit type, or uint32
      [3 ceil(in / 32), out] for 3 bits (`packing.pack`).
    scales: [in / group, out] (groups along the input), [in, out / group] (along the output) or
      [1, 1] (per tensor), any float type.
    zero_points: unsigned codes of the value 0, shaped like `scales`; None for symmetric codes.
    bits: 2, 3, 4, 6 or 8; 6-bit codes are stored as 8-bit ones.
    low_rank: A [in, r] and B [r, out], floating point.
    input_scale: s, [in]; input_shift: z, [in], floating point. x~ is rounded to x's dtype.
    tensor_parallel: "columns" or "inputs", whichever of W the mesh axis "tensor" cuts; None if
      neither. For mosaic_tpu: XLA sees how the arrays lie.
    implementation: "xla" for any arguments and platform, "mosaic_tpu" for a few rows on TPU,
      "mosaic_gpu" for bfloat16 x on Hopper GPUs (see their `unsupported`). None picks mosaic_tpu
      where it supports the arguments, on one TPU, or each TPU's part of them on a mesh of TPUs
      (`jax.set_mesh`), which cuts x's first dimension and W (`kernels/partitioning.py`), unless the
      mesh has a tensor axis and W is whole. mosaic_gpu, which has not run on a GPU yet, has to be
      named.

  Returns:
    [..., out] in x's dtype; sums are accumulated in float32. Differentiable by x, scales, low_rank,
    input_scale and input_shift.

  Raises:
    ValueError: an argument has an unsupported value, shape or type, or the implementation that is
      named does not support them.
  """
  if implementation is not None and implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"implementation {implementation!r} is not supported; supported: {', '.join(_IMPLEMENTATIONS)}"
    )
  if bits not in SUPPORTED_BITS:
    raise ValueError(f"{bits} bits are not supported; supported: {SUPPORTED_BITS}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be floating point, got {x.dtype}")
  if x.ndim == 0:
    raise ValueError("x must have at least one dimension")
  rows, columns = x.shape[-1], values.shape[-1]
  expected = (3 * -(-rows // WORD_ROWS) if bits == 3 else rows, columns)
  if values.shape != expected:
    raise ValueError(f"values have shape {values.shape}, expected {expected} for x {x.shape}")
  # A signed code read as unsigned, or the other way round, would be silently wrong.
  dtype = packed_dtype(bits, signed=zero_points is None)
  if values.dtype != dtype:
    raise ValueError(f"values are {values.dtype}, expected {jnp.dtype(dtype)}")
  if scales.ndim != 2 or 0 in scales.shape or rows % scales.shape[0] or columns % scales.shape[1]:
    raise ValueError(f"scales {scales.shape} do not divide the weights ({rows}, {columns})")
  if zero_points is not None and zero_points.shape != scales.shape:
    raise ValueError(f"zero_points {zero_points.shape} differ from scales {scales.shape}")
  _check_around(low_rank, input_scale, input_shift, rows, columns)
  if bits == 6:
    bits = 8  # The same arrays: zero points are absolute, and signs are extended.
  # Whole groups, and as many on each device.
  inputs_cut, columns_cut = weight_axes(
    tensor_parallel,
    inputs=(rows, values.shape[0], scales.shape[0]),
    columns=(columns, scales.shape[1]),
  )
  x_spec, values_spec = of_rows(x, inputs_cut), PartitionSpec(inputs_cut, columns_cut)
  scales_spec = PartitionSpec(
    inputs_cut if scales.shape[0] > 1 else (), columns_cut if scales.shape[1] > 1 else ()
  )
  x_part = part(x, x_spec, jnp.float32 if inputs_cut else x.dtype)
  parts = x_part, part(values, values_spec), part(scales, scales_spec)
  problems = {
    "mosaic_tpu": mosaic_tpu.unsupported(*parts, bits=bits),
    "mosaic_gpu": mosaic_gpu.unsupported(x, values, scales, bits=bits),
  }
  if problem := problems.get(implementation):
    raise ValueError(
      f"{implementation} does not support {problem}; implementation=None or 'xla' does"
    )
  if implementation is None:
    # To gather a weight, or to compute all of it everywhere, costs more than XLA's product of parts.
    cut = tensor_size() == 1 or inputs_cut or columns_cut
    if not problems["mosaic_tpu"] and cut and has_tpu(_MOSAIC_TPU_KINDS):
      implementation = "mosaic_tpu"
    else:
      implementation = "xla"
  # XLA does what is around a kernel: on TPU it all stays on the chip (benchmarks/kernels/fused_tpu).
  x = xla.transform_input(x, input_scale, input_shift)
  function = functools.partial(_IMPLEMENTATIONS[implementation].quantized_matmul, bits=bits)
  if implementation == "mosaic_tpu":
    function = functools.partial(_sum_of_products, function, inputs_cut) if inputs_cut else function
    specs = (x_spec, values_spec, scales_spec, scales_spec)
    function = on_parts(function, specs, of_rows(x, columns_cut))
  y = function(x, values, scales, zero_points)
  return y if low_rank is None else xla.add_low_rank(y, x, *low_rank)


def _sum_of_products(product, axes, x, *weight) -> Array:
  """The products of parts of x and W, summed over the devices before they are rounded to x's type."""
  return jax.lax.psum(product(x.astype(jnp.float32), *weight), axes).astype(x.dtype)


def _check_around(low_rank, input_scale, input_shift, rows: int, columns: int) -> None:
  for name, array in (("input_scale", input_scale), ("input_shift", input_shift)):
    if array is not None and (
      array.shape != (rows,) or not jnp.issubdtype(array.dtype, jnp.floating)
    ):
      raise ValueError(f"{name} is {array.dtype} {array.shape}, expected floating point ({rows},)")
  if low_rank is None:
    return
  a, b = low_rank
  for name, array in (("A", a), ("B", b)):
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f"{name} of low_rank is {array.dtype} {array.shape}, expected a floating-point matrix"
      )
  if (a.shape[0], b.shape[1]) != (rows, columns) or a.shape[1] != b.shape[0]:
    raise ValueError(
      f"low_rank has shapes {a.shape} and {b.shape}, expected ({rows}, r) and (r, {columns})"
    )
