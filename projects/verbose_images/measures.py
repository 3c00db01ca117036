"""What a batch of images costs and says: length, FLOPs, latency, energy, quality, size of change."""

import functools
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import ndimage, stats

from common.decoding.generation import Sampling
from common.models.surgery import get_module, linear_paths
from projects.verbose_images.captions import caption_quality
from projects.verbose_images.defences import NO_TRANSFORM, Transform, apply_transform
from projects.verbose_images.generation import (
  NO_BIAS,
  Captions,
  EosBias,
  caption_step,
  row_sampling,
  sample_keys,
)
from projects.verbose_images.victims import Victim
from projects.verbose_images.vlm import VisionLanguageModel, of_steps, teacher_forced

Array = jax.Array

RAPL = pathlib.Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Quality(NamedTuple):
  """Means over captions: attribute accuracy, CHAIR_i, CHAIR_s; see `CaptionQuality`."""

  accuracy: float
  hallucinated: float
  any_hallucinated: float


class Measured(NamedTuple):
  """Captions of a set of images, all arrays of NumPy.

  Attributes:
    captions: see `Captions`, [images, samples, ...].
    capped: bool [images, samples], ended by the cap.
    words: int [images, samples].
    flops: float [images, samples].
    quality: None where it is not known what applies to the images.
    seconds: wall time of an image, all its samples.
    joules: of an image, where there is a counter (RAPL).
  """

  captions: Captions
  capped: np.ndarray
  words: np.ndarray
  flops: np.ndarray
  quality: Quality | None
  seconds: float
  joules: float | None

  @property
  def length(self) -> np.ndarray:
    """Mean tokens of each image, float [images]."""
    return self.captions.lengths.mean(axis=1)


class Protocol(NamedTuple):
  """How captions are drawn when they are measured.

  Attributes:
    key: of all captions; conditions that share it are compared with common random numbers.
    samples: captions of each image.
    sampling: decoding.
    cap: tokens at most.
    width: room in the arrays.
  """

  key: Array
  samples: int
  sampling: Sampling
  cap: int
  width: int


apply_transform_step = jax.jit(apply_transform)


def measure(
  victim: Victim,
  images: np.ndarray,
  protocol: Protocol,
  *,
  attributes: np.ndarray | None = None,
  transform: Transform = NO_TRANSFORM,
  bias: EosBias = NO_BIAS,
) -> Measured:
  """Captions images, through a defence if wanted, in batches of `victim.batch`.

  Args:
    victim: the model.
    images: [images, height, width, channels], a multiple of the batch.
    protocol: see `Protocol`.
    attributes: what applies to the images.
    transform, bias: defences; the transform draws anew for each batch.
  """
  graphdef, params = nnx.split(victim.model)
  keys = sample_keys(protocol.key, len(images), protocol.samples)
  rows = row_sampling(protocol.sampling, victim.batch * protocol.samples)
  bias = EosBias(jnp.float32(bias.slope), jnp.float32(bias.start))
  parts = []
  before, begin = joules(), time.perf_counter()
  for start in range(0, len(images), victim.batch):
    at = slice(start, start + victim.batch)
    seen = jnp.asarray(images[at])
    if transform.index:
      transform_key = jax.random.fold_in(protocol.key, start)
      seen = apply_transform_step(seen, transform, transform_key)
    cap = jnp.int32(protocol.cap)
    parts.append(caption_step(graphdef, params, seen, keys[at], rows, cap, protocol.width, bias))
  captions = jax.tree.map(lambda *x: np.concatenate([np.asarray(a) for a in x]), *parts)
  seconds, after = time.perf_counter() - begin, joules()
  texts = _texts(captions)
  words = np.array([victim.count_words(text) for text in texts])
  return Measured(
    captions=captions,
    capped=captions.lengths >= protocol.cap,
    words=words.reshape(captions.lengths.shape),
    flops=caption_flops(victim.model, captions.steps),
    quality=caption_means(captions, attributes),
    seconds=seconds / len(images),
    joules=None if before is None or after < before else (after - before) / len(images),
  )


def _texts(captions: Captions) -> list[np.ndarray]:
  rows = captions.tokens.reshape(-1, captions.tokens.shape[-1])
  return [row[:length] for row, length in zip(rows, captions.lengths.ravel())]


def caption_means(captions: Captions, attributes: np.ndarray | None) -> Quality | None:
  """Mean quality of captions [images, samples, ...]; None where attributes are not known."""
  if attributes is None:
    return None
  repeated = np.repeat(attributes, captions.lengths.shape[1], axis=0)
  found = [caption_quality(text, truth) for text, truth in zip(_texts(captions), repeated)]
  return Quality(*np.mean(found, axis=0).tolist())


