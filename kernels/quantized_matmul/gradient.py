"""Kernels that are differentiated as the reference is."""

import functools
from collections.abc import Callable

import jax

from kernels.quantized_matmul import xla

Array = jax.Array


def with_reference_gradient(kernel: Callable[..., Array]) -> Callable[..., Array]:
  """A kernel (x, values, scales, zero_points, bits) whose gradients of x and scales are those of xla."""
  function = jax.custom_vjp(kernel, nondiff_argnums=(4,))

  def forward(x, values, scales, zero_points, bits):
    return kernel(x, values, scales, zero_points, bits), (x, values, scales, zero_points)

  def backward(bits, residuals, grad):
    x, values, scales, zero_points = residuals
    reference = lambda x, scales: xla.quantized_matmul(x, values, scales, zero_points, bits=bits)
    x_grad, scales_grad = jax.vjp(reference, x, scales)[1](grad)
    return x_grad, None, scales_grad, None

  function.defvjp(forward, backward)
  return functools.wraps(kernel)(function)
