"""Block reconstruction: train what a quantizer learns until a block's output is the original's.

    min  || f(X; W) - f_q(X_q; theta) ||^2

X is a block's input in the original model and X_q its input after the blocks that are quantized
already (`calibration.quantize_blocks(..., stream="both")`). BRECQ (Li et al. 2021) trains a block
at a time; QDrop (Wei et al. 2022) also puts elements of X back into X_q at random; a single linear
is a block too (AdaRound, ZQ-Local). What is learned is the `Learned` variables of the student.

Samples may lie in the host's memory (`ReconstructionSettings.sample_memory`): every step then brings
its own batch to the device, which holds the block, the optimizer's state and one batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.errors import UserError

Array = jax.Array

# Where calibration samples lie while others are computed with: a kind of JAX's memories.
SampleMemory = Literal["device", "pinned_host"]


class Learned(nnx.Variable):
  """A variable that reconstruction trains: rounding parameters, steps, clipping factors."""


@dataclasses.dataclass(frozen=True)
class ReconstructionSettings:
  """How long, and on what.

  Attributes:
    num_steps: optimizer steps.
    batch_size: samples in each, drawn without replacement within an epoch.
    drop_probability: share of the elements of X_q that are replaced by X's in each step (QDrop:
      0.5). 0 is BRECQ's protocol.
    keep_best: keep the parameters with the least error on all samples, of those at the start and at
      the end of the run; otherwise those at the end.
    sample_memory: where the samples lie meanwhile, see `check_sample_memory`. The results are the
      same.

  Raises:
    UserError: there is no such memory.
  """

  num_steps: int
  batch_size: int
  drop_probability: float = 0.0
  keep_best: bool = True
  sample_memory: SampleMemory = "device"

  def __post_init__(self):
    check_sample_memory(self.sample_memory)


class ReconstructionLog(NamedTuple):
  """How a reconstruction went.

  Attributes:
    losses: of every step's batch, float32 [num_steps].
    before, after: mean squared error of the output on all samples, float32 []; `after` is that of
      the parameters that were kept.
  """

  losses: Array
  before: Array
  after: Array


# (student, its output, target, progress in [0, 1)) -> loss
Objective = Callable[[nnx.Module, Array, Array, Array], Array]
# (module, x, context) -> output
Run = Callable[[nnx.Module, Array, object], Array]
# learning rate -> optimizer
OptimizerOfRate = Callable[[Array], optax.GradientTransformation]


def squared_error(student: nnx.Module, output: Array, target: Array, progress: Array) -> Array:
  """The mean squared error of the output, float32 []."""
  del student, progress
  return jnp.mean((output.astype(jnp.float32) - target.astype(jnp.float32)) ** 2)


def run_transformer_block(block: nnx.Module, x: Array, context) -> Array:
  """Output of a decoder's, encoder's or vision transformer's block."""
  return block(x, context)[0]


