"""FPQ of whole models: decoders, encoders and vision transformers, one block at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import UserError
from common.models.decoder import AttentionContext, Block, Decoder
from common.models.encoder import Encoder
from common.models.surgery import get_module, linear_paths, record_inputs, replace_module
from common.models.vit import VisionTransformer
from common.quantization import calibration
from common.quantization.calibration import check_finite, token_mask
from projects.llm_fp4.gradients import layer_gradients, loss_gradients
from projects.llm_fp4.layers import FPQAttention, FPQLinear, fold
from projects.llm_fp4.llm_fp4 import (
  FPQSettings,
  LinearSearch,
  float_formats,
  quantize,
  search_linear,
  search_table,
)
from projects.llm_fp4.products import (
  PATH,
  AttentionSearch,
  chosen_queries,
  fill_up,
  real_operands,
  search_operands,
)

Array = jax.Array
Model = calibration.Model
Searches = dict[str, LinearSearch | AttentionSearch]


class TableSearch(NamedTuple):
  """Of an embedding table: the format's place in `float_formats`, int32 [], and the bias, []."""

  format: Array
  bias: Array


class ModelSearch(NamedTuple):
  """What was found for a model.

  Attributes:
    linears: {path in the model, such as "blocks.0.mlp.up_proj" or "lm_head"}.
    attentions: {path, such as "blocks.0.attention.attend"}; empty without products of attention.
    embedding: of the table of tokens; None where it stays in full precision.
  """

  linears: dict[str, LinearSearch]
  attentions: dict[str, AttentionSearch]
  embedding: TableSearch | None


def search_block(
  block: Block,
  x: Array,
  context: AttentionContext,
  settings: FPQSettings,
  gradient: Array | None = None,
) -> Searches:
  """Searches a full-precision block: {path in the block: of every linear, and of the attention}.

  Args:
    block: not modified.
    x: its inputs in full precision, [samples, seq, dim].
    context: of `quantize_blocks`; padding is left out.
    settings: what to search.
    gradient: of the loss by the block's output, in its shape; needed for the metric "hessian".

  Raises:
    UserError: weights or activations are not finite (the tensor is named), the block has no
      linear left in full precision, or the gradient is missing.
  """
  if settings.metric == "hessian" and gradient is None:
    raise UserError("metric='hessian' needs the loss's gradient by the block's output")
  check_finite(block, x)
  if not linear_paths(block):
    raise UserError("the block has no linear layer in full precision: is it quantized already?")
  inputs = calibration.block_inputs(block, x, context)
  real, gradients = np.asarray(token_mask(x, context))[..., 0], {}
  rows = np.flatnonzero(real)
  if settings.metric == "hessian":
    paths = (*inputs, *(PATH,) * settings.attention_products)
    gradients = layer_gradients(block, x, context, gradient, paths)
  found = {
    path: search_layer(get_module(block, path), inputs[path], rows, settings, gradients.get(path))
    for path in inputs
  }
  if settings.attention_products:
    of_output = gradients.get(PATH)
    counted = (
      np.ones_like(real) if of_output is None else np.asarray(jnp.any(of_output != 0, axis=(1, 3)))
    )
    queries = chosen_queries(real, counted, settings.tokens)
    operands = real_operands(block, x, context)
    found[PATH] = _search_operands(operands, queries, settings.per_tensor, of_output)
  return found


