"""FlatQuant: learned affine transforms that flatten weights and activations (Sun et al., ICML 2025,
arXiv 2410.09426).

Every linear Y = X W of a block, W [in, out], becomes

    Y = Q(X diag(c) P) Q(P^-1 diag(1 / c) W),    P = P1 (x) P2                   (section 3.1)

with P invertible, learned together with the scale c and with clipping factors of all ranges,

    min  || F(X) - F^(X; P, c, alpha) ||^2                                       (eq. 5)

over the calibration data, a block at a time. X is the block's input in the full-precision model.
Sites: P_a (q, k, v), P_o across heads and P_v inside of them (o, values), P_h (keys and queries
after their rotation), P_ug (up, gate) and P_d (down). P_v and c are folded into weights and norms.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from threadpoolctl import threadpool_limits

from common.errors import UserError
from common.models.decoder import AttentionContext, Block
from common.models.surgery import get_module, linear_paths
from common.quantization.calibration import (
  Streams,
  check_finite,
  gptq_block,
  largest_inputs,
  rtn_block,
  run_block,
)
from common.quantization.equivalent import smoothquant_scale
from common.quantization.linear import get_kernels
from common.quantization.reconstruction import (
  ReconstructionLog,
  ReconstructionSettings,
  reconstruct,
)
from projects.flatquant.flat_block import LINEARS, FlatBlock, FlatQuantSettings
from projects.flatquant.kronecker import factor_pair

Array = jax.Array


def initial_scales(
  block: Block, x: Array, context: AttentionContext, alpha: float
) -> dict[str, Array]:
  """c of P_a, P_ug and P_d to start from: max|w|^(1 - alpha) / max|x|^alpha, [in] each.

  Args:
    block, x, context: see `quantize_blocks`.
    alpha: 0 looks at the weights alone.
  """
  sites = {site: paths for site, paths in LINEARS.items() if site != "P_o P_v"}
  largest = largest_inputs(block, x, context, [paths[0] for paths in sites.values()])
  scales = {}
  for site, paths in sites.items():
    kernels = list(get_kernels(block, list(paths)).values())
    scale = 1 / smoothquant_scale(largest[paths[0]], kernels, alpha)
    scales[site] = jnp.maximum(scale.astype(jnp.float32), 1e-5)
  return scales


@functools.lru_cache
def make_optimizer(
  learning_rate: float,
  num_steps: int,
  *,
  clip_rate_factor: float = 10.0,
  warmup_steps: int = 0,
  weight_decay: float = 0.01,
) -> optax.GradientTransformation:
  """AdamW, decay on everything that is learned, a cosine to 1e-3 of the learning rate.

  Equal arguments give the same object, which is a key of compilations.

  Args:
    learning_rate: of the transforms and c.
    num_steps: of one block.
    clip_rate_factor: the clipping factors learn so many times faster.
    warmup_steps: with a rate that rises from 0.
    weight_decay: torch's default.
  """

  def adamw(rate):
    schedule = optax.warmup_cosine_decay_schedule(
      0.0 if warmup_steps else rate, rate, warmup_steps, num_steps, 1e-3 * learning_rate
    )
    # One vector of the many small variables: a fraction of the time to compile and to run.
    return optax.flatten(optax.adamw(schedule, weight_decay=weight_decay))

  def labels(learned):
    of_path = lambda path, _: "clip" if "_clips" in jax.tree_util.keystr(path) else "transform"
    return jax.tree.map_with_path(of_path, learned)

  rates = {"transform": learning_rate, "clip": clip_rate_factor * learning_rate}
  return optax.partition({name: adamw(rate) for name, rate in rates.items()}, labels)


def normalized_error(student: nnx.Module, output: Array, target: Array, progress: Array) -> Array:
  """The mean squared error divided by its own value: only the gradient's length changes.

  The gradient of every block then has one order of magnitude, however large its activations are.
  """
  del student, progress
  error = jnp.mean((output.astype(jnp.float32) - target.astype(jnp.float32)) ** 2)
  return error / jax.lax.stop_gradient(jnp.maximum(error, 1e-30))


def check_block(block: Block, settings: FlatQuantSettings) -> None:
  """Checks, before any work, that the method fits a block.

  Raises:
    UserError: post-norm, no gated MLP, or sizes that do not divide.
  """
  if getattr(block, "norm_placement", None) != "pre" or block.mlp.gate_proj is None:
    raise UserError(
      "FlatQuant transforms blocks with a norm before a gated MLP (Llama, Mistral, Qwen2); this "
      "one has another architecture, choose a checkpoint of those"
    )
  for path in linear_paths(block):
    linear = get_module(block, path)
    if settings.weights is not None:
      settings.weights.num_groups((linear.in_features, linear.out_features))
    if not path.endswith("o_proj"):
      factor_pair(linear.in_features, settings.left_size)


def learn_block(
  block: Block,
  x: Array,
  context: AttentionContext,
  key: Array,
  settings: FlatQuantSettings,
  reconstruction: ReconstructionSettings,
  optimizer: optax.GradientTransformation,
) -> tuple[FlatBlock, ReconstructionLog]:
  """Learns the transforms, scales and clipping factors of one block.

  Args:
    block: in full precision; not modified.
    x: its inputs in the full-precision model, [samples, seq, dim].
    context: see `quantize_blocks`.
    key: of the initial matrices and of the batches.
    settings: what is rounded and learned.
    reconstruction: how long.
    optimizer: see `make_optimizer`.

  Returns:
    The learned block as it is after the last step, and how it went.

  Raises:
    UserError: see `check_block`; a weight or an input is NaN or infinite.
  """
  start = initial_block(block, x, context, key, settings)
  targets = run_block(block, x, context)
  reconstruction = dataclasses.replace(reconstruction, keep_best=False)
  key = jax.random.fold_in(key, 1)
  # The inverted matrices are so small that BLAS's threads would spend most of the time waiting.
  with threadpool_limits(1, user_api="blas"):
    result = reconstruct(
      start, x, targets, context, key, reconstruction, optimizer, objective=normalized_error
    )
    return jax.block_until_ready(result)


def initial_block(
  block: Block, x: Array, context: AttentionContext, key: Array, settings: FlatQuantSettings
) -> FlatBlock:
  """What `learn_block` starts from; for fixed transforms that is all. Arguments as there."""
  check_block(block, settings)
  check_finite(block, x)
  scales = initial_scales(block, x, context, settings.scale_alpha)
  return FlatBlock(block, settings, scales, key)


def reparametrize(flat: FlatBlock, settings: FlatQuantSettings) -> Block:
  """`FlatBlock.fold` in float64, back in float32, without the transforms that are not used.

  (In half precision the products of inverses would lose what was learned.)
  """
  # What is rounded afterwards is no part of the fold: all bits of one cache share a program.
  flat = nnx.clone(flat)
  flat.weights = flat.activations = None
  graphdef, state = nnx.split(flat)
  state = jax.device_get(state)
  # On the CPU: accelerators have no float64 solvers.
  with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
    folded_graphdef, folded = _fold(graphdef, state)
    folded = jax.device_get(folded)
  block = nnx.merge(folded_graphdef, jax.tree.map(jnp.asarray, folded))
  if "P_a" not in settings.sites:
    block.attention_norm = block.attention_norm.norm
  if "P_ug" not in settings.sites:
    block.mlp_norm = block.mlp_norm.norm
  if "P_d" not in settings.sites:
    block.mlp.transform = None
  if "P_o" not in settings.sites:
    block.attention.attend.head_transform = None
  if "P_h" not in settings.sites:
    block.attention.attend.key_transform = None
  return block


def pack(
  flat: FlatBlock,
  settings: FlatQuantSettings,
  finisher: Literal["rtn", "gptq"] = "rtn",
  x: Array | None = None,
  context: AttentionContext | None = None,
) -> Block:
  """The finished block: reparametrised, weights packed, inputs rounded.

  Args:
    flat: learned.
    settings: as it was learned with.
    finisher: how the transformed weights are rounded, to nearest or by GPTQ.
    x, context: the block's inputs for GPTQ, those of the quantized model.

  Raises:
    UserError: the finisher is unknown; see `gptq_block`.
  """
  if finisher not in ("rtn", "gptq"):
    raise UserError(f"finisher={finisher!r} is not supported; supported: rtn, gptq")
  block = reparametrize(flat, settings)
  if settings.weights is not None and finisher == "rtn":
    block = rtn_block(block, settings.weights)
  elif settings.weights is not None:
    block = gptq_block(block, x, context, settings.weights)
  flat.quantize_inputs(block)
  return block


def quantize_block(
  index: int,
  block: Block,
  x: Array | Streams,
  context: AttentionContext,
  *,
  settings: FlatQuantSettings,
  reconstruction: ReconstructionSettings,
  optimizer: optax.GradientTransformation,
  key: Array,
  finisher: Literal["rtn", "gptq"] = "rtn",
) -> Block:
  """`learn_block`, then `pack`: the function that `quantize_blocks` takes.

  Memory is that of one block, of its transformed weights and of a batch's activations.

  Args:
    index: of the block; every block has its own matrices and batches.
    block, context, settings, reconstruction, optimizer: see `learn_block`.
    x: the block's inputs in the full-precision model (stream="full_precision"), or with GPTQ
      preferably in both models (stream="both").
    key: of the whole model.
    finisher: see `pack`.
  """
  full_precision, quantized = x if isinstance(x, Streams) else (x, x)
  key = jax.random.fold_in(key, index)
  flat, _ = learn_block(block, full_precision, context, key, settings, reconstruction, optimizer)
  return pack(flat, settings, finisher, quantized, context)


@functools.partial(jax.jit, static_argnums=0)
def _fold(graphdef, state):
  cast = lambda dtype: (
    lambda leaf: leaf.astype(dtype) if leaf.dtype in (np.float32, np.float64) else leaf
  )
  flat = nnx.merge(graphdef, jax.tree.map(cast(jnp.float64), state))
  folded_graphdef, folded = nnx.split(flat.fold())
  return folded_graphdef, jax.tree.map(cast(jnp.float32), folded)
