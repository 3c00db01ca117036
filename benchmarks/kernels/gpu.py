"""The kernels for Hopper GPUs, checked and timed on one, beside what JAX, cuBLAS and cuDNN offer.

  .venv/bin/python -m benchmarks.kernels.gpu

Times are the device's own (CUPTI), of all launches of a call. A product is done with as many copies
of its weights, one after the other, as do not fit in the L2 cache, and decode attention likewise with
copies of its KV cache: a decoding step reads each layer's once. `copy` is the bandwidth of a large
copy: `of_copy` are the bytes that the arguments and the result have, over what would be copied in the
time. Codes have zero points and bfloat16 scales in groups of 128 inputs, those of floating point one
float32 scale per channel; the codes of a KV cache have one per token and head. Nothing is timed
before every kind of case agrees with the reference.
"""

import json
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.mosaic.gpu import profiler
from jax.experimental.pallas.ops.gpu import attention_mgpu, hopper_mixed_type_matmul_mgpu
from rich.console import Console
from rich.table import Table

from common import cli
from common.errors import UserError
from common.reporting.report import environment
from kernels.attention.api import attention
from kernels.decode_attention.api import decode_attention, quantize_tokens
from kernels.float_matmul.api import float_matmul
from kernels.platform import HOPPER, has_one_gpu
from kernels.quantized_matmul.api import quantized_matmul
from kernels.quantized_matmul.packing import pack

_OUT = flags.DEFINE_string("out", "benchmarks/kernels/gpu.json", "result")
_ITERATIONS = flags.DEFINE_integer("iterations", 20, "calls of which the median is taken")

# Inputs and outputs of Llama-2-7B's projections.
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
ROWS = (1, 16, 64, 512, 2048)
BITS = (2, 3, 4, 8)
GROUP = 128
FLOATS = ((4, 3), (2, 1), (1, 2), (3, 0))  # Bits of exponent and mantissa.
L2_BYTES = 2 * 50 * 2**20  # More than an H100's.
HEADS, KV_HEADS, CHANNELS = 32, 8, 128
TOKENS = (2048, 4096, 8192)
MOST_SCORES = 2**33  # Bytes that XLA's attention may take for them.
# Rows and slots of KV caches, what they are stored in, and the slots of a page if there are pages.
CACHES = [
  (batch, slots, dtype, page)
  for batch, slots in ((1, 4096), (1, 32768), (16, 4096), (64, 4096))
  for dtype in (jnp.bfloat16, jnp.int8, jnp.int4)
  for page in (None, 64)
]


def seconds(function, *arguments) -> float:
  """Of a call on the device: the median."""
  _, milliseconds = profiler.measure(function, iterations=_ITERATIONS.value)(*arguments)
  if milliseconds is None:
    raise UserError("CUPTI has measured nothing")
  return statistics.median(milliseconds) / 1e3


def copy_bandwidth() -> float:
  """Bytes per second, read and written."""
  x = jnp.zeros(2**28, jnp.float32)
  return 2 * x.nbytes / seconds(lambda x: x + 1, x)


