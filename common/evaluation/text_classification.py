"""Classification of texts by a fine-tuned encoder, as in GLUE: labelled files, classes, scores."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from flax import nnx
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from common.errors import UserError
from common.evaluation.items import read_items
from common.models.encoder import Encoder
from common.reporting.measurements import Measurements
from common.reporting.report import Column, Table

Array = jax.Array


class Texts(NamedTuple):
  """Padded texts.

  Attributes:
    tokens, segment_ids, token_types: int32 [texts, seq]; segment 0 is padding.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  token_types: np.ndarray


class Task(NamedTuple):
  """What a quantized classifier is calibrated and tested on.

  Attributes:
    name: of the file that it is tested on.
    calibration, test: texts.
    calibration_labels, labels: of `calibration` and of `test`, int [texts].
  """

  name: str
  calibration: Texts
  calibration_labels: np.ndarray
  test: Texts
  labels: np.ndarray


def encode_texts(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[tuple[str, ...]], length: int
) -> Texts:
  """Texts, or pairs of texts, of at most `length` tokens, padded on the right to the longest."""
  encoder = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  encoder.enable_truncation(length)
  encoder.no_padding()
  encodings = encoder.encode_batch([t if len(t) == 2 else t[0] for t in texts])
  shape = len(texts), max(len(e.ids) for e in encodings)
  tokens, segment_ids, types = (np.zeros(shape, np.int32) for _ in range(3))
  for i, e in enumerate(encodings):
    count = len(e.ids)
    tokens[i, :count], segment_ids[i, :count], types[i, :count] = e.ids, 1, e.type_ids
  return Texts(tokens, segment_ids, types)


def labelled_texts(
  path: str | os.PathLike,
  fields: Sequence[str],
  model: Encoder,
  tokenizer: tokenizers.Tokenizer,
  length: int,
) -> tuple[Texts, np.ndarray]:
  """Texts of a JSON-lines file, and their classes, int [texts].

  Args:
    path: see `read_items`.
    fields: of a text, or of both of a pair, and at last of its label, one of the model's names.
    model: has a head for classes of sequences.
    tokenizer: the model's.
    length: tokens of a text at most.

  Raises:
    UserError: the model has no such head, or the file is missing or damaged (the line is named).
  """
  if model.config.head != "sequence":
    raise UserError(
      f"the encoder has head={model.config.head!r}; a classification task needs a fine-tuned model "
      "with a sequence head"
    )
  known = {label: i for i, label in enumerate(model.config.labels)}

  def check(item):
    if item[fields[-1]] not in known:
      return f"the label {item[fields[-1]]!r} is none of the model's, {', '.join(known)}"

  items = read_items(path, fields, check)
  texts = encode_texts(tokenizer, [tuple(i[f] for f in fields[:-1]) for i in items], length)
  return texts, np.array([known[item[fields[-1]]] for item in items])


def read_task(
  train: str,
  test: str,
  fields: Sequence[str],
  model: Encoder,
  tokenizer: tokenizers.Tokenizer,
  *,
  length: int,
  num_calibration: int,
) -> Task:
  """The first texts of one file, to calibrate on, and all of another; see `labelled_texts`.

  Raises:
    UserError: also if one of the files is not named.
  """
  if not (train and test):
    raise UserError("give both labelled_train and labelled_test, or neither")
  read = lambda path: labelled_texts(path, fields, model, tokenizer, length)
  texts, labels = read(train)
  few = Texts(*(ids[:num_calibration] for ids in texts))
  return Task(pathlib.Path(test).name, few, labels[:num_calibration], *read(test))


def task_table(
  encoder: str,
  setting: str,
  task: Task,
  models: Iterable[tuple[str, str | None, Callable[[], Encoder]]],
  measurements: Measurements,
) -> Table:
  """Scores on the task.

  Args:
    encoder: its name.
    setting: what the second column is called.
    task: see `read_task`.
    models: method, setting and what makes the model of each row; one is in memory at a time.
    measurements: of the run; a model whose scores they have is not made.
  """
  score = lambda model_of: scores(task.labels, predict(model_of(), task.test))
  rows = []
  for method, value, model_of in models:
    of_model = functools.partial(score, model_of)
    found = measurements.get(f"{task.name}, {value or 'no setting'}, {method}", of_model)
    rows.append([method, value, *found])
  columns = [Column(c, ".4f", better="higher") for c in ("accuracy", "macro F1", "Matthews")]
  return Table(f"{encoder} on {task.name}", ["method", setting, *columns], rows)


def predict(model: Encoder, texts: Texts, batch_size: int = 32) -> np.ndarray:
  """Classes, int [texts]."""
  count = len(texts.tokens)
  # The last batch is filled up, so that one compilation serves all.
  rows = np.concatenate([np.arange(count), np.zeros(-count % batch_size, int)])
  found = []
  for chosen in rows.reshape(-1, batch_size):
    ids = {"segment_ids": texts.segment_ids[chosen], "token_types": texts.token_types[chosen]}
    found.append(_logits(model, texts.tokens[chosen], ids).argmax(axis=-1))
  return np.concatenate(found)[:count]


def scores(labels: np.ndarray, predicted: np.ndarray) -> list[float]:
  """Accuracy, macro F1 and Matthews correlation."""
  return [
    accuracy_score(labels, predicted),
    f1_score(labels, predicted, average="macro"),
    matthews_corrcoef(labels, predicted),
  ]


@nnx.jit
def _logits(model: Encoder, tokens: Array, ids: dict[str, Array]) -> Array:
  return model(tokens, **ids).logits
