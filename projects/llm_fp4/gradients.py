"""Gradients of a classifier's loss by the outputs of its layers: the weights of the metric "hessian".

The diagonal of the Fisher information of a layer's output O takes the place of the Hessian (Appendix A,
equation 24): the mean of (O_hat - O)^2 (dL/dO)^2. Two steps, so that memory holds one block's: first the
gradients by the blocks' outputs, then, from a block's, those by its layers' outputs.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block, Decoder
from common.models.surgery import linear_paths, output_gradients
from common.quantization import calibration
from common.quantization.calibration import Model

Array = jax.Array

# Heads whose `logits` are classes of a whole text or image.
CLASSIFIERS = ("sequence", "classification", "distilled")


def loss_gradients(
  model: Model,
  inputs: Array,
  labels: Array | None,
  segment_ids: Array | None = None,
  token_types: Array | None = None,
) -> dict[str, Array]:
  """Gradients of a classifier's cross-entropy by the outputs of its blocks and outer linears.

  Args: as of `search_model`.

  Returns:
    {path: [samples, ...]}; each sample's is of its own loss.

  Raises:
    UserError: the model is no classifier, or there are not as many labels as samples.
  """
  if isinstance(model, Decoder) or model.config.head not in CLASSIFIERS:
    raise UserError(
      "metric='hessian' needs a loss, which classifiers of texts or images have; this model is none: "
      "use metric='l2'"
    )
  if labels is None or len(labels) != len(inputs):
    given = "none" if labels is None else len(labels)
    raise UserError(
      f"metric='hessian' needs a label of each calibration sample: {given} of {len(inputs)}"
    )
  outer = [path for path in linear_paths(model) if not path.startswith("blocks.")]
  paths = (*(f"blocks.{i}" for i in range(len(model.blocks))), *outer)
  ids = {"segment_ids": segment_ids, "token_types": token_types}
  options = {name: i for name, i in ids.items() if i is not None}
  return _loss_gradients(*nnx.split(model), inputs, jnp.asarray(labels), options, paths)


def layer_gradients(
  block: Block, x: Array, context: AttentionContext, gradient: Array, paths: tuple[str, ...]
) -> dict[str, Array]:
  """Gradients by the outputs of a block's layers, {path: [samples, ...]}.

  Args:
    block: in full precision.
    x, context: its inputs, see `quantize_blocks`.
    gradient: by the block's output, [samples, seq, dim].
    paths: of the layers.
  """
  return _layer_gradients(*nnx.split(block), x, context, gradient, paths)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _loss_gradients(graphdef, state, inputs, labels, options, paths):
  def of_rows(rows):
    inputs, (labels, options) = rows

    def loss(model):
      logits = model(inputs, **options).logits
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    return output_gradients(nnx.merge(graphdef, state), paths, loss)

  return _joined(jax.lax.map(of_rows, calibration.passes(inputs, (labels, options))))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _layer_gradients(graphdef, state, x, context, gradient, paths):
  def of_rows(rows):
    x, (context, gradient) = rows
    product = lambda block: jnp.vdot(block(x, context)[0], gradient)
    return output_gradients(nnx.merge(graphdef, state), paths, product)

  return _joined(jax.lax.map(of_rows, calibration.passes(x, (context, gradient))))


def _joined(passes):
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), passes)
