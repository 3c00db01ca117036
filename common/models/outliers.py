"""Activation outliers without changing the function: a testbed for quantization on small models.

Large language models have a few channels whose activations are tens of times larger than the rest;
small ones do not. Raising a norm's gain on some channels and lowering the columns of the linears
that read them by the same factor creates such channels and leaves every output as it was. Shifting
the norm's bias there too, which the linears' biases make good, makes them lie to one side of zero.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import Decoder
from common.models.surgery import get_module
from common.quantization.equivalent import fold_scale, fold_shift, scaling_groups


def inject_outliers(
  model: Decoder,
  key: jax.Array,
  *,
  fraction: float = 0.02,
  gain: float = 30.0,
  shift: float = 0.0,
) -> Decoder:
  """Returns a copy of the model with outlier channels after every norm inside its blocks.

  Args:
    model: a pre-norm decoder; not modified.
    key: picks the channels, a fresh set for every norm.
    fraction: of the channels to raise (at least one).
    gain: factor on the norm's gain; the reading weights are divided by it.
    shift: how far the chosen channels are moved off zero, to either side at random, in standard
      deviations of a usual channel (the norm's root-mean-square gain). Needs LayerNorm.

  Returns:
    A model with the same outputs up to rounding.

  Raises:
    UserError: the blocks have no norm that only linears read, or none that can be shifted.
  """
  if model.config.norm_placement != "pre":
    raise UserError(
      f"outliers cannot be injected into a model with norm_placement="
      f"{model.config.norm_placement!r}: its norms feed the residual stream as well as the linears; "
      "supported: norm_placement='pre'"
    )
  model = nnx.clone(model)
  for block in model.blocks:
    for group in scaling_groups(model.config):
      if not isinstance(get_module(block, group.previous), (nnx.RMSNorm, nnx.LayerNorm)):
        continue
      key, use = jax.random.split(key)
      dim = model.config.hidden_size
      chosen = jax.random.permutation(use, dim)[: max(1, round(fraction * dim))]
      usual = jnp.sqrt(jnp.mean(get_module(block, group.previous).scale[...] ** 2))
      # `fold_scale` divides the gain by the scale and multiplies the weights.
      fold_scale(block, group, jnp.ones(dim).at[chosen].set(1.0 / gain))
      if shift:
        sides = jax.random.rademacher(jax.random.fold_in(use, 1), chosen.shape, jnp.float32)
        fold_shift(block, group, jnp.zeros(dim).at[chosen].set(-shift * usual * sides))
  return model


def inject_down_outliers(
  model: Decoder, key: jax.Array, *, fraction: float = 0.02, gain: float = 30.0
) -> Decoder:
  """A copy of the model with outlier channels before every down_proj, with the same outputs.

  Columns of up_proj are multiplied by `gain`, and rows of down_proj divided by it.

  Args:
    model: not modified.
    key: picks the channels of every block.
    fraction: of the channels (at least one).
    gain: of the chosen activations.

  Raises:
    UserError: nothing before down_proj can take the gain.
  """
  model = nnx.clone(model)
  group = scaling_groups(model.config)[-1]
  if group.previous != "mlp.up_proj":
    raise UserError(
      f"outliers cannot be injected before down_proj behind {model.config.activation}; supported: "
      "gated MLPs, and relu"
    )
  width = model.config.intermediate_size
  for block, use in zip(model.blocks, jax.random.split(key, len(model.blocks))):
    chosen = jax.random.permutation(use, width)[: max(1, round(fraction * width))]
    # `fold_scale` divides what comes before down_proj by the scale and multiplies its rows.
    fold_scale(block, group, jnp.ones(width).at[chosen].set(1.0 / gain))
  return model
