import json
import pathlib
import shutil
import types

import numpy as np
import pytest

from apps import parity
from common.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf_checkpoints"
CHECKPOINTS = {
  "bert": "BertForMaskedLM",
  "bert_model": "BertModel",
  "bert_sequence": "BertForSequenceClassification",
  "bert_token_left": "BertForTokenClassification",
  "bert_untied_sharded": "BertForMaskedLM",
  "roberta_masked_lm_left": "RobertaForMaskedLM",
  "roberta_sequence": "RobertaForSequenceClassification",
  "t5": "T5ForConditionalGeneration",
  "t5_gated_untied_left": "T5ForConditionalGeneration",
  "vit": "ViTForImageClassification",
  "vit_model_oblong": "ViTModel",
  "deit_teacher": "DeiTForImageClassificationWithTeacher",
  "resnet_basic": "ResNetForImageClassification",
  "resnet_bottleneck": "ResNetForImageClassification",
  "mobilenet_v2": "MobileNetV2ForImageClassification",
  "gpt2_base": "GPT2Model",
  "qwen2_mixed_windows": "Qwen2ForCausalLM",
}


@pytest.fixture
def run(monkeypatch):
  """Runs the app with a tolerance; returns its exit code."""

  def run(folder, tolerance=1e-4):
    monkeypatch.setattr(parity, "_TOLERANCE", types.SimpleNamespace(value=tolerance))
    return parity.main(["parity", str(folder)])

  return run


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_outputs_are_those_of_transformers(name):
  result = parity.compare(GOLDEN / name)
  assert result.error == ""
  assert result.architecture == CHECKPOINTS[name]
  assert result.difference < (5e-5 if name == "t5" else 1e-5)  # T5's logits are some 30 large.


def test_table_and_exit_code(run, tmp_path, capsys):
  shutil.copytree(GOLDEN / "deit_teacher", tmp_path / "vision" / "good")
  assert run(tmp_path) == 0
  assert "1 of 1 within 0.0001" in capsys.readouterr().out

  changed = tmp_path / "changed"
  shutil.copytree(GOLDEN / "deit_teacher", changed)
  with np.load(changed / "reference.npz") as file:
    arrays = dict(file)
  arrays["logits"][1, 2] += 0.25
  np.savez(changed / "reference.npz", **arrays)
  broken = tmp_path / "broken"
  shutil.copytree(changed, broken)
  config = json.loads((broken / "config.json").read_text()) | {"hidden_act": "laplace"}
  (broken / "config.json").write_text(json.dumps(config))
  assert run(tmp_path) == 1
  out = capsys.readouterr().out
  assert "1 of 3 within 0.0001" in out
  assert "2.50e-01" in out and "laplace" in out
  assert "vision/good" in out
  assert run(changed, tolerance=0.3) == 0


def test_padding_is_not_compared():
  with np.load(GOLDEN / "bert" / "reference.npz") as file:
    reference = dict(file)
  logits = np.where(reference["attention_mask"][..., None] == 0, 1e9, reference["logits"])
  assert parity.difference({"logits": logits}, reference) == 0
  logits[0, 3, 5] = np.nan
  assert parity.difference({"logits": logits}, reference) == np.inf


def test_nothing_to_compare(run, tmp_path):
  with pytest.raises(UserError, match="there is no folder"):
    run(tmp_path / "missing")
  with pytest.raises(UserError, match="no folder holds config.json and reference.npz"):
    run(tmp_path)
  with pytest.raises(UserError, match="takes one argument"):
    parity.main(["parity"])


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda path: path.write_bytes(b"zip"), "damaged"),
    (lambda path: np.savez(path, input_ids=np.zeros((1, 2), int)), "has no output"),
    (lambda path: np.savez(path, logits=np.zeros((1, 2))), "has no input"),
    (
      lambda path: np.savez(path, input_ids=np.zeros((1, 2), int), logits=np.zeros((1, 5))),
      "no pixel_values",
    ),
    (
      lambda path: np.savez(path, pixel_values=np.zeros((1, 3, 8, 8)), logits=np.zeros((1, 5))),
      "do not fit",
    ),
  ],
)
def test_a_bad_reference_is_named(tmp_path, change, message):
  folder = tmp_path / "deit"
  shutil.copytree(GOLDEN / "deit_teacher", folder)
  change(folder / "reference.npz")
  assert message in parity.compare(folder).error
