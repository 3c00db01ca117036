"""Image classifiers: a checkpoint with the images of its classes, and its top-1 accuracy."""

import functools
import pathlib
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.data.images import IMAGENET, Preprocessing, centre_crop, load_images
from common.errors import UserError

Array = jax.Array
Images = Sequence[tuple[np.ndarray, int]]  # See `common.data.images`.

BACKGROUND = "background"  # TensorFlow's class 0, which no image of ImageNet has.


class ShiftedLabels(Sequence):
  """The same images, their labels higher by some classes that come first."""

  def __init__(self, images: Images, shift: int):
    self.images, self.shift = images, shift

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
    image, label = self.images[index]
    return image, label + self.shift


def open_classifier(
  path: str, source: str, configs: tuple[type, ...], names: str, *, flag: str
) -> tuple[Checkpoint, Images, Images]:
  """A checkpoint, its weights not read yet, and the images of train and of val of its classes.

  Where the classifier's first class is TensorFlow's "background", which the images lack, their labels
  are one higher.

  Args:
    path: directory of the checkpoint.
    source: of the images, see `load_images`.
    configs: those of the models that are supported, with `labels`.
    names: of these models, for errors.
    flag: the config's field that holds the path, likewise.

  Raises:
    UserError: the checkpoint or the images are not there, are of another kind, or do not belong
      together.
  """
  if not pathlib.Path(path).expanduser().is_dir():
    raise UserError(
      f"no checkpoint directory {path!r}; pass --config.{flag}=DIR of a {names} with a classifier"
    )
  checkpoint = Checkpoint(path)
  model = checkpoint.config
  if not isinstance(model, configs) or not model.labels:
    raise UserError(f"{path} holds no {names} with a classifier; expected one")
  if model.num_channels != 3:
    raise UserError(f"{path} takes {model.num_channels} channels; expected 3, RGB")
  return checkpoint, *(images_of(model.labels, source, split, path) for split in ("train", "val"))


def images_of(labels: Sequence[str], source: str, split: str, path: str) -> Images:
  """The images of a classifier's classes; `open_classifier` says which these are.

  Args:
    labels: of the classifier.
    source, split: of the images, see `load_images`.
    path: of the classifier, for errors.

  Raises:
    UserError: the images are not there, or of another number of classes.
  """
  background = int(labels[0].lower() == BACKGROUND)
  found = load_images(source, split)
  missing = len(labels) - len(found.classes)
  if missing not in (0, background):
    raise UserError(
      f"{split} of {source} has {len(found.classes)} classes, the classifier of {path} "
      f"{len(labels) - background}{' beside the background' if background else ''}: expected the "
      "same ones"
    )
  return ShiftedLabels(found, missing) if missing else found


def accuracy(
  model: nnx.Module,
  images: Images,
  size: tuple[int, int],
  batch_size: int,
  *,
  preprocessing: Preprocessing = IMAGENET,
  limit: int = 0,
) -> float:
  """Top-1, from 0 to 1.

  Args:
    model: float [batch, height, width, 3] -> an output with `logits`.
    images: see `common.data.images`.
    size: (height, width) that the model takes.
    batch_size: of what is computed at once, at most; the last batch is filled up, so that one shape
      is compiled.
    preprocessing: of the model's checkpoint.
    limit: look at so many images at most, evenly spaced; 0 takes all.
  """
  graphdef, params = nnx.split(model)
  rows = np.linspace(0, len(images) - 1, min(limit or len(images), len(images))).astype(int)
  batch_size = min(batch_size, len(rows))
  crop = functools.partial(centre_crop, size=size, preprocessing=preprocessing)
  data = grain.MapDataset.source(rows).map(lambda row: crop(images[int(row)]))
  hits = []
  for batch in data.batch(batch_size):
    count = len(batch["labels"])
    filled = np.arange(batch_size) % count
    right = _correct(graphdef, params, batch["images"][filled], batch["labels"][filled])
    hits.append(right[:count])
  return float(np.mean(np.concatenate(jax.device_get(hits))))


@functools.partial(jax.jit, static_argnums=0)
def _correct(graphdef, params, images: Array, labels: Array) -> Array:
  return jnp.argmax(nnx.merge(graphdef, params)(images).logits, axis=-1) == labels
