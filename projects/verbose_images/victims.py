"""The models that are evaluated, each with its images: small ones trained here, or a loaded one."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from projects.verbose_images.captions import EOS, IDS, SEPARATOR, WORDS, Images, digit_images
from projects.verbose_images.training import TrainingSettings, fit, training_step
from projects.verbose_images.vlm import VisionLanguageModel, load_vlm, small_vlm

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")


class Victim(NamedTuple):
  """A model and its images, all held out from its training.

  Attributes:
    model: captions images.
    images: to be attacked; pixels and attributes, None where these are not known.
    clean: others, for clean quality and false alarms.
    calibration: others, for the defences' thresholds.
    batch: images of one call.
    separator: token between phrases.
    count_words: of a caption's tokens.
    training: what the model was trained on; None for a loaded one.
  """

  model: VisionLanguageModel
  images: Images
  clean: Images
  calibration: Images
  batch: int
  separator: int
  count_words: Callable[[np.ndarray], int]
  training: Images | None


def training_settings(config: ConfigDict) -> TrainingSettings:
  return TrainingSettings(
    num_steps=config.num_steps,
    batch_size=config.batch_size,
    learning_rate=config.learning_rate,
    text_share=config.text_share,
    text_length=config.text_length,
  )


def build(config: ConfigDict, seed: int) -> VisionLanguageModel:
  """The small model before training."""
  return small_vlm(
    vocab_size=len(WORDS),
    eos=IDS[EOS],
    image_size=config.image_size,
    patch_size=config.patch_size,
    vision_width=config.vision_width,
    width=config.width,
    num_layers=config.num_layers,
    num_heads=config.num_heads,
    num_prefix=config.num_prefix,
    max_length=max((config.cap, *config.ablate_cap)),
    rngs=nnx.Rngs(seed),
  )


def victims(config: ConfigDict) -> list[Victim]:
  """One for each seed.

  Raises:
    UserError: files are missing or do not fit.
  """
  if config.data == "digits":
    return _trained(config)
  return _loaded(config)


def _trained(config: ConfigDict) -> list[Victim]:
  training, held_out = digit_images(config.image_size)
  settings = training_settings(config)
  step = training_step(nnx.split(build(config, 0))[0], settings)
  found = []
  for seed in config.seeds:
    order = np.random.default_rng(seed).permutation(len(held_out.pixels))
    parts = np.split(order, np.cumsum([config.images, config.clean_images])[:2])
    attacked, clean, rest = (Images(*(x[rows] for x in held_out)) for rows in parts)
    model = fit(
      build(config, seed), step, training, settings, seed=seed, description=f"model {seed}"
    )
    calibration = Images(*(x[: config.clean_images] for x in rest))
    found.append(
      Victim(
        model=model,
        images=attacked,
        clean=clean,
        calibration=calibration,
        batch=config.batch_images,
        separator=IDS[SEPARATOR],
        count_words=lambda tokens: int(np.sum(tokens != IDS[SEPARATOR])),
        training=training,
      )
    )
  return found


def _loaded(config: ConfigDict) -> list[Victim]:
  size = lambda model: model.vision.config.image_size
  files = folder_files(config.data, config.images + 2 * config.clean_images)
  model = load_vlm(config.vision, config.decoder, config.projector, eos=config.eos)
  tokenizer = load_tokenizer(config.decoder)
  pixels = np.stack([read_image(file, size(model)) for file in files])
  none = np.zeros((len(pixels), 0), np.int32)
  parts = np.split(np.arange(len(pixels)), np.cumsum([config.images, config.clean_images]))
  images, clean, calibration = (Images(pixels[rows], none[rows]) for rows in parts)
  return [
    Victim(
      model=model,
      images=images,
      clean=clean,
      calibration=calibration,
      batch=config.batch_images,
      separator=tokenizer.encode(",", add_special_tokens=False).ids[-1],
      count_words=lambda tokens: len(tokenizer.decode(tokens.tolist()).split()),
      training=None,
    )
  ]


def folder_files(source: str, count: int) -> list[pathlib.Path]:
  """The first images of "folder:PATH", in the order of their names.

  Raises:
    UserError: another kind of source, no such folder, or too few images.
  """
  kind, _, path = source.partition(":")
  if kind != "folder":
    raise UserError(f"data={source!r}: expected digits or folder:PATH with images")
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise UserError(f"data={source!r}: there is no folder {root}")
  files = sorted(f for f in root.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
  if len(files) < count:
    raise UserError(
      f"{root} has {len(files)} images ({', '.join(IMAGE_SUFFIXES)}), expected {count}: lower images "
      "or clean_images"
    )
  return files[:count]


def read_image(file: pathlib.Path, size: tuple[int, int]) -> np.ndarray:
  """RGB float32 [height, width, 3] in [0, 1], bicubic as BLIP-2's processor."""
  try:
    with Image.open(file) as image:
      resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
  except OSError as e:
    raise UserError(f"cannot read the image {file}: {e}") from None
  return np.asarray(resized, np.float32) / 255


def attributes_of(images: Images) -> np.ndarray | None:
  """None where they are not known."""
  return images.attributes if images.attributes.shape[1] else None
