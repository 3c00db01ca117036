"""A Transformer's mean and sd of the next label beside Bayes: in distribution and under shifts."""

import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.errors import UserError
from common.reporting.measurements import Measurements
from common.reporting.report import Report
from projects.icl_uncertainty import bayes, comparators, tables
from projects.icl_uncertainty.icl_uncertainty import (
  Architecture,
  Model,
  Training,
  abstract_transformer,
  train,
)
from projects.icl_uncertainty.metrics import Evaluation, Prediction
from projects.icl_uncertainty.prompts import (
  FiniteNoise,
  InverseGammaNoise,
  Noise,
  PromptDistribution,
  Prompts,
  UniformNoise,
  draw_tasks,
  sample_prompts,
)
from projects.icl_uncertainty.tables import (
  BAYES,
  FRESH,
  MEAN_ONLY,
  META,
  NO_POSITIONS,
  PLUG_IN,
  POOL_BAYES,
  RANDOM_LENGTHS,
  pool_name,
)

Array = jax.Array

# Tasks of a pool over which Bayes is summed exactly; larger pools have no reference of their own.
LARGEST_POOL = 4096


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
  """Trains every model, predicts every test set, and reports."""
  check(config)
  params = fit_all(config, Measurements(workdir, config))
  return tables.report(config, workdir, evaluate(config, params))


def check(config: ConfigDict) -> None:
  """Raises a UserError for a config that cannot be run."""
  band = 2 * config.dim
  if not max(band, tables.LATE - 1) < config.length <= config.longest:
    raise UserError(
      f"length={config.length} must be above 2 dim = {band} and at least {tables.LATE}, and at "
      f"most longest={config.longest}"
    )
  if config.longest == config.length:
    raise UserError(f"longest={config.longest} must exceed length={config.length}")
  if not 0 < config.noise_low < config.noise_high:
    raise UserError(
      f"0 < noise_low < noise_high is needed, got {config.noise_low} and {config.noise_high}"
    )
  if not 2 <= config.neighbours < config.length:
    raise UserError(f"neighbours={config.neighbours} must be in [2, length={config.length})")
  if min(config.pools, default=0) < 1:
    raise UserError(f"pools={config.pools} must list at least one size, each at least 1")


def noise_prior(config: ConfigDict) -> Noise:
  """P_sigma of the training.

  Raises:
    UserError: there is no such kind.
  """
  kinds = {
    "uniform": lambda: UniformNoise(config.noise_low, config.noise_high),
    "finite": lambda: FiniteNoise(np.asarray(config.noise_values, np.float32)),
    "inverse_gamma": lambda: InverseGammaNoise(config.noise_shape, config.noise_scale),
  }
  if config.noise not in kinds:
    raise UserError(f"noise={config.noise!r} is unknown: expected {', '.join(kinds)}")
  return kinds[config.noise]()


def models(config: ConfigDict) -> dict[str, Model]:
  """The models of the experiment by name; those with equal sizes share a compiled program."""
  architecture = Architecture(
    dim=config.dim,
    max_length=config.longest,
    hidden_size=config.hidden_size,
    num_layers=config.num_layers,
    num_heads=config.num_heads,
    window=config.window or None,
    merged_tokens=config.merged_tokens,
  )
  training = Training(
    steps=config.steps,
    batch=config.batch,
    length=config.length,
    learning_rate=config.learning_rate,
    final_learning_rate=config.final_learning_rate,
    warmup=config.warmup,
    b1=config.b1,
    b2=config.b2,
    weight_decay=config.weight_decay,
  )
  change = dataclasses.replace
  meta = {"covariate_scale": config.meta_scale, "covariate_shift": config.meta_shift}
  found = {FRESH: Model(architecture, training, {})}
  for size in config.pools:
    found[pool_name(size)] = Model(architecture, training, {"pool_size": size})
  found[META] = Model(architecture, training, meta)
  found[NO_POSITIONS] = Model(change(architecture, positions=False), training, {})
  found[MEAN_ONLY] = Model(architecture, training, {}, mean_only=True)
  for window in config.windows:
    found[f"window of {window}"] = Model(change(architecture, window=window), training, {})
  if config.random_lengths:
    longer = change(training, length=config.longest)
    found[RANDOM_LENGTHS] = Model(architecture, longer, {"length": (1, config.longest)})
  return found


