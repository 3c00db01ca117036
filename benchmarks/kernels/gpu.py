"""The kernels for Hopper GPUs, checked and timed on one, beside what JAX, cuBLAS and cuDNN offer.

  .venv/bin/python -m benchmarks.kernels.gpu
  .venv/bin/python -m benchmarks.kernels.gpu --only=products --only=attention

Times are the device's own (CUPTI), of all launches of a call. A product is done with as many copies
of its weights, one after the other, as do not fit in the L2 cache, and decode attention likewise with
copies of its KV cache: a decoding step reads each layer's once. `copy` is the bandwidth of a large
copy: `of_copy` are the bytes that the arguments and the result have, over what would be copied in the
time. Codes have zero points and bfloat16 scales in groups of 128 inputs, those of floating point one
float32 scale per channel, tokamax's no zero points; the codes of a KV cache have one scale per token
and head. JAX's attention is given float16, the type of its kernel's memory whatever the arguments'. What a
library refuses stands in place of its time. Nothing is timed before every kind of case agrees with the reference.

The programs are compiled by all cores at once, and timed one by one.
"""

import concurrent.futures
import functools
import importlib.util
import pathlib
import statistics
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas.ops.gpu import attention_mgpu, hopper_mixed_type_matmul_mgpu
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kernels import results
from common import cli
from common.errors import UserError
from common.reporting.report import environment
from kernels.attention.api import attention
from kernels.decode_attention.api import decode_attention, quantize_tokens
from kernels.float_matmul.api import float_matmul
from kernels.platform import HOPPER, has_one_gpu
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import pack

PARTS = ("products", "float_products", "attention", "decode_attention")
_OUT = flags.DEFINE_string("out", "benchmarks/kernels/gpu.json", "result")
_ONLY = flags.DEFINE_multi_enum("only", PARTS, PARTS, "time these, keep the others' results")
_ITERATIONS = flags.DEFINE_integer("iterations", 20, "calls of which the median is taken")

# Bits, inputs and outputs of Llama-2-7B's and 70B's projections, rows.
ROWS = (1, 16, 64, 512, 2048, 4096)
PRODUCTS = [
  *(
    (4, shape, rows)
    for shape in ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672), (28672, 8192))
    for rows in ROWS
  ),
  *((bits, (4096, 11008), rows) for bits in (2, 3, 8) for rows in (1, 16, 64, 2048)),
]
GROUP = 128
FLOATS = ((4, 3), (2, 1), (1, 2), (3, 0))  # Bits of exponent and mantissa.
FLOAT_PRODUCTS = [(bits, (4096, 11008), rows) for bits in FLOATS for rows in (1, 16, 2048)]
L2_BYTES = 2 * 50 * 2**20  # More than an H100's.
HEADS, KV_HEADS, CHANNELS = 32, 8, 128
TOKENS = (1024, 4096, 8192)
MOST_SCORES = 2**33  # Bytes that XLA's attention may take for them.
# Rows and slots of KV caches, what they are stored in, and the slots of a page if there are pages.
CACHES = [
  (batch, slots, dtype, page)
  for batch, slots, pages in (
    (1, 4096, (None,)),
    (1, 32768, (None,)),
    (16, 4096, (None, 64)),
    (64, 4096, (None,)),
  )
  for dtype in (jnp.bfloat16, jnp.int8, jnp.int4)
  for page in pages
]
OURS, REFERENCE = "mosaic_gpu", "xla"


class Program(NamedTuple):
  """A function that is timed.

  Attributes:
    function: of arrays.
    arguments: of a call.
    repeats: how often a call does what the time is given for.
  """

  function: Callable
  arguments: tuple
  repeats: int = 1


class Case(NamedTuple):
  """What one row of a table is about.

  Attributes:
    labels: the row's columns but for the times.
    programs: by the name of the implementation.
    moved: bytes of the arguments and the result of our program.
    operations: of floating point.
  """

  labels: dict[str, Any]
  programs: dict[str, Program]
  moved: int
  operations: float


