"""Training of the small model, and its adversarial fine-tuning with a regularised length."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from common.training.loop import train
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step
from projects.verbose_images.captions import EOS, IDS, PAD, Images, caption_array, long_texts
from projects.verbose_images.verbose_images import (
  Losses,
  balanced_weights,
  eos_loss,
  project,
  uncertainty_loss,
)
from projects.verbose_images.vlm import VisionLanguageModel, of_steps, teacher_forced

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
  """AdamW with warm-up and cosine decay.

  Attributes:
    text_share: of a batch, texts without image and end. They stand in for the pretraining of a real
      model's decoder: it can go on, and captions teach it when to stop.
    text_length: tokens of such a text.
  """

  num_steps: int
  batch_size: int
  learning_rate: float
  text_share: float
  text_length: int
  weight_decay: float = 0.01

  def optimizer(self) -> optax.GradientTransformation:
    return make_optimizer(
      learning_rate=self.learning_rate,
      num_steps=self.num_steps,
      warmup_steps=self.num_steps // 10,
      final_fraction=0.02,
      weight_decay=self.weight_decay,
    )


@dataclasses.dataclass(frozen=True)
class HardeningSettings:
  """Adversarial fine-tuning.

  Attributes:
    eps: of the training perturbations, in pixels from 0 to 1.
    inner_steps: sign-gradient steps of eps / inner_steps * 1.5 against L1 and L2.
    eos_weight: how often the cross-entropy of EOS counts on perturbed images: what regularises the
      length.
  """

  eps: float
  inner_steps: int
  eos_weight: float


def caption_batches(
  data: Images, settings: TrainingSettings, seed: int
) -> Iterator[dict[str, np.ndarray]]:
  """Batches {images, tokens, has_image} without end; captions are drawn anew each time."""
  rng = np.random.default_rng(seed)
  batch, width = settings.batch_size, settings.text_length
  has_image = np.arange(batch) >= round(settings.text_share * batch)
  while True:
    order = rng.permutation(len(data.pixels))
    for start in range(0, len(order) - batch + 1, batch):
      rows = order[start : start + batch]
      tokens = caption_array(data.attributes[rows], width, rng)
      tokens[~has_image] = long_texts(data.attributes, np.sum(~has_image), width, rng)
      yield {"images": data.pixels[rows], "tokens": tokens, "has_image": has_image}


def cross_entropy(logits: Array, tokens: Array, eos_weight: float = 1.0) -> tuple[Array, Array]:
  """Nats summed over all tokens but PAD, and their number; EOS counts `eos_weight` times."""
  weight = jnp.where(tokens == IDS[EOS], eos_weight, 1.0) * (tokens != IDS[PAD])
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  return jnp.sum(nll * weight), jnp.sum(weight)


def training_step(graphdef: nnx.GraphDef, settings: TrainingSettings) -> StepFn:
  """Cross-entropy of captions; batches are of `caption_batches`."""

  def loss_fn(params, batch, key):
    del key  # No dropout.
    model = nnx.merge(graphdef, params)
    forced = teacher_forced(model, batch["images"], batch["tokens"], batch["has_image"])
    return cross_entropy(of_steps(forced, model.num_prefix)[0], batch["tokens"])

  return make_train_step(loss_fn, settings.optimizer())


def hardening_step(
  graphdef: nnx.GraphDef, settings: TrainingSettings, hardening: HardeningSettings
) -> StepFn:
  """As `training_step`, half of it on images perturbed against L1 and L2 under the true caption."""

  def loss_fn(params, batch, key):
    model = nnx.merge(graphdef, params)
    images, tokens = batch["images"], batch["tokens"]

    def logits_of(images):
      forced = teacher_forced(model, images, tokens, batch["has_image"])
      return of_steps(forced, model.num_prefix)[0]

    def adversary(delta):
      logits, mask = logits_of(images + delta), tokens != IDS[PAD]
      losses = Losses(
        eos=eos_loss(logits, mask, model.eos),
        uncertainty=uncertainty_loss(logits, mask),
        diversity=jnp.ones(len(images)),
        nicg=jnp.zeros(len(images)),
        sponge=jnp.zeros(len(images)),
      )
      weights = balanced_weights(losses, (1.0, 1.0))
      return jnp.sum(weights.eos * losses.eos + losses.uncertainty)

    def descend(_, delta):
      step = 1.5 * hardening.eps / hardening.inner_steps
      return project(delta - step * jnp.sign(jax.grad(adversary)(delta)), images, hardening.eps)

    noise = jax.random.uniform(key, images.shape, minval=-hardening.eps, maxval=hardening.eps)
    start = project(noise, images, hardening.eps)
    delta = jax.lax.fori_loop(0, hardening.inner_steps, descend, start)
    delta = jax.lax.stop_gradient(delta)
    clean, count = cross_entropy(logits_of(images), tokens)
    perturbed, other = cross_entropy(logits_of(images + delta), tokens, hardening.eos_weight)
    # Each half is a mean of its own.
    return clean + perturbed * count / other, 2 * count

  return make_train_step(loss_fn, settings.optimizer())


def fit(
  model: VisionLanguageModel,
  step_fn: StepFn,
  data: Images,
  settings: TrainingSettings,
  *,
  seed: int,
  description: str = "training",
) -> VisionLanguageModel:
  """A trained copy.

  Args:
    model: what to begin with; not modified.
    step_fn: of `training_step` or `hardening_step` with these settings.
    data: training images.
    settings: see `TrainingSettings`.
    seed: of batches and perturbations.
    description: what the progress bar calls it.

  Raises:
    TrainingDiverged: a loss, gradient or parameter was not finite.
  """
  graphdef, params = nnx.split(model)
  state = train(
    init_train_state(params, settings.optimizer(), jax.random.key(seed)),
    step_fn,
    caption_batches(data, settings, seed),
    num_steps=settings.num_steps,
    log_every=settings.num_steps,
    unit="tokens",
    description=description,
  )
  return nnx.merge(graphdef, jax.tree.map(jnp.asarray, state.params))
