"""VPTQ: vector post-training quantization (Liu et al., EMNLP 2024, arXiv 2409.17066).

A weight is cut into short vectors along its output; every vector becomes the index of a centroid.
Weights are [in, out] here, the transpose of the paper's: its column n, one input channel, is row n.

  objective    tr(dW^T H dW),  H = E[x x^T]                                        (equation 2)
  assignment   nearest centroid, one input channel at a time: for a single channel the Lagrangian
               gives |w - c|^2 / (2 inv(H)_nn), so H only enters the feedback     (section 3.1)
  feedback     e = (w_n - q_n) / U_nn;  w_m -= U_nm e for m > n,  inv(H) = U^T U (upper)
  codebook     k-means with weight h_nn on every vector of channel n              (section 3.2)
  residual     a second codebook, of what the first pass left                     (section 3.3)
  outliers     the channels with the largest h_nn get a codebook of their own     (section 3.4)
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.errors import UserError
from common.quantization.gptq import inverse_cholesky
from common.quantization.vector_quantized import VectorQuantizedArray
from kernels.lookup_matmul.api import pack_indices
from projects.vptq.kmeans import nearest_centroid, weighted_kmeans

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VPTQSettings:
  """What a weight is quantized to, and how. Hashable: static under jit.

  Attributes:
    vector_length: v, outputs per vector.
    num_centroids: k, a power of two up to 65536.
    num_residual_centroids: of the second stage, 0 for none.
    num_groups: equal groups of input channels with a codebook each.
    outlier_fraction: of the input channels, quantized first with a codebook of their own.
    outlier_vector_length, num_outlier_centroids: of that codebook.
    permute: take the input channels by descending h_nn.
    normalize: map every input channel to [0, 1] before quantization (`enable_norm` of the code).
    norm_hessian: scale H along with the weights; False is the published code, which does not.
    hessian_weighted: k-means weights h_nn; False weighs all vectors alike.
    feedback: the remaining channels absorb the error; False only assigns.
    damping: added to the diagonal of H, as a fraction of its mean.
    block_size: channels between two updates of those behind.
    kmeans_iterations: at most.

  Raises:
    UserError: a value is outside the supported set.
  """

  vector_length: int = 6
  num_centroids: int = 4096
  num_residual_centroids: int = 0
  num_groups: int = 1
  outlier_fraction: float = 0.0
  outlier_vector_length: int = 4
  num_outlier_centroids: int = 4096
  permute: bool = True
  normalize: bool = True
  norm_hessian: bool = True
  hessian_weighted: bool = True
  feedback: bool = True
  damping: float = 0.01
  block_size: int = 128
  kmeans_iterations: int = 100

  def __post_init__(self):
    for name in ("num_centroids", "num_residual_centroids", "num_outlier_centroids"):
      k = getattr(self, name)
      none = name == "num_residual_centroids" and k == 0
      if not none and (k < 2 or k > 2**16 or k & (k - 1)):
        raise UserError(f"{name}={k} is not supported; choose a power of two from 2 to 65536")
    for name in ("vector_length", "outlier_vector_length", "num_groups", "block_size"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be at least 1")
    if not 0 <= self.outlier_fraction < 1:
      raise UserError(f"outlier_fraction={self.outlier_fraction} must be in [0, 1)")

  def num_outliers(self, rows: int) -> int:
    """Outlier channels of `rows`: the fraction, and as many as make the rest divide into groups."""
    outliers = math.ceil(self.outlier_fraction * rows)
    return outliers + (rows - outliers) % self.num_groups if outliers else 0

  def check(self, shape: tuple[int, int], name: str) -> None:
    """Checks that a weight [in, out] can be quantized.

    Raises:
      UserError: the groups do not divide, or there are fewer vectors than centroids.
    """
    rows, columns = shape
    outliers = self.num_outliers(rows)
    rest = rows - outliers
    if rest < 1 or rest % self.num_groups:
      raise UserError(
        f"{name} {tuple(shape)}: num_groups={self.num_groups} does not divide its {rest} input "
        "channels; choose a divisor, or give the remainder to outliers (outlier_fraction > 0)"
      )
    vectors = rest // self.num_groups * -(-columns // self.vector_length)
    needed = max(self.num_centroids, self.num_residual_centroids)
    outlier_vectors = outliers * -(-columns // self.outlier_vector_length)
    for have, want, what in (
      (vectors, needed, "a group"),
      (outlier_vectors if outliers else math.inf, self.num_outlier_centroids, "the outliers"),
    ):
      if have < want:
        raise UserError(
          f"{name} {tuple(shape)}: {what} has {have} vectors, fewer than {want} centroids; choose "
          "fewer centroids, fewer groups or shorter vectors"
        )


class Prepared(NamedTuple):
  """A weight as it is quantized: channels permuted and normalised.

  Attributes:
    w: float32 [in, out].
    h: the Hessian in these coordinates, [in, in], before damping.
    importance: h_nn, 0 for dead channels, [in]: the weight of a channel's vectors in k-means.
    scale, bias: of the normalisation in the original order, float16 [in], or None.
    order: the original channel at each place, int32 [in].
  """

  w: Array
  h: Array
  importance: Array
  scale: Array | None
  bias: Array | None
  order: Array


@functools.partial(jax.jit, static_argnames=("permute", "normalize", "norm_hessian"))
def prepare(
  w: Array, h: Array, *, permute: bool = True, normalize: bool = True, norm_hessian: bool = True
) -> Prepared:
  """Dead channels to 0, then normalisation W = scale W' + bias per channel, then permutation.

  H becomes diag(scale) H diag(scale), the Hessian of W' (unless `norm_hessian` is off).
  """
  w, h = w.astype(jnp.float32), h.astype(jnp.float32)
  dead = jnp.diag(h) == 0
  w = jnp.where(dead[:, None], 0.0, w)
  scale = bias = None
  if normalize:
    # Computed against what is stored. A constant channel, or one below float16's range, is all bias.
    bias = w.min(axis=1).astype(jnp.float16)
    scale = (w.max(axis=1) - w.min(axis=1)).astype(jnp.float16)
    scale = jnp.where(scale == 0, jnp.float16(1), scale)
    s = scale.astype(jnp.float32)
    w = (w - bias.astype(jnp.float32)[:, None]) / s[:, None]
    if norm_hessian:
      h = h * s[:, None] * s
  importance = jnp.diag(h)
  h = h + jnp.diag(dead.astype(h.dtype))
  order = jnp.arange(w.shape[0])
  if permute:
    order = jnp.argsort(-importance, stable=True)
  return Prepared(w[order], h[order][:, order], importance[order], scale, bias, order)


def to_vectors(w: Array, v: int) -> Array:
  """[in, out] -> [in, ceil(out / v), v], zeros behind the last output."""
  return jnp.pad(w, ((0, 0), (0, -w.shape[1] % v))).reshape(w.shape[0], -1, v)


def vector_mask(columns: int, v: int) -> Array:
  """1 for an output and 0 for what pads the last vector, float32 [ceil(out / v), v]."""
  return (jnp.arange(columns + -columns % v) < columns).astype(jnp.float32).reshape(-1, v)


inverse_factor = jax.jit(inverse_cholesky)


class Channels(NamedTuple):
  """Some of a weight's input channels: w [in, out], importance [in], their part of U [in, in]."""

  w: Array
  importance: Array
  u: Array


