"""A checkpoint of ResNet or MobileNetV2 with a classifier, and the images of its classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common.checkpoints.huggingface import Checkpoint
from common.data.images import centre_crop, load_preprocessing
from common.errors import UserError
from common.evaluation.image_classification import Images, accuracy, open_classifier
from common.models.mobilenet import MobileNetConfig
from common.models.resnet import ResNetConfig
from projects.flexround.convnets import ConvNet, Network, Score, fold_batch_norms

Array = jax.Array

BATCH_SIZE = 64  # Of the evaluation.
IMAGE_SIZE = 224  # Where config.json names none.


def open_checkpoint(config: ConfigDict) -> tuple[Callable[[int], Network], str]:
  """The network of a seed, which draws the calibration images, and a note on the images.

  Everything is checked before anything is computed.

  Raises:
    UserError: the checkpoint or the images are not there, are of another kind, or do not belong
      together.
  """
  checkpoint, train, test = load_together(config)
  inputs = {
    "size": image_size(config, checkpoint),
    "preprocessing": load_preprocessing(config.vision_model),
  }
  model = checkpoint.load_model()
  fold_batch_norms(model)

  def score(model: ConvNet) -> Score:
    return Score(accuracy(model, test, batch_size=BATCH_SIZE, limit=config.eval_images, **inputs))

  def network_of(seed: int) -> Network:
    rows = np.random.default_rng(seed).choice(len(train), config.calibration_images, replace=False)
    images = [centre_crop(train[int(row)], **inputs)["images"] for row in rows]
    return Network(model, jnp.asarray(np.stack(images)), score)

  count = min(config.eval_images or len(test), len(test))
  return (
    network_of,
    f" {count} images of val, {config.calibration_images} of train for calibration.",
  )


def load_together(config: ConfigDict) -> tuple[Checkpoint, Images, Images]:
  """The opened checkpoint, the images of train and of val; see `open_checkpoint`."""
  for name in ("vision_bits", "network_seeds"):
    if not config[name]:
      raise UserError(f"{name} is empty: give at least one")
  if config.eval_images < 0:
    raise UserError(f"eval_images={config.eval_images}; expected a number of images, or 0 for all")
  checkpoint, train, val = open_classifier(
    config.vision_model,
    config.images,
    (ResNetConfig, MobileNetConfig),
    "ResNet or MobileNetV2",
    flag="vision_model",
  )
  if not 1 <= config.calibration_images <= len(train):
    raise UserError(
      f"calibration_images={config.calibration_images}; expected 1 to {len(train)}, the images "
      f"in train of {config.images}"
    )
  return checkpoint, train, val


def image_size(config: ConfigDict, checkpoint: Checkpoint) -> tuple[int, int]:
  """(height, width) of the network's inputs.

  Raises:
    UserError: it is no size.
  """
  size = config.image_size or checkpoint.hf_config.get("image_size", IMAGE_SIZE)
  if type(size) is not int or size < 1:
    raise UserError(f"image_size={size!r}; expected the side of the images, such as {IMAGE_SIZE}")
  return size, size
