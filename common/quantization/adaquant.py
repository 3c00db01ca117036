"""AdaQuant: a learned offset of every weight and a learned step (Hubara et al., ICML 2021,
arXiv 2006.10518).

    W_hat = s (clip(round((W + V) / s) + z, codes) - z)          minimised over s and V (eq. 2)

Gradients pass the rounding. Any code can be reached, but unlike in FlexRound the gradient of V does
not depend on how large a weight is.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import Learned
from common.quantization.rtn import spread
from common.quantization.straight_through import clip_ste, round_ste

Array = jax.Array


class AdaQuant(nnx.Module):
  """A kernel with a learned offset and step; a `weight` of `QuantizedKernel`.

  The variables are V / s0 and log(s / s0), s0 the step to start from, so that one learning rate
  serves layers of any magnitude. At the start the kernel is rounded to nearest.
  """

  def __init__(
    self, kernel: Array, scales: Array, zero_points: Array | None, format: IntegerFormat
  ):
    """A kernel [..., in, out] with scales and zero points [groups_in, groups_out] to start from."""
    scales = scales.astype(jnp.float32)
    zero_points = jnp.zeros_like(scales) if zero_points is None else zero_points
    self.kernel = nnx.Param(kernel.astype(jnp.float32))
    self.initial_scales = nnx.Param(scales)
    self.zero_points = nnx.Param(zero_points.astype(jnp.float32))
    self.code_range = nnx.Param(jnp.asarray(format.code_range, jnp.float32))
    self.offset = Learned(jnp.zeros(kernel.shape, jnp.float32))
    self.log_scale = Learned(jnp.zeros_like(scales))

  def scales(self) -> Array:
    """s, float32 [groups_in, groups_out]."""
    return self.initial_scales[...] * jnp.exp(self.log_scale[...])

  def codes(self) -> Array:
    """Codes with the zero point added, integers as float32 in the kernel's shape."""
    shape = self.kernel.shape
    initial, scale = spread(self.initial_scales[...], shape), spread(self.scales(), shape)
    # Adding 0 * W keeps the true quotient, see `rtn.encode`.
    steps = (self.kernel[...] + self.offset[...] * initial) / (scale + 0 * self.kernel[...])
    low, high = self.code_range[...]
    return clip_ste(round_ste(steps) + spread(self.zero_points[...], shape), low, high)

  def __call__(self) -> Array:
    """The rounded kernel, float32 [..., in, out]."""
    shape = self.kernel.shape
    return (self.codes() - spread(self.zero_points[...], shape)) * spread(self.scales(), shape)