def check_sample_memory(kind: SampleMemory) -> None:
  """Checks that samples can lie in "device", the accelerator's memory, or "pinned_host", the host's.

  Raises:
    UserError: there is no such memory, or the backend does not have it.
  """
  if kind not in get_args(SampleMemory):
    supported = ", ".join(get_args(SampleMemory))
    raise UserError(f"sample_memory={kind!r} is not supported; supported: {supported}")
  if kind == "device":
    return  # Every backend has it; to look would start one.
  device = jax.local_devices()[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if kind not in kinds:
    raise UserError(
      f"sample_memory={kind!r}: the backend {device.platform} has {', '.join(kinds)} memory only; "
      "use sample_memory=device"
    )


def in_host_memory(samples: Array) -> Array:
  """The same, there."""
  if jax.typeof(samples).memory_space == jax.memory.Space.Host:
    return samples
  return jax.device_put(samples, jax.memory.Space.Host)


def on_device(samples: Array) -> Array:
  """The same in the device's memory, where every computation takes its operands from."""
  if jax.typeof(samples).memory_space != jax.memory.Space.Host:
    return samples
  return jax.device_put(samples, jax.memory.Space.Device)


def samples_at(samples: Array, rows: Array) -> Array:
  """samples[rows] in the device's memory; one by one if the samples lie in the host's.

  Args:
    samples: [samples, ...].
    rows: int32 [batch].
  """
  if jax.typeof(samples).memory_space != jax.memory.Space.Host:
    return samples[rows]

  # A slice is a copy from memory to memory; a gather would have to be computed where the samples are.
  fetch = lambda row: on_device(jax.lax.dynamic_index_in_dim(samples, row, keepdims=False))
  return jax.lax.map(fetch, rows)


def reconstruct(
  student: nnx.Module,
  inputs: Array,
  targets: Array,
  context,
  key: Array,
  settings: ReconstructionSettings,
  optimizer: optax.GradientTransformation | OptimizerOfRate,
  *,
  learning_rate: float | None = None,
  full_precision_inputs: Array | None = None,
  objective: Objective = squared_error,
  run: Run = run_transformer_block,
) -> tuple[nnx.Module, ReconstructionLog]:
  """Trains a student's `Learned` variables on one block; compiled once per shape.

  Args:
    student: the block with its quantizers; not modified.
    inputs: X_q, [samples, ...]; may be in the host's memory already, as may be `targets` and
      `full_precision_inputs`.
    targets: the original block's outputs on X, [samples, ...].
    context: passed to `run`; that of one row, or with a leading axis of samples in every array that
      differs between them.
    key: of the batches and of QDrop.
    settings: steps and batches.
    optimizer: of the `Learned` variables. Pass the same object (and `objective` and `run`) for
      every block: a new one is compiled anew.
    learning_rate: if given, `optimizer` is a function of it, and all rates share a compilation.
    full_precision_inputs: X; needed with `drop_probability`.
    objective: what is minimised.
    run: how the student is called.

  Returns:
    The trained student, and how it went.

  Raises:
    ValueError: QDrop without X, or nothing to learn.
  """
  if settings.drop_probability and full_precision_inputs is None:
    raise ValueError("drop_probability needs full_precision_inputs")
  graphdef, learned, rest = nnx.split(student, Learned, ...)
  if not jax.tree.leaves(learned):
    raise ValueError("the student has no Learned variable")
  if settings.sample_memory == "pinned_host":
    inputs, targets, full_precision_inputs = jax.tree.map(
      in_host_memory, (inputs, targets, full_precision_inputs)
    )
  originals = inputs if full_precision_inputs is None else full_precision_inputs
  static = (graphdef, settings, optimizer, objective, run)
  samples = inputs, originals, targets
  learned, log = _reconstruct(*static, learning_rate, learned, rest, *samples, context, key)
  return nnx.merge(graphdef, learned, rest), log


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _reconstruct(
  graphdef,
  settings,
  optimizer,
  objective,
  run,
  learning_rate,
  learned,
  rest,
  inputs,
  originals,
  targets,
  context,
  key,
):
  samples = inputs.shape[0]
  batch_size = min(settings.batch_size, samples)
  batches_per_epoch = samples // batch_size
  batch_key, drop_key = jax.random.split(key)
  if learning_rate is not None:
    optimizer = optimizer(learning_rate)

  def rows_of(step):
    """Indices of the step's samples: a part of its epoch's permutation."""
    epoch, part = step // batches_per_epoch, step % batches_per_epoch
    order = jax.random.permutation(jax.random.fold_in(batch_key, epoch), samples)
    return jax.lax.dynamic_slice_in_dim(order, part * batch_size, batch_size)

  def take(rows):
    per_sample = lambda leaf: jnp.ndim(leaf) > 0 and leaf.shape[0] == samples and samples > 1
    return jax.tree.map(lambda leaf: leaf[rows] if per_sample(leaf) else leaf, context)

  def step_fn(carry, step):
    learned, state = carry
    rows = rows_of(step)
    x = samples_at(inputs, rows)
    if settings.drop_probability:
      dropped = jax.random.bernoulli(
        jax.random.fold_in(drop_key, step), settings.drop_probability, x.shape
      )
      x = jnp.where(dropped, samples_at(originals, rows), x)

    target = samples_at(targets, rows)

    def loss_fn(learned):
      student = nnx.merge(graphdef, learned, rest)
      output = run(student, x, take(rows))
      return objective(student, output, target, step / settings.num_steps)

    loss, gradient = jax.value_and_grad(loss_fn)(learned)
    updates, state = optimizer.update(gradient, state, learned)
    return (optax.apply_updates(learned, updates), state), loss

  def error(learned):
    """On all samples, a batch at a time (those that fill no batch are left out)."""
    parts = jnp.arange(batches_per_epoch * batch_size).reshape(-1, batch_size)

    def of_batch(rows):
      x, target = samples_at(inputs, rows), samples_at(targets, rows)
      output = run(nnx.merge(graphdef, learned, rest), x, take(rows))
      return squared_error(None, output, target, 0.0)

    return jnp.mean(jax.lax.map(of_batch, parts))

  state = optimizer.init(learned)
  (trained, _), losses = jax.lax.scan(step_fn, (learned, state), jnp.arange(settings.num_steps))
  # In a loop, so that the forward pass is compiled once for both.
  choose = lambda ended: jax.tree.map(lambda new, old: jnp.where(ended, new, old), trained, learned)
  before, after = jax.lax.map(lambda ended: error(choose(ended)), jnp.array([False, True]))
  if settings.keep_best:
    # Also false where training ended in NaN.
    better = after <= before
    trained, after = choose(better), jnp.where(better, after, before)
  return trained, ReconstructionLog(losses, before, after)
