"""Small vision transformers on scikit-learn's digits, one trained per seed: top-1 after FPQ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common.models.vit import VisionTransformer, VisionTransformerConfig
from common.reporting.report import Claim, Column, Report, Table
from common.training.optimizer import make_optimizer
from projects.llm_fp4.methods import (
  BASELINE,
  FLOAT_METHODS,
  FPQ,
  MINMAX_FP,
  MINMAX_INT,
  fpq_settings,
  integer_model,
)
from projects.llm_fp4.models import fpq

Array = jax.Array

BATCH_SIZE = 64
CALIBRATION_IMAGES = 32


def compare_on_vision(config: ConfigDict, report: Report) -> None:
  """Adds the vision transformers' table and claims."""
  bits, accuracies = config.bits, {}
  for seed in config.seeds:
    images, labels, test_images, test_labels = digits(seed)
    model = train(config, images, labels, seed)
    calibration = images[:CALIBRATION_IMAGES]
    models = {
      "full precision": model,
      MINMAX_INT: integer_model(model, calibration, bits, embedding_bits=None),
    }
    for name, changes in FLOAT_METHODS.items():
      settings = fpq_settings(config, bits, **changes)
      models[name] = fpq(model, calibration, settings, embedding_bits=None)
    for name, candidate in models.items():
      right = jnp.mean(predict(candidate, test_images) == test_labels)
      accuracies.setdefault(name, []).append(100 * float(right))
  spread = lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else None
  report.tables.append(
    Table(
      f"Vision transformers on digits, W{bits}A{bits}",
      ["method", Column("top-1, %", ".2f"), Column("sd over seeds", ".2f")],
      [[name, float(np.mean(v)), spread(v)] for name, v in accuracies.items()],
      note=(
        f"{len(config.seeds)} models of two blocks, {config.vision_epochs} epochs; "
        f"{CALIBRATION_IMAGES} calibration images, {len(test_labels)} test images. The embedding of "
        "patches, a convolution, and the products inside attention stay in full precision."
      ),
    )
  )
  for name in (BASELINE, MINMAX_FP):
    report.claims.append(
      Claim.greater(
        f"FPQ keeps a higher top-1 than {name} (ViT on digits, W{bits}A{bits}, points)",
        {FPQ: accuracies[FPQ], name: accuracies[name]},
      )
    )


def digits(seed: int) -> tuple[Array, Array, Array, Array]:
  """Standardised images [n, 8, 8, 1] and labels of training, then of a third held out."""
  images, labels = load_digits(return_X_y=True)
  train, test, train_labels, test_labels = train_test_split(
    images.reshape(-1, 8, 8, 1), labels, test_size=1 / 3, random_state=seed, stratify=labels
  )
  standard = lambda x: jnp.asarray((x - train.mean()) / train.std(), jnp.float32)
  return standard(train), jnp.asarray(train_labels), standard(test), jnp.asarray(test_labels)


def vit_config(hidden_size: int) -> VisionTransformerConfig:
  """A ViT of two blocks for the digits, patches of 2 x 2."""
  return VisionTransformerConfig(
    image_size=(8, 8),
    patch_size=(2, 2),
    hidden_size=hidden_size,
    intermediate_size=2 * hidden_size,
    num_layers=2,
    num_heads=4,
    num_channels=1,
    head="classification",
    labels=tuple(map(str, range(10))),
  )


def train(config: ConfigDict, images: Array, labels: Array, seed: int) -> VisionTransformer:
  """A full-precision model, by AdamW."""
  graphdef, params = nnx.split(
    VisionTransformer(vit_config(config.vision_size), rngs=nnx.Rngs(seed))
  )
  trained = _train(graphdef, config.vision_epochs, params, images, labels, jax.random.key(seed))
  return nnx.merge(graphdef, trained)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(graphdef, epochs: int, params, images: Array, labels: Array, key: Array):
  per_epoch = len(labels) // BATCH_SIZE
  optimizer = make_optimizer(
    learning_rate=3e-3,
    num_steps=epochs * per_epoch,
    warmup_steps=per_epoch // 2,
    weight_decay=0.05,
    no_decay=("norm", "bias"),
  )

  def loss(params, rows):
    logits = nnx.merge(graphdef, params)(images[rows]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

  def step(carry, rows):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
    return (optax.apply_updates(params, updates), state), None

  def epoch(carry, key):
    rows = jax.random.permutation(key, len(labels))[: per_epoch * BATCH_SIZE]
    return jax.lax.scan(step, carry, rows.reshape(per_epoch, BATCH_SIZE))

  start = (params, optimizer.init(params))
  return jax.lax.scan(epoch, start, jax.random.split(key, epochs))[0][0]


@nnx.jit
def predict(model: VisionTransformer, images: Array) -> Array:
  """Classes, int32 [batch]."""
  return jnp.argmax(model(images).logits, axis=-1)