def caption_flops(model: VisionLanguageModel, steps: np.ndarray) -> np.ndarray:
  """FLOPs of a caption of so many steps, two per multiplication: encoder, projector, decoder.

  Matrix products only, attention by its real context; the shape of `steps`.
  """
  vision, decoder = model.vision.config, model.decoder.config
  seq = vision.sequence_length
  patch = vision.patch_size[0] * vision.patch_size[1] * vision.num_channels * vision.hidden_size
  encoder = 2 * seq * (_linear_weights(model.vision.blocks) + patch)
  encoder += 4 * vision.num_layers * vision.hidden_size * seq**2
  projector = 4 * seq * vision.hidden_size**2 + 2 * model.num_prefix * vision.hidden_size * (
    2 * seq + decoder.hidden_size
  )
  tokens = model.num_prefix + np.asarray(steps, np.float64) - 1
  attended = 4 * decoder.num_layers * decoder.num_heads * decoder.head_dim
  language = (
    2 * tokens * _linear_weights(model.decoder.blocks) + attended * tokens * (tokens + 1) / 2
  )
  head = 2 * steps * model.decoder.head_kernel.size
  return encoder + projector + language + head


def _linear_weights(blocks) -> int:
  return sum(get_module(b, path).kernel.size for b in blocks for path in linear_paths(b))


def joules() -> float | None:
  """The processor's energy counter, None where there is none that can be read."""
  try:
    return int(RAPL.read_text()) / 1e6
  except (OSError, ValueError):
    return None


def ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> np.ndarray:
  """Structural similarity (Wang et al. 2004) of images in [0, 1] with a uniform window, [images].

  Args:
    a, b: [images, height, width, channels].
    window: its side in pixels.
  """
  c1, c2 = 0.01**2, 0.03**2
  blur = lambda x: ndimage.uniform_filter(x, (0, window, window, 0), mode="reflect")
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  mean_a, mean_b = blur(a), blur(b)
  var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
  covariance = blur(a * b) - mean_a * mean_b
  top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(axis=(1, 2, 3))


def l2_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Euclidean norm of the difference, [images]."""
  return np.linalg.norm((np.asarray(a) - np.asarray(b)).reshape(len(a), -1), axis=1)


def paired_interval(a: np.ndarray, b: np.ndarray, resamples: int) -> tuple[float, float]:
  """95 % bootstrap interval of mean(a - b) over images, percentiles."""
  difference = (np.asarray(a) - np.asarray(b),)
  if np.ptp(difference[0]) == 0:
    return float(difference[0][0]), float(difference[0][0])
  interval = stats.bootstrap(
    difference, np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(0)
  ).confidence_interval
  return float(interval.low), float(interval.high)


@functools.partial(jax.jit, static_argnums=0)
def _hidden_of(graphdef, params, images, tokens):
  """The states that each token was drawn from, [batch, steps, dim]."""
  model = nnx.merge(graphdef, params)
  return of_steps(teacher_forced(model, images, tokens), model.num_prefix)[1]


def effective_rank(
  victim: Victim, images: np.ndarray, measured: Measured, first: int
) -> np.ndarray:
  """||H||_* / ||H||_F of the last layer's states of each caption's first tokens, [images, samples].

  Args:
    victim: the model.
    images: as they were measured.
    measured: their captions.
    first: tokens that are looked at; a shorter caption is taken whole.
  """
  tokens = measured.captions.tokens[..., :first]
  steps = np.minimum(measured.captions.steps, first)
  split = nnx.split(victim.model)
  found = []
  for start in range(0, len(images), victim.batch):
    at = slice(start, start + victim.batch)
    for sample in range(tokens.shape[1]):
      hidden = np.array(_hidden_of(*split, images[at], tokens[at, sample]))
      hidden *= (np.arange(first) < steps[at, sample, None])[..., None]
      values = np.linalg.svd(hidden, compute_uv=False)
      found.append(values.sum(axis=1) / np.sqrt((values**2).sum(axis=1)))
  ranks = np.stack(found).reshape(-1, tokens.shape[1], victim.batch)
  return ranks.swapaxes(1, 2).reshape(len(images), -1)


def mean_of_first(values: np.ndarray, steps: np.ndarray, first: int) -> np.ndarray:
  """Mean over the first steps of [..., width], of a shorter caption over all of it."""
  count = np.minimum(steps, first)
  meant = np.arange(values.shape[-1]) < count[..., None]
  return (values * meant).sum(axis=-1) / count
