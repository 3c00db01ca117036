"""Labelled images in folders or TFDS sets, and how they become a vision model's inputs.

A set of images is a sequence of pairs: uint8 RGB [height, width, 3] and a label.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from common.data.augmentation import rand_augment
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How a checkpoint's images were prepared; the default is that of most models on ImageNet.

  Attributes:
    mean, std: of the pixels' channels in [0, 1].
    crop_share: side of the evaluation's square in the middle, of the image's short side. None takes
      the whole image, whose shape then changes to the model's.
    resampling: of the evaluation's resizing.
  """

  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)
  crop_share: float | None = 0.9
  resampling: Image.Resampling = Image.Resampling.BICUBIC


IMAGENET = Preprocessing()


def load_preprocessing(path: str | os.PathLike) -> Preprocessing:
  """What preprocessor_config.json of a checkpoint directory says, `IMAGENET` where it says nothing.

  Where it names a crop, the image keeps its shape, as in the models' own evaluations.

  Raises:
    UserError: the file is damaged.
  """
  file = pathlib.Path(path).expanduser() / "preprocessor_config.json"
  if not file.is_file():
    return IMAGENET
  short = lambda size: min(size.values()) if isinstance(size, dict) else size
  try:
    config = json.loads(file.read_text())
    share = IMAGENET.crop_share
    if config.get("crop_pct"):
      share = float(config["crop_pct"])
    elif config.get("do_center_crop"):
      share = min(1.0, short(config["crop_size"]) / short(config["size"]))
    elif "size" in config:
      share = None
    red_green_blue = lambda values: tuple(float(value) for value in values)
    return Preprocessing(
      red_green_blue(config.get("image_mean", IMAGENET.mean)),
      red_green_blue(config.get("image_std", IMAGENET.std)),
      share,
      Image.Resampling(config.get("resample", IMAGENET.resampling)),
    )
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f"{file} is damaged: {e!r}") from None


class ImageFolder(Sequence):
  """PATH/SPLIT/CLASS/*: pairs (RGB uint8 [height, width, 3], label), classes in sorted order.

  Attributes:
    classes: their names.

  Raises:
    UserError: there is no such folder, or no class or image in it.
  """

  def __init__(self, path: str, split: str):
    root = pathlib.Path(path).expanduser() / split
    if not root.is_dir():
      raise UserError(
        f"no folder {root}; expected PATH/train/CLASS/*.JPEG and PATH/val/CLASS/*.JPEG"
      )
    self.classes = sorted(p.name for p in root.iterdir() if p.is_dir())
    suffixes = (".jpeg", ".jpg", ".png")
    self._files = [
      (file, label)
      for label, name in enumerate(self.classes)
      for file in sorted((root / name).iterdir())
      if file.suffix.lower() in suffixes
    ]
    if not self._files:
      raise UserError(f"{root} holds no {', '.join(suffixes)} in folders of classes")

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
    file, label = self._files[index]
    try:
      with Image.open(file) as image:
        return np.asarray(image.convert("RGB")), label
    except OSError as e:
      raise UserError(f"cannot read the image {file}: {e}") from None


class TFDSImages(Sequence):
  """A set of the TFDS catalogue with features `image` and `label`, as `ImageFolder`."""

  def __init__(self, name: str, split: str):
    try:
      builder = tfds.builder(name, file_format="array_record")
      builder.download_and_prepare()
      self._source = builder.as_data_source("validation" if split == "val" else split)
      self.classes = builder.info.features["label"].names
    except Exception as e:  # Whatever its download and preparation code may raise.
      reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
      raise UserError(
        f"tfds:{name} cannot be prepared: {reason}; ImageNet needs its archives in TFDS' manual "
        "folder and `pip install tensorflow`, or use folder:PATH with PATH/train/CLASS/*.JPEG"
      ) from None

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
    record = self._source[index]
    return record["image"], int(record["label"])


def load_images(source: str, split: str) -> ImageFolder | TFDSImages:
  """Images of `folder:PATH` or `tfds:NAME`; split is "train" or "val".

  Raises:
    UserError: another kind of source, or it is not there.
  """
  kind, _, name = source.partition(":")
  if kind not in ("folder", "tfds") or not name:
    raise UserError(f"unknown data {source!r}; expected folder:PATH or tfds:NAME")
  return ImageFolder(name, split) if kind == "folder" else TFDSImages(name, split)


def standardise(image: Image.Image, preprocessing: Preprocessing = IMAGENET) -> np.ndarray:
  """uint8 pixels -> float32 [height, width, 3], of the mean and deviation of a checkpoint's."""
  mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
  return (np.asarray(image, np.float32) / 255 - mean) / std


def augment(
  example: tuple[np.ndarray, int],
  rng: np.random.Generator,
  *,
  size: tuple[int, int],
  preprocessing: Preprocessing = IMAGENET,
  magnitude: float = 0,
  random_erasing: float = 0.0,
) -> dict[str, np.ndarray]:
  """A random crop of 8 to 100 % of the image, resized, mirrored; RandAugment; a box erased.

  Args:
    example: uint8 RGB [height, width, 3] and a label.
    rng: draws everything.
    size: (height, width) of the result.
    preprocessing: the checkpoint's, of which the pixels' mean and deviation are used.
    magnitude: of RandAugment, 0 leaves it out.
    random_erasing: probability of a box of noise.
  """
  image, label = Image.fromarray(example[0]), example[1]
  width, height = image.size
  area, ratio = rng.uniform(0.08, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
  w = min(width, round(np.sqrt(width * height * area * ratio)))
  h = min(height, round(np.sqrt(width * height * area / ratio)))
  w, h = max(w, 1), max(h, 1)
  left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
  crop = image.resize(size[::-1], Image.Resampling.BICUBIC, (left, top, left + w, top + h))
  if rng.random() < 0.5:
    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  if magnitude:
    crop = rand_augment(crop, rng, magnitude=magnitude)
  pixels = standardise(crop, preprocessing)
  if rng.random() < random_erasing:
    rows, columns = size
    share, ratio = rng.uniform(0.02, 1 / 3), np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
    h = min(rows, max(1, round(np.sqrt(rows * columns * share * ratio))))
    w = min(columns, max(1, round(np.sqrt(rows * columns * share / ratio))))
    top, left = rng.integers(rows - h + 1), rng.integers(columns - w + 1)
    pixels[top : top + h, left : left + w] = rng.normal(size=(h, w, 3))
  return {"images": pixels, "labels": np.int32(label)}


def centre_crop(
  example: tuple[np.ndarray, int],
  *,
  size: tuple[int, int],
  preprocessing: Preprocessing = IMAGENET,
) -> dict[str, np.ndarray]:
  """The middle of an image as the model sees it at evaluation.

  Args:
    example: uint8 RGB [height, width, 3] and a label.
    size: (height, width) of the result.
    preprocessing: the checkpoint's.
  """
  image, label = Image.fromarray(example[0]), example[1]
  w, h = image.size
  if preprocessing.crop_share is not None:
    short = min(w, h) * preprocessing.crop_share
    w, h = short * min(1, size[1] / size[0]), short * min(1, size[0] / size[1])
  left, top = (image.size[0] - w) / 2, (image.size[1] - h) / 2
  crop = image.resize(size[::-1], preprocessing.resampling, (left, top, left + w, top + h))
  return {"images": standardise(crop, preprocessing), "labels": np.int32(label)}
