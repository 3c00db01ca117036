"""Small vision transformers on scikit-learn's digits: data, pretraining, epochs of training.

1,797 images of 8 x 8 pixels; a seed holds out a third of each class. Training images are shifted
by at most one pixel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common.models.vit import VisionTransformer, VisionTransformerConfig
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, TrainState, init_train_state, make_train_step
from projects.ofq.ofq import block_layers, near_threshold
from projects.ofq.oscillation import OSCILLATION_THRESHOLD
from projects.ofq.training import NO_DECAY, TrainingSettings, dampening_weight, make_qat_step

Array = jax.Array

TEST_IMAGES = 597


class Digits(NamedTuple):
  """Standardised images and their labels.

  Attributes:
    shifted: float32 [9, train, 8, 8, 1], the training images under every shift by -1, 0, 1 pixels.
    labels: int32 [train].
    test_images: float32 [test, 8, 8, 1].
    test_labels: int32 [test].
  """

  shifted: Array
  labels: Array
  test_images: Array
  test_labels: Array


class EpochMetrics(NamedTuple):
  """After an epoch, arrays [].

  Attributes:
    loss: mean training loss.
    oscillating: {path: share of its weights that oscillate}.
    scales: {path: mean scale of its channels}.
  """

  loss: Array
  oscillating: dict[str, Array]
  scales: dict[str, Array]


def load(seed: int) -> Digits:
  """The split of a seed."""
  images, labels = load_digits(return_X_y=True)
  train, test, train_labels, test_labels = train_test_split(
    images.reshape(-1, 8, 8, 1), labels, test_size=TEST_IMAGES, random_state=seed, stratify=labels
  )
  padded = np.pad(train, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = np.stack([padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
  standard = lambda x: jnp.asarray((x - train.mean()) / train.std(), jnp.float32)
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  return Digits(standard(shifted), as_int(train_labels), standard(test), as_int(test_labels))


def vit_config(hidden_size: int, num_layers: int, num_heads: int, patch_size: int):
  """A ViT for the digits."""
  return VisionTransformerConfig(
    image_size=(8, 8),
    patch_size=(patch_size, patch_size),
    hidden_size=hidden_size,
    intermediate_size=2 * hidden_size,
    num_layers=num_layers,
    num_heads=num_heads,
    num_channels=1,
    norm_eps=1e-6,
    head="classification",
    labels=tuple(map(str, range(10))),
  )


def draw_epoch(key: Array, data: Digits, batch_size: int) -> tuple[Array, Array]:
  """Shifts and rows of an epoch's batches, int32 [steps, batch] each; the last part is dropped."""
  shift_key, order_key = jax.random.split(key)
  count = len(data.labels)
  steps = count // batch_size
  rows = jax.random.permutation(order_key, count)[: steps * batch_size]
  shifts = jax.random.randint(shift_key, rows.shape, 0, len(data.shifted))
  return shifts.reshape(steps, -1), rows.reshape(steps, -1)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(graphdef: nnx.GraphDef, params, data: Digits) -> tuple[Array, Array]:
  """Classes of the test images, int32 [test], and the share that is right, float32 []."""
  classes = jnp.argmax(nnx.merge(graphdef, params)(data.test_images).logits, axis=-1)
  return classes, jnp.mean(classes == data.test_labels)


# One program; the optimizer's state of every parameter is otherwise made by programs of its own.
start_training = jax.jit(init_train_state, static_argnums=1)


def _scan_epoch(step_fn: StepFn, state: TrainState, data: Digits, batch_size: int):
  def step(state, drawn):
    shifts, rows = drawn
    batch = {"images": data.shifted[shifts, rows], "labels": data.labels[rows]}
    state, metrics = step_fn(state, batch)
    return state, metrics["loss"]

  drawn = draw_epoch(jax.random.fold_in(state.key, state.step), data, batch_size)
  return jax.lax.scan(step, state, drawn)


