"""Weights that oscillate between two levels: how many do, and what stops them.

Training with the straight-through estimator makes weights near a threshold flip back and forth.
Three remedies, of which the last two are baselines (Nagel et al., "Overcoming Oscillations in
Quantization-Aware Training", ICML 2022):

  confidence-guided annealing   only weights near a threshold are still trained (OFQ, section 4.3)
  iterative freezing            a weight that flips too often is fixed at its running mean level
  dampening                     a loss pulls latent weights to their levels

The first two wrap an optimizer. Whether they act is a flag in its state, `annealing` and
`freezing`: `optax.tree.set(opt_state, annealing=jnp.array(True))` begins without a compilation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from projects.ofq.ofq import QATLayer, block_layers, near_threshold, weight_codes

Array = jax.Array
PyTree = dict[str, Array]

# A weight oscillates when the running share of steps in which it turned back is above this.
OSCILLATION_THRESHOLD = 0.005
MOMENTUM = 0.01


class Oscillation(NamedTuple):
  """What is known of each weight's flips.

  Attributes:
    codes: int8, the level after the last step.
    direction: int8, the sign of the last change of level (0 before the first).
    frequency: float32, running mean of the flips that went back where the last one came from.
    mean_code: float32, running mean of the level.
  """

  codes: Array
  direction: Array
  frequency: Array
  mean_code: Array


def init_oscillation(codes: Array) -> Oscillation:
  """No flips yet. codes: integers of any shape."""
  codes = codes.astype(jnp.int8)
  zeros = jnp.zeros(codes.shape, jnp.float32)
  return Oscillation(codes, jnp.zeros_like(codes), zeros, codes.astype(jnp.float32))


def update_oscillation(
  state: Oscillation, codes: Array, momentum: float = MOMENTUM
) -> tuple[Oscillation, Array]:
  """One step later: f <- m osc + (1 - m) f, with osc = 1 where the level turned back.

  Returns:
    (the new state, bool: which weights turned back in this step).
  """
  codes = codes.astype(jnp.int8)
  change = jnp.sign(codes - state.codes)
  turned = (change != 0) & (change == -state.direction)
  average = lambda old, new: momentum * new + (1 - momentum) * old
  new = Oscillation(
    codes=codes,
    direction=jnp.where(change != 0, change, state.direction),
    frequency=average(state.frequency, turned.astype(jnp.float32)),
    mean_code=average(state.mean_code, codes.astype(jnp.float32)),
  )
  return new, turned


def oscillating_share(oscillation: dict[str, Oscillation]) -> Array:
  """Share of all weights that oscillate, float32 []."""
  counts = [jnp.sum(o.frequency > OSCILLATION_THRESHOLD) for o in oscillation.values()]
  return sum(counts) / sum(o.codes.size for o in oscillation.values())


class AnnealingState(NamedTuple):
  """annealing: bool []; inner: the wrapped optimizer's state."""

  annealing: Array
  inner: optax.OptState


def confidence_guided_annealing(
  inner: optax.GradientTransformation, graphdef: nnx.GraphDef, boundary_range: float
) -> optax.GradientTransformation:
  """While annealing, freezes every weight further than `boundary_range` from a threshold.

  The mask is that of the weights before the step. It takes the gradient, so that momentum forgets,
  and then the update, so that neither momentum nor weight decay moves a frozen weight by one bit.

  Args:
    inner: the optimizer.
    graphdef: of the quantized model whose parameters are trained. W_Q and W_K are never frozen: they
      are no quantized matrices, their product is (`QueryKeyProduct.boundary_range`).
    boundary_range: BR, in units of the distance between two levels.
  """

  def masked(tree, trained):
    # The model's structure finds the kernels in any tree like the parameters.
    module = nnx.merge(graphdef, tree)
    for path, layer in _kernels(module).items():
      set_kernel(layer, jnp.where(trained[path], layer.latent(), 0))
    return nnx.split(module)[1]

  def init(params):
    return AnnealingState(jnp.array(False), inner.init(params))

  def update(grads, state, params):
    trained = {
      path: ~state.annealing | not_confident(layer, boundary_range)
      for path, layer in _kernels(nnx.merge(graphdef, params)).items()
    }
    updates, new_inner = inner.update(masked(grads, trained), state.inner, params)
    return masked(updates, trained), AnnealingState(state.annealing, new_inner)

  return optax.GradientTransformation(init, update)


