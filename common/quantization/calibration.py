"""Calibration one block at a time, and the block-wise baselines RTN, SmoothQuant and GPTQ.

`quantize_blocks` walks a model from its first block to its last. It needs one block's weights and
the activations between two blocks in memory, never the whole model, so blocks may come from disk. The
activations may lie in the host's memory (`sample_memory`): all functions here then bring a few rows at
a time to the device.
Decoders, encoders and vision transformers are stacks of the same block.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block, Decoder, DecoderConfig
from common.models.encoder import Encoder
from common.models.surgery import linear_paths, record_inputs
from common.models.vit import VisionTransformer
from common.quantization import rtn
from common.quantization.equivalent import fold_scale, scaling_groups, smoothquant_scale
from common.quantization.gptq import gptq, stable_damping
from common.quantization.linear import get_kernels, pack_linears, set_kernels
from common.quantization.quantized_array import IntegerFormat, QuantizedArray
from common.quantization.reconstruction import (
  SampleMemory,
  check_sample_memory,
  in_host_memory,
  on_device,
)

Array = jax.Array

# How many calibration rows one forward pass takes: bounds its temporary memory.
ROWS_PER_PASS = 8

Model = Decoder | Encoder | VisionTransformer


class Streams(NamedTuple):
  """A block's inputs [samples, seq, dim] in the original model and after the quantized blocks."""

  full_precision: Array
  quantized: Array


QuantizeBlock = Callable[[int, Block, Array | Streams, AttentionContext], Block]


def quantize_blocks(
  outer: Model,
  blocks: Iterable[Block],
  inputs: Array,
  quantize_block: QuantizeBlock,
  *,
  stream: Literal["full_precision", "quantized", "both"],
  segment_ids: Array | None = None,
  token_types: Array | None = None,
  sample_memory: SampleMemory = "device",
) -> Iterator[Block]:
  """Yields each block after `quantize_block(index, block, x, context)`.

  Args:
    outer: what comes before the model's blocks (its blocks are not used).
    blocks: the full-precision blocks in order; consumed one at a time, not modified.
    inputs: calibration samples, int32 tokens [samples, seq], or images of a vision transformer.
    quantize_block: returns the quantized block; must leave the one it is given alone. `x` are its
      inputs, [samples, seq, dim].
    stream: whose outputs the next block is calibrated on: "full_precision" (AWQ: blocks are
      independent) or "quantized" (GPTQ: later blocks see the error of the earlier ones). With
      "both", `x` is the pair of them (block reconstruction).
    segment_ids: int32 [samples, seq], 0 for padding; by default there is none.
    token_types: of an encoder, int32 [samples, seq], 0 for the first and 1 for the second text of a
      pair; by default all 0.
    sample_memory: where the activations lie; `quantize_block` is given them there. The results are
      the same. (Before the first block all of them are on the device once. For features that are no
      multiple of 128 the TPU's compiler does not support the host's memory.)

  Raises:
    UserError: see `check_sample_memory`.
  """
  check_sample_memory(sample_memory)
  ids = {"segment_ids": segment_ids, "token_types": token_types}
  # A decoder has no types of tokens, a vision transformer neither.
  x, context = outer.stem(inputs, **{name: i for name, i in ids.items() if i is not None})
  if sample_memory == "pinned_host":
    x = in_host_memory(x)
  streams = Streams(x, x)
  index = 0
  # Not `enumerate`, which would hold a block while the next one is read.
  for block in blocks:
    x = streams if stream == "both" else getattr(streams, stream)
    quantized = quantize_block(index, block, x, context)
    del x
    # A stream that is not asked for is not computed.
    full = run_block(block, streams.full_precision, context) if stream != "quantized" else None
    both = stream != "full_precision"
    streams = Streams(full, run_block(quantized, streams.quantized, context) if both else None)
    index += 1
    del block
    yield quantized
    del quantized


def quantize_model(
  model: Model,
  inputs: Array,
  quantize_block: QuantizeBlock,
  *,
  stream: Literal["full_precision", "quantized", "both"],
  segment_ids: Array | None = None,
  token_types: Array | None = None,
  sample_memory: SampleMemory = "device",
) -> Model:
  """A copy of an in-memory model with every block quantized; see `quantize_blocks`."""
  quantized = nnx.clone(model)
  blocks = quantize_blocks(
    model,
    model.blocks,
    inputs,
    quantize_block,
    stream=stream,
    segment_ids=segment_ids,
    token_types=token_types,
    sample_memory=sample_memory,
  )
  quantized.blocks = nnx.List(list(blocks))
  return quantized


