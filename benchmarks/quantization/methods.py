"""All methods of `./run.sh quantize` on one model, and qwix's GPTQ and AWQ, side by side.

  .venv/bin/pip install -r benchmarks/requirements.txt
  .venv/bin/python -m benchmarks.quantization.methods

Each method quantizes the same model on the same calibration samples, in a process of its own, twice:
the second time everything is compiled. The report, its page and plots go to
`benchmarks/quantization/methods/`, and `measured.json`, from which an interrupted run goes on. qwix takes its statistics in one pass of the full-precision
model, as its calibration providers do; its functions and ours are given the same format.

The bound of a decode step is that of one 4096 x 4096 linear at one row on a v5e in the method's
storage, counted in the compiler's schedule: the larger of cycles over the clock and of bytes over the
bandwidth.
"""

import json
import pathlib
import re
import subprocess
import sys
import time

from absl import flags

from common import cli
from common.errors import UserError

_MODEL = flags.DEFINE_string("model", "lm-small", "a base model or a Hugging Face directory")
_OUT = flags.DEFINE_string("out", "benchmarks/quantization/methods", "folder of the results")
_ONLY = flags.DEFINE_list("only", [], "methods; by default all")
_CHILD = flags.DEFINE_list("child", None, "run one method at bits and activation bits, print JSON")
_BOUND = flags.DEFINE_list("bound", None, "count the decode bound of a storage at bits, print JSON")

WEIGHT_ONLY = ("rtn", "smoothquant", "gptq", "awq", "flexround", "adadim", "zeroquant_v2", "vptq")
PEERS = ("qwix gptq", "qwix awq")
ACTIVATIONS = (
  *(
    "rtn",
    "smoothquant",
    "outlier_suppression_plus",
    "zeroquant_v2",
    "llm_fp4",
    "qllm",
    "flatquant",
  ),
)
SETTINGS = {
  **{f"W{bits}": (bits, 16, (*WEIGHT_ONLY, *PEERS)) for bits in (4, 3, 2)},
  "W4A4": (4, 4, ACTIVATIONS),
}
GROUP, STEPS, RANK = 32, 200, 4
DOMAINS = ("embedded:code", "embedded:prose", "embedded:science")
SAMPLES, LENGTH = 32, 128
EVAL_WINDOWS, EVAL_LENGTH = 20, 256
# VPTQ on a small model: as many index bits as the others have, with codebooks that are small enough.
VECTOR_LENGTHS = {2: 3, 3: 2, 4: 2}
# How the weights of a method are stored; "integer" otherwise.
STORAGE = {
  "adadim": "per input channel",
  "vptq": "codebook",
  "llm_fp4": "floating point",
  "zeroquant_v2": "low rank",
}


def measure(name: str, bits: int, activation_bits: int) -> dict:
  """Quantizes the model by one method, in this process."""
  cli.prepare_jax()
  import jax.numpy as jnp
  import numpy as np

  from common.data.pipelines import calibration_samples, evaluation_windows
  from common.evaluation.perplexity import window_losses
  from common.models.base import base_model

  base = base_model(_MODEL.value)
  tokens = calibration_samples(
    ",".join(DOMAINS), base.tokenizer, num_samples=SAMPLES, seq_len=LENGTH, seed=0
  )
  tokens = jnp.asarray(tokens)
  windows = evaluation_windows(
    DOMAINS, base.tokenizer, seq_len=EVAL_LENGTH, per_source=EVAL_WINDOWS
  )
  windows = np.concatenate(list(windows.values()))
  scored = jnp.asarray(windows[:8])
  expected = base.model(scored)[0]
  before, seconds = peak_megabytes(), []
  for _ in range(2):
    start = time.perf_counter()
    quantized, stored_bits = quantize(name, bits, activation_bits, base.model, tokens)
    quantized(scored[:1, :8])[0].block_until_ready()
    seconds.append(time.perf_counter() - start)
  memory = peak_megabytes() - before
  error = quantized(scored)[0] - expected
  return {
    "perplexity": window_losses(quantized, windows).perplexity,
    "output_error": float(jnp.mean(error**2) / jnp.mean(expected**2)),
    "bits_per_weight": stored_bits,
    "seconds": seconds[1],
    "first_seconds": seconds[0],
    "megabytes": memory,
  }


def quantize(name, bits, activation_bits, model, tokens):
  """The quantized model, and its stored bits per weight of the blocks' linears."""
  from apps.quantization.methods import Options, make_method
  from common.quantization.calibration import quantize_model
  from common.quantization.linear import get_kernels

  options = Options(
    bits,
    GROUP,
    activation_bits,
    steps=STEPS,
    rank=RANK,
    vector_length=VECTOR_LENGTHS.get(bits, 0),
  )
  if name == "full precision":
    return model, 32.0
  if name in PEERS:
    return quantize_by_qwix(name.split()[1], options.weights, model, tokens)
  method = make_method(name, model.config, options)
  quantized = quantize_model(model, tokens, method.quantize_block, stream=method.stream)
  weights = sum(kernel.size for kernel in get_kernels(model.blocks[0]).values())
  return quantized, 8 * layer_bytes(quantized.blocks[0]) / weights


