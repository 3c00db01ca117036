"""Activation functions by name.

They are module-level functions, so that equal blocks have equal graph definitions and share
compilations.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "tanh"]


def gelu(x: Array) -> Array:
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
  return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
  return x * jax.nn.sigmoid(1.702 * x)


def relu_squared(x: Array) -> Array:
  return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "quick_gelu": quick_gelu,
  "relu": jax.nn.relu,
  "relu_squared": relu_squared,
  "tanh": jnp.tanh,
}
