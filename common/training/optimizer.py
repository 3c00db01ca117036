"""AdamW as language models are trained: warmup, cosine decay, clipping, masked weight decay."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from common.errors import UserError

PyTree = Any


def make_optimizer(
  *,
  learning_rate: float,
  num_steps: int,
  warmup_steps: int = 0,
  final_fraction: float = 0.0,
  weight_decay: float = 0.0,
  no_decay: Sequence[str] = (),
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter, 2019) with a warmup-cosine schedule.

    g <- g * min(1, clip_norm / ||g||)
    p <- p - lr(t) * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)

  Args:
    learning_rate: the peak, reached after `warmup_steps` steps of linear growth from 0.
    num_steps: steps of the whole run, warmup included.
    warmup_steps: 0 starts at the peak.
    final_fraction: the cosine ends at `final_fraction * learning_rate`.
    weight_decay: decoupled, for the parameters that `decay_mask` selects.
    no_decay: see `decay_mask`.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global norm of the gradient; None does not clip.

  Returns:
    An optax transformation whose state holds the current `learning_rate`.

  Raises:
    UserError: the warmup is as long as the run.
  """
  if not 0 <= warmup_steps < num_steps:
    raise UserError(f"warmup_steps must be in [0, num_steps={num_steps}), got {warmup_steps}")
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup_steps else learning_rate,
    peak_value=learning_rate,
    warmup_steps=warmup_steps,
    decay_steps=num_steps,
    end_value=final_fraction * learning_rate,
  )
  return optax.chain(
    optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(params, no_decay)),
    optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=schedule),
  )


def decay_mask(params: PyTree, no_decay: Sequence[str] = ()) -> PyTree:
  """Selects the parameters that weight decay shrinks: matrices, not biases or norm scales.

  Args:
    params: a pytree of arrays.
    no_decay: parts of parameter names to leave out too, such as "embed". A name is the path
      joined by dots: "layers.0.attention.q.kernel". Stacked (scanned) norms and biases have two
      axes and must be named here.

  Returns:
    A pytree of bools like `params`.
  """

  def decays(path, param) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return param.ndim >= 2 and not any(part in name for part in no_decay)

  return jax.tree.map_with_path(decays, params)