@functools.partial(jax.jit, static_argnames="count")
def cut(w: Array, importance: Array, u: Array, *, count: int) -> tuple[Channels, Channels, Array]:
  """The first `count` channels, the others, and the part of U between them [count, in - count].

  One program, and no other for each slice.
  """
  of = lambda part: Channels(w[part], importance[part], u[part, part])
  first, others = slice(count), slice(count, None)
  return of(first), of(others), u[first, others]


@jax.jit
def no_feedback(u: Array) -> Array:
  """The identity, in the place of U [in, in]: a channel's error stays its own."""
  return jnp.eye(len(u))


class ColumnPass(NamedTuple):
  """Result of one pass over the input channels.

  Attributes:
    indices: int32 [in, ceil(out / v)].
    residual_indices: likewise, or None.
    quantized: float32 [in, out].
    error: each channel as it came up, minus its quantized value, [in, out].
    feedback: error / U_nn, what the channels behind take up, [in, out].
  """

  indices: Array
  residual_indices: Array | None
  quantized: Array
  error: Array
  feedback: Array


@functools.partial(jax.jit, static_argnames="block_size")
def column_pass(
  w: Array,
  u: Array,
  codebooks: Array,
  residual_codebooks: Array | None = None,
  *,
  block_size: int = 128,
) -> ColumnPass:
  """Quantizes one input channel at a time; those behind absorb its error (section 3.1).

  Args:
    w: [in, out].
    u: upper triangular with inv(H) = U^T U, [in, in]. The identity means no feedback.
    codebooks: float32 [groups, k, v]; groups divides in.
    residual_codebooks: [groups, k2, v] for what the first centroid leaves, or None.
    block_size: channels between two updates of those behind; does not change the result.
  """
  rows, columns = w.shape
  groups, _, v = codebooks.shape
  mask = vector_mask(columns, v)
  residual = residual_codebooks is not None
  # Pad to whole blocks with channels that neither receive nor send any error.
  block = min(block_size, rows)
  padded = -rows % block
  w = jnp.pad(w.astype(jnp.float32), ((0, padded), (0, 0)))
  u = jnp.pad(u, ((0, padded), (0, padded)))
  u = u + jnp.diag((jnp.arange(rows + padded) >= rows).astype(u.dtype))

  def nearest(vectors, codebook):
    index = nearest_centroid(vectors, mask, codebook)
    return index, codebook[index]

  def quantize_channel(i, carry):
    part, start, u_block, out = carry
    group = jnp.minimum((start + i) // (rows // groups), groups - 1)
    current = part[i]
    vectors = to_vectors(current[None], v)[0]
    index, value = nearest(vectors, codebooks[group])
    residual_index = None
    if residual:
      residual_index, rest = nearest(vectors - value, residual_codebooks[group])
      value = value + rest
    value = value.reshape(-1)[:columns]
    error = current - value
    feedback = error / u_block[i, i]
    # U is upper triangular: channels before i get a zero coefficient.
    part = part - u_block[i][:, None] * feedback[None, :]
    new = ColumnPass(index, residual_index, value, error, feedback)
    return part, start, u_block, jax.tree.map(lambda a, x: a.at[i].set(x), out, new)

  def empty(count):
    floats = jnp.zeros((count, columns))
    indices = jnp.zeros((count, mask.shape[0]), jnp.int32)
    return ColumnPass(indices, indices if residual else None, floats, floats, floats)

  def quantize_block(b, carry):
    w, out = carry
    start = b * block
    part = jax.lax.dynamic_slice_in_dim(w, start, block)
    u_rows = jax.lax.dynamic_slice_in_dim(u, start, block)
    u_block = jax.lax.dynamic_slice_in_dim(u_rows, start, block, axis=1)
    _, _, _, done = jax.lax.fori_loop(
      0, block, quantize_channel, (part, start, u_block, empty(block))
    )

    def update_behind(k, w):
      u_part = jax.lax.dynamic_slice_in_dim(u_rows, k * block, block, axis=1)
      behind = jax.lax.dynamic_slice_in_dim(w, k * block, block)
      behind = behind - jnp.matmul(u_part.T, done.feedback, precision="highest")
      return jax.lax.dynamic_update_slice_in_dim(w, behind, k * block, axis=0)

    w = jax.lax.fori_loop(b + 1, (rows + padded) // block, update_behind, w)
    write = lambda a, x: jax.lax.dynamic_update_slice_in_dim(a, x, start, axis=0)
    return w, jax.tree.map(write, out, done)

  _, out = jax.lax.fori_loop(0, (rows + padded) // block, quantize_block, (w, empty(rows + padded)))
  return jax.tree.map(lambda a: a[:rows], out)


@functools.partial(jax.jit, static_argnames=("v", "k", "groups"))
def fit_codebooks(
  w: Array,
  importance: Array,
  key: Array,
  *,
  v: int,
  k: int,
  groups: int = 1,
  max_iterations: int | Array = 100,
) -> Array:
  """One k-means per group of channels on all its vectors, float32 [groups, k, v] (section 3.2).

  tr(dW^T H dW) is dominated by sum_n h_nn |dw_n|^2, whence the weights h_nn. Values are rounded to
  float16, as they are stored.

  Args:
    w: [in, out], the channels' weights, or what a first stage left of them.
    importance: h_nn, or ones for k-means without weights, [in].
    key: of the starting points.
    v, k: vector length and number of centroids.
    groups: divides in.
    max_iterations: of Lloyd's algorithm.
  """
  vectors = to_vectors(w, v)
  # Relative weights: k-means does not depend on their unit, float32 sums do.
  importance = importance / jnp.maximum(importance.mean(), jnp.finfo(jnp.float32).tiny)
  weights = importance[:, None, None] * vector_mask(w.shape[1], v)

  def fit(group):
    vectors, weights, key = group
    return weighted_kmeans(vectors, weights, k, key, max_iterations=max_iterations)[0]

  split = lambda a: a.reshape(groups, -1, v)
  # One group after the other: their distances need not be in memory together.
  codebooks = jax.lax.map(fit, (split(vectors), split(weights), jax.random.split(key, groups)))
  return codebooks.astype(jnp.float16).astype(jnp.float32)


class ProxyErrors(NamedTuple):
  """tr(dW^T H dW) / tr(W^T H W) of one weight after each stage, float32 [].

  Attributes:
    kmeans: nearest centroids, no feedback.
    column_pass: after the pass with feedback (as `kmeans` without).
    residual: after the pass with the residual codebook (as `column_pass` without one).
  """

  kmeans: Array
  column_pass: Array
  residual: Array


@jax.jit
def proxy_error(w: Array, quantized: Array, h: Array) -> Array:
  """tr(dW^T H dW) / tr(W^T H W), float32 []. w, quantized: [in, out], h: [in, in]."""
  form = lambda a: jnp.sum(a * jnp.matmul(h, a, precision="highest"))
  return form(quantized - w) / form(w)


def vptq(
  w: Array, h: Array, key: Array, settings: VPTQSettings
) -> tuple[VectorQuantizedArray, ProxyErrors]:
  """Quantizes a weight against the inputs whose Hessian is `h`.

  Its parts are jitted one by one, so that settings which differ in a switch share them.

  Args:
    w: [in, out].
    h: [in, in], `common.quantization.gptq.hessian`.
    key: of the k-means' starting points.
    settings: see there.

  Raises:
    UserError: the weight cannot be quantized so, see `VPTQSettings.check`.
  """
  settings.check(w.shape, "weight")
  rows, columns = w.shape
  original, hessian = w.astype(jnp.float32), h
  w, h, importance, scale, bias, order = prepare(
    w,
    h,
    permute=settings.permute,
    normalize=settings.normalize,
    norm_hessian=settings.norm_hessian,
  )
  if not settings.hessian_weighted:
    importance = jnp.ones_like(importance)
  u = inverse_factor(h, settings.damping) if settings.feedback else no_feedback(h)
  outlier_key, key, residual_key = jax.random.split(key, 3)
  v, k, groups = settings.vector_length, settings.num_centroids, settings.num_groups
  fit = functools.partial(fit_codebooks, max_iterations=settings.kmeans_iterations)
  run = functools.partial(column_pass, block_size=settings.block_size)

  # Outliers come first, so that U of the channels behind them is the lower right corner of U.
  count = settings.num_outliers(rows)
  others, rest = Channels(w, importance, u), w
  assigned, outliers, outlier_codebook = jnp.zeros((0, columns)), None, None
  if count:
    leading, others, u_between = cut(w, importance, u, count=count)
    outlier_codebook = fit(
      leading.w,
      leading.importance,
      outlier_key,
      v=settings.outlier_vector_length,
      k=settings.num_outlier_centroids,
    )
    assigned = run(leading.w, no_feedback(leading.u), outlier_codebook).quantized
    outliers = run(leading.w, leading.u, outlier_codebook)
    rest = others.w - jnp.matmul(u_between.T, outliers.feedback, precision="highest")

  codebooks = fit(others.w, others.importance, key, v=v, k=k, groups=groups)
  nearest = run(others.w, no_feedback(others.u), codebooks)
  first = run(rest, others.u, codebooks) if settings.feedback else nearest
  final, residual_codebooks = first, None
  if settings.num_residual_centroids:
    residual_codebooks = fit(
      first.error,
      others.importance,
      residual_key,
      v=v,
      k=settings.num_residual_centroids,
      groups=groups,
    )
    # The pass starts again from the weights that the first one started from.
    final = run(rest, others.u, codebooks, residual_codebooks)

  outlier_values = outliers.quantized if count else assigned
  stages = (
    (assigned, nearest.quantized),
    (outlier_values, first.quantized),
    (outlier_values, final.quantized),
  )
  errors = _stage_errors(original, hessian, stages, order, scale, bias)

  indices, residual_indices = final.indices, final.residual_indices
  if count == 0 and groups == 1:
    # All channels share one codebook, so that they can be stored in their own order.
    in_place = lambda a: None if a is None else restore(a, order, None, None)
    indices, residual_indices, order = in_place(indices), in_place(residual_indices), None
  elif not settings.permute:
    order = None
  half = lambda a: None if a is None else a.astype(jnp.float16)
  packed = lambda a, count: None if a is None else pack_indices(a, count)
  weight = VectorQuantizedArray(
    indices=pack_indices(indices, k),
    codebooks=half(codebooks),
    residual_indices=packed(residual_indices, settings.num_residual_centroids),
    residual_codebooks=half(residual_codebooks),
    outlier_indices=packed(outliers.indices if count else None, settings.num_outlier_centroids),
    outlier_codebook=half(outlier_codebook),
    scale=scale,
    bias=bias,
    order=order,
    shape=(rows, columns),
    outliers=count,
  )
  return weight, errors


@jax.jit
def restore(w: Array, order: Array, scale: Array | None, bias: Array | None) -> Array:
  """Undoes `prepare`: channels in their own order, and scale W + bias of each, [in, out]."""
  w = jnp.zeros_like(w).at[order].set(w)
  if scale is None:
    return w
  return w * scale.astype(jnp.float32)[:, None] + bias.astype(jnp.float32)[:, None]


@jax.jit
def _stage_errors(w: Array, h: Array, stages, order, scale, bias) -> ProxyErrors:
  """Of the original weight and Hessian; `stages`: the values of (outliers, the rest) after each."""
  values = [restore(jnp.concatenate(parts), order, scale, bias) for parts in stages]
  return ProxyErrors(*[proxy_error(w, quantized, h) for quantized in values])
