"""AdaRound: learned rounding, up or down (Nagel et al., ICML 2020, arXiv 2004.10568).

    W_hat = s (clip(floor(W / s) + h(V) + z, codes) - z)
    h(V)  = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),  zeta = 1.1, gamma = -0.1     (eq. 23)
    loss  = reconstruction + lambda sum (1 - |2 h(V) - 1|^beta)                          (eq. 24)

beta falls from 20 to 2 after a warm-up, which drives every h to 0 or 1. `reconstruct` trains V with
`adaround_objective`; `harden` then rounds h itself.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import quantized_kernels
from common.quantization.reconstruction import Learned
from common.quantization.rtn import spread
from common.quantization.straight_through import clip_ste

Array = jax.Array

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Array) -> Array:
  """h(V) in [0, 1]; it reaches both ends, where its gradient is 0."""
  return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


class AdaRound(nnx.Module):
  """A kernel whose weights are rounded up or down; a `weight` of `QuantizedKernel`.

  V starts where h(V) is the fraction of W / s: the soft kernel is then W itself, where W is in the
  range. `reconstruct` must therefore be told `keep_best=False`.
  """

  def __init__(
    self, kernel: Array, scales: Array, zero_points: Array | None, format: IntegerFormat
  ):
    """A kernel [..., in, out] with fixed scales and zero points [groups_in, groups_out]."""
    scales = scales.astype(jnp.float32)
    zero_points = jnp.zeros_like(scales) if zero_points is None else zero_points
    self.scales = nnx.Param(scales)
    self.zero_points = nnx.Param(zero_points.astype(jnp.float32))
    # An array: kernels of all widths then share compilations.
    self.code_range = nnx.Param(jnp.asarray(format.code_range, jnp.float32))
    steps = kernel.astype(jnp.float32) / spread(scales, kernel.shape)
    self.floor = nnx.Param(jnp.floor(steps))
    share = jnp.clip((steps - jnp.floor(steps) - GAMMA) / (ZETA - GAMMA), 1e-6, 1 - 1e-6)
    self.v = Learned(jnp.log(share) - jnp.log1p(-share))
    self.hard = False

  def rounding(self) -> Array:
    """h(V), or 0 and 1 once the module is hard."""
    if self.hard:
      return (self.v[...] >= 0).astype(jnp.float32)
    return rectified_sigmoid(self.v[...])

  def codes(self) -> Array:
    """Codes with the zero point added, in the kernel's shape; integers once the module is hard."""
    zero = spread(self.zero_points[...], self.floor.shape)
    low, high = self.code_range[...]
    return clip_ste(self.floor[...] + self.rounding() + zero, low, high)

  def __call__(self) -> Array:
    """The rounded kernel, float32 [..., in, out]."""
    shape = self.floor.shape
    return (self.codes() - spread(self.zero_points[...], shape)) * spread(self.scales[...], shape)


def harden(module: nnx.Module) -> None:
  """Rounds the h(V) of every `AdaRound` below `module` to 0 or 1, in place."""
  for weight in quantized_kernels(module).values():
    if isinstance(weight, AdaRound):
      weight.hard = True


def adaround_objective(
  student: nnx.Module,
  output: Array,
  target: Array,
  progress: Array,
  *,
  regularization: float = 0.01,
  warmup: float = 0.2,
  beta_start: float = 20.0,
  beta_end: float = 2.0,
) -> Array:
  """The objective of `reconstruct`, float32 []; eq. 25 with BRECQ's scale of the first term.

  Squared errors are summed over an output's last axis and averaged over the others. The second term
  begins after the warm-up; from then on beta falls linearly.

  Args:
    student: the block, with `AdaRound` weights.
    output, target: [samples, ..., features].
    progress: share of the steps that are over, in [0, 1).
    regularization: lambda.
    warmup: share of the steps.
    beta_start, beta_end: ends of beta.
  """
  error = output.astype(jnp.float32) - target.astype(jnp.float32)
  loss = jnp.mean(jnp.sum(error**2, axis=-1))
  since = jnp.clip((progress - warmup) / (1 - warmup), 0, 1)
  beta = beta_start + (beta_end - beta_start) * since
  undecided = lambda h: jnp.sum(1 - jnp.abs(2 * h - 1) ** beta)
  weights = [w for w in quantized_kernels(student).values() if isinstance(w, AdaRound)]
  total = sum(undecided(weight.rounding()) for weight in weights)
  return loss + jnp.where(progress < warmup, 0.0, regularization * total)
