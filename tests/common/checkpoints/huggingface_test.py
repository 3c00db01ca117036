"""Hugging Face directories: parity with transformers, round trips, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from common.checkpoints.families import FAMILIES
from common.checkpoints.huggingface import Checkpoint, load_decoder, save_model
from common.errors import UserError
from common.models.decoder import RopeScaling
from common.quantization.calibration import rtn_block
from common.quantization.equivalent import fold_scale, scaling_groups
from common.quantization.quantized_array import IntegerFormat

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints"
DECODERS = ["llama", "llama_gqa_tied", "mistral", "opt", "gpt2", "gpt_neox"]
# The same in other options: ALiBi with 6 heads, post-norm with projected embeddings, tied Qwen2,
# RoPE scalings, sequential residual.
DECODERS += ["bloom6", "opt_post", "qwen2", "llama_llama3", "llama_dyn", "neox_seq"]


@pytest.fixture
def copy(tmp_path):
  """A checkpoint that may be damaged."""
  return pathlib.Path(shutil.copytree(GOLDEN / "llama_gqa_tied", tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_transformers(name):
  model = load_decoder(GOLDEN / name)
  with np.load(GOLDEN / name / "reference.npz") as reference:
    mask = reference["attention_mask"].astype(np.int32)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    forward = nnx.jit(lambda m, t, p, s: m(t, positions=p, segment_ids=s)[0])
    out = forward(model, *map(jnp.asarray, (reference["input_ids"], positions, mask)))
    # The project's bar; measured are 1e-6.
    np.testing.assert_allclose(out[mask > 0], reference["logits"][mask > 0], atol=1e-4)


def tensors_of(path: pathlib.Path) -> dict[str, np.ndarray]:
  return {
    name: value
    for file in path.glob("*.safetensors")
    for name, value in safetensors.numpy.load_file(file).items()
  }


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("max_shard_bytes", [4 << 30, 5_000], ids=["single", "sharded"])
def test_written_and_read_back(name, max_shard_bytes, tmp_path):
  first = Checkpoint(GOLDEN / name)
  save_model(first.load_model(), tmp_path / "out", max_shard_bytes=max_shard_bytes)
  second = Checkpoint(tmp_path / "out")
  assert second.config == first.config
  assert (tmp_path / "out" / "model.safetensors").exists() == (max_shard_bytes > 1 << 20)
  written = tensors_of(tmp_path / "out")
  original = tensors_of(GOLDEN / name)
  for key, value in written.items():
    np.testing.assert_array_equal(value, original[key], err_msg=key)


def edit_config(path: pathlib.Path, **changes) -> None:
  config = json.loads((path / "config.json").read_text())
  for key, value in changes.items():
    config.pop(key, None)
    if value is not None:
      config[key] = value
  (path / "config.json").write_text(json.dumps(config))


def test_older_config_keys_are_read(copy):
  new = Checkpoint(copy).config
  edit_config(copy, rope_parameters=None, rope_theta=500000.0)
  assert Checkpoint(copy).config == new
  scaling = {"type": "linear", "factor": 2.0}
  edit_config(copy, rope_scaling=scaling)
  linear = Checkpoint(copy).config
  assert (linear.rope_theta, linear.rope_scaling) == (500000.0, RopeScaling("linear", 2.0, 128))
  scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  edit_config(copy, rope_scaling=scaling | {"original_max_position_embeddings": 64})
  assert Checkpoint(copy).config.rope_scaling == RopeScaling("llama3", 8.0, 64, 1.0, 4.0)


def test_what_a_missing_key_means():
  config = json.loads((GOLDEN / "mistral" / "config.json").read_text())
  assert FAMILIES["mistral"].read(config).sliding_window == 8
  assert FAMILIES["mistral"].read(config | {"sliding_window": None}).sliding_window is None
  del config["sliding_window"]  # transformers' default; Mistral-7B v0.2 has an explicit null.
  assert FAMILIES["mistral"].read(config).sliding_window == 4096
  config = json.loads((GOLDEN / "gpt_neox" / "config.json").read_text())
  del config["rope_parameters"]
  old = FAMILIES["gpt_neox"].read(config | {"rotary_pct": 0.5, "rotary_emb_base": 5000})
  assert (old.rotary_dim, old.rope_theta) == (8, 5000.0)


def test_bfloat16_weights(copy):
  tensors = tensors_of(copy)
  low = {k: np.asarray(jnp.asarray(v).astype(jnp.bfloat16)) for k, v in tensors.items()}
  safetensors.numpy.save_file(low, copy / "model.safetensors")
  assert load_decoder(copy).embed_tokens.embedding.dtype == jnp.float32
  model = load_decoder(copy, dtype=None)
  assert model.embed_tokens.embedding.dtype == jnp.bfloat16
  save_model(model, copy, overwrite=True)
  assert json.loads((copy / "config.json").read_text())["dtype"] == "bfloat16"
  for key, value in tensors_of(copy).items():
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, low[key], err_msg=key)


def change_tensors(path: pathlib.Path, change) -> None:
  tensors = tensors_of(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path / "model.safetensors")


def truncate(path: pathlib.Path) -> None:
  data = (path / "model.safetensors").read_bytes()
  (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def only_pickled(path: pathlib.Path) -> None:
  (path / "model.safetensors").rename(path / "pytorch_model.bin")


def index_without_its_file(path: pathlib.Path) -> None:
  weight_map = dict.fromkeys(tensors_of(path), "model-00001-of-00002.safetensors")
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_index(content: bytes):
  return lambda path: (path / "model.safetensors.index.json").write_bytes(content)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
  "damage, message",
  [
    (shutil.rmtree, "does not exist"),
    (lambda p: (p / "config.json").unlink(), "no config.json"),
    (lambda p: (p / "config.json").write_text("{"), "not JSON"),
    (lambda p: edit_config(p, hidden_size=None), "hidden_size"),
    (lambda p: edit_config(p, architectures=["MambaForCausalLM"], model_type="mamba"), "Mamba"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn"),
    (truncate, "model.safetensors"),
    (only_pickled, "pickle"),
    (lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
    (index_without_its_file, "model-00001-of-00002.safetensors"),
    (write_index(b"\xff\xfe"), "index.json is damaged"),
    (write_index(b"[]"), "index.json is damaged"),
    (write_index(b'{"weight_map": {"a": 3}}'), "index.json is damaged"),
    (write_index(b'{"weight_map": {"a": ""}}'), "cannot be read"),
    (write_index(b'{"weight_map": {"a": "model.safetensors"}}'), "that the index names: a"),
    (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
    (lambda p: edit_config(p, hidden_size="64"), "hidden_size='64'"),
    (lambda p: edit_config(p, vocab_size=256.0), "vocab_size=256.0"),
    (lambda p: edit_config(p, num_attention_heads=0), "num_heads=0"),
    (lambda p: edit_config(p, num_attention_heads=0, head_dim=None), "value that does not fit"),
    (lambda p: edit_config(p, intermediate_size=-1), "intermediate_size=-1"),
    (lambda p: edit_config(p, num_key_value_heads=3), "num_heads=4 is no multiple of 3"),
    (lambda p: edit_config(p, rope_parameters=["linear"]), "value that does not fit"),
    (lambda p: edit_config(p, rope_parameters={"rope_type": "linear"}), "lacks the key 'factor'"),
    (lambda p: edit_config(p, hidden_act="mish"), "mish"),
    (lambda p: edit_config(p, num_hidden_layers=1), r"unexpected tensors: model.layers.1"),
    (lambda p: edit_config(p, num_hidden_layers=3), r"missing tensors: model.layers.2"),
    (lambda p: change_tensors(p, lambda t: t.pop(NORM)), NORM),
    (lambda p: change_tensors(p, lambda t: t.update({"model.extra": t[NORM]})), "model.extra"),
    (lambda p: change_tensors(p, lambda t: t.update({NORM: t[NORM][:3]})), NORM),
    (lambda p: change_tensors(p, lambda t: t[NORM].__setitem__(0, np.nan)), NORM),
  ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(copy, damage, message):
  damage(copy)
  with pytest.raises(UserError, match=message) as error:
    load_decoder(copy)
  assert "\n" not in str(error.value)


FOREIGN = {
  "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'gptq'"),
  "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
  "bitsandbytes, unnamed": ({"load_in_8bit": True}, "'bitsandbytes'"),
  "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
  "AWQ of another layout": (
    {"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 16},
    "'awq' with version 'gemv'",
  ),
  "not an object": ([8], r"quantization_config is \[8\]"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_quantization_is_refused_before_the_tensors_are_opened(case, copy):
  quantization, message = FOREIGN[case]
  edit_config(copy, quantization_config=quantization)
  (copy / "model.safetensors").write_bytes(b"never read")
  with pytest.raises(UserError, match=f"checkpoint: .*{message}") as error:
    Checkpoint(copy)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name, tensor",
  [
    ("gpt2", "transformer.h.0.attn.c_attn.weight"),
    ("gpt2", "transformer.h.1.attn.c_attn.bias"),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
    ("bloom6", "transformer.h.1.self_attention.query_key_value.bias"),
  ],
)
def test_fused_projections_of_a_wrong_shape_are_named(name, tensor, tmp_path):
  path = pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))
  cut = lambda t: t.update({tensor: np.ascontiguousarray(t[tensor][..., :-1, :-1])})
  if tensor.endswith("bias"):
    cut = lambda t: t.update({tensor: t[tensor][:-1]})
  change_tensors(path, cut)
  with pytest.raises(UserError, match=tensor):
    load_decoder(path)


def test_only_a_checkpoint_is_overwritten(copy, tmp_path):
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "thesis.txt").write_text("do not lose")
  (tmp_path / "file").write_text("nor this")
  for target in ("home", "file"):
    with pytest.raises(UserError, match="is not a checkpoint directory"):
      save_model(load_decoder(copy), tmp_path / target, overwrite=True)
  assert {p.name for p in tmp_path.iterdir()} == {"home", "file", "checkpoint"}
  assert (tmp_path / "home" / "thesis.txt").read_text() == "do not lose"


def packed(model):
  model.blocks[0] = rtn_block(model.blocks[0], IntegerFormat(4, 16))
  return model


def scaled_activation(model):
  block = model.blocks[0]
  group = next(g for g in scaling_groups(model.config) if g.linears == ("mlp.down_proj",))
  fold_scale(block, group, jnp.full(model.config.intermediate_size, 2.0))
  return model


def with_config(**changes):
  def change(model):
    model.config = dataclasses.replace(model.config, **changes)
    return model

  return change


@pytest.mark.parametrize(
  "name, change, message",
  [
    ("llama", packed, "no plain tensors model.layers.0"),
    ("gpt2", scaled_activation, "no place for blocks.0.mlp.activation.scale"),
    ("llama", with_config(sliding_window=8), "cannot describe"),
    ("opt", with_config(norm_eps=1e-6), "cannot describe"),
    ("bloom6", with_config(intermediate_size=20), "cannot describe"),
  ],
)
def test_a_model_that_the_layout_cannot_hold_is_not_written(name, change, message, tmp_path):
  model = change(load_decoder(GOLDEN / name))
  with pytest.raises(ValueError, match=message):
    save_model(model, tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_unless_told(copy):
  model = load_decoder(copy)
  with pytest.raises(UserError, match="exists"):
    save_model(model, copy)
  save_model(model, copy, overwrite=True)
  assert load_decoder(copy).config == model.config
  with pytest.raises(UserError, match="cannot write"):
    save_model(model, copy / "config.json" / "below")


def test_files_can_be_read_by_others(copy, tmp_path):
  save_model(load_decoder(copy), tmp_path / "out")
  config = (tmp_path / "out" / "config.json").stat().st_mode
  assert (tmp_path / "out" / "model.safetensors").stat().st_mode == config
