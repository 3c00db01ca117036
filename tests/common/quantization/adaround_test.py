import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.quantization import rtn
from common.quantization.adaround import (
  AdaRound,
  adaround_objective,
  harden,
  rectified_sigmoid,
)
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import QuantizedKernel
from common.quantization.reconstruction import ReconstructionSettings, reconstruct

FORMAT = IntegerFormat(3)


def problem(rows=12, columns=4):
  """(kernel, scales, zero points) with a min-max range that holds every weight."""
  w = jax.random.normal(jax.random.key(0), (rows, columns))
  low, high = rtn.min_max_range(w, FORMAT)
  return w, *rtn.range_to_scales(jnp.minimum(low, 0), jnp.maximum(high, 0), FORMAT)


class Unit(nnx.Module):
  def __init__(self, kernel, weight):
    layer = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
    self.layer = QuantizedKernel(layer, weight)


def run(unit, x, context):
  return unit.layer(x)


def test_it_starts_from_the_weights_themselves():
  w, scales, zeros = problem()
  weight = AdaRound(w, scales, zeros, FORMAT)
  inside = (
    np.abs(np.asarray(weight.codes() - 3.5)) < 3.5
  )  # Clipped where the zero point was rounded.
  # A logit and back in float32, for values of order 1.
  np.testing.assert_allclose(np.asarray(weight())[inside], np.asarray(w)[inside], atol=1e-5)
  assert inside.mean() > 0.6


def test_hard_codes_are_the_floor_or_one_more_and_nearest_at_the_start():
  w, scales, zeros = problem()
  unit = Unit(w, AdaRound(w, scales, zeros, FORMAT))
  harden(unit)
  weight = unit.layer.weight
  np.testing.assert_allclose(
    weight(), rtn.decode(rtn.encode(w, scales, zeros, FORMAT), scales, zeros, FORMAT), atol=1e-6
  )
  weight.v[...] = jax.random.normal(jax.random.key(1), w.shape)
  step = weight.codes() - jnp.clip(jnp.floor(w / scales) + zeros, 0, 7)
  assert set(np.unique(step)) <= {0.0, 1.0}


def test_the_regularizer_waits_and_then_anneals():
  """Against the formula, at a known h."""
  w, scales, zeros = problem()
  weight = AdaRound(w, scales, zeros, FORMAT)
  weight.v[...] = jnp.full(w.shape, 0.5)
  h = float(rectified_sigmoid(jnp.float32(0.5)))
  unit, y = Unit(w, weight), jnp.zeros((2, 3))
  loss = lambda progress: float(adaround_objective(unit, y + 1, y, progress))
  assert loss(0.1) == pytest.approx(3.0)  # Three features with an error of 1.
  for progress, beta in ((0.2, 20.0), (0.6, 11.0)):
    expected = 3.0 + 0.01 * w.size * (1 - abs(2 * h - 1) ** beta)
    assert loss(progress) == pytest.approx(expected, rel=1e-5)


def test_learning_decides_every_weight_and_beats_nearest():
  w, scales, zeros = problem(16, 32)
  # Correlated inputs, where rounding to nearest is far from the best.
  base = jax.random.normal(jax.random.key(2), (64, 1))
  x = base + 0.3 * jax.random.normal(jax.random.key(3), (64, 16))
  unit = Unit(w, AdaRound(w, scales, zeros, FORMAT))
  settings = ReconstructionSettings(600, 32, keep_best=False)
  learned, log = reconstruct(
    unit,
    x,
    x @ w,
    None,
    jax.random.key(0),
    settings,
    optax.adam(0.03),
    objective=functools.partial(adaround_objective, regularization=0.03),
    run=run,
  )
  h = learned.layer.weight.rounding()
  assert float(jnp.mean((h < 0.01) | (h > 0.99))) > 0.6
  error = lambda u: float(jnp.mean((run(u, x, None) - x @ w) ** 2))
  harden(learned)
  harden(unit)
  assert error(learned) < 0.5 * error(unit)
