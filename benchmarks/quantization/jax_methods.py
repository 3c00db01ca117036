"""This repository's sides of `methods_vs_torch.py`, and the arrays that both sides are given.

Inputs w [4096, outputs] and x [tokens, 4096] are float32; results are arrays by name. Functions are
compiled as a whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.quantization.torch_methods import (
  BITS,
  BLOCK,
  CENTROIDS,
  CLIP_FACTOR,
  FACTOR,
  FLAT_RATE,
  FLAT_STEPS,
  GRID,
  GROUP,
  INITIAL_CLIP,
  ITERATIONS,
  LENGTH,
  PASS_TOKENS,
  RANK,
  RATE,
  STEPS,
  WIDTH,
)
from common.quantization import rtn
from common.quantization.activations import ActivationFormat
from common.quantization.equivalent import smoothquant_scale
from common.quantization.gptq import hessian
from common.quantization.low_rank import low_rank
from common.quantization.online_transforms import clipped_fake_quantize
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import QuantizedKernel
from common.quantization.reconstruction import ReconstructionSettings, reconstruct
from common.quantization.shift_and_scale import (
  linear_outputs,
  quantization_loss,
  search_scale,
  threshold_scale,
)
from projects.adadim.adadim import axis_candidates, output_error
from projects.flatquant.flat_block import ClipFactors, FlatQuantSettings, clip_kernel, round_kernel
from projects.flatquant.flatquant import make_optimizer as flatquant_optimizer
from projects.flatquant.flatquant import normalized_error
from projects.flatquant.transforms import KroneckerTransform, SVDMatrix, random_orthogonal
from projects.flexround.flexround import FlexRound, FlexRoundSettings, feature_sum, make_optimizer
from projects.flexround.scale_search import min_max_scales
from projects.llm_fp4.llm_fp4 import FPQSettings, search_linear
from projects.qllm.channel_reassembly import reassemble
from projects.vptq.kmeans import lloyd
from projects.vptq.vptq import column_pass

FORMAT = IntegerFormat(BITS, GROUP)


def layer(w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
  return {"w": w, "x": x}


# ---------------------------------------------------------------- Hessians of GPTQ, VPTQ, AdaDim


def our_hessian(w, x):
  """Accumulated over passes, as `block_hessians` does."""
  del w
  add = lambda total, rows: (total + hessian(rows), None)
  parts = x.reshape(-1, PASS_TOKENS, WIDTH)
  total = jax.lax.scan(add, jnp.zeros((WIDTH, WIDTH)), parts)[0]
  return {"hessian": total / len(parts)}


# ---------------------------------------------------------------- AdaDim: the error of either axis


def our_axis_errors(w, x):
  h = hessian(x)
  return {"errors": jnp.stack([output_error(c - w, h) for c in axis_candidates(w, FORMAT)])}


# ---------------------------------------------------------------- LoRC: factors of the rounding error


def rounding_error(w, x):
  del x
  rounded = np.asarray(jax.jit(rtn.fake_quantize, static_argnums=1)(w, FORMAT))
  return {"error": w - rounded}


def our_factors(error):
  return {"product": low_rank(error, RANK).product()}


# ---------------------------------------------------------------- QLLM: which channels are merged


def with_splits(w, x):
  """Splits that add a fifth of the channels."""
  largest, extra = np.abs(x).max(axis=0), WIDTH // 5
  for threshold in np.linspace(largest.max(), largest.min(), 1000):
    needed = np.maximum(1, np.ceil(largest / np.float32(threshold))).astype(np.int32)
    if needed.sum() - WIDTH > extra:
      break
    splits = needed
  return {"w": w, "x": x, "splits": splits}


def our_merges(w, x, splits):
  found = reassemble(x, w, splits, WIDTH // 5)
  order = jnp.argsort(found.source)
  return {"sources": found.source[order], "targets": found.target[order]}


# ---------------------------------------------------------------- FlexRound: steps of Adam

OPTIMIZER = make_optimizer(RATE, STEPS)


def our_flexround(w, x):
  linear = nnx.eval_shape(lambda: nnx.Linear(*w.shape, use_bias=False, rngs=nnx.Rngs(0)))
  linear.kernel = nnx.Param(w)
  weight = FlexRound(w, *min_max_scales(w, FORMAT), FlexRoundSettings(FORMAT))
  learned, log = reconstruct(
    QuantizedKernel(linear, weight),
    x[None],
    jnp.matmul(x, w)[None],
    None,
    jax.random.key(0),
    ReconstructionSettings(STEPS, 1),
    OPTIMIZER,
    objective=feature_sum,
    run=lambda student, x, context: student(x),
  )
  return {"losses": log.losses, "codes": learned.weight.codes()}


# ---------------------------------------------------------------- FlatQuant: steps of Adam

FLAT = FlatQuantSettings(
  IntegerFormat(BITS, symmetric=True),
  ActivationFormat(BITS, symmetric=True),
  initial_clip=INITIAL_CLIP,
)


class FlatLinear(nnx.Module):
  """One linear of a `FlatBlock`, Q(X diag(c) P) Q(P^-1 diag(1 / c) W)."""

  def __init__(self, kernel, left, right, scale):
    matrices = [SVDMatrix(FACTOR, jax.random.key(0)) for _ in (left, right)]
    for matrix, raw in zip(matrices, (left, right)):
      matrix.raw[...] = raw
    self.kernel = nnx.Param(kernel)
    self.transform = KroneckerTransform(*matrices, scale)
    self.weight_clips = ClipFactors((kernel.shape[1],), FLAT)
    self.input_clips = ClipFactors((), FLAT)

  def __call__(self, x):
    factors = self.transform.factors()
    kernel = factors.apply_inverse(self.kernel[...])
    kernel = round_kernel(clip_kernel(kernel, self.weight_clips.factors()), FLAT.weights)
    x = clipped_fake_quantize(factors.apply(x), FLAT.activations, self.input_clips.factors())
    return jnp.matmul(x, kernel)


def with_matrices(w, x):
  """Raw matrices of U and V of both factors, and FlatQuant's c, to start from."""
  raw = [np.asarray(random_orthogonal(jax.random.key(i), FACTOR)) for i in range(4)]
  left, right = np.stack(raw[:2]), np.stack(raw[2:])
  scale = 1 / np.asarray(smoothquant_scale(np.abs(x).max(axis=0), [w], FLAT.scale_alpha))
  return {"w": w, "x": x, "left": left, "right": right, "scale": scale}


