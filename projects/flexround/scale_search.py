"""Where s1 and the zero point start: min-max, or a search that minimises |W - W_hat|^2.4."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.quantization import rtn
from common.quantization.quantized_array import IntegerFormat

Array = jax.Array

NUM_WIDTHS = 100
NORM = 2.4

# Zero points that are tried beside that of the min-max range, if the format has more codes.
MAX_ZERO_POINTS = 16


def initial_scales(
  kernel: Array, format: IntegerFormat, start: Literal["search", "min_max"]
) -> tuple[Array, Array]:
  """s1 and z to start from, both float32 [groups_in, groups_out] (z = 0 if symmetric).

  Args:
    kernel: [..., in, out]; the axes before the last are one input axis.
    format: the integer format.
    start: "search", or "min_max" with a range that contains 0.

  Raises:
    UserError: the start is unknown, or the group size does not divide the inputs.
  """
  if start not in ("search", "min_max"):
    raise UserError(f"start={start!r} is not supported; supported: search, min_max")
  format.num_groups((math.prod(kernel.shape[:-1]), kernel.shape[-1]))
  return _initial_scales(kernel, format, start)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _initial_scales(kernel: Array, format: IntegerFormat, start: str) -> tuple[Array, Array]:
  w = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
  return search_scales(w, format) if start == "search" else min_max_scales(w, format)


def min_max_scales(w: Array, format: IntegerFormat) -> tuple[Array, Array]:
  """Scales and zero points of the range of w [in, out] and 0."""
  ends = rtn.min_max_range(w, format, include_zero=True)
  scales, zero_points = rtn.range_to_scales(*ends, format)
  scales = scales.astype(jnp.float32)
  return scales, jnp.zeros_like(scales) if zero_points is None else zero_points


def search_scales(w: Array, format: IntegerFormat) -> tuple[Array, Array]:
  """The candidate with the least mean |w - w_hat|^2.4 of each group.

  Candidates of an asymmetric format: scales i/100 of the min-max range's, i = 1 ... 100, each with
  every zero point (of wide formats: 16 of them, evenly spaced, and the min-max range's own). Of a
  symmetric one: the scales.

  Args:
    w: [in, out] float32.
    format: the integer format.

  Returns:
    Scales and zero points [groups_in, groups_out], never worse than min-max.
  """
  widest, own_zero = min_max_scales(w, format)
  smallest, largest = format.code_range
  # In the reference's order, so that ties go to the same candidate: widths, then zero points.
  if format.symmetric:
    zeros = jnp.zeros(1)
  elif largest < MAX_ZERO_POINTS:
    zeros = jnp.arange(largest + 1.0)
  else:
    zeros = jnp.concatenate(
      [jnp.round(jnp.linspace(0, largest, MAX_ZERO_POINTS)), jnp.array([jnp.nan])]
    )
  shares = jnp.arange(1, NUM_WIDTHS + 1) / NUM_WIDTHS
  candidates = [x.ravel() for x in jnp.meshgrid(shares, zeros, indexing="ij")]

  def error(scales, zero_points):
    codes = rtn.encode(w, scales, zero_points, format)
    error = jnp.abs(rtn.decode(codes, scales, zero_points, format) - w) ** NORM
    return rtn.group(error, format).mean(axis=(1, 3))

  def step(best, candidate):
    share, zero = candidate
    scales = widest * share
    # NaN stands for the group's own.
    zero_points = jnp.where(jnp.isnan(zero), own_zero, zero)
    loss = error(scales, zero_points)
    better = loss < best[0]
    return jax.tree.map(
      lambda new, old: jnp.where(better, new, old), (loss, scales, zero_points), best
    ), None

  start = (error(widest, own_zero), widest, own_zero)
  (_, scales, zero_points), _ = jax.lax.scan(step, start, candidates)
  return scales, zero_points
