"""Both stages of training at the config's size, compiled for a TPU slice."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.compilation.step import Step
from common.training.mesh import AXES, make_mesh
from projects.deep_probability import cape
from projects.deep_probability.methods import settings_of
from projects.deep_probability.networks import Network, initialise
from projects.deep_probability.training import Draw, Recipe, train

FACES = 23_705  # Of UTKFace, aligned and cropped.
DIGITS = 1_797


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Stage 1 and CaPE-bin, the draws cut over the slice, the inputs on every device."""
  if config.inputs == "faces":
    network, held_out, rows = Network("resnet18"), FACES // 5, FACES
    train_rows = rows - 2 * held_out
    x = jax.ShapeDtypeStruct((rows, config.image_size, config.image_size, 3), jnp.uint8)
  else:
    network, rows = Network("mlp", 64, tuple(config.hidden)), DIGITS
    train_rows, held_out = config.train, config.validation
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
  mesh = make_mesh({"data": -1}, devices)
  draws = -(-config.draws // len(devices)) * len(devices)
  cut, whole = PartitionSpec(AXES), PartitionSpec()

  def place(spec, leaf, *leading):
    return jax.ShapeDtypeStruct(
      (*leading, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec)
    )

  stacked = functools.partial(jax.tree.map, lambda leaf: place(cut, leaf, draws))
  key = jax.eval_shape(lambda: jax.random.key(0))
  start = stacked(jax.eval_shape(functools.partial(initialise, network), key))
  vector = lambda size, dtype: jax.ShapeDtypeStruct((size,), dtype)
  draw = stacked(
    Draw(
      y=vector(rows, jnp.float32),
      p=vector(rows, jnp.float32),
      train=vector(train_rows, jnp.int32),
      validation=vector(held_out, jnp.int32),
      test=vector(rows - train_rows - held_out, jnp.int32),
    )
  )
  # Keys enter as their words: a program that is cut by hand takes plain arrays.
  words = jax.ShapeDtypeStruct((draws, 2), jnp.uint32, sharding=NamedSharding(mesh, cut))
  x = place(whole, x)

  def step(name: str, settings, recipe: Recipe) -> Step:
    def run(start, words, x, draw):
      keys = jax.random.wrap_key_data(words)
      return train(start, keys, x, draw, recipe, network=network, settings=settings)

    specs = (cut, cut, whole, cut)
    function = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=cut, check_vma=False)
    return Step(
      f"{name}, {settings.epochs} epochs of {config.draws} draws of {train_rows} rows",
      function,
      (start, words, x, draw),
    )

  first, second = settings_of(config)
  tuning = Recipe(
    config.fine_tune_rate,
    cape.BIN,
    num_bins=config.num_bins[0],
    ordinary_epochs=config.ordinary_epochs_bin,
  )
  return [
    step("cross-entropy", first, Recipe(config.learning_rate)),
    step("CaPE-bin", second, tuning),
  ]
