"""Llama-2-7B training and 70B and 8B inference, compiled for TPU slices: do they fit, how long is it?

  .venv/bin/python -m benchmarks.compilation.llama_slices

No TPU is needed; a training step takes a minute or two of two CPU cores to compile, the rest
seconds. Exits with 1 if a step does not fit.
"""

import dataclasses
import json
import pathlib
import time

import jax.numpy as jnp
from absl import flags
from rich.console import Console

from common import cli
from common.compilation.compile_only import compile_step, table
from common.compilation.decoder_steps import decode_step, training_step
from common.compilation.topology import tpu_slice
from common.models.llama_sizes import LLAMA_SIZES
from common.models.scan import abstract_stack
from common.reporting.report import environment
from common.training.mesh import make_mesh

_OUT = flags.DEFINE_string("out", "benchmarks/compilation/llama_slices.json", "result")

SMALL, LARGE, THIRD = (
  f"meta-llama/{name}" for name in ("Llama-2-7b-hf", "Llama-2-70b-hf", "Meta-Llama-3-8B")
)


def train(model, mesh):
  return training_step(LLAMA_SIZES[model], mesh, batch_size=mesh.size, seq_len=2048)


def decode(model, mesh):
  scanned, params = abstract_stack(LLAMA_SIZES[model], jnp.bfloat16)
  return decode_step(scanned, params, mesh, batch_size=32, max_length=4096)


def prefill(model, mesh):
  scanned, params = abstract_stack(LLAMA_SIZES[model], jnp.bfloat16)
  return decode_step(scanned, params, mesh, batch_size=4, max_length=2048, new_tokens=2048)


CASES = [
  (train, SMALL, "v5e:4x4", {"fsdp": -1}),
  (train, SMALL, "v5p:2x2x2", {"fsdp": -1}),
  (prefill, LARGE, "v5p:2x2x4", {"data": 2, "tensor": 8}),
  (decode, LARGE, "v5p:2x2x4", {"data": 2, "tensor": 8}),
  (decode, THIRD, "v5e:4x4", {"data": 2, "tensor": 8}),
]


def main(_) -> int:
  cli.prepare_jax(compile_only=True)
  results, fits = [], True
  for make_step, model, slice_name, axes in CASES:
    tpu = tpu_slice(slice_name)
    step = make_step(model, make_mesh(axes, tpu.devices))
    start = time.perf_counter()
    compiled = compile_step(step)
    seconds = time.perf_counter() - start
    Console().print(model, table(compiled, tpu), f"compiled in {seconds:.0f} s")
    fits &= compiled.fits(tpu.chip)
    described = dataclasses.asdict(compiled)
    described |= {"model": model, "slice": slice_name, "mesh": axes, "compile_seconds": seconds}
    described |= {"fits": compiled.fits(tpu.chip)}
    described |= {
      "step_seconds_at_least": max(compiled.seconds(tpu.chip)) if compiled.cost else None
    }
    results.append(described)
  report = {"environment": environment(), "results": results}
  pathlib.Path(_OUT.value).write_text(json.dumps(report, indent=2) + "\n")
  return 0 if fits else 1


if __name__ == "__main__":
  cli.run_app(main)