def seconds(program: Program) -> float:
  """On the device, for what is repeated: the median of the calls."""
  call = profiler.measure(program.function, iterations=_ITERATIONS.value)
  _, milliseconds = call(*program.arguments)
  if milliseconds is None:
    raise UserError("CUPTI has measured nothing")
  return statistics.median(milliseconds) / 1e3 / program.repeats


def compile_programs(cases: list[Case]) -> list[dict[str, Program | str]]:
  """Each case's compiled programs, or why a library has none."""
  tracing = threading.Lock()  # Python's part; machine code is made in parallel.

  def compiled(name: str, program: Program) -> Program | str:
    try:
      with tracing:
        lowered = jax.jit(program.function).lower(*program.arguments)
      return program._replace(function=lowered.compile())
    except Exception as e:
      if name in (OURS, REFERENCE):
        raise
      return f"{type(e).__name__}: {str(e).splitlines()[0][:200]}" if str(e) else type(e).__name__

  with concurrent.futures.ThreadPoolExecutor() as pool:
    futures = [
      {name: pool.submit(compiled, name, program) for name, program in case.programs.items()}
      for case in cases
    ]
    return [
      {name: future.result() for name, future in of_case.items()}
      for of_case in track(futures, "compiling", console=Console(stderr=True))
    ]


def time_cases(cases: list[Case], copy: float) -> list[dict[str, Any]]:
  """Seconds by implementation, and what ours reaches."""
  found = []
  programs = compile_programs(cases)
  for case, compiled in zip(track(cases, "timing", console=Console(stderr=True)), programs):
    times = {
      name: program if isinstance(program, str) else seconds(program)
      for name, program in compiled.items()
    }
    ours = times[OURS]
    reached = {"of_copy": case.moved / copy / ours, "flops_per_second": case.operations / ours}
    found.append(case.labels | times | reached)
  return found


def copy_bandwidth() -> float:
  """Bytes per second, read and written."""
  x = jnp.zeros(2**28, jnp.float32)
  return 2 * x.nbytes / seconds(Program(lambda x: x + 1, (x,)))


def for_each(multiply: Callable) -> Callable:
  """[multiply(x, *w) for the weights of each copy], traced once."""
  multiply = jax.jit(multiply)
  return lambda x, weights: [multiply(x, *w) for w in weights]


@functools.cache
def random_weights(shape, bits: int, copies: int = 1):
  """For each copy codes, scales and zero points."""

  def one(seed):
    codes, scales, zeros = jax.random.split(jax.random.key(seed), 3)
    of_groups = (shape[0] // GROUP, shape[1])
    zero_bits = 8 if bits == 3 else bits
    return (
      pack(jax.random.randint(codes, shape, 0, 2**bits), bits, signed=False),
      jax.random.uniform(scales, of_groups, jnp.bfloat16, 0.01, 0.02),
      pack(jax.random.randint(zeros, of_groups, 0, 2**bits), zero_bits, signed=False),
    )

  return [jax.jit(one)(seed) for seed in range(copies)]


@functools.cache
def random_floats(shape, exponent_bits: int, mantissa_bits: int, copies: int = 1):
  """For each copy codes and scales."""
  bits = 1 + exponent_bits + mantissa_bits

  def one(seed):
    codes, scales = jax.random.split(jax.random.key(seed))
    return (
      jax.random.randint(codes, shape, 0, 2**bits).astype(jnp.uint4 if bits <= 4 else jnp.uint8),
      jax.random.uniform(scales, (1, shape[1]), jnp.float32, 0.01, 0.02),
    )

  return [jax.jit(one)(seed) for seed in range(copies)]


@functools.cache
def random_dense(shape):
  """bfloat16 weights, as many as do not fit in the cache. (Zeros would take less power.)"""
  copies = -(-L2_BYTES // (shape[0] * shape[1] * 2))
  draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))
  return [(draw(seed),) for seed in range(copies)]


def random_rows(rows: int, inputs: int):
  return jax.random.normal(jax.random.key(0), (rows, inputs), jnp.bfloat16)


