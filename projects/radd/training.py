"""Training of the three kinds of models: AdamW, constant rate after warm-up, clipping, EMA."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.models.sharding import batch_sharding
from common.training.loop import train
from common.training.losses import next_token_loss
from common.training.mesh import make_mesh
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step
from projects.radd.radd import Loss, sequence_losses

Array = jax.Array
PyTree = Any


class EmaState(NamedTuple):
  """Attributes: count, int32 []; average, like the parameters."""

  count: Array
  average: PyTree


def parameter_ema(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the parameters; to be chained last.

  average <- d average + (1 - d) params,  d = min(decay, (1 + n) / (10 + n)) at update n = 1, ...
  """

  def init(params):
    return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

  def update(updates, state, params):
    count = state.count + 1
    d = jnp.minimum(decay, (1 + count) / (10 + count))
    new = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, state.average, new)
    return updates, EmaState(count, average)

  return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """Adam with betas (b1, b2), no weight decay; the rate grows for `warmup_steps` and then stays."""

  num_steps: int
  learning_rate: float = 3e-4
  warmup_steps: int = 2500
  b1: float = 0.9
  b2: float = 0.999
  clip_norm: float = 1.0
  ema_decay: float = 0.9999
  accumulate_steps: int = 1
  compute_dtype: str = "float32"
  schedule: str = "log_linear"

  def optimizer(self) -> optax.GradientTransformation:
    adam = make_optimizer(
      learning_rate=self.learning_rate,
      num_steps=self.num_steps,
      warmup_steps=self.warmup_steps,
      final_fraction=1.0,
      b1=self.b1,
      b2=self.b2,
      clip_norm=self.clip_norm,
    )
    return optax.chain(adam, parameter_ema(self.ema_decay))


def train_settings(config: ConfigDict) -> TrainSettings:
  """The settings of a config of this project."""
  return TrainSettings(
    num_steps=config.num_steps,
    learning_rate=config.learning_rate,
    warmup_steps=config.warmup_steps,
    clip_norm=config.clip_norm,
    ema_decay=config.ema_decay,
    accumulate_steps=config.accumulate_steps,
    compute_dtype=config.compute_dtype,
    schedule=config.schedule,
  )


def with_start(tokens: Array, mask_token: int) -> Array:
  """Rows with M before them, [batch, 1 + seq]: what the autoregressive model begins with."""
  return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=mask_token)


def make_step(
  graphdef: nnx.GraphDef, loss: Loss | None, mask_token: int, settings: TrainSettings, **options
) -> StepFn:
  """The jitted training step on batches {"tokens": int32 [batch, seq]}.

  The loss is nats per sequence, as in the official code, so that clipping is alike.

  Args:
    graphdef: of the model.
    loss: of a `Denoiser`; None for next-token prediction by a decoder.
    mask_token: M.
    settings: how.
    options: of `make_train_step`.
  """

  def loss_fn(params, batch, key):
    model, tokens = nnx.merge(graphdef, params), batch["tokens"]
    rows = jnp.float32(len(tokens))
    if loss is None:
      rows_with_start = with_start(tokens, mask_token)
      logits, _ = model(rows_with_start)
      total, _ = next_token_loss(logits, rows_with_start, jnp.ones_like(rows_with_start))
      return total, rows
    losses = sequence_losses(loss, model, mask_token, tokens, key, settings.schedule)
    return losses.sum(), rows

  return make_train_step(
    loss_fn,
    settings.optimizer(),
    accumulate_steps=settings.accumulate_steps,
    compute_dtype=None
    if settings.compute_dtype == "float32"
    else jnp.dtype(settings.compute_dtype),
    **options,
  )


def train_model(
  model: nnx.Module,
  step_fn: StepFn,
  batches: Iterable[dict],
  settings: TrainSettings,
  *,
  seed: int,
  workdir: pathlib.Path | None = None,
  save_every: int | None = None,
  description: str = "training",
) -> nnx.Module:
  """The model with the moving average of its trained parameters.

  Every device has all parameters and its share of the rows.

  Args:
    model: at its initialisation, not modified.
    step_fn: of `make_step`.
    batches: see `make_step`.
    settings: as of the step.
    seed: of masks, noise levels and dropout.
    workdir, save_every, description: see `common.training.loop.train`.

  Raises:
    TrainingDiverged: a loss, gradient or parameter was not finite.
  """
  graphdef, params = nnx.split(model)
  state = init_train_state(params, settings.optimizer(), jax.random.key(seed))
  sharding = None
  mesh = jax.sharding.get_mesh()
  if mesh.empty and jax.device_count() > 1:
    mesh = make_mesh({"data": -1})
  if not mesh.empty:
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    sharding = batch_sharding(mesh)
  state = train(
    state,
    step_fn,
    iter(batches),
    num_steps=settings.num_steps,
    workdir=workdir,
    save_every=save_every,
    keep=1,
    log_every=min(100, settings.num_steps),
    batch_sharding=sharding,
    unit="sequences",
    description=description,
    quiet=workdir is None,
  )
  _, ema = state.opt_state
  return nnx.merge(graphdef, ema.average)


def num_parameters(model: nnx.Module) -> int:
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
