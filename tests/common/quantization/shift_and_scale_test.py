"""Shift and scale: vectors of the reference code, and invariants."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.quantization.activations import ActivationFormat
from common.quantization.quantized_array import IntegerFormat
from common.quantization.shift_and_scale import (
  channel_range,
  channel_shift,
  fake_quantize_weights,
  linear_outputs,
  quantization_loss,
  quantize_weights,
  search_scale,
  threshold_scale,
)

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/outlier_suppression_plus/migration_search.npz"
FORMATS = {
  "int6_static": (IntegerFormat(6), ActivationFormat(6, "per_tensor")),
  "int8_sym": (
    IntegerFormat(8, axis=None, symmetric=True),
    ActivationFormat(8, "per_tensor", symmetric=True),
  ),
  "int4_token": (IntegerFormat(4), ActivationFormat(4)),
}


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def search_and_loss(outputs, x, kernels, mask, weights, activations):
  """The search, and the loss of threshold 3."""
  low, high = channel_range(x)
  found = search_scale(outputs, x, kernels, mask, low, high, weights, activations)
  scale, threshold = threshold_scale(low, high, jnp.float32(3)), jnp.float32(3)
  target = outputs(x, kernels)
  return found, quantization_loss(
    outputs, target, x, kernels, mask, scale, threshold, weights, activations
  )


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as file:
    return dict(file)


def golden_attention(num_heads, bias, x, kernels):
  """Joint q, k, v and causal attention before the output projection, from the formula."""
  heads = lambda y: y.reshape(*y.shape[:2], num_heads, -1).swapaxes(1, 2)
  query, key, value = map(heads, jnp.split(x @ kernels["qkv"] + bias, 3, axis=-1))
  scores = query @ key.swapaxes(2, 3) / query.shape[-1] ** 0.5
  scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
  return (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(x.shape)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("site", ("fc1", "qkv"))
def test_search_of_the_reference_code(golden, site, name):
  shift = channel_shift(jnp.asarray(golden["x"]))
  np.testing.assert_allclose(shift, golden["shift"], rtol=1e-6)
  x, mask = jnp.asarray(golden["x"]) - shift, jnp.asarray(golden["mask"], jnp.float32)[..., None]
  kernels = {site: jnp.asarray(golden[f"w_{site}"]).T}
  outputs = linear_outputs
  if site == "qkv":
    # The loss sees the bias that has made good the shift already.
    bias = jnp.asarray(golden["b_qkv"]) + shift @ kernels["qkv"]
    outputs = functools.partial(golden_attention, int(golden["num_heads"]), bias)
  found, loss = search_and_loss(outputs, x, kernels, mask, *FORMATS[name])
  # The grid's steps are summed in another order; the scales of one threshold differ by rounding.
  np.testing.assert_allclose(found.scale, golden[f"{site}_{name}_scale"], rtol=1e-5)
  if site == "fc1":
    np.testing.assert_allclose(found.loss_unscaled, golden[f"fc1_{name}_loss_noscale"], rtol=1e-4)
  np.testing.assert_allclose(loss, golden[f"{site}_{name}_loss_t3"], rtol=1e-4)
  assert float(found.loss) <= float(found.loss_unscaled)


def test_shift_and_scale():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 50, 8)) * np.exp(rng.normal(size=8)) + 40 * rng.normal(size=8)
  x = jnp.asarray(x, jnp.float32)
  shift = channel_shift(x)
  low, high = channel_range(x - shift)
  np.testing.assert_allclose(high, -low, atol=2e-5)  # Of values up to 100, in float32.
  # The tensor's range is now that of its widest channel.
  before_low, before_high = channel_range(x)
  widest = float((before_high - before_low).max())
  np.testing.assert_allclose(high.max() - low.min(), widest, rtol=1e-5)
  assert float(before_high.max() - before_low.min()) > 1.5 * widest
  threshold = jnp.float32(np.median(high))
  scale = threshold_scale(low, high, threshold)
  assert float(scale.min()) == 1
  inside = np.asarray((high <= threshold) & (low >= -threshold))
  np.testing.assert_array_equal(np.asarray(scale) == 1, inside)
  assert inside.any() and not inside.all()
  assert float(jnp.abs((x - shift) / scale).max()) <= float(threshold) * (1 + 1e-6)
  np.testing.assert_array_equal(threshold_scale(low, high, jnp.abs(x - shift).max()), 1)
  # A constant vector is taken off again: the same x~.
  moved = x + jnp.arange(8.0) * 3
  np.testing.assert_allclose(moved - channel_shift(moved), x - shift, atol=2e-5)
  for statistic, numpy in (("mean", np.mean), ("median", np.median)):
    flat = np.asarray(x).reshape(-1, 8)
    np.testing.assert_allclose(channel_shift(x, statistic), numpy(flat, axis=0), atol=1e-5)


@functools.partial(jax.jit, static_argnums=1)
def packed_and_rounded(w, format):
  return quantize_weights(w, format), fake_quantize_weights(w, format)


def test_weights_are_on_a_grid_that_has_zero():
  w = jax.random.normal(jax.random.key(0), (32, 8)) + jnp.linspace(-5, 5, 8)
  for format in (
    IntegerFormat(4),
    IntegerFormat(4, 16),
    IntegerFormat(8, axis=None, symmetric=True),
  ):
    packed, rounded = packed_and_rounded(w, format)
    np.testing.assert_array_equal(packed.dequantize(), rounded)
    groups = w.reshape(packed.scales.shape[0], -1, w.shape[1])
    scales = jnp.broadcast_to(packed.scales, (packed.scales.shape[0], w.shape[1]))[:, None]
    codes = np.asarray(rounded.reshape(groups.shape) / scales)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    # Columns of one sign are not saturated, because their range contains 0.
    step = float(jnp.max(scales))
    assert float(jnp.abs(rounded - w).max()) <= step * 1.01