def pretrain(
  config: VisionTransformerConfig,
  data: Digits,
  seed: int,
  *,
  epochs: int,
  batch_size: int,
  learning_rate: float,
) -> tuple[VisionTransformer, float]:
  """A full-precision model and its accuracy."""
  model = VisionTransformer(config, rngs=nnx.Rngs(seed))
  graphdef, params = nnx.split(model)
  num_steps = epochs * (len(data.labels) // batch_size)
  run, optimizer = _pretraining(graphdef, epochs, num_steps, batch_size, learning_rate)
  state = run(start_training(params, optimizer, jax.random.key(seed)), data)
  accuracy = evaluate(graphdef, state.params, data)[1]
  return nnx.merge(graphdef, state.params), float(accuracy)


@functools.cache
def _pretraining(graphdef, epochs: int, num_steps: int, batch_size: int, learning_rate: float):
  optimizer = make_optimizer(
    learning_rate=learning_rate,
    num_steps=num_steps,
    warmup_steps=num_steps // 10,
    final_fraction=0.02,
    weight_decay=0.05,
    no_decay=NO_DECAY,
    b2=0.999,
  )

  def loss_fn(params, batch, key):
    del key  # No dropout.
    logits = nnx.merge(graphdef, params)(batch["images"]).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.sum(losses), jnp.float32(len(losses))

  step_fn = make_train_step(loss_fn, optimizer)

  @jax.jit
  def run(state, data):
    epoch = lambda state, _: _scan_epoch(step_fn, state, data, batch_size)
    return jax.lax.scan(epoch, state, None, length=epochs)[0]

  return run, optimizer


@functools.cache
def make_epoch(
  graphdef: nnx.GraphDef,
  teacher_graphdef: nnx.GraphDef,
  settings: TrainingSettings,
  batch_size: int,
):
  """`epoch(state, data, teacher_params, dampening) -> (state, EpochMetrics)` and its optimizer.

  `dampening` is the final weight of the dampening loss, float32 [], or None without it.
  """
  step_fn, optimizer = make_qat_step(graphdef, teacher_graphdef, settings)

  @jax.jit
  def epoch(state, data, teacher_params, dampening):
    def step(state, batch):
      weight = dampening
      if dampening is not None:
        weight = dampening_weight(state.step, dampening, settings.num_steps)
      return step_fn(state, batch, teacher_params, weight)

    state, losses = _scan_epoch(step, state, data, batch_size)
    model = nnx.merge(graphdef, state.params)
    share = lambda o: jnp.mean(o.frequency > OSCILLATION_THRESHOLD)
    metrics = EpochMetrics(
      loss=jnp.mean(losses),
      oscillating={p: share(o) for p, o in state.opt_state.oscillation.items()},
      scales={
        path: jnp.mean(layer.weight_quantizer.scale(layer.latent()))
        for path, layer in block_layers(model).items()
      },
    )
    return state, metrics

  return epoch, optimizer


@functools.partial(jax.jit, static_argnums=(0, 2))
def threshold_histogram(graphdef: nnx.GraphDef, params, bins: int) -> tuple[Array, Array]:
  """How far the blocks' weights lie from the nearest threshold, in distances between levels.

  Returns:
    (share of the weights in equal bins of [0, 1/2], float32 [bins]; share within 0.005, []).
    StatsQ's clipped weights may be further away and are then in no bin; LSQ's are in the last.
  """
  distances, near, total = [], jnp.zeros(()), 0
  for layer in block_layers(nnx.merge(graphdef, params)).values():
    bits, position = layer.weight_quantizer.bits, layer.weight_quantizer.position(layer.latent())
    n = 2 ** (bits - 1)
    threshold = jnp.clip(jnp.floor(position) + 0.5, -n + 0.5, n - 1.5)
    distances.append(jnp.abs(position - threshold).ravel())
    near += jnp.sum(near_threshold(position, bits, 0.005))
    total += position.size
  counts, _ = jnp.histogram(jnp.concatenate(distances), bins, (0.0, 0.5))
  return counts / total, near / total
