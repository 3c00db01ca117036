"""Swin: outputs and files of transformers, windows against a mask over all tokens, bad input."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from apps import parity
from common.checkpoints.huggingface import Checkpoint, save_model
from common.errors import UserError
from common.models import swin
from common.models.swin import Swin, SwinBlock, SwinConfig

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints"
# Windows of 4 on 8 x 8 tokens; windows of 3 on 7 x 5, padded, from images that are padded too.
CHECKPOINTS = {"swin": "SwinForImageClassification", "swin_model_padded": "SwinModel"}
CONFIG = SwinConfig(
  image_size=(16, 12),
  patch_size=(2, 2),
  embedding_size=4,
  depths=(2, 1),
  num_heads=(2, 2),
  window_size=2,
  head="classification",
  labels=("a", "b"),
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_outputs_are_those_of_transformers(name):
  result = parity.compare(GOLDEN / name)
  assert (result.error, result.architecture) == ("", CHECKPOINTS[name])
  assert result.difference < 1e-5


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_written_and_read_back(name, tmp_path):
  source = Checkpoint(GOLDEN / name)
  save_model(source.load_model(dtype=None), tmp_path / "out")
  written = Checkpoint(tmp_path / "out")
  assert written.config == source.config
  assert written.hf_config["architectures"] == [CHECKPOINTS[name]]
  load = lambda path: safetensors.numpy.load_file(path / "model.safetensors")
  old, new = load(GOLDEN / name), load(tmp_path / "out")
  assert old.keys() == new.keys()
  for key in new:
    assert new[key].dtype == old[key].dtype and new[key].tobytes() == old[key].tobytes(), key


@pytest.mark.parametrize(
  "change, message",
  [
    ({"use_absolute_embeddings": True}, "use_absolute_embeddings=True"),
    ({"depths": [2, 2, 2]}, "are of other lengths"),
    ({"num_heads": [3, 4]}, "3 heads do not divide 8 channels"),
    ({"window_size": 5}, r"stage 1 has \(4, 4\) tokens"),
    ({"depths": [2, 1]}, "unexpected tensors: swin.encoder.layers.1.blocks.1"),
    ({"architectures": ["SwinForMaskedImageModeling"]}, "'SwinForMaskedImageModeling' is not"),
    ({"embed_dim": ...}, "lacks the key 'embed_dim'"),
  ],
)
def test_a_config_that_does_not_fit_is_named(change, message, tmp_path):
  path = shutil.copytree(GOLDEN / "swin", tmp_path / "swin")
  config = json.loads((path / "config.json").read_text()) | change
  config = {key: value for key, value in config.items() if value is not ...}
  (path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=message) as error:
    Checkpoint(path)
  assert "\n" not in str(error.value)


def test_older_files_have_tables_of_positions(tmp_path):
  path = shutil.copytree(GOLDEN / "swin", tmp_path / "swin")
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  index = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
  tensors[index] = swin.relative_positions(4)
  safetensors.numpy.save_file(tensors, path / "model.safetensors")
  assert Checkpoint(path).config == Checkpoint(GOLDEN / "swin").config


def test_windows_and_back():
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  windows = swin.to_windows(x, 2)
  assert windows.shape == (2 * 2 * 3, 4, 3)
  np.testing.assert_array_equal(windows[1].reshape(2, 2, 3), x[0, :2, 2:4])
  np.testing.assert_array_equal(swin.from_windows(windows, (4, 6), 2), x)


@pytest.mark.parametrize("shifts", [False, True])
def test_shifted_windows_are_a_mask_over_all_tokens(shifts):
  """The grid is not rolled here: who sees whom follows from where the windows' edges lie."""
  config = dataclasses.replace(CONFIG, image_size=(24, 12), window_size=3)
  block = SwinBlock(config, 0, shifts, nnx.Rngs(0))
  table = jax.random.normal(jax.random.key(0), block.relative_position_bias.shape)
  block.relative_position_bias[...] = table
  x = jax.random.normal(jax.random.key(1), (2, 12 * 6, 4))
  found = nnx.jit(lambda block, x: block(x))(block, x)

  row, column = np.divmod(np.arange(12 * 6), 6)
  edge = 1 if shifts else 0  # The first window's end, or the grid's.
  window = (row + 3 - edge) // 3 * 100 + (column + 3 - edge) // 3
  sees = window[:, None] == window[None]
  offset = lambda a: np.clip(a[:, None] - a[None], -2, 2) + 2  # Further away nothing is seen.
  bias = table.reshape(5, 5, 2)[offset(row), offset(column)]  # [query, key, heads]
  y, attention = block.attention_norm(x), block.attention
  heads = lambda layer: layer(y).reshape(2, 72, 2, 2)
  scores = jnp.einsum("bqhd,bkhd->bqkh", heads(attention.q_proj), heads(attention.k_proj))
  scores = jnp.where(sees[..., None], scores / np.sqrt(2) + bias, -jnp.inf)
  mixed = jnp.einsum("bqkh,bkhd->bqhd", jax.nn.softmax(scores, axis=2), heads(attention.v_proj))
  expected = x + attention.o_proj(mixed.reshape(2, 72, 4))
  expected = expected + block.mlp(block.mlp_norm(expected))
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert block.shift == edge and (np.unique(window).size == 4 * 2) == (not shifts)


def test_four_neighbours_are_merged():
  merging = swin.PatchMerging((3, 4), 2, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 12, 2))
  found = merging(x)
  grid = jnp.pad(x.reshape(2, 3, 4, 2), ((0, 0), (0, 1), (0, 0), (0, 0)))
  four = [grid[:, i::2, j::2] for j in range(2) for i in range(2)]
  expected = merging.reduction(merging.norm(jnp.concatenate(four, axis=-1)))
  np.testing.assert_allclose(found, expected.reshape(2, 4, 4), atol=1e-6)


def test_images_do_not_see_each_other():
  model = Swin(CONFIG, rngs=nnx.Rngs(0))
  run = nnx.jit(lambda model, images: model(images))
  images = np.random.default_rng(0).normal(size=(2, 16, 12, 3)).astype(np.float32)
  before = run(model, images)
  assert before.hidden.shape == (2, 12, 8) and before.logits.shape == (2, 2)
  images[1] *= -2
  after = run(model, images).logits
  np.testing.assert_allclose(after[0], before.logits[0], atol=1e-6)
  assert np.abs(after[1] - before.logits[1]).max() > 1e-3


def test_a_grid_of_one_window_is_not_shifted():
  one = dataclasses.replace(CONFIG, image_size=(4, 16), depths=(2,), num_heads=(2,))
  blocks = nnx.eval_shape(lambda: Swin(one, rngs=nnx.Rngs(0))).stages[0].blocks
  assert [block.shift for block in blocks] == [0, 0]
  with pytest.raises(ValueError, match="images of shape"):
    Swin(one, rngs=nnx.Rngs(0))(jnp.zeros((1, 16, 4, 3)))
