"""A Transformer that reads (x_1, y_1, ..., x_t) and says the mean and the sd of y_t; its training.

Decoder-only, GPT-2 style (pre-LayerNorm, GELU, learned positions), two numbers at every x_t:

  yhat_t,   sigma_hat_t = softplus(raw_t) + 1e-6

trained on the bi-objective loss, the average over t of

  log sigma_hat_t + (y_t - yhat_t)^2 / (2 sigma_hat_t^2),

which E[y_t | H_t] and Var(y_t | H_t) minimise. Every step has a fresh batch of prompts.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from common.models.decoder import Block, DecoderConfig, make_context
from common.training.optimizer import make_optimizer
from common.training.progress import Progress
from common.training.train_step import TrainState, make_train_step
from projects.icl_uncertainty.metrics import Prediction, gaussian_nll
from projects.icl_uncertainty.prompts import PromptDistribution, Prompts, sample_prompts

Array = jax.Array

# Against collapse and explosion early in the training.
LOG_SD_LIMIT = 5.0


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Of the Transformer.

  Attributes:
    dim: d, covariates.
    max_length: rows of the table of positions, in labels: the longest prompt.
    hidden_size, num_layers, num_heads: of the blocks.
    positions: whether tokens know where they are.
    window: S, how many last tokens a token sees, itself included; None: all.
    merged_tokens: token t is (x_t, x_{t-1}, y_{t-1}), T tokens, instead of x_1, y_1, x_2, ..., 2 T
      tokens.
  """

  dim: int
  max_length: int
  hidden_size: int
  num_layers: int
  num_heads: int
  positions: bool = True
  window: int | None = None
  merged_tokens: bool = False

  def __post_init__(self):
    if self.hidden_size % self.num_heads:
      raise UserError(
        f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
      )
    if self.window is not None and self.window < 1:
      raise UserError(f"window={self.window} must be at least 1 token, or 0 for all tokens")

  def decoder(self) -> DecoderConfig:
    """The blocks'. "learned" positions are added to the tokens: the blocks have none."""
    return DecoderConfig(
      vocab_size=1,  # Tokens are vectors.
      hidden_size=self.hidden_size,
      intermediate_size=4 * self.hidden_size,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_heads,
      head_dim=self.hidden_size // self.num_heads,
      max_position_embeddings=self.max_length,
      norm="layer",
      norm_eps=1e-5,
      activation="gelu_tanh",
      gated_mlp=False,
      qkv_bias=True,
      attention_out_bias=True,
      mlp_bias=True,
      position="learned",
      sliding_window=self.window,
    )


class Transformer(nnx.Module):
  """The two-headed Transformer."""

  def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
    self.architecture = architecture
    config = architecture.decoder()
    width = config.hidden_size
    dim, merged = architecture.dim, architecture.merged_tokens
    self.project_in = nnx.Linear(2 * dim + 1 if merged else dim, width, rngs=rngs)
    rows = architecture.max_length * (1 if merged else 2)
    init = nnx.initializers.normal(0.02)
    self.embed_positions = (
      nnx.Embed(rows, width, embedding_init=init, rngs=rngs) if architecture.positions else None
    )
    self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
    self.final_norm = nnx.LayerNorm(width, epsilon=config.norm_eps, rngs=rngs)
    self.project_out = nnx.Linear(width, 2, rngs=rngs)

  def __call__(self, x: Array, y: Array) -> Prediction:
    """Predicts every label from the ones before it.

    Args:
      x: [batch, T, d].
      y: [batch, T]; y_t is read only by the outputs after t, so that the last may be anything.

    Returns:
      [batch, T], float32.
    """
    tokens = merge(x, y) if self.architecture.merged_tokens else alternate(x, y)
    positions = jnp.arange(tokens.shape[1])[None]
    context, _ = make_context(self.architecture.decoder(), positions, jnp.ones_like(positions))
    h = self.project_in(tokens)
    if self.embed_positions is not None:
      h = h + self.embed_positions(positions)
    for block in self.blocks:
      h, _ = block(h, context)
    if not self.architecture.merged_tokens:
      h = h[:, ::2]  # Outputs are read at the x tokens.
    mean, raw = jnp.moveaxis(self.project_out(self.final_norm(h)).astype(jnp.float32), -1, 0)
    sd = jax.nn.softplus(raw) + 1e-6
    return Prediction(mean, jnp.clip(sd, jnp.exp(-LOG_SD_LIMIT), jnp.exp(LOG_SD_LIMIT)))


