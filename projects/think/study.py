"""Settings of ThinK measured on one set of prompts: ratios by score, partners, ablations."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.decoding import pruned_cache
from common.decoding.eviction import h2o_scores, snapkv_scores
from common.decoding.pruned_cache import Compression, pruned_slots
from common.models.decoder import Decoder
from projects.think import evaluation, think
from projects.think.evaluation import Prefill, Prompts

Array = jax.Array

SCORES = {
  "query-driven": think.query_driven_scores,
  "l2 norm of keys": think.l2_scores,
  "l1 norm of keys": think.l1_scores,
}
RANDOM = "random"  # Other channels for every row, head and block.


class Sizes(NamedTuple):
  """Tokens of a study: what stays whole, what is looked at, what eviction leaves, how it pools."""

  recent: int
  window: int
  capacity: int
  pool_kernel: int


class Kivi(NamedTuple):
  """Bits, group and residual of the quantized cache."""

  bits: int
  group: int
  residual: int


class Measured(NamedTuple):
  """Means over rows.

  Attributes:
    kl: KL(dense || compressed) of next tokens, nats.
    perplexity: of the tokens that were asked for.
    accuracy: share of them that is the most likely token.
    error: relative Frobenius error of the attention logits, of later queries; None if not measured.
  """

  kl: float
  perplexity: float
  accuracy: float
  error: float | None = None


class Study:
  """A model and prompts, read once."""

  def __init__(self, model: Decoder, prompts: Prompts, sizes: Sizes, key: Array):
    """Reads the prompts. key: of random channels."""
    self.model, self.prompts, self.sizes, self.key = model, prompts, sizes, key
    self.head_dim = model.config.head_dim
    self.dense = evaluation.prefill(model, prompts)
    snapkv = functools.partial(snapkv_scores, kernel=sizes.pool_kernel)
    self.evictions = {"SnapKV": snapkv, "H2O": h2o_scores}

  @staticmethod
  def _every(x: Array) -> Array:
    """A mask that keeps every channel."""
    return jnp.ones((*x.shape[:3], x.shape[4]), bool)

  def kept(self, ratio: float) -> int:
    """T = D - floor(ratio D)."""
    return self.head_dim - int(ratio * self.head_dim)

  def measure(self, prefill: Prefill, error: float | None = None) -> Measured:
    cost = evaluation.cost(self.model, prefill, self.prompts)
    return Measured(
      float(cost.kl.mean()), float(np.exp(cost.nll.mean())), float(cost.correct.mean()), error
    )

  def prune(
    self,
    prefill: Prefill,
    ratio: float,
    score: str = "query-driven",
    *,
    recent: int | None = None,
    window: int | None = None,
  ) -> tuple[Prefill, Array]:
    """Drops channels of the keys. Returns what is left and the mask."""
    recent = self.sizes.recent if recent is None else recent
    window = self.sizes.window if window is None else window
    kept = jnp.int32(self.kept(ratio))
    if score == RANDOM:
      blocks, rows, heads, _, head_dim = prefill.keys.shape
      random = jax.random.uniform(self.key, (blocks, rows, heads, head_dim))
      mask = think.kept_mask(random, kept)
    else:
      mask = evaluation.key_mask(prefill, SCORES[score], kept, jnp.int32(window))
    every = self._every(prefill.values)
    return evaluation.drop(prefill, mask, every, jnp.int32(recent)), mask

  def pruned(self, ratio: float, score: str = "query-driven", **options) -> Measured:
    """Key channels dropped, nothing else."""
    pruned, mask = self.prune(self.dense, ratio, score, **options)
    recent = jnp.int32(options.get("recent", self.sizes.recent))
    error = evaluation.logit_error(self.dense, mask, recent)
    return self.measure(pruned, float(error))

  def row_accuracy(self, ratio: float) -> np.ndarray:
    """Accuracy of each row with key channels dropped, [rows]."""
    pruned, _ = self.prune(self.dense, ratio)
    return evaluation.cost(self.model, pruned, self.prompts).correct

  def evicted(self, name: str, ratio: float = 0.0, capacity: int | None = None) -> Measured:
    """SnapKV or H2O, then ThinK on what they leave."""
    capacity = self.sizes.capacity if capacity is None else capacity
    left = evaluation.evict(self.dense, self.evictions[name], capacity, self.sizes.window)
    return self.measure(self.prune(left, ratio)[0])

  def quantized(self, kivi: Kivi, ratio: float = 0.0) -> Measured:
    """ThinK, then KIVI: whole groups of tokens, so that more than `recent` may stay as they are."""
    slots = self.prompts.length
    recent = slots - pruned_slots(slots, self.compression(ratio, **kivi._asdict()))
    pruned, _ = self.prune(self.dense, ratio, recent=recent)
    return self.measure(evaluation.quantize(pruned, kivi.bits, kivi.group, recent))

  def values_pruned(self, value_ratio: float, key_ratio: float = 0.0) -> Measured:
    """Channels of the values dropped, by their norms and the output projection's."""
    kernels = jnp.stack([b.attention.o_proj.kernel[...] for b in self.model.blocks])
    kept = jnp.int32(self.kept(value_ratio))
    values = evaluation.value_mask(self.dense, think.value_scores, kernels, kept)
    pruned, _ = self.prune(self.dense, key_ratio)
    every = self._every(self.dense.keys)
    return self.measure(evaluation.drop(pruned, every, values, jnp.int32(self.sizes.recent)))

  def compression(self, ratio: float, **changes) -> Compression:
    """The same setting as a real cache."""
    return Compression(
      think.query_driven_scores,
      ratio=ratio,
      recent=self.sizes.recent,
      window=self.sizes.window,
      **changes,
    )

  def num_bytes(self, compression: Compression) -> int:
    """Of the cache of a prompt, without room for new tokens."""
    graphdef, state = nnx.split(self.model)

    def cache(state, tokens):
      observed = pruned_cache.observe(nnx.merge(graphdef, state), tokens, jnp.ones_like(tokens))
      return pruned_cache.compress(observed, jnp.ones_like(tokens), compression, 0)

    tokens = jax.ShapeDtypeStruct((1, self.prompts.length), jnp.int32)
    return jax.eval_shape(cache, state, tokens).num_bytes


def equal_bytes_capacity(sizes: Sizes, head_dim: int, ratio: float) -> int:
  """The fewest tokens with all channels that take the bytes of `sizes.capacity` with pruned keys."""
  dropped = int(ratio * head_dim)
  return sizes.capacity - dropped * (sizes.capacity - sizes.recent) // (2 * head_dim)


def repeat_kv_heads(model: Decoder) -> Decoder:
  """The same function with a kv head for every query head: what a selection per head acts on."""
  old = model.config
  model = nnx.clone(model)
  model.config = dataclasses.replace(old, num_kv_heads=old.num_heads)

  def spread(x: Array) -> Array:
    heads = x.reshape(*x.shape[:-1], old.num_kv_heads, old.head_dim)
    return jnp.repeat(heads, old.num_heads // old.num_kv_heads, axis=-2).reshape(*x.shape[:-1], -1)

  for block in model.blocks:
    for linear in (block.attention.k_proj, block.attention.v_proj):
      linear.kernel = nnx.Param(spread(linear.kernel[...]))
      linear.out_features = old.num_heads * old.head_dim
      if linear.bias is not None:
        linear.bias = nnx.Param(spread(linear.bias[...]))
  return model
