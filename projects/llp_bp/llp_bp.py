"""Pseudo labels from belief propagation, an embedding learnt from them, and both in turn."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from projects.llp_bp import belief_propagation, graph, losses, training

PSEUDO_LABELS = ("hard", "soft", "top")


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that a run may change. Tuples are tried on the validation part, all combinations.

  Attributes:
    rounds: R, of belief propagation and training; the first on the covariates, the others on phi.
    learned_embedding: False keeps the neighbours of the covariates in all rounds.
    neighbours, lambda_s, lambda_bag: of the Gibbs distribution; see `belief_propagation`.
    metric: of the neighbours, "euclidean" or "cosine".
    kernel, kernel_width, max_distance: see `graph.neighbour_edges`.
    bag_factor, damping, max_iterations, tolerance: see `belief_propagation.infer`.
    pseudo_labels: "hard" mu >= tau, "soft" mu, "top" the s_B largest mu of every bag.
    tau: threshold of hard labels.
    lambda_a: weight of the aggregate embedding's loss; 0 leaves it out.
    encoder, hidden: see `network.Classifier`; the last of hidden is the width of phi.
    learning_rate, weight_decay: of AdamW.
    batch_rows: rows of a training batch of whole bags; larger bags are batches of their own.
    steps, validations: see `training.train`.
  """

  rounds: int = 2
  learned_embedding: bool = True
  neighbours: tuple[int, ...] = (5, 10, 25)
  lambda_s: tuple[float, ...] = (0.1, 0.25, 0.5)
  lambda_bag: tuple[float, ...] = (4.0, 8.0, 12.0)
  metric: str = "euclidean"
  kernel: str = "constant"
  kernel_width: float = 1.0
  max_distance: float = float("inf")
  bag_factor: str = "quadratic"
  damping: float = 0.8
  max_iterations: int = 150
  tolerance: float = 1e-3
  pseudo_labels: str = "hard"
  tau: float = 0.5
  lambda_a: float = 0.1
  encoder: str = "mlp"
  hidden: tuple[int, ...] = (64, 64, 32)
  learning_rate: tuple[float, ...] = (2e-3, 6e-3, 2e-2)
  weight_decay: tuple[float, ...] = (1e-2,)
  batch_rows: int = 256
  steps: int = 400
  validations: int = 25


class Bagged(NamedTuple):
  """Training instances with the counts of their bags, and a validation part."""

  x: np.ndarray  # float32 [n, d], standardised.
  bags: np.ndarray  # int [n], 0 ... B-1, every bag at least once.
  counts: np.ndarray  # [B], positives.
  validation_x: np.ndarray  # float32 [v, d]
  validation: Any  # What `score` compares with; see `training.auc` and `training.bag_fit`.
  score: Callable  # (probabilities [v], validation) -> scalar, higher is better.


class Candidate(NamedTuple):
  """One combination of the Gibbs distribution's parameters and how it fared."""

  neighbours: int
  lambda_s: float
  lambda_bag: float
  score: float  # Of the validation part; NaN counts as the worst.
  residual: float
  iterations: int
  converged: bool


class Round(NamedTuple):
  """What one round made."""

  candidates: list[Candidate]
  chosen: Candidate
  probability: np.ndarray  # [n], mu of the chosen candidate.
  target: np.ndarray  # float32 [n], the pseudo labels.
  trained: training.Trained


def bootstrap(key: jax.Array, data: Bagged, options: Options) -> list[Round]:
  """The method: R rounds; the last round's network predicts."""
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  batches = training.pack_bags(data.bags, data.counts, options.batch_rows, options.steps, rng)
  features, validation_features = data.x, data.validation_x
  rounds = []
  for r in range(options.rounds):
    candidates, chosen, probability = choose_beliefs(features, validation_features, data, options)
    target = pseudo_labels(probability, data.bags, data.counts, options.pseudo_labels, options.tau)
    trained = train_classifier(
      jax.random.fold_in(key, r), data, batches, target, losses.pseudo_label_loss, options
    )
    rounds.append(Round(candidates, chosen, probability, target, trained))
    if options.learned_embedding and r + 1 < options.rounds:
      features = predict(trained, data.x, options)[1]
      validation_features = predict(trained, data.validation_x, options)[1]
  return rounds


