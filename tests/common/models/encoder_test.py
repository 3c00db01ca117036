import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.errors import UserError
from common.models.encoder import (
  Encoder,
  EncoderConfig,
  default_positions,
  sentence_embeddings,
)
from common.paths import models_dir

BERT = EncoderConfig(
  vocab_size=50,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_position_embeddings=24,
)
ROBERTA = dataclasses.replace(
  BERT, positions_skip_padding=True, pad_token_id=1, num_token_types=1, family="roberta"
)
LABELS = ("a", "b", "c")


@nnx.jit
def encode(model, tokens, segment_ids, positions):
  return model(tokens, segment_ids=segment_ids, positions=positions)


@pytest.fixture(scope="module")
def bert():
  return Encoder(BERT, rngs=nnx.Rngs(0))


def random_tokens(seed, length):
  return np.random.default_rng(seed).integers(2, BERT.vocab_size, (2, length)).astype(np.int32)


def place(tokens, start, length=12, pad=0):
  """The tokens in a row of padding from `start` on, and segment ids."""
  width = ((0, 0), (start, length - start - tokens.shape[1]))
  return np.pad(tokens, width, constant_values=pad), np.pad(np.ones_like(tokens), width)


def from_zero(segment_ids):
  return np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0)


@pytest.mark.parametrize("start", [0, 5, 2], ids=["right", "left", "both"])
def test_padding_changes_nothing(bert, start):
  tokens = random_tokens(0, 7)
  plain = encode(bert, tokens, np.ones_like(tokens), from_zero(np.ones_like(tokens))).hidden
  padded, segments = place(tokens, start)
  hidden = encode(bert, padded, segments, from_zero(segments)).hidden
  np.testing.assert_allclose(hidden[:, start : start + 7], plain, atol=2e-6)


def test_roberta_finds_its_positions_beside_padding():
  model = Encoder(ROBERTA, rngs=nnx.Rngs(0))
  tokens = random_tokens(1, 7)
  right, left = (place(tokens, start, pad=1) for start in (0, 5))
  a, b = (encode(model, *padded, None).hidden for padded in (right, left))
  np.testing.assert_allclose(a[:, :7], b[:, 5:], atol=2e-6)


def test_packed_documents_do_not_see_each_other(bert):
  tokens = random_tokens(2, 12)
  segments = np.array([[1] * 4 + [2] * 3 + [0] * 5] * 2)
  hidden = encode(
    bert, tokens, segments, np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0, 0]] * 2)
  ).hidden
  for part in (slice(0, 4), slice(4, 7)):
    alone, alone_segments = place(tokens[:, part], 0)
    expected = encode(bert, alone, alone_segments, from_zero(alone_segments)).hidden
    size = part.stop - part.start
    np.testing.assert_allclose(hidden[:, part], expected[:, :size], atol=2e-6)


def test_attention_is_bidirectional(bert):
  tokens, segments = place(random_tokens(3, 6), 0)
  changed = tokens.copy()
  changed[:, 5] = (tokens[:, 5] + 1) % BERT.vocab_size
  a, b = (encode(bert, t, segments, from_zero(segments)).hidden for t in (tokens, changed))
  assert np.abs(a - b)[:, :6].max(axis=-1).min() > 1e-5


def test_positions():
  tokens = jnp.array([[1, 1, 7, 8, 1, 9], [5, 6, 7, 1, 1, 1]])
  np.testing.assert_array_equal(default_positions(BERT, tokens), [range(6)] * 2)
  expected = [[1, 1, 2, 3, 1, 4], [2, 3, 4, 1, 1, 1]]
  np.testing.assert_array_equal(default_positions(ROBERTA, tokens), expected)


@pytest.mark.parametrize(
  "options, shape, pooled",
  [
    ({"head": "none"}, None, False),
    ({"head": "none", "pooler": True}, None, True),
    ({"head": "masked_lm"}, (2, 5, 50), False),
    ({"head": "masked_lm", "tie_word_embeddings": False}, (2, 5, 50), False),
    ({"head": "sequence", "pooler": True, "labels": LABELS}, (2, 3), True),
    ({"head": "sequence", "labels": LABELS}, (2, 3), False),
    ({"head": "token", "labels": LABELS}, (2, 5, 3), False),
  ],
)
def test_heads(options, shape, pooled):
  model = nnx.eval_shape(
    lambda: Encoder(dataclasses.replace(BERT, num_layers=1, **options), rngs=nnx.Rngs(0))
  )
  tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
  out = nnx.eval_shape(lambda m, t: m(t), model, tokens)
  assert out.hidden.shape == (2, 5, 16)
  assert (out.logits is None) if shape is None else (out.logits.shape == shape)
  assert (out.pooled is not None) == pooled


def test_a_tied_head_shares_the_embeddings():
  model = Encoder(dataclasses.replace(BERT, head="masked_lm", num_layers=1), rngs=nnx.Rngs(3))
  run = nnx.jit(lambda model, tokens: model(tokens).logits)
  tokens = random_tokens(4, 4)
  before = run(model, tokens)
  model.embed_tokens.embedding[...] = model.embed_tokens.embedding[...].at[1].multiply(2)
  model.lm_head.bias[...] = model.lm_head.bias[...].at[2].set(3.0)
  after = run(model, tokens)
  np.testing.assert_allclose(after[..., 1], 2 * before[..., 1], rtol=1e-4)
  np.testing.assert_allclose(after[..., 2], before[..., 2] + 3, atol=1e-5)
  np.testing.assert_allclose(after[..., 3:], before[..., 3:], atol=1e-5)


def test_equal_blocks_share_a_graph_definition(bert):
  assert nnx.graphdef(bert.blocks[0]) == nnx.graphdef(bert.blocks[1])


def test_sentence_embeddings_against_numpy():
  rng = np.random.default_rng(4)
  hidden = rng.normal(size=(3, 5, 4)).astype(np.float32)
  mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
  means = np.stack([h[m == 1].mean(axis=0) for h, m in zip(hidden, mask)])
  first = hidden[np.arange(3), [0, 2, 0]]
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  raw = sentence_embeddings(hidden, mask, normalize=False)
  np.testing.assert_allclose(raw, means, atol=1e-6)
  np.testing.assert_allclose(sentence_embeddings(hidden, mask), unit(means), atol=1e-6)
  cls = sentence_embeddings(hidden, mask, pooling="cls")
  np.testing.assert_allclose(cls, unit(first), atol=1e-6)


@pytest.fixture
def minilm() -> pathlib.Path:
  try:
    return models_dir("all-minilm-l6-v2")
  except UserError as e:
    pytest.skip(str(e))


def test_minilm_embeds_sentences_like_its_reference(minilm):
  with np.load(minilm / "reference.npz") as file:
    reference = dict(file)
  tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
  tokenizer.no_truncation()
  tokenizer.enable_padding()
  encoded = tokenizer.encode_batch([str(s) for s in reference["sentences"]])
  tokens, mask = (np.array([getattr(e, k) for e in encoded]) for k in ("ids", "attention_mask"))
  np.testing.assert_array_equal(tokens, reference["input_ids"])
  np.testing.assert_array_equal(mask, reference["attention_mask"])
  model = Checkpoint(minilm).load_model()
  hidden = encode(model, tokens, mask, None).hidden
  difference = np.abs(hidden - reference["last_hidden_state"])[mask == 1]
  assert difference.max() < 1e-4
  embeddings = sentence_embeddings(hidden, mask)
  np.testing.assert_allclose(embeddings, reference["embeddings"], atol=1e-5)
