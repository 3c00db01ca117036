"""Training a classifier on batches of whole bags, the best of its validations kept."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from projects.llp_bp.losses import Batch
from projects.llp_bp.network import Classifier


class Batches(NamedTuple):
  """T batches of whole bags, packed once; see `Batch`. Rows of padding are n."""

  row: np.ndarray  # int32 [T, R]
  bag_of: np.ndarray  # int32 [T, R]
  count: np.ndarray  # float32 [T, S]
  size: np.ndarray  # float32 [T, S]
  order: np.ndarray  # int32 [steps]: every step's batch.


class Settings(NamedTuple):
  """What is chosen on the validation part, C candidates; each [C]."""

  learning_rate: np.ndarray
  weight_decay: np.ndarray
  strength: np.ndarray  # The loss's own.


@functools.partial(jax.jit, static_argnames=("encoder", "in_features", "hidden"))
def initialise(
  key: jax.Array, *, encoder: str, in_features: int, hidden: tuple[int, ...]
) -> nnx.State:
  """The parameters of a new classifier."""
  return nnx.split(Classifier(encoder, in_features, hidden, rngs=nnx.Rngs(key)))[1]


class Trained(NamedTuple):
  """The best network over candidates and validations."""

  params: nnx.State
  score: jax.Array  # [], its validation score.
  choice: jax.Array  # int32 [], which candidate.


def pack_bags(
  bags: np.ndarray, counts: np.ndarray, rows_per_batch: int, steps: int, rng: np.random.Generator
) -> Batches:
  """Puts whole bags, in random order, into batches of `rows_per_batch` rows, or the largest bag's.

  Which bags share a batch is drawn once, the order of the batches in every epoch.
  """
  n, sizes = len(bags), np.bincount(bags, minlength=len(counts))
  capacity = max(rows_per_batch, int(sizes.max()))
  by_bag = np.split(np.argsort(bags, kind="stable"), np.cumsum(sizes)[:-1])
  batches, room = [], 0
  for bag in rng.permutation(len(counts)):
    if sizes[bag] > room:
      batches.append([])
      room = capacity
    batches[-1].append(bag)
    room -= sizes[bag]
  # At least 32, a power of two: bag sizes of 8 and more share one compiled shape at 256 rows.
  width = 1 << max(5, (max(map(len, batches)) - 1).bit_length())
  row = np.full((len(batches), capacity), n, np.int32)
  bag_of = np.zeros((len(batches), capacity), np.int32)
  count, size = np.zeros((2, len(batches), width), np.float32)
  for t, members in enumerate(batches):
    rows = np.concatenate([by_bag[bag] for bag in members])
    row[t, : len(rows)] = rows
    bag_of[t, : len(rows)] = np.repeat(np.arange(len(members)), sizes[members])
    count[t, : len(members)], size[t, : len(members)] = counts[members], sizes[members]
  epochs = -(-steps // len(batches))
  order = np.concatenate([rng.permutation(len(batches)) for _ in range(epochs)])[:steps]
  return Batches(row, bag_of, count, size, order.astype(np.int32))


@functools.partial(
  jax.jit,
  static_argnames=("loss", "score", "encoder", "hidden", "validations"),
)
def train(
  key: jax.Array,
  start: nnx.State,
  x: jax.Array,
  target: jax.Array,
  batches: Batches,
  validation_x: jax.Array,
  validation: jax.Array,
  settings: Settings,
  *,
  loss: Callable,
  score: Callable,
  encoder: str,
  hidden: tuple[int, ...],
  validations: int,
) -> Trained:
  """AdamW over the batches in their order, all candidate settings side by side.

  Args:
    key: of the loss.
    start: the parameters at the start, from `initialise`.
    x: float32 [n, d].
    target: float32 [n], read by `pseudo_label_loss` only.
    batches: from `pack_bags`.
    validation_x: float32 [v, d].
    validation: passed on to `score`.
    settings: the candidates.
    loss: one of `losses`.
    score: (probabilities [v], validation) -> scalar, higher is better.
    encoder, hidden: of the `Classifier`.
    validations: equal parts that the steps are cut into, each followed by a validation.
  """
  graphdef = _graphdef(encoder, x.shape[1], hidden)
  steps = len(batches.order) // validations * validations
  prior = batches.count.sum() / batches.size.sum()
  padded_x = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])
  padded_target = jnp.append(target, 0.0)

  def batch_of(step):
    t = batches.order[step]
    row, bag_of, count, size = (part[t] for part in batches[:4])
    weight = (row < len(x)).astype(x.dtype)
    return Batch(padded_x[row], padded_target[row], weight, bag_of, count, size, prior)

  def candidate(setting: Settings):
    optimizer = optax.chain(
      optax.scale_by_adam(),
      optax.add_decayed_weights(setting.weight_decay),
      optax.scale_by_learning_rate(setting.learning_rate),
    )

    def update(carry, step):
      params, state = carry
      objective = lambda p: loss(
        nnx.merge(graphdef, p),
        batch_of(step),
        jax.random.fold_in(key, step),
        setting.strength,
      )
      changes, state = optimizer.update(jax.grad(objective)(params), state, params)
      return (optax.apply_updates(params, changes), state), None

    def validate(carry, first_step):
      params, state, best, best_score = carry
      (params, state), _ = jax.lax.scan(
        update, (params, state), first_step + jnp.arange(steps // validations)
      )
      probability = jax.nn.sigmoid(nnx.merge(graphdef, params)(validation_x))
      value = score(probability, validation)
      # A NaN is no improvement: a diverged candidate keeps what it had.
      better = value > best_score
      best = jax.tree.map(lambda a, b: jnp.where(better, a, b), params, best)
      return (params, state, best, jnp.where(better, value, best_score)), None

    first_steps = jnp.arange(validations) * (steps // validations)
    carry = (start, optimizer.init(start), start, jnp.float32(-jnp.inf))
    (_, _, best, best_score), _ = jax.lax.scan(validate, carry, first_steps)
    return best, best_score

  params, scores = jax.vmap(candidate)(Settings(*map(jnp.asarray, settings)))
  choice = scores.argmax()
  return Trained(jax.tree.map(lambda leaf: leaf[choice], params), scores[choice], choice)


@functools.partial(jax.jit, static_argnames=("encoder", "hidden"))
def apply(
  params: nnx.State, x: jax.Array, *, encoder: str, hidden: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Probabilities [n] and embeddings [n, hidden[-1]] of float32 x [n, d]."""
  network = nnx.merge(_graphdef(encoder, x.shape[1], hidden), params)
  phi = network.embed(x)
  return jax.nn.sigmoid(network.head(phi)[:, 0]), phi


