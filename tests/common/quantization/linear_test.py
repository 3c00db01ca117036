import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.quantization import rtn
from common.quantization.linear import (
  QuantizedLinear,
  bits_per_weight,
  get_kernels,
  pack_linears,
  quantized_weights,
  set_kernels,
)
from common.quantization.quantized_array import IntegerFormat
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder

FORMAT = IntegerFormat(4, 16, scale_dtype=jnp.float16)
quantize = jax.jit(rtn.quantize, static_argnums=1)


@pytest.fixture
def block():
  return random_decoder(ARCHITECTURES["opt"]).blocks[0]


def test_equals_a_linear_with_the_dequantized_kernel(block):
  x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
  linear = block.mlp.up_proj
  weight = quantize(linear.kernel[...], FORMAT)
  expected = x @ np.asarray(weight.dequantize()) + np.asarray(linear.bias[...])
  packed = QuantizedLinear(weight, linear.bias[...])
  # Float32 sums of 32 products of order 1.
  np.testing.assert_allclose(packed(x), expected, rtol=1e-5, atol=1e-5)
  no_bias = QuantizedLinear(weight)
  np.testing.assert_allclose(no_bias(x), expected - linear.bias[...], rtol=1e-5, atol=1e-5)


def test_the_result_has_the_type_of_the_input(block):
  linear = block.mlp.up_proj
  packed = QuantizedLinear(quantize(linear.kernel[...], FORMAT), linear.bias[...])
  for dtype in (jnp.float32, jnp.bfloat16):
    assert packed(jnp.ones((2, 32), dtype)).dtype == dtype


def test_survives_split_merge_and_jit(block):
  weight = quantize(block.mlp.up_proj.kernel[...], FORMAT)
  packed = QuantizedLinear(weight, block.mlp.up_proj.bias[...])
  graphdef, state = nnx.split(packed)
  x = jnp.ones((1, 32))
  run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
  np.testing.assert_allclose(run(state, x), packed(x), rtol=1e-6)
  # Codes, scales, zero points and the bias; no dequantized copy.
  assert sorted(str(leaf.dtype) for leaf in jax.tree.leaves(state)) == [
    "float16",
    "float32",
    "uint4",
    "uint4",
  ]


def test_pack_linears_replaces_those_paths_only(block):
  kernels = get_kernels(block)
  bias = block.mlp.up_proj.bias[...]
  chosen = {path: quantize(kernels[path], FORMAT) for path in ("attention.q_proj", "mlp.up_proj")}
  pack_linears(block, chosen)
  assert isinstance(block.mlp.up_proj, QuantizedLinear)
  np.testing.assert_array_equal(block.mlp.up_proj.bias[...], bias)
  assert isinstance(block.mlp.down_proj, nnx.Linear)
  assert set(quantized_weights(block)) == set(chosen)
  for path, weight in quantized_weights(block).items():
    np.testing.assert_array_equal(weight.values, chosen[path].values)
  # What is left to quantize.
  assert set(get_kernels(block)) == set(kernels) - set(chosen)


def test_kernels_by_path(block):
  kernels = get_kernels(block)
  assert list(kernels) == [
    "attention.k_proj",
    "attention.o_proj",
    "attention.q_proj",
    "attention.v_proj",
    "mlp.down_proj",
    "mlp.up_proj",
  ]
  assert get_kernels(block, []) == {}
  set_kernels(block, {"mlp.up_proj": kernels["mlp.up_proj"] * 2})
  np.testing.assert_array_equal(block.mlp.up_proj.kernel[...], kernels["mlp.up_proj"] * 2)
  np.testing.assert_array_equal(block.mlp.down_proj.kernel[...], kernels["mlp.down_proj"])


def test_bits_per_weight_is_the_mean_over_weights(block):
  assert bits_per_weight(block) == 32
  # up_proj holds 32 * 64 of the block's 4 * 32 * 32 + 2 * 32 * 64 weights.
  up = quantize(block.mlp.up_proj.kernel[...], FORMAT)
  pack_linears(block, {"mlp.up_proj": up})
  share = 32 * 64 / (4 * 32 * 32 + 2 * 32 * 64)
  expected = share * (4 + (16 + 4) / 16) + (1 - share) * 32
  assert bits_per_weight(block) == pytest.approx(expected, rel=1e-12)
