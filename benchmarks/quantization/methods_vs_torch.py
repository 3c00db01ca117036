"""The inner loops of the other quantization methods on one large linear layer: this repository
against PyTorch, on the CPU.

  .venv/bin/pip install -r benchmarks/requirements.txt
  python -m benchmarks.quantization.methods_vs_torch

A method is what its time goes into: FlexRound's steps, AdaDim's two axes, the threshold search of
Outlier Suppression+, LoRC's SVD, VPTQ's k-means and its pass over the channels, QLLM's matching of
channels. (AWQ and GPTQ: `awq_gptq_vs_torch.py`.) The layer has the width of Llama-2-7B, 4096, and
random weights; tokens and output channels are as many as the time allows, and are written beside
each ratio.

Both sides do the arithmetic of the paper's formulas in float32 on the same inputs, each in a process
of its own with as many threads; the PyTorch side is written plainly. Results are compared before the
ratio torch / ours (above 1: ours is faster) goes to `methods_vs_torch.json` beside this file.
Compilation is not timed.
"""

import argparse
import functools
import json
import math
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

from benchmarks.quantization.awq_gptq_vs_torch import cpu_name, make_layer, seconds
from common.quantization import rtn
from common.quantization.activations import ActivationFormat
from common.quantization.gptq import hessian
from common.quantization.low_rank import low_rank
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import QuantizedKernel
from common.quantization.reconstruction import ReconstructionSettings, reconstruct
from common.quantization.shift_and_scale import linear_outputs, search_scale
from projects.adadim.adadim import axis_candidates, output_error
from projects.flexround.flexround import FlexRound, FlexRoundSettings, feature_sum, make_optimizer
from projects.flexround.scale_search import min_max_scales
from projects.qllm.channel_reassembly import reassemble
from projects.vptq.kmeans import lloyd
from projects.vptq.vptq import column_pass

WIDTH, BITS, GROUP = 4096, 4, 128
LEVELS = 2**BITS - 1
STEPS, RATE = 4, 3e-3  # FlexRound's.
RANK, CENTROIDS, LENGTH, ITERATIONS, BLOCK = 8, 4096, 6, 5, 128
FORMAT = IntegerFormat(BITS, GROUP)


class Method(NamedTuple):
  """One comparison.

  Attributes:
    sizes: tokens and outputs of the layer, and what else there is to say.
    inputs: (w [4096, outputs], x [tokens, 4096]) -> NumPy arrays by name, for both sides.
    ours: a function of those arrays, to be compiled; returns arrays by name.
    torch: the same in PyTorch.
    check: (ours, torch) -> how well they agree; raises where they do not.
  """

  sizes: dict
  inputs: Callable
  ours: Callable
  torch: Callable
  check: Callable


def layer(w: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
  return {"w": w, "x": x}


def relative(name: str, tolerance: float) -> Callable:
  """A check of one result: largest difference, relative to the largest value."""

  def check(ours, theirs):
    error = float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max())
    assert error <= tolerance, (name, error)
    return {f"largest relative difference of {name}": error}

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


def torch_round(flat: torch.Tensor, low: torch.Tensor, high: torch.Tensor, largest: int):
  """Asymmetric codes 0 ... largest of the rows' ranges, and back."""
  scale = ((high - low) / largest).clamp(min=1e-7)
  zero = torch.round(-low / scale).clamp_(0, largest)
  return (torch.round(flat / scale) + zero).clamp_(0, largest).sub_(zero).mul_(scale)


def torch_axis_errors(w, x):
  target, errors = x @ w, []
  for grouped in (w.T.contiguous(), w):
    flat = grouped.reshape(-1, GROUP)
    rounded = torch_round(flat, flat.amin(1, keepdim=True), flat.amax(1, keepdim=True), LEVELS)
    rounded = rounded.reshape(grouped.shape)
    errors.append((x @ (rounded.T if grouped is not w else rounded) - target).pow_(2).mean())
  return {"errors": torch.stack(errors)}


# ---------------------------------------------------------------- LoRC: the SVD of the rounding error


def rounding_error(w, x):
  del x
  rounded = np.asarray(jax.jit(rtn.fake_quantize, static_argnums=1)(w, FORMAT))
  return {"error": w - rounded}


def our_factors(error):
  return {"product": low_rank(error, RANK).product()}


