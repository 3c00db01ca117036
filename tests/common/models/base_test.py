"""Pretrained base models: once, whole, the same every time."""

import dataclasses
import inspect
import pathlib
import shutil

import filelock
import numpy as np
import pytest
from flax import nnx

from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation.perplexity import WindowLosses
from common.models import base

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints"


def parameters(model):
  return {path: np.asarray(v.get_value()) for path, v in nnx.state(model).flat_state()}


def saved_models(pattern: str) -> list[pathlib.Path]:
  folder = base.cache_dir("base_models", base.fingerprint())
  return [p for p in folder.glob(pattern) if not p.name.endswith(".run")]


@pytest.fixture
def short(monkeypatch):
  """Makes a base model of a few steps, "test-short", and deletes what is saved of it."""
  recipe = dataclasses.replace(base.RECIPES["lm-tiny"], num_steps=3, batch_size=4, seq_len=16)
  monkeypatch.setitem(base.RECIPES, "test-short", recipe)
  losses = WindowLosses(np.ones(1), 1, np.ones(1))
  monkeypatch.setattr(base, "_validate", lambda *args: losses)
  folder = base.cache_dir("base_models", base.fingerprint())

  def clear():
    for path in folder.glob("*test-short-*"):
      shutil.rmtree(path) if path.is_dir() else path.unlink()

  clear()
  yield clear
  clear()


def test_pretrained_once_then_read_from_the_cache(monkeypatch):
  first = base.base_model("lm-tiny")
  monkeypatch.setattr(base, "_pretrain", None)  # A second training would fail.
  second = base.base_model("lm-tiny")
  a, b = parameters(first.model), parameters(second.model)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=str(path))
  assert 0 < second.metadata["validation_bits_per_byte"] < 8
  # A model that has learned only how often each of its 512 tokens comes is at 250.
  assert second.metadata["validation_perplexity"] < 200
  assert second.metadata["recipe"]["data"]["source"] == base.CORPUS


def test_the_seed_decides(short):
  first = parameters(base.base_model("test-short", seed=1).model)
  short()
  again = parameters(base.base_model("test-short", seed=1).model)
  other = parameters(base.base_model("test-short", seed=2).model)
  for path in first:
    np.testing.assert_array_equal(first[path], again[path], err_msg=str(path))
  kernel = next(path for path in first if path[-1] == "kernel")
  assert np.abs(first[kernel] - other[kernel]).max() > 0.1


@pytest.fixture
def untrained(short, monkeypatch):
  """ "test-short" as it is initialised: for tests of what happens around the training."""
  monkeypatch.setattr(base, "_pretrain", lambda graphdef, params, *args: params)


def with_recipe(**changes):
  def change(patch):
    recipe = dataclasses.replace(base.RECIPES["test-short"], **changes)
    patch.setitem(base.RECIPES, "test-short", recipe)

  return change


def with_entry(name, **changes):
  """Changes what the property `name` of every recipe gives."""

  def change(patch):
    original = getattr(base.Recipe, name).fget
    if name == "config":
      new = lambda recipe: dataclasses.replace(original(recipe), **changes)
    else:
      new = lambda recipe: original(recipe) | changes
    patch.setattr(base.Recipe, name, property(new))

  return change


def with_another_tokenizer(patch):
  def load(name):
    tokenizer = load_tokenizer(name)
    tokenizer.add_tokens(["another"])
    return tokenizer

  patch.setattr(base, "load_tokenizer", load)


