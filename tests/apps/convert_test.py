import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apps import convert
from common.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf_checkpoints"


@pytest.fixture
def run(monkeypatch):
  def run(source, target, overwrite=False):
    for flag, value in (("_FROM", source), ("_TO", target), ("_OVERWRITE", overwrite)):
      monkeypatch.setattr(convert, flag, types.SimpleNamespace(value=value))
    convert.main(["convert"])

  return run


def tensors(folder):
  return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_tensors(a, b):
  a, b = tensors(a), tensors(b)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name", ["bert_model", "t5_gated_untied_left", "resnet_basic"])
def test_there_and_back_is_bit_identical(run, tmp_path, name):
  run(str(GOLDEN / name), str(tmp_path / "orbax"))
  run(str(tmp_path / "orbax"), str(tmp_path / "back"))
  assert_same_tensors(GOLDEN / name, tmp_path / "back")
  before, after = (
    json.loads((f / "config.json").read_text()) for f in (GOLDEN / name, tmp_path / "back")
  )
  if name.startswith("t5"):
    # Its config.json says tied, but the head differs from the embeddings.
    assert before.pop("tie_word_embeddings") and not after.pop("tie_word_embeddings")
  assert before == after


def test_data_types_and_tokenizer_are_kept(run, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(GOLDEN / "bert_model", source)
  half = {k: v.astype(np.float16) for k, v in tensors(source).items()}
  half["pooler.dense.bias"] = half["pooler.dense.bias"].astype(np.float32)
  save_file(half, source / "model.safetensors")
  (source / "tokenizer.json").write_text("{}")
  (source / "vocab.txt").write_text("[PAD]\n")
  run(str(source), str(tmp_path / "orbax"))
  assert (tmp_path / "orbax" / "tokenizer.json").read_text() == "{}"
  run(str(tmp_path / "orbax"), str(tmp_path / "back"))
  assert_same_tensors(source, tmp_path / "back")
  assert (tmp_path / "back" / "vocab.txt").read_text() == "[PAD]\n"


def test_nothing_is_overwritten_unasked(run, tmp_path):
  source, target = GOLDEN / "bert_model", tmp_path / "out"
  target.mkdir()
  (target / "mine").write_text("precious")
  with pytest.raises(UserError, match="exists.*--overwrite"):
    run(str(source), str(target))
  bad = tmp_path / "bad"
  bad.mkdir()
  (bad / "config.json").write_text("{}")
  with pytest.raises(UserError, match="not supported"):
    run(str(bad), str(target), overwrite=True)
  assert (target / "mine").read_text() == "precious"
  run(str(source), str(target), overwrite=True)
  assert (target / "metadata.json").is_file() and not (target / "mine").exists()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "out"]


def test_what_cannot_be_converted(run, tmp_path):
  out = str(tmp_path / "out")
  with pytest.raises(UserError, match="there is no folder"):
    run(str(tmp_path / "missing"), out)
  with pytest.raises(UserError, match="neither a Hugging Face directory"):
    run(str(tmp_path), out)
  with pytest.raises(UserError, match="would replace"):
    run(str(tmp_path), str(tmp_path), overwrite=True)
  (tmp_path / "params").mkdir()
  (tmp_path / "metadata.json").write_text("{}")
  with pytest.raises(UserError, match="not made by convert"):
    run(str(tmp_path), str(tmp_path.parent / "out"))
  assert not (tmp_path / "out").exists()
