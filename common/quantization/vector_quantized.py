"""Vector-quantized weights: how they are stored, counted, and used as a linear layer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.lookup_matmul.api import index_bits, lookup, lookup_matmul

Array = jax.Array

STORED_BITS = 16  # Of a codebook entry, a scale, a bias and a channel's place in the order.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VectorQuantizedArray:
  """A weight [in, out] as packed indices into codebooks. A pytree.

  Input channels are stored in `order`: outliers first, then the groups. Codebooks, scale and bias
  are float16, or float32 while they are trained.

  Attributes:
    indices: packed, of the channels behind the outliers (`lookup_matmul.pack_indices`).
    codebooks: [groups, k, v].
    residual_indices, residual_codebooks: of the second stage, or None.
    outlier_indices: packed, of the outlier channels, or None.
    outlier_codebook: [1, k0, v0], or None.
    scale, bias: of each input channel in the original order, [in], or None.
    order: original channel at each stored place, int32 [in], or None if they are in place.
    shape: (in, out).
    outliers: number of outlier channels.
  """

  indices: Array
  codebooks: Array
  residual_indices: Array | None
  residual_codebooks: Array | None
  outlier_indices: Array | None
  outlier_codebook: Array | None
  scale: Array | None
  bias: Array | None
  order: Array | None
  shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
  outliers: int = dataclasses.field(metadata={"static": True})

  def dequantize(self) -> Array:
    """float32 [in, out], in the original order."""
    rows, columns = self.shape
    rest = rows - self.outliers
    w = lookup(self.indices, self.codebooks.astype(jnp.float32), rest, columns)
    if self.residual_indices is not None:
      residual = self.residual_codebooks.astype(jnp.float32)
      w = w + lookup(self.residual_indices, residual, rest, columns)
    if self.outliers:
      outlier_codebook = self.outlier_codebook.astype(jnp.float32)
      first = lookup(self.outlier_indices, outlier_codebook, self.outliers, columns)
      w = jnp.concatenate([first, w])
    if self.order is not None:
      w = jnp.zeros_like(w).at[self.order].set(w)
    if self.scale is not None:
      w = w * self.scale.astype(jnp.float32)[:, None] + self.bias.astype(jnp.float32)[:, None]
    return w

  def matmul(self, x: Array) -> Array:
    """x @ W in x's dtype. x: [..., in] -> [..., out].

    Scale, bias and order are applied to x, which is smaller than W.
    """
    columns = self.shape[1]
    offset = None
    if self.scale is not None:
      offset = jnp.dot(x, self.bias.astype(x.dtype), preferred_element_type=jnp.float32)
      x = x * self.scale.astype(x.dtype)
    if self.order is not None:
      x = x[..., self.order]
    first, rest = x[..., : self.outliers], x[..., self.outliers :]
    y = lookup_matmul(
      rest,
      self.indices,
      self.codebooks,
      self.residual_indices,
      self.residual_codebooks,
      columns=columns,
    )
    if self.outliers:
      y = y + lookup_matmul(first, self.outlier_indices, self.outlier_codebook, columns=columns)
    if offset is not None:
      y = y + offset[..., None]
    return y.astype(x.dtype)

  def index_bits_per_weight(self) -> float:
    """Bits of the indices alone: (log2 k1 + log2 k2) / v1, outliers log2 k0 / v0."""
    rows, columns = self.shape

    def bits(codebook, rows):
      k, v = codebook.shape[1:] if codebook is not None else (1, 1)
      return rows * math.ceil(columns / v) * index_bits(k)

    rest = rows - self.outliers
    total = bits(self.codebooks, rest) + bits(self.residual_codebooks, rest)
    return (total + bits(self.outlier_codebook, self.outliers)) / (rows * columns)

  def bits_per_weight(self) -> float:
    """Everything that is stored: indices, codebooks, scale, bias and order, 16 bits a value."""
    others = (
      self.codebooks,
      self.residual_codebooks,
      self.outlier_codebook,
      self.scale,
      self.bias,
      self.order,
    )
    values = sum(a.size for a in others if a is not None)
    return self.index_bits_per_weight() + STORED_BITS * values / math.prod(self.shape)


class PackedIndices(nnx.Variable):
  """An NNX variable that is not trained: packed indices, or the order of the channels."""


class VectorQuantizedLinear(nnx.Module):
  """x @ W + bias with W as indices into codebooks; never holds the dequantized W between calls.

  Codebooks and the channels' scale and bias are `nnx.Param`s, which can be trained.
  """

  def __init__(self, weight: VectorQuantizedArray, bias: Array | None = None):
    param = lambda a: None if a is None else nnx.Param(a)
    fixed = lambda a: None if a is None else PackedIndices(a)
    self.indices = fixed(weight.indices)
    self.codebooks = param(weight.codebooks)
    self.residual_indices = fixed(weight.residual_indices)
    self.residual_codebooks = param(weight.residual_codebooks)
    self.outlier_indices = fixed(weight.outlier_indices)
    self.outlier_codebook = param(weight.outlier_codebook)
    self.weight_scale = param(weight.scale)
    self.weight_bias = param(weight.bias)
    self.order = fixed(weight.order)
    self.shape = weight.shape
    self.outliers = weight.outliers
    self.bias = param(bias)

  @property
  def weight(self) -> VectorQuantizedArray:
    value = lambda variable: None if variable is None else variable[...]
    return VectorQuantizedArray(
      indices=value(self.indices),
      codebooks=value(self.codebooks),
      residual_indices=value(self.residual_indices),
      residual_codebooks=value(self.residual_codebooks),
      outlier_indices=value(self.outlier_indices),
      outlier_codebook=value(self.outlier_codebook),
      scale=value(self.weight_scale),
      bias=value(self.weight_bias),
      order=value(self.order),
      shape=self.shape,
      outliers=self.outliers,
    )

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out] in x's dtype."""
    y = self.weight.matmul(x)
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def vector_quantized_weights(module: nnx.Module) -> dict[str, VectorQuantizedArray]:
  """The vector-quantized weights below `module`, by path."""
  return {
    ".".join(map(str, path)): layer.weight
    for path, layer in nnx.iter_modules(module)
    if isinstance(layer, VectorQuantizedLinear)
  }


def mean_bits(module: nnx.Module) -> tuple[float, float]:
  """(bits of the indices, bits of all that is stored) per weight of the quantized linears."""
  weights = vector_quantized_weights(module).values()
  sizes = [math.prod(w.shape) for w in weights]
  mean = lambda bits: sum(b * n for b, n in zip(bits, sizes)) / sum(sizes)
  return (
    mean([w.index_bits_per_weight() for w in weights]),
    mean([w.bits_per_weight() for w in weights]),
  )