@pytest.mark.parametrize(
  "change",
  [
    with_recipe(num_steps=4),
    with_recipe(seq_len=8),
    with_entry("config", max_position_embeddings=64),
    with_entry("config", norm_eps=1e-5),
    with_entry("optimizer", b2=0.99),
    with_entry("optimizer", eps=1e-6),
    with_entry("optimizer", clip_norm=None),
    with_entry("optimizer", final_fraction=0.1),
    with_entry("data", packing="concat"),
    with_entry("data", shard_count=2),
    with_another_tokenizer,
    lambda patch: patch.setattr(base, "CORPUS", "embedded:code"),
    lambda patch: patch.setattr(base, "RECIPE_VERSION", base.RECIPE_VERSION + 1),
  ],
)
def test_whatever_determines_the_model_is_in_the_key(change, untrained, monkeypatch):
  base.base_model("test-short")
  with monkeypatch.context() as patch:
    change(patch)
    base.base_model("test-short")
  assert len(saved_models("test-short-*")) == 2
  monkeypatch.setattr(base, "_pretrain", None)  # Both are found again.
  base.base_model("test-short")


def test_other_text_is_another_key(short, monkeypatch):
  tokenizer = load_tokenizer("embedded-512")
  before = base._settings(base.RECIPES["test-short"], tokenizer, 0)
  monkeypatch.setattr(base, "fingerprint", lambda: "other text")
  assert base._settings(base.RECIPES["test-short"], tokenizer, 0) != before


def test_the_recipe_spells_out_every_option():
  recipe = base.RECIPES["lm-tiny"]
  options = inspect.signature(base.make_optimizer).parameters
  assert recipe.optimizer.keys() == options.keys()
  options = inspect.signature(base.token_batches).parameters
  assert recipe.data.keys() == options.keys() - {"tokenizer", "seed", "shard_index"}


def test_a_killed_pretraining_leaves_no_model(untrained, monkeypatch):
  def killed(*args):
    raise KeyboardInterrupt

  for name in ("_pretrain", "_validate"):  # During training, and between training and saving.
    with monkeypatch.context() as patch:
      patch.setattr(base, name, killed)
      with pytest.raises(KeyboardInterrupt):
        base.base_model("test-short")
    assert saved_models("test-short-*") == []
  base.base_model("test-short")
  assert len(saved_models("test-short-*")) == 1


def test_only_one_process_trains(untrained, monkeypatch):
  pretrain, held = base._pretrain, []

  def pretrain_and_look(*args):
    (lock,) = base.cache_dir("base_models", base.fingerprint()).glob(".test-short-*.lock")
    with pytest.raises(filelock.Timeout):
      filelock.FileLock(lock).acquire(timeout=0)
    held.append(lock)
    return pretrain(*args)

  monkeypatch.setattr(base, "_pretrain", pretrain_and_look)
  base.base_model("test-short")
  assert len(held) == 1
  with filelock.FileLock(held[0], timeout=0):  # Free again, and not needed to read.
    base.base_model("test-short")


def test_a_model_that_appears_while_waiting_is_read(untrained, monkeypatch):
  trained = parameters(base.base_model("test-short").model)
  (path,) = saved_models("test-short-*")
  path.rename(path.with_name("away-" + path.name))

  class FinishedMeanwhile(filelock.FileLock):
    def __enter__(self):
      path.with_name("away-" + path.name).rename(path)
      return super().__enter__()

  monkeypatch.setattr(base.filelock, "FileLock", FinishedMeanwhile)
  monkeypatch.setattr(base, "_pretrain", None)
  for leaf, value in parameters(base.base_model("test-short").model).items():
    np.testing.assert_array_equal(value, trained[leaf])


def test_a_checkpoint_directory_is_a_base_model(tmp_path):
  path = shutil.copytree(GOLDEN / "llama_gqa_tied", tmp_path / "model")
  with pytest.raises(UserError, match="tokenizer"):
    base.base_model(str(path))
  load_tokenizer("embedded-512").save(str(path / "tokenizer.json"))
  model, tokenizer, metadata = base.base_model(str(path))
  assert model.config.num_kv_heads == 2 and metadata == {}
  assert tokenizer.decode(tokenizer.encode("def f(x):").ids) == "def f(x):"
  with pytest.raises(UserError, match="'lm-huge'.*lm-tiny, lm-small"):
    base.base_model("lm-huge")
