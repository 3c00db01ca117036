"""LLM-FP4 on a checkpoint of a vision transformer and images in folders."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from common.checkpoints.huggingface import Checkpoint, save_model
from common.errors import UserError
from common.models.vit import VisionTransformer, VisionTransformerConfig
from projects.llm_fp4 import config, experiment, vision_experiment
from projects.llm_fp4.compile_steps import compile_steps

# As many classes as channels: one program searches all linears.
DEIT = VisionTransformerConfig(
  image_size=(8, 8),
  patch_size=(4, 4),
  hidden_size=16,
  intermediate_size=16,
  num_layers=1,
  num_heads=2,
  distillation_token=True,
  head="classification",
  labels=tuple("abcdefghijklmnop"),
  family="deit",
)


def write_model(folder, settings):
  model = nnx.eval_shape(lambda: VisionTransformer(settings, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  rng = np.random.default_rng(0)
  leaves = {
    path: leaf.replace(np.float32(rng.normal(size=leaf.shape) / 2))
    for path, leaf in state.flat_state()
  }
  save_model(nnx.merge(graphdef, nnx.State.from_flat_path(leaves)), folder)
  return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder with the checkpoint, `deit`, and one image of each class in either split."""
  folder = tmp_path_factory.mktemp("vision")
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for label in DEIT.labels:
      (folder / split / label).mkdir(parents=True)
      pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
      Image.fromarray(pixels).save(folder / split / label / "0.png")
  write_model(folder / "deit", DEIT)
  mean_and_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 8, "resample": 2}
  (folder / "deit" / "preprocessor_config.json").write_text(json.dumps(mean_and_std))
  return folder


def preset(data):
  options = config.get_config("vision")
  options.vision_model, options.images = str(data / "deit"), f"folder:{data}"
  options.update({"calibration_samples": 4, "search_tokens": 4, "grid_size": 2, "rounds": 1})
  options.other_bits, options.seeds = (), (0, 1)
  return options


def test_the_run_on_a_checkpoint_and_a_folder(data, tmp_path, monkeypatch):
  seen = []
  quantize = vision_experiment.quantize

  def recorded(config, model, images, labels, bits, method):
    if method == "FPQ":
      seen.append(images)
    # An image's class is its folder, and each class has one image.
    assert len(set(labels.tolist())) == len(images) == 4
    return quantize(config, model, images, labels, bits, method)

  monkeypatch.setattr(vision_experiment, "quantize", recorded)
  options = preset(data)
  options.eval_images = 5
  report = experiment.run(options, tmp_path)
  [table] = report.tables
  full, *others = table.rows
  assert full[:2] == ["full precision", "32/32"] and full[3:] == [None, 79.9, 81.8, 81.4]
  assert [row[0] for row in others] == ["MinMax INT", "MinMax FP", "FPQ baseline", "FPQ"]
  assert all(row[1] == "4/4" and row[3] is not None for row in others)
  assert others[0][4:] == [None] * 3 and others[-1][4:] == [75.0, 79.4, 73.2]
  # Shares of five images, over two seeds for the quantized.
  assert all(row[2] % 10 == pytest.approx(0, abs=1e-6) for row in table.rows)
  assert table.note.startswith("5 images of val, 4 of train")
  assert len(report.claims) == 2 and len(report.claims[0].measured["FPQ"]) == 2
  # Four different images of train with the checkpoint's mean and deviation, others for each seed.
  assert [calibration.shape for calibration in seen] == [(4, 8, 8, 3)] * 2
  assert len(np.unique(seen[0], axis=0)) == 4 and not np.array_equal(*seen)
  assert np.abs(seen[0]).max() <= 1
  # After a kill the same command measures nothing again.
  monkeypatch.setattr(vision_experiment, "quantize", None)
  monkeypatch.setattr(vision_experiment, "accuracy", None)
  assert experiment.run(options, tmp_path) == report


def test_other_bits_are_measured_on_the_first_seed(data, tmp_path, monkeypatch):
  monkeypatch.setattr(vision_experiment, "quantize", lambda config, model, *_: model)
  options = preset(data)
  options.other_bits = (6, 4)
  report = experiment.run(options, tmp_path)
  [table] = report.tables
  assert [row[1] for row in table.rows] == ["32/32"] + ["4/4"] * 4 + ["6/6"] * 4
  assert len({row[2] for row in table.rows}) == 1
  assert [row[3] for row in table.rows] == [None] + [0.0] * 4 + [None] * 4
  assert table.rows[-1][4:] == [79.5, 81.8, 81.1]
  assert table.note.startswith("16 images of val")
  assert not any(claim.holds for claim in report.claims) and len(report.claims) == 4


@pytest.fixture
def computes_nothing(monkeypatch):
  """A checkpoint's weights are not even read."""
  monkeypatch.setattr(Checkpoint, "load_model", None)


@pytest.mark.parametrize(
  "field, value, message",
  [
    (
      "vision_model",
      "nowhere",
      "no checkpoint directory 'nowhere'; pass --config.vision_model=DIR",
    ),
    ("images", "", "unknown data ''; expected folder:PATH or tfds:NAME"),
    ("images", "folder:nowhere", "no folder nowhere/train; expected PATH/train/CLASS"),
    ("calibration_samples", 17, "calibration_samples=17; expected 1 to 16, the images in train of"),
    ("calibration_samples", 0, "calibration_samples=0; expected 1 to 16"),
    ("eval_images", -1, "eval_images=-1; expected a number of images, or 0 for all"),
    ("bits", 5, "weight_bits=5 is not supported"),
  ],
)
def test_bad_values_are_refused(data, tmp_path, computes_nothing, field, value, message):
  options = preset(data)
  options[field] = value
  with pytest.raises(UserError, match=message):
    experiment.run(options, tmp_path)


def test_a_checkpoint_without_a_classifier_is_refused(data, tmp_path, computes_nothing):
  options = preset(data)
  headless = dataclasses.replace(DEIT, head="none", labels=())
  options.vision_model = write_model(tmp_path / "headless", headless)
  with pytest.raises(UserError, match="holds no ViT or DeiT with a classifier; expected one"):
    experiment.run(options, tmp_path)


def test_there_are_no_steps_to_compile():
  with pytest.raises(UserError, match="only a decoder's steps are compiled here"):
    compile_steps(config.get_config("vision"), [])
