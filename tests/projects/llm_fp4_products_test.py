"""LLM-FP4 for classifiers: the products inside attention, and errors weighted by the loss's gradients."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from common.errors import UserError
from common.models.encoder import Encoder, EncoderConfig
from common.models.surgery import get_module
from common.quantization.attention import OPERANDS, QuantizedAttention
from kernels.attention.api import attention
from projects.llm_fp4 import gradients, llm_fp4, methods, models, products, search_result
from projects.llm_fp4.layers import FPQAttention
from projects.llm_fp4.llm_fp4 import FPQSettings
from tests.common.models.small_decoders import ARCHITECTURES, random_decoder, random_tokens

# As many classes as channels, as many samples as tokens that are looked at: one program searches all
# linears.
CONFIG = EncoderConfig(
  vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2,
  max_position_embeddings=8, pooler=True, head="sequence", labels=tuple("abcdefghijklmnop"),
)  # fmt: skip
SETTINGS = FPQSettings(grid_size=3, rounds=1, metric="hessian", attention_products=True, tokens=12)
PATH = "blocks.0.attention.attend"


def normal(*shape, seed=0):
  return np.float32(np.random.default_rng(seed).normal(size=shape))


@pytest.fixture(scope="module")
def encoder():
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Encoder(CONFIG, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(0)
  fill = lambda leaf: np.float32(rng.normal(size=leaf.shape) / 2)
  return nnx.merge(graphdef, jax.device_put(jax.tree.map(fill, state), jax.devices()[0]))


@pytest.fixture(scope="module")
def samples():
  """Texts, the second and the fourth with padding; their classes."""
  tokens = np.random.default_rng(1).integers(1, 32, (SETTINGS.tokens, 8), np.int32)
  segment_ids = np.ones_like(tokens)
  segment_ids[1, 3:] = segment_ids[3, :2] = 0
  return jnp.asarray(tokens), jnp.asarray(segment_ids), np.arange(SETTINGS.tokens) * 5 % 16


@pytest.fixture(scope="module")
def found(encoder, samples):
  tokens, segment_ids, labels = samples
  ids = {"segment_ids": segment_ids, "labels": labels}
  return models.search_model(encoder, tokens, SETTINGS, embedding_bits=None, **ids)


search_product = jax.jit(products.search_product, static_argnums=4)


def test_search_of_a_product_against_trying_everything():
  """The choice is the best of all formats and biases of either operand beside the other's."""
  left, right = normal(2, 6, 5) * 3, normal(2, 5, 4, seed=1)
  settings = FPQSettings(grid_size=7, rounds=9)
  largest = lambda x: np.float32(np.abs(x).max())
  found = search_product(left, right, largest(left), largest(right), settings)
  formats = settings.activation_formats
  quantize = jax.jit(lambda x, i, b: llm_fp4.quantize(x, formats, i, b))
  rounded = lambda x, i, b: np.asarray(quantize(x, i, np.float32(b)), np.float64)
  product = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
  error = lambda a, b: ((product - a @ b) ** 2).sum() / (product**2).sum()
  a = rounded(left, found.left_format, found.left_bias)
  b = rounded(right, found.right_format, found.right_bias)
  assert float(found.output_error) == pytest.approx(error(a, b), rel=1e-4)
  gammas = 0.01 + np.arange(7) * 1.19 / 7
  start = lambda x: np.asarray(llm_fp4.start_bias(formats, largest(x)))
  for i, gamma in itertools.product(range(len(formats)), gammas):
    least = float(found.output_error) * (1 - 1e-4)
    assert least <= error(rounded(left, i, gamma * start(left)[i]), b)
    assert least <= error(a, rounded(right, i, gamma * start(right)[i]))


def test_metrics():
  y = np.float32(np.random.default_rng(0).normal(size=(50, 3)))
  other = np.float32(y + 0.1 * np.random.default_rng(1).normal(size=(50, 3)))
  a, b = np.asarray(y, np.float64), np.asarray(other, np.float64)
  expected = {
    "l2": ((a - b) ** 2).mean(axis=0),
    "l1": abs(a - b).mean(axis=0),
    "cosine": [1 - p @ q / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(a.T, b.T)],
    "pearson": [1 - np.corrcoef(p, q)[0, 1] for p, q in zip(a.T, b.T)],
  }
  found = jax.jit(lambda *pair: {name: metric(*pair) for name, metric in llm_fp4.METRICS.items()})(
    y, other
  )
  for name, values in expected.items():
    np.testing.assert_allclose(found[name], values, rtol=1e-2, atol=1e-6)


