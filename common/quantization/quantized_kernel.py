"""Layers whose kernel is computed from variables that a quantizer learns."""

import functools
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from common.models.surgery import get_module, replace_module

Array = jax.Array


class QuantizedKernel(nnx.Module):
  """A linear or convolution whose kernel is what `weight()` returns, in the kernel's shape.

  `weight` is an NNX module without arguments: it holds the original kernel and `Learned` variables,
  and returns the rounded kernel with the gradients that its method defines.
  """

  def __init__(self, layer: nnx.Linear | nnx.Conv, weight: Callable[[], Array]):
    self.layer = layer
    self.weight = weight

  def __call__(self, x: Array) -> Array:
    return self.rounded_layer()(x)

  def rounded_layer(self) -> nnx.Linear | nnx.Conv:
    """A copy of the layer with the rounded kernel: what is left when learning is over."""
    layer = nnx.clone(self.layer)
    layer.kernel = nnx.Param(self.weight().astype(self.layer.kernel.dtype))
    return layer


def quantize_kernels(module: nnx.Module, weights: Mapping[str, nnx.Module]) -> None:
  """Lets `weights[path]` compute the kernel of the layer at each path, in place."""
  for path, weight in weights.items():
    replace_module(module, path, QuantizedKernel(get_module(module, path), weight))


def quantized_kernels(module: nnx.Module) -> dict[str, nnx.Module]:
  """The modules that compute kernels below `module`, by the path of their layer."""
  return {
    ".".join(map(str, path)): layer.weight
    for path, layer in nnx.iter_modules(module)
    if isinstance(layer, QuantizedKernel)
  }


def freeze_kernels(module: nnx.Module) -> None:
  """Puts plain layers with the rounded kernels back, in place."""
  for path, kernel in _rounded_kernels(*nnx.split(module)).items():
    layer = nnx.clone(get_module(module, path).layer)
    layer.kernel = nnx.Param(kernel.astype(layer.kernel.dtype))
    replace_module(module, path, layer)


@functools.partial(jax.jit, static_argnums=0)
def _rounded_kernels(graphdef, state):
  """{path: what its `weight` returns}: one program for a module, not one per operation."""
  return {p: weight() for p, weight in quantized_kernels(nnx.merge(graphdef, state)).items()}