def torch_factors(error):
  u, s, vt = torch.linalg.svd(error, full_matrices=False)
  root = s[:RANK].sqrt()
  return {"product": (u[:, :RANK] * root) @ (root[:, None] * vt[:RANK])}


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


def torch_merges(w, x, splits):
  extra, most = int(splits.sum()) - WIDTH, WIDTH // 5
  channel = torch.repeat_interleave(torch.arange(WIDTH), splits)
  x, total, single = x[:, channel], w[channel].sum(1), splits[channel] == 1
  scores = torch.cdist(x[:, 0::2].T.contiguous(), x[:, 1::2].T.contiguous()).pow_(2)
  scores.mul_((total[0::2, None] + total[None, 1::2]).pow_(2))
  scores.masked_fill_(~(single[0::2, None] & single[None, 1::2]), float("inf"))
  least, nearest = scores.min(1)
  source = torch.argsort(least, stable=True)[:extra]
  source, target = channel[2 * source], channel[2 * nearest[source] + 1]
  order = torch.argsort(source)
  fill = torch.full((most - extra,), WIDTH)
  return {"sources": torch.cat([source[order], fill]), "targets": torch.cat([target[order], fill])}


# ---------------------------------------------------------------- FlexRound: steps of Adam

OPTIMIZER = make_optimizer(RATE, STEPS)


def our_steps(w, x):
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


