import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.quantization import gptq as module
from common.quantization import rtn
from common.quantization.gptq import gptq, hessian, inverse_cholesky, stable_damping
from common.quantization.quantized_array import IntegerFormat

ROWS, COLUMNS = 48, 16


def correlated_inputs(rows=ROWS, tokens=256, seed=0, dead=()):
  """Inputs whose channels are correlated and of different sizes, [tokens, rows]."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(rows, rows)) / np.sqrt(rows) + np.eye(rows)
  x = rng.normal(size=(tokens, rows)) @ mixing * rng.uniform(0.3, 3.0, rows)
  x[:, list(dead)] = 0
  return x.astype(np.float32)


def weights(seed=1):
  """Of both signs, except for the first two output channels."""
  w = np.random.default_rng(seed).normal(size=(ROWS, COLUMNS)).astype(np.float32)
  w[:, 0], w[:, 1] = 1 + np.abs(w[:, 0]), -1 - np.abs(w[:, 1])
  return w


def oracle(w, h, format, damping=0.01, act_order=False):
  """Optimal brain quantization in the order of the rows, in float64; returns (codes, dequantized).

  No Cholesky factor and no blocks: after each row its error is spread by the inverse Hessian of
  the rows that are left, and the row is eliminated from that inverse.
  """
  w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
  rows, columns = w.shape
  group = rows if format.group_size == -1 else format.group_size
  dead = np.diag(h) == 0
  h[dead, dead] = 1
  w[dead] = 0
  order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(rows)
  low, high = format.code_range

  def parameters(part):
    smallest, largest = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
    if format.symmetric:
      return np.maximum(np.maximum(-smallest, largest), 1e-5) / high, np.zeros(columns)
    scale = np.maximum(largest - smallest, 1e-5) / high
    return scale, np.clip(-np.round(smallest / scale), low, high)

  static = [parameters(w[g : g + group]) for g in range(0, rows, group)]
  inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(rows))
  codes, result = np.zeros_like(w), np.zeros_like(w)
  for row in order:
    if act_order:
      scale, zero = static[row // group]
    elif row % group == 0:
      scale, zero = parameters(w[row : row + group])
    codes[row] = np.clip(np.round(w[row] / scale) + zero, low, high)
    result[row] = (codes[row] - zero) * scale
    w -= np.outer(inverse[:, row] / inverse[row, row], w[row] - result[row])
    inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
  return codes, result


def assert_equals_oracle(quantized, w, h, format, **options):
  """Float32 may round a weight near a tie the other way, which then changes the rest of its output
  channel, and of no other: all but one of the channels must agree to float32 rounding.
  """
  _, expected = oracle(w, h, format, **options)
  difference = np.abs(np.asarray(quantized.dequantize()) - expected).max(axis=0)
  # Scales are of order 1: a different code would be 1e3 times this.
  assert (difference < 1e-4).sum() >= COLUMNS - 1, difference


CASES = {
  "groups of 16": (IntegerFormat(4, 16), {}),
  "strong damping": (IntegerFormat(4, 16), {"damping": 0.5}),
  "3 bits, one group per channel": (IntegerFormat(3, -1), {}),
  "2 bits, symmetric": (IntegerFormat(2, 8, symmetric=True), {}),
  "act-order": (IntegerFormat(4, 16), {"act_order": True}),
  "act-order, one group per channel": (IntegerFormat(3, -1), {"act_order": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_algorithm(case):
  format, options = CASES[case]
  w, h = weights(), np.asarray(hessian(correlated_inputs()))
  # Two blocks of 32, the second half padding.
  quantized = gptq(w, h, format, block_size=32, **options)
  assert quantized.format == format and quantized.shape == w.shape
  assert_equals_oracle(quantized, w, h, format, **options)


@pytest.mark.parametrize("block_size", (8, 40, 128))
def test_block_size_does_not_matter(block_size):
  """Blocks smaller than a group, not a multiple of it, and larger than the layer."""
  w, h, format = weights(), np.asarray(hessian(correlated_inputs())), IntegerFormat(4, 16)
  assert_equals_oracle(gptq(w, h, format, block_size=block_size), w, h, format)


@pytest.mark.parametrize("act_order", (False, True))
def test_dead_inputs(act_order):
  """A channel that is always 0 gets weight 0 and stays out of the group's range."""
  dead = (0, 3, 20, 47)
  w, h = weights(), np.asarray(hessian(correlated_inputs(dead=dead)))
  w[3] = 100.0
  format = IntegerFormat(4, 16)
  quantized = gptq(w, h, format, act_order=act_order, block_size=32)
  result = np.asarray(quantized.dequantize())
  assert np.isfinite(result).all() and (result[list(dead)] == 0).all()
  assert np.asarray(quantized.scales).max() < 1
  assert_equals_oracle(quantized, w, h, format, act_order=act_order)