def random_weights(seed: int, shape, bits: int):
  """Codes, scales and zero points."""
  codes, scales, zeros = jax.random.split(jax.random.key(seed), 3)
  of_groups = (shape[0] // GROUP, shape[1])
  return (
    pack(jax.random.randint(codes, shape, 0, 2**bits), bits, signed=False),
    jax.random.uniform(scales, of_groups, jnp.bfloat16, 0.01, 0.02),
    pack(jax.random.randint(zeros, of_groups, 0, 2**bits), 8 if bits == 3 else bits, signed=False),
  )


def check_products() -> None:
  for bits in BITS:
    for rows in (1, 16, 64, 200):
      weights = random_weights(bits, (1024, 512), bits)
      x = jax.random.normal(jax.random.key(0), (rows, 1024), jnp.bfloat16)
      ours, expected = (
        quantized_matmul(x, *weights, bits=bits, implementation=name)
        for name in ("mosaic_gpu", "xla")
      )
      agree(f"{bits} bits, {rows} rows", ours, expected)


def random_floats(seed: int, shape, exponent_bits: int, mantissa_bits: int):
  """Codes and scales."""
  codes, scales = jax.random.split(jax.random.key(seed))
  bits = 1 + exponent_bits + mantissa_bits
  return (
    jax.random.randint(codes, shape, 0, 2**bits).astype(jnp.uint4 if bits <= 4 else jnp.uint8),
    jax.random.uniform(scales, (1, shape[1]), jnp.float32, 0.01, 0.02),
  )


def check_float_products() -> None:
  for bits in FLOATS:
    for rows in (1, 16, 64, 200):
      weights = random_floats(sum(bits), (1024, 512), *bits)
      x = jax.random.normal(jax.random.key(0), (rows, 1024), jnp.bfloat16)
      ours, expected = (
        float_matmul(x, *weights, exponent_bits=bits[0], mantissa_bits=bits[1], implementation=name)
        for name in ("mosaic_gpu", "xla")
      )
      agree(f"E{bits[0]}M{bits[1]}, {rows} rows", ours, expected)


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


def check_decode_attention() -> None:
  for dtype in (jnp.bfloat16, jnp.int8, jnp.int4):
    for page in (None, 64):
      keys, values, options = random_cache(0, 4, 1024, dtype, page)
      query = jax.random.normal(jax.random.key(1), (4, HEADS, CHANNELS), jnp.bfloat16)
      lengths = jnp.array([1024, 700, 1, 0])
      ours, expected = (
        decode_attention(query, keys, values, lengths, implementation=name, **options)
        for name in ("mosaic_gpu", "xla")
      )
      agree(f"decode attention, {jnp.dtype(dtype)}, pages {page}", ours, expected)


def check_attention() -> None:
  segments = jnp.asarray(np.repeat([0, 1, 2, 3], (50, 300, 100, 574))[None])
  for options in ({}, {"segment_ids": segments}, {"sliding_window": 100}, {"causal": False}):
    q, k, v = queries_keys_values(1024)
    ours, expected = (
      attention(q, k, v, implementation=name, **options) for name in ("mosaic_gpu", "xla")
    )
    agree(f"attention {list(options)}", ours, expected)


def agree(name: str, found, expected) -> None:
  """Raises UserError unless they are equal up to a few roundings to bfloat16."""
  found, expected = (np.asarray(x, np.float32) for x in (found, expected))
  error = np.abs(found - expected).max() / np.abs(expected).max()
  if not error <= 2.0**-6:
    raise UserError(f"{name}: the kernel is off by {error:.3g} of the largest value")


def product_seconds(multiply, x, weights: list, shape) -> dict:
  """Of a product by each implementation of multiply(x, weights, name), and by cuBLAS in bfloat16."""
  result = {}
  for name in ("mosaic_gpu", "xla"):
    each = lambda x, weights, name=name: [multiply(x, w, name) for w in weights]
    result[name] = seconds(each, x, weights) / len(weights)
  copies = -(-L2_BYTES // (shape[0] * shape[1] * 2))
  dense = [jnp.full(shape, 0.01 * (i + 1), jnp.bfloat16) for i in range(copies)]
  each = lambda x, weights: [jnp.dot(x, w) for w in weights]
  return result | {"cublas_bfloat16": seconds(each, x, dense) / copies}


def product(shape, rows: int, bits: int, copy: float) -> dict:
  inputs, columns = shape
  x = jax.random.normal(jax.random.key(0), (rows, inputs), jnp.bfloat16)
  copies = -(-L2_BYTES * 8 // (inputs * columns * bits))
  weights = [random_weights(i, shape, bits) for i in range(copies)]
  multiply = lambda x, w, name: quantized_matmul(x, *w, bits=bits, implementation=name)
  result = {"shape": shape, "rows": rows, "bits": bits}
  result |= product_seconds(multiply, x, weights, shape)
  if bits == 8 and rows >= 512:
    # int8 [columns, inputs] times bfloat16 [inputs, rows], without scales.
    config = hopper_mixed_type_matmul_mgpu.TuningConfig(128, 128, 64, 4)
    mixed = lambda x, codes: [
      hopper_mixed_type_matmul_mgpu.mixed_matmul_kernel(w, x, out_dtype=jnp.bfloat16, config=config)
      for w in codes
    ]
    codes = [jnp.ones((columns, inputs), jnp.int8) for _ in range(copies)]
    result["jax_mixed_int8"] = seconds(mixed, x.T, codes) / copies
  _, scales, zeros = weights[0]
  zero_bits = 8 if bits == 3 else bits
  moved = (inputs * columns * bits + zeros.size * zero_bits) / 8 + scales.nbytes
  moved += x.nbytes + rows * columns * 2
  return result | {"of_copy": moved / copy / result["mosaic_gpu"]}


def float_product(shape, rows: int, bits: tuple[int, int], copy: float) -> dict:
  inputs, columns = shape
  x = jax.random.normal(jax.random.key(0), (rows, inputs), jnp.bfloat16)
  codes_bytes = inputs * columns * (1 + sum(bits)) // 8
  weights = [random_floats(i, shape, *bits) for i in range(-(-L2_BYTES // codes_bytes))]
  multiply = lambda x, w, name: float_matmul(
    x, *w, exponent_bits=bits[0], mantissa_bits=bits[1], implementation=name
  )
  result = {"shape": shape, "rows": rows, "format": f"E{bits[0]}M{bits[1]}"}
  result |= product_seconds(multiply, x, weights, shape)
  moved = codes_bytes + weights[0][1].nbytes + x.nbytes + rows * columns * 2
  return result | {"of_copy": moved / copy / result["mosaic_gpu"]}


def decode_step(batch: int, slots: int, dtype, page: int | None, copy: float) -> dict:
  """Full rows of a KV cache of one layer."""
  query = jax.random.normal(jax.random.key(0), (batch, HEADS, CHANNELS), jnp.bfloat16)
  lengths = jnp.full(batch, slots)
  # Keys and values, and their scales.
  moved = 2 * batch * KV_HEADS * slots * (CHANNELS * jax.dtypes.itemsize_bits(dtype) // 8)
  if dtype != jnp.bfloat16:
    moved += 2 * batch * KV_HEADS * slots * 4
  caches = [random_cache(i, batch, slots, dtype, page) for i in range(-(-L2_BYTES // moved))]
  result = {"batch": batch, "slots": slots, "dtype": str(jnp.dtype(dtype)), "page": page}
  for name in ("mosaic_gpu", "xla"):
    each = lambda query, caches, name=name: [
      decode_attention(query, *cache, lengths, implementation=name, **options)
      for *cache, options in caches
    ]
    result[name] = seconds(each, query, caches) / len(caches)
  return result | {"of_copy": (moved + 2 * query.nbytes) / copy / result["mosaic_gpu"]}


def queries_keys_values(tokens: int):
  keys = jax.random.split(jax.random.key(0), 3)
  heads = (HEADS, KV_HEADS, KV_HEADS)
  return [
    jax.random.normal(key, (1, n, tokens, CHANNELS), jnp.bfloat16) for key, n in zip(keys, heads)
  ]


def causal_attention(tokens: int) -> dict:
  q, k, v = queries_keys_values(tokens)
  result = {"tokens": tokens}
  result["mosaic_gpu"] = seconds(lambda *x: attention(*x, implementation="mosaic_gpu"), q, k, v)
  if HEADS * tokens * tokens * 4 <= MOST_SCORES:
    result["xla"] = seconds(lambda *x: attention(*x, implementation="xla"), q, k, v)
  # The others take tokens before heads.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  cudnn = lambda *x: jax.nn.dot_product_attention(*x, is_causal=True, implementation="cudnn")
  result["cudnn"] = seconds(cudnn, q, k, v)
  config = attention_mgpu.TuningConfig(128, 128, 2, causal=True)
  try:
    result["jax_attention_mgpu"] = seconds(lambda *x: attention_mgpu.attention(*x, config), q, k, v)
  except ValueError as e:  # It refuses versions of CUDA that compile it wrongly.
    result["jax_attention_mgpu"] = str(e)
  flops = 2 * 2 * HEADS * CHANNELS * tokens * (tokens + 1) / 2
  return result | {"flops_per_second": flops / result["mosaic_gpu"]}


def print_table(results: list[dict], columns: tuple[str, ...]) -> None:
  times = ("mosaic_gpu", "xla", "cublas_bfloat16", "jax_mixed_int8", "cudnn", "jax_attention_mgpu")
  table = Table(*columns, *(f"{name}, us" for name in times if any(name in r for r in results)))
  for r in results:
    cells = [r.get(name) for name in times if any(name in other for other in results)]
    cells = [f"{t * 1e6:.1f}" if isinstance(t, float) else "" for t in cells]
    table.add_row(*(str(r[name]) for name in columns), *cells)
  Console(width=120).print(table)


def main(_) -> None:
  if not has_one_gpu(HOPPER):
    kind = jax.devices()[0].device_kind
    raise UserError(f"the kernels need one Hopper GPU; this machine has {kind}: nothing is timed")
  check_products()
  check_float_products()
  check_attention()
  check_decode_attention()
  copy = copy_bandwidth()
  products = [
    product(shape, rows, bits, copy) for shape in SHAPES for bits in BITS for rows in ROWS
  ]
  float_products = [
    float_product(shape, rows, bits, copy) for shape in SHAPES for bits in FLOATS for rows in ROWS
  ]
  attentions = [causal_attention(tokens) for tokens in TOKENS]
  decode_steps = [decode_step(*cache, copy) for cache in CACHES]
  print(f"copy: {copy / 1e9:.0f} GB/s")
  print_table(products, ("shape", "rows", "bits"))
  print_table(float_products, ("shape", "rows", "format"))
  print_table(attentions, ("tokens",))
  print_table(decode_steps, ("batch", "slots", "dtype", "page"))
  result = {
    "environment": environment(),
    "copy_bytes_per_second": copy,
    "products": products,
    "float_products": float_products,
    "causal_attention": attentions,
    "decode_attention": decode_steps,
  }
  pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  cli.run_app(main)