def merge(x: Array, y: Array) -> Array:
  """Token t is (x_t, x_{t-1}, y_{t-1}), with x_0 = y_0 = 0: [batch, T, 2 d + 1].

  y_t is not visible at its own output, and a label stands beside its covariates: no layer has to
  bring them together.
  """
  before = jnp.pad(jnp.concatenate([x, y[..., None]], axis=-1), ((0, 0), (1, 0), (0, 0)))[:, :-1]
  return jnp.concatenate([x, before], axis=-1)


def alternate(x: Array, y: Array) -> Array:
  """x_1, (y_1, 0, ..., 0), x_2, (y_2, 0, ..., 0), ...: [batch, 2 T, d]."""
  batch, length, dim = x.shape
  labels = jnp.zeros_like(x).at[..., 0].set(y)
  return jnp.stack([x, labels], axis=2).reshape(batch, 2 * length, dim)


@dataclasses.dataclass(frozen=True)
class Training:
  """How a Transformer is trained.

  Attributes:
    steps, batch, length: number of steps, prompts in each, labels T in each prompt.
    learning_rate, final_learning_rate, warmup: AdamW's, with a cosine between them.
    b1, b2, weight_decay: AdamW's.
  """

  steps: int
  batch: int
  length: int
  learning_rate: float
  final_learning_rate: float
  warmup: int
  b1: float
  b2: float
  weight_decay: float

  def optimizer(self):
    return make_optimizer(
      learning_rate=self.learning_rate,
      num_steps=self.steps,
      warmup_steps=self.warmup,
      final_fraction=self.final_learning_rate / self.learning_rate,
      weight_decay=self.weight_decay,
      b1=self.b1,
      b2=self.b2,
      clip_norm=1.0,
    )


class Model(NamedTuple):
  """What is trained: `prompts` changes the fields of the fresh-task `PromptDistribution`."""

  architecture: Architecture
  training: Training
  prompts: dict
  mean_only: bool = False


@functools.cache
def abstract_transformer(architecture: Architecture) -> tuple[nnx.GraphDef, nnx.State]:
  """The program of the Transformer, and the shapes of its parameters."""
  return nnx.split(nnx.eval_shape(lambda: Transformer(architecture, rngs=nnx.Rngs(0))))


def init_params(architecture: Architecture, key: Array):
  """Kernels ~ N(0, 1 / fan_in), positions ~ N(0, 0.02^2), biases 0, scales of norms 1.

  One draw for all: every call of the generator is inlined, and takes long to compile.
  """
  shapes = abstract_transformer(architecture)[1]
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  draws, start = jax.random.normal(key, (total,)), 0

  def initial(path, leaf):
    nonlocal start
    kind = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    size = math.prod(leaf.shape)
    draw, start = draws[start : start + size].reshape(leaf.shape), start + size
    if "kernel" in kind:
      return draw / leaf.shape[0] ** 0.5
    if "embedding" in kind:
      return 0.02 * draw
    return jnp.ones(leaf.shape) if "scale" in kind else jnp.zeros(leaf.shape)

  return jax.tree.map_with_path(initial, shapes)


@functools.partial(jax.jit, static_argnames=("architecture", "training"))
def init_states(architecture: Architecture, training: Training, keys: Array) -> TrainState:
  """States at step 0, one for each key: parameters, AdamW's moments, the key of the prompts."""

  def init(key):
    params_key, prompts_key = jax.random.split(key)
    params = init_params(architecture, params_key)
    return TrainState(
      jnp.zeros((), jnp.int32), params, training.optimizer().init(params), prompts_key
    )

  return jax.vmap(init)(keys)


@functools.partial(jax.jit, static_argnames=("steps", "training", "dim"))
def sample_batches(
  keys: Array,
  first_step: Array,
  distributions: PromptDistribution,
  *,
  steps: int,
  training: Training,
  dim: int,
) -> Prompts:
  """Fresh prompts of the next `steps` steps of several models: [models, steps, batch, ...]."""

  def one_model(key, distribution):
    key = jax.random.fold_in(key, first_step)
    prompts = sample_prompts(key, distribution, steps * training.batch, training.length, dim)
    return jax.tree.map(lambda a: a.reshape(steps, training.batch, *a.shape[1:]), prompts)

  return jax.vmap(one_model)(keys, distributions)