def choose_beliefs(
  features: np.ndarray, validation_features: np.ndarray, data: Bagged, options: Options
) -> tuple[list[Candidate], Candidate, np.ndarray]:
  """Belief propagation for all candidates; the best on the validation part, and its mu [n].

  A validation row is not in the graph: it is given the mean mu of its nearest training rows.
  """
  largest = max(options.neighbours)
  order = graph.tree_order(features)
  features = features[order]
  near = graph.nearest(features, largest, metric=options.metric)
  near_validation = graph.nearest(features, largest, validation_features, options.metric)[1]
  bags = graph.group_bags(data.bags[order], data.counts)
  found = []
  # Nothing here waits for a result: all candidates are under way before the first is read.
  for k in options.neighbours:
    edges = graph.neighbour_edges(
      tuple(part[:, :k] for part in near),
      kernel=options.kernel,
      width=options.kernel_width,
      max_distance=options.max_distance,
      largest=largest,
    )
    if options.bag_factor == "quadratic":
      edges = graph.merge_bag_mates(edges, bags)
    edges, groups = jax.device_put((edges, bags))
    for lambda_s, lambda_bag in itertools.product(options.lambda_s, options.lambda_bag):
      beliefs = belief_propagation.infer(
        edges,
        groups,
        lambda_s,
        lambda_bag,
        bag_factor=options.bag_factor,
        damping=options.damping,
        max_iterations=options.max_iterations,
        tolerance=options.tolerance,
      )
      score = _neighbour_score(
        beliefs.log_odds, near_validation, k, data.validation, score=data.score
      )
      found.append(((k, lambda_s, lambda_bag, score, *beliefs[1:]), beliefs.probability))
  candidates = [Candidate(*(np.asarray(value).item() for value in row)) for row, _ in found]
  best = int(np.argmax(np.nan_to_num([c.score for c in candidates], nan=-np.inf)))
  probability = np.empty(len(order), np.float32)
  probability[order] = found[best][1]
  return candidates, candidates[best], probability


@functools.partial(jax.jit, static_argnames=("score",))
def _neighbour_score(log_odds, near, k, validation, *, score) -> jax.Array:
  """The score of the mean mu of the k nearest training rows; near [v, largest k]."""
  mu = jnp.where(jnp.arange(near.shape[1]) < k, jax.nn.sigmoid(log_odds)[near], 0.0)
  return score(mu.sum(axis=1) / k, validation)


def pseudo_labels(
  probability: np.ndarray, bags: np.ndarray, counts: np.ndarray, kind: str, tau: float = 0.5
) -> np.ndarray:
  """Labels [n] in [0, 1], float32; see `Options.pseudo_labels`."""
  if kind == "soft":
    return probability.astype(np.float32)
  if kind == "hard":
    return (probability >= tau).astype(np.float32)
  order = np.lexsort((-probability, bags))
  sizes = np.bincount(bags)
  rank = np.empty(len(bags), np.int64)
  rank[order] = np.arange(len(bags)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  return (rank < np.asarray(counts)[bags]).astype(np.float32)


def train_classifier(
  key: jax.Array,
  data: Bagged,
  batches: training.Batches,
  target: np.ndarray,
  loss: Callable,
  options: Options,
  strength: float | None = None,
) -> training.Trained:
  """Trains at all learning rates and weight decays; `strength` is lambda_a unless given."""
  pairs = np.array(list(itertools.product(options.learning_rate, options.weight_decay)), np.float32)
  strength = options.lambda_a if strength is None else strength
  settings = training.Settings(*pairs.T, np.full(len(pairs), strength, np.float32))
  init_key, loss_key = jax.random.split(key)
  network = {"encoder": options.encoder, "hidden": tuple(options.hidden)}
  return training.train(
    loss_key,
    training.initialise(init_key, in_features=data.x.shape[1], **network),
    data.x,
    np.asarray(target, np.float32),
    batches,
    data.validation_x,
    data.validation,
    settings,
    loss=loss,
    score=data.score,
    validations=options.validations,
    **network,
  )


def predict(
  trained: training.Trained, x: np.ndarray, options: Options
) -> tuple[np.ndarray, np.ndarray]:
  """Probabilities [n] and embeddings [n, hidden[-1]]."""
  outputs = training.apply(trained.params, x, encoder=options.encoder, hidden=tuple(options.hidden))
  return tuple(map(np.asarray, outputs))
