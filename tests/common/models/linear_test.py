"""The linear layer's product and its gradients against JAX's own rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.linear import linear_dot_general


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradients_are_those_of_jax(shape, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], shape, dtype)
  kernel = jax.random.normal(keys[1], (6, 4), dtype)
  weight = jax.random.normal(keys[2], (*shape[:-1], 4), dtype)
  numbers = (((x.ndim - 1,), (0,)), ((), ()))
  ours = lambda x, kernel: linear_dot_general(x, kernel, numbers)
  np.testing.assert_array_equal(ours(x, kernel), x @ kernel)
  _, pullback = jax.vjp(ours, x, kernel)
  _, expected = jax.vjp(jnp.matmul, x, kernel)
  # Sums of at most six products, perhaps in another order: some units in the last place.
  tolerance = 1e-6 if dtype == jnp.float32 else 0.02
  for mine, theirs in zip(pullback(weight), expected(weight)):
    assert mine.dtype == theirs.dtype == dtype
    np.testing.assert_allclose(
      mine.astype(jnp.float32), theirs.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )


def test_a_linear_layer_with_it_trains_alike_under_jit_scan_and_remat():
  make = lambda **options: nnx.Linear(4, 4, rngs=nnx.Rngs(0), **options)

  def gradient(layer):
    graphdef, params = nnx.split(layer)

    def loss(params, x):
      step = jax.checkpoint(lambda x, _: (jnp.tanh(nnx.merge(graphdef, params)(x)), None))
      return jax.lax.scan(step, x, None, length=3)[0].sum()

    return jax.jit(jax.grad(loss))(params, jnp.arange(8.0).reshape(2, 4))

  ours, theirs = gradient(make(dot_general=linear_dot_general)), gradient(make())
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
