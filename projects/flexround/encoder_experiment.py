"""A pretrained sentence encoder with weights and activations of few bits, and a classifier on top."""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from common.checkpoints.huggingface import Checkpoint
from common.data.retrieval import Collection, load_collection, sample_collection
from common.data.sources import load_documents
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation.retrieval import embed_texts, embedding_similarity, retrieval_ndcg
from common.evaluation.text_classification import read_task, scores, task_table
from common.models.encoder import Encoder, sentence_embeddings
from common.paths import models_dir
from common.quantization.activations import ActivationFormat
from common.quantization.calibration import quantize_model
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import ReconstructionSettings
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Report, Table
from projects.flexround.methods import Protocol, initial_grids, quantize_unit

DOMAINS = ("embedded:code", "embedded:prose", "embedded:science")
TITLE = "Sentence encoder, weights per channel, activations per tensor"


class Sentences(NamedTuple):
  """Token ids and segment ids int32 [n, seq], and the domain of each int [n]."""

  tokens: jax.Array
  segment_ids: jax.Array
  labels: np.ndarray


def compare_on_encoder(config: ConfigDict, measurements: Measurements, report: Report) -> None:
  """Adds the encoder's table and claim; only a note where the model is not at hand."""
  columns = [
    "method",
    "format",
    Column("cosine to full precision", ".4f"),
    Column("nDCG@10", ".3f"),
    Column("accuracy", ".3f"),
    Column("macro F1", ".3f"),
    Column("Matthews", ".3f"),
  ]
  given = pathlib.Path(config.encoder).expanduser()
  try:
    folder = given if given.is_dir() else models_dir(config.encoder)
  except UserError as e:
    report.tables.append(Table(TITLE, columns, [], f"Left out: {e}"))
    return
  model = Checkpoint(folder).load_model()
  if not isinstance(model, Encoder):
    raise UserError(f"encoder={config.encoder!r} is a {type(model).__name__}; expected an encoder")
  tokenizer = load_tokenizer(str(folder))
  if config.labelled_train or config.labelled_test:
    compare_on_task(config, model, tokenizer, measurements, report)
    return
  read = lambda split, count, seed: sentences(
    tokenizer, split, count, config.encoder_length, model.config.pad_token_id, seed
  )
  calibration = read("train", config.encoder_calibration, 0)
  train = read("validation", config.encoder_sentences, 1)
  test = read("test", config.encoder_sentences, 2)
  collection = retrieval_collection(config)
  full = embed(model, test)
  classifier = LogisticRegression(max_iter=1000).fit(embed(model, train), train.labels)

  def measure(model):
    embeddings = embed(model, test)
    found = classifier.predict(embeddings)
    return [
      embedding_similarity(embeddings, full),
      None if collection is None else ndcg(model, tokenizer, collection),
      *scores(test.labels, found),
    ]

  def measure_quantized(method, bits):
    ids = {"tokens": calibration.tokens, "segment_ids": calibration.segment_ids}
    return measure(quantize(method, config, model, bits, **ids))

  rows, cosine = [["full precision", None, *measure(model)]], {}
  for bits in config.encoder_bits:
    for method in ("RTN", "FlexRound"):
      format = f"W{bits}A{bits}"
      of_method = functools.partial(measure_quantized, method, bits)
      found = measurements.get(f"encoder, {format}, {method}", of_method)
      rows.append([method, format, *found])
      cosine[bits, method] = found[0]
  report.tables.append(
    Table(
      TITLE,
      columns,
      rows,
      note=(
        f"{config.encoder}; {config.encoder_calibration} calibration sentences, "
        f"{config.encoder_steps} steps per block. {config.encoder_sentences} test sentences; which "
        "of three domains they are from, by logistic regression on full-precision embeddings of "
        f"as many others. nDCG@10: {config.retrieval_queries} queries, {config.retrieval_documents} "
        "documents of the NPL collection."
      ),
    )
  )
  for bits in config.encoder_bits:
    report.claims.append(
      Claim.greater(
        f"FlexRound's embeddings are nearer to full precision than RTN's (W{bits}A{bits}, cosine)",
        {name: [cosine[bits, name]] for name in ("FlexRound", "RTN")},
      )
    )


