"""What is compared: FlatQuant, its parts, and the baselines, as functions of (model, tokens, seed)."""

import re
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.errors import UserError
from common.evaluation.perplexity import window_losses
from common.models.decoder import Block, Decoder
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.attention import QuantizedAttention
from common.quantization.calibration import (
  gptq_block,
  quantize_blocks,
  quantize_model,
  rtn_block,
  smoothquant_block,
)
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings
from projects.flatquant.flat_block import FlatBlock, FlatQuantSettings
from projects.flatquant.flatquant import initial_block, learn_block, make_optimizer, pack
from projects.flatquant.rotation import rotate_residual
from projects.flatquant.transforms import random_hadamard

Array = jax.Array


def settings_of(config: ConfigDict, name: str, **changes) -> FlatQuantSettings:
  """Formats of a setting such as "W4A4KV4"; 16 bits are full precision.

  Weights are symmetric per output channel, activations symmetric per token, keys and values
  asymmetric per token and head.

  Raises:
    UserError: the name is none.
  """
  match = re.fullmatch(r"W(\d+)A(\d+)KV(\d+)", name)
  if match is None:
    raise UserError(f"the setting {name!r} is unknown; expected one such as W4A4KV4 or W3A16KV16")
  weights, activations, cache = (None if int(b) == 16 else int(b) for b in match.groups())
  cached = None if cache is None else ActivationFormat(cache)
  options = {
    "scale_alpha": config.scale_alpha,
    "matrices": config.matrices,
    "left_size": config.left_size or None,
  }
  return FlatQuantSettings(
    weights=None if weights is None else IntegerFormat(weights, symmetric=True),
    activations=None if activations is None else ActivationFormat(activations, symmetric=True),
    keys=cached,
    values=cached,
    **options | changes,
  )


# The parts of the method, and the learned rotation: what differs from the full method.
PARTS = {
  "FlatQuant": {},
  "LT + PS": {"clip": False},
  "LT": {"scale": False, "clip": False},
  "learned rotation": {"matrices": "rotation", "scale": False, "clip": False},
}


def learn_model(
  config: ConfigDict, model: Decoder, tokens: Array, settings: FlatQuantSettings, seed: int
) -> list[FlatBlock]:
  """The learned blocks of a model in memory."""
  samples = tokens.shape[0]
  num_steps = config.epochs * max(1, samples // config.batch_size)
  reconstruction = ReconstructionSettings(
    num_steps, config.batch_size, keep_best=False, sample_memory=config.sample_memory
  )
  optimizer = make_optimizer(
    config.learning_rate,
    num_steps,
    clip_rate_factor=config.clip_rate_factor,
    warmup_steps=config.warmup_steps,
  )
  learned = []

  def learn(index, block, x, context):
    key = jax.random.fold_in(jax.random.key(seed), index)
    learned.append(learn_block(block, x, context, key, settings, reconstruction, optimizer)[0])
    return block

  for _ in quantize_blocks(model, model.blocks, tokens, learn, stream="full_precision"):
    pass
  return learned


def finish_model(
  model: Decoder,
  learned: list[FlatBlock],
  settings: FlatQuantSettings,
  finisher: str,
  tokens: Array,
) -> Decoder:
  """The packed model; GPTQ takes the inputs of the blocks as they are after the earlier blocks."""
  block = lambda i, _, x, context: pack(learned[i], settings, finisher, x, context)
  stream = "quantized" if finisher == "gptq" else "full_precision"
  return quantize_model(model, tokens, block, stream=stream)


def fixed_blocks(model: Decoder, tokens: Array, settings: FlatQuantSettings) -> list[FlatBlock]:
  """Blocks whose transforms are not learned."""
  blocks = []

  def make(index, block, x, context):
    blocks.append(initial_block(block, x, context, jax.random.key(index), settings))
    return block

  for _ in quantize_blocks(model, model.blocks, tokens, make, stream="full_precision"):
    pass
  return blocks


def round_activations(block: Block, settings: FlatQuantSettings) -> Block:
  """Rounds keys and values, and the inputs of all linears, in place and without transforms."""
  if settings.attention_formats:
    block.attention.attend = nnx.data(QuantizedAttention(settings.attention_formats))
  if settings.activations is not None:
    # Packed linears are no `nnx.Linear` any more: their paths are the original block's.
    paths = [f"attention.{p}_proj" for p in "qkvo"]
    paths += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    quantize_inputs(block, paths, settings.activations)
  return block


def rtn(model: Decoder, tokens: Array, settings: FlatQuantSettings) -> Decoder:
  """Everything rounded to nearest."""

  def block(i, block, x, context):
    packed = nnx.clone(block) if settings.weights is None else rtn_block(block, settings.weights)
    return round_activations(packed, settings)

  return quantize_model(model, tokens, block, stream="full_precision")


def gptq(model: Decoder, tokens: Array, settings: FlatQuantSettings) -> Decoder:
  """Weights by GPTQ, activations to nearest."""
  block = lambda i, block, x, context: round_activations(
    gptq_block(block, x, context, settings.weights), settings
  )
  return quantize_model(model, tokens, block, stream="quantized")


def smoothquant(
  model: Decoder, tokens: Array, settings: FlatQuantSettings, alphas: Iterable[float]
) -> Decoder:
  """SmoothQuant with the migration strength that is best on the calibration text."""

  def with_alpha(alpha):
    block = lambda i, block, x, context: round_activations(
      smoothquant_block(block, x, context, model.config, settings.weights, alpha=alpha), settings
    )
    return quantize_model(model, tokens, block, stream="full_precision")

  return best_on_calibration([lambda a=a: with_alpha(a) for a in alphas], tokens)


def rotate(model: Decoder, seed: int) -> Decoder:
  """The model in the rotated basis that `quarot` starts from."""
  return rotate_residual(model, random_hadamard(jax.random.key(seed), model.config.hidden_size))


def quarot(
  rotated: Decoder,
  tokens: Array,
  settings: FlatQuantSettings,
  clip_ratios: Iterable[float],
  finisher: str,
) -> Decoder:
  """QuaRot of a model with a rotated residual stream: Hadamard rotations of values and heads, of
  keys and of down's input; one clipping ratio for all ranges, that best on the calibration text."""

  def with_ratio(ratio):
    changed = rotation_settings(settings, ratio)
    return finish_model(rotated, fixed_blocks(rotated, tokens, changed), changed, finisher, tokens)

  return best_on_calibration([lambda r=r: with_ratio(r) for r in clip_ratios], tokens)


def rotation_settings(settings: FlatQuantSettings, clip_ratio: float = 1.0) -> FlatQuantSettings:
  """QuaRot's online rotations with fixed clipping."""
  clip = {"clip": False}
  if clip_ratio < 1:
    clip = {"clip": True, "initial_clip": float(np.log(clip_ratio / (1 - clip_ratio)))}
  return FlatQuantSettings(
    weights=settings.weights,
    activations=settings.activations,
    queries=settings.queries,
    keys=settings.keys,
    values=settings.values,
    sites=("P_o", "P_v", "P_h", "P_d"),
    scale=False,
    matrices="hadamard",
    **clip,
  )


def best_on_calibration(candidates: list[Callable[[], Decoder]], tokens: Array) -> Decoder:
  """The candidate with the least language-model loss on the calibration text."""
  models = [make() for make in candidates]
  if len(models) == 1:
    return models[0]
  losses = [window_losses(model, np.asarray(tokens)).nll.mean() for model in models]
  return models[int(np.nanargmin(losses))]