def layer_bytes(block) -> int:
  """Bytes of a block's quantized layers in a checkpoint."""
  from common.quantization import packed_layout

  tensors, layers = packed_layout.to_tensors(block)
  return sum(v.nbytes for k, v in tensors.items() if k.startswith(tuple(f"{p}." for p in layers)))


def quantize_by_qwix(method, format, model, tokens):
  """qwix's function for one weight on every linear, with its calibration providers' statistics."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from qwix._src.core import qarray
  from qwix.contrib import awq_core, gptq_core

  from common.quantization.calibration import block_inputs, quantize_model
  from common.quantization.linear import get_kernels, set_kernels

  how = qarray.HowToQuantize(
    qtype={2: jnp.int2, 3: "int3", 4: jnp.int4}[format.bits],
    channelwise_axes=[0],
    tiled_axes={1: format.group_size},
  )

  @jax.jit
  def solve(kernel, x):
    """kernel: [in, out]; x: [..., in]."""
    w, flat = kernel.T, x.reshape(-1, x.shape[-1])
    if method == "gptq":
      packed = gptq_core.quantize_weight(w, gptq_core.compute_hessian(flat.T), how)[0]
      return qarray.dequantize(packed).T
    packed, scales = awq_core.quantize_weight(w, awq_core.compute_act_scale(flat), how)
    return (qarray.dequantize(packed) / scales).T

  def block(index, block, x, context):
    inputs = block_inputs(block, x, context)
    block = nnx.clone(block)
    set_kernels(block, {path: solve(k, inputs[path]) for path, k in get_kernels(block).items()})
    return block

  quantized = quantize_model(model, tokens, block, stream="full_precision")
  return quantized, format.bits + 32 / format.group_size


def peak_megabytes() -> float:
  """Of this process, so far. (Not getrusage: it begins with the size of the parent.)"""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def decode_bound(storage: str, bits: int) -> float:
  """Microseconds of a 4096 x 4096 linear at one row on a v5e."""
  from benchmarks.kernels.tpu_schedule import HERTZ, schedule  # isort: skip

  import jax
  import jax.numpy as jnp

  from benchmarks.kernels.lookup_schedule import lookup_loops
  from common.compilation.topology import CHIPS
  from kernels.float_matmul.api import float_matmul
  from kernels.lookup_matmul.api import lookup_matmul
  from kernels.lookup_matmul.packing import packed_shape
  from kernels.quantized_matmul.api import quantized_matmul
  from kernels.quantized_matmul.packing import pack, packed_dtype

  cli.prepare_jax(compile_only=True)
  size, group, rank = 4096, 128, 8
  array = jax.ShapeDtypeStruct
  x = array((1, size), jnp.bfloat16)

  def bound(function, *arguments, **counted):
    counted = {"small_region": 24, **counted}
    cycles, hbm_bytes = schedule(function, [x, *arguments], "v5e", **counted)
    by_schedule = sum(cycles.values()) / HERTZ["v5e"]
    return max(by_schedule, hbm_bytes / CHIPS["v5e"].bytes_per_second) * 1e6

  def integer(*groups):
    values = jax.eval_shape(lambda c: pack(c, bits, signed=False), array((size, size), jnp.int32))
    zeros = packed_dtype(8 if bits == 3 else bits, signed=False)
    arguments = values, array(groups, jnp.bfloat16), array(groups, zeros)
    for implementation in ("mosaic_tpu", "xla"):
      product = lambda x, *w: quantized_matmul(x, *w, bits=bits, implementation=implementation)  # noqa: B023
      # The kernel splits x once for each core's columns, and one core does both.
      by_input = implementation == "mosaic_tpu" and groups[1] == size
      try:
        return bound(product, *arguments, regions=[2] if by_input else ())
      except ValueError as e:
        reason = e  # No kernel for it: XLA's product.
    raise reason

  dot = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32)
  if storage == "full precision":
    return bound(dot, array((size, size), jnp.bfloat16))
  if storage == "per input channel":
    return integer(size, size // group)
  if storage == "codebook":
    k, v = 4096, 12 // bits
    weight = array(packed_shape(size, k, -(-size // v)), jnp.uint32), array((1, k, v), jnp.float16)
    product = lambda *w: lookup_matmul(*w, columns=size, implementation="mosaic_tpu")
    return bound(product, *weight, loops=lookup_loops(size, k, v), small_region=64)
  if storage == "floating point":
    product = lambda x, v, s: float_matmul(x, v, s, exponent_bits=2, mantissa_bits=1)
    return bound(product, array((size, size), jnp.uint4), array((1, size), jnp.bfloat16))
  factors = array((size, rank), jnp.bfloat16), array((rank, size), jnp.bfloat16)
  low_rank = bound(lambda x, a, b: dot(dot(x, a), b), *factors) if storage == "low rank" else 0.0
  return integer(size // group, size) + low_rank


def run_child(*arguments: str) -> dict:
  """The JSON that a child prints in its last line.

  Raises:
    UserError: it failed.
  """
  command = [sys.executable, "-m", "benchmarks.quantization.methods", *arguments]
  command.append(f"--model={_MODEL.value}")
  result = subprocess.run(command, capture_output=True, text=True)
  if result.returncode:
    raise UserError(f"{' '.join(arguments)} failed: {result.stderr.strip().splitlines()[-1:]}")
  return json.loads(result.stdout.splitlines()[-1])


def make_report(results: dict, bounds: dict[str, float], out: pathlib.Path):
  """Tables, plots and the page."""
  from common.reporting import plots
  from common.reporting.html import Run, write_page
  from common.reporting.report import Column, Figure, Report, Table, environment, write_report

  columns = [
    "method",
    Column("perplexity", ".3f", "lower"),
    Column("output error", ".4f", "lower"),
    Column("bits per weight", ".2f", "lower"),
    Column("seconds", ".1f", "lower"),
    Column("seconds, with compilation", ".1f", "lower"),
    Column("peak memory, MB", ".0f", "lower"),
    Column("v5e decode bound, us", ".1f", "lower"),
  ]
  full = results["full precision"]["full precision"]
  keys = ("perplexity", "output_error", "bits_per_weight", "seconds", "first_seconds", "megabytes")
  tables = []
  for setting, (bits, _, names) in SETTINGS.items():
    rows = [
      [
        "full precision",
        full["perplexity"],
        0.0,
        32.0,
        None,
        None,
        None,
        bounds["full precision 16"],
      ]
    ]
    for name in names:
      found = results[setting].get(name)
      if found is None:
        continue
      storage = STORAGE.get(name, "integer")
      rows.append([name, *(found[k] for k in keys), bounds.get(f"{storage} {bits}")])
    tables.append(Table(setting, columns, rows))
  plots_made = []
  weight_only = [s for s in SETTINGS if s != "W4A4"]
  above = lambda found: found["perplexity"] - full["perplexity"]
  names = [n for n in (*WEIGHT_ONLY, *PEERS) if all(n in results[s] for s in weight_only)]
  for key, label, value, log in (
    ("perplexity", "perplexity above full precision", above, False),
    ("output_error", "output error", lambda found: found["output_error"], True),
  ):
    series = {s: [value(results[s][n]) for n in names] for s in weight_only}
    path = out / f"{key}.png"
    plots.bar_plot(path, names, series, ylabel=label.replace("above ", "above\n"), log=log)
    plots_made.append(Figure(label, path.name, f"{label} by method and bits; lower is better"))
  names = list(results["W4A4"])
  path = out / "w4a4.png"
  label = "perplexity above full precision"
  heights = [above(results["W4A4"][n]) for n in names]
  plots.bar_plot(path, names, {"W4A4": heights}, ylabel=label.replace("above ", "above\n"))
  plots_made.append(Figure("W4A4", path.name, f"{label}; weights and activations of 4 bits"))
  report = Report(tables, plots_made, (), "quantization methods", "", {}, environment())
  write_report(report, out)
  title = "Quantization methods on one model"
  write_page(
    [Run("quantization", title, "post-training quantization", out, report)], out / "index.html"
  )
  return report


def main(_) -> None:
  if _CHILD.value:
    name, bits, activation_bits = _CHILD.value
    print(json.dumps(measure(name, int(bits), int(activation_bits))))
    return
  if _BOUND.value:
    storage, bits = _BOUND.value
    print(json.dumps({"microseconds": decode_bound(storage, int(bits))}))
    return
  from rich.progress import track

  from apps.quantization.methods import METHODS
  from common.reporting.report import print_report

  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  wanted = [("full precision", "full precision", 16, 16)]
  wanted += [
    (setting, name, bits, activation_bits)
    for setting, (bits, activation_bits, names) in SETTINGS.items()
    for name in names
    # qwix's GPTQ packs into JAX's types, which have no 3 bits.
    if (name in METHODS or name in PEERS) and (name, bits) != ("qwix gptq", 3)
    if not _ONLY.value or name in _ONLY.value
  ]
  measured = out / "measured.json"
  # What an interrupted run has measured already stays.
  results = json.loads(measured.read_text()) if measured.exists() else {}
  for setting, name, bits, activation_bits in track(wanted, "methods"):
    if name in results.get(setting, {}):
      continue
    found = run_child(f"--child={name},{bits},{activation_bits}")
    results.setdefault(setting, {})[name] = found
    measured.write_text(json.dumps(results, indent=1))
  bounds = {}
  for storage, bits in track(sorted(storages(results)), "decode bounds"):
    try:
      found = run_child(f"--bound={storage},{bits}")["microseconds"]
    except UserError:  # libtpu 0.0.52 aborts on some programs with narrow types.
      found = None
    bounds[f"{storage} {bits}"] = found
  print_report(make_report(results, bounds, out))


def storages(results: dict) -> set[tuple[str, int]]:
  """What the methods that were run store weights in, and at how many bits."""
  found = {("full precision", 16)}
  for setting, methods in results.items():
    if setting in SETTINGS:
      found |= {(STORAGE.get(name, "integer"), SETTINGS[setting][0]) for name in methods}
  return found


if __name__ == "__main__":
  cli.run_app(main)
