"""Hugging Face directories: parity with transformers, round trips, and what is refused."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from common.checkpoints.huggingface import Checkpoint, CheckpointWriter, load_decoder, save_model
from common.errors import UserError

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
  assert Checkpoint(copy).config.rope_scaling.factor == 2.0


def test_bfloat16_weights(copy):
  tensors = tensors_of(copy)
  low = {k: np.asarray(jnp.asarray(v).astype(jnp.bfloat16)) for k, v in tensors.items()}
  safetensors.numpy.save_file(low, copy / "model.safetensors")
  assert load_decoder(copy).embed_tokens.embedding.dtype == jnp.float32
  assert load_decoder(copy, dtype=None).embed_tokens.embedding.dtype == jnp.bfloat16


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


def test_a_failed_write_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError):
    with CheckpointWriter(tmp_path / "out", {}) as writer:
      writer.add({"a": np.ones(3, np.float32)})
      writer.flush()
      raise RuntimeError
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
