"""A classifier with its classes' images; top-1 of a model that names an image's strongest colour."""

import dataclasses
import types

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from common.data.images import Preprocessing
from common.errors import UserError
from common.evaluation import image_classification
from common.evaluation.image_classification import accuracy, open_classifier
from common.models.mobilenet import MobileNetConfig
from common.models.resnet import ResNetConfig
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


RESNET = ResNetConfig(8, (8,), (1,), labels=("a", "b", "c"))


@pytest.fixture
def folder(tmp_path):
  """A directory of a checkpoint, which nothing reads, and an image of each of three classes twice."""
  for split in ("train", "val"):
    for label, name in enumerate("abc"):
      (tmp_path / split / name).mkdir(parents=True)
      Image.fromarray(image(label)).save(tmp_path / split / name / "0.png")
  return tmp_path


@pytest.fixture
def opened(folder, monkeypatch):
  """opened(config): the checkpoint of a config, with the folder's images."""

  def opened(config):
    checkpoint = types.SimpleNamespace(config=config)
    monkeypatch.setattr(image_classification, "Checkpoint", lambda path: checkpoint)
    configs = (ResNetConfig, MobileNetConfig)
    source = f"folder:{folder}"
    return open_classifier(str(folder), source, configs, "ResNet or MobileNetV2", flag="model")

  return opened


@pytest.mark.parametrize(
  "config, labels",
  [
    (RESNET, [0, 1, 2]),
    (MobileNetConfig(labels=("background", "a", "b", "c")), [1, 2, 3]),
    # As many as folders: one of them is of the background.
    (MobileNetConfig(labels=("background", "a", "b")), [0, 1, 2]),
  ],
)
def test_labels_are_the_classifiers(opened, config, labels):
  checkpoint, train, val = opened(config)
  assert checkpoint.config is config
  for images in (train, val):
    assert [images[i][1] for i in range(len(images))] == labels


@pytest.mark.parametrize(
  "config, message",
  [
    (dataclasses.replace(RESNET, labels=()), "holds no ResNet or MobileNetV2 with a classifier"),
    (types.SimpleNamespace(labels=("a",)), "holds no ResNet or MobileNetV2 with a classifier"),
    (dataclasses.replace(RESNET, num_channels=1), "takes 1 channels; expected 3, RGB"),
    (
      dataclasses.replace(RESNET, labels=("a", "b")),
      "train of folder:.* has 3 classes, the classifier of .* 2: expected the same ones",
    ),
    # One more without being the background.
    (dataclasses.replace(RESNET, labels=tuple("abcd")), "has 3 classes, the classifier of .* 4:"),
    (
      MobileNetConfig(labels=("background", "a")),
      "has 3 classes, the classifier of .* 1 beside the background: expected the same ones",
    ),
  ],
)
def test_other_classifiers_are_refused(opened, config, message):
  with pytest.raises(UserError, match=message):
    opened(config)


def test_what_is_not_there_is_named(opened, folder):
  with pytest.raises(UserError, match="no checkpoint directory 'nowhere'; pass --config.model=DIR"):
    open_classifier("nowhere", "", (ResNetConfig,), "ResNet", flag="model")
  (folder / "val" / "c" / "0.png").unlink()
  (folder / "val" / "c").rmdir()
  with pytest.raises(UserError, match="val of folder:.* has 2 classes, the classifier of .* 3"):
    opened(RESNET)