def distribution(config: ConfigDict, use: int, **changes) -> PromptDistribution:
  """Prompts for every seed, leaves [seeds, ...]; `use` 0 is training, others never share tasks."""
  repeat = lambda leaf: np.broadcast_to(leaf, (config.seeds, *np.shape(leaf)))
  base = PromptDistribution(noise_prior(config), pool_key=0)._replace(**changes)
  return jax.tree.map(repeat, base)._replace(pool_key=seed_keys(config, 2 * use))


def seed_keys(config: ConfigDict, use: int) -> Array:
  """A key for every seed, [seeds]; other uses have other keys."""
  return _seed_keys(np.arange(config.seed, config.seed + config.seeds), use)


@jax.jit
def _seed_keys(seeds: Array, use: int) -> Array:
  return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), use))(seeds)


def fit(config: ConfigDict, chosen: dict[str, Model]) -> dict:
  """Trains the models on every seed: parameters by name, with a leading axis [seeds]."""
  prompts = {name: distribution(config, 0, **model.prompts) for name, model in chosen.items()}
  return train(chosen, prompts, seed_keys(config, 1), chunk=config.chunk)


def fit_all(config: ConfigDict, measurements: Measurements) -> dict[str, nnx.State]:
  """`fit` of all models, as many at a time as train together: a kill costs only their training."""
  at_a_time = os.cpu_count() if jax.default_backend() == "cpu" else 1
  chosen, params = list(models(config).items()), {}
  for start in range(0, len(chosen), at_a_time):
    group = dict(chosen[start : start + at_a_time])
    trained = functools.cache(functools.partial(fit, config, group))
    for name, model in group.items():
      plain = lambda name=name, trained=trained: nnx.to_pure_dict(trained()[name])
      kept = measurements.get(f"{name}, trained", plain)
      # Of the same structure, whether it was trained now or before.
      params[name] = jax.tree.map(lambda leaf: leaf, abstract_transformer(model.architecture)[1])
      nnx.replace_by_pure_dict(params[name], kept)
  return params


@functools.partial(jax.jit, static_argnames="architecture")
def predict(architecture: Architecture, params, x: Array, y: Array) -> Prediction:
  """Every seed's model on its own prompts: x [seeds, n, T, d], y [seeds, n, T] -> [seeds, n, T]."""
  graphdef, _ = abstract_transformer(architecture)
  return jax.vmap(lambda params, x, y: nnx.merge(graphdef, params)(x, y))(params, x, y)


def evaluate(config: ConfigDict, params: dict) -> dict[str, Evaluation]:
  """Every test set of the paper's experiments (a) to (d), by name."""
  shifted_noise = UniformNoise(*config.shifted_noise)
  scale, shift = config.shifted_scale, config.shifted_mean
  pools = [pool_name(size) for size in config.pools]
  trained = lambda *names: {name: params[name] for name in names}
  sets = {
    tables.IN_DISTRIBUTION: ({}, params),
    tables.NOISE_SHIFT: ({"noise": shifted_noise}, trained(FRESH, *pools)),
    tables.WEIGHT_SHIFT: ({"weight_scale": config.shifted_weights}, trained(FRESH, *pools)),
    tables.SCALE_SHIFT: ({"covariate_scale": (scale, scale)}, trained(FRESH, META)),
    tables.MEAN_SHIFT: ({"covariate_shift": (shift, shift)}, trained(FRESH, META)),
  }
  found = {
    name: test_set(config, use, changes, models)
    for use, (name, (changes, models)) in enumerate(sets.items(), start=1)
  }
  for size, name in zip(config.pools, pools):
    # Use 0: the very tasks that the model was trained on.
    found[name] = test_set(config, 0, {"pool_size": size}, trained(name), pool_size=size)
  return found


