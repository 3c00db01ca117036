import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.quantization.straight_through import (
  clip_ste,
  lsq,
  lsq_gradient_scale,
  lsq_initial_step,
  round_ste,
  scale_gradient,
  straight_through,
)

numbers = st.floats(-1e6, 1e6, width=32)


@given(st.lists(numbers, min_size=1, max_size=8))
def test_rounding_is_exact_and_its_gradient_is_that_of_its_argument(values):
  x = jnp.asarray(values, jnp.float32)
  value, gradient = jax.vmap(jax.value_and_grad(round_ste))(x)
  np.testing.assert_array_equal(value, np.round(np.asarray(values, np.float32)))
  np.testing.assert_array_equal(gradient, np.ones(len(values)))


def test_straight_through_takes_the_value_of_one_and_the_gradient_of_the_other():
  value, gradient = jax.value_and_grad(lambda x: straight_through(x**2, jnp.sin(x)))(0.5)
  assert value == pytest.approx(np.sin(0.5)) and gradient == pytest.approx(1.0)


def test_clipping_passes_the_gradient_on_the_closed_range():
  x = jnp.asarray([-3.0, -2.0, 0.0, 1.0, 1.5])
  value, gradient = jax.vmap(jax.value_and_grad(lambda x: clip_ste(x, -2.0, 1.0)))(x)
  np.testing.assert_array_equal(value, [-2, -2, 0, 1, 1])
  np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])


def test_scale_gradient_leaves_the_value_alone():
  x = jnp.float32(0.1)
  value, gradient = jax.value_and_grad(lambda x: scale_gradient(x, 0.3))(x)
  assert value == x and gradient == pytest.approx(0.3)


def test_lsq_has_the_closed_form_gradients():
  """By x: inside or not. By the step: round(v) - v inside, the range's end outside."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 5)).astype(np.float32) * 3
  step = rng.uniform(0.3, 0.8, size=(6, 1)).astype(np.float32)
  cotangent = rng.normal(size=x.shape).astype(np.float32)
  low, high, g = -2, 1, 0.25
  loss = lambda x, s: jnp.sum(cotangent * lsq(x, s, (low, high), gradient_scale=g))
  dx, ds = jax.grad(loss, argnums=(0, 1))(x, step)
  v = x / step
  codes, inside = np.round(v), (v >= low) & (v <= high)
  assert 0 < inside.sum() < inside.size
  np.testing.assert_allclose(dx, cotangent * inside, rtol=1e-6)
  by_step = np.where(inside, codes - v, np.clip(codes, low, high))
  # The step's gradient is a sum of products of order 1 in float32.
  np.testing.assert_allclose(ds, g * (cotangent * by_step).sum(1, keepdims=True), atol=1e-5)
  np.testing.assert_allclose(lsq(x, step, (low, high)), np.clip(codes, low, high) * step)


def test_the_initial_step_and_its_gradient_scale_are_the_papers():
  x = jnp.asarray([[1.0, -3.0], [2.0, 2.0]])
  np.testing.assert_allclose(lsq_initial_step(x, 4, axis=1), [[2.0], [2.0]])
  np.testing.assert_allclose(lsq_initial_step(x, 4), [[2.0]])
  assert lsq_gradient_scale(100, 4) == pytest.approx(1 / 20)
