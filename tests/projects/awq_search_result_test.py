"""AWQ's settings and saved search: what is read back, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from common.errors import UserError
from common.quantization import awq
from common.quantization.quantized_array import IntegerFormat
from projects.awq import search_result
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

SETTINGS = awq.AWQSettings(IntegerFormat(3, 16, scale_dtype=jnp.float16))


def test_unsuitable_settings_are_refused():
  for axis in (1, None):
    with pytest.raises(UserError, match="grouped along the input"):
      awq.AWQSettings(IntegerFormat(4, -1, axis))
  with pytest.raises(UserError, match="scale_stat='median' is not supported; supported: mean, max"):
    awq.AWQSettings(IntegerFormat(4), scale_stat="median")


def test_what_is_not_finite_is_named():
  model = random_decoder(ARCHITECTURES["llama"])
  block, x, context = model.blocks[0], *model.stem(jnp.zeros((1, 4), jnp.int32))
  search = lambda x: awq.search_block(block, x, context, model.config, SETTINGS)
  with pytest.raises(UserError, match="the calibration activations: NaN or infinite"):
    search(x.at[0, 1, 2].set(jnp.inf))
  kernel = block.mlp.up_proj.kernel
  kernel[...] = kernel[...].at[3, 4].set(jnp.nan)
  with pytest.raises(UserError, match="mlp.up_proj.kernel: NaN or infinite"):
    search(x)


@pytest.fixture
def searches():
  """Two blocks, the second without clips."""
  value = lambda *shape: jnp.asarray(np.random.default_rng(sum(shape)).uniform(1, 2, shape))
  return [
    awq.BlockSearch(
      {"mlp_norm": value(8), "mlp.up_proj": value(16)}, {"mlp.down_proj": value(2, 8)}
    ),
    awq.BlockSearch({"mlp_norm": value(9)}, {}),
  ]


def test_a_search_is_read_back(searches, tmp_path):
  search_result.save(tmp_path / "s", searches, SETTINGS)
  loaded, settings = search_result.load(tmp_path / "s")
  assert settings == SETTINGS and len(loaded) == 2
  for before, after in zip(searches, loaded):
    for kind in ("scales", "clips"):
      old, new = getattr(before, kind), getattr(after, kind)
      assert old.keys() == new.keys()
      for name, value in old.items():
        np.testing.assert_array_equal(new[name], value)


def test_settings_survive_saving(searches, tmp_path):
  settings = awq.AWQSettings(
    IntegerFormat(2, 8, symmetric=True, scale_dtype=jnp.bfloat16),
    auto_scale=False,
    mse_range=False,
    scale_grid=7,
    fixed_ratio=0.25,
    scale_stat="max",
    clip_grid=11,
    max_shrink=0.3,
    clip_tokens=99,
  )
  assert all(
    getattr(settings, f.name) != getattr(SETTINGS, f.name) for f in dataclasses.fields(settings)
  )
  search_result.save(tmp_path / "s", searches, settings)
  _, loaded = search_result.load(tmp_path / "s")
  assert loaded == settings and hash(loaded) == hash(settings)


@pytest.fixture
def saved(searches, tmp_path):
  search_result.save(tmp_path / "s", searches, SETTINGS)
  return tmp_path / "s"


def test_a_missing_search_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    search_result.load(tmp_path / "s")


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: b"",
    lambda data: b"not a search result",
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
  ],
)
def test_a_damaged_file_is_a_user_error(damage, saved):
  saved.write_bytes(damage(saved.read_bytes()))
  with pytest.raises(UserError, match="is not an AWQ search result"):
    search_result.load(saved)


@pytest.mark.parametrize(
  "name, metadata",
  [
    ("blocks.0.scale.mlp_norm", {}),
    ("blocks.0.scale.mlp_norm", {"settings": "{", "num_blocks": "1"}),
    ("blocks.0.scale.mlp_norm", {"settings": "[]", "num_blocks": "1"}),
    ("blocks.0.scale.mlp_norm", {"settings": "{}", "num_blocks": "1"}),
    ("blocks.0.scale.mlp_norm", {"settings": '{"format": 3}', "num_blocks": "1"}),
    ("blocks.0.scale.mlp_norm", {"settings": '{"format": {"bits": 4}, "x": 1}', "num_blocks": "1"}),
    ("blocks.0.scale.mlp_norm", {"settings": '{"format": {"bits": 4}}', "num_blocks": "many"}),
    ("blocks.1.scale.mlp_norm", {"settings": '{"format": {"bits": 4}}', "num_blocks": "1"}),
    ("blocks.-1.scale.mlp_norm", {"settings": '{"format": {"bits": 4}}', "num_blocks": "1"}),
    ("blocks.0.shift.mlp_norm", {"settings": '{"format": {"bits": 4}}', "num_blocks": "1"}),
    ("lm_head.weight", {"settings": '{"format": {"bits": 4}}', "num_blocks": "1"}),
  ],
)
def test_another_safetensors_file_is_a_user_error(name, metadata, tmp_path):
  tensors = {name: np.ones(4, np.float32)}
  safetensors.numpy.save_file(tensors, tmp_path / "s", metadata=metadata)
  with pytest.raises(UserError, match="is not an AWQ search result"):
    search_result.load(tmp_path / "s")
  # The case's own fault is what is refused, not the way that it is written here.
  good = {"settings": '{"format": {"bits": 4}}', "num_blocks": "1"}
  tensors = {"blocks.0.scale.mlp_norm": np.ones(4, np.float32)}
  safetensors.numpy.save_file(tensors, tmp_path / "s", metadata=good)
  assert search_result.load(tmp_path / "s")[0][0].scales.keys() == {"mlp_norm"}


@pytest.mark.parametrize(
  "scales, clips, message",
  [
    ({"mlp.activation": (64,)}, {}, r"scale of mlp.activation, \(64,\), is not of this model"),
    ({"mlp_norm": (64,)}, {}, r"scale of mlp_norm, \(64,\), is not of this model"),
    ({}, {"mlp.fc1": (2, 64)}, r"clip of mlp.fc1, \(2, 64\), is not of this model"),
    ({}, {"mlp.up_proj": (2, 48)}, r"clip of mlp.up_proj, \(2, 48\), is not of this model"),
    ({}, {"mlp.up_proj": (3, 64)}, r"clip of mlp.up_proj, \(3, 64\), is not of this model"),
    ({}, {"mlp.up_proj": (0, 64)}, r"clip of mlp.up_proj, \(0, 64\), is not of this model"),
  ],
)
def test_a_search_of_another_model_is_refused(scales, clips, message):
  model = random_decoder(ARCHITECTURES["llama"])  # 32 channels, 64 in the MLP.
  ones = lambda shapes: {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
  good = {"mlp_norm": (32,)}, {"mlp.up_proj": (2, 64)}
  search = awq.BlockSearch(ones(good[0] | scales), ones(good[1] | clips))
  with pytest.raises(UserError, match=message):
    awq.apply_search(model.blocks[0], search, model.config)
