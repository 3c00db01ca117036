"""AWQ's searches and GPTQ on one large linear layer: this repository against PyTorch, on the CPU.

  .venv/bin/pip install -r benchmarks/requirements.txt
  python -m benchmarks.quantization.awq_gptq_vs_torch

Both sides do the same arithmetic in float32 on the same inputs and threads; the PyTorch side is the
published algorithm written plainly. Results are compared before the ratio torch / ours (above 1:
ours is faster) goes to `awq_gptq_vs_torch.json` beside this file. Compilation is timed apart.
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
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from common.quantization.awq import (
  AWQSettings,
  activation_statistic,
  linear_error,
  search_clip,
  search_scale,
)
from common.quantization.gptq import gptq, hessian
from common.quantization.quantized_array import IntegerFormat

BITS, GROUP = 4, 128
LEVELS = 2**BITS - 1


def make_layer(size: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Weights [in, out] and correlated inputs [tokens, in] with a few outlier channels."""
  rng = np.random.default_rng(seed)
  w = rng.standard_normal((size, size), dtype=np.float32) / np.float32(np.sqrt(size))
  x = rng.standard_normal((tokens, size), dtype=np.float32)
  shared = rng.standard_normal((tokens, size // 16), dtype=np.float32)
  x += shared @ rng.standard_normal((size // 16, size), dtype=np.float32) / np.float32(16)
  x *= rng.lognormal(0.0, 0.5, size).astype(np.float32)
  x[:, rng.permutation(size)[: size // 100]] *= 20
  return w, x


# ---------------------------------------------------------------- PyTorch, weights [out, in]


def torch_round_to_grid(w: torch.Tensor) -> torch.Tensor:
  """Min-max rounding of every group of `GROUP` inputs; w: [out, in]."""
  flat = w.reshape(-1, GROUP)
  low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
  scale = (high - low).clamp(min=1e-5) / LEVELS
  zero = (-torch.round(low / scale)).clamp_(0, LEVELS)
  codes = torch.round(flat / scale).add_(zero).clamp_(0, LEVELS)
  return codes.sub_(zero).mul_(scale).reshape(w.shape)


def torch_search_scale(w: torch.Tensor, x: torch.Tensor) -> int:
  """Index of the best of 20 exponents."""
  magnitude, target = x.abs().mean(0), x @ w.T
  best, best_loss = 0, float("inf")
  for i in range(20):
    scale = (magnitude ** (i / 20)).clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    loss = (x @ (torch_round_to_grid(w * scale) / scale).T - target).pow_(2).mean().item()
    if loss < best_loss:
      best, best_loss = i, loss
  return best


def broadcast_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
  """Partial dot products as published: x [tokens, groups, GROUP], w [out, groups, GROUP] ->
  [out, tokens, groups]."""
  return (x * w[:, None]).sum(-1)


def matrix_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
  """The same as one matrix product per group: the fastest plain PyTorch."""
  return torch.bmm(x.transpose(0, 1), w.permute(1, 2, 0)).permute(2, 1, 0)


def torch_search_clip(w: torch.Tensor, x: torch.Tensor, partial_products) -> torch.Tensor:
  """Best of 10 limits per output channel and group, [out, in / GROUP]."""
  x = x.reshape(len(x), -1, GROUP)
  limits = []
  for part in w.split(64):
    flat, part = part, part.reshape(len(part), -1, GROUP)
    largest = part.abs().amax(-1)
    target = partial_products(x, part)
    best, best_loss = largest.clone(), torch.full_like(largest, float("inf"))
    for i in range(10):
      limit = largest * (1 - i / 20)
      clipped = part.clamp(-limit[..., None], limit[..., None])
      rounded = torch_round_to_grid(clipped.reshape(flat.shape)).reshape(part.shape)
      loss = (partial_products(x, rounded) - target).pow_(2).mean(1)
      better = loss < best_loss
      best = torch.where(better, limit, best)
      best_loss = torch.where(better, loss, best_loss)
    limits.append(best)
  return torch.cat(limits)


def torch_gptq(w: torch.Tensor, h: torch.Tensor, block: int = 128) -> torch.Tensor:
  """Column-by-column GPTQ with lazy updates behind each block; returns the dequantized w."""
  w, h, columns = w.clone(), h.clone(), w.shape[1]
  h.diagonal().add_(0.01 * h.diagonal().mean())
  u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
  result = torch.empty_like(w)
  for start in range(0, columns, block):
    part = w[:, start : start + block].clone()
    errors, inner = torch.empty_like(part), u[start : start + block, start : start + block]
    for i in range(block):
      if (start + i) % GROUP == 0:
        low, high = part[:, i : i + GROUP].amin(1), part[:, i : i + GROUP].amax(1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low).clamp(min=1e-5) / LEVELS
        zero = (-torch.round(low / scale)).clamp_(0, LEVELS)
      column = part[:, i]
      rounded = (torch.round(column / scale) + zero).clamp_(0, LEVELS).sub_(zero).mul_(scale)
      error = (column - rounded) / inner[i, i]
      part[:, i:] -= error[:, None] * inner[i, i:]
      result[:, start + i], errors[:, i] = rounded, error
    w[:, start + block :] -= errors @ u[start : start + block, start + block :]
  return result


# ---------------------------------------------------------------- this repository


SETTINGS = AWQSettings(IntegerFormat(BITS, GROUP))


@jax.jit
def our_search_scale(w, x):
  error = linear_error(w, x)
  forward = lambda kernels: error(kernels["layer"])
  _, losses = search_scale(forward, {"layer": w}, activation_statistic(x), SETTINGS)
  return jnp.argmin(losses)


our_search_clip = jax.jit(functools.partial(search_clip, settings=SETTINGS))


def our_gptq(w, h):
  return gptq(w, h, SETTINGS.format)


def seconds(function, *arguments) -> tuple[float, object]:
  start = time.perf_counter()
  result = jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start, result


def compare(name, ours, theirs, our_arguments, their_arguments, repeats):
  """Times both sides in turn; returns (record, our result, their result)."""
  lower = jax.jit(ours).lower(*our_arguments)
  compile_seconds, compiled = seconds(lower.compile)
  our_times, their_times = [], []
  for _ in range(repeats + 1):  # The first run of each warms caches and allocators.
    t, our_result = seconds(compiled, *our_arguments)
    our_times.append(t)
    t, their_result = seconds(theirs, *their_arguments)
    their_times.append(t)
  record = {
    "ours_seconds": min(our_times[1:]),
    "torch_seconds": min(their_times[1:]),
    "ours_compile_seconds": compile_seconds,
    "ratio": min(their_times[1:]) / min(our_times[1:]),
    "runs": {"ours": our_times, "torch": their_times},
  }
  print(
    f"{name:56s} ours {record['ours_seconds']:7.2f} s (compile {compile_seconds:.1f} s)   "
    f"torch {record['torch_seconds']:7.2f} s   torch / ours {record['ratio']:6.2f}",
    flush=True,
  )
  return record, our_result, their_result


def measure(args) -> dict:
  """All comparisons with the cores that this process may use."""
  threads, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
  torch.set_num_threads(threads)
  torch.set_grad_enabled(False)
  print(f"{threads} threads, load average {load:.1f}")

  w, x = make_layer(args.size, args.calibration_tokens)
  h = np.array(hessian(x))
  x = np.ascontiguousarray(x[:: len(x) // args.tokens])
  ours = {k: jnp.asarray(v) for k, v in {"w": w, "x": x, "h": h}.items()}
  torch_w = torch.from_numpy(np.ascontiguousarray(w.T))
  torch_x, torch_h = torch.from_numpy(x), torch.from_numpy(h)
  results = {}
  run = functools.partial(compare, repeats=args.repeats)

  name = "scale search"
  results[name], mine, theirs = run(
    name, our_search_scale, torch_search_scale, (ours["w"], ours["x"]), (torch_w, torch_x)
  )
  results[name]["check"] = {"best ratio, ours": int(mine) / 20, "best ratio, torch": theirs / 20}
  assert int(mine) == theirs, results[name]["check"]

  # The published form takes minutes on the whole layer; its time grows with the output channels.
  few = min(256, args.size)
  for name, columns, partial_products in (
    (f"clip search, {few} output channels, torch as published", few, broadcast_products),
    ("clip search, torch by matrix products", args.size, matrix_products),
  ):
    search = functools.partial(torch_search_clip, partial_products=partial_products)
    our_arguments, their_arguments = (
      (ours["w"][:, :columns], ours["x"]),
      (torch_w[:columns], torch_x),
    )
    results[name], mine, theirs = run(name, our_search_clip, search, our_arguments, their_arguments)
    same = float(np.mean(np.asarray(mine).T == theirs.numpy()))
    results[name]["check"] = {"share of equal limits": same}
    assert same >= 0.99, same

  name = "GPTQ"
  results[name], mine, theirs = run(
    name, our_gptq, torch_gptq, (ours["w"], ours["h"]), (torch_w, torch_h)
  )
  mine, theirs = np.asarray(mine.dequantize()), theirs.numpy().T
  step = np.abs(w).max() / LEVELS
  # e^T H e, summed over output channels: twice the output error on the calibration set.
  error = lambda new: float(np.einsum("io,io->", w - new, h @ (w - new)))
  ratio = error(mine) / error(theirs)
  results[name]["check"] = {
    "share of equal weights": float(np.mean(np.abs(mine - theirs) < 0.01 * step)),
    "output error, ours / torch": ratio,
  }
  assert abs(ratio - 1) < 0.01, ratio
  return {"load_average": {"before": load, "after": os.getloadavg()[0]}, "results": results}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--size", type=int, default=4096, help="width and height of the layer")
  parser.add_argument("--calibration_tokens", type=int, default=8192)
  parser.add_argument("--tokens", type=int, default=512, help="tokens the searches look at")
  parser.add_argument("--repeats", type=int, default=3, help="warm runs; the best counts")
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".json")
  )
  parser.add_argument("--threads", type=int, help="measure in this process (internal)")
  args = parser.parse_args()
  if args.threads:
    args.out.write_text(json.dumps(measure(args)))
    return

  # One process per number of threads, kept to as many cores: both sides, and the linear algebra
  # libraries below them, size their thread pools by that. On a machine that others use too, the
  # runs with one thread are the ones to believe: waiting for a late thread hurts PyTorch most.
  cores = sorted(os.sched_getaffinity(0))
  by_threads = {}
  for threads in sorted({1, len(cores)}):
    with tempfile.TemporaryDirectory() as folder:
      out = pathlib.Path(folder) / "part.json"
      command = [sys.executable, "-m", "benchmarks.quantization.awq_gptq_vs_torch", *sys.argv[1:]]
      subprocess.run(
        [*command, f"--out={out}", f"--threads={threads}"],
        check=True,
        preexec_fn=functools.partial(os.sched_setaffinity, 0, cores[:threads]),
      )
      by_threads[f"{threads} threads"] = json.loads(out.read_text())
  record = {
    "layer": [args.size, args.size],
    "bits": BITS,
    "group_size": GROUP,
    "calibration_tokens": args.calibration_tokens,
    "tokens": args.tokens,
    "warm_runs": args.repeats,
    **by_threads,
    "environment": {
      "cpu": cpu_name(),
      "cores": len(cores),
      "jax": jax.__version__,
      "torch": torch.__version__,
      "numpy": np.__version__,
      "python": platform.python_version(),
    },
  }
  args.out.write_text(json.dumps(record, indent=1) + "\n")


def cpu_name() -> str:
  for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith("model name"):
      return line.split(":", 1)[1].strip()
  return platform.processor()


if __name__ == "__main__":
  main()