@torch.enable_grad()
def torch_steps(w, x):
  target, grouped = x @ w, w.T.reshape(w.shape[1], -1, GROUP)
  low = grouped.amin(-1, keepdim=True).clamp(max=0)
  high = grouped.amax(-1, keepdim=True).clamp(min=0)
  scale = (high - low).clamp(min=1e-5) / LEVELS
  zero = (-torch.round(low / scale)).clamp(0, LEVELS)
  logs = [torch.zeros_like(scale), torch.zeros_like(grouped), torch.zeros(len(scale), 1, 1)]
  s1, s2, s3 = logs = [log.requires_grad_() for log in logs]
  optimizer = torch.optim.Adam(logs, lr=RATE)
  cosine = lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS))
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)

  def codes():
    quotient = grouped / (scale * s1.exp() * (s2 + s3).exp())
    rounded = quotient + (quotient.round() - quotient).detach()
    return (rounded + zero).clamp(0, LEVELS)

  def error():
    rounded = ((codes() - zero) * (scale * s1.exp())).reshape(len(scale), -1)
    return (x @ rounded.T - target).pow(2).sum(-1).mean()

  losses = []
  with torch.no_grad():
    before = error()
  for _ in range(STEPS):
    loss = error()
    losses.append(loss.detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
  with torch.no_grad():
    assert error() <= before
    return {"losses": torch.stack(losses), "codes": codes().reshape(len(scale), -1).T}


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


def torch_threshold(w, x):
  low, high, target, w = x.amin(0), x.amax(0), x @ w, w.T.contiguous()
  largest = torch.maximum(high.max(), -low.min())
  step = (largest - 1.0) / 100
  best = float("inf"), None

  def rounded(rows):
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    return torch_round(rows, low, high, LEVELS)

  for i in range(101):
    threshold = largest - i * step
    scale = torch.maximum(high / threshold, low / -threshold).clamp(min=1)
    output = (rounded(x / scale) * scale) @ (rounded(w * scale) / scale).T
    loss = (output - target).pow_(2).sum(-1).mean().item()
    if loss < best[0]:
      best = loss, threshold.item()
  return {"threshold": torch.tensor([best[1]]), "loss": torch.tensor([best[0]])}


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


def torch_kmeans(vectors, importance, centroids):
  for _ in range(ITERATIONS):
    sums, totals, inertia = torch.zeros_like(centroids), torch.zeros(len(centroids)), 0.0
    squares = centroids.pow(2).sum(1)
    for x, weight in zip(vectors.split(4096), importance.split(4096)):
      distance, nearest = torch.addmm(squares, x, centroids.T, alpha=-2).min(1)
      sums.index_add_(0, nearest, weight[:, None] * x)
      totals.index_add_(0, nearest, weight)
      inertia += (weight * (distance + x.pow(2).sum(1))).sum()
    centroids = torch.where(totals[:, None] > 0, sums / totals[:, None], centroids)
  return {"centroids": centroids, "inertia": inertia[None]}


def with_factor(w, x):
  """Codebook of some of the vectors; U with inv(H) = U^T U, 1 % damped."""
  h = torch.from_numpy(2 * x.T @ x / len(x))
  h.diagonal().add_(0.01 * h.diagonal().mean())
  u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
  return {"w": w, "u": u.numpy(), "codebook": vectors(w, x)["centroids"]}


def our_pass(w, u, codebook):
  found = column_pass(w, u, codebook[None], block_size=BLOCK)
  return {"indices": found.indices, "energy": jnp.sum(found.feedback**2)[None]}


def torch_pass(w, u, codebook):
  w, squares, energy = w.clone(), codebook.pow(2).sum(1), 0.0
  indices = torch.empty(len(w), w.shape[1] // LENGTH, dtype=torch.long)
  for start in range(0, len(w), BLOCK):
    part, inner = w[start : start + BLOCK].clone(), u[start : start + BLOCK, start : start + BLOCK]
    errors = torch.empty_like(part)
    for i in range(BLOCK):
      index = torch.addmm(squares, part[i].reshape(-1, LENGTH), codebook.T, alpha=-2).argmin(1)
      indices[start + i] = index
      errors[i] = (part[i] - codebook[index].reshape(-1)) / inner[i, i]
      part[i:] -= inner[i, i:, None] * errors[i]
    energy += errors.pow(2).sum()
    w[start + BLOCK :] -= u[start : start + BLOCK, start + BLOCK :].T @ errors
  return {"indices": indices, "energy": energy[None]}


# ---------------------------------------------------------------- the comparison

METHODS = {
  "zeroquant_v2: LoRC's SVD": Method(
    {"tokens": 512, "outputs": 1024, "rank": RANK},
    rounding_error,
    our_factors,
    torch_factors,
    relative("product", 1e-3),
  ),
  "qllm: matching of channels": Method(
    {"tokens": 4096, "outputs": WIDTH},
    with_splits,
    our_merges,
    torch_merges,
    both(equal_share("sources", 0.9), equal_share("targets", 0.9)),
  ),
  "flexround: steps of Adam": Method(
    {"tokens": 512, "outputs": WIDTH, "steps": STEPS},
    layer,
    our_steps,
    torch_steps,
    both(relative("losses", 1e-2), equal_share("codes", 0.99)),
  ),
  "outlier_suppression_plus: threshold search": Method(
    {"tokens": 512, "outputs": 128, "candidates": 101},
    small_range,
    our_threshold,
    torch_threshold,
    both(relative("threshold", 0.02), relative("loss", 1e-3)),
  ),
  "vptq: weighted k-means": Method(
    {"tokens": 512, "outputs": 96, "centroids": CENTROIDS, "iterations": ITERATIONS},
    vectors,
    our_kmeans,
    torch_kmeans,
    relative("inertia", 1e-3),
  ),
  "vptq: channels with feedback": Method(
    {"tokens": 4096, "outputs": 96, "centroids": CENTROIDS},
    with_factor,
    our_pass,
    torch_pass,
    both(equal_share("indices", 0.9), relative("energy", 1e-2)),
  ),
  "adadim: error of either axis": Method(
    {"tokens": 4096, "outputs": WIDTH},
    layer,
    our_axis_errors,
    torch_axis_errors,
    relative("errors", 1e-3),
  ),
}


def measure(name: str, side: str, repeats: int, out: pathlib.Path) -> None:
  """Runs one side of one method in this process; writes its seconds and its result."""
  method = METHODS[name]
  w, x = make_layer(WIDTH, method.sizes["tokens"])
  arrays = method.inputs(np.ascontiguousarray(w[:, : method.sizes["outputs"]]), x)
  if side == "torch":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    run, arrays = method.torch, {k: torch.from_numpy(v) for k, v in arrays.items()}
  else:
    arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
    run = jax.jit(lambda arrays: method.ours(**arrays)).lower(arrays).compile()
    run = functools.partial(lambda run, **arrays: run(arrays), run)
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


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--only", action="append", choices=METHODS, help="by default all")
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
  for name in args.only or METHODS:
    record["results"][name] = compare(name, args.threads, args.repeats)
    # After every method: what is measured is kept if a later one fails.
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
