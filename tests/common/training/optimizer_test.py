import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.training.optimizer import decay_mask, make_optimizer


def _params():
  rng = np.random.default_rng(0)
  shapes = {"embed": {"table": (5, 4)}, "layer": {"kernel": (4, 3), "bias": (3,), "scale": ()}}
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def test_decay_mask():
  layer = {"kernel": True, "bias": False, "scale": False}
  assert decay_mask(_params()) == {"embed": {"table": True}, "layer": layer}
  assert decay_mask(_params(), ["embed.t"]) == {"embed": {"table": False}, "layer": layer}


def test_equals_optax_adamw():
  params = _params()
  options = dict(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3)
  ours = make_optimizer(
    learning_rate=0.1, num_steps=8, warmup_steps=3, final_fraction=0.2, clip_norm=0.5, **options
  )
  schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 8, 0.02)
  theirs = optax.chain(
    optax.clip_by_global_norm(0.5), optax.adamw(schedule, mask=decay_mask(params), **options)
  )

  def run(optimizer):
    def step(i, carry):
      p, state = carry
      grads = jax.tree.map(lambda x: jnp.sin(x * (i + 1)), p)
      updates, state = optimizer.update(grads, state, p)
      return optax.apply_updates(p, updates), state

    return jax.lax.fori_loop(0, 8, step, (params, optimizer.init(params)))[0]

  for a, b in zip(*(jax.tree.leaves(jax.jit(run, static_argnums=0)(x)) for x in (ours, theirs))):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_only_what_the_mask_selects_decays():
  params = _params()
  optimizer = make_optimizer(
    learning_rate=0.1, num_steps=10, weight_decay=0.5, no_decay=["embed"], clip_norm=None
  )
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  np.testing.assert_allclose(
    updates["layer"]["kernel"], -0.05 * params["layer"]["kernel"], rtol=1e-6
  )
  del updates["layer"]["kernel"]
  assert all((u == 0).all() for u in jax.tree.leaves(updates))


def test_without_warmup_the_first_step_has_the_peak_rate():
  optimizer = make_optimizer(learning_rate=0.25, num_steps=4)
  params = {"w": jnp.ones(2)}
  updates, _ = optimizer.update({"w": jnp.full(2, 0.1)}, optimizer.init(params), params)
  np.testing.assert_allclose(updates["w"], -0.25, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [-1, 5, 6])
def test_warmup_must_fit_in_the_run(warmup_steps):
  with pytest.raises(UserError, match="warmup_steps must be in"):
    make_optimizer(learning_rate=1e-3, num_steps=5, warmup_steps=warmup_steps)
