import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from common.checkpoints import orbax
from common.checkpoints.orbax import TrainingCheckpoints, load_metadata, load_params, save_params
from common.errors import UserError


def _state(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "step": jnp.int32(seed),
    "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    "codes": jnp.asarray(rng.integers(-8, 8, 6), jnp.int8),
    "key": jax.random.key(seed),
    "nested": ({"b": jnp.zeros(())}, ()),
  }


def _assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _damage(folder: pathlib.Path):
  for file in folder.rglob("d/*"):
    os.truncate(file, file.stat().st_size // 2)


def test_restores_what_was_saved(tmp_path):
  with TrainingCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(_state()) is None
    for step in (1, 2, 5):
      checkpoints.save(step, _state(step), {"position": step, "nested": [step, None]})
  assert sorted(os.listdir(tmp_path)) == ["2", "5"]
  with TrainingCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 5
    state, iterator_state = checkpoints.restore_latest(_state())
  _assert_equal(state, _state(5))
  assert iterator_state == {"position": 5, "nested": [5, None]}
  # The key works, and equals the one that was saved.
  assert jax.random.bits(state["key"]) == jax.random.bits(jax.random.key(5))


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
  add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {"w": jnp.zeros((1000, 1000)), "b": jnp.zeros(7)}
  with TrainingCheckpoints(tmp_path) as checkpoints:
    for step in range(1, 5):
      state = add_one(state)
      checkpoints.save(step, state)
      for _ in range(5):
        state = add_one(state)
      checkpoints.wait()
      saved, _ = checkpoints.restore_latest(state)
      for x in jax.tree.leaves(saved):
        assert (x == 6 * step - 5).all()


def test_what_a_killed_process_leaves_is_no_checkpoint(tmp_path):
  with TrainingCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _state(1))
  (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
  with TrainingCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(_state()) is None
    checkpoints.save(2, _state(2))
  with TrainingCheckpoints(tmp_path) as checkpoints:
    _assert_equal(checkpoints.restore_latest(_state())[0], _state(2))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"w": jnp.zeros((8, 3))}, r"w is \[4, 3\] in the checkpoint and \[8, 3\] here"),
    ({"w": jnp.zeros((2, 3))}, r"w is \[4, 3\] in the checkpoint and \[2, 3\] here"),
    ({"new": jnp.zeros(2)}, r"new is missing in the checkpoint and \[2\] here"),
    ({"key": jax.random.key(0, impl="rbg")}, r"key is \[2\] in the checkpoint and \[4\] here"),
    ({"nested": ()}, r"nested.0.b is \[\] in the checkpoint and missing here"),
  ],
)
def test_a_checkpoint_of_another_model(tmp_path, capfd, change, message):
  with TrainingCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(3, _state())
    with pytest.raises(UserError, match=f"{tmp_path}/3 is of another model .*: {message}"):
      checkpoints.restore_latest(_state() | change)
  assert capfd.readouterr() == ("", "")


def test_a_damaged_checkpoint(tmp_path):
  with TrainingCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(3, _state())
    checkpoints.wait()
    _damage(tmp_path / "3")
    with pytest.raises(UserError, match=f"the checkpoint {tmp_path}/3 is damaged .* delete") as e:
      checkpoints.restore_latest(_state())
  assert "\n" not in str(e.value)


def test_params_round_trip(tmp_path):
  params, metadata = _state(3), {"config": {"dim": 8}, "tokens": 10}
  assert save_params(tmp_path / "new" / "model", params, metadata)
  assert os.listdir(tmp_path / "new") == ["model"]
  loaded, loaded_metadata = load_params(
    tmp_path / "new" / "model", jax.eval_shape(lambda: _state())
  )
  _assert_equal(loaded, params)
  assert loaded_metadata == load_metadata(tmp_path / "new" / "model") == metadata


def test_params_are_cast_to_the_dtype_asked_for(tmp_path):
  w = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)
  save_params(tmp_path / "m", {"w": w}, {})
  loaded, _ = load_params(tmp_path / "m", {"w": jax.ShapeDtypeStruct((9,), jnp.bfloat16)})
  np.testing.assert_array_equal(np.asarray(loaded["w"]), np.asarray(w).astype(ml_dtypes.bfloat16))


def test_a_finished_model_is_not_overwritten(tmp_path):
  assert save_params(tmp_path / "m", {"w": jnp.zeros(2)}, {"n": 1})
  assert not save_params(tmp_path / "m", {"w": jnp.ones(2)}, {"n": 2})
  loaded, metadata = load_params(tmp_path / "m", {"w": jnp.zeros(2)})
  assert metadata == {"n": 1} and (loaded["w"] == 0).all()


def test_of_two_writers_the_first_to_finish_wins(tmp_path, monkeypatch):
  rename = orbax._rename_unless_there

  def other_writer_finishes_first(*paths):
    monkeypatch.setattr(orbax, "_rename_unless_there", rename)
    assert save_params(tmp_path / "m", {"w": jnp.full(2000, 1)}, {"n": 1})
    return rename(*paths)

  monkeypatch.setattr(orbax, "_rename_unless_there", other_writer_finishes_first)
  assert not save_params(tmp_path / "m", {"w": jnp.full(2000, 2)}, {"n": 2})
  loaded, metadata = load_params(tmp_path / "m", {"w": jnp.zeros(2000, jnp.int32)})
  assert metadata == {"n": 1} and (loaded["w"] == 1).all()
  assert os.listdir(tmp_path) == ["m"]


def test_half_a_model_is_never_seen(tmp_path):
  with pytest.raises(TypeError):
    save_params(tmp_path / "m", {"w": jnp.zeros(2)}, {"not JSON": object()})
  assert os.listdir(tmp_path) == []
  with pytest.raises(UserError, match="no saved model at"):
    load_params(tmp_path / "m", {"w": jnp.zeros(2)})
  assert save_params(tmp_path / "m", {"w": jnp.zeros(2)}, {})


def test_says_what_is_wrong_with_a_saved_model(tmp_path):
  with pytest.raises(UserError, match="no saved model at .*nothing"):
    load_metadata(tmp_path / "nothing")
  save_params(tmp_path / "m", {"w": jnp.zeros(2)}, {})
  with pytest.raises(UserError, match=r"w is \[2\] in the checkpoint and \[3\] here"):
    load_params(tmp_path / "m", {"w": jnp.zeros(3)})
  _damage(tmp_path / "m")
  with pytest.raises(UserError, match="is damaged .* delete it to make it again"):
    load_params(tmp_path / "m", {"w": jnp.zeros(2)})
