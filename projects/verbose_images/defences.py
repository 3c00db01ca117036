"""What restores the length of captions: transforms of the input, limits of the output, detectors.

Transforms are differentiable, rounding by the straight-through estimator, so that an adaptive attack
goes through them (BPDA; expectation over transforms where they are random).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import dct
from sklearn.metrics import roc_auc_score, roc_curve

from common.quantization.straight_through import round_ste

Array = jax.Array

BLOCK = 8
MEDIAN_WINDOW = 3
GAUSSIAN_RADIUS = 3

# Orthonormal DCT-II, [frequencies, pixels].
_DCT = dct(np.eye(BLOCK, dtype=np.float32), axis=0, norm="ortho")


def dct_quantize(images: Array, strength: Array, key: Array) -> Array:
  """JPEG-like: 8 x 8 block DCT whose coefficients are rounded to steps that grow with frequency.

  The step of coefficient (u, v) is strength (1 + u + v).

  Args:
    images: [batch, height, width, channels], sizes multiples of 8.
    strength: step of the mean, in pixels from 0 to 1.
    key: not used.
  """
  del key
  batch, height, width, channels = images.shape
  blocks = images.reshape(batch, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
  coefficients = jnp.einsum("ui,bhiwjc,vj->bhuwvc", _DCT, blocks, _DCT)
  frequency = np.add.outer(np.arange(BLOCK), np.arange(BLOCK))[:, None, :, None]
  step = jnp.maximum(strength, 1e-6) * (1 + frequency)
  rounded = round_ste(coefficients / step) * step
  restored = jnp.einsum("ui,bhuwvc,vj->bhiwjc", _DCT, rounded, _DCT).reshape(images.shape)
  return jnp.where(strength > 0, jnp.clip(restored, 0, 1), images)


def reduce_bit_depth(images: Array, strength: Array, key: Array) -> Array:
  """Pixels rounded to multiples of `strength`, 1 / (2^bits - 1)."""
  del key
  step = jnp.maximum(strength, 1e-6)
  return jnp.where(strength > 0, jnp.clip(round_ste(images / step) * step, 0, 1), images)


def gaussian_blur(images: Array, strength: Array, key: Array) -> Array:
  """Gaussian filter of standard deviation `strength` pixels, cut off at 3 pixels; edges repeat."""
  del key
  offsets = jnp.arange(-GAUSSIAN_RADIUS, GAUSSIAN_RADIUS + 1)
  weights = jnp.exp(-0.5 * (offsets / jnp.maximum(strength, 1e-3)) ** 2)
  weights = weights / jnp.sum(weights)
  padding = [(0, 0), (GAUSSIAN_RADIUS,) * 2, (GAUSSIAN_RADIUS,) * 2, (0, 0)]
  padded = jnp.pad(images, padding, mode="edge")
  height, width = images.shape[1:3]
  rows = sum(w * padded[:, i : i + height] for i, w in enumerate(weights))
  return sum(w * rows[:, :, i : i + width] for i, w in enumerate(weights))


def median_filter(images: Array, strength: Array, key: Array) -> Array:
  """Median of 3 x 3 pixels, blended with the image: 1 is the filter, 0 the image; edges repeat."""
  del key
  padded = jnp.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
  height, width = images.shape[1:3]
  shifts = [(i, j) for i in range(MEDIAN_WINDOW) for j in range(MEDIAN_WINDOW)]
  windows = jnp.stack([padded[:, i : i + height, j : j + width] for i, j in shifts])
  return images + strength * (jnp.sort(windows, axis=0)[len(shifts) // 2] - images)


def resize_and_pad(images: Array, strength: Array, key: Array) -> Array:
  """Shrinks by a random factor from [1 - strength, 1] and puts the image anywhere on black.

  All images of a batch have one factor and place.
  """
  size_key, place_key = jax.random.split(key)
  scale = 1 - strength * jax.random.uniform(size_key)
  size = jnp.array(images.shape[1:3], jnp.float32)
  place = jax.random.uniform(place_key, (2,)) * (1 - scale) * size
  moved = jax.image.scale_and_translate(
    images, images.shape, (1, 2), jnp.stack([scale, scale]), place, method="linear"
  )
  return jnp.where(strength > 0, jnp.clip(moved, 0, 1), images)


TRANSFORMS = {
  "none": lambda images, strength, key: images,
  "DCT quantisation": dct_quantize,
  "bit depth": reduce_bit_depth,
  "Gaussian filter": gaussian_blur,
  "median filter": median_filter,
  "resize and pad": resize_and_pad,
}


class Transform(NamedTuple):
  """A transform as numbers. Attributes: index, in `TRANSFORMS`; strength, 0 is the identity."""

  index: int = 0
  strength: float = 0.0


NO_TRANSFORM = Transform()


def transform(name: str, strength: float) -> Transform:
  """By its name in `TRANSFORMS`."""
  return Transform(list(TRANSFORMS).index(name), strength)


def apply_transform(images: Array, chosen: Transform, key: Array) -> Array:
  """Images behind a transform, [batch, height, width, channels]; none is compiled for itself."""
  strength = jnp.float32(chosen.strength)
  return jax.lax.switch(chosen.index, list(TRANSFORMS.values()), images, strength, key)


def graceful_lengths(tokens: np.ndarray, lengths: np.ndarray, budget: np.ndarray, separator: int):
  """Lengths under a budget: a longer caption ends before the last separator within it.

  Args:
    tokens: int [captions, width].
    lengths: int [captions].
    budget: int [captions], tokens at most.
    separator: token between phrases; without one the caption is cut at the budget.

  Returns:
    int [captions], at most the budget.
  """
  places = np.arange(tokens.shape[1])
  ends = (tokens == separator) & (places <= budget[:, None]) & (places < lengths[:, None])
  last = np.where(ends.any(axis=1), tokens.shape[1] - 1 - ends[:, ::-1].argmax(axis=1), budget)
  return np.where(lengths > budget, last, lengths)


def monitored_lengths(
  tokens: np.ndarray,
  lengths: np.ndarray,
  entropy: np.ndarray,
  *,
  entropy_limit: float,
  window: int,
  ngram: int,
  repeats: int,
) -> np.ndarray:
  """Lengths where generation stops at the first alarm: high entropy, or repetition.

  The alarm is raised behind token t if the mean entropy of the last `window` steps is above the limit,
  or if the last `ngram` tokens have occurred `repeats` times already. It looks back only: to stop there
  and to cut the finished caption are the same.

  Args:
    tokens: int [captions, width].
    lengths: int [captions].
    entropy: float [captions, width], nats.
    entropy_limit: nats; infinity never fires.
    window, ngram: steps.
    repeats: occurrences that are allowed, the last one not counted.
  """
  count, width = tokens.shape
  sums = np.cumsum(np.pad(entropy, ((0, 0), (1, 0))), axis=1)
  alarm = np.zeros((count, width), bool)
  alarm[:, window - 1 :] = (sums[:, window:] - sums[:, :-window]) / window > entropy_limit
  grams = np.lib.stride_tricks.sliding_window_view(tokens, ngram, axis=1)
  same = (grams[:, :, None] == grams[:, None]).all(axis=-1)
  earlier = np.tril(np.ones(same.shape[1:], bool), -1)
  alarm[:, ngram - 1 :] |= (same & earlier).sum(axis=-1) >= repeats
  alarm &= np.arange(width) < lengths[:, None]
  return np.where(alarm.any(axis=1), alarm.argmax(axis=1) + 1, lengths)


class Detection(NamedTuple):
  """Attributes: auroc; tpr, the share of attacks found at 1 % false alarms or less."""

  auroc: float
  tpr: float


def detection(clean: np.ndarray, attacked: np.ndarray) -> Detection:
  """How well a score, large where suspicious, tells attacked images from clean ones, float [images]."""
  labels = np.repeat([0, 1], [len(clean), len(attacked)])
  scores = np.concatenate([clean, attacked])
  fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
  return Detection(float(roc_auc_score(labels, scores)), float(tpr[fpr <= 0.01].max()))
