"""OFQ's integer models: saved, read back, evaluated; what is no such file."""

import dataclasses
import functools
import pathlib
import types

import numpy as np
import pytest
import safetensors
from flax import nnx

from common.checkpoints.shards import save_tensors
from common.errors import UserError
from common.models.vit import VisionTransformer
from projects.ofq import config, digits, digits_runs, experiment
from projects.ofq.integer_model import (
  IntegerLinear,
  exportable,
  integer_tensors,
  load_integer,
  save_integer,
  to_integer,
)
from projects.ofq.ofq import QATSettings

SETTINGS = QATSettings(3, 3)
VIT = digits.vit_config(8, 1, 2, 4)


@functools.cache
def teacher():
  """A model of the digits, untrained."""
  model = nnx.jit(lambda: VisionTransformer(VIT, rngs=nnx.Rngs(1)))()
  return digits_runs.Teacher(digits.load(0), model, 0.0)


@functools.cache
def start_model():
  return digits_runs.start_model(config.get_config("tiny"), teacher(), SETTINGS)


@functools.cache
def integer_model():
  return to_integer(start_model())


@pytest.fixture
def file(tmp_path):
  save_integer(tmp_path / "model.safetensors", integer_model(), SETTINGS)
  return tmp_path / "model.safetensors"


def test_a_saved_model_is_the_same_model(file):
  loaded = load_integer(file)
  assert loaded.config == VIT
  expected, found = integer_tensors(integer_model()), integer_tensors(loaded)
  assert expected.keys() == found.keys()
  for name in expected:
    assert expected[name].dtype == found[name].dtype
    np.testing.assert_array_equal(expected[name], found[name], err_msg=name)
  assert isinstance(loaded.blocks[0].attention.query_key, IntegerLinear)
  # Queries, keys and values share the quantizer of their input.
  attention = loaded.blocks[0].attention
  assert attention.v_proj.input_quantizer is attention.input_quantizer
  assert nnx.graphdef(loaded) == nnx.graphdef(integer_model())
  assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_what_is_no_integer_model_is_refused(file, tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    load_integer(tmp_path / "none.safetensors")
  other = tmp_path / "other.safetensors"
  other.write_bytes(b"GGUF")
  with pytest.raises(UserError, match="is not an integer model"):
    load_integer(other)
  save_tensors(other, {"w": np.zeros(2)}, {"format": "pt"})
  with pytest.raises(UserError, match="is not an integer model of this project.*config"):
    load_integer(other)
  with safetensors.safe_open(file, framework="np") as f:
    tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
  tensors["blocks.0.mlp.up_proj.codes"] = np.zeros((8, 16), np.int16)
  save_tensors(other, tensors, metadata)
  with pytest.raises(UserError, match="has int16 .* for blocks.0.mlp.up_proj.codes, expected int8"):
    load_integer(other)


def test_a_saved_model_needs_images_that_it_takes(monkeypatch, tmp_path):
  for label in "ab":
    (tmp_path / "val" / label).mkdir(parents=True)
    (tmp_path / "val" / label / "0.png").touch()
  wrong = config.get_config("tiny")
  wrong.integer_model = "some.safetensors"
  other = types.SimpleNamespace(config=dataclasses.replace(VIT, image_size=(8, 4)))
  monkeypatch.setattr(experiment, "load_integer", lambda path: other)
  for data, message in (
    ("digits", r"takes images \(8, 4, 1\), digits has \(8, 8, 1\)"),
    ("folder:/nowhere", r"takes images \(8, 4, 1\), .* has \(8, 4, 3\)"),
    ("mnist", "unknown data 'mnist'"),
    (f"folder:{tmp_path}", "val of folder:.* has 2 classes, the classifier of some.* 10"),
  ):
    wrong.data = data
    if data == "mnist":
      other.config = dataclasses.replace(VIT, num_channels=3)
    with pytest.raises(UserError, match=message):
      experiment.run(wrong, pathlib.Path("unused"))


def test_training_saves_the_last_methods_model(tmp_path):
  """The export of a run, and `--config.integer_model` on its file, give one accuracy."""
  tiny = config.get_config("tiny")
  params = nnx.to_pure_dict(nnx.state(start_model()))
  run = experiment.Run(*[None] * 6, params)
  runs = {(experiment.QKR, 3): [run], (experiment.CGA, 3): [run], (experiment.CGA, 8): [run]}
  table = experiment.export(tiny, teacher(), runs, tmp_path)
  [(method, bits, trained, integer, alike, name)] = table.rows  # 8-bit StatsQ has no export.
  assert (method, bits, name) == (experiment.CGA, "W3A3", "statsq-qkr-cga-w3a3.safetensors")
  # Sums in another order: an activation on a tie may round the other way, in an image or two.
  assert abs(trained - integer) < 0.5 and alike > 99.5
  tiny.integer_model = str(tmp_path / name)
  [table] = experiment.run(tiny, tmp_path).tables
  np.testing.assert_allclose(table.rows[0][2:], (digits.TEST_IMAGES, integer), rtol=1e-5)


def test_what_can_be_exported():
  assert exportable("lsq", 8) and exportable("statsq", 7) and not exportable("statsq", 8)