def test_attention_of_many_mantissa_bits_is_attention():
  query, key, value = (normal(2, 2, 5, 4, seed=i) for i in range(3))
  options = {"segment_ids": jnp.array([[1, 1, 1, 0, 0], [1, 1, 2, 2, 2]]), "causal": False}
  search = products.AttentionSearch(jnp.zeros(4, jnp.int32), jnp.zeros(4), jnp.zeros(2))
  attend = FPQAttention(search, FPQSettings())
  # E5M16 up to 2^3: less than 2^-17 of a value is lost.
  attend.formats[...] = jnp.full((4, 2), jnp.array([5, 16]))
  attend.biases[...] = jnp.full(4, 29.0)
  run = jax.jit(lambda *operands: (attend(*operands, **options), attention(*operands, **options)))
  np.testing.assert_allclose(*run(query, key, value), atol=1e-4)


def test_gradients_of_scores_are_those_of_autodiff():
  scores, value, of_output = normal(2, 3, 5), normal(2, 5, 4, seed=1), normal(2, 3, 4, seed=2)
  output = lambda scores: jax.nn.softmax(scores) @ value
  expected = jax.vjp(output, scores)[1](of_output)[0]
  got = products.score_gradient(jax.nn.softmax(scores), value, of_output)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_gradients_choose_the_tokens_that_count():
  """Without a gradient by the second half of the tokens, only the first half is looked at."""
  w, x = normal(6, 4), normal(24, 6, seed=1) * 3
  x_max = np.abs(x).max(axis=0)
  settings = FPQSettings(grid_size=5, rounds=1)
  search = jax.jit(llm_fp4.search_linear, static_argnums=3)
  hessian = dataclasses.replace(settings, metric="hessian")
  weights = np.where(np.arange(24)[:, None] < 12, np.float32(1e-25), 0) * np.ones((24, 4))
  weighted = search(w, x, x_max, hessian, np.float32(weights))._replace(output_error=0)
  # The other half may hold anything.
  other = np.concatenate([x[:12], 9 * x[12:]])
  same = search(w, other, x_max, hessian, np.float32(weights))._replace(output_error=0)
  jax.tree.map(np.testing.assert_array_equal, weighted, same)
  plain = search(w, np.tile(x[:12], (2, 1)), x_max, settings)._replace(output_error=0)
  jax.tree.map(np.testing.assert_array_equal, weighted, plain)
  # A layer without any influence is searched by its plain error.
  none = search(w, x, x_max, hessian, np.zeros((24, 4), np.float32))
  jax.tree.map(np.testing.assert_array_equal, none, search(w, x, x_max, settings))


def test_gradients_of_a_classifier(encoder, samples):
  """By the logits they are softmax - label; a padding token has none."""
  tokens, segment_ids, labels = samples
  got = gradients.loss_gradients(encoder, tokens, labels, segment_ids=segment_ids)
  outputs = nnx.jit(lambda model: model(tokens, segment_ids=segment_ids))(encoder)
  pooled = np.asarray(outputs.pooled)
  expected = scipy.special.softmax(outputs.logits, axis=-1) - np.eye(16, dtype=np.float32)[labels]
  np.testing.assert_allclose(got["sequence_classifier"], expected, atol=1e-5)
  kernel = np.asarray(encoder.sequence_classifier.kernel[...])
  of_pooler = (1 - pooled**2) * (expected @ kernel.T)
  np.testing.assert_allclose(got["pooler"], of_pooler, atol=1e-5)
  # The pooler reads the first token of the last block.
  of_block = np.asarray(got["blocks.0"])
  assert not np.any(of_block[:, 1:])
  of_first = of_pooler @ np.asarray(encoder.pooler.kernel[...]).T
  np.testing.assert_allclose(of_block[:, 0], of_first, atol=1e-5)


