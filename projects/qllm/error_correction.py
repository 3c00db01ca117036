"""Efficient error correction (QLLM, section 4.2): a low-rank term learned beside rounded weights.

  W_student = Q(W) + (alpha / r) A B,       A [in, r],  B [r, out],  alpha = 1

Q(W) has no gradient. A group of consecutive blocks is tuned jointly, to give on the quantized
stream what the original blocks give on the full-precision stream. Afterwards the term is merged:
W + (alpha / r) A B is rounded as a whole (the official code, "requant"), or Q(W) + (alpha / r) A B is
left as it is (the student itself, "keep"; its weights are no longer few-bit).
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.errors import UserError
from common.models.sharding import tensor_parallel
from common.models.surgery import get_module, replace_module
from common.quantization import rtn
from common.quantization.linear import QuantizedLinear
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import QuantizedKernel, quantized_kernels
from common.quantization.reconstruction import Learned
from common.quantization.straight_through import straight_through

Array = jax.Array

Merge = Literal["requant", "keep"]


class LowRankKernel(nnx.Module):
  """Q(W) + A B / r: a `weight` of `QuantizedKernel`."""

  def __init__(self, kernel: Array, format: IntegerFormat, rank: int, key: Array):
    """kernel: W, [in, out]. A is uniform in 1 / sqrt(in) (Kaiming with a = sqrt(5)), B zero."""
    bound = 1 / math.sqrt(kernel.shape[0])
    shape = kernel.shape[0], rank
    self.format = format
    self.kernel = nnx.Param(kernel)
    self.a = Learned(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
    self.b = Learned(jnp.zeros((rank, kernel.shape[1]), jnp.float32))

  def __call__(self) -> Array:
    """float32 [in, out]."""
    return rtn.fake_quantize(self.kernel[...], self.format) + self._correction()

  def merged(self) -> Array:
    """W + A B / r, which is rounded next; float32 [in, out]."""
    return self.kernel[...].astype(jnp.float32) + self._correction()

  def _correction(self) -> Array:
    return jnp.matmul(self.a[...], self.b[...], precision="highest") / self.a.shape[1]


class TunedKernel(nnx.Module):
  """Q(W) with every weight trained through the rounding: the baseline "tuning quantized weights"."""

  def __init__(self, kernel: Array, format: IntegerFormat):
    self.format = format
    self.kernel = Learned(kernel.astype(jnp.float32))

  def __call__(self) -> Array:
    """float32 [in, out]."""
    w = self.kernel[...]
    return straight_through(w, rtn.fake_quantize(w, self.format))

  def merged(self) -> Array:
    """W, which is rounded next; float32 [in, out]."""
    return self.kernel[...]


class BlockGroup(nnx.Module):
  """Consecutive blocks that are all alike as one module; arrays are stacked, [blocks, ...].

  The blocks run in a scan, so that compiling does not depend on their number.

  Raises:
    UserError: the blocks differ in structure.
  """

  def __init__(self, blocks: Sequence[nnx.Module]):
    split = [nnx.split(block) for block in blocks]
    if any(graphdef != split[0][0] for graphdef, _ in split):
      raise UserError(
        "blocks with different attention windows cannot be tuned jointly: expected blocks that are "
        "all alike; use blocks_per_round=1"
      )
    self.size = len(blocks)
    states = [state for _, state in split]
    self.blocks = nnx.merge(split[0][0], _stack(states))

  def __call__(self, x: Array, context) -> tuple[Array, None]:
    """[batch, seq, dim] -> [batch, seq, dim] (and no cache)."""
    graphdef, state = nnx.split(self.blocks)

    def run(x, state):
      return nnx.merge(graphdef, state)(x, context)[0], None

    return jax.lax.scan(run, x, state)

  def unstack(self) -> list[nnx.Module]:
    """The blocks one by one."""
    graphdef, state = nnx.split(self.blocks)
    return [nnx.merge(graphdef, block) for block in _unstack(state, self.size)]


@jax.jit
def _stack(states):
  """States [...] of blocks as one, [blocks, ...]: one program for all leaves."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(state, size: int):
  block = lambda i: jax.tree.map(lambda leaf: leaf[i], state)
  return [block(i) for i in range(size)]


class BiasedNorm(nnx.Module):
  """The final norm with a bias that its tuning learns."""

  def __init__(self, norm: nnx.Module):
    self.norm = norm
    width = norm.scale.shape[0]
    self.bias = nnx.Param(jnp.zeros(width, norm.scale.dtype))

  def __call__(self, x: Array) -> Array:
    return self.norm(x) + self.bias[...].astype(x.dtype)


def run_norm(norm: nnx.Module, x: Array, context) -> Array:
  """How `reconstruct` calls a norm."""
  del context
  return norm(x)


def learn_norms_and_biases(module: nnx.Module, learn: bool = True) -> None:
  """Makes norm gains and all biases below `module` `Learned`, or plain parameters again; in place."""
  kind = Learned if learn else nnx.Param
  for _, part in nnx.iter_modules(module):
    if isinstance(part, nnx.RMSNorm | nnx.LayerNorm | nnx.Linear | BiasedNorm):
      for name in ("scale", "bias"):
        if (variable := getattr(part, name, None)) is not None:
          setattr(part, name, kind(variable[...]))


def merge_correction(block: nnx.Module, merge: Merge = "requant") -> nnx.Module:
  """A copy of a tuned block as it is used: packed linears, or plain ones of merge="keep"."""
  block = nnx.clone(block)
  learn_norms_and_biases(block, False)
  for path, weight in quantized_kernels(block).items():
    layer: QuantizedKernel = get_module(block, path)
    if merge == "keep":
      replace_module(block, path, layer.rounded_layer())
    else:
      bias = layer.layer.bias
      packed = _quantize(weight.merged(), weight.format)
      bias = None if bias is None else bias[...]
      replace_module(block, path, QuantizedLinear(packed, bias, tensor_parallel(path)))
  return block


@functools.cache
def make_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
  """AdamW without weight decay, linear to 0; one object for equal arguments, as compilations ask."""
  return optax.adamw(optax.linear_schedule(learning_rate, 0.0, num_steps), weight_decay=0.0)


_quantize = jax.jit(rtn.quantize, static_argnums=1)
