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
from projects.llm_fp4.layers import FPQLinear, fold
from projects.llm_fp4.llm_fp4 import (
  FPQSettings,
  LinearSearch,
  float_formats,
  quantize,
  search_linear,
  search_table,
)

Array = jax.Array
Model = Decoder | Encoder | VisionTransformer
Searches = dict[str, LinearSearch]


class TableSearch(NamedTuple):
  """Of an embedding table: the format's place in `float_formats`, int32 [], and the bias, []."""

  format: Array
  bias: Array


class ModelSearch(NamedTuple):
  """What was found for a model.

  Attributes:
    linears: {path in the model, such as "blocks.0.mlp.up_proj" or "lm_head"}.
    embedding: of the table of tokens; None where it stays in full precision.
  """

  linears: Searches
  embedding: TableSearch | None


def search_block(block: Block, x: Array, context: AttentionContext, settings: FPQSettings):
  """Searches every linear of a full-precision block, {path in the block: LinearSearch}.

  Args:
    block: not modified.
    x: its inputs in full precision, [samples, seq, dim].
    context: of `quantize_blocks`; padding is left out.
    settings: what to search.

  Raises:
    UserError: weights or activations are not finite (the tensor is named), or the block has no
      linear left in full precision.
  """
  check_finite(block, x)
  if not linear_paths(block):
    raise UserError("the block has no linear layer in full precision: is it quantized already?")
  inputs = calibration.block_inputs(block, x, context)
  rows = np.flatnonzero(np.asarray(token_mask(x, context)))
  return {
    path: search_layer(get_module(block, path), inputs[path], rows, settings) for path in inputs
  }


def search_layer(linear: nnx.Linear, x: Array, rows: np.ndarray, settings: FPQSettings):
  """`search_linear` of a layer. x: inputs [..., in]; rows: which of its tokens count."""
  x = x.reshape(-1, x.shape[-1])
  chosen = rows
  if settings.tokens is not None and settings.tokens < len(rows):
    chosen = rows[np.linspace(0, len(rows) - 1, settings.tokens).astype(int)]
  return _search(linear.kernel[...], *_select(x, rows, chosen), settings)


def apply_search(module: nnx.Module, searches: Searches, settings: FPQSettings, *, packed=False):
  """Puts quantized layers in place of the full-precision ones at the searches' paths, in place.

  Args:
    module: a block or a model.
    searches: of its linears.
    settings: of the search.
    packed: as codes (`FloatLinear`), otherwise in floating point (`FPQLinear`).

  Raises:
    UserError: the searches are another model's.
  """
  for path, search in searches.items():
    try:
      linear = get_module(module, path)
      fits = linear.kernel.shape == (search.offsets.shape[0], search.weight_bias.shape[0])
    except (AttributeError, IndexError):
      fits = False
    if not fits:
      raise UserError(
        f"the search result of {path}, {search.offsets.shape[0]} x {search.weight_bias.shape[0]}, is "
        "not of this model; search again with the model that is quantized"
      )
  for path, search in searches.items():
    make = fold if packed else FPQLinear
    replace_module(module, path, make(get_module(module, path), search, settings))


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
  segment_ids: Array | None = None,
  token_types: Array | None = None,
) -> ModelSearch:
  """Searches the blocks, what is around them (head, pooler, classifier) and the embeddings.

  Args:
    model: a full-precision decoder, encoder or vision transformer; not modified.
    inputs: calibration samples, int32 tokens [samples, seq], or images.
    settings: what to search.
    embedding_bits: of the table of tokens; None leaves it.
    segment_ids: int32 [samples, seq], 0 for padding.
    token_types: of an encoder, int32 [samples, seq], 1 for the second text of a pair.

  Raises:
    UserError: the model is of another kind, or something is not finite.
  """
  if not isinstance(model, Decoder | Encoder | VisionTransformer):
    raise UserError(
      f"a {type(model).__name__} is not supported; expected a decoder, an encoder or a vision "
      "transformer"
    )
  check_finite(model, inputs)
  model = untie(model)
  linears = {}

  def block(index, block, x, context):
    found = search_block(block, x, context, settings)
    linears.update({f"blocks.{index}.{path}": search for path, search in found.items()})
    return block

  ids = {"segment_ids": segment_ids, "token_types": token_types}
  calibration.quantize_model(model, inputs, block, stream="full_precision", **ids)
  for path, (x, rows) in outer_inputs(model, inputs, **ids).items():
    linears[path] = search_layer(get_module(model, path), x, rows, settings)
  embedding = None
  if embedding_bits is not None and hasattr(model, "embed_tokens"):
    table = model.embed_tokens.embedding[...]
    embedding = TableSearch(*_search_table(table, embedding_bits, settings)[:2])
  return ModelSearch(linears, embedding)


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
  apply_search(model, search.linears, settings, packed=packed)
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
_quantize = functools.partial(jax.jit, static_argnums=1)(quantize)
_search_table = functools.partial(jax.jit, static_argnums=(1, 2))(search_table)
