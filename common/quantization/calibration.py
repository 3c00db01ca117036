"""Calibration one block at a time, and the block-wise baselines RTN, SmoothQuant and GPTQ.

`quantize_blocks` walks a model from its first block to its last. It needs one block's weights and
the activations between two blocks in memory, never the whole model, so blocks may come from disk.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import AttentionContext, Block, Decoder, DecoderConfig, make_context
from common.models.surgery import linear_paths, record_inputs
from common.quantization import rtn
from common.quantization.equivalent import fold_scale, scaling_groups, smoothquant_scale
from common.quantization.gptq import gptq
from common.quantization.linear import get_kernels, pack_linears, set_kernels
from common.quantization.quantized_array import IntegerFormat

Array = jax.Array

# How many calibration rows one forward pass takes: bounds its temporary memory.
ROWS_PER_PASS = 8

QuantizeBlock = Callable[[int, Block, Array, AttentionContext], Block]


def quantize_blocks(
  outer: Decoder,
  blocks: Iterable[Block],
  tokens: Array,
  quantize_block: QuantizeBlock,
  *,
  stream: Literal["full_precision", "quantized"],
) -> Iterator[Block]:
  """Yields each block after `quantize_block(index, block, inputs, context)`.

  Args:
    outer: the model's embeddings (its blocks are not used).
    blocks: the full-precision blocks in order; consumed one at a time, not modified.
    tokens: calibration samples, int32 [samples, seq].
    quantize_block: returns the quantized block; must leave the one it is given alone. `inputs`
      are [samples, seq, dim].
    stream: whose outputs the next block is calibrated on: "full_precision" (AWQ: blocks are
      independent) or "quantized" (GPTQ: later blocks see the error of the earlier ones).
  """
  positions = jnp.arange(tokens.shape[1])[None]
  context, _ = make_context(outer.config, positions, jnp.ones_like(positions))
  x = outer.embed(tokens, jnp.broadcast_to(positions, tokens.shape))
  index = 0
  # Not `enumerate`, which would hold a block while the next one is read.
  for block in blocks:
    quantized = quantize_block(index, block, x, context)
    x = run_block(block if stream == "full_precision" else quantized, x, context)
    index += 1
    del block
    yield quantized
    del quantized


def quantize_model(
  model: Decoder,
  tokens: Array,
  quantize_block: QuantizeBlock,
  *,
  stream: Literal["full_precision", "quantized"],
) -> Decoder:
  """A copy of an in-memory model with every block quantized; see `quantize_blocks`."""
  quantized = nnx.clone(model)
  blocks = quantize_blocks(model, model.blocks, tokens, quantize_block, stream=stream)
  quantized.blocks = nnx.List(list(blocks))
  return quantized


def run_block(block: Block, x: Array, context: AttentionContext) -> Array:
  """The block's output [samples, seq, dim], a few rows at a time."""
  return _run_block(*nnx.split(block), x, context)


def block_inputs(block: Block, x: Array, context: AttentionContext) -> dict[str, Array]:
  """Inputs of the block's linears, {path: [samples, seq, in]}."""
  return _block_inputs(*nnx.split(block), x, context)


def block_hessians(
  block: Block, x: Array, context: AttentionContext, paths: Sequence[str]
) -> dict[str, Array]:
  """GPTQ's Hessians of the linears at `paths`, {path: float32 [in, in]}."""
  return _block_hessians(*nnx.split(block), x, context, tuple(paths))


def rtn_block(block: Block, format: IntegerFormat) -> Block:
  """The block with every linear rounded to nearest and packed."""
  block = nnx.clone(block)
  pack_linears(block, {p: _quantize(k, format) for p, k in get_kernels(block).items()})
  return block


def smoothquant_block(
  block: Block,
  x: Array,
  context: AttentionContext,
  config: DecoderConfig,
  format: IntegerFormat,
  *,
  alpha: float = 0.5,
) -> Block:
  """The block scaled by SmoothQuant's rule, then rounded to nearest and packed."""
  inputs = block_inputs(block, x, context)
  block = nnx.clone(block)
  for group in scaling_groups(config):
    features = inputs[group.linears[0]].astype(jnp.float32)
    x_max = jnp.abs(features).max(axis=(0, 1))
    kernels = list(get_kernels(block, list(group.linears)).values())
    fold_scale(block, group, smoothquant_scale(x_max, kernels, alpha))
  return rtn_block(block, format)


# The order in which a block's linears see their inputs; each stage's Hessians are taken after the
# earlier stages are quantized ("true sequential" in the GPTQ code).
GPTQ_STAGES = (
  ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  ("attention.o_proj",),
  ("mlp.gate_proj", "mlp.up_proj"),
  ("mlp.down_proj",),
)


def gptq_block(
  block: Block,
  x: Array,
  context: AttentionContext,
  format: IntegerFormat,
  *,
  damping: float = 0.01,
  act_order: bool = False,
) -> Block:
  """The block with every linear quantized by GPTQ and packed."""
  block = nnx.clone(block)
  kernels = get_kernels(block)
  weights = {}
  for stage in GPTQ_STAGES:
    paths = [p for p in stage if p in kernels]
    hessians = block_hessians(block, x, context, paths)
    for path in paths:
      weights[path] = gptq(
        kernels[path], hessians[path], format, damping=damping, act_order=act_order
      )
    set_kernels(block, {p: weights[p].dequantize(kernels[p].dtype) for p in paths})
  pack_linears(block, weights)
  return block


def _chunks(x: Array) -> Array:
  """[samples, ...] -> [passes, rows, ...] with as many rows a pass as divide the samples."""
  rows = next(r for r in range(min(ROWS_PER_PASS, x.shape[0]), 0, -1) if x.shape[0] % r == 0)
  return x.reshape(-1, rows, *x.shape[1:])


_quantize = jax.jit(rtn.quantize, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def _run_block(graphdef, state, x, context):
  run = lambda rows: nnx.merge(graphdef, state)(rows, context)[0]
  return jax.lax.map(run, _chunks(x)).reshape(x.shape)


def _record(graphdef, state, rows, context, paths):
  block = nnx.merge(graphdef, state)
  return record_inputs(block, list(paths), lambda block: block(rows, context))[1]


@functools.partial(jax.jit, static_argnums=0)
def _block_inputs(graphdef, state, x, context):
  paths = linear_paths(nnx.merge(graphdef, state))
  inputs = jax.lax.map(lambda rows: _record(graphdef, state, rows, context, paths), _chunks(x))
  return {path: v.reshape(*x.shape[:2], -1) for path, v in inputs.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _block_hessians(graphdef, state, x, context, paths):
  chunks = _chunks(x)

  def add(total, rows):
    inputs = _record(graphdef, state, rows, context, paths)
    products = {}
    for path, value in inputs.items():
      value = value.reshape(-1, value.shape[-1]).astype(jnp.float32)
      products[path] = jnp.matmul(value.T, value, precision="highest")
    return jax.tree.map(jnp.add, total, products), None

  kernels = get_kernels(nnx.merge(graphdef, state), list(paths))
  zeros = {p: jnp.zeros((k.shape[0],) * 2, jnp.float32) for p, k in kernels.items()}
  total, _ = jax.lax.scan(add, zeros, chunks)
  tokens = x.shape[0] * x.shape[1]
  return {path: 2.0 / tokens * value for path, value in total.items()}