def test_queries_that_count_come_first():
  real = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
  every = np.ones_like(real)
  np.testing.assert_array_equal(products.chosen_queries(real, every, 4), [[1, 4], [2, 3]])
  np.testing.assert_array_equal(products.chosen_queries(real, every, None)[0], np.arange(6))
  first = np.eye(1, 6, dtype=int).repeat(2, axis=0)
  np.testing.assert_array_equal(products.chosen_queries(real, first, 4), [[0, 3], [2, 3]])
  np.testing.assert_array_equal(products.chosen_queries(real, every, 6)[1, :2], [2, 3])


def test_products_of_an_encoder(encoder, samples, found):
  """Searched with the linears; another token in the padding changes nothing; minus them as before."""
  tokens, segment_ids, labels = samples
  assert set(found.attentions) == {PATH} and {"pooler", "sequence_classifier"} < set(found.linears)
  ids = {"segment_ids": segment_ids, "labels": labels}
  search = lambda tokens, settings: models.search_model(
    encoder, tokens, settings, embedding_bits=None, **ids
  )
  jax.tree.map(np.testing.assert_array_equal, search(tokens.at[1, 5].set(9), SETTINGS), found)
  quantized = models.apply_to_model(encoder, found, SETTINGS, embedding_bits=None)
  logits = nnx.jit(lambda model: model(tokens, segment_ids=segment_ids).logits)
  rounded = logits(quantized)
  assert isinstance(get_module(quantized, PATH), FPQAttention) and np.isfinite(rounded).all()
  folded = models.apply_to_model(encoder, found, SETTINGS, embedding_bits=None, packed=True)
  # Codes that fall on a tie may flip in one of them.
  np.testing.assert_allclose(logits(folded), rounded, atol=0.1 * np.abs(rounded).max())
  without = models.apply_to_model(
    encoder, found._replace(attentions={}), SETTINGS, embedding_bits=None
  )
  assert get_module(without, PATH) is attention
  assert np.abs(logits(without) - rounded).max() > 0


def test_a_saved_search_holds_the_products(found, tmp_path):
  search_result.save(tmp_path / "search.safetensors", found, SETTINGS)
  loaded, settings = search_result.load(tmp_path / "search.safetensors")
  assert settings == SETTINGS
  jax.tree.map(np.testing.assert_array_equal, loaded, found)


def test_integer_products_have_the_range_of_what_is_no_padding(encoder, samples):
  tokens, segment_ids, _ = samples
  integer = methods.integer_model(
    encoder, tokens, 4, embedding_bits=None, segment_ids=segment_ids, attention_products=True
  )
  attend = get_module(integer, PATH)
  assert isinstance(attend, QuantizedAttention)
  keys = lambda model: model.blocks[0].attention.k_proj(model.stem(tokens, segment_ids)[0])
  key = np.asarray(nnx.jit(keys)(encoder))[np.asarray(segment_ids) == 1]
  expected = min(key.min(), 0), max(key.max(), 0)
  np.testing.assert_allclose(attend.ranges["key"][...], expected, rtol=1e-4)
  low, high = np.asarray(attend.ranges[OPERANDS[3]][...])
  assert low == 0 and 0.1 < high <= 1


@pytest.mark.parametrize(
  "changes, labels, message",
  [
    ({"head": "none", "labels": ()}, [0], "metric='hessian' needs a loss"),
    ({}, None, "needs a label of each calibration sample: none of 1"),
    ({}, [0, 1], "needs a label of each calibration sample: 2 of 1"),
  ],
)
def test_a_loss_needs_a_classifier_and_labels(changes, labels, message):
  config = dataclasses.replace(CONFIG, **changes)
  model = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))
  with pytest.raises(UserError, match=message):
    gradients.loss_gradients(model, jnp.ones((1, 8), jnp.int32), labels)


def test_decoders_have_neither():
  decoder = random_decoder(ARCHITECTURES["llama"])
  tokens = jnp.asarray(random_tokens(decoder.config, 1, 4))
  plain = FPQSettings(grid_size=3)
  for changes, message in (
    ({"attention_products": True}, "attention_products is for encoders and vision transformers"),
    ({"metric": "hessian"}, "metric='hessian' needs a loss"),
  ):
    settings = dataclasses.replace(plain, **changes)
    with pytest.raises(UserError, match=message):
      models.search_model(decoder, tokens, settings, embedding_bits=4)
  with pytest.raises(UserError, match="needs the loss's gradient by the block's output"):
    models.quantize_block(decoder.blocks[0], *decoder.stem(tokens), settings)
