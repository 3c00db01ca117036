"""A pretrained encoder after FPQ: embeddings, retrieval and text classification, or a task of GLUE."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer

from common.checkpoints.huggingface import Checkpoint
from common.data.retrieval import Collection, load_collection, sample_collection
from common.data.sources import load_documents
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation.retrieval import embed_texts, embedding_similarity, retrieval_ndcg
from common.evaluation.text_classification import read_task, scores, task_table
from common.models.encoder import Encoder
from common.paths import models_dir
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Report, Table
from projects.llm_fp4.methods import (
  BASELINE,
  FLOAT_METHODS,
  FPQ,
  MINMAX_FP,
  MINMAX_INT,
  classifier_settings,
  fpq_settings,
  integer_model,
)
from projects.llm_fp4.models import fpq

DOMAINS = ("embedded:code", "embedded:prose", "embedded:science")
METHODS = (MINMAX_INT, *FLOAT_METHODS)
TEXTS = 60  # To fit the classifier on, and as many to test it.


def compare_on_encoder(config: ConfigDict, measurements: Measurements, report: Report) -> None:
  """Adds the encoder's table and claims: of a task, if the config names its files.

  Raises:
    UserError: the model, the collection or the task is not there, or the model is no encoder.
  """
  given = pathlib.Path(config.encoder).expanduser()
  folder = given if given.is_dir() else models_dir(config.encoder)
  model = Checkpoint(folder).load_model()
  if not isinstance(model, Encoder):
    raise UserError(f"encoder={config.encoder!r} is a {type(model).__name__}; expected an encoder")
  tokenizer = load_tokenizer(str(folder))
  if config.labelled_train or config.labelled_test:
    compare_on_task(config, model, tokenizer, measurements, report)
  else:
    compare_on_retrieval(config, model, tokenizer, measurements, report)


def compare_on_retrieval(
  config: ConfigDict,
  model: Encoder,
  tokenizer: Tokenizer,
  measurements: Measurements,
  report: Report,
) -> None:
  """A sentence encoder's embeddings, and what is done with them."""
  whole = load_collection()
  collection = sample_collection(whole, config.queries, config.documents)
  tokens, segment_ids = calibration_batch(config, model, tokenizer, whole, collection)
  train_texts, train_labels = domain_texts("train")
  test_texts, test_labels = domain_texts("test")
  classifier = LogisticRegression(max_iter=1000)
  embed = lambda model, texts: embed_texts(
    model, tokenizer, texts, max_length=config.encoder_length
  )
  classifier.fit(embed(model, train_texts), train_labels)
  full = embed(model, collection.documents)
  rows, cosine, ndcg = [], {}, {}

  def evaluate(candidate):
    documents = full if candidate is model else embed(candidate, collection.documents)
    by_query = retrieval_ndcg(embed(candidate, collection.queries), documents, collection)
    predicted = classifier.predict(embed(candidate, test_texts))
    return embedding_similarity(documents, full), by_query, scores(test_labels, predicted)

  def measure(bits, name):
    return evaluate(quantize(config, model, name, bits, tokens, segment_ids=segment_ids))

  def add(bits, name, similarity, by_query, classified):
    cosine[name, bits], ndcg[name, bits] = similarity, by_query
    width = f"{bits}/{bits}/{bits}" if bits else "32/32/32"
    rows.append([name, width, similarity, float(by_query.mean()), *classified])

  add(None, "full precision", *evaluate(model))
  for bits in config.encoder_bits:
    for name in METHODS:
      of_method = functools.partial(measure, bits, name)
      add(bits, name, *measurements.get(f"encoder, {bits} bits, {name}", of_method))
  report.tables.append(
    Table(
      f"Sentence encoder {config.encoder}",
      [
        "method",
        "bits E/W/A",
        Column("cosine to full precision", ".4f"),
        Column("nDCG@10", ".3f"),
        Column("accuracy", ".3f"),
        Column("macro F1", ".3f"),
        Column("Matthews", ".3f"),
      ],
      rows,
      note=(
        f"{len(collection.documents)} documents and {len(collection.queries)} queries; "
        f"{config.encoder_samples} other documents of {config.encoder_length} tokens at most for "
        f"calibration. {products_note(config)} Accuracy, F1 and Matthews: which of three domains "
        f"{TEXTS} texts are from, by logistic regression on full-precision embeddings of others."
      ),
    )
  )
  report.claims.extend(claims(config, cosine, ndcg))


