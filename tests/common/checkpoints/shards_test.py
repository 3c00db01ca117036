"""Checkpoint directories as files: written whole or not at all, and what cannot be read is named."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from common.checkpoints.shards import CheckpointWriter, open_file, tensor_files
from common.errors import UserError


def test_a_failed_write_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError):
    with CheckpointWriter(tmp_path / "out", {}) as writer:
      writer.add({"a": np.ones(3, np.float32)})
      writer.flush()
      raise RuntimeError
  assert list(tmp_path.iterdir()) == []
  # The same where closing fails: here on what is not JSON.
  with pytest.raises(TypeError):
    with CheckpointWriter(tmp_path / "out", {"dtype": np.float32}) as writer:
      writer.add({"a": np.ones(3, np.float32)})
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_the_end(tmp_path):
  with CheckpointWriter(tmp_path / "out", {}, max_shard_bytes=16) as writer:
    for name in "abc":
      writer.add({name: np.ones(3, np.float32)})
      assert not (tmp_path / "out").exists()
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == 36
  assert set(index["weight_map"]) == set("abc") and len(set(index["weight_map"].values())) == 3


def test_a_failed_overwrite_keeps_the_old_one(tmp_path):
  before = {"old": np.ones(2, np.float32)}
  with CheckpointWriter(tmp_path / "out", {}) as writer:
    writer.add(before)
  with pytest.raises(RuntimeError):
    with CheckpointWriter(tmp_path / "out", {}, overwrite=True) as writer:
      writer.add({"a": np.ones(3, np.float32)})
      raise RuntimeError
  assert safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors").keys() == before.keys()
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def write_raw(path, dtypes):
  """A file of one element per tensor, in types that the library's NumPy writer may not know."""
  header = {
    name: {"dtype": dtype, "shape": [2], "data_offsets": [2 * i, 2 * i + 2]}
    for i, (name, dtype) in enumerate(dtypes.items())
  }
  encoded = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(2 * len(dtypes)))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_type_that_is_not_read_is_named_with_its_tensor(dtype, sharded, tmp_path):
  name = "part.safetensors" if sharded else "model.safetensors"
  write_raw(tmp_path / name, {"a": "I8", "b": dtype})
  if sharded:
    index = {"weight_map": {"a": name, "b": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(UserError, match=f"{name}: tensor 'b' is of type {dtype}.*BF16, F16 or F32"):
    tensor_files(tmp_path)


@pytest.mark.parametrize(
  "dtype", ["int8", "uint16", "int32", "uint64", "bool", "float16", "float64"]
)
def test_all_other_types_are_read(dtype, tmp_path):
  value = np.ones(2, dtype)
  safetensors.numpy.save_file({"a": value}, tmp_path / "model.safetensors")
  file = tensor_files(tmp_path)["a"]
  with open_file(file) as f:
    assert f.get_tensor("a").dtype == value.dtype
