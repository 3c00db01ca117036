"""Quantized linear layers and how they are put into a model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.sharding import tensor_parallel
from common.models.surgery import get_module, linear_paths, replace_module
from common.quantization.quantized_array import QuantizedArray
from kernels.partitioning import TensorParallel
from kernels.quantized_matmul.api import quantized_matmul

Array = jax.Array


class QuantizedWeight(nnx.Variable):
  """An NNX variable that holds a `QuantizedArray`."""


class QuantizedLinear(nnx.Module):
  """x @ W + bias with W in low-bit codes; never holds the dequantized W.

  `tensor_parallel` says which dimension of W the mesh axis "tensor" cuts, as of `quantized_matmul`.
  """

  def __init__(
    self,
    weight: QuantizedArray,
    bias: Array | None = None,
    tensor_parallel: TensorParallel | None = None,
  ):
    self.weight = QuantizedWeight(weight)
    self.bias = None if bias is None else nnx.Param(bias)
    self.tensor_parallel = tensor_parallel

  def __call__(self, x: Array) -> Array:
    """[..., in] -> [..., out] in x's dtype."""
    w: QuantizedArray = self.weight.get_value()
    y = quantized_matmul(
      x,
      w.values,
      w.scales,
      w.zero_points,
      bits=w.format.bits,
      tensor_parallel=self.tensor_parallel,
    )
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def pack_linears(module: nnx.Module, weights: Mapping[str, QuantizedArray]) -> None:
  """Replaces the linear at each path by a `QuantizedLinear` with its bias, in place."""
  for path, weight in weights.items():
    bias = get_module(module, path).bias
    bias = None if bias is None else bias[...]
    packed = QuantizedLinear(weight, bias, tensor_parallel(path))
    replace_module(module, path, packed)


def set_kernels(module: nnx.Module, kernels: Mapping[str, Array]) -> None:
  """Sets the kernels [in, out] of the linears at the given paths, in place."""
  for path, kernel in kernels.items():
    # A new variable rather than a write: the kernel may belong to an inner trace (`lax.map`).
    get_module(module, path).kernel = nnx.Param(kernel)


def get_kernels(module: nnx.Module, paths: list[str] | None = None) -> dict[str, Array]:
  """Kernels [in, out] of the linears at `paths` (by default, of all)."""
  paths = linear_paths(module) if paths is None else paths
  return {path: get_module(module, path).kernel[...] for path in paths}


def quantized_weights(module: nnx.Module) -> dict[str, QuantizedArray]:
  """The packed weights below `module`, by path."""
  return {
    ".".join(map(str, path)): layer.weight.get_value()
    for path, layer in nnx.iter_modules(module)
    if isinstance(layer, QuantizedLinear)
  }


def bits_per_weight(module: nnx.Module) -> float:
  """Mean stored bits of the block linears' weights, quantized or not."""
  total_bits, total = 0.0, 0
  for _, layer in nnx.iter_modules(module):
    if isinstance(layer, QuantizedLinear):
      weight = layer.weight.get_value()
      size = weight.shape[0] * weight.shape[1]
      total_bits, total = total_bits + size * weight.bits_per_weight(), total + size
    elif isinstance(layer, nnx.Linear):
      kernel = layer.kernel[...]
      total_bits += kernel.size * jnp.finfo(kernel.dtype).bits
      total += kernel.size
  return total_bits / total
