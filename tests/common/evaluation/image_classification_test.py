"""Top-1 of a model that names an image's strongest colour."""

import numpy as np
import pytest
from flax import nnx

from common.data.images import Preprocessing
from common.evaluation.image_classification import accuracy
from common.models.vit import VisionOutput

COLOURS = 255 * np.eye(3, dtype=np.uint8)


class StrongestColour(nnx.Module):
  def __init__(self):
    self.scale = nnx.Param(np.ones(3, np.float32))

  def __call__(self, images):
    logits = images.mean((1, 2)) * self.scale[...]
    return VisionOutput(images, None, logits)


def image(label):
  return np.broadcast_to(COLOURS[label], (6, 9, 3))


# Seven images, of which the second and the last are another class than they look.
IMAGES = [(image(i % 3), (i + (i in (1, 6))) % 3) for i in range(7)]


@pytest.mark.parametrize("batch_size", [2, 7, 10])
@pytest.mark.parametrize(
  "limit, expected",
  [
    (0, 5 / 7),
    (100, 5 / 7),
    (3, 2 / 3),  # 0, 3, 6.
    (1, 1.0),
  ],
)
def test_share_of_images_that_are_right(limit, expected, batch_size):
  found = accuracy(StrongestColour(), IMAGES, (4, 4), batch_size, limit=limit)
  assert found == pytest.approx(expected)


def test_the_preprocessing_is_the_models_own():
  green = Preprocessing(mean=(2.0, 0.0, 2.0))  # The others are below it, whatever they are.
  share = np.mean([label == 1 for _, label in IMAGES])
  found = accuracy(StrongestColour(), IMAGES, (4, 4), 7, preprocessing=green)
  assert found == pytest.approx(share)
