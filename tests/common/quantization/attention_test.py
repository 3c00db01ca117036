import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models.decoder import KVCache
from common.models.surgery import replace_module
from common.quantization.activations import ActivationFormat, fake_quantize
from common.quantization.attention import QuantizedAttention, attention_operands
from kernels.attention.api import attention
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder, random_tokens

OPERANDS = ("query", "key", "value", "probabilities")


def operands(seed=0, heads=4, kv_heads=2):
  keys = jax.random.split(jax.random.key(seed), 3)
  shape = lambda n: (2, n, 6, 8)
  return [jax.random.normal(k, shape(n)) for k, n in zip(keys, (heads, kv_heads, kv_heads))]


def softmax_attention(query, key, value, rounded):
  """The formula, head by head, in NumPy."""
  key, value = (np.repeat(x, 2, axis=1) for x in (key, value))
  scores = np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(8)
  scores = np.where(np.tril(np.ones((6, 6), bool)), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("bhqk,bhkd->bhqd", rounded(weights), value)


@pytest.mark.parametrize("probabilities", (False, True))
def test_the_operands_are_rounded_where_the_formula_has_them(probabilities):
  four, eight = ActivationFormat(4, symmetric=True), ActivationFormat(8)
  formats = {"query": four, "key": four, "value": eight}
  formats |= {"probabilities": eight} if probabilities else {}
  query, key, value = operands()
  out = QuantizedAttention(formats)(query, key, value)
  rounded = [fake_quantize(x, f) for x, f in zip((query, key, value), (four, four, eight))]
  keep = lambda weights: weights
  quantize = lambda weights: np.asarray(fake_quantize(jnp.asarray(weights, jnp.float32), eight))
  expected = softmax_attention(*map(np.asarray, rounded), quantize if probabilities else keep)
  # A probability at a rounding threshold may fall to either side: one step of 1/255 of a value.
  np.testing.assert_allclose(out, expected, atol=2e-2 if probabilities else 1e-5)
  exact = softmax_attention(*map(np.asarray, (query, key, value)), keep)
  assert np.abs(np.asarray(out) - exact).max() > 0.05


def test_static_ranges_clip():
  query, key, value = operands()
  tensor = ActivationFormat(8, "per_tensor")
  ranges = {"value": (jnp.float32(-0.5), jnp.float32(0.25))}
  out = QuantizedAttention({"value": tensor}, ranges)(query, key, value)
  assert float(out.max()) <= 0.25 + 0.75 / 255 and float(out.min()) >= -0.5 - 0.75 / 255


def test_the_operands_for_calibration_are_those_that_are_rounded():
  query, key, value = operands()
  found = attention_operands(query, key, value)
  assert tuple(found) == OPERANDS
  np.testing.assert_allclose(found["probabilities"].sum(-1), 1, rtol=1e-5)
  grouped = found["probabilities"].reshape(2, 2, 12, 6)
  out = jnp.matmul(grouped, value).reshape(2, 4, 6, 8)
  np.testing.assert_allclose(out, attention(query, key, value), atol=1e-5)


@nnx.jit
def score(model, tokens):
  return model(tokens)[0]


@nnx.jit
def decode_last(model, tokens):
  """The last token's logits, its keys and values beside those of a cache."""
  cache = KVCache.empty(model.config, *tokens.shape)
  _, cache = model(tokens[:, :-1], cache=cache)
  return model(tokens[:, -1:], cache=cache)[0]


@pytest.mark.parametrize("name", ("llama", "bloom", "qwen2, grouped-query"))
def test_a_model_with_rounded_attention_decodes_as_it_scores(name):
  config = ARCHITECTURES[name]
  model, tokens = random_decoder(config), jnp.asarray(random_tokens(config))
  exact = score(model, tokens)
  format = ActivationFormat(4)
  for block in model.blocks:
    replace_module(block, "attention.attend", QuantizedAttention({"key": format, "value": format}))
  whole = score(model, tokens)
  assert np.abs(whole - exact).max() > 1e-2
  last = decode_last(model, tokens)
  # Sums in another order move a rounded value across its threshold at most rarely.
  np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-4, rtol=1e-3)


def test_an_operand_that_does_not_exist():
  with pytest.raises(ValueError, match="no operand \\['queries'\\]"):
    QuantizedAttention({"queries": ActivationFormat(4)})