def quantize(
  config: ConfigDict,
  model: Encoder,
  method: str,
  bits: int,
  tokens: jax.Array,
  *,
  labels: np.ndarray | None = None,
  **ids: jax.Array,
) -> Encoder:
  """The encoder, embeddings included, by a method of `METHODS`.

  Args:
    config: the run's.
    model: in full precision.
    method: its name.
    bits: of weights, activations and embeddings.
    tokens: calibration samples, int32 [samples, seq].
    labels: their classes, int [samples]; without them there is no loss, and `metric` applies.
    **ids: `segment_ids` and `token_types` of the same shape, as of `search_model`.
  """
  products = config.attention_products
  options = {"embedding_bits": bits, **ids}
  if method == MINMAX_INT:
    return integer_model(model, tokens, bits, attention_products=products, **options)
  part = {"attention_products": products} if labels is None else classifier_settings(config)
  settings = fpq_settings(config, bits, **part | FLOAT_METHODS[method])
  return fpq(model, tokens, settings, labels=labels, **options)


def compare_on_task(
  config: ConfigDict,
  model: Encoder,
  tokenizer: Tokenizer,
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
    num_calibration=config.encoder_samples,
  )
  calibration = {name: jnp.asarray(ids) for name, ids in task.calibration._asdict().items()}

  def models():
    yield "full precision", "32/32/32", lambda: model
    options = {"labels": task.calibration_labels, **calibration}
    for bits in config.encoder_bits:
      for method in METHODS:
        quantized = functools.partial(quantize, config, model, method, bits, **options)
        yield method, f"{bits}/{bits}/{bits}", quantized

  report.tables.append(task_table(config.encoder, "bits E/W/A", task, models(), measurements))


def products_note(config: ConfigDict) -> str:
  kept = "quantized too" if config.attention_products else "in full precision"
  return f"The products inside attention are {kept}."


def claims(config: ConfigDict, cosine, ndcg) -> list[Claim]:
  found = []
  for bits in config.encoder_bits:
    for name in (BASELINE, MINMAX_FP, MINMAX_INT):
      found.append(
        Claim.greater(
          f"FPQ's embeddings are nearer to full precision than those of {name} (W{bits}A{bits}, cosine)",
          {FPQ: [cosine[FPQ, bits]], name: [cosine[name, bits]]},
        )
      )
  lost = ndcg["full precision", None] - ndcg[FPQ, max(config.encoder_bits)]
  found.append(
    Claim.less(
      f"FPQ at W{max(config.encoder_bits)}A{max(config.encoder_bits)} loses less than 0.01 of nDCG@10 "
      "(by query)",
      lost,
      0.01,
    )
  )
  return found


def calibration_batch(
  config: ConfigDict, model: Encoder, tokenizer: Tokenizer, whole: Collection, used: Collection
):
  """Documents that are not in the sampled collection: tokens and segment ids, int32 [n, seq]."""
  excluded = set(used.documents)
  texts = [text for text in whole.documents if text not in excluded]
  if len(texts) < config.encoder_samples:
    raise UserError(
      f"{len(texts)} documents are left for calibration, not encoder_samples="
      f"{config.encoder_samples}: lower it or documents={config.documents}"
    )
  rows = np.linspace(0, len(texts) - 1, config.encoder_samples).astype(int)
  shape = (config.encoder_samples, config.encoder_length)
  tokens, segment_ids = (
    np.full(shape, model.config.pad_token_id, np.int32),
    np.zeros(shape, np.int32),
  )
  encoder = Tokenizer.from_str(tokenizer.to_str())
  encoder.no_padding()
  encoder.enable_truncation(config.encoder_length)
  for i, row in enumerate(rows):
    ids = encoder.encode(texts[row]).ids
    tokens[i, : len(ids)], segment_ids[i, : len(ids)] = ids, 1
  return jnp.asarray(tokens), jnp.asarray(segment_ids)


def domain_texts(split: str) -> tuple[list[str], np.ndarray]:
  """Beginnings of documents of three domains in turn, and which it is."""
  labels = np.arange(TEXTS) % len(DOMAINS)
  texts = [""] * TEXTS
  for label, domain in enumerate(DOMAINS):
    documents, places = load_documents(domain, split), np.flatnonzero(labels == label)
    chosen = np.linspace(0, len(documents) - 1, len(places)).astype(int)
    for place, i in zip(places, chosen):
      texts[place] = documents[int(i)]["text"][:400]
  return texts, labels
