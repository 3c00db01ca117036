"""FlexRound on checkpoints of ResNet and MobileNetV2, with images in folders."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from common.checkpoints.huggingface import Checkpoint, abstract_model, save_model
from common.errors import UserError
from common.models.mobilenet import MobileNetConfig, Stage
from common.models.resnet import ResNetConfig
from projects.flexround import config, experiment, methods, vision_checkpoint
from projects.flexround.convnets import run_conv_unit
from projects.flexround.vision_checkpoint import open_checkpoint

LABELS = ("a", "b", "c")
RESNET = ResNetConfig(
  embedding_size=8, hidden_sizes=(8,), depths=(1,), block="basic", labels=LABELS
)
# The widths of depth_multiplier 0.27; the shape of its blocks is the family's.
MOBILENET = MobileNetConfig(
  stem_channels=16,
  stages=tuple(
    Stage(1 if i == 0 else 2, channels, depth, stride)
    for i, (channels, (_, _, depth, stride)) in enumerate(
      zip((8, 8, 16, 16, 24, 40, 88), MobileNetConfig.stages)
    )
  ),
  head_channels=344,
  tf_padding=True,
  labels=("background", *LABELS),
)


def write_model(folder, settings):
  graphdef, state = nnx.split(abstract_model(settings))
  rng = np.random.default_rng(0)

  def draw(path, shape):
    if path[-1] in ("var", "scale"):
      return np.exp(0.2 * rng.normal(size=shape))
    fan_in = np.prod(shape[:-1]) if path[-1] == "kernel" else 4
    return rng.normal(size=shape) * (2 / fan_in) ** 0.5

  leaves = {
    path: leaf.replace(np.float32(draw(path, leaf.shape))) for path, leaf in state.flat_state()
  }
  save_model(nnx.merge(graphdef, nnx.State.from_flat_path(leaves)), folder)
  return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder with both checkpoints, and images of each class in either split."""
  folder = tmp_path_factory.mktemp("vision")
  rng = np.random.default_rng(0)
  for split, count in (("train", 2), ("val", 1)):
    for label in LABELS:
      (folder / split / label).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (20, 18, 3), np.uint8)
        Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
  write_model(folder / "resnet", RESNET)
  write_model(folder / "mobilenet", MOBILENET)
  return folder


def preset(data, name="resnet"):
  options = config.get_config("vision")
  options.vision_model, options.images = str(data / name), f"folder:{data}"
  options.learning_rates = {"AdaRound": (0.01,), "AdaQuant": (0.01,), "FlexRound": (0.01,)}
  options.update({"calibration_images": 4, "image_batch_size": 2, "network_steps": 2})
  options.image_size, options.vision_bits, options.activation_seeds = 16, (2,), 0
  return options


def test_the_run_on_a_resnet(data, tmp_path):
  options = preset(data)
  options.network_methods, options.activation_seeds = ("RTN", "AdaRound", "FlexRound"), 1
  report = experiment.run(options, tmp_path)
  weights, activations = report.tables
  assert weights.title == f"{data}/resnet on folder:{data}, weights per tensor"
  assert [row[:2] for row in weights.rows] == [["RTN", 2], ["AdaRound", 2], ["FlexRound", 2]]
  assert [row[0] for row in activations.rows] == [
    "RTN",
    "B + AdaRound",
    "B + FlexRound",
    "Q + AdaRound",
    "Q + FlexRound",
  ]
  for method, _, top1, spread, error in (*weights.rows, *activations.rows):
    # Shares of three images; no method is kept above rounding to nearest.
    assert 3 * top1 == pytest.approx(round(3 * top1), abs=1e-6) and spread is None
    table = weights if method in ("AdaRound", "FlexRound") else activations
    assert 0 < error <= table.rows[0][4] or method == "RTN"
  assert weights.note.endswith("3 images of val, 4 of train for calibration.")
  assert [claim.statement.split(" (")[0] for claim in report.claims] == [
    "FlexRound is more accurate than AdaRound",
    "AdaRound is more accurate than RTN",
    "FlexRound's blocks are nearer to the originals than AdaRound's",
  ]


def test_the_run_on_a_mobilenet(data, tmp_path, monkeypatch):
  """Its classes 1 to 3 are the folders; 0 is the background."""
  seen, accuracy = [], vision_checkpoint.accuracy

  def recorded(model, images, **inputs):
    seen.append(([images[i][1] for i in range(len(images))], inputs["size"]))
    return accuracy(model, images, **inputs)

  monkeypatch.setattr(vision_checkpoint, "accuracy", recorded)
  options = preset(data, "mobilenet")
  options.network_methods = ("RTN",)
  [table] = experiment.run(options, tmp_path).tables
  assert [row[:2] for row in table.rows] == [["RTN", 2]] and np.isfinite(table.rows[0][4])
  # In full precision, and quantized.
  assert seen == [([1, 2, 3], (16, 16))] * 2


@pytest.fixture(scope="module")
def network_of(data):
  return open_checkpoint(preset(data))[0]


def test_a_seed_draws_other_images(network_of):
  first, second = (network_of(seed).images for seed in (0, 1))
  assert first.shape == (4, 16, 16, 3) and len(np.unique(first, axis=0)) == 4
  assert not np.array_equal(first, second)


def test_passes_of_a_few_rows_give_the_whole(network_of, monkeypatch):
  network = network_of(0)
  unit = network.model.stem
  whole = methods.run_unit(unit, network.images, None, run_conv_unit)
  monkeypatch.setattr(methods, "ROWS_PER_PASS", 2)
  methods._run_unit.clear_cache()
  found = methods.run_unit(unit, network.images, None, run_conv_unit)
  np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)
  assert found.shape == whole.shape == (4, 8, 8, 8) and jnp.std(found) > 0


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
    ("calibration_images", 7, "calibration_images=7; expected 1 to 6, the images in train of"),
    ("calibration_images", 0, "calibration_images=0; expected 1 to 6"),
    ("eval_images", -1, "eval_images=-1; expected a number of images, or 0 for all"),
    ("image_size", -1, "image_size=-1; expected the side of the images"),
    ("vision_bits", (), "vision_bits is empty: give at least one"),
    ("vision_bits", (9,), "9"),
  ],
)
def test_bad_values_are_refused(data, tmp_path, computes_nothing, field, value, message):
  options = preset(data)
  options[field] = value
  with pytest.raises(UserError, match=message) as error:
    experiment.run(options, tmp_path)
  assert "\n" not in str(error.value)