def search_layer(
  linear: nnx.Linear,
  x: Array,
  rows: np.ndarray,
  settings: FPQSettings,
  gradients: Array | None = None,
) -> LinearSearch:
  """`search_linear` of a layer.

  Args:
    linear: in full precision.
    x: its inputs, [..., in].
    rows: which of its tokens are no padding.
    settings: what to search.
    gradients: of the loss by its outputs, [..., out]. Tokens without a part in the loss are looked at
      only where there are too few others.
  """
  x, groups = x.reshape(-1, x.shape[-1]), [rows]
  if gradients is not None:
    gradients = gradients.reshape(len(x), -1)
    counted = np.asarray(jnp.any(gradients != 0, axis=-1))[rows]
    groups = [rows[counted], rows[~counted]]
  ends = lambda length, count: np.linspace(0, length - 1, count)
  chosen = fill_up(groups, min(settings.tokens or len(rows), len(rows)), ends)
  selected, x_max = _select(x, rows, chosen)
  gradients = None if gradients is None else gradients[chosen]
  return _search(linear.kernel[...], selected, x_max, settings, gradients)


def apply_search(module: nnx.Module, searches: Searches, settings: FPQSettings, *, packed=False):
  """Puts quantized layers in place of the full-precision ones at the searches' paths, in place.

  Args:
    module: a block or a model.
    searches: of its linears and attentions.
    settings: of the search.
    packed: linears as codes (`FloatLinear`), otherwise in floating point (`FPQLinear`); attention
      always rounds in floating point (`FPQAttention`).

  Raises:
    UserError: the searches are another model's.
  """
  for path, search in searches.items():
    size = "" if isinstance(search, AttentionSearch) else "{} x {}, ".format(*_shape(search))
    try:
      layer = get_module(module, path)
      fits = not size or layer.kernel.shape == _shape(search)
    except (AttributeError, IndexError):
      fits = False
    if not fits:
      raise UserError(
        f"the search result of {path}, {size}is not of this model; search again with the model that "
        "is quantized"
      )
  make = fold if packed else FPQLinear
  for path, search in searches.items():
    if isinstance(search, AttentionSearch):
      replace_module(module, path, FPQAttention(search, settings))
    else:
      replace_module(module, path, make(get_module(module, path), search, settings))


def _shape(search: LinearSearch) -> tuple[int, int]:
  return search.offsets.shape[0], search.weight_bias.shape[0]


def quantize_block(
  block: Block, x: Array, context: AttentionContext, settings: FPQSettings, *, packed: bool = False
) -> Block:
  """A quantized copy of a block, for `quantize_blocks(..., stream="full_precision")`.

  `lambda index, *arguments: quantize_block(*arguments, settings)` streams a checkpoint: memory holds
  one block.
  """
  searches = search_block(block, x, context, settings)
  block = nnx.clone(block)
  apply_search(block, searches, settings, packed=packed)
  return block


def search_model(
  model: Model,
  inputs: Array,
  settings: FPQSettings,
  *,
  embedding_bits: int | None,
  labels: Array | None = None,
  segment_ids: Array | None = None,
  token_types: Array | None = None,
) -> ModelSearch:
  """Searches the blocks, what is around them (head, pooler, classifier) and the embeddings.

  Args:
    model: a full-precision decoder, encoder or vision transformer; not modified.
    inputs: calibration samples, int32 tokens [samples, seq], or images.
    settings: what to search.
    embedding_bits: of the table of tokens; None leaves it.
    labels: classes of the samples, int32 [samples]; needed for the metric "hessian", whose loss is
      the model's cross-entropy.
    segment_ids: int32 [samples, seq], 0 for padding.
    token_types: of an encoder, int32 [samples, seq], 1 for the second text of a pair.

  Raises:
    UserError: the model is of another kind, something is not finite, or the settings ask for what it
      does not have.
  """
  if not isinstance(model, Decoder | Encoder | VisionTransformer):
    raise UserError(
      f"a {type(model).__name__} is not supported; expected a decoder, an encoder or a vision "
      "transformer"
    )
  if settings.attention_products and isinstance(model, Decoder):
    raise UserError(
      "attention_products is for encoders and vision transformers; a decoder's stay in full precision"
    )
  check_finite(model, inputs)
  model = untie(model)
  ids = {"segment_ids": segment_ids, "token_types": token_types}
  found, gradients = {}, {}
  if settings.metric == "hessian":
    gradients = loss_gradients(model, inputs, labels, **ids)

  def block(index, block, x, context):
    name = f"blocks.{index}"
    searches = search_block(block, x, context, settings, gradients.get(name))
    found.update({f"{name}.{path}": search for path, search in searches.items()})
    return block

  calibration.quantize_model(model, inputs, block, stream="full_precision", **ids)
  for path, (x, rows) in outer_inputs(model, inputs, **ids).items():
    linear = get_module(model, path)
    found[path] = search_layer(linear, x, rows, settings, gradients.get(path))
  of_kind = lambda kind: {path: s for path, s in found.items() if isinstance(s, kind)}
  embedding = None
  if embedding_bits is not None and hasattr(model, "embed_tokens"):
    table = model.embed_tokens.embedding[...]
    embedding = TableSearch(*_search_table(table, embedding_bits, settings.per_tensor)[:2])
  return ModelSearch(of_kind(LinearSearch), of_kind(AttentionSearch), embedding)