def make_update(architecture: Architecture, training: Training) -> Callable:
  """`update(state, prompts, mean_only) -> (state, metrics)`: a step of AdamW on the loss.

  `mean_only` (bool []) is the ablation without the variance head: the loss is (y - yhat)^2 / 2.
  """
  graphdef, _ = abstract_transformer(architecture)

  def loss_fn(params, prompts: Prompts, key, mean_only):
    del key  # No dropout.
    prediction = nnx.merge(graphdef, params)(prompts.x, prompts.y)
    squared = 0.5 * (prompts.y - prediction.mean) ** 2
    losses = jnp.where(mean_only, squared, gaussian_nll(prediction, prompts.y))
    return jnp.sum(losses * prompts.counted), jnp.sum(prompts.counted)

  return make_train_step(loss_fn, training.optimizer())


def scan_updates(update: Callable, state: TrainState, prompts: Prompts, mean_only: Array):
  """An update for each of the batches [steps, batch, ...]; returns the state and mean metrics."""
  step = lambda state, batch: update(state, batch, mean_only)
  state, metrics = jax.lax.scan(step, state, prompts)
  return state, jax.tree.map(jnp.mean, metrics)


@functools.cache
def make_chunk(architecture: Architecture, training: Training) -> Callable:
  """`scan_updates` of several models side by side: one compiled program for each architecture."""
  chunk = functools.partial(scan_updates, make_update(architecture, training))
  return jax.jit(jax.vmap(chunk, in_axes=(0, 0, None)), donate_argnums=0)


def train(
  models: dict[str, Model],
  distributions: dict[str, PromptDistribution],
  keys: Array,
  *,
  chunk: int = 100,
  quiet: bool = False,
) -> dict:
  """Trains every model from every key, `chunk` steps of each model in turn.

  The seeds of a model are one program. Its products are too small for XLA to share them out over
  the cores of a CPU: each core runs the program of another model.

  Args:
    models: by name; all have the same number of steps.
    distributions: of each model's prompts; every leaf has a leading axis [seeds].
    keys: of initial parameters and prompts, [seeds].
    chunk: steps between two looks at the loss; it must divide the number of steps.
    quiet: no progress bar.

  Returns:
    The parameters by name, every leaf [seeds, ...].

  Raises:
    UserError: a loss is not finite, or the sizes do not fit.
  """
  for name, (architecture, training, *_) in models.items():
    if training.steps % chunk:
      raise UserError(f"steps={training.steps} must be a multiple of chunk={chunk}")
    if training.length > architecture.max_length:
      raise UserError(
        f"{name}: prompts of {training.length} labels exceed {architecture.max_length}"
      )
  first = next(iter(models.values())).training
  states = {
    name: init_states(model.architecture, model.training, keys) for name, model in models.items()
  }

  def advance(name: str, done: int) -> np.ndarray:
    """`chunk` steps of one model; the mean losses [seeds], once they are there."""
    architecture, training, *_ = models[name]
    prompts = sample_batches(
      states[name].key,
      done,
      distributions[name],
      steps=chunk,
      training=training,
      dim=architecture.dim,
    )
    run = make_chunk(architecture, training)
    states[name], metrics = run(states[name], prompts, models[name].mean_only)
    return np.asarray(metrics["loss"])

  with (
    Progress("training", 0, first.steps, "prompts", quiet) as progress,
    concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as cores,
  ):
    started = None
    for done in range(0, first.steps, chunk):
      # The first time in one thread: two would compile the same program twice.
      each = cores.map if done else map
      losses = np.stack(list(each(advance, models, [done] * len(models))))
      for name, loss in zip(models, losses):
        if not np.isfinite(loss).all():
          raise UserError(
            f"the training of {name} diverged: the last losses are {loss}; lower learning_rate="
            f"{first.learning_rate:g} or lengthen warmup={first.warmup}"
          )
      now = time.perf_counter()
      speed = done / (now - started) if started else None
      started = started or now
      rate = None if speed is None else speed * first.batch * losses.size
      progress.report(done + chunk, {"loss": float(losses.mean())}, speed, rate)
  return {name: state.params for name, state in states.items()}
