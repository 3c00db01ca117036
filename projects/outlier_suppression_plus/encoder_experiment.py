"""A pretrained encoder with weights and activations of few bits: embeddings, retrieval, GLUE."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from common.checkpoints.huggingface import Checkpoint
from common.data.retrieval import Collection, load_collection, sample_collection
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation.retrieval import embed_texts, embedding_similarity, retrieval_ndcg
from common.evaluation.text_classification import Texts, encode_texts, read_task, task_table
from common.models.encoder import Encoder
from common.paths import models_dir
from common.reporting import plots
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Figure, Report, Table
from projects.outlier_suppression_plus.methods import main_methods, settings_of
from projects.outlier_suppression_plus.outlier_suppression_plus import check_model

Array = jax.Array


def compare_on_encoder(
  config: ConfigDict, measurements: Measurements, workdir: pathlib.Path, report: Report
) -> None:
  """Retrieval with sentence embeddings; or a classification task, if the config names its files."""
  given = pathlib.Path(config.encoder).expanduser()
  folder = given if given.is_dir() else models_dir(config.encoder)
  model, tokenizer = Checkpoint(folder).load_model(), load_tokenizer(str(folder))
  if not isinstance(model, Encoder):
    raise UserError(f"encoder={config.encoder!r} is a {type(model).__name__}; expected an encoder")
  for name in config.encoder_settings:
    check_model(model, settings_of(config, name))
  if config.labelled_train or config.labelled_test:
    compare_on_task(config, model, tokenizer, measurements, report)
  else:
    compare_on_retrieval(config, model, tokenizer, measurements, workdir, report)


def compare_on_retrieval(
  config: ConfigDict,
  model: Encoder,
  tokenizer,
  measurements: Measurements,
  workdir: pathlib.Path,
  report: Report,
) -> None:
  """Similarity of the embeddings to full precision's, and nDCG@10."""
  whole = load_collection()
  collection = sample_collection(whole, config.encoder_queries, config.encoder_documents)
  calibrations = [calibration_texts(config, whole, collection, tokenizer, s) for s in config.seeds]

  def embed(encoder):
    texts = collection.queries + collection.documents
    embeddings = embed_texts(encoder, tokenizer, texts, max_length=config.encoder_length)
    return np.split(embeddings, [len(collection.queries)])

  full = functools.cache(lambda: embed(model))

  def score(method, texts: Texts) -> tuple[float, float]:
    embedded = embed(method(model, texts.tokens))
    similarity = embedding_similarity(np.concatenate(embedded), np.concatenate(full()))
    return similarity, ndcg(embedded, collection)

  full_ndcg = measurements.get("encoder, full precision", lambda: ndcg(full(), collection))
  rows = [["full precision", None, 1.0, None, full_ndcg, None]]
  similarity = {}
  jobs = [(name, seed) for name in config.encoder_settings for seed in range(len(calibrations))]
  measured = {}
  for name, seed in track(jobs, "encoder", console=Console(stderr=True)):
    texts = calibrations[seed]
    methods = main_methods(config, settings_of(config, name), ids_of(texts), hidden_error(texts))
    for label in [method for method in config.encoder_methods if method in methods]:
      of_method = functools.partial(score, methods[label], texts)
      found = measurements.get(f"encoder, {name}, {label}, seed {config.seeds[seed]}", of_method)
      measured.setdefault((name, label), []).append(found)
  for (name, label), values in measured.items():
    mean = np.mean(values, axis=0)
    spread = np.std(values, axis=0, ddof=1) if len(values) > 1 else (None, None)
    rows.append([label, name, mean[0], spread[0], mean[1], spread[1]])
    similarity[name, label] = [value[0] for value in values]
  report.tables.append(
    Table(
      f"{config.encoder}: embeddings and retrieval",
      [
        "method",
        "setting",
        Column("cosine to full precision", ".4f"),
        Column("sd", ".4f"),
        Column("nDCG@10", ".4f"),
        Column("sd of nDCG", ".4f"),
      ],
      rows,
      note=(
        f"{len(collection.documents)} documents and {len(collection.queries)} queries of the Vaswani "
        f"collection; {config.encoder_calibration} other documents calibrate. Mean of "
        f"{len(calibrations)} calibration draws."
      ),
    )
  )
  report.claims.extend(retrieval_claims(config, similarity))
  labels = list(dict.fromkeys(label for _, label in similarity))
  settings = list(config.encoder_settings)
  plots.bar_plot(
    workdir / "encoder.png",
    settings,
    {
      label: [1 - float(np.mean(similarity.get((name, label), [np.nan]))) for name in settings]
      for label in labels
    },
    ylabel="1 - cosine to full precision",
    title=config.encoder,
    log=True,
  )
  report.figures.append(Figure(f"Embedding error of {config.encoder}", "encoder.png"))


def retrieval_claims(config: ConfigDict, similarity) -> list[Claim]:
  """OS+ against each baseline, on the similarity of each calibration draw."""
  claims = []
  for name in config.encoder_settings:
    for other in config.encoder_methods:
      if other != "OS+" and (name, other) in similarity:
        claims.append(
          Claim.greater(
            f"OS+'s embeddings are nearer to full precision than {other}'s ({name}, cosine)",
            {"OS+": similarity[name, "OS+"], other: similarity[name, other]},
          )
        )
  return claims


def ndcg(embedded, collection: Collection) -> float:
  return float(retrieval_ndcg(*embedded, collection).mean())


def ids_of(texts: Texts) -> dict[str, np.ndarray]:
  """What texts have beside their tokens, by the names of an encoder's arguments."""
  return {"segment_ids": texts.segment_ids, "token_types": texts.token_types}


def hidden_error(texts: Texts):
  """The loss that chooses the baselines' hyper-parameters: mean squared error of the outputs."""

  def loss(model, quantized, tokens):
    error = _hidden(model, tokens, ids_of(texts)) - _hidden(quantized, tokens, ids_of(texts))
    mask = (texts.segment_ids != 0)[..., None]
    return float(jnp.sum(error**2 * mask) / mask.sum())

  return loss


@nnx.jit
def _hidden(model: Encoder, tokens: Array, ids: dict[str, Array]) -> Array:
  return model(tokens, **ids).hidden


def calibration_texts(
  config: ConfigDict, whole: Collection, sampled: Collection, tokenizer, seed: int
) -> Texts:
  """Documents that are not in the sampled collection."""
  kept = set(sampled.documents)
  others = [text for text in whole.documents if text not in kept]
  chosen = np.random.default_rng(seed).choice(len(others), config.encoder_calibration, False)
  return encode_texts(tokenizer, [(others[i],) for i in chosen], config.encoder_length)


def compare_on_task(
  config: ConfigDict, model: Encoder, tokenizer, measurements: Measurements, report: Report
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

  def models():
    yield "full precision", None, lambda: model
    for name in config.encoder_settings:
      settings = settings_of(config, name)
      texts = task.calibration
      methods = main_methods(config, settings, ids_of(texts), hidden_error(texts))
      for label in [method for method in config.encoder_methods if method in methods]:
        yield label, name, functools.partial(methods[label], model, texts.tokens)

  report.tables.append(task_table(config.encoder, "setting", task, models(), measurements))
