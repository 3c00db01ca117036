import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.quantization import rtn
from common.quantization.adaquant import AdaQuant
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import Learned
from common.quantization.straight_through import lsq


@pytest.mark.parametrize(
  "format", [IntegerFormat(3), IntegerFormat(4, axis=None), IntegerFormat(2, 4, symmetric=True)]
)
def test_it_starts_from_rounding_to_nearest(format):
  w = jax.random.normal(jax.random.key(0), (8, 6))
  scales, zeros = rtn.range_to_scales(*rtn.min_max_range(w, format), format)
  np.testing.assert_allclose(
    AdaQuant(w, scales, zeros, format)(), rtn.fake_quantize(w, format), rtol=1e-6, atol=1e-7
  )


def test_an_offset_moves_a_code_by_any_number_of_steps():
  w = jnp.array([[0.1], [0.9], [-1.0]])
  scales, zeros = jnp.full((1, 1), 0.5), jnp.full((1, 1), 4.0)
  weight = AdaQuant(w, scales, zeros, IntegerFormat(3))
  before = weight.codes()
  weight.offset[...] = jnp.array([[2.0], [0.0], [-9.0]])
  np.testing.assert_array_equal(weight.codes() - before, [[2.0], [0.0], [-2.0]])  # Clipped at 0.


def test_the_gradient_of_the_step_is_lsqs():
  w = jax.random.normal(jax.random.key(0), (8, 1))
  weight = AdaQuant(w, jnp.full((1, 1), 0.4), None, IntegerFormat(3, symmetric=True))

  graphdef, learned, rest = nnx.split(weight, Learned, ...)
  loss = lambda learned: jnp.sum(nnx.merge(graphdef, learned, rest)())
  found = jax.grad(loss)(learned).log_scale[...]
  by_step = jax.grad(lambda s: jnp.sum(lsq(w, s, (-4, 3))))(jnp.full((1, 1), 0.4))
  np.testing.assert_allclose(found, 0.4 * by_step, rtol=1e-5)
