"""Belief propagation and training at the config's size, compiled for a TPU slice."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from common.compilation.step import Step, independent
from projects.llp_bp import belief_propagation, losses, training
from projects.llp_bp.graph import Bags, Edges

# Of the largest set of the paper, once its text columns are indicators.
COVARIATES = 128


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """At the largest bags, the seeds cut over the slice."""
  size = max(config.bag_sizes)
  bags = config.max_rows // size
  n = bags * size
  seeds = lambda dtype, *shape: jax.ShapeDtypeStruct((config.seeds, *shape), dtype)
  name = f"{config.seeds} seeds of {n:,} rows in bags of {size}"
  padded = 1 << (size - 1).bit_length()
  groups = Bags(
    (seeds(np.int32, bags, padded),),
    (seeds(np.float32, bags),),
    (seeds(np.float32, bags),),
    seeds(np.int32, n),
  )
  count = 2 * n * max(config.neighbours)
  pairs = (seeds(np.float32, bags, padded, padded),) if config.bag_factor == "quadratic" else ()
  edges = Edges(*[seeds(np.int32, count)] * 3, seeds(np.float32, count), pairs)
  infer = functools.partial(
    belief_propagation.infer,
    lambda_s=max(config.lambda_s),
    lambda_bag=max(config.lambda_bag),
    bag_factor=config.bag_factor,
    damping=config.damping,
    max_iterations=config.max_iterations,
    tolerance=config.tolerance,
  )
  network = {"encoder": config.encoder, "hidden": tuple(config.hidden)}
  start = jax.eval_shape(
    lambda: training.initialise(jax.random.key(0), in_features=COVARIATES, **network)
  )
  rows = max(config.batch_rows, size)
  batches = -(-n // rows)
  width = 1 << max(5, (rows // size - 1).bit_length())
  candidates = len(config.learning_rate) * len(config.weight_decay)
  held_out = int(n * config.validation_share)
  arguments = (
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.seeds)),
    jax.tree.map(lambda x: seeds(x.dtype, *x.shape), start),
    seeds(np.float32, n, COVARIATES),
    seeds(np.float32, n),
    training.Batches(
      *[seeds(np.int32, batches, rows)] * 2,
      *[seeds(np.float32, batches, width)] * 2,
      seeds(np.int32, config.steps),
    ),
    seeds(np.float32, held_out, COVARIATES),
    seeds(np.float32, held_out),
    training.Settings(*[seeds(np.float32, candidates)] * 3),
  )
  train = functools.partial(
    training.train,
    loss=losses.pseudo_label_loss,
    score=training.auc,
    validations=config.validations,
    **network,
  )
  each = lambda function: lambda *arrays: jax.lax.map(lambda row: function(*row), arrays)
  return [
    independent(f"belief propagation, {name}", each(infer), (edges, groups), devices),
    independent(f"training, {name}", each(train), arguments, devices),
  ]
