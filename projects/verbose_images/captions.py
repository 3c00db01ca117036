"""scikit-learn's digits as images with captions, and what a caption says about an image.

A caption names the digit, and then in any order thickness, slant, ink and symmetry, each only where
it applies: "the digit seven , drawn with thick strokes , leaning to the left". What applies is computed
from the pixels, with thresholds at terciles of the training images.
"""

import re
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits

PAD, EOS, SEPARATOR = "<pad>", "<eos>", ","
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of each attribute, a phrase for every value; the value 0 is not said.
PHRASES = (
  ("", "drawn with thin strokes", "drawn with thick strokes"),
  ("", "leaning to the left", "leaning to the right"),
  ("", "using little ink", "using much ink"),
  ("", "almost symmetric"),
)
WORDS = (
  PAD,
  EOS,
  SEPARATOR,
  *sorted({"the", "digit", *DIGITS, *" ".join(p for v in PHRASES for p in v).split()}),
)
IDS = {word: i for i, word in enumerate(WORDS)}
ATTRIBUTES = ("digit", "thickness", "slant", "ink", "symmetry")
TRAIN_IMAGES = 1400


class Images(NamedTuple):
  """Images and what applies to them.

  Attributes:
    pixels: float32 [images, size, size, 1], from 0 to 1.
    attributes: int32 [images, 5]: the digit, and indices into `PHRASES`.
  """

  pixels: np.ndarray
  attributes: np.ndarray


def digit_images(size: int) -> tuple[Images, Images]:
  """Training and test images, upscaled from 8 x 8 by linear interpolation.

  Args:
    size: of an image in pixels.
  """
  digits = load_digits()
  order = np.random.default_rng(0).permutation(len(digits.images))
  small = digits.images[order].astype(np.float32) / 16
  zoomed = ndimage.zoom(small, (1, size / 8, size / 8), order=1, grid_mode=True, mode="nearest")
  pixels = np.clip(zoomed, 0, 1).astype(np.float32)[..., None]
  traits = stroke_traits(small)
  low, high = np.quantile(traits[:TRAIN_IMAGES], [1 / 3, 2 / 3], axis=0)
  values = np.where(traits < low, 1, np.where(traits > high, 2, 0))
  # Symmetry is said of the most symmetric third only.
  values[:, 3] = values[:, 3] == 2
  attributes = np.column_stack([digits.target[order], values]).astype(np.int32)
  cut = slice(TRAIN_IMAGES), slice(TRAIN_IMAGES, None)
  return tuple(Images(pixels[part], attributes[part]) for part in cut)


def stroke_traits(images: np.ndarray) -> np.ndarray:
  """Thickness, slant, ink and symmetry of [images, 8, 8], float64 [images, 4]; larger is more.

  Thickness is the ratio of area to outline, sum x / sum |grad x|, slant the shear cov(x, y) / var(y)
  against the downward direction (positive leans to the right), ink the sum of all pixels, symmetry the
  correlation with the mirror image.
  """
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
  outline = sum(np.abs(np.diff(padded, axis=axis)).sum((1, 2)) for axis in (1, 2))
  thickness = images.sum((1, 2)) / outline
  weights = images / images.sum((1, 2), keepdims=True)
  y, x = np.mgrid[:8, :8]
  mean_x, mean_y = ((weights * axis).sum((1, 2))[:, None, None] for axis in (x, y))
  covariance = (weights * (x - mean_x) * (y - mean_y)).sum((1, 2))
  slant = -covariance / (weights * (y - mean_y) ** 2).sum((1, 2))
  centred = images - images.mean((1, 2), keepdims=True)
  mirrored = centred[:, :, ::-1]
  symmetry = (centred * mirrored).sum((1, 2)) / (centred**2).sum((1, 2))
  return np.column_stack([thickness, slant, images.sum((1, 2)), symmetry])


def caption(attributes: np.ndarray, rng: np.random.Generator) -> list[int]:
  """A caption as token ids without EOS; the order of the phrases is drawn."""
  phrases = [PHRASES[i][value] for i, value in enumerate(attributes[1:]) if value]
  rng.shuffle(phrases)
  text = f" {SEPARATOR} ".join([f"the digit {DIGITS[attributes[0]]}", *phrases])
  return [IDS[word] for word in text.split()]


def caption_array(attributes: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
  """Captions with EOS, padded with PAD, int32 [images, width]; width > LONGEST."""
  tokens = np.full((len(attributes), width), IDS[PAD], np.int32)
  for row, values in zip(tokens, attributes):
    words = caption(values, rng)
    row[: len(words) + 1] = [*words, IDS[EOS]]
  return tokens


def long_texts(
  attributes: np.ndarray, count: int, width: int, rng: np.random.Generator
) -> np.ndarray:
  """Texts without an end: captions of random images, joined by separators; int32 [count, width]."""
  texts = np.empty((count, width), np.int32)
  for row in texts:
    words: list[int] = []
    while len(words) < width:
      words += [*caption(attributes[rng.integers(len(attributes))], rng), IDS[SEPARATOR]]
    row[:] = words[:width]
  return texts


# Tokens of the longest caption, without EOS.
LONGEST = 3 + sum(1 + max(len(p.split()) for p in values) for values in PHRASES)


def mentions(tokens: np.ndarray) -> list[tuple[int, int]]:
  """All (attribute, value) that a caption says, in order, repeated ones too.

  Args:
    tokens: ids, without EOS.
  """
  text = f" {' '.join(WORDS[t] for t in tokens)} "
  phrases = [((0, value), word) for value, word in enumerate(DIGITS)]
  phrases += [
    ((i + 1, value), phrase)
    for i, values in enumerate(PHRASES)
    for value, phrase in enumerate(values)
    if phrase
  ]
  # The space behind a phrase may be the one before the next.
  found = [
    (match.start(), mention)
    for mention, phrase in phrases
    for match in re.finditer(f" {phrase}(?= )", text)
  ]
  return [mention for _, mention in sorted(found)]


class CaptionQuality(NamedTuple):
  """Of one caption.

  Attributes:
    accuracy: share of the five attributes that are said right (or rightly not said); one that is
      said with two values is wrong.
    hallucinated: share of mentions that are false (CHAIR_i's ratio); 0 without mentions.
    any_hallucinated: whether one is false (CHAIR_s).
  """

  accuracy: float
  hallucinated: float
  any_hallucinated: float


def caption_quality(tokens: np.ndarray, attributes: np.ndarray) -> CaptionQuality:
  """Compares a caption, ids without EOS, with what applies to the image, int [5]."""
  said = mentions(tokens)
  values = [{value for i, value in said if i == attribute} for attribute in range(5)]
  # What is not said of a phrase has the value 0; the digit has to be said.
  right = [
    found == ({truth} if truth or attribute == 0 else set())
    for attribute, (found, truth) in enumerate(zip(values, attributes))
  ]
  false = [value != attributes[attribute] for attribute, value in said]
  return CaptionQuality(
    float(np.mean(right)), float(np.mean(false)) if false else 0.0, float(any(false))
  )
