"""Where a block's channels are reassembled, and the search there."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from common.models.decoder import AttentionContext, Block, DecoderConfig
from common.models.surgery import get_module
from common.quantization.activations import ActivationFormat
from common.quantization.calibration import block_inputs, largest_inputs, token_mask
from common.quantization.equivalent import ScalingGroup, scaling_groups
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reassembly import Reassembly, reassemble_activations, reassemble_weights
from common.quantization.shift_and_scale import group_outputs
from projects.qllm.channel_reassembly import (
  ThresholdSearch,
  mean_squared_error,
  num_extra,
  num_splits,
  reassemble,
  search_threshold,
  smallest_threshold,
)
from projects.qllm.settings import Settings

Array = jax.Array


class SiteReassembly(NamedTuple):
  """What was found at a site.

  Attributes:
    reassembly: of its channels.
    threshold: theta, [].
    extra: channels that disassembly adds, int32 [].
    error: mean squared change of the next modules' output by the reassembly alone, without any
      rounding, relative to the output's mean square, [].
    search: the threshold's; None of a threshold that was not searched.
  """

  reassembly: Reassembly
  threshold: Array
  extra: Array
  error: Array
  search: ThresholdSearch | None


def sites(config: DecoderConfig) -> list[ScalingGroup]:
  """Where a block's channels are reassembled: before q, k, v; before gate, up; before down."""
  return [group for group in scaling_groups(config) if group.linears != ("attention.o_proj",)]


def find_reassemblies(
  block: Block, x: Array, context: AttentionContext, config: DecoderConfig, settings: Settings
) -> dict[str, SiteReassembly]:
  """Threshold and reassembly of every site, {path before it: what was found}; see `student_block`."""
  if settings.reassembly == "none":
    return {}
  paths, found = [site.linears[0] for site in sites(config)], {}
  all_largest = largest_inputs(block, x, context, paths)
  samples = min(settings.search_samples, len(x))
  inputs = block_inputs(block, x, context, paths, samples)
  cut = lambda leaf: leaf[:samples] if leaf.ndim and len(leaf) == len(x) else leaf
  few = jax.tree.map(cut, context)
  for site in sites(config):
    largest = all_largest[site.linears[0]]
    module = nnx.split(get_module(block, site.linears[0].split(".")[0]))
    static = site, settings.max_extra(largest.size), settings.score
    arguments = inputs[site.linears[0]], few, largest
    search = None
    if settings.threshold == "adaptive" and settings.reassembly != "assembly":
      formats = settings.weights, settings.activations
      search = search_site(*module, *arguments, *static, *formats)
      threshold = search.threshold
    else:
      # Assembly alone splits nothing.
      least = 0.0 if isinstance(settings.threshold, str) else settings.threshold
      threshold = jnp.maximum(_smallest_threshold(largest, static[1]), least)
    result = reassemble_site(*module, *arguments, threshold, *static, settings.reassembly)
    found[site.previous] = SiteReassembly(result[0], threshold, *result[1:], search)
  return found


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8, 9))
def search_site(
  graphdef,
  state,
  x: Array,
  context: AttentionContext,
  largest: Array,
  site: ScalingGroup,
  max_extra: int,
  score: str,
  weights: IntegerFormat,
  activations: ActivationFormat,
) -> ThresholdSearch:
  """`search_threshold` at one site; `graphdef` and `state` are of its attention or MLP."""
  outputs, kernels = group_outputs(graphdef, state, site, context)
  return search_threshold(
    outputs,
    x.astype(jnp.float32),
    kernels,
    token_mask(x, context),
    largest,
    weights,
    activations,
    max_extra=max_extra,
    score=score,
  )


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9))
def reassemble_site(
  graphdef,
  state,
  x: Array,
  context: AttentionContext,
  largest: Array,
  threshold: Array,
  site: ScalingGroup,
  max_extra: int,
  score: str,
  kind: str,
) -> tuple[Reassembly, Array, Array]:
  """The reassembly, the number of extra channels, and the relative error; see `SiteReassembly`."""
  outputs, kernels = group_outputs(graphdef, state, site, context)
  mask = token_mask(x, context)
  x = x.astype(jnp.float32)
  tokens, w = (x * mask).reshape(-1, x.shape[-1]), jnp.concatenate(list(kernels.values()), axis=1)
  splits = num_splits(largest, threshold)
  reassembly = reassemble(tokens, w, splits, max_extra, kind=kind, score=score)
  target = outputs(x, kernels)
  changed = outputs(
    reassemble_activations(x, reassembly),
    {path: reassemble_weights(w, reassembly) for path, w in kernels.items()},
  )
  error = mean_squared_error(changed, target, mask)
  extra = jnp.int32(0) if kind == "assembly" else num_extra(largest, threshold)
  return reassembly, extra, error / mean_squared_error(target, jnp.zeros_like(target), mask)


_smallest_threshold = jax.jit(smallest_threshold, static_argnums=1)
