"""Top-1 accuracy of a vision model with a classifier."""

import functools
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.data.images import IMAGENET, Preprocessing, centre_crop

Array = jax.Array


def accuracy(
  model: nnx.Module,
  images: Sequence[tuple[np.ndarray, int]],
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