@pytest.mark.parametrize("act_order", (False, True))
def test_output_error_is_below_rounding_to_nearest(act_order):
  format, x = IntegerFormat(4, 16), correlated_inputs()
  error = lambda w, new: np.mean((x @ (w - np.asarray(new.dequantize()))) ** 2)
  ratios = []
  for seed in range(4):
    w = weights(seed)
    quantized = gptq(w, hessian(x), format, act_order=act_order, block_size=32)
    ratios.append(error(w, quantized) / error(w, rtn.quantize(jnp.asarray(w), format)))
  # The inputs are correlated enough for a third less error; without compensation the ratio is 1.
  assert max(ratios) < 0.67, ratios


def test_identity_hessian_is_rounding_to_nearest():
  """Uncorrelated inputs leave nothing to compensate."""
  w, format = weights(), IntegerFormat(4, 16)
  quantized = gptq(w, jnp.eye(ROWS), format, block_size=32).dequantize()
  expected = rtn.quantize(jnp.asarray(w), format).dequantize()
  np.testing.assert_array_equal(quantized[:, 2:], expected[:, 2:])
  # Where a group has one sign, GPTQ's range reaches to 0 and RTN's saturates.
  error = lambda new: np.abs(new - w)[:, :2].max()
  assert error(quantized) < 0.2 < error(expected)


def test_half_precision_scales_are_the_ones_compensated_for():
  format = IntegerFormat(4, 16, scale_dtype=jnp.float16)
  w, h = weights(), np.asarray(hessian(correlated_inputs()))
  quantized = gptq(w, h, format, act_order=True, block_size=32)
  assert quantized.scales.dtype == jnp.float16
  # With static groups the stored scales are known beforehand: half-precision min-max scales.
  grouped = w.reshape(3, 16, COLUMNS)
  span = np.maximum(grouped.max(1), 0) - np.minimum(grouped.min(1), 0)
  expected = (span / np.float32(15)).astype(np.float16)
  # One unit in the last place, where the float32 quotient is at a tie.
  np.testing.assert_allclose(np.asarray(quantized.scales, np.float32), expected, rtol=2.0**-10)


def test_hessian_is_the_mean_of_twice_the_outer_products():
  x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
  flat = x.reshape(15, 7).astype(np.float64)
  # Float32 sums of 15 products.
  np.testing.assert_allclose(hessian(x), 2 * flat.T @ flat / 15, rtol=1e-5, atol=1e-6)
  assert hessian(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("damping", (0.01, 0.3))
def test_inverse_cholesky(damping):
  h = np.asarray(hessian(correlated_inputs()))
  u = np.asarray(inverse_cholesky(jnp.asarray(h), damping))
  assert (u == np.triu(u)).all() and (np.diag(u) > 0).all()
  damped = h.astype(np.float64) + damping * np.diag(h).mean() * np.eye(ROWS)
  # The condition number is below 1e3, so float32 leaves about four digits.
  np.testing.assert_allclose(u.T.astype(np.float64) @ u @ damped, np.eye(ROWS), atol=1e-3)


@pytest.mark.parametrize("solve_size", (5, 12, 24, 47, 48))
def test_inverse_cholesky_by_blocks(solve_size, monkeypatch):
  """Sizes that divide the matrix, that need padding, and one block."""
  h = np.asarray(hessian(correlated_inputs()))
  monkeypatch.setattr(module, "SOLVE_SIZE", solve_size)
  u = np.asarray(inverse_cholesky(jnp.asarray(h), 0.01))
  assert u.shape == h.shape and (u == np.triu(u)).all()
  damped = h.astype(np.float64) + 0.01 * np.diag(h).mean() * np.eye(ROWS)
  expected = np.linalg.cholesky(np.linalg.inv(damped)).T
  np.testing.assert_allclose(u, expected, atol=1e-5 * np.abs(expected).max())


def test_unsuitable_formats_are_refused():
  w, h = jnp.zeros((ROWS, COLUMNS)), jnp.eye(ROWS)
  with pytest.raises(UserError, match="group_size=32 does not divide the input dimension 48"):
    gptq(w, h, IntegerFormat(4, 32))
  for axis in (1, None):
    with pytest.raises(ValueError, match="grouped along the input"):
      gptq(w, h, IntegerFormat(4, 16, axis))


def test_damping_is_raised_until_the_factor_is_finite():
  h = hessian(jax.random.normal(jax.random.key(0), (200, 32)))
  assert float(stable_damping(h, 0.01, True)) == pytest.approx(0.01)
  # One sample: rank 1, which float32 cannot factor without damping.
  one = hessian(jax.random.normal(jax.random.key(0), (1, 32)) * 1e3)
  raised = float(stable_damping(one, 1e-9, True))
  assert 1e-9 < raised < 1e-2
  w = jax.random.normal(jax.random.key(1), (32, 8))
  assert np.isfinite(gptq(w, one, IntegerFormat(3, 16), damping=raised).dequantize()).all()
  assert float(stable_damping(jnp.full((32, 32), jnp.nan), 0.01, True)) > 1
