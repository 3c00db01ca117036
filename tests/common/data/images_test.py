"""Images in folders and TFDS sets, crops of the middle and at random, a checkpoint's preprocessing."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from common.data import images
from common.data.images import IMAGENET, Preprocessing
from common.errors import UserError

MEAN, STD = np.array(IMAGENET.mean), np.array(IMAGENET.std)
# Rows and columns differ everywhere.
GRADIENT = np.dstack(np.broadcast_arrays(np.arange(20)[:, None] * 12, np.arange(30) * 8, 7))


@pytest.fixture
def folder(tmp_path):
  for name, value in (("cat", 0), ("dog", 255)):
    (tmp_path / "train" / name).mkdir(parents=True)
    Image.new("RGB", (20, 12), (value,) * 3).save(tmp_path / "train" / name / "1.png")
  return tmp_path


def test_images_in_folders(folder):
  found = images.load_images(f"folder:{folder}", "train")
  assert found.classes == ["cat", "dog"] and [label for _, label in found] == [0, 1]
  assert found[1][0].shape == (12, 20, 3) and (found[1][0] == 255).all()
  Image.new("L", (3, 2), 9).save(folder / "train" / "cat" / "0.PNG")
  (folder / "train" / "cat" / "notes.txt").touch()
  grey, label = images.load_images(f"folder:{folder}", "train")[0]
  assert label == 0 and grey.shape == (2, 3, 3) and (grey == 9).all()


def test_bad_images_are_refused(folder):
  with pytest.raises(UserError, match="no folder .*val; expected PATH/train/CLASS"):
    images.load_images(f"folder:{folder}", "val")
  for source in ("mnist", "folder:", ""):
    with pytest.raises(UserError, match=f"unknown data '{source}'; expected folder:PATH or tfds"):
      images.load_images(source, "train")
  (folder / "val").mkdir()
  Image.new("RGB", (2, 2)).save(folder / "val" / "flat.png")
  with pytest.raises(UserError, match=r"val holds no \.jpeg, \.jpg, \.png in folders of classes"):
    images.load_images(f"folder:{folder}", "val")
  broken = folder / "train" / "cat" / "1.png"
  broken.write_bytes(broken.read_bytes()[:20])
  with pytest.raises(UserError, match="cannot read the image .*1.png"):
    images.load_images(f"folder:{folder}", "train")[0]


class TinyPixels(tfds.core.GeneratorBasedBuilder):
  """Stands for a set of images, in a feature that is read without TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Tensor(shape=(2, 3, 3), dtype=np.uint8),
      "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(5), "validation": self._generate_examples(3)}

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {"image": np.full((2, 3, 3), i, np.uint8), "label": i % 2}


def test_images_of_tfds(monkeypatch, tmp_path):
  monkeypatch.setattr(tfds.core.utils.file_utils.constants, "DATA_DIR", str(tmp_path))
  train, val = (images.load_images("tfds:tiny_pixels", split) for split in ("train", "val"))
  assert (len(train), len(val)) == (5, 3) and val.classes == ["cat", "dog"]
  found = [val[i] for i in range(3)]
  assert sorted((int(image.mean()), label) for image, label in found) == [(0, 0), (1, 1), (2, 0)]
  with pytest.raises(UserError, match="tfds:no_such_set cannot be prepared"):
    images.load_images("tfds:no_such_set", "train")


def test_the_middle_of_an_image():
  crop = lambda preprocessing, size=(8, 8), pixels=GRADIENT: images.centre_crop(
    (np.uint8(pixels), 3), size=size, preprocessing=preprocessing
  )
  white = crop(IMAGENET, pixels=np.full((12, 20, 3), 255))
  np.testing.assert_allclose(
    white["images"], np.broadcast_to((1 - MEAN) / STD, (8, 8, 3)), rtol=1e-5
  )
  assert white["images"].dtype == np.float32 and white["labels"] == 3
  plain = Preprocessing((0.5,) * 3, (0.5,) * 3, 0.8, Image.Resampling.NEAREST)
  # 16 rows and columns of the middle, as they are.
  found = crop(plain, (16, 16))["images"]
  np.testing.assert_allclose(found, GRADIENT[2:18, 7:23] / 127.5 - 1, atol=1e-6)
  # An oblong model: 8 of 10 rows where all columns fit.
  found = crop(plain, (8, 16))["images"]
  np.testing.assert_allclose(found, GRADIENT[6:14, 7:23] / 127.5 - 1, atol=1e-6)
  whole = dataclasses.replace(plain, crop_share=None)
  # Every second row and every third column: each the middle of what it stands for.
  found = crop(whole, (10, 10))["images"]
  np.testing.assert_allclose(found, GRADIENT[1::2, 1::3] / 127.5 - 1, atol=1e-6)


def test_random_crops_and_erased_boxes():
  rng = np.random.default_rng(0)
  black = np.broadcast_to(-MEAN / STD, (8, 8, 3))
  example = np.zeros((12, 20, 3), np.uint8), 0
  drawn = [images.augment(example, rng, size=(8, 8), random_erasing=0.5) for _ in range(20)]
  erased = [not np.allclose(d["images"], black) for d in drawn]
  assert 3 < sum(erased) < 17 and drawn[0]["images"].dtype == np.float32
  crops = [images.augment((np.uint8(GRADIENT), 1), rng, size=(8, 8)) for _ in range(20)]
  assert len({crop["images"].tobytes() for crop in crops}) > 15
  mirrored = [crop["images"][0, 0, 1] > crop["images"][0, -1, 1] for crop in crops]
  assert 3 < sum(mirrored) < 17


@pytest.mark.parametrize(
  "config, expected",
  [
    # DeiT, as published and as written by newer versions.
    ({"do_center_crop": True, "size": 256, "crop_size": 224, "resample": 3}, (0.875, "BICUBIC")),
    (
      {
        "do_center_crop": True,
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 2,
      },
      (0.875, "BILINEAR"),
    ),
    # ViT and Swin: the whole image.
    ({"size": 224, "resample": 2}, (None, "BILINEAR")),
    ({"size": {"height": 224, "width": 224}, "do_center_crop": False}, (None, "BICUBIC")),
    # ResNet.
    ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (0.875, "BICUBIC")),
    ({}, (0.9, "BICUBIC")),
  ],
)
def test_preprocessing_of_a_checkpoint(config, expected, tmp_path):
  half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | half))
  found = images.load_preprocessing(tmp_path)
  assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
  assert (found.crop_share, found.resampling.name) == expected


def test_preprocessing_without_a_file_or_with_a_damaged_one(tmp_path):
  assert images.load_preprocessing(tmp_path) == IMAGENET
  for text in ("{", "[]", '{"do_center_crop": true, "size": 256}', '{"resample": 17}'):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match="preprocessor_config.json is damaged"):
      images.load_preprocessing(tmp_path)