def our_flatquant(w, x, left, right, scale, steps=FLAT_STEPS):
  learned, log = reconstruct(
    FlatLinear(w, left, right, scale),
    x[None],
    jnp.matmul(x, w)[None],
    None,
    jax.random.key(0),
    ReconstructionSettings(steps, 1, keep_best=False),
    flatquant_optimizer(FLAT_RATE, steps, clip_rate_factor=CLIP_FACTOR),
    objective=normalized_error,
    run=lambda student, x, context: student(x),
  )
  errors = jnp.stack([log.before, log.after])
  return {"errors": errors, "change of c": learned.transform.scale[...] - scale}


# ---------------------------------------------------------------- Outlier Suppression+: thresholds


def small_range(w, x):
  """Inputs up to 50: as many candidates as the paper's grid has at least, 100."""
  return {"w": w, "x": x * np.float32(49.9 / np.abs(x).max())}


def our_threshold(w, x):
  mask = jnp.ones((len(x), 1))
  formats = IntegerFormat(BITS), ActivationFormat(BITS)
  ends = x.min(axis=0), x.max(axis=0)
  found = search_scale(linear_outputs, x, {"w": w}, mask, *ends, *formats)
  return {"threshold": found.threshold[None], "loss": found.loss[None]}


def our_one_threshold(w, x):
  """The loss of half the largest threshold."""
  low, high = x.min(axis=0), x.max(axis=0)
  threshold = jnp.maximum(high.max(), -low.min()) / 2
  scale = threshold_scale(low, high, threshold)
  mask, kernels = jnp.ones((len(x), 1)), {"w": w}
  formats = IntegerFormat(BITS), ActivationFormat(BITS)
  target = linear_outputs(x, kernels)
  loss = quantization_loss(linear_outputs, target, x, kernels, mask, scale, threshold, *formats)
  return {"loss": loss[None]}


# ---------------------------------------------------------------- LLM-FP4: formats and biases


def our_formats(w, x, grid=GRID):
  found = search_linear(w, x, jnp.abs(x).max(axis=0), FPQSettings(rounds=1, grid_size=grid))
  formats = jnp.stack([found.weight_format, found.activation_format])
  return {"formats": formats, "weight biases": found.weight_bias, "error": found.output_error[None]}


# ---------------------------------------------------------------- VPTQ: k-means and the channels


def vectors(w, x):
  """The layer's vectors, a weight each, and centroids to start from."""
  parts = w.reshape(-1, LENGTH)
  importance = np.repeat((x**2).mean(axis=0), w.shape[1] // LENGTH)
  chosen = np.random.default_rng(0).permutation(len(parts))[:CENTROIDS]
  importance = importance / importance.mean()
  return {"vectors": parts, "importance": importance, "centroids": parts[chosen]}


def our_kmeans(vectors, importance, centroids, iterations=ITERATIONS):
  weights = jnp.broadcast_to(importance[:, None], vectors.shape)
  found, inertia = lloyd(vectors, weights, centroids, max_iterations=iterations, tolerance=0.0)
  return {"centroids": found, "inertia": inertia[None]}


def with_factor(w, x):
  """Codebook of some of the vectors; U with inv(H) = U^T U, 1 % damped."""
  h = torch.from_numpy(2 * x.T @ x / len(x))
  h.diagonal().add_(0.01 * h.diagonal().mean())
  u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
  return {"w": w, "u": u.numpy(), "codebook": vectors(w, x)["centroids"]}


def our_pass(w, u, codebook):
  found = column_pass(w, u, codebook[None], block_size=BLOCK)
  return {"indices": found.indices, "energy": jnp.sum(found.feedback**2)[None]}
