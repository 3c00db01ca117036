"""Vision transformers after FPQ: top-1 of a checkpoint on images, of small ones on digits."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common.checkpoints.huggingface import Checkpoint
from common.data.images import centre_crop, load_preprocessing
from common.errors import UserError
from common.evaluation.image_classification import Images, accuracy, open_classifier
from common.models.vit import VisionTransformer, VisionTransformerConfig
from common.reporting.measurements import Measurements
from common.reporting.report import Claim, Column, Report, Table
from common.training.optimizer import make_optimizer
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

Array = jax.Array

BATCH_SIZE = 64
CALIBRATION_IMAGES = 32  # Of the digits.
FULL_PRECISION = "full precision"

# Top-1 on ImageNet (the paper's Table 3): method, bits -> DeiT-S, DeiT-B, ViT-S.
PAPER = {
  (FULL_PRECISION, None): (79.9, 81.8, 81.4),
  (MINMAX_FP, 6): (79.3, 81.7, 80.7),
  (BASELINE, 6): (79.43, 81.7, 80.9),
  (FPQ, 6): (79.5, 81.8, 81.1),
  (MINMAX_FP, 4): (0.4, 0.1, 0.1),
  (BASELINE, 4): (6.57, 0.71, 0.3),
  (FPQ, 4): (75.0, 79.4, 73.2),
}
PAPER_MODELS = ("DeiT-S", "DeiT-B", "ViT-S")
METHODS = (MINMAX_INT, *FLOAT_METHODS)

# FPQ on digits with one of the options for vision transformers changed.
DIGITS_ABLATIONS = {
  "products in full precision": {"attention_products": False},
  "metric: mean squared error": {"metric": "l2"},
}


def compare_on_digits(config: ConfigDict, measurements: Measurements, report: Report) -> None:
  """Adds the table and claims of small models trained here, one per seed."""
  bits, top1, changed = config.bits, {}, {}
  for seed in config.seeds:
    top1_of_seed = functools.partial(top1_on_digits, config, seed)
    for name, value in measurements.get(f"digits, seed {seed}", top1_of_seed).items():
      (changed if name in DIGITS_ABLATIONS else top1).setdefault(name, []).append(value)
  report.tables.append(
    Table(
      f"Vision transformers on digits, W{bits}A{bits}",
      ["method", Column("top-1, %", ".2f"), Column("sd over seeds", ".2f")],
      [[name, *mean_and_spread(values)] for name, values in top1.items()],
      note=(
        f"{len(config.seeds)} models of two blocks, {config.vision_epochs} epochs; "
        f"{CALIBRATION_IMAGES} calibration images, {len(digits(0)[-1])} test images. "
        f"{kept_in_full_precision(config)}"
      ),
    )
  )
  if changed:
    report.tables.append(
      Table(
        f"FPQ on digits with one thing changed, W{bits}A{bits}",
        ["change", Column("top-1, %", ".2f"), Column("sd over seeds", ".2f")],
        [[name, *mean_and_spread(v)] for name, v in {FPQ: top1[FPQ], **changed}.items()],
      )
    )
  report.claims.extend(claims(top1, f"ViT on digits, W{bits}A{bits}"))


def top1_on_digits(config: ConfigDict, seed: int) -> dict[str, float]:
  """{method, or what is changed of FPQ: top-1 in percent} of a model that is trained here."""
  images, labels, test_images, test_labels = digits(seed)
  model = train(config, images, labels, seed)
  quantized = functools.partial(
    quantize, config, model, images[:CALIBRATION_IMAGES], labels[:CALIBRATION_IMAGES], config.bits
  )
  score = functools.partial(digits_top1, images=test_images, labels=test_labels)
  return (
    {FULL_PRECISION: score(model)}
    | {method: score(quantized(method)) for method in METHODS}
    | {
      name: score(quantized(FPQ, **changes))
      for name, changes in (DIGITS_ABLATIONS.items() if config.ablations else ())
    }
  )


def compare_on_images(config: ConfigDict, measurements: Measurements, report: Report) -> None:
  """Adds the table and claims of a checkpoint's top-1 on the images of its classes.

  Raises:
    UserError: the checkpoint or the images are not there, or they do not belong together.
  """
  checkpoint, train_images, test_images = load_together(config)
  inputs = {
    "size": checkpoint.config.image_size,
    "preprocessing": load_preprocessing(config.vision_model),
  }
  model = checkpoint.load_model()
  score = lambda model: (
    100 * accuracy(model, test_images, batch_size=BATCH_SIZE, limit=config.eval_images, **inputs)
  )

  @functools.lru_cache(maxsize=1)
  def calibration(seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(train_images), config.calibration_samples, replace=False)
    samples = [centre_crop(train_images[int(row)], **inputs) for row in chosen]
    images, labels = (jnp.stack([s[name] for s in samples]) for name in ("images", "labels"))
    return images, labels

  full = measurements.get("images, full precision", lambda: score(model))
  top1 = {None: {FULL_PRECISION: [full]}}
  for bits in dict.fromkeys((config.bits, *config.other_bits)):
    top1[bits] = {method: [] for method in METHODS}
    for seed in config.seeds if bits == config.bits else config.seeds[:1]:
      for method, values in top1[bits].items():

        def measure(bits=bits, seed=seed, method=method):
          return score(quantize(config, model, *calibration(seed), bits, method))

        name = f"images, {bits} bits, {method}, seed {seed}"
        values.append(measurements.get(name, measure))
  count = min(config.eval_images or len(test_images), len(test_images))
  missing = (None,) * len(PAPER_MODELS)
  report.tables.append(
    Table(
      f"{config.vision_model} on {config.images}",
      [
        "method",
        "bits W/A",
        Column("top-1, %", ".2f"),
        Column("sd over seeds", ".2f"),
        *(Column(f"paper's {name}, %", ".2f") for name in PAPER_MODELS),
      ],
      [
        [
          name,
          "32/32" if bits is None else f"{bits}/{bits}",
          *mean_and_spread(values),
          *PAPER.get((name, bits), missing),
        ]
        for bits, methods in top1.items()
        for name, values in methods.items()
      ],
      note=(
        f"{count} images of val, {config.calibration_samples} of train for calibration. "
        f"{kept_in_full_precision(config)} The paper's numbers are of ImageNet; its MinMax FP has "
        "E3M2 at 6 bits, E2M3 here."
      ),
    )
  )
  for bits, methods in top1.items():
    if bits is not None:
      report.claims.extend(
        claims(methods, f"{pathlib.Path(config.vision_model).name}, W{bits}A{bits}")
      )


def load_together(config: ConfigDict) -> tuple[Checkpoint, Images, Images]:
  """The opened checkpoint, the images of train and of val, before anything is computed.

  Raises:
    UserError: see `compare_on_images`.
  """
  if config.eval_images < 0:
    raise UserError(f"eval_images={config.eval_images}; expected a number of images, or 0 for all")
  checkpoint, train, val = open_classifier(
    config.vision_model,
    config.images,
    (VisionTransformerConfig,),
    "ViT or DeiT",
    flag="vision_model",
  )
  if not 1 <= config.calibration_samples <= len(train):
    raise UserError(
      f"calibration_samples={config.calibration_samples}; expected 1 to {len(train)}, the images in "
      f"train of {config.images}"
    )
  return checkpoint, train, val


def quantize(
  config: ConfigDict,
  model: VisionTransformer,
  images: Array,
  labels: Array,
  bits: int,
  method: str,
  **changes: object,
) -> VisionTransformer:
  """The model at W{bits}A{bits} by a method of `METHODS`, by calibration images.

  Args:
    config: the run's.
    model: in full precision.
    images, labels: for calibration.
    bits: of weights and activations.
    method: its name.
    **changes: of FPQ's settings.
  """
  if method == MINMAX_INT:
    products = config.attention_products
    return integer_model(model, images, bits, embedding_bits=None, attention_products=products)
  options = classifier_settings(config) | FLOAT_METHODS[method] | changes
  settings = fpq_settings(config, bits, **options)
  return fpq(model, images, settings, embedding_bits=None, labels=labels)


def kept_in_full_precision(config: ConfigDict) -> str:
  """What stays in full precision."""
  if config.attention_products:
    return "The embedding of patches, a convolution, stays in full precision."
  return (
    "The embedding of patches, a convolution, and the products inside attention stay in full "
    "precision."
  )


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
  """Mean and standard deviation; no deviation of one value."""
  return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def claims(top1: dict[str, list[float]], where: str) -> list[Claim]:
  """FPQ against the other floating-point methods. top1: by method and seed, in percent."""
  return [
    Claim.greater(
      f"FPQ keeps a higher top-1 than {name} ({where}, points)", {FPQ: top1[FPQ], name: top1[name]}
    )
    for name in (BASELINE, MINMAX_FP)
  ]


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


def digits_top1(model: VisionTransformer, images: Array, labels: Array) -> float:
  """In percent."""
  return 100 * float(jnp.mean(predict(model, images) == labels))


@nnx.jit
def predict(model: VisionTransformer, images: Array) -> Array:
  """Classes, int32 [batch]."""
  return jnp.argmax(model(images).logits, axis=-1)
