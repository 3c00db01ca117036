"""MobileNetV2's checkpoints: padding, widths, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx

from common.checkpoints.families_mobilenet import MOBILENET
from common.checkpoints.huggingface import Checkpoint, hf_config, parameter_count, save_model
from common.errors import UserError
from common.models.mobilenet import InvertedResidual, MobileNetConfig, Stage

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints" / "mobilenet_v2"
FAMILY = MOBILENET["mobilenet_v2"]


def read(labels=1001, **changes):
  hf = {"architectures": [FAMILY.architecture], "num_labels": labels, **changes}
  return FAMILY.read(hf)


@pytest.mark.parametrize("height, width", [(6, 7), (5, 8)])
def test_padding_is_tensorflows(height, width):
  """A depthwise convolution of stride 2 against the sum over windows that SAME defines."""
  config = MobileNetConfig(tf_padding=True, norm_eps=0.0)
  conv = InvertedResidual(config, 2, 2, 1, 2, nnx.Rngs(0)).depthwise.conv
  x = np.float32(np.random.default_rng(0).normal(size=(1, height, width, 2)))
  kernel = np.asarray(conv.kernel[...])[:, :, 0]
  sizes, pads = [], []
  for size in (height, width):
    out = -(-size // 2)
    total = max((out - 1) * 2 + 3 - size, 0)
    sizes.append(out)
    pads.append((total // 2, total - total // 2))
  padded = np.pad(x[0], (*pads, (0, 0)))
  expected = np.zeros((*sizes, 2))
  for i in range(sizes[0]):
    for j in range(sizes[1]):
      window = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
      expected[i, j] = np.sum(window * kernel, axis=(0, 1))
  np.testing.assert_allclose(conv(x)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "multiplier, stem, channels, head, parameters",
  [
    # 3,504,872 are torchvision's, of 1000 classes; a class more has 1280 weights and a bias.
    (1.0, 32, (16, 24, 32, 64, 96, 160, 320), 1280, 3_504_872 + 1281),
    # The widths of TensorFlow's published networks.
    (0.75, 24, (16, 24, 24, 48, 72, 120, 240), 1280, None),
    (0.35, 16, (8, 8, 16, 24, 32, 56, 112), 1280, None),
    (1.4, 48, (24, 32, 48, 88, 136, 224, 448), 1792, None),
  ],
)
def test_widths_follow_from_the_multiplier(multiplier, stem, channels, head, parameters):
  config = read(depth_multiplier=multiplier)
  assert config.tf_padding and config.norm_eps == 0.001
  assert (config.stem_channels, config.head_channels) == (stem, head)
  assert tuple(stage.channels for stage in config.stages) == channels
  assert parameters is None or parameter_count(config) == parameters
  written = hf_config(config)
  assert FAMILY.read(written) == config
  assert (written["depth_multiplier"], written["finegrained_output"]) == (multiplier, True)


def test_a_narrow_head_and_no_head():
  narrow = read(depth_multiplier=0.5, finegrained_output=False)
  assert narrow.head_channels == 640
  assert not hf_config(narrow)["finegrained_output"] and FAMILY.read(hf_config(narrow)) == narrow
  bare = dataclasses.replace(narrow, labels=())
  assert hf_config(bare)["architectures"] == ["MobileNetV2Model"]
  assert FAMILY.read(hf_config(bare)) == bare


def test_other_widths_cannot_be_written(tmp_path):
  config = MobileNetConfig(4, 2, (Stage(1, 4, 1, 1), Stage(2, 6, 1, 2)), 8)
  with pytest.raises(ValueError, match="cannot describe"):
    save_model(FAMILY.model(config, rngs=nnx.Rngs(0)), tmp_path)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"output_stride": 16}, "output_stride=16.*expected 32"),
    ({"hidden_act": "swish"}, "hidden_act='swish'.*expected 'relu6'"),
    ({"depth_divisible_by": 4}, "depth_divisible_by=4.*expected 8"),
    ({"min_depth": 16}, "min_depth=16.*expected 8"),
    ({"first_layer_is_expansion": False}, "first_layer_is_expansion=False"),
    ({"expand_ratio": 4.5}, "expand_ratio=4.5.*an integer from 2"),
    ({"expand_ratio": 1}, "expand_ratio=1,"),
    ({"depth_multiplier": 0.25}, "depth_multiplier=0.25.*the same width"),
    ({"depth_multiplier": "wide"}, "has a value that does not fit"),
    ({"depth_multiplier": 1.0}, "gives shape .* config.json asks for"),
    ({"architectures": ["MobileNetV2ForSemanticSegmentation"]}, "is not supported"),
    ({"architectures": ["MobileNetV2Model"]}, "unexpected tensors: classifier"),
  ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
  path = shutil.copytree(GOLDEN, tmp_path / "copy")
  hf = json.loads((path / "config.json").read_text()) | changes
  (path / "config.json").write_text(json.dumps(hf))
  with pytest.raises(UserError, match=message) as error:
    Checkpoint(path).load_model()
  assert "\n" not in str(error.value)
