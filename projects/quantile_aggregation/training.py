"""Small networks and the loop that trains them: amsgrad, mini-batches, early stopping, one program.

`minimise` has no host synchronisation, so that many trainings (settings of a random search, folds)
run side by side under `vmap`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

STEPS_PER_ROUND = 100  # Between two looks at the validation loss.


def init_mlp(key: jax.Array, sizes: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
  """Layers (kernel [in, out], bias [out]), float32, uniform on +-1 / sqrt(in)."""
  shapes = list(zip(sizes, sizes[1:]))
  counts = [(fan_in + 1) * fan_out for fan_in, fan_out in shapes]
  # One draw: every call of the generator is inlined, and takes long to compile.
  draws = jax.random.uniform(key, (sum(counts),), minval=-1.0)
  layers, start = [], 0
  for (fan_in, fan_out), count in zip(shapes, counts):
    layer = draws[start : start + count].reshape(fan_in + 1, fan_out) * fan_in**-0.5
    layers.append((layer[:-1], layer[-1]))
    start += count
  return layers


def mlp(params, x: jax.Array, *, dropout=0.0, key: jax.Array | None = None) -> jax.Array:
  """ELU between layers, then dropout (a traced rate) when a key is given. [n, in] -> [n, out].

  The hidden layers have one width.
  """
  *hidden, (kernel, bias) = params
  if key is not None and hidden:
    kept, share = _kept(key, dropout, (len(hidden), len(x), hidden[0][1].shape[0]))
  for i, (hidden_kernel, hidden_bias) in enumerate(hidden):
    x = jax.nn.elu(x @ hidden_kernel + hidden_bias)
    if key is not None:
      x = jnp.where(kept[i], x / share, 0)
  return x @ kernel + bias


def _kept(key: jax.Array, dropout, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Which units [..., width] dropout keeps, and their share: 1 - dropout rounded up to 1/256.

  A byte per unit: random numbers would take a third of a step's time.
  """
  *lead, width = shape
  words = jax.random.bits(key, (*lead, -(-width // 4)), jnp.uint32)
  bytes_ = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*lead, -1)[..., :width]
  share = jnp.ceil(256 * (1 - jnp.float32(dropout))) / 256
  return bytes_ < 256 * share, share


class Trained(NamedTuple):
  """The result of a training.

  Attributes:
    params: after the last step.
    best_params: at the smallest validation loss.
    best_loss: that loss.
    best_rounds: how many rounds had been trained then, int32.
  """

  params: Any
  best_params: Any
  best_loss: jax.Array
  best_rounds: jax.Array


def minimise(
  loss: Callable[[Any, Any, jax.Array], jax.Array],
  validate: Callable[[Any], jax.Array],
  params: Any,
  data: Any,
  mask: jax.Array,
  key: jax.Array,
  *,
  learning_rate: jax.Array,
  weight_decay: jax.Array,
  batch_size: int,
  rounds: jax.Array,
  patience: jax.Array,
) -> Trained:
  """Trains until the validation loss has not improved for `patience` rounds, or for `rounds`.

  A round is 100 steps over rows in one random order, gone through again when it is used up. A loss
  that is not a number never counts as an improvement.

  Args:
    loss: (params, batch, key) -> scalar.
    validate: params -> scalar.
    params: where to begin.
    data: a tree of arrays [n, ...].
    mask: [n] bool, the rows to train on; at least one.
    key: of batches and dropout.
    learning_rate, weight_decay: scalars; the decay is added to the gradient, as in Adam with L2.
    batch_size: rows in a step.
    rounds, patience: int32 scalars.
  """
  optimizer = optax.chain(
    optax.add_decayed_weights(weight_decay), optax.amsgrad(learning_rate=learning_rate)
  )

  def step(carry, inputs):
    params, state = carry
    rows, key = inputs
    gradient = jax.grad(loss)(params, jax.tree.map(lambda a: a[rows], data), key)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  def one_round(carry):
    params, state, done, best = carry
    keys = jax.random.split(jax.random.fold_in(key, done), 1 + STEPS_PER_ROUND)
    draws = jax.random.uniform(keys[0], mask.shape)
    order = jnp.argsort(jnp.where(mask, draws, jnp.inf))  # The rows of the mask come first.
    places = jnp.arange(STEPS_PER_ROUND * batch_size) % mask.sum()
    rows = order[places].reshape(STEPS_PER_ROUND, batch_size)
    (params, state), _ = jax.lax.scan(step, (params, state), (rows, keys[1:]))
    done += 1
    value = validate(params)
    keep = lambda new, old: jnp.where(value < best.best_loss, new, old)
    improved = Trained(params, params, value, done)
    best = jax.tree.map(keep, improved, best)._replace(params=params)
    return params, state, done, best

  def unfinished(carry):
    _, _, done, best = carry
    return (done < rounds) & (done - best.best_rounds < patience)

  zero = jnp.zeros((), jnp.int32)
  best = Trained(params, params, jnp.asarray(jnp.inf), zero)
  carry = (params, optimizer.init(params), zero, best)
  return jax.lax.while_loop(unfinished, one_round, carry)[3]
