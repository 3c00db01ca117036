import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.training.losses import next_token_loss
from common.training.train_step import init_train_state, make_train_step

VOCAB, DIM, SEQ, ROWS = 17, 8, 12, 8


def _params():
  rng = np.random.default_rng(0)
  return {
    "embed": jnp.asarray(rng.normal(size=(VOCAB, DIM)), jnp.float32),
    "head": jnp.asarray(rng.normal(size=(DIM, VOCAB)) * 0.1, jnp.float32),
  }


def _batch(seed=0, lengths=(12, 2, 3, 7, 0, 12, 5, 9)):
  rng = np.random.default_rng(seed)
  return {
    "tokens": rng.integers(0, VOCAB, (ROWS, SEQ)).astype(np.int32),
    "segment_ids": (np.arange(SEQ) < np.array(lengths)[:, None]).astype(np.int32),
  }


def _loss(params, batch, key):
  logits = params["embed"][batch["tokens"]] @ params["head"]
  return next_token_loss(logits, batch["tokens"], batch["segment_ids"])


def _state(optimizer):
  return init_train_state(_params(), optimizer, jax.random.key(0))


def _assert_close(a, b, rtol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("accumulate_steps", [1, 4, 8])
def test_microbatches_of_unequal_weight_equal_the_full_batch(accumulate_steps):
  optimizer = optax.sgd(0.5)  # Not Adam: its first step is the gradient's sign, whatever its size.
  batch = _batch()
  mean_loss = jax.jit(lambda p: _loss(p, batch, None)[0] / _loss(p, batch, None)[1])
  expected_loss, expected_grads = jax.value_and_grad(mean_loss)(_params())
  step_fn = make_train_step(_loss, optimizer, accumulate_steps=accumulate_steps)
  state, metrics = step_fn(_state(optimizer), batch)

  expected = jax.tree.map(lambda p, g: p - 0.5 * g, _params(), expected_grads)
  _assert_close(state.params, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected_grads), rtol=1e-5)
  assert metrics["weight"] == sum(max(n - 1, 0) for n in (12, 2, 3, 7, 0, 12, 5, 9))
  assert state.step == 1


@pytest.mark.parametrize("accumulate_steps", [1, 4])
def test_compiles_once(accumulate_steps):
  traces = []

  def loss(params, batch, key):
    traces.append(0)
    return _loss(params, batch, key)

  optimizer = optax.adam(1e-3)
  step_fn = make_train_step(loss, optimizer, accumulate_steps=accumulate_steps)
  state, _ = step_fn(_state(optimizer), _batch(0))
  traced = len(traces)
  for seed in range(1, 4):
    state, _ = step_fn(state, _batch(seed))
  assert len(traces) == traced


def test_the_state_is_donated_and_the_callers_parameters_are_not():
  params, optimizer = _params(), optax.adam(1e-3)
  state = init_train_state(params, optimizer, jax.random.key(0))
  make_train_step(_loss, optimizer)(state, _batch())
  assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_bfloat16_computes_with_float32_masters():
  seen = set()

  def loss(params, batch, key):
    seen.add(params["head"].dtype)
    return _loss(params, batch, key)

  optimizer = optax.adam(0.02)

  def train(loss_fn, **options):
    step_fn = make_train_step(loss_fn, optimizer, **options)
    state, losses = _state(optimizer), []
    for _ in range(30):
      state, metrics = step_fn(state, _batch())
      losses.append(float(metrics["loss"]))
    return state, losses

  state, losses = train(loss, compute_dtype=jnp.bfloat16, accumulate_steps=2)
  assert seen == {jnp.dtype(jnp.bfloat16)}
  floats = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim]
  assert all(x.dtype == jnp.float32 for x in floats)
  _, float32_losses = train(_loss)
  assert losses[-1] < 0.8 * losses[0]
  np.testing.assert_allclose(losses, float32_losses, rtol=0.02)
  # Updates far below bfloat16's resolution (1 / 256) are not lost.
  head = state.params["head"]
  assert (head != head.astype(jnp.bfloat16)).any()


def test_float32_masters_of_bfloat16_parameters():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _params())
  state = init_train_state(params, optax.adam(1e-3), jax.random.key(0))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


def test_every_step_and_microbatch_has_its_own_key():
  def loss(params, batch, key):
    return jax.random.uniform(key) + 0.0 * params["head"].sum(), jnp.float32(1)

  optimizer = optax.sgd(0.0)
  one = make_train_step(loss, optimizer)
  state, first = one(_state(optimizer), _batch())
  _, second = one(state, _batch())
  assert first["loss"] != second["loss"]
  _, again = one(_state(optimizer), _batch())
  assert first["loss"] == again["loss"]

  def square(params, batch, key):  # Mean of u and u^2 tell whether the two keys were one.
    u = jax.random.uniform(key)
    return u + 0.0 * params["head"].sum(), jnp.float32(1), {"square": u * u}

  two = make_train_step(square, optimizer, accumulate_steps=2)
  _, metrics = two(_state(optimizer), _batch())
  assert metrics["square"] - metrics["loss"] ** 2 > 1e-4


def test_constants_are_neither_trained_nor_donated():
  def loss(params, batch, key, teacher):
    total, weight = _loss({**params, **teacher}, batch, key)
    return total, weight, {"twice": 2 * weight}

  frozen = {"embed": _params()["embed"]}
  optimizer = optax.sgd(0.1)
  state = init_train_state({"head": _params()["head"]}, optimizer, jax.random.key(0))
  state, metrics = make_train_step(loss, optimizer, accumulate_steps=2)(state, _batch(), frozen)
  assert metrics["twice"] == 2
  full, _ = make_train_step(_loss, optimizer)(_state(optimizer), _batch())
  _assert_close(state.params["head"], full.params["head"], rtol=1e-5)
  np.testing.assert_array_equal(frozen["embed"], _params()["embed"])


def test_a_batch_of_padding_changes_nothing():
  optimizer = optax.sgd(0.5)
  step_fn = make_train_step(_loss, optimizer)
  state, metrics = step_fn(_state(optimizer), _batch(lengths=[0] * ROWS))
  assert metrics["loss"] == metrics["weight"] == metrics["grad_norm"] == 0
  _assert_close(state.params, _params(), rtol=0)


def test_reports_the_learning_rate():
  schedule = optax.linear_schedule(0.0, 1.0, 4)
  optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
  step_fn, state = make_train_step(_loss, optimizer), _state(optimizer)
  rates = []
  for _ in range(3):
    state, metrics = step_fn(state, _batch())
    rates.append(float(metrics["learning_rate"]))
  assert rates == [0.0, 0.25, 0.5]
  _, metrics = make_train_step(_loss, optax.sgd(0.1))(_state(optax.sgd(0.1)), _batch())
  assert "learning_rate" not in metrics


def test_the_microbatches_must_divide_the_batch():
  step_fn = make_train_step(_loss, optax.sgd(0.1), accumulate_steps=3)
  with pytest.raises(UserError, match="accumulate_steps=3 does not divide the batch of 8 rows"):
    step_fn(_state(optax.sgd(0.1)), _batch())


def test_is_pure():
  optimizer = optax.adam(1e-2)
  step_fn = make_train_step(_loss, optimizer)
  first, _ = step_fn(_state(optimizer), _batch())
  second, _ = step_fn(_state(optimizer), _batch())
  for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params)):
    np.testing.assert_array_equal(a, b)
  assert [f.name for f in dataclasses.fields(first)] == ["step", "params", "opt_state", "key"]
