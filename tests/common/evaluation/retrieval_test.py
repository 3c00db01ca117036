import math

import numpy as np
import pytest
from flax import nnx

from common.checkpoints.huggingface import Checkpoint
from common.data.retrieval import Collection, load_collection, sample_collection
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation.retrieval import embed_texts, embedding_similarity, retrieval_ndcg
from common.models.encoder import Encoder, EncoderConfig
from common.paths import data_dir, models_dir


def test_ndcg_is_its_formula():
  """Relevant documents at ranks 1 and 3 of three; the second query has nothing to find."""
  documents = np.eye(4, dtype=np.float32)
  queries = np.array([[0.9, 0.5, 0.3, 0.1], [1, 0, 0, 0]], np.float32)
  collection = Collection(["d"] * 4, ["q"] * 2, np.array([[1, 0, 1, 0], [0, 0, 0, 0]]))
  gain = 1 + 1 / math.log2(4)
  expected = gain / (1 + 1 / math.log2(3))
  np.testing.assert_allclose(retrieval_ndcg(queries, documents, collection), [expected], rtol=1e-6)
  cut = retrieval_ndcg(queries, documents, collection, k=2)
  np.testing.assert_allclose(cut, [1 / (1 + 1 / math.log2(3))], rtol=1e-6)


def test_embeddings_do_not_depend_on_their_batch():
  tokenizer = load_tokenizer("embedded-512")
  config = EncoderConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    max_position_embeddings=64,
  )
  model = Encoder(config, rngs=nnx.Rngs(0))
  texts = ["return the number of items", "a", "the sum of all values in the array " * 20, "b c"]
  together = embed_texts(model, tokenizer, texts, max_length=64, batch_size=3)
  alone = [embed_texts(model, tokenizer, [text], max_length=64, batch_size=3) for text in texts]
  np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
  assert embedding_similarity(together, together) == pytest.approx(1.0, abs=1e-5)
  assert embedding_similarity(together, together[::-1]) < 0.999


def test_a_real_encoder_finds_what_is_relevant():
  try:
    folder, _ = models_dir("all-minilm-l6-v2"), data_dir("vaswani_npl")
  except UserError as e:
    pytest.skip(str(e))
  model, tokenizer = Checkpoint(folder).load_model(), load_tokenizer(str(folder))
  collection = sample_collection(load_collection(), 4, 120)
  queries, documents = (
    embed_texts(model, tokenizer, texts, max_length=64)
    for texts in (collection.queries, collection.documents)
  )
  found = retrieval_ndcg(queries, documents, collection).mean()
  shuffled = retrieval_ndcg(queries, documents[::-1], collection).mean()
  assert found > 0.6 > 0.4 > shuffled
