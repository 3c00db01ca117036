"""Retrieval with an encoder's sentence embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from sklearn.metrics import ndcg_score

from common.data.retrieval import Collection
from common.models.encoder import Encoder, sentence_embeddings

# Sequences are padded to a multiple of this: few shapes, few compilations.
LENGTH_STEP = 32


def embed_texts(
  model: Encoder,
  tokenizer: tokenizers.Tokenizer,
  texts: list[str],
  *,
  max_length: int = 128,
  batch_size: int = 32,
) -> np.ndarray:
  """Mean-pooled embeddings of unit length, float32 [texts, dim].

  Args:
    model: an encoder without a head, such as a sentence transformer.
    tokenizer: its tokenizer.
    texts: any number.
    max_length: tokens of a text that are read, special tokens included.
    batch_size: texts per forward pass.
  """
  encoder = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  encoder.enable_truncation(max_length)
  encoder.no_padding()
  ids = [encoding.ids for encoding in encoder.encode_batch(texts)]
  embeddings = np.zeros((len(texts), model.config.hidden_size), np.float32)
  graphdef, state = nnx.split(model)
  # Longest first, so that texts of about one length share a batch.
  order = np.argsort([-len(i) for i in ids], kind="stable")
  for start in range(0, len(order), batch_size):
    rows = order[start : start + batch_size]
    length = min(-(-len(ids[rows[0]]) // LENGTH_STEP) * LENGTH_STEP, max_length)
    tokens = np.full((batch_size, length), model.config.pad_token_id, np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, row in enumerate(rows):
      tokens[i, : len(ids[row])] = ids[row]
      segment_ids[i, : len(ids[row])] = 1
    embeddings[rows] = _embed(graphdef, state, tokens, segment_ids)[: len(rows)]
  return embeddings


def retrieval_ndcg(
  queries: np.ndarray, documents: np.ndarray, collection: Collection, *, k: int = 10
) -> np.ndarray:
  """nDCG@k of each query that has a relevant document, ranking by cosine; float [queries].

  Args:
    queries, documents: unit embeddings of the collection's texts, [count, dim].
    collection: gives the relevance.
    k: depth of the ranking.
  """
  judged = collection.relevance.any(axis=1)
  scores = queries[judged] @ documents.T
  relevance = collection.relevance[judged]
  return np.array([ndcg_score(r[None], s[None], k=k) for r, s in zip(relevance, scores)])


def embedding_similarity(a: np.ndarray, b: np.ndarray) -> float:
  """Mean cosine of two models' unit embeddings of the same texts, [texts, dim] each."""
  return float(np.mean(np.sum(a * b, axis=1)))


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef, state, tokens, segment_ids):
  hidden = nnx.merge(graphdef, state)(jnp.asarray(tokens), segment_ids=segment_ids).hidden
  return sentence_embeddings(hidden, segment_ids)
