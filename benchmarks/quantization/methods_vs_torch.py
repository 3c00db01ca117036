"""The inner loops of the other quantization methods on one large linear layer: this repository
against PyTorch, on the CPU.

  .venv/bin/pip install -r benchmarks/requirements.txt
  python -m benchmarks.quantization.methods_vs_torch
  python -m benchmarks.quantization.methods_vs_torch --block --repeats=1

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

`--block` takes the sizes of a block of Llama-2-7B, whose linears have 4096 or 11008 outputs, and
64 x 512 tokens of calibration: of what repeats, a few steps, candidates or iterations, and of what
learns the paper's batch. Its results go to `methods_vs_torch_block.json`.
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
from threadpoolctl import threadpool_limits

from benchmarks.quantization import jax_methods, torch_methods
from benchmarks.quantization.awq_gptq_vs_torch import cpu_name, make_layer, seconds
from benchmarks.quantization.torch_methods import (
  BITS,
  CENTROIDS,
  FLAT_STEPS,
  GRID,
  ITERATIONS,
  RANK,
  STEPS,
  WIDTH,
)


class Method(NamedTuple):
  """One comparison.

  Attributes:
    sizes: tokens and outputs of the layer (if the method looks at any), and what else there is to
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


# ---------------------------------------------------------------- the comparison

METHODS = {
  "zeroquant_v2: LoRC, torch by SVD as published": Method(
    {"outputs": 2048, "rank": RANK},
    jax_methods.rounding_error,
    jax_methods.our_factors,
    torch_methods.torch_factors_by_svd,
    relative("product", 1e-3),
  ),
  "zeroquant_v2: LoRC, torch by eigenvectors": Method(
    {"outputs": 2048, "rank": RANK},
    jax_methods.rounding_error,
    jax_methods.our_factors,
    torch_methods.torch_factors_by_eigenvectors,
    relative("product", 1e-3),
  ),
  "qllm: matching of channels": Method(
    {"tokens": 4096, "outputs": WIDTH},
    jax_methods.with_splits,
    jax_methods.our_merges,
    torch_methods.torch_merges,
    both(equal_share("sources", 0.9), equal_share("targets", 0.9)),
  ),
  "flexround: steps of Adam": Method(
    {"tokens": 2048, "outputs": WIDTH, "steps": STEPS},
    jax_methods.layer,
    jax_methods.our_flexround,
    torch_methods.torch_flexround,
    both(relative("losses", 1e-2), equal_share("codes", 0.99)),
  ),
  "flatquant: steps of Adam": Method(
    {"tokens": 1024, "outputs": 2048, "steps": FLAT_STEPS},
    jax_methods.with_matrices,
    jax_methods.our_flatquant,
    torch_methods.torch_flatquant,
    # A value on a tie may be rounded either way, and Adam steps by the sign of small gradients.
    both(relative("errors", 1e-2), relative("change of c", 0.1)),
    blas_threads=1,
  ),
  "outlier_suppression_plus: threshold search": Method(
    {"tokens": 1024, "outputs": 256, "candidates": 101},
    jax_methods.small_range,
    jax_methods.our_threshold,
    torch_methods.torch_threshold,
    both(relative("threshold", 0.02), relative("loss", 1e-3)),
  ),
  "llm_fp4: search of formats and biases": Method(
    {"tokens": 256, "outputs": 256, "rounds": 1, "candidates": 6 * GRID},
    jax_methods.layer,
    jax_methods.our_formats,
    torch_methods.torch_formats,
    both(equal_share("formats", 1), relative("error", 1e-2)),
  ),
  "vptq: weighted k-means": Method(
    {"tokens": 4096, "outputs": 192, "centroids": CENTROIDS, "iterations": ITERATIONS},
    jax_methods.vectors,
    jax_methods.our_kmeans,
    torch_methods.torch_kmeans,
    relative("inertia", 1e-3),
  ),
  "vptq: channels with feedback": Method(
    {"tokens": 8192, "outputs": 384, "centroids": CENTROIDS},
    jax_methods.with_factor,
    jax_methods.our_pass,
    torch_methods.torch_pass,
    both(equal_share("indices", 0.9), relative("energy", 1e-2)),
  ),
  "adadim: error of either axis": Method(
    {"tokens": 8192, "outputs": WIDTH},
    jax_methods.layer,
    jax_methods.our_axis_errors,
    torch_methods.torch_axis_errors,
    relative("errors", 1e-3),
  ),
}

# Of a block of Llama-2-7B: 64 x 512 tokens of calibration, outputs of gate_proj and up_proj.
TOKENS, MLP_WIDTH = 64 * 512, 11008


def sized(name: str, sizes: dict, **arguments) -> Method:
  """One of `METHODS` at other sizes, and with arguments of both sides."""
  method = METHODS[name]
  return method._replace(
    sizes=method.sizes | sizes,
    ours=functools.partial(method.ours, **arguments),
    torch=functools.partial(method.torch, **arguments),
  )