def test_set(
  config: ConfigDict, use: int, changes: dict, params: dict, *, pool_size: int = 0
) -> Evaluation:
  """Draws prompts and predicts them by the models `params` and by everything they stand beside."""
  source = distribution(config, use, **changes)
  size = (config.test_prompts, config.longest, config.dim)
  keys = seed_keys(config, 2 * use + 3)
  prompts = sample_test_prompts(keys, source, size)
  architectures = {name: model.architecture for name, model in models(config).items()}
  predictions = {
    name: predict(architectures[name], params[name], prompts.x, prompts.y) for name in params
  }
  predictions |= references(config, prompts)
  if 0 < pool_size <= LARGEST_POOL:
    indices = jnp.arange(pool_size)
    tasks = jax.vmap(lambda source: draw_tasks(source, indices, config.dim))(source)
    predictions[POOL_BAYES] = pool_reference(prompts.x, prompts.y, *tasks)
  return jax.tree.map(np.asarray, Evaluation(prompts, predictions))


@functools.partial(jax.jit, static_argnames="size")
def sample_test_prompts(keys: Array, source: PromptDistribution, size: tuple) -> Prompts:
  """`sample_prompts` of every seed."""
  return jax.vmap(lambda key, source: sample_prompts(key, source, *size))(keys, source)


@jax.jit
def pool_reference(x: Array, y: Array, weights: Array, sigmas: Array) -> Prediction:
  """`pool_bayes` of every seed's prompts, in a loop over the prompts: the pool may be large."""

  def one_seed(seed):
    x, y, weights, sigmas = seed
    one_prompt = lambda prompt: bayes.pool_bayes(*prompt, weights, sigmas)
    return jax.lax.map(one_prompt, (x, y))

  return jax.lax.map(one_seed, (x, y, weights, sigmas))


def references(config: ConfigDict, prompts: Prompts) -> dict[str, Prediction]:
  """Bayes under the training prior, and the comparators, of every prompt."""
  prior = noise_prior(config)
  sigmas, log_prior = prior.grid(config.grid)
  shape = prompts.y.shape
  x = np.asarray(prompts.x, np.float64).reshape(-1, *prompts.x.shape[2:])
  y = np.asarray(prompts.y, np.float64).reshape(-1, shape[-1])
  # Residual sums of squares are differences of sums that may be 1e4 times as large.
  with jax.enable_x64(True):
    grid = (sigmas, log_prior, np.asarray(prior.weight_sd(jnp.asarray(sigmas))))
    found = jax.tree.map(np.asarray, _references(x, y, grid, config.neighbours))
  return jax.tree.map(lambda leaf: leaf.reshape(shape).astype(np.float32), found)


@functools.partial(jax.jit, static_argnames="neighbours")
def _references(x: Array, y: Array, grid: tuple, neighbours: int) -> dict[str, Prediction]:
  sigmas, log_prior, weight_sds = grid
  average = lambda values: jnp.sum(jnp.exp(log_prior) * values)
  prior = comparators.PriorKnowledge(
    sigmas.min(), sigmas.max(), average(sigmas**2), average(weight_sds**2)
  )

  def one_prompt(prompt):
    x, y = prompt
    moments = bayes.prefix_moments(x, y)
    return {
      BAYES: bayes.grid_bayes(moments, *grid),
      PLUG_IN: comparators.ridge_plug_in(moments, prior),
      "ridge, mean sigma": comparators.ridge_mean_noise(moments, prior),
      "least squares": comparators.least_squares(moments, x, prior),
      "nearest neighbours": comparators.nearest_neighbours(x, y, prior, neighbours),
      "in-weight": comparators.in_weight(x, prior),
    }

  return jax.lax.map(one_prompt, (x, y), batch_size=min(100, len(x)))
