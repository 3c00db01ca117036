"""FlexRound at the config's size, compiled for a TPU slice: does it fit, what does it cost?

Reconstruction holds one block; its factors and calibration samples are spread over the slice.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.decoder_steps import decoder_config, scoring_step
from common.compilation.step import Step
from common.models.decoder import Block, DecoderConfig, make_context
from common.models.resnet import ResidualBlock, ResNetConfig
from common.models.scan import abstract_stack
from common.models.sharding import batch_sharding, place
from common.models.surgery import get_module
from common.quantization.calibration import rtn_block
from common.quantization.linear import get_kernels
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import quantize_kernels
from common.quantization.reconstruction import Learned, reconstruct
from common.training.mesh import AXES, make_mesh
from projects.flexround.convnets import fold_batch_norms, run_conv_unit
from projects.flexround.flexround import (
  FlexRound,
  FlexRoundSettings,
  feature_sum,
  make_optimizer,
)
from projects.flexround.language_experiment import integer_format, reconstruction_settings
from projects.flexround.methods import kernel_paths
from projects.flexround.network_experiment import make_protocol
from projects.flexround.scale_search import search_scales
from projects.flexround.vision_checkpoint import IMAGE_SIZE


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """The reconstruction of a block, the search of its widest linear, and the packed model's use.

  Of networks on images: the reconstruction of ResNet-50's block with the largest activations.
  """
  mesh = make_mesh({"data": -1}, devices)
  if config.vision_model:
    return [image_step(config, mesh)]
  model = decoder_config(config.model)
  format = integer_format(config, config.model_bits)
  scanned, params = abstract_stack(
    model, jnp.bfloat16, edit_block=lambda block: rtn_block(block, format)
  )
  return [
    reconstruction_step(config, model, format, mesh),
    search_step(model, format, mesh),
    scoring_step(scanned, params, mesh, batch_size=len(devices), seq_len=config.eval_length),
  ]


def image_step(config: ConfigDict, mesh: Mesh) -> Step:
  """All optimizer steps of ResNet-50's second block: 56 x 56 x 256 in and out at 224 x 224 pixels."""
  resnet = ResNetConfig(64, (256, 512, 1024, 2048), (3, 4, 6, 3))
  protocol = make_protocol(config, config.vision_bits[0])
  settings = FlexRoundSettings(protocol.format, protocol.start)

  def make_student() -> ResidualBlock:
    block = ResidualBlock(resnet, 256, 256, 1, nnx.Rngs(0))
    fold_batch_norms(block)
    one = jnp.ones((1, 1))
    kernels = {path: get_module(block, path).kernel[...] for path in kernel_paths(block)}
    quantize_kernels(block, {p: FlexRound(k, one, one, settings) for p, k in kernels.items()})
    return block

  graphdef, state = nnx.split(nnx.eval_shape(make_student))
  side = -(-(config.image_size or IMAGE_SIZE) // 4)
  samples = -(-config.calibration_images // mesh.size) * mesh.size
  where = batch_sharding(mesh)
  features = jax.ShapeDtypeStruct((samples, side, side, 256), jnp.float32, sharding=where)
  everywhere = lambda leaf: NamedSharding(mesh, PartitionSpec())
  key = jax.eval_shape(lambda: jax.random.key(0))
  optimizer = make_optimizer(config.learning_rates.FlexRound[0], config.network_steps)

  def step(state, inputs, targets, key):
    learned, log = reconstruct(
      nnx.merge(graphdef, state),
      inputs,
      targets,
      None,
      key,
      protocol.reconstruction,
      optimizer,
      objective=feature_sum,
      run=run_conv_unit,
    )
    return nnx.state(learned, Learned), log

  placed = place(state, jax.tree.map(everywhere, state)), place(key, everywhere(key))
  name = f"reconstruct a block of ResNet-50, {config.network_steps} steps, {samples} images"
  return Step(name, step, (placed[0], features, features, placed[1]))


def reconstruction_step(
  config: ConfigDict, model: DecoderConfig, format: IntegerFormat, mesh: Mesh
) -> Step:
  """All optimizer steps of one block."""
  settings = FlexRoundSettings(format, config.start)
  reconstruction = reconstruction_settings(config)

  def make_student() -> Block:
    block = Block(model, nnx.Rngs(0))
    scales = lambda kernel: jnp.ones(format.num_groups(kernel.shape))
    kernels = get_kernels(block)
    quantize_kernels(
      block, {p: FlexRound(k, scales(k), scales(k), settings) for p, k in kernels.items()}
    )
    return block

  graphdef, state = nnx.split(nnx.eval_shape(make_student))
  samples = -(-config.calibration_samples // len(mesh.devices.ravel())) * mesh.size
  length = config.calibration_length
  positions = jnp.zeros((1, length), jnp.int32)
  context = jax.eval_shape(lambda p: make_context(model, p, jnp.ones_like(p))[0], positions)
  everywhere = lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
  where = batch_sharding(mesh).with_memory_kind(config.sample_memory)
  features = jax.ShapeDtypeStruct((samples, length, model.hidden_size), jnp.float32, sharding=where)
  key = jax.eval_shape(lambda: jax.random.key(0))
  rate = config.learning_rates.FlexRound[0]
  optimizer = make_optimizer(rate, config.steps)

  def step(state, inputs, targets, context, key):
    learned, log = reconstruct(
      nnx.merge(graphdef, state),
      inputs,
      targets,
      context,
      key,
      reconstruction,
      optimizer,
      objective=feature_sum,
    )
    return nnx.state(learned, Learned), log

  arguments = (
    place(state, jax.tree.map(lambda leaf: columns_everywhere(leaf, mesh), state)),
    features,
    features,
    place(context, everywhere(context)),
    place(key, everywhere(key)),
  )
  name = f"reconstruct a block, {config.steps} steps, {samples} x {length} tokens"
  return Step(name, step, arguments)


def search_step(model: DecoderConfig, format: IntegerFormat, mesh: Mesh) -> Step:
  """The |err|^2.4 search of the linear with the most inputs."""
  kernel = jax.ShapeDtypeStruct((model.intermediate_size, model.hidden_size), jnp.float32)
  placed = place(kernel, columns_everywhere(kernel, mesh))
  return Step("scale search of down_proj", lambda w: search_scales(w, format), (placed,))


def columns_everywhere(leaf, mesh: Mesh) -> NamedSharding:
  """Output channels, the last axis of every matrix, cut over all devices where they divide."""
  cut = leaf.ndim >= 2 and leaf.shape[-1] % mesh.size == 0
  return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - 1), AXES if cut else None))