_OF_ONE_THRESHOLD = Method(
  {"tokens": TOKENS, "outputs": MLP_WIDTH, "candidates": 1},
  jax_methods.small_range,
  jax_methods.our_one_threshold,
  torch_methods.torch_one_threshold,
  relative("loss", 1e-3),
)
_OF_THE_HESSIAN = Method(
  {"tokens": TOKENS},
  jax_methods.layer,
  jax_methods.our_hessian,
  torch_methods.torch_hessian,
  relative("hessian", 1e-4),
)
# Sizes, and arguments that make fewer candidates, steps or iterations of what would take minutes.
_OF_A_BLOCK = {
  "zeroquant_v2: LoRC, torch by SVD as published": ({"outputs": WIDTH}, {}),
  "zeroquant_v2: LoRC, torch by eigenvectors": ({"outputs": WIDTH}, {}),
  "qllm: matching of channels": ({"tokens": TOKENS, "outputs": MLP_WIDTH}, {}),
  # The paper's batches: 2 x 1024 and 4 x 2048 tokens.
  "flexround: steps of Adam": ({"outputs": MLP_WIDTH}, {}),
  "flatquant: steps of Adam": (
    {"tokens": 4 * 2048, "outputs": WIDTH, "steps": 2},
    {"steps": 2},
  ),
  "llm_fp4: search of formats and biases": (
    {"tokens": 8192, "outputs": WIDTH, "candidates": 6 * 2},
    {"grid": 2},
  ),
  # Outputs that vectors of six divide.
  "vptq: weighted k-means": (
    {"tokens": TOKENS, "outputs": 4092, "iterations": 2},
    {"iterations": 2},
  ),
  "vptq: channels with feedback": ({"tokens": TOKENS, "outputs": 11004}, {}),
  "adadim: error of either axis": ({"tokens": TOKENS, "outputs": WIDTH}, {}),
}
BLOCK_METHODS = {
  "gptq, vptq, adadim: Hessian": _OF_THE_HESSIAN,
  "outlier_suppression_plus: one threshold": _OF_ONE_THRESHOLD,
  **{name: sized(name, sizes, **more) for name, (sizes, more) in _OF_A_BLOCK.items()},
}


def make_inputs(method: Method) -> dict[str, np.ndarray]:
  """What both sides of a method are given."""
  outputs = method.sizes.get("outputs", 1)
  w, x = make_layer(WIDTH, method.sizes.get("tokens", 1))
  more = [make_layer(WIDTH, 1, seed)[0] for seed in range(1, -(-outputs // WIDTH))]
  return method.inputs(np.concatenate([w, *more], axis=1)[:, :outputs].copy(), x)


def measure(method: Method, side: str, repeats: int, out: pathlib.Path) -> None:
  """Runs one side of one method in this process; writes its seconds and its result."""
  arrays = make_inputs(method)
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


def compare(name: str, method: Method, threads: int, repeats: int, block: bool) -> dict:
  """Both sides of a method, one after the other, each in a process kept to as many cores."""
  cores, sides = sorted(os.sched_getaffinity(0))[:threads], {}
  with tempfile.TemporaryDirectory() as folder:
    for side in ("ours", "torch"):
      out = pathlib.Path(folder) / f"{side}.npz"
      command = [sys.executable, "-m", "benchmarks.quantization.methods_vs_torch"]
      command += ["--block"] if block else []
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
    **method.sizes,
    "ours_seconds": ours,
    "torch_seconds": theirs,
    "ratio": theirs / ours,
    "runs": runs,
    "load_average": os.getloadavg()[0],
    "check": method.check(sides["ours"], sides["torch"]),
  }


def results_to_keep(path: pathlib.Path, record: dict, methods: dict[str, Method]) -> dict:
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
  return {name: result for name, result in old["results"].items() if name in methods}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  names = list(dict.fromkeys([*METHODS, *BLOCK_METHODS]))
  parser.add_argument(
    "--only", action="append", choices=names, help="by default all; the others' results stay"
  )
  parser.add_argument("--block", action="store_true", help="at the sizes of a whole block")
  parser.add_argument("--threads", type=int, default=2, help="cores of either side")
  parser.add_argument("--repeats", type=int, default=3, help="warm runs; the best counts")
  parser.add_argument("--out", type=pathlib.Path, help="by default beside this file")
  parser.add_argument("--side", help="measure ours or torch in this process (internal)")
  args = parser.parse_args()
  methods = BLOCK_METHODS if args.block else METHODS
  if unknown := set(args.only or ()) - methods.keys():
    parser.error(f"--only={unknown.pop()}: expected one of {', '.join(methods)}")
  if args.side:
    measure(methods[args.only[0]], args.side, args.repeats, args.out)
    return
  file = pathlib.Path(__file__)
  out = args.out or file.with_name(f"{file.stem}_block.json" if args.block else f"{file.stem}.json")
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
  if args.only and out.exists():
    record["results"] = results_to_keep(out, record, methods)
  for name in args.only or methods:
    record["results"][name] = compare(name, methods[name], args.threads, args.repeats, args.block)
    # After every method: what is measured is kept if a later one fails.
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
