import numpy as np
import pytest
from flax import nnx

from common.checkpoints.orbax import load_metadata
from common.models import base


def test_pretrained_once_then_read_from_the_cache(monkeypatch):
  first = base.base_model("lm-tiny")
  monkeypatch.setattr(base, "_pretrain", None)  # A second training would fail.
  second = base.base_model("lm-tiny")
  for a, b in zip(nnx.state(first.model).flat_state(), nnx.state(second.model).flat_state()):
    np.testing.assert_array_equal(a[1].get_value(), b[1].get_value())
  assert 0 < second.metadata["validation_bits_per_byte"] < 8
  # Better than guessing one of 512 tokens uniformly.
  assert second.metadata["validation_perplexity"] < 512


def test_a_killed_pretraining_leaves_no_model(monkeypatch):
  tiny = base.RECIPES["lm-tiny"]
  monkeypatch.setitem(base.RECIPES, "lm-tiny", base.dataclasses.replace(tiny, num_steps=7))

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(base, "_pretrain", killed)
  before = set(base.cache_dir("base_models", base.fingerprint()).glob("lm-tiny-*"))
  with pytest.raises(KeyboardInterrupt):
    base.base_model("lm-tiny", seed=3)
  assert set(base.cache_dir("base_models", base.fingerprint()).glob("lm-tiny-*")) == before


def test_metadata_is_on_disk_beside_the_parameters():
  base.base_model("lm-tiny")
  folder = base.cache_dir("base_models", base.fingerprint())
  (path,) = [p for p in folder.glob("lm-tiny-0-*") if not p.name.endswith(".run")]
  assert load_metadata(path)["recipe"]["corpus"] == base.CORPUS