def compare_on_task(
  config: ConfigDict,
  model: Encoder,
  tokenizer: tokenizers.Tokenizer,
  measurements: Measurements,
  report: Report,
) -> None:
  """A GLUE task: accuracy, F1 and Matthews correlation of a fine-tuned classifier."""
  task = read_task(
    config.labelled_train,
    config.labelled_test,
    config.labelled_fields,
    model,
    tokenizer,
    length=config.encoder_length,
    num_calibration=config.encoder_calibration,
  )
  calibration = {name: jnp.asarray(ids) for name, ids in task.calibration._asdict().items()}

  def models():
    yield "full precision", None, lambda: model
    for bits in config.encoder_bits:
      for method in ("RTN", "FlexRound"):
        quantized = functools.partial(quantize, method, config, model, bits, **calibration)
        yield method, f"W{bits}A{bits}", quantized

  report.tables.append(task_table(config.encoder, "format", task, models(), measurements))


def retrieval_collection(config: ConfigDict) -> Collection | None:
  """The part of the NPL collection that is searched; None where it is not at hand."""
  if not config.retrieval_queries:
    return None
  try:
    whole = load_collection()
  except UserError:
    return None
  return sample_collection(whole, config.retrieval_queries, config.retrieval_documents)


def ndcg(model: Encoder, tokenizer: tokenizers.Tokenizer, collection: Collection) -> float:
  """Mean nDCG@10 over the queries."""
  queries, documents = (
    embed_texts(model, tokenizer, texts) for texts in (collection.queries, collection.documents)
  )
  return float(retrieval_ndcg(queries, documents, collection).mean())


def sentences(tokenizer, split, count, length, pad_token_id, seed) -> Sentences:
  """Beginnings of documents, as many of each domain."""
  ids, labels = np.full((count, length), pad_token_id, np.int32), np.arange(count) % len(DOMAINS)
  segment_ids = np.zeros((count, length), np.int32)
  rng = np.random.default_rng(seed)
  for label, domain in enumerate(DOMAINS):
    documents, rows = load_documents(domain, split), np.flatnonzero(labels == label)
    for row, i in zip(
      rows, rng.choice(len(documents), len(rows), replace=len(rows) > len(documents))
    ):
      # A document may be long; so many characters hold more than the tokens that are kept.
      encoded = tokenizer.encode(documents[int(i)]["text"][: 16 * length]).ids[:length]
      ids[row, : len(encoded)], segment_ids[row, : len(encoded)] = encoded, 1
  return Sentences(jnp.asarray(ids), jnp.asarray(segment_ids), labels)


@nnx.jit
def _embed(model: Encoder, tokens, segment_ids):
  return sentence_embeddings(model(tokens, segment_ids=segment_ids).hidden, segment_ids)


def embed(model: Encoder, batch: Sentences) -> np.ndarray:
  """Unit vectors, float32 [n, dim]."""
  return np.asarray(_embed(model, batch.tokens, batch.segment_ids))


def quantize(
  method: str, config: ConfigDict, model: Encoder, bits: int, tokens: jax.Array, **ids: jax.Array
) -> Encoder:
  """A copy of the encoder with weights per channel and activations per tensor.

  Args:
    method: of `quantize_unit`.
    config: the run's.
    model: in full precision.
    bits: of weights and activations.
    tokens: calibration samples, int32 [samples, seq].
    **ids: `segment_ids` and `token_types` of the same shape, as of `quantize_model`.
  """
  protocol = Protocol(
    IntegerFormat(bits),
    "min_max",
    ReconstructionSettings(config.encoder_steps, config.encoder_batch_size),
    ActivationFormat(bits, "per_tensor"),
  )

  def block(index, block, x, context):
    key = jax.random.fold_in(jax.random.key(0), index)
    grids = initial_grids(block, protocol)
    rate = config.encoder_learning_rate
    return quantize_unit(method, block, x, context, key, protocol, rate, grids=grids).unit

  return quantize_model(model, tokens, block, stream="both", **ids)