def auc(probability: jax.Array, label: jax.Array) -> jax.Array:
  """Area under the ROC curve, ties counted half; float [v] and 0 or 1 [v] -> []."""
  ordered = jnp.sort(probability)
  below = jnp.searchsorted(ordered, probability, side="left")
  upto = jnp.searchsorted(ordered, probability, side="right")
  rank = (below + upto + 1) / 2
  positives = label.sum()
  pairs = positives * (len(label) - positives)
  return ((rank * label).sum() - positives * (positives + 1) / 2) / pairs


def bag_fit(
  probability: jax.Array, validation: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
  """Minus the mean cross-entropy of held-out bags' shares; for users, who have no labels.

  probability [v]; validation: bag of every row [v], counts [B], sizes [B] -> [].
  """
  bag_of, count, size = validation
  mean = jax.ops.segment_sum(probability, bag_of, len(size)) / size
  mean, share = jnp.clip(mean, 1e-6, 1 - 1e-6), count / size
  return jnp.mean(share * jnp.log(mean) + (1 - share) * jnp.log(1 - mean))


def _graphdef(encoder: str, in_features: int, hidden: tuple[int, ...]) -> nnx.GraphDef:
  make = lambda: Classifier(encoder, in_features, hidden, rngs=nnx.Rngs(0))
  return nnx.split(nnx.eval_shape(make))[0]
