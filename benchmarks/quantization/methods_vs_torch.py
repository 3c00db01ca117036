"""The inner loops of the other quantization methods on one large linear layer: this repository
against PyTorch, on the CPU.

  .venv/bin/pip install -r benchmarks/requirements.txt
  python -m benchmarks.quantization.methods_vs_torch

A method is what its time goes into: the steps of FlexRound and FlatQuant, AdaDim's two axes, the
searches of Outlier Suppression+ and LLM-FP4, LoRC's factors, VPTQ's k-means and its pass over the
channels, QLLM's matching of channels. (AWQ and GPTQ: `awq_gptq_vs_torch.py`.) The layer has the
width of Llama-2-7B, 4096, and random weights; tokens and output channels are as many as the time
allows, and are written beside each ratio.

Both sides do the arithmetic of the paper's formulas in float32 on the same inputs, each in a process
of its own with as many threads; the PyTorch side (`torch_methods.py`) is written plainly. Results
are compared before the ratio torch / ours (above 1: ours is faster) goes to `methods_vs_torch.json`
beside this file; `--only=NAME` measures some methods and leaves the others' results there.
Compilation is not timed.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from threadpoolctl import threadpool_limits

from benchmarks.quantization import torch_methods
from benchmarks.quantization.awq_gptq_vs_torch import cpu_name, make_layer, seconds
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
from common.quantization.shift_and_scale import linear_outputs, search_scale
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
FPQ = FPQSettings(rounds=1, grid_size=GRID)


class Method(NamedTuple):
  """One comparison.

  Attributes:
    sizes: tokens (if the method looks at any) and outputs of the layer, and what else there is to
      say.
    inputs: (w [4096, outputs], x [tokens, 4096]) -> NumPy arrays by name, for both sides.
    ours: a function of those arrays, to be compiled; returns arrays by name.
    torch: the same in PyTorch.
    check: (ours, torch) -> how well they agree; raises where they do not.
    blas_threads: of the library behind our factorizations, if the project limits them.
  """

  sizes: dict
  inputs: Callable
  ours: Callable
  torch: Callable
  check: Callable
  blas_threads: int | None = None


def layer(w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
  return {"w": w, "x": x}


def relative(name: str, tolerance: float) -> Callable:
  """A check of one result: the norm of the difference, relative to that of the result."""

  def check(ours, theirs):
    error = float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]))
    assert error <= tolerance, (name, error)
    return {f"relative difference of {name}": error}

  return check


def equal_share(name: str, least: float) -> Callable:
  """A check of one result: the share of equal entries."""

  def check(ours, theirs):
    share = float(np.mean(ours[name] == theirs[name]))
    assert share >= least, (name, share)
    return {f"share of equal {name}": share}

  return check


def both(*checks: Callable) -> Callable:
  return lambda *sides: functools.reduce(lambda a, b: a | b, (check(*sides) for check in checks))


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
FLAT_OPTIMIZER = flatquant_optimizer(FLAT_RATE, FLAT_STEPS, clip_rate_factor=CLIP_FACTOR)


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


def our_flatquant(w, x, left, right, scale):
  learned, log = reconstruct(
    FlatLinear(w, left, right, scale),
    x[None],
    jnp.matmul(x, w)[None],
    None,
    jax.random.key(0),
    ReconstructionSettings(FLAT_STEPS, 1, keep_best=False),
    FLAT_OPTIMIZER,
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


# ---------------------------------------------------------------- LLM-FP4: formats and biases


def our_formats(w, x):
  found = search_linear(w, x, jnp.abs(x).max(axis=0), FPQ)
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


def our_kmeans(vectors, importance, centroids):
  weights = jnp.broadcast_to(importance[:, None], vectors.shape)
  found, inertia = lloyd(vectors, weights, centroids, max_iterations=ITERATIONS, tolerance=0.0)
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


# ---------------------------------------------------------------- the comparison

METHODS = {
  "zeroquant_v2: LoRC, torch by SVD as published": Method(
    {"outputs": 2048, "rank": RANK},
    rounding_error,
    our_factors,
    torch_methods.torch_factors_by_svd,
    relative("product", 1e-3),
  ),
  "zeroquant_v2: LoRC, torch by eigenvectors": Method(
    {"outputs": 2048, "rank": RANK},
    rounding_error,
    our_factors,
    torch_methods.torch_factors_by_eigenvectors,
    relative("product", 1e-3),
  ),
  "qllm: matching of channels": Method(
    {"tokens": 4096, "outputs": WIDTH},
    with_splits,
    our_merges,
    torch_methods.torch_merges,
    both(equal_share("sources", 0.9), equal_share("targets", 0.9)),
  ),
  "flexround: steps of Adam": Method(
    {"tokens": 2048, "outputs": WIDTH, "steps": STEPS},
    layer,
    our_flexround,
    torch_methods.torch_flexround,
    both(relative("losses", 1e-2), equal_share("codes", 0.99)),
  ),
  "flatquant: steps of Adam": Method(
    {"tokens": 1024, "outputs": 2048, "steps": FLAT_STEPS},
    with_matrices,
    our_flatquant,
    torch_methods.torch_flatquant,
    # A value on a tie may be rounded either way, and Adam steps by the sign of small gradients.
    both(relative("errors", 1e-2), relative("change of c", 0.1)),
    blas_threads=1,
  ),
  "outlier_suppression_plus: threshold search": Method(
    {"tokens": 1024, "outputs": 256, "candidates": 101},
    small_range,
    our_threshold,
    torch_methods.torch_threshold,
    both(relative("threshold", 0.02), relative("loss", 1e-3)),
  ),
  "llm_fp4: search of formats and biases": Method(
    {"tokens": 256, "outputs": 256, "rounds": FPQ.rounds, "candidates": 6 * GRID},
    layer,
    our_formats,
    torch_methods.torch_formats,
    both(equal_share("formats", 1), relative("error", 1e-2)),
  ),
  "vptq: weighted k-means": Method(
    {"tokens": 4096, "outputs": 192, "centroids": CENTROIDS, "iterations": ITERATIONS},
    vectors,
    our_kmeans,
    torch_methods.torch_kmeans,
    relative("inertia", 1e-3),
  ),
  "vptq: channels with feedback": Method(
    {"tokens": 8192, "outputs": 384, "centroids": CENTROIDS},
    with_factor,
    our_pass,
    torch_methods.torch_pass,
    both(equal_share("indices", 0.9), relative("energy", 1e-2)),
  ),
  "adadim: error of either axis": Method(
    {"tokens": 8192, "outputs": WIDTH},
    layer,
    our_axis_errors,
    torch_methods.torch_axis_errors,
    relative("errors", 1e-3),
  ),
}


def measure(name: str, side: str, repeats: int, out: pathlib.Path) -> None:
  """Runs one side of one method in this process; writes its seconds and its result."""
  method = METHODS[name]
  w, x = make_layer(WIDTH, method.sizes.get("tokens", 1))
  arrays = method.inputs(np.ascontiguousarray(w[:, : method.sizes["outputs"]]), x)
  if side == "torch":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    run, arrays = method.torch, {k: torch.tensor(v) for k, v in arrays.items()}
  else:
    arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
    run = jax.jit(lambda arrays: method.ours(**arrays)).lower(arrays).compile()
    run = functools.partial(lambda run, **arrays: run(arrays), run)
    threadpool_limits(method.blas_threads, user_api="blas")
  # The first run warms caches and allocators.
  runs = [seconds(functools.partial(run, **arrays)) for _ in range(repeats + 1)]
  result = {k: np.asarray(v) for k, v in runs[-1][1].items()}
  np.savez(out, seconds=[t for t, _ in runs], **result)


def compare(name: str, threads: int, repeats: int) -> dict:
  """Both sides of a method, one after the other, each in a process kept to as many cores."""
  cores, sides = sorted(os.sched_getaffinity(0))[:threads], {}
  with tempfile.TemporaryDirectory() as folder:
    for side in ("ours", "torch"):
      out = pathlib.Path(folder) / f"{side}.npz"
      command = [sys.executable, "-m", "benchmarks.quantization.methods_vs_torch"]
      subprocess.run(
        [*command, f"--only={name}", f"--side={side}", f"--repeats={repeats}", f"--out={out}"],
        check=True,
        preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
      )
      with np.load(out) as file:
        sides[side] = dict(file)
  runs = {side: sides[side].pop("seconds").tolist() for side in sides}
  ours, theirs = (min(runs[side][1:]) for side in ("ours", "torch"))
  print(
    f"{name:46s} ours {ours:7.2f} s   torch {theirs:7.2f} s   torch / ours {theirs / ours:6.2f}",
    flush=True,
  )
  return {
    **METHODS[name].sizes,
    "ours_seconds": ours,
    "torch_seconds": theirs,
    "ratio": theirs / ours,
    "runs": runs,
    "load_average": os.getloadavg()[0],
    "check": METHODS[name].check(sides["ours"], sides["torch"]),
  }


def results_to_keep(path: pathlib.Path, record: dict) -> dict:
  """The results of a file that were measured as `record` will be.

  Raises:
    SystemExit: they were measured otherwise.
  """
  old = json.loads(path.read_text())
  for name in record.keys() - {"results"}:
    if old.get(name) != record[name]:
      sys.exit(
        f"{path} has {name}={old.get(name)}, this run {record[name]}; run all methods again, or "
        "write elsewhere with --out"
      )
  return {name: result for name, result in old["results"].items() if name in METHODS}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument(
    "--only", action="append", choices=METHODS, help="by default all; the others' results stay"
  )
  parser.add_argument("--threads", type=int, default=2, help="cores of either side")
  parser.add_argument("--repeats", type=int, default=3, help="warm runs; the best counts")
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".json")
  )
  parser.add_argument("--side", help="measure ours or torch in this process (internal)")
  args = parser.parse_args()
  if args.side:
    measure(args.only[0], args.side, args.repeats, args.out)
    return
  record = {
    "width": WIDTH,
    "bits": BITS,
    "threads": args.threads,
    "warm_runs": args.repeats,
    "results": {},
    "environment": {
      "cpu": cpu_name(),
      "cores": len(os.sched_getaffinity(0)),
      "jax": jax.__version__,
      "torch": torch.__version__,
      "numpy": np.__version__,
      "python": platform.python_version(),
    },
  }
  if args.only and args.out.exists():
    record["results"] = results_to_keep(args.out, record)
  for name in args.only or METHODS:
    record["results"][name] = compare(name, args.threads, args.repeats)
    # After every method: what is measured is kept if a later one fails.
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
