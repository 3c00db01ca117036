"""Augmentation of training images: RandAugment, mixup, cutmix, repeated augmentation.

RandAugment works on one PIL image, in the input pipeline; mixup and cutmix on a batch of arrays, on
the device, with the labels as probabilities.
"""

from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Array = jax.Array

# ImageNet's mean pixel, where an image is moved away from its border.
FILL = (124, 116, 104)
MAX_MAGNITUDE = 10.0

# (image, strength in [0, 1], sign 1 or -1) -> image.
Operation = Callable[[Image.Image, float, int], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
  )


def _solarize_add(image: Image.Image, strength: float, sign: int) -> Image.Image:
  added = int(110 * strength)
  return image.point([i + added if i < 128 else i for i in range(256)] * len(image.getbands()))


def _enhance(kind: type) -> Operation:
  return lambda image, strength, sign: kind(image).enhance(1 + 0.9 * sign * strength)


# The fifteen of the "increasing" variant, in which a greater magnitude never changes less. The
# first three have no magnitude. Posterizing keeps 4 bits at magnitude 0, and 1 from 7.5 on; all
# others change nothing at 0.
OPERATIONS: dict[str, Operation] = {
  "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
  "equalize": lambda image, strength, sign: ImageOps.equalize(image),
  "invert": lambda image, strength, sign: ImageOps.invert(image),
  "posterize": lambda image, strength, sign: ImageOps.posterize(
    image, max(1, 4 - int(4 * strength))
  ),
  "solarize": lambda image, strength, sign: ImageOps.solarize(image, 256 - int(256 * strength)),
  "solarize_add": _solarize_add,
  "color": _enhance(ImageEnhance.Color),
  "contrast": _enhance(ImageEnhance.Contrast),
  "brightness": _enhance(ImageEnhance.Brightness),
  "sharpness": _enhance(ImageEnhance.Sharpness),
  "rotate": lambda image, strength, sign: image.rotate(
    30 * sign * strength, Image.Resampling.BICUBIC, fillcolor=FILL
  ),
  "shear_x": lambda image, strength, sign: _affine(image, (1, 0.3 * sign * strength, 0, 0, 1, 0)),
  "shear_y": lambda image, strength, sign: _affine(image, (1, 0, 0, 0.3 * sign * strength, 1, 0)),
  "translate_x": lambda image, strength, sign: _affine(
    image, (1, 0, 0.45 * sign * strength * image.width, 0, 1, 0)
  ),
  "translate_y": lambda image, strength, sign: _affine(
    image, (1, 0, 0, 0, 1, 0.45 * sign * strength * image.height)
  ),
}


def rand_augment(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  magnitude: float,
  magnitude_std: float = 0.5,
  num_ops: int = 2,
  probability: float = 0.5,
) -> Image.Image:
  """RandAugment (Cubuk et al., NeurIPS 2020) with normal noise on the magnitude, as DeiT trains.

  Args:
    image: RGB.
    rng: draws `num_ops` of `OPERATIONS` with replacement, and their strengths and signs.
    magnitude: 0 to 10; strengths are tenths of it.
    magnitude_std: of the noise; the sum is clipped to [0, 10].
    num_ops: operations one after the other.
    probability: that each of them is applied.

  Raises:
    ValueError: the magnitude is outside [0, 10].
  """
  if not 0 <= magnitude <= MAX_MAGNITUDE:
    raise ValueError(f"magnitude={magnitude}; expected 0 to {MAX_MAGNITUDE}")
  for name in rng.choice(list(OPERATIONS), num_ops):
    if rng.random() < probability:
      strength = np.clip(rng.normal(magnitude, magnitude_std), 0, MAX_MAGNITUDE) / MAX_MAGNITUDE
      image = OPERATIONS[name](image, float(strength), 1 if rng.random() < 0.5 else -1)
  return image


class RepeatedAugmentation(grain.MapDataset):
  """Every element `times` in a row, to be augmented independently (Hoffer et al., CVPR 2020).

  The parent must be shuffled already: copies belong into one batch. A pass over the parent then
  takes `times` epochs of its length.
  """

  def __init__(self, parent: grain.MapDataset, times: int):
    super().__init__(parent)
    self.times = times

  def __len__(self) -> int:
    return self.times * len(self.parents[0])

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    # An index beyond the length is the next epoch's, here as in the parent.
    return self.parents[0][index // self.times]


def mixup(key: Array, images: Array, labels: Array, alpha: float) -> tuple[Array, Array]:
  """l x + (1 - l) x', l ~ Beta(alpha, alpha), with x' the batch reversed (Zhang et al., ICLR 2018).

  Args:
    key: draws one l for the batch.
    images: float [batch, height, width, channels].
    labels: probabilities, float [batch, classes].
    alpha: above 0.

  Returns:
    (images, labels), both mixed.
  """
  share = jax.random.beta(key, alpha, alpha, dtype=images.dtype)
  mix = lambda x: share * x + (1 - share) * x[::-1]
  return mix(images), mix(labels)


def cutmix(key: Array, images: Array, labels: Array, alpha: float) -> tuple[Array, Array]:
  """A box of every image is that of its partner, x' (Yun et al., ICCV 2019).

  The box has the share 1 - l of the area, l ~ Beta(alpha, alpha), and its centre anywhere: what is
  outside the image is cut off, and labels are mixed by the pixels that are left. Arguments and
  results are those of `mixup`.
  """
  height, width = images.shape[1:3]
  share_key, row_key, column_key = jax.random.split(key, 3)
  side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, dtype=images.dtype))

  def inside(key, size):
    centre = jax.random.randint(key, (), 0, size)
    half = (side * size).astype(jnp.int32) // 2
    return (jnp.arange(size) >= centre - half) & (jnp.arange(size) < centre + half)

  box = inside(row_key, height)[:, None] & inside(column_key, width)
  share = 1 - jnp.mean(box.astype(labels.dtype))
  images = jnp.where(box[None, :, :, None], images[::-1], images)
  return images, share * labels + (1 - share) * labels[::-1]


def mix_batch(
  key: Array, images: Array, labels: Array, *, mixup_alpha: float, cutmix_alpha: float
) -> tuple[Array, Array]:
  """`mixup` or `cutmix` of a batch, each half of the time; an alpha of 0 leaves the other alone.

  With both 0 the batch is returned as it is. Arguments and results are those of `mixup`.
  """
  which_key, key = jax.random.split(key)
  branches = []
  if mixup_alpha:
    branches.append(lambda *batch: mixup(key, *batch, mixup_alpha))
  if cutmix_alpha:
    branches.append(lambda *batch: cutmix(key, *batch, cutmix_alpha))
  if not branches:
    return images, labels
  return jax.lax.switch(
    jax.random.randint(which_key, (), 0, len(branches)), branches, images, labels
  )
