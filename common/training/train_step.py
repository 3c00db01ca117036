"""The training state and the one jitted, pure step that advances it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common.errors import UserError

PyTree = Any
Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple]
StepFn = Callable[..., tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a checkpoint must hold to continue bit for bit, but the data iterator.

  Attributes:
    step: int32 [], steps taken.
    params: the trained parameters; floating-point ones are float32 masters.
    opt_state: the optimizer's.
    key: typed PRNG key []; constant: the key of a step is `fold_in(key, step)`.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  key: jax.Array


def init_train_state(
  params: PyTree, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """Returns the state at step 0.

  Args:
    params: a pytree of floating-point arrays. They are copied (as float32), because the train
      step donates its state and would otherwise delete the caller's arrays.
    optimizer: an optax transformation.
    key: a typed PRNG key, `jax.random.key(seed)`.
  """
  params = jax.tree.map(lambda x: jnp.array(x, dtype=jnp.float32, copy=True), params)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=jnp.copy(key),
  )
  sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)  # None under `jax.jit`.
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return state
  # Scalars go where the parameters are: on every device of every process.
  replicate = jax.jit(
    lambda x: x,
    out_shardings=jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()),
  )
  return jax.tree.map(
    lambda x: x if isinstance(x.sharding, jax.sharding.NamedSharding) else replicate(x), state
  )


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  accumulate_steps: int = 1,
  compute_dtype: jax.typing.DTypeLike | None = None,
  state_shardings: TrainState | None = None,
) -> StepFn:
  """Builds `step_fn(state, batch, *constants) -> (state, metrics)`, jitted, its state donated.

  The gradient is that of  sum over the batch of loss / sum over the batch of weight,  whatever
  the number of microbatches and however unequal their weights.

  Args:
    loss_fn: `loss_fn(params, batch, key, *constants)` returns `(loss_sum, weight)` or
      `(loss_sum, weight, sums)`: the loss summed over the batch, what it is to be divided by
      (unpadded tokens, examples), and a dict of further scalar sums to report, divided likewise.
    optimizer: an optax transformation. Its learning rate is reported where its state holds one
      (`optax.inject_hyperparams`).
    accumulate_steps: microbatches that each batch is cut into, one in memory at a time. It must
      divide the batch size.
    compute_dtype: the forward and backward pass see parameters of this dtype (bfloat16); the
      masters, the accumulated gradient and the optimizer stay float32. None computes in float32.
    state_shardings: where the new state lies: `jax.tree.map(lambda x: x.sharding, state)` keeps
      parameters that are sharded over a mesh as they are. None lets the compiler choose, which
      is right on one device.

  Returns:
    `step_fn`. `batch` is a pytree of arrays [batch, ...]. `constants` are pytrees that loss_fn
    needs but does not train (a teacher, the frozen weights under an adapter): passed in, because
    arrays captured by loss_fn would be compiled into the program. `metrics` are float32 device
    arrays []: loss, weight (the batch's sum), grad_norm (before clipping), learning_rate, and
    the means of loss_fn's `sums`.
  """

  def objective(params, batch, key, constants):
    loss, weight, *sums = loss_fn(params, batch, key, *constants)
    return loss, {"loss": loss, "weight": weight, **(sums[0] if sums else {})}

  def gradient(params, batch, key, constants):
    """Returns the float32 gradient of the loss sum, and the sums."""
    grads, sums = jax.grad(objective, has_aux=True)(params, batch, key, constants)
    return _to_float32(grads), _to_float32(sums)

  def accumulated_gradient(params, batch, key, constants):
    if accumulate_steps == 1:
      return gradient(params, batch, key, constants)
    microbatches = jax.tree.map(lambda x: _split(x, accumulate_steps), batch)
    keys = jax.random.split(key, accumulate_steps)

    def add(total, microbatch):
      return jax.tree.map(jnp.add, total, gradient(params, *microbatch, constants)), None

    first = jax.tree.map(lambda x: x[0], (microbatches, keys))
    shapes = jax.eval_shape(gradient, params, *first, constants)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (microbatches, keys))[0]

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, None))
  def step_fn(state, batch, *constants):
    params = state.params
    if compute_dtype is not None:
      params = jax.tree.map(lambda x: x.astype(compute_dtype), params)
    key = jax.random.fold_in(state.key, state.step)
    grads, sums = accumulated_gradient(params, batch, key, constants)

    weight = sums.pop("weight")
    divisor = jnp.where(weight > 0, weight, 1.0)  # A batch of nothing but padding: no gradient.
    grads = jax.tree.map(lambda x: x / divisor, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {name: x / divisor for name, x in sums.items()}
    metrics |= {"weight": weight, "grad_norm": optax.tree.norm(grads)}
    metrics |= _learning_rate(opt_state)
    new_state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )
    return new_state, metrics

  return step_fn


def _split(x: jax.Array, parts: int) -> jax.Array:
  """[batch, ...] -> [parts, batch / parts, ...].

  Microbatch i takes rows i, i + parts, ...: so each has rows of every device's shard, and
  cutting a batch that is sharded over its rows moves nothing between devices.
  """
  if x.shape[0] % parts:
    raise UserError(f"accumulate_steps={parts} does not divide the batch of {x.shape[0]} rows")
  return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _to_float32(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _learning_rate(opt_state: PyTree) -> Metrics:
  found = optax.tree.get_all_with_path(
    opt_state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array)
  )
  return {"learning_rate": found[0][1]} if found else {}
