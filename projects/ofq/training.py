"""Quantization-aware training with a full-precision teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.data.augmentation import mix_batch
from common.models.attention import split_heads
from common.models.surgery import get_module, record_inputs
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, make_train_step
from projects.ofq.oscillation import (
  confidence_guided_annealing,
  dampening_loss,
  track_oscillations,
)

Array = jax.Array

# Steps, offsets, tokens and positions are not shrunk by weight decay.
NO_DECAY = ("step", "offset", "token", "embed_positions", "position_bias")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
  """How the quantized model is trained.

  Attributes:
    learning_rate, num_steps, warmup_steps, final_fraction, weight_decay: of `make_optimizer`;
      steps after num_steps go on at the final rate (annealing does).
    boundary_range: BR of confidence-guided annealing.
    label_smoothing: of the hard labels.
    mixup, cutmix: parameters of their Beta distributions; 0 leaves one out.
    freezing_thresholds: of the frequency, at the first and the last step of iterative freezing.
    guidance: weight of Q-ViT's distribution-guided distillation; 0 leaves it out.
  """

  learning_rate: float
  num_steps: int
  warmup_steps: int = 0
  final_fraction: float = 0.02
  weight_decay: float = 0.05
  boundary_range: float = 0.005
  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  freezing_thresholds: tuple[float, float] = (0.04, 0.01)
  guidance: float = 0.0


def head_logits(model: nnx.Module, images: Array) -> tuple[Array, Array]:
  """Logits of the class head and of the distillation head, float32 [batch, labels] each.

  A model with one head gives its logits twice.
  """
  out = model(images)
  if getattr(model, "class_classifier", None) is None:
    return out.logits, out.logits
  class_logits = model.class_classifier(out.hidden[:, 0])
  return class_logits, model.distillation_classifier(out.hidden[:, 1])


def distillation_loss(
  class_logits: Array,
  distillation_logits: Array,
  teacher_logits: Array,
  labels: Array,
  label_smoothing: float = 0.0,
) -> Array:
  """Cross-entropy with the labels plus that with the teacher's softmax, per image [batch].

  Args:
    class_logits, distillation_logits: of the student's two heads, [batch, classes].
    teacher_logits: of the teacher's class head; temperature 1.
    labels: int32 [batch], or float32 probabilities [batch, classes] (mixup).
    label_smoothing: share of the labels' mass that is spread over all classes.
  """
  classes = class_logits.shape[-1]
  targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, classes)
  hard = optax.safe_softmax_cross_entropy(
    class_logits, optax.smooth_labels(targets, label_smoothing)
  )
  soft = optax.safe_softmax_cross_entropy(distillation_logits, jax.nn.softmax(teacher_logits))
  return hard + soft


def guidance_loss(student: list[Array], teacher: list[Array]) -> Array:
  """Q-ViT's distribution-guided distillation: || F_T - F_S || of each similarity pattern, [batch].

  F is x x^T over the tokens of a head, normalised to Frobenius norm 1; the mean is over heads and
  layers.

  Args:
    student, teacher: queries and keys of every layer, [batch, heads, seq, head_dim].
  """

  def pattern(x):
    similarity = jnp.einsum("bhqc,bhkc->bhqk", x, x)
    # The root of a sum of squares has no gradient at 0: the offset keeps off it.
    return similarity / jnp.sqrt(jnp.sum(similarity**2, axis=(-2, -1), keepdims=True) + 1e-12)

  distances = [
    jnp.sqrt(jnp.sum((pattern(s) - pattern(t)) ** 2, axis=(-2, -1)) + 1e-12)
    for s, t in zip(student, teacher, strict=True)
  ]
  return jnp.mean(jnp.stack(distances), axis=(0, 2))


def dampening_weight(step: Array, strength: Array | float, num_steps: int) -> Array:
  """Weight of `dampening_loss`: rises from 0 to `strength` along a cosine, then stays; float32 []."""
  progress = jnp.minimum(step / num_steps, 1.0)
  return strength * (1 - jnp.cos(jnp.pi * progress)) / 2


def make_optimizer_for(
  graphdef: nnx.GraphDef, settings: TrainingSettings
) -> optax.GradientTransformation:
  """AdamW with annealing, iterative freezing and the oscillation tracker around it."""
  adamw = make_optimizer(
    learning_rate=settings.learning_rate,
    num_steps=settings.num_steps,
    warmup_steps=settings.warmup_steps,
    final_fraction=settings.final_fraction,
    weight_decay=settings.weight_decay,
    no_decay=NO_DECAY,
    b2=0.999,
    clip_norm=None,
  )
  first, last = settings.freezing_thresholds
  threshold = optax.cosine_decay_schedule(first, settings.num_steps, alpha=last / first)
  annealed = confidence_guided_annealing(adamw, graphdef, settings.boundary_range)
  return track_oscillations(annealed, graphdef, threshold)


def make_qat_step(
  graphdef: nnx.GraphDef,
  teacher_graphdef: nnx.GraphDef,
  settings: TrainingSettings,
  **train_step_options,
) -> tuple[StepFn, optax.GradientTransformation]:
  """`step(state, batch, teacher_params, dampening)` and the optimizer that made its state.

  Args:
    graphdef, teacher_graphdef: of the quantized model and of the full-precision one.
    settings: of the training.
    train_step_options: of `make_train_step`.

  Returns:
    (step, optimizer). The batch has images float32 [batch, height, width, channels] and labels (see
    `distillation_loss`); dampening is the weight of `dampening_loss`, float32 [], or None without it.
  """

  def loss_fn(params, batch, key, teacher_params, dampening):
    model, teacher = nnx.merge(graphdef, params), nnx.merge(teacher_graphdef, teacher_params)
    images, labels = batch["images"], batch["labels"]
    if settings.mixup or settings.cutmix:
      labels = jax.nn.one_hot(labels, len(model.config.labels))
      images, labels = mix_batch(
        key, images, labels, mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix
      )
    if settings.guidance:
      logits, (queries_keys) = _observe(model, images, _student_queries_and_keys(model))
      teacher_logits, inputs = _observe(teacher, images, _teacher_queries_and_keys(teacher))
      project = lambda path: split_heads(
        get_module(teacher, path)(inputs[path]),
        get_module(teacher, path.rpartition(".")[0]).head_dim,
      )
      targets = [project(path) for path in inputs]
      guidance = guidance_loss(list(queries_keys.values()), targets)
    else:
      logits, teacher_logits = head_logits(model, images), head_logits(teacher, images)
      guidance = jnp.zeros(len(images))
    losses = distillation_loss(*logits, teacher_logits[0], labels, settings.label_smoothing)
    losses = losses + settings.guidance * guidance
    total, count = jnp.sum(losses), jnp.float32(len(images))
    if dampening is not None:
      total += count * dampening * dampening_loss(model)
    return total, count

  optimizer = make_optimizer_for(graphdef, settings)
  return make_train_step(loss_fn, optimizer, **train_step_options), optimizer


def _observe(model: nnx.Module, images: Array, paths: list[str]):
  return record_inputs(model, paths, lambda model: head_logits(model, images))


def _student_queries_and_keys(model) -> list[str]:
  sides = ("query_quantizer", "key_quantizer")
  return [f"blocks.{i}.attention.{side}" for i in range(len(model.blocks)) for side in sides]


def _teacher_queries_and_keys(model) -> list[str]:
  sides = ("q_proj", "k_proj")
  return [f"blocks.{i}.attention.{side}" for i in range(len(model.blocks)) for side in sides]
