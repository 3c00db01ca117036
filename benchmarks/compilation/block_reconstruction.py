"""One block of Llama-2-7B and 70B, reconstructed by each method that learns on one v5p chip or on one or
four of v5e: does it fit, and how long do all blocks take at least?

  .venv/bin/python -m benchmarks.compilation.block_reconstruction
  .venv/bin/python -m benchmarks.compilation.block_reconstruction --methods=qllm --slices=v5e:1x1

The step, all optimizer steps of a block or of a round of blocks, is among those that `./run.sh METHOD
--config=:paper --compile_only=SLICE` compiles. No TPU is needed; a compilation takes a minute of two CPU
cores. Nothing is timed: a step takes at least its multiplications at the chip's peak, and at least its
memory traffic at full bandwidth. One v5e chip is too small for the calibration activations, which
lie in the host's memory there (`sample_memory`); what is then copied from it is not in these bounds.
`run_block` is no method but what every one does between its steps: the activations behind a block, once
in the original and once in the quantized model. Exits with 1 if a step does not fit.
"""

import dataclasses
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from common import cli
from common.compilation.compile_only import compile_step, table
from common.compilation.step import Step
from common.compilation.topology import tpu_slice
from common.models.decoder import Block, make_context
from common.models.llama_sizes import LLAMA_SIZES
from common.models.sharding import batch_sharding, place
from common.quantization.calibration import run_block
from common.reporting.report import environment
from common.training.mesh import make_mesh

# How the name of a method's step begins.
STEPS = {
  "flexround": "reconstruct",
  "flatquant": "learn",
  "qllm": "tune",
  "zeroquant_v2": "ZQ-Global",
}
# Calibration samples and their tokens of `run_block`: FlexRound's, the most.
SAMPLES, LENGTH = 512, 1024
SMALL, LARGE = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"
# (model, slice, where the calibration activations lie)
CASES = (
  (SMALL, "v5e:1x1", "pinned_host"),
  (SMALL, "v5e:2x2", "device"),
  (SMALL, "v5p:1x1x1", "device"),
  (LARGE, "v5p:1x1x1", "device"),
)
SLICES = list(dict.fromkeys(slice_name for _, slice_name, _ in CASES))

_OUT = flags.DEFINE_string("out", "benchmarks/compilation/block_reconstruction.json", "result")
_METHODS = flags.DEFINE_list("methods", [*STEPS, "run_block"], "which; the others' results stay")
_SLICES = flags.DEFINE_list("slices", SLICES, "which; the others' results stay")


def main(_) -> int:
  cli.prepare_jax(compile_only=True)
  out = pathlib.Path(_OUT.value)
  results = json.loads(out.read_text())["results"] if out.exists() else []
  fits = True
  for method in _METHODS.value:
    for model, slice_name, sample_memory in CASES:
      if slice_name not in _SLICES.value:
        continue
      # The walk through a model takes one device.
      if method == "run_block" and len(tpu_slice(slice_name).devices) > 1:
        continue
      result = block_step(method, model, slice_name, sample_memory)
      fits &= result["fits"]
      case = ("method", "model", "slice")
      results = [r for r in results if any(r[key] != result[key] for key in case)] + [result]
      report = {"environment": environment(), "results": results}
      out.write_text(json.dumps(report, indent=2) + "\n")
  return 0 if fits else 1


def block_step(method: str, model: str, slice_name: str, sample_memory: str) -> dict:
  """Compiles a method's step for a slice, with its samples in "device" or "pinned_host" memory."""
  tpu, at_a_time = tpu_slice(slice_name), 1
  if method == "run_block":
    step = forward_step(model, make_mesh({"data": -1}, tpu.devices), sample_memory)
  else:
    config = importlib.import_module(f"projects.{method}.config").get_config("paper")
    steps_of = importlib.import_module(f"projects.{method}.compile_steps").compile_steps
    with config.unlocked():
      config.model, config.models, config.sample_memory = model, (model,), sample_memory
    (step,) = (s for s in steps_of(config, tpu.devices) if s.name.startswith(STEPS[method]))
    at_a_time = config.get("blocks_per_round", 1)
  compiled = compile_step(step)
  Console().print(method, model, table(compiled, tpu))
  rounds = LLAMA_SIZES[model].num_layers / at_a_time
  seconds = max(compiled.seconds(tpu.chip)) if compiled.cost else None
  return dataclasses.asdict(compiled) | {
    "method": method,
    "model": model,
    "slice": slice_name,
    "sample_memory": sample_memory,
    "fits": compiled.fits(tpu.chip),
    "blocks_at_a_time": at_a_time,
    "step_seconds_at_least": seconds,
    "all_blocks_seconds_at_least": None if seconds is None else seconds * rounds,
  }


def forward_step(model: str, mesh: Mesh, sample_memory: str) -> Step:
  """`run_block` of one full-precision block over all samples, in float32 as a checkpoint is loaded."""
  config = LLAMA_SIZES[model]
  everywhere = lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
  positions = jnp.zeros((1, LENGTH), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(config, p, jnp.ones_like(p))[0], positions)
  where = batch_sharding(mesh).with_memory_kind(sample_memory)
  shape = (SAMPLES, LENGTH, config.hidden_size)
  x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
  step = lambda state, x, context: run_block(nnx.merge(graphdef, state), x, context)
  arguments = place(state, everywhere(state)), x, place(context, everywhere(context))
  return Step(f"run a block, {SAMPLES} x {LENGTH} tokens", step, arguments)


if __name__ == "__main__":
  cli.run_app(main)
