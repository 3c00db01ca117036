"""`QuantizedArray`: a weight matrix in low-bit integer codes with scales and zero points."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from kernels.quantized_matmul.packing import SUPPORTED_BITS, WORD_ROWS, pack
from kernels.quantized_matmul.xla import dequantize

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class IntegerFormat:
  """A uniform integer format for weights [in, out].

  Attributes:
    bits: 2, 3, 4, 6 or 8.
    group_size: consecutive entries along `axis` that share a scale; -1 takes the whole axis
      (per channel).
    axis: 0 groups along the input (the usual choice: one scale per output channel and group), 1
      along the output, None shares one scale over the whole tensor.
    symmetric: codes are signed and 0 is exact; otherwise unsigned with a zero point.
    scale_dtype: what scales are stored as; codes are computed against the rounded scale.

  Raises:
    UserError: a value is outside the supported set.
  """

  bits: int
  group_size: int = -1
  axis: int | None = 0
  symmetric: bool = False
  scale_dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    # One spelling, so that equal formats are equal and hash alike (they are static under jit).
    object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
    if self.bits not in SUPPORTED_BITS:
      raise UserError(f"bits={self.bits} is not supported; supported: 2, 3, 4, 6, 8")
    if self.group_size != -1 and self.group_size < 1:
      raise UserError(f"group_size={self.group_size} must be positive, or -1 for the whole axis")
    if self.axis not in (0, 1, None):
      raise UserError(f"axis={self.axis} must be 0 (input), 1 (output) or None (per tensor)")

  @property
  def code_range(self) -> tuple[int, int]:
    """Smallest and largest code."""
    if self.symmetric:
      return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
    return 0, 2**self.bits - 1

  def num_groups(self, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight [in, out].

    Raises:
      UserError: the group size does not divide the grouped dimension.
    """
    if self.axis is None:
      return 1, 1
    size = shape[self.axis]
    group = size if self.group_size == -1 else self.group_size
    if size % group:
      raise UserError(
        f"group_size={group} does not divide the {('input', 'output')[self.axis]} dimension {size} "
        f"of a weight {tuple(shape)}"
      )
    return (size // group, shape[1]) if self.axis == 0 else (shape[0], size // group)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """Weights [in, out] as integer codes. A pytree.

  Attributes:
    values: packed codes (`kernels.quantized_matmul.packing`).
    scales: [groups_in, groups_out] in `format.scale_dtype`.
    zero_points: unsigned codes like `scales` (native type, uint8 for 3 bits), None if symmetric.
    format: bits, grouping and symmetry.
    shape: (in, out).
  """

  values: Array
  scales: Array
  zero_points: Array | None
  format: IntegerFormat = dataclasses.field(metadata={"static": True})
  shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

  def dequantize(self, dtype=jnp.float32) -> Array:
    """(code - zero_point) * scale, [in, out]."""
    return dequantize(
      self.values,
      self.scales,
      self.zero_points,
      bits=self.format.bits,
      rows=self.shape[0],
      dtype=jnp.dtype(dtype),  # As jnp.float32 it would be another program.
    )

  def bits_per_weight(self) -> float:
    """Bits per weight, scales and zero points included: N + (16 + N) / group for float16 scales."""
    bits = self.format.bits
    per_group = jnp.finfo(self.scales.dtype).bits + (0 if self.format.symmetric else bits)
    return bits + self.scales.size * per_group / float(np.prod(self.shape))

  def packed_bytes(self) -> int:
    """Bytes stored, on disk and in accelerator memory, with the padding of 3- and 6-bit codes.

    (XLA's CPU backend keeps one 2- or 4-bit value per byte.)
    """
    bits, (rows, columns) = self.format.bits, self.shape
    rows += -rows % WORD_ROWS if bits == 3 else 0
    bits = 8 if bits == 6 else bits
    zero_point_bits = 0 if self.format.symmetric else 8 if bits == 3 else bits
    per_group = jnp.finfo(self.scales.dtype).bits + zero_point_bits
    return -(-(rows * columns * bits + self.scales.size * per_group) // 8)


def from_codes(
  codes: Array, scales: Array, zero_points: Array | None, format: IntegerFormat
) -> QuantizedArray:
  """Packs integer codes [in, out] with their scales and zero points [groups_in, groups_out]."""
  if zero_points is not None:
    zero_points = pack(zero_points, 8 if format.bits == 3 else format.bits, signed=False)
  return QuantizedArray(
    values=pack(codes, format.bits, signed=zero_points is None),
    scales=scales.astype(format.scale_dtype),
    zero_points=zero_points,
    format=format,
    shape=tuple(codes.shape),
  )
