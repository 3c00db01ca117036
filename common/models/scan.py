"""A decoder with its blocks stacked to [layers, ...] and run by `lax.scan`.

Compile time does not grow with depth, and under rematerialisation training keeps only the input of
each block. The arithmetic is that of the blocks one after the other, in another container:

    scanned, params = stack(model)                       # and back: unstack(scanned, params)
    logits, _ = scanned(params, tokens)                  # pure; fits make_train_step
    scanned, params = abstract_stack(config, jnp.bfloat16)  # shapes only, for any size
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import Decoder, DecoderConfig, KVCache, make_context
from common.models.sharding import constrain

Array = jax.Array
PyTree = Any

_DIFFERENT = "only blocks that are all alike can be stacked; run them one after the other"


@dataclasses.dataclass(frozen=True)
class ScannedDecoder:
  """The program of a decoder without its arrays; hashable.

  Attributes:
    config: the decoder's.
    outer: graph definition of everything but the blocks.
    block: graph definition of one block; all are alike.
    remat: recompute a block in the backward pass instead of keeping what is inside it.
  """

  config: DecoderConfig
  outer: nnx.GraphDef
  block: nnx.GraphDef
  remat: bool = True

  def __call__(
    self,
    params: PyTree,
    tokens: Array,
    *,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    cache: KVCache | None = None,
  ) -> tuple[Array, KVCache | None]:
    """As `Decoder.__call__`.

    Args:
      params: as `stack` returns them.
      tokens, positions, segment_ids: int32 [batch, seq], as a Decoder takes them.
      cache: of `empty_cache`: keys and values are one array for all layers.
    """
    outer = nnx.merge(self.outer, {k: v for k, v in params.items() if k != "blocks"})
    if positions is None:
      start = 0 if cache is None else cache.length
      positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    ids = None if cache is None else dataclasses.replace(cache, keys=[], values=[])
    context, ids = make_context(self.config, positions, segment_ids, ids)
    x = constrain(outer.embed(tokens, positions), "batch", None, "residual")

    if cache is None:

      def body(x, block):
        return nnx.merge(self.block, block)(x, context)[0], None

      # prevent_cse is for code outside of loops, where XLA could undo the recomputation.
      body = jax.checkpoint(body, prevent_cse=False) if self.remat else body
      x, _ = jax.lax.scan(body, x, params["blocks"])
      return outer.head(x), None

    def cached_body(carry, layer):
      x, keys, values = carry
      block, i = layer
      kv = tuple(jax.lax.dynamic_index_in_dim(c, i, keepdims=False) for c in (keys, values))
      x, kv = nnx.merge(self.block, block)(x, context, kv)
      # The cache is carried, not scanned over, and only the new slots are written: so it stays in
      # its donated buffer instead of being copied for every token.
      new = (
        jax.lax.dynamic_slice_in_dim(c, context.offset, tokens.shape[1], axis=2)[None] for c in kv
      )
      at = (i, 0, 0, context.offset, 0)
      keys, values = (jax.lax.dynamic_update_slice(c, n, at) for c, n in zip((keys, values), new))
      return (x, keys, values), None

    layers = (params["blocks"], jnp.arange(self.config.num_layers))
    (x, keys, values), _ = jax.lax.scan(cached_body, (x, cache.keys, cache.values), layers)
    length = cache.length + tokens.shape[1]
    return outer.head(x), dataclasses.replace(ids, keys=keys, values=values, length=length)

  def empty_cache(self, batch: int, max_length: int, dtype=jnp.float32) -> KVCache:
    """An empty cache whose keys and values are [layers, batch, kv_heads, max_length, head_dim]."""
    one_layer = dataclasses.replace(self.config, num_layers=1)
    cache = KVCache.empty(one_layer, batch, max_length, dtype)
    grow = lambda x: jnp.zeros((self.config.num_layers, *x.shape), x.dtype)
    return dataclasses.replace(cache, keys=grow(cache.keys[0]), values=grow(cache.values[0]))


def stack(model: Decoder, *, remat: bool = True) -> tuple[ScannedDecoder, PyTree]:
  """Returns the program and the parameters, a dict named as the model's with "blocks" stacked.

  Raises:
    ValueError: the blocks are not all alike.
  """
  blocks = [nnx.split(block) for block in model.blocks]
  if any(graph != blocks[0][0] for graph, _ in blocks):
    raise ValueError(_DIFFERENT)
  states = [nnx.to_pure_dict(state) for _, state in blocks]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  outer, params = _split_outer(model)
  scanned = ScannedDecoder(model.config, outer, blocks[0][0], remat)
  return scanned, params | {"blocks": stacked}


def unstack(scanned: ScannedDecoder, params: PyTree) -> Decoder:
  """The inverse of `stack`: a Decoder with its blocks in a list."""
  model = nnx.merge(scanned.outer, {k: v for k, v in params.items() if k != "blocks"})
  layer = lambda i: jax.tree.map(lambda x: x[i], params["blocks"])
  layers = range(scanned.config.num_layers)
  model.blocks = nnx.List([nnx.merge(scanned.block, layer(i)) for i in layers])
  return model


def abstract_stack(
  config: DecoderConfig,
  dtype: jax.typing.DTypeLike = jnp.float32,
  *,
  edit_block: Callable[[nnx.Module], nnx.Module] = lambda block: block,
  remat: bool = True,
) -> tuple[ScannedDecoder, PyTree]:
  """`stack` of a model that is never made: its parameters are jax.ShapeDtypeStructs.

  Args:
    config: of any size.
    dtype: of the floating-point parameters.
    edit_block: what becomes of each block, such as packing its linears.
    remat: see `ScannedDecoder`.

  Raises:
    ValueError: the blocks are not all alike.
  """
  if 0 < len(config.full_attention_layers) < config.num_layers:
    raise ValueError(_DIFFERENT)

  def make() -> Decoder:
    model = Decoder(dataclasses.replace(config, num_layers=1), rngs=nnx.Rngs(0))
    state = jax.tree.map(lambda x: x.astype(dtype), nnx.state(model))
    nnx.update(model, state)
    model.blocks = nnx.List([edit_block(model.blocks[0])])
    return model

  model = nnx.eval_shape(make)
  model.config = config
  block, state = nnx.split(model.blocks[0])
  grow = lambda x: jax.ShapeDtypeStruct((config.num_layers, *x.shape), x.dtype)
  outer, params = _split_outer(model)
  blocks = jax.tree.map(grow, nnx.to_pure_dict(state))
  return ScannedDecoder(config, outer, block, remat), params | {"blocks": blocks}


def _split_outer(model: Decoder) -> tuple[nnx.GraphDef, PyTree]:
  blocks, model.blocks = model.blocks, nnx.List([])
  try:
    graphdef, state = nnx.split(model)
  finally:
    model.blocks = blocks
  return graphdef, nnx.to_pure_dict(state)