def run_block(block: Block, x: Array, context: AttentionContext) -> Array:
  """The block's output [samples, seq, dim], a few rows at a time, in the memory that x lies in."""
  return _run_block(*nnx.split(block), x, context)


def block_inputs(
  block: Block,
  x: Array,
  context: AttentionContext,
  paths: Sequence[str] | None = None,
  samples: int | None = None,
) -> dict[str, Array]:
  """Inputs of the block's linears, {path: [samples, seq, in]}; on the device.

  Args:
    block, x, context: see `quantize_blocks`.
    paths: of the linears; all by default.
    samples: only of the first so many; of all by default.
  """
  paths = tuple(linear_paths(block) if paths is None else paths)
  samples = len(x) if samples is None else min(samples, len(x))
  return _block_inputs(*nnx.split(block), x, context, paths, samples)


def largest_inputs(
  block: Block, x: Array, context: AttentionContext, paths: Sequence[str]
) -> dict[str, Array]:
  """The largest |input| of each channel of linears over all tokens, {path: float32 [in]}.

  Args:
    block, x, context: see `quantize_blocks`.
    paths: of the linears.
  """
  return _largest_inputs(*nnx.split(block), x, context, tuple(paths))


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
  return rtn_block(smoothed_block(block, x, context, config, alpha=alpha), format)


def smoothed_block(
  block: Block, x: Array, context: AttentionContext, config: DecoderConfig, *, alpha: float = 0.5
) -> Block:
  """The block scaled by SmoothQuant's rule, in full precision: the same function."""
  groups = scaling_groups(config)
  largest = largest_inputs(block, x, context, [group.linears[0] for group in groups])
  block = nnx.clone(block)
  for group in groups:
    kernels = list(get_kernels(block, list(group.linears)).values())
    fold_scale(block, group, smoothquant_scale(largest[group.linears[0]], kernels, alpha))
  return block


# The order in which a block's linears see their inputs; each stage's Hessians are taken after the
# earlier stages are quantized ("true sequential" in the GPTQ code).
GPTQ_STAGES = (
  ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
  ("attention.o_proj",),
  ("mlp.gate_proj", "mlp.up_proj"),
  ("mlp.down_proj",),
)


# (path, kernel [in, out], Hessian [in, in], damping) -> the packed weight
SolveLinear = Callable[[str, Array, Array, Array], QuantizedArray]


def gptq_weights(
  block: Block,
  x: Array,
  context: AttentionContext,
  solve: SolveLinear,
  *,
  damping: float = 0.01,
  act_order: bool = False,
) -> dict[str, QuantizedArray]:
  """Packed weights of a block's linears, each solved against the Hessian of its inputs.

  Linears that share an input are quantized against it as it is after the block's earlier linears
  were. Where float32 cannot factor a Hessian its damping is raised, see `stable_damping`.

  Args:
    block: in full precision; not modified.
    x, context: its inputs, see `quantize_blocks`.
    solve: quantizes one linear.
    damping: to begin with, as a fraction of the Hessian's mean diagonal.
    act_order: whether `solve` takes the inputs by descending diag(H).

  Raises:
    UserError: a Hessian is singular even when damped by 100 % of its mean diagonal.
  """
  block = nnx.clone(block)
  kernels = get_kernels(block)
  weights, dampings = {}, {}
  for stage in GPTQ_STAGES:
    paths = [p for p in stage if p in kernels]
    for path, h in block_hessians(block, x, context, paths).items():
      dampings[path] = stable_damping(h, damping, act_order)
      weights[path] = solve(path, kernels[path], h, dampings[path])
    set_kernels(block, {p: weights[p].dequantize(kernels[p].dtype) for p in paths})
  # Looked at only now: until here nothing waited for the device.
  for path, used in jax.device_get(dampings).items():
    if not used <= max(1.0, damping):
      raise UserError(
        f"the Hessian of {path} is singular: expected calibration inputs that differ; use more "
        "calibration samples"
      )
  return weights


def gptq_block(
  block: Block,
  x: Array,
  context: AttentionContext,
  format: IntegerFormat,
  *,
  damping: float = 0.01,
  act_order: bool = False,
) -> Block:
  """The block with every linear quantized by GPTQ and packed; see `gptq_weights`."""

  def solve(path, kernel, h, damping):
    return gptq(kernel, h, format, damping=damping, act_order=act_order)

  weights = gptq_weights(block, x, context, solve, damping=damping, act_order=act_order)
  block = nnx.clone(block)
  pack_linears(block, weights)
  return block