def random_cache(seed: int, batch: int, slots: int, dtype, page: int | None):
  """Keys, values and the options of `decode_attention` for them."""
  shape = (batch, KV_HEADS, slots, CHANNELS)
  options = {}
  if page is not None:
    pages = batch * slots // page
    shape = (pages, KV_HEADS, page, CHANNELS)
    table = jax.random.permutation(jax.random.key(seed), pages)
    options["page_table"] = table.reshape(batch, slots // page)
  arrays = []
  for name, key in zip(("key_scales", "value_scales"), jax.random.split(jax.random.key(seed))):
    x = jax.random.normal(key, shape, jnp.bfloat16)
    if dtype != jnp.bfloat16:
      x, options[name] = jax.jit(quantize_tokens, static_argnums=1)(x, dtype)
    arrays.append(x)
  return (*arrays, options)


def queries_keys_values(tokens: int):
  keys = jax.random.split(jax.random.key(0), 3)
  heads = (HEADS, KV_HEADS, KV_HEADS)
  return [
    jax.random.normal(key, (1, n, tokens, CHANNELS), jnp.bfloat16) for key, n in zip(keys, heads)
  ]


def check_products() -> None:
  for bits in (2, 3, 4, 8):
    for rows in (1, 16, 64, 200):
      [weights] = random_weights((1024, 512), bits)
      multiply = functools.partial(quantized_matmul, bits=bits)
      agree(f"{bits} bits, {rows} rows", multiply, random_rows(rows, 1024), *weights)


def check_float_products() -> None:
  for bits in FLOATS:
    for rows in (1, 16, 64, 200):
      [weights] = random_floats((1024, 512), *bits)
      multiply = functools.partial(float_matmul, exponent_bits=bits[0], mantissa_bits=bits[1])
      agree(f"E{bits[0]}M{bits[1]}, {rows} rows", multiply, random_rows(rows, 1024), *weights)


def check_attention() -> None:
  segments = jnp.asarray(np.repeat([0, 1, 2, 3], (50, 300, 100, 574))[None])
  for options in ({}, {"segment_ids": segments}, {"sliding_window": 100}, {"causal": False}):
    function = functools.partial(attention, **options)
    agree(f"attention {list(options)}", function, *queries_keys_values(1024))


def check_decode_attention() -> None:
  for dtype in (jnp.bfloat16, jnp.int8, jnp.int4):
    for page in (None, 64):
      *cache, options = random_cache(0, 4, 1024, dtype, page)
      query = jax.random.normal(jax.random.key(1), (4, HEADS, CHANNELS), jnp.bfloat16)
      lengths = jnp.array([1024, 700, 1, 0])
      function = functools.partial(decode_attention, **options)
      agree(f"decode attention, {jnp.dtype(dtype)}, pages {page}", function, query, *cache, lengths)


def agree(name: str, function: Callable, *arrays) -> None:
  """Raises UserError unless the kernel equals the reference up to a few roundings to bfloat16."""
  found, expected = (
    np.asarray(jax.jit(functools.partial(function, implementation=i))(*arrays), np.float32)
    for i in (OURS, REFERENCE)
  )
  error = np.abs(found - expected).max() / np.abs(expected).max()
  if not error <= 2.0**-6:
    raise UserError(f"{name}: the kernel is off by {error:.3g} of the largest value")


def products() -> list[Case]:
  """Integer codes."""
  cases = []
  for bits, shape, rows in PRODUCTS:
    inputs, columns = shape
    x = random_rows(rows, inputs)
    weights = random_weights(shape, bits, -(-L2_BYTES * 8 // (inputs * columns * bits)))
    multiply = functools.partial(quantized_matmul, bits=bits)
    programs = beside_dense(multiply, x, weights, shape)
    if bits in (4, 8):
      programs |= tokamax_product(x, shape, bits, len(weights))
    if bits == 8 and rows >= 512:
      programs["jax_mixed_int8"] = mixed_product(x, weights)
    _, scales, zeros = weights[0]
    zero_bits = 8 if bits == 3 else bits
    moved = (inputs * columns * bits + zeros.size * zero_bits) // 8 + scales.nbytes
    labels = {"shape": shape, "rows": rows, "bits": bits}
    cases.append(product_case(labels, programs, shape, rows, moved))
  return cases


def float_products() -> list[Case]:
  """Codes of few-bit floating point."""
  cases = []
  for bits, shape, rows in FLOAT_PRODUCTS:
    stored = 4 if 1 + sum(bits) <= 4 else 8
    codes_bytes = shape[0] * shape[1] * stored // 8
    weights = random_floats(shape, *bits, -(-L2_BYTES // codes_bytes))
    multiply = functools.partial(float_matmul, exponent_bits=bits[0], mantissa_bits=bits[1])
    programs = beside_dense(multiply, random_rows(rows, shape[0]), weights, shape)
    labels = {"shape": shape, "rows": rows, "format": f"E{bits[0]}M{bits[1]}"}
    moved = codes_bytes + weights[0][1].nbytes
    cases.append(product_case(labels, programs, shape, rows, moved))
  return cases


def product_case(labels, programs, shape, rows: int, weight_bytes: int) -> Case:
  inputs, columns = shape
  moved = weight_bytes + 2 * rows * (inputs + columns)
  return Case(labels, programs, moved, 2.0 * rows * inputs * columns)


def beside_dense(multiply: Callable, x, weights, shape) -> dict[str, Program]:
  """A product by each implementation, and cuBLAS's in bfloat16."""
  programs = {
    name: Program(
      for_each(functools.partial(multiply, implementation=name)), (x, weights), len(weights)
    )
    for name in (OURS, REFERENCE)
  }
  dense = random_dense(shape)
  return programs | {"cublas_bfloat16": Program(for_each(jnp.dot), (x, dense), len(dense))}


def mixed_product(x, weights) -> Program:
  """JAX's kernel: int8 [columns, inputs] times bfloat16 [inputs, rows], without scales."""
  config = hopper_mixed_type_matmul_mgpu.TuningConfig(128, 128, 64, 4)
  multiply = lambda x, w: hopper_mixed_type_matmul_mgpu.mixed_matmul_kernel(
    w, x, out_dtype=jnp.bfloat16, config=config
  )
  codes = [(values.astype(jnp.int8).T,) for values, *_ in weights]
  return Program(for_each(multiply), (x.T, codes), len(codes))


def tokamax_product(x, shape, bits: int, copies: int) -> dict[str, Program]:
  """tokamax's `ragged_dot` with one group, if it is installed."""
  if not importlib.util.find_spec("tokamax"):
    return {}
  import qwix
  import tokamax

  quantize = lambda w: qwix.quantize(
    w, jnp.int4 if bits == 4 else jnp.int8, channelwise_axes=[0, 2], tiled_axes={1: GROUP}
  )
  draw = lambda seed: jax.random.normal(jax.random.key(seed), (1, *shape), jnp.bfloat16)
  weights = [(jax.jit(lambda seed: quantize(draw(seed)))(seed),) for seed in range(copies)]
  rows = jnp.full(1, len(x), jnp.int32)
  multiply = lambda x, w: tokamax.ragged_dot(x, w, group_sizes=rows, implementation="mosaic")
  return {"tokamax": Program(for_each(multiply), (x, weights), copies)}


def causal_attention() -> list[Case]:
  cases = []
  for tokens in TOKENS:
    arrays = queries_keys_values(tokens)
    programs = {
      name: Program(functools.partial(attention, implementation=name), arrays)
      for name in (OURS, REFERENCE)
      if name == OURS or HEADS * tokens * tokens * 4 <= MOST_SCORES
    }
    # The others take tokens before heads.
    arrays = [x.swapaxes(1, 2) for x in arrays]
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    programs["cudnn"] = Program(cudnn, arrays)
    if importlib.util.find_spec("tokamax"):
      import tokamax

      theirs = functools.partial(
        tokamax.dot_product_attention, is_causal=True, implementation="mosaic"
      )
      programs["tokamax"] = Program(theirs, arrays)
    config = attention_mgpu.TuningConfig(64, 128, 2, causal=True)
    theirs = lambda *x, config=config: attention_mgpu.attention(*x, config)
    programs["jax_attention_mgpu"] = Program(theirs, [x.astype(jnp.float16) for x in arrays])
    operations = 2 * 2 * HEADS * CHANNELS * tokens * (tokens + 1) / 2
    moved = sum(x.nbytes for x in arrays) + arrays[0].nbytes
    cases.append(Case({"tokens": tokens}, programs, moved, operations))
  return cases


def decode_steps() -> list[Case]:
  """Full rows of a KV cache of one layer."""
  cases = []
  for batch, slots, dtype, page in CACHES:
    query = jax.random.normal(jax.random.key(0), (batch, HEADS, CHANNELS), jnp.bfloat16)
    lengths = jnp.full(batch, slots)
    # Keys and values, and their scales.
    moved = 2 * batch * KV_HEADS * slots * (CHANNELS * jax.dtypes.itemsize_bits(dtype) // 8)
    if dtype != jnp.bfloat16:
      moved += 2 * batch * KV_HEADS * slots * 4
    caches = [random_cache(i, batch, slots, dtype, page) for i in range(-(-L2_BYTES // moved))]

    def step(query, cache, lengths, *, implementation):
      *arrays, options = cache
      return decode_attention(query, *arrays, lengths, implementation=implementation, **options)

    programs = {}
    for name in (OURS, REFERENCE):
      one = jax.jit(functools.partial(step, implementation=name))
      each = lambda query, caches, lengths, one=one: [one(query, c, lengths) for c in caches]
      programs[name] = Program(each, (query, caches, lengths), len(caches))
    labels = {"batch": batch, "slots": slots, "dtype": str(jnp.dtype(dtype)), "page": page}
    operations = 2.0 * 2 * batch * HEADS * slots * CHANNELS
    cases.append(Case(labels, programs, moved + 2 * query.nbytes, operations))
  return cases


def print_table(part: str, found: list[dict]) -> None:
  """Times in microseconds, of which those of a library that refuses are empty."""
  names = ("mosaic_gpu", "xla", "cublas_bfloat16", "jax_mixed_int8", "tokamax", "cudnn",
           "jax_attention_mgpu")  # fmt: skip
  names = [name for name in names if any(name in r for r in found)]
  labels = [k for k in ("shape", "rows", "bits", "format", "tokens", "batch", "slots", "dtype",
                        "page") if k in found[0]]  # fmt: skip
  table = Table(*labels, *(f"{name}, us" for name in names), "of copy", "TFLOP/s", title=part)
  for r in found:
    times = [f"{r[n] * 1e6:.1f}" if isinstance(r.get(n), float) else "" for n in names]
    reached = [f"{r['of_copy']:.0%}", f"{r['flops_per_second'] / 1e12:.0f}"]
    table.add_row(*(str(r[name]) for name in labels), *times, *reached)
  Console(width=140).print(table)


def main(_) -> None:
  if not has_one_gpu(HOPPER):
    kind = jax.devices()[0].device_kind
    raise UserError(f"the kernels need one Hopper GPU; this machine has {kind}: nothing is timed")
  path = pathlib.Path(_OUT.value)
  found = results.load(path, needed=False)
  steps = {
    "products": (check_products, products),
    "float_products": (check_float_products, float_products),
    "attention": (check_attention, causal_attention),
    "decode_attention": (check_decode_attention, decode_steps),
  }
  for part in _ONLY.value:
    check, cases = steps[part]
    check()
    copy = copy_bandwidth()
    timed = time_cases(cases(), copy)
    found[part] = {"environment": environment(), "copy_bytes_per_second": copy, "cases": timed}
    results.save(found, path)
    print(f"copy: {copy / 1e9:.0f} GB/s")
    print_table(part, timed)


if __name__ == "__main__":
  cli.run_app(main)
