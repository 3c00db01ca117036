"""The training step at the config's size, compiled for a TPU slice: does it fit, what does it cost?

Every device holds the whole model and a share of the batch, as in the paper.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.checkpoints.families import FAMILIES
from common.checkpoints.huggingface import Checkpoint
from common.compilation.step import Step
from common.errors import UserError
from common.models.sharding import batch_sharding
from common.models.swin import SwinConfig
from common.models.vit import VisionTransformerConfig
from common.training.mesh import make_mesh
from common.training.train_step import TrainState
from projects.ofq import digits
from projects.ofq.methods import METHODS, training_settings
from projects.ofq.ofq import QATSettings, prepare
from projects.ofq.training import make_qat_step

IMAGENET_IMAGES = 1_281_167


def deit(hidden_size: int) -> VisionTransformerConfig:
  """DeiT's distilled models: 12 blocks on 224 x 224 images, heads of 64 channels."""
  return VisionTransformerConfig(
    image_size=(224, 224),
    patch_size=(16, 16),
    hidden_size=hidden_size,
    intermediate_size=4 * hidden_size,
    num_layers=12,
    num_heads=hidden_size // 64,
    distillation_token=True,
    head="distilled",
    labels=tuple(map(str, range(1000))),
    family="deit",
  )


def swin(depths: tuple[int, ...]) -> SwinConfig:
  """Swin-T and Swin-S: windows of 7 x 7 patches of 4 x 4 pixels, 96 channels at first."""
  return SwinConfig(
    image_size=(224, 224),
    patch_size=(4, 4),
    embedding_size=96,
    depths=depths,
    num_heads=(3, 6, 12, 24),
    window_size=7,
    head="classification",
    labels=tuple(map(str, range(1000))),
  )


MODELS = {
  "facebook/deit-tiny-distilled-patch16-224": deit(192),
  "facebook/deit-small-distilled-patch16-224": deit(384),
  "microsoft/swin-tiny-patch4-window7-224": swin((2, 2, 6, 2)),
  "microsoft/swin-small-patch4-window7-224": swin((2, 2, 18, 2)),
}


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """One optimizer step of each method, teacher and oscillation tracker included."""
  model = vision_config(config)
  mesh = make_mesh({"data": -1}, devices)
  rows = -(-config.batch_size // len(devices)) * len(devices)
  return [training_step(config, method, model, rows, mesh) for method in config.methods]


def vision_config(config: ConfigDict) -> VisionTransformerConfig | SwinConfig:
  """The model's size: of the digits' ViT, a published DeiT or Swin, or a directory's.

  Raises:
    UserError: there is no such model, or it is none that OFQ quantizes.
  """
  if config.data == "digits":
    return digits.vit_config(
      config.hidden_size, config.num_layers, config.num_heads, config.patch_size
    )
  if config.model in MODELS:
    return MODELS[config.model]
  if not pathlib.Path(config.model).expanduser().is_dir():
    raise UserError(f"no model {config.model!r}: give a directory, or one of {', '.join(MODELS)}")
  found = Checkpoint(config.model).config
  if not isinstance(found, VisionTransformerConfig | SwinConfig):
    raise UserError(f"{config.model} holds no vision transformer; expected ViT, DeiT or Swin")
  return found


def training_step(
  config: ConfigDict, method: str, model: VisionTransformerConfig | SwinConfig, rows: int, mesh
) -> Step:
  """`make_qat_step` on abstract arrays; `rows` images per step."""
  settings = QATSettings(weight_bits=config.bits, activation_bits=config.bits, **METHODS[method])
  make_teacher = lambda: FAMILIES[model.family].model(model, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(nnx.eval_shape(lambda: prepare(make_teacher(), settings)))
  teacher_graphdef, teacher_params = nnx.split(nnx.eval_shape(make_teacher))
  options = training_settings(config, method, IMAGENET_IMAGES // rows)
  step, optimizer = make_qat_step(
    graphdef, teacher_graphdef, options, accumulate_steps=config.microbatches
  )
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=params,
    opt_state=jax.eval_shape(optimizer.init, params),
    key=jax.eval_shape(lambda: jax.random.key(0)),
  )
  place = lambda tree, sharding: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )
  everywhere = NamedSharding(mesh, PartitionSpec())
  batch = {
    "images": jax.ShapeDtypeStruct((rows, *model.image_size, model.num_channels), jnp.float32),
    "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
  }
  arguments = (
    *place((state,), everywhere),
    place(batch, batch_sharding(mesh)),
    *place((teacher_params, jax.ShapeDtypeStruct((), jnp.float32)), everywhere),
  )
  name = f"{method} W{config.bits}A{config.bits}, {rows} images"
  return Step(name, step, arguments)