def check_finite(module: nnx.Module, x: Array | None = None) -> None:
  """Checks, before any work, that weights and calibration activations are numbers.

  Args:
    module: a block or model.
    x: its inputs.

  Raises:
    UserError: the first tensor with a NaN or an infinity is named.
  """
  parameters = nnx.to_flat_state(nnx.state(module, nnx.Param))
  tensors = [(".".join(map(str, path)), leaf[...]) for path, leaf in parameters]
  tensors += [] if x is None else [("the calibration activations", x)]
  for (name, _), finite in zip(tensors, jax.device_get([_is_finite(v) for _, v in tensors])):
    if not finite:
      raise UserError(
        f"{name}: NaN or infinite values, expected finite ones; mend the checkpoint or the "
        "calibration data"
      )


def passes(x: Array, context: AttentionContext) -> tuple[Array, AttentionContext]:
  """Both cut into passes of a few rows, as many as divide the samples: leaves are [passes, ...]."""
  samples = x.shape[0]
  rows = next(r for r in range(min(ROWS_PER_PASS, samples), 0, -1) if samples % r == 0)
  cut = lambda leaf: leaf.reshape(-1, rows, *leaf.shape[1:])

  def cut_context(leaf):
    # What has one row serves every sample.
    if leaf.ndim and leaf.shape[0] == samples:
      return cut(leaf)
    return jnp.broadcast_to(leaf, (samples // rows, *leaf.shape))

  return cut(x), jax.tree.map(cut_context, context)


def token_mask(x: Array, context: AttentionContext) -> Array:
  """1 for a token and 0 for padding, float32 [samples, seq, 1], of a block's inputs x."""
  segments = jnp.broadcast_to(context.keys.segment_ids, x.shape[:2])
  return (segments != 0).astype(jnp.float32)[..., None]


_quantize = jax.jit(rtn.quantize, static_argnums=1)


# Of one tensor: blocks of every kind share the program of a shape.
@jax.jit
def _is_finite(x):
  if jax.typeof(x).memory_space != jax.memory.Space.Host:
    return jnp.isfinite(x).all()
  return jax.lax.map(lambda row: jnp.isfinite(on_device(row)).all(), x).all()


@functools.partial(jax.jit, static_argnums=0)
def _run_block(graphdef, state, x, context):
  in_host = jax.typeof(x).memory_space == jax.memory.Space.Host

  def run(rows):
    x, context = rows
    output = nnx.merge(graphdef, state)(on_device(x), context)[0]
    return in_host_memory(output) if in_host else output

  return jax.lax.map(run, passes(x, context)).reshape(x.shape)


def _record(graphdef, state, rows, paths):
  block, (x, context) = nnx.merge(graphdef, state), rows
  return record_inputs(block, list(paths), lambda block: block(on_device(x), context))[1]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _block_inputs(graphdef, state, x, context, paths, samples):
  rows = passes(x, context)
  first = -(-samples // rows[0].shape[1])
  record = lambda rows: _record(graphdef, state, rows, paths)
  inputs = jax.lax.map(record, jax.tree.map(lambda leaf: leaf[:first], rows))
  return {p: v.reshape(-1, x.shape[1], v.shape[-1])[:samples] for p, v in inputs.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _largest_inputs(graphdef, state, x, context, paths):
  def of_rows(rows):
    mask = token_mask(*rows)
    largest = lambda v: jnp.max(jnp.abs(v.astype(jnp.float32)) * mask, axis=(0, 1))
    return jax.tree.map(largest, _record(graphdef, state, rows, paths))

  maxima = jax.lax.map(of_rows, passes(x, context))
  return {path: v.max(axis=0) for path, v in maxima.items()}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _block_hessians(graphdef, state, x, context, paths):
  def add(total, rows):
    mask = token_mask(*rows)
    products = {}
    for path, value in _record(graphdef, state, rows, paths).items():
      value = (value.astype(jnp.float32) * mask).reshape(-1, value.shape[-1])
      products[path] = jnp.matmul(value.T, value, precision="highest")
    return jax.tree.map(jnp.add, total, products), None

  kernels = get_kernels(nnx.merge(graphdef, state), list(paths))
  zeros = {p: jnp.zeros((k.shape[0],) * 2, jnp.float32) for p, k in kernels.items()}
  total, _ = jax.lax.scan(add, zeros, passes(x, context))
  return {path: 2.0 / token_mask(x, context).sum() * value for path, value in total.items()}
