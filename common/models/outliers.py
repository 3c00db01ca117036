"""Activation outliers without changing the function: a testbed for quantization on small models.

Large language models have a few channels whose activations are tens of times larger than the rest;
small ones do not. Raising a norm's gain on some channels and lowering the columns of the linears
that read them by the same factor creates such channels and leaves every output as it was.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from common.models.decoder import Decoder
from common.models.surgery import get_module
from common.quantization.equivalent import fold_scale, scaling_groups


def inject_outliers(
  model: Decoder, key: jax.Array, *, fraction: float = 0.02, gain: float = 30.0
) -> Decoder:
  """Returns a copy of the model with outlier channels after every norm inside its blocks.

  Args:
    model: a pre-norm decoder; not modified.
    key: picks the channels, a fresh set for every norm.
    fraction: of the channels to raise (at least one).
    gain: factor on the norm's gain; the reading weights are divided by it.

  Returns:
    A model with the same outputs up to rounding.

  Raises:
    UserError: the blocks have no norm that only linears read.
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
      # `fold_scale` divides the gain by the scale and multiplies the weights.
      fold_scale(block, group, jnp.ones(dim).at[chosen].set(1.0 / gain))
  return model