def apply_to_model(
  model: Model,
  search: ModelSearch,
  settings: FPQSettings,
  *,
  embedding_bits: int | None,
  packed: bool = False,
) -> Model:
  """A quantized copy of a full-precision model; see `apply_search`."""
  model = untie(model)
  apply_search(model, search.linears | search.attentions, settings, packed=packed)
  if search.embedding is not None and embedding_bits is not None:
    formats = float_formats(embedding_bits, settings.format_search)
    table = model.embed_tokens.embedding
    table[...] = _quantize(table[...], formats, *search.embedding).astype(table.dtype)
  return model


def fpq(model: Model, inputs: Array, settings: FPQSettings, *, embedding_bits, **ids):
  """Search and application together: the quantized copy of a model; arguments of `search_model`."""
  found = search_model(model, inputs, settings, embedding_bits=embedding_bits, **ids)
  return apply_to_model(model, found, settings, embedding_bits=embedding_bits)


def untie(model: Model) -> Model:
  """A copy whose head is a linear of its own: it and the embeddings are quantized differently."""
  model = nnx.clone(model)
  if isinstance(model, Decoder) and model.lm_head is None:
    kernel = model.head_kernel
    head = nnx.eval_shape(lambda: nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0)))
    head.kernel = nnx.Param(jnp.array(kernel))
    model.lm_head = nnx.data(head)
  return model


def outer_inputs(
  model: Model,
  inputs: Array,
  segment_ids: Array | None = None,
  token_types: Array | None = None,
) -> dict[str, tuple[Array, np.ndarray]]:
  """Inputs of the linears around the blocks: {path: ([..., in], which of its rows are no padding)}.

  Args: as of `search_model`.
  """
  paths = tuple(path for path in linear_paths(model) if not path.startswith("blocks."))
  ids = {"segment_ids": segment_ids, "token_types": token_types}
  options = {name: i for name, i in ids.items() if i is not None}
  found = {}
  for path, x in _record(*nnx.split(model), inputs, options, paths).items() if paths else ():
    # What has no axis of tokens (a pooler's input) has no padding.
    mask = np.ones(x.shape[:-1]) if segment_ids is None or x.ndim == 2 else np.asarray(segment_ids)
    found[path] = x, np.flatnonzero(mask)
  return found


@functools.partial(jax.jit, static_argnums=(0, 4))
def _record(graphdef, state, inputs, options, paths):
  model = nnx.merge(graphdef, state)
  return record_inputs(model, list(paths), lambda model: model(inputs, **options))[1]


@jax.jit
def _select(x, rows, chosen):
  return x[chosen], jnp.abs(x[rows]).max(axis=0)


_search = functools.partial(jax.jit, static_argnums=3)(search_linear)
_search_operands = functools.partial(jax.jit, static_argnums=2)(search_operands)
_quantize = functools.partial(jax.jit, static_argnums=1)(quantize)
_search_table = functools.partial(jax.jit, static_argnums=(1, 2))(search_table)