def not_confident(layer: QATLayer, boundary_range: float) -> Array:
  """bool, the kernel's shape: the weights that annealing still trains."""
  quantizer = layer.weight_quantizer
  return near_threshold(quantizer.position(layer.latent()), quantizer.bits, boundary_range)


class TrackingState(NamedTuple):
  """What `track_oscillations` keeps.

  Attributes:
    oscillation: of every few-bit weight matrix, by path.
    frozen: bool by path; kernels only.
    freezing: bool [], whether weights are frozen.
    count: int32 [], steps taken.
    inner: the wrapped optimizer's state.
  """

  oscillation: dict[str, Oscillation]
  frozen: dict[str, Array]
  freezing: Array
  count: Array
  inner: optax.OptState


def track_oscillations(
  inner: optax.GradientTransformation, graphdef: nnx.GraphDef, threshold: optax.Schedule
) -> optax.GradientTransformation:
  """Follows every few-bit weight's level; while freezing, fixes those that flip too often.

  A weight whose frequency exceeds the threshold stays for good at the level that is nearest to its
  running mean: its latent value is set to scale * level after every step.

  Args:
    inner: the optimizer.
    graphdef: of the quantized model.
    threshold: frequency by step; Nagel et al. lower it along a cosine. With StatsQ a frozen weight
      would move the scale, so only LSQ's are frozen.
  """

  def init(params):
    model = nnx.merge(graphdef, params)
    return TrackingState(
      oscillation={path: init_oscillation(codes) for path, codes in weight_codes(model).items()},
      frozen={p: jnp.zeros(layer.latent().shape, bool) for p, layer in _lsq_kernels(model).items()},
      freezing=jnp.array(False),
      count=jnp.zeros((), jnp.int32),
      inner=inner.init(params),
    )

  def update(grads, state, params):
    updates, new_inner = inner.update(grads, state.inner, params)
    model = nnx.merge(graphdef, optax.apply_updates(params, updates))
    for path, layer in _lsq_kernels(model).items():
      kernel, quantizer = layer.latent(), layer.weight_quantizer
      level = jnp.round(state.oscillation[path].mean_code)
      fixed = quantizer.values(level, quantizer.scale(kernel))
      set_kernel(layer, jnp.where(state.frozen[path], fixed, kernel))
    oscillation = {
      path: update_oscillation(state.oscillation[path], codes)[0]
      for path, codes in weight_codes(model).items()
    }
    limit = jnp.where(state.freezing, threshold(state.count), jnp.inf)
    frozen = {p: was | (oscillation[p].frequency > limit) for p, was in state.frozen.items()}
    for path, was in state.frozen.items():
      # The level of a frozen weight is the one at which it was frozen.
      kept = jnp.where(was, state.oscillation[path].mean_code, oscillation[path].mean_code)
      oscillation[path] = oscillation[path]._replace(mean_code=kept)
    updates = jax.tree.map(lambda new, old: new - old, nnx.split(model)[1], params)
    return updates, TrackingState(oscillation, frozen, state.freezing, state.count + 1, new_inner)

  return optax.GradientTransformation(init, update)


def set_kernel(layer: QATLayer, kernel: Array) -> None:
  """`layer.layer.kernel[...] = kernel`, which in a trace looks through the whole program so far."""
  layer.layer.kernel.set_value(kernel)


def dampening_loss(model: nnx.Module) -> Array:
  """sum of (Q(w) - clip(w, lowest level, highest level))^2 over the blocks' kernels.

  Q(w) and the levels are constants: the gradient only pulls latent weights to their levels.
  """
  total = jnp.zeros(())
  for layer in _kernels(model).values():
    w, quantizer = layer.latent(), layer.weight_quantizer
    n, scale = 2 ** (quantizer.bits - 1), jax.lax.stop_gradient(quantizer.scale(layer.latent()))
    rounded = jax.lax.stop_gradient(quantizer.values(quantizer.codes(w), scale))
    clipped = jnp.clip(w, quantizer.values(-n, scale), quantizer.values(n - 1, scale))
    total += jnp.sum((rounded - clipped) ** 2)
  return total


def _kernels(model: nnx.Module) -> dict[str, QATLayer]:
  return {p: layer for p, layer in block_layers(model).items() if isinstance(layer, QATLayer)}


def _lsq_kernels(model: nnx.Module) -> dict[str, QATLayer]:
  return {p: x for p, x in _kernels(model).items() if x.weight_quantizer.kind == "lsq"}
