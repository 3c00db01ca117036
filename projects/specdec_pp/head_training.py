"""Training of the acceptance head on states of the frozen draft."""

import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.metrics
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.evaluation.calibration import expected_calibration_error, reliability
from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step
from projects.specdec_pp.specdec_pp import (
  IGNORED,
  AcceptanceHead,
  acceptance_logits,
  acceptance_probability,
  bernoulli_kl,
  init_head,
  tie_blocks,
  weighted_cross_entropy,
)
from projects.specdec_pp.training_data import HeadData

Array = jax.Array


class HeadSettings(NamedTuple):
  """How a head is trained.

  Attributes:
    num_blocks: D.
    tied_blocks: one block, D times, as in the official code; the paper's are independent.
    rejected_weight: w_rej.
    learning_rate: AdamW's peak, reached after 3 % of the steps; a cosine follows. No weight decay.
    epochs: over the data.
    batch_size: texts.
  """

  num_blocks: int
  tied_blocks: bool
  rejected_weight: float
  learning_rate: float
  epochs: int
  batch_size: int


def train_head(data: HeadData, settings: HeadSettings, seed: int) -> AcceptanceHead:
  """Trains a head.

  Args:
    data: mixed texts.
    settings: of head and training.
    seed: of its initialization and of the order of the texts.

  Raises:
    UserError: fewer texts than a batch.
  """
  rows = len(data.labels)
  if rows < settings.batch_size:
    raise UserError(
      f"{rows} texts to train the head on are less than a batch of {settings.batch_size}: take "
      "more prompts or a smaller batch_size"
    )
  num_steps = settings.epochs * (rows // settings.batch_size)
  blocks = 1 if settings.tied_blocks else settings.num_blocks
  head = init_head(jax.random.key(seed), data.hidden.shape[-1], blocks)
  optimizer, step = training_step(
    settings.learning_rate, num_steps, settings.num_blocks if settings.tied_blocks else None
  )
  weight = jnp.float32(settings.rejected_weight)
  state = train(
    init_train_state(head, optimizer, jax.random.key(seed)),
    lambda state, batch: step(state, batch, weight),
    _batches(data, settings, seed),
    num_steps=num_steps,
    unit="texts",
    description="acceptance head",
    quiet=True,
  )
  head = jax.tree.map(jnp.asarray, state.params)
  return tie_blocks(head, settings.num_blocks) if settings.tied_blocks else head


@functools.cache
def training_step(
  learning_rate: float, num_steps: int, tied_blocks: int | None
) -> tuple[optax.GradientTransformation, StepFn]:
  """The optimizer, and a step that all heads trained as long share.

  Args:
    learning_rate: see `HeadSettings`.
    num_steps: of the whole training.
    tied_blocks: D of a head with one block; None for independent blocks.

  Returns:
    The optimizer, and step(state, batch, w_rej); the batch is `HeadData` as a dict: "hidden"
    [batch, new, width], "labels" [batch, new].
  """
  optimizer = make_optimizer(
    learning_rate=learning_rate,
    num_steps=num_steps,
    warmup_steps=max(1, round(0.03 * num_steps)) if num_steps > 1 else 0,
    b2=0.999,
  )

  def loss_fn(head, batch, key, rejected_weight):
    del key  # Nothing is random.
    head = head if tied_blocks is None else tie_blocks(head, tied_blocks)
    logits = acceptance_logits(head, batch["hidden"])
    return weighted_cross_entropy(logits, batch["labels"], rejected_weight)

  return optimizer, make_train_step(loss_fn, optimizer)


def _batches(data: HeadData, settings: HeadSettings, seed: int) -> Iterator[dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  size = settings.batch_size
  for _ in range(settings.epochs):
    order = rng.permutation(len(data.labels))
    for start in range(0, len(order) - size + 1, size):
      rows = order[start : start + size]
      yield {"hidden": data.hidden[rows], "labels": data.labels[rows]}


_probabilities = jax.jit(acceptance_probability)


class Divergence(NamedTuple):
  """Mean KL(Bernoulli(A) || Bernoulli(a)) over labelled positions, nats.

  Attributes:
    head: of the head.
    unweighted: of the head with w_rej undone: its best a has odds A / (w_rej (1 - A)).
    constant: of a constant a.
  """

  head: float
  unweighted: float
  constant: float


def label_divergence(
  head: AcceptanceHead, dev: HeadData, train_labels: np.ndarray, rejected_weight: float
) -> Divergence:
  """How far the head is from the labels; the constant is the mean label of the training data."""
  counted = dev.labels != IGNORED
  labels = jnp.asarray(dev.labels[counted])
  predicted = _probabilities(head, dev.hidden)[counted]
  constant = jnp.float32(train_labels[train_labels != IGNORED].mean())
  mean = lambda a: float(jnp.mean(bernoulli_kl(labels, a)))
  weighted = rejected_weight * predicted
  return Divergence(mean(predicted), mean(weighted / (weighted + 1 - predicted)), mean(constant))


class HeadQuality(NamedTuple):
  """The head against what became of drafts.

  Attributes:
    auroc: of telling rejected drafts from accepted ones.
    ece: expected calibration error of a, 15 bins of equal count.
    bins: of the reliability diagram, (mean a, share accepted).
  """

  auroc: float
  ece: float
  bins: tuple[np.ndarray, np.ndarray]


def head_quality(head: AcceptanceHead, hidden: Array, accepted: Array) -> HeadQuality:
  """Discrimination and calibration.

  Args:
    head: a trained head.
    hidden: states at drafts, [..., width].
    accepted: whether each was, or with which probability, [...].
  """
  predicted = np.asarray(_probabilities(head, hidden)).reshape(-1)
  accepted = np.asarray(accepted, np.float32).reshape(-1)
  bins = reliability(predicted, accepted)
  # A draft that is accepted with probability A is both: accepted with weight A.
  rejected = np.repeat([0, 1], len(accepted))
  weights = np.concatenate([accepted, 1 - accepted])
  auroc = sklearn.metrics.roc_auc_score(rejected, np.tile(1 - predicted, 2), sample_weight=weights)
  return HeadQuality(
    float(auroc),
    float(expected_calibration_error(bins)),
    (np.asarray(bins.predicted), np.asarray(bins.observed)),
  )


def save_head(path: pathlib.Path, head: AcceptanceHead) -> None:
  """Writes a head as safetensors."""
  save_file({name: np.ascontiguousarray(x) for name, x in head._asdict().items()}, path)


def load_head(path: str, width: int) -> AcceptanceHead:
  """Reads a head of `save_head`.

  Raises:
    UserError: it cannot be read, is not a head of the draft's width, or is not finite.
  """
  try:
    arrays = load_file(pathlib.Path(path).expanduser())
  except Exception as e:  # The library raises its own errors besides those of files.
    raise UserError(f"cannot read the head {path}: {e}; expected a file of save_head") from None
  blocks = arrays["kernels"].shape[0] if arrays.get("kernels", np.zeros(())).ndim == 3 else 0
  shapes = ((blocks, width, width), (blocks, width), (width, 2), (2,))
  for name, shape in zip(AcceptanceHead._fields, shapes):
    found = arrays.get(name)
    if found is None or found.shape != shape:
      got = "nothing" if found is None else f"shape {found.shape}"
      raise UserError(
        f"{path}: {name} has {got}, expected {shape} for a draft of width {width}: take a head "
        "that was trained on this draft"
      )
    if not np.isfinite(found).all():
      raise UserError(f"{path}: {name} has NaN or infinite values: train the head again")
  return AcceptanceHead(*(jnp.asarray(arrays[name]) for name in AcceptanceHead._fields))
