"""The families beside the decoders: round trips, old spellings, heads, and what is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from common.checkpoints.family import ACTIVATIONS, read_activation, write_activation
from common.checkpoints.huggingface import Checkpoint, load_decoder, save_model
from common.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints"
CHECKPOINTS = [
  "bert",
  "bert_model",
  "bert_sequence",
  "bert_token_left",
  "bert_untied_sharded",
  "roberta_masked_lm_left",
  "roberta_sequence",
  "t5",
  "t5_gated_untied_left",
  "vit",
  "vit_model_oblong",
  "deit_teacher",
  "resnet_basic",
  "resnet_bottleneck",
  "mobilenet_v2",
  "qwen2_mixed_windows",
]


def tensors_of(path):
  return {
    k: v for f in path.glob("*.safetensors") for k, v in safetensors.numpy.load_file(f).items()
  }


@pytest.fixture
def copy(tmp_path):
  """copy(name, config changes, tensors -> tensors): a changed copy of a golden checkpoint."""

  def copy(name, config=None, change=None):
    path = tmp_path / name
    shutil.copytree(GOLDEN / name, path)
    changed = json.loads((path / "config.json").read_text()) | (config or {})
    changed = {key: value for key, value in changed.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(changed))
    if change is not None:
      tensors = tensors_of(path)
      for file in path.glob("model*"):
        file.unlink()
      tensors = {k: np.ascontiguousarray(v) for k, v in change(tensors).items()}
      safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path

  return copy


def assert_same_model(a, b):
  a, b = (dict(nnx.to_flat_state(nnx.state(model))) for model in (a, b))
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path].get_value(), b[path].get_value(), err_msg=str(path))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_written_and_read_back(name, tmp_path):
  source = Checkpoint(GOLDEN / name)
  model = source.load_model(dtype=None)
  save_model(model, tmp_path / "out")
  written = Checkpoint(tmp_path / "out")
  assert written.config == source.config
  assert written.hf_config["architectures"] == source.hf_config["architectures"]
  old, new = tensors_of(GOLDEN / name), tensors_of(tmp_path / "out")
  # An untied masked-language-model head has its bias in the decoder; the other one is unused.
  assert old.keys() - new.keys() <= {"cls.predictions.bias"} and new.keys() <= old.keys()
  for key in new:
    assert new[key].dtype == old[key].dtype and new[key].shape == old[key].shape, key
    assert new[key].tobytes() == old[key].tobytes(), key


def test_names_of_labels_survive(tmp_path):
  checkpoint = Checkpoint(GOLDEN / "bert_sequence")
  assert checkpoint.config.labels == ("bad", "good", "ugly")
  save_model(checkpoint.load_model(), tmp_path / "out")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["id2label"] == {"0": "bad", "1": "good", "2": "ugly"}
  assert config["label2id"] == {"bad": 0, "good": 1, "ugly": 2}


def test_older_spellings_of_bert(copy):
  def old(tensors):
    rename = lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
      "LayerNorm.bias", "LayerNorm.beta"
    )
    return {rename(k): v for k, v in tensors.items()} | {
      "bert.embeddings.position_ids": np.arange(128)[None],
      "bert.pooler.dense.weight": np.zeros((64, 64), np.float32),
      "bert.pooler.dense.bias": np.zeros(64, np.float32),
      "cls.seq_relationship.weight": np.zeros((2, 64), np.float32),
      "cls.seq_relationship.bias": np.zeros(2, np.float32),
      "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
      "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }

  path = copy("bert", change=old)
  assert_same_model(Checkpoint(path).load_model(), Checkpoint(GOLDEN / "bert").load_model())


def test_names_without_the_prefix_of_the_bare_model(copy):
  strip = lambda prefix: lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()}
  for name, prefix in (("bert", "bert."), ("deit_teacher", "deit.")):
    path = copy(name, change=strip(prefix))
    assert_same_model(Checkpoint(path).load_model(), Checkpoint(GOLDEN / name).load_model())
  # A decoder that ties its head lacks nothing in the bare class; one that does not lacks a head.
  assert load_decoder(GOLDEN / "gpt2_base").lm_head is None

  def headless(tensors):
    return strip("model.")({k: v for k, v in tensors.items() if k != "lm_head.weight"})

  path = copy("qwen2_mixed_windows", {"architectures": ["Qwen2Model"]}, headless)
  with pytest.raises(UserError, match="lm_head.weight.*without its head.*Qwen2ForCausalLM"):
    Checkpoint(path)


def test_a_bare_encoder_has_a_pooler_if_the_file_has_one(copy):
  assert Checkpoint(GOLDEN / "bert_model").config.pooler
  without = lambda tensors: {k: v for k, v in tensors.items() if "pooler" not in k}
  assert not Checkpoint(copy("bert_model", change=without)).config.pooler
  assert Checkpoint(copy("vit_model_oblong", change=without)).config.pooler_size is None


def test_the_tensors_decide_about_ties(copy):
  untied = Checkpoint(GOLDEN / "t5_gated_untied_left")
  assert untied.hf_config["tie_word_embeddings"] and not untied.config.tie_word_embeddings
  assert not untied.config.scale_output
  # Older files: one flag for both, and the embeddings under their other names.
  old = {"scale_decoder_outputs": ..., "tie_word_embeddings": False, "is_gated_act": ...}
  path = copy("t5_gated_untied_left", old)
  assert Checkpoint(path).config == untied.config

  def other_name(tensors):
    embeddings = tensors.pop("shared.weight")
    return tensors | {"encoder.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}

  path = copy("t5", change=other_name)
  assert Checkpoint(path).config.tie_word_embeddings
  assert_same_model(Checkpoint(path).load_model(), Checkpoint(GOLDEN / "t5").load_model())


def test_layers_with_and_without_a_window(copy):
  config = Checkpoint(GOLDEN / "qwen2_mixed_windows").config
  assert (config.sliding_window, config.full_attention_layers) == (4, (0,))
  older = copy("qwen2_mixed_windows", {"layer_types": ...})
  assert Checkpoint(older).config == config
  shutil.rmtree(older)
  never = {"layer_types": ..., "max_window_layers": 28}
  assert Checkpoint(copy("qwen2_mixed_windows", never)).config.sliding_window is None


@pytest.mark.parametrize(
  "name, config, message",
  [
    ("bert", {"is_decoder": True}, "is_decoder=True"),
    ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
    ("bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
    ("bert", {"architectures": ["BertModel"]}, "unexpected tensors: cls.predictions"),
    ("bert", {"architectures": ["BertForTokenClassification"]}, "missing tensors: classifier.bias"),
    ("bert", {"hidden_act": "laplace"}, "laplace"),
    ("bert", {"hidden_size": ...}, "hidden_size"),
    ("vit", {"num_hidden_layers": 1}, "unexpected tensors: vit.encoder.layer.1"),
    ("vit", {"id2label": {"0": "a", "1": "b"}}, "'classifier.bias' gives shape"),
    ("t5", {"feed_forward_proj": "double-gelu"}, "double-gelu"),
    ("resnet_basic", {"layer_type": "bottleneck"}, "missing tensors"),
  ],
)
def test_what_does_not_fit_is_named(copy, name, config, message):
  with pytest.raises(UserError, match=message) as error:
    Checkpoint(copy(name, config)).load_model()
  assert "\n" not in str(error.value)


def test_an_encoder_is_not_a_decoder():
  with pytest.raises(UserError, match="kind Encoder; expected a decoder"):
    load_decoder(GOLDEN / "bert_model")
  with pytest.raises(UserError, match="expected a decoder"):
    Checkpoint(GOLDEN / "t5").load_block(0)


def test_activations_are_written_as_they_are_read():
  for ours in ACTIVATIONS.values():
    assert read_activation(write_activation(ours)) == ours
