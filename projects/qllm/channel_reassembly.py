"""Channel reassembly (QLLM, section 4.1): outlier channels split, similar channels merged.

Liu et al., "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models" (ICLR
2024, arXiv 2310.08041). Activations x [tokens, M] meet weights W [M, out] (the transpose of the
paper's). With m_j = max over tokens |x_j| and a threshold theta,

  disassembly   T_j = max(1, ceil(m_j / theta)):  x_j becomes T_j copies of x_j / T_j, and row j of W is
                repeated T_j times. The product is the same, and nothing exceeds theta.
  assembly      a group of similar channels becomes its mean, and its rows of W their sum. As many
                channels go as disassembly added, A(theta) = sum_j T_j - M, so that the width is M again.

Both are the same linear map of channels, applied to the activations (with a factor per channel) and
to the rows of W: `Reassembly`. Which channels are merged is a bipartite matching: channels at even
places are sources, those at odd places targets, every source picks its nearest target, and the A
nearest sources are merged. Split channels are left out.

Pure functions of arrays with static shapes: whatever the data, A(theta) is at most `max_extra`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from common.quantization import rtn
from common.quantization.activations import ActivationFormat, fake_quantize
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reassembly import (
  Reassembly,
  reassemble_activations,
  reassemble_weights,
)
from common.quantization.shift_and_scale import LARGEST_STEP, MIN_CANDIDATES, Outputs

Array = jax.Array

# What becomes of channels: split only (wider), merge only (narrower), or both (the same width).
# "pruning" drops the least important channels where "both" merges.
Kind = Literal["disassembly", "assembly", "pruning", "both"]
Score = Literal["code", "exact"]


class ThresholdSearch(NamedTuple):
  """The best threshold of a site.

  Attributes:
    threshold: theta*, float32 []; max_j m_j, which changes nothing, if no other is better.
    loss: mean squared error of the next modules' quantized output with it, [].
    loss_unchanged: without reassembly, [].
  """

  threshold: Array
  loss: Array
  loss_unchanged: Array


def num_splits(largest: Array, threshold: Array) -> Array:
  """T_j = max(1, ceil(m_j / theta)), int32 [M]. largest: m, [M]."""
  return jnp.maximum(1, jnp.ceil(largest / threshold)).astype(jnp.int32)


def num_extra(largest: Array, threshold: Array) -> Array:
  """A(theta) = sum_j T_j - M, int32 []."""
  return num_splits(largest, threshold).sum() - largest.size


def pair_scores(x: Array, w: Array, score: Score) -> Array:
  """What merging an even with an odd channel costs, float32 [ceil(M / 2), floor(M / 2)].

  With D_ij = || x_i - x_j || over tokens: "exact" is the squared error of the output that the paper
  derives, || W_i - W_j ||^2 D_ij^2 / 4; "code" is the official code's approximation of it,
  (sum_o W_io + sum_o W_jo)^2 D_ij^2.

  Args:
    x: [tokens, M].
    w: [M, out].
    score: which.
  """
  x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  distance = _squared_distances(x.T[0::2], x.T[1::2])
  if score == "code":
    total = w.sum(axis=1)
    return (total[0::2, None] + total[None, 1::2]) ** 2 * distance
  return _squared_distances(w[0::2], w[1::2]) * distance / 4


def match_channels(
  scores: Array, mergeable: Array, count: Array, max_merges: int
) -> tuple[Array, Array]:
  """The `count` cheapest merges: places of sources and targets, int32 [max_merges] each.

  Equal scores are taken in the order of the channels. What is beyond `count` is M in both.

  Args:
    scores: of `pair_scores`.
    mergeable: which of the M channels may be merged, bool [M].
    count: how many merges, int32 []; at most the number of mergeable sources.
    max_merges: the largest count.
  """
  allowed = mergeable[0::2, None] & mergeable[None, 1::2]
  scores = jnp.where(allowed, scores, jnp.inf)
  nearest = jnp.argmin(scores, axis=1)
  cheapest = jnp.argsort(scores.min(axis=1), stable=True)[:max_merges]
  needed = jnp.arange(max_merges) < count
  places = lambda place: jnp.where(needed, place, mergeable.size).astype(jnp.int32)
  return places(2 * cheapest), places(2 * nearest[cheapest] + 1)


def from_merges(splits: Array, source: Array, target: Array, width: int) -> Reassembly:
  """The reassembly that splits and merges.

  Args:
    splits: T, int32 [M].
    source, target: see `Reassembly`; channels with T = 1.
    width: of the result.
  """
  channels = splits.size
  copies = splits.at[source].set(0, mode="drop")
  members = jnp.ones(channels).at[target].add(1.0, mode="drop")
  copy_of = jnp.repeat(jnp.arange(channels), copies, total_repeat_length=width)
  return Reassembly(
    source,
    target,
    copy_of.astype(jnp.int32),
    (1 / (splits * members))[copy_of],
    (jnp.arange(width) < copies.sum()).astype(jnp.float32),
  )


def reassemble_first_merging(scores: Array, splits: Array, max_extra: int) -> Reassembly:
  """Assembles the old channels, then disassembles: the order of the threshold search.

  Args:
    scores: of the old channels, `pair_scores`.
    splits: T, int32 [M], with at most `max_extra` extra channels.
    max_extra: see the module.
  """
  extra = splits.sum() - splits.size
  source, target = match_channels(scores, splits == 1, extra, max_extra)
  return from_merges(splits, source, target, splits.size)


def reassemble(
  x: Array,
  w: Array,
  splits: Array,
  max_extra: int,
  *,
  kind: Kind = "both",
  score: Score = "code",
) -> Reassembly:
  """Disassembles, then assembles the expanded channels: the order in which the result is used.

  Args:
    x: activations, [tokens, M]; w: weights, [M, out].
    splits: T, int32 [M], with at most `max_extra` extra channels.
    max_extra: see the module; the number of merges of "assembly".
    kind: what to do; the widths are M + max_extra of "disassembly", M - max_extra of "assembly", and
      M otherwise.
    score: of pairs.
  """
  channels = splits.size
  none = jnp.zeros(0, jnp.int32)
  if kind == "disassembly":
    return from_merges(splits, none, none, channels + max_extra)
  if kind == "assembly":
    splits = jnp.ones_like(splits)
    count = jnp.int32(max_extra)
    scores = pair_scores(x, w, score)
    merges = match_channels(scores, splits == 1, count, max_extra)
    return from_merges(splits, *merges, channels - max_extra)
  extra = splits.sum() - channels
  if kind == "pruning":
    # The squared change of the output if the channel alone were dropped.
    importance = jnp.sum(x.astype(jnp.float32) ** 2, axis=0) * jnp.sum(w**2, axis=1)
    least = jnp.argsort(jnp.where(splits == 1, importance, jnp.inf), stable=True)[:max_extra]
    source = jnp.where(jnp.arange(max_extra) < extra, least, channels).astype(jnp.int32)
    return from_merges(splits, source, jnp.full_like(source, channels), channels)
  # The channel at every expanded place; beyond sum_j T_j there is none.
  places = jnp.arange(channels + max_extra)
  channel = jnp.repeat(jnp.arange(channels), splits, total_repeat_length=places.size)
  mergeable = (splits[channel] == 1) & (places < splits.sum())
  scores = pair_scores(x[:, channel], w[channel], score)
  at_places = match_channels(scores, mergeable, extra, max_extra)
  # An unsplit channel has one place, so that merges can be named by channels.
  named = lambda place: channel.at[place].get(mode="fill", fill_value=channels).astype(jnp.int32)
  return from_merges(splits, *map(named, at_places), channels)


def smallest_threshold(largest: Array, max_extra: int) -> Array:
  """The last threshold of the search's grid with A(theta) <= max_extra, float32 []."""
  top, step, count = _grid(largest)
  fits = lambda i: (i <= count) & (num_extra(largest, _threshold(top, step, i)) <= max_extra)
  first = jax.lax.while_loop(fits, lambda i: i + 1, jnp.int32(1))
  return _threshold(top, step, first - 1)


def search_threshold(
  outputs: Outputs,
  x: Array,
  kernels: dict[str, Array],
  mask: Array,
  largest: Array,
  weights: IntegerFormat,
  activations: ActivationFormat,
  *,
  max_extra: int,
  score: Score = "code",
) -> ThresholdSearch:
  """Adaptive reassembly: the threshold with the least error of the quantized output.

    theta* = argmin  mean || f(Q(x'), Q(W')) - f(x, W) ||^2       (section 4.1.3)

  The grid goes from max_j m_j down to min_j m_j in max(100, max m / 0.5) steps and ends where more
  than `max_extra` channels would be needed. Of thresholds with as many extra channels the first,
  the largest, is tried. Channels are assembled before they are disassembled, so that scores are
  computed once.

  Args:
    outputs: f.
    x: [samples, seq, M].
    kernels: W of the linears that read x, each [M, out].
    mask: 1 for tokens and 0 for padding, [samples, seq, 1].
    largest: m over all calibration tokens, [M]; x may be a part of them.
    weights, activations: the final formats.
    max_extra: the largest A(theta).
    score: of pairs.
  """
  target = outputs(x, kernels)
  tokens = (x * mask).reshape(-1, x.shape[-1])
  scores = pair_scores(tokens, jnp.concatenate(list(kernels.values()), axis=1), score)

  def loss_of(threshold):
    reassembly = reassemble_first_merging(scores, num_splits(largest, threshold), max_extra)
    return quantization_error(outputs, target, x, kernels, mask, reassembly, weights, activations)

  top, step, count = _grid(largest)

  def fits(state):
    i = state[0]
    return (i <= count) & (num_extra(largest, _threshold(top, step, i)) <= max_extra)

  def try_threshold(state):
    i, last_extra, best = state
    threshold = _threshold(top, step, i)
    extra = num_extra(largest, threshold)
    loss = jax.lax.cond(extra != last_extra, loss_of, lambda _: jnp.float32(jnp.inf), threshold)
    # A NaN compares false.
    best = jax.tree.map(
      lambda new, old: jnp.where(loss < best[0], new, old), (loss, threshold), best
    )
    return i + 1, extra, best

  unchanged = loss_of(top)
  start = jnp.int32(1), jnp.int32(0), (unchanged, top)
  _, _, (loss, threshold) = jax.lax.while_loop(fits, try_threshold, start)
  return ThresholdSearch(threshold, loss, unchanged)


def quantization_error(
  outputs: Outputs,
  target: Array,
  x: Array,
  kernels: dict[str, Array],
  mask: Array,
  reassembly: Reassembly,
  weights: IntegerFormat,
  activations: ActivationFormat,
) -> Array:
  """Mean squared error of the quantized output, float32 []; see `search_threshold`."""
  rounded = fake_quantize(reassemble_activations(x, reassembly), activations)
  codes = {
    p: rtn.fake_quantize(reassemble_weights(w, reassembly), weights) for p, w in kernels.items()
  }
  return mean_squared_error(outputs(rounded, codes), target, mask)


def mean_squared_error(output: Array, target: Array, mask: Array) -> Array:
  """Over features and tokens that count, float32 []. output: [..., features]; mask: [..., 1]."""
  error = (output.astype(jnp.float32) - target.astype(jnp.float32)) ** 2
  return jnp.sum(error * mask) / (mask.sum() * output.shape[-1])


def _squared_distances(a: Array, b: Array) -> Array:
  """|| a_i - b_j ||^2 of all rows, [a, b]."""
  product = jnp.matmul(a, b.T, precision="highest")
  squares = lambda v: jnp.sum(v**2, axis=1)
  return jnp.maximum(squares(a)[:, None] + squares(b)[None] - 2 * product, 0)


def _grid(largest: Array) -> tuple[Array, Array, Array]:
  """First threshold, step and number of steps of the search."""
  top = largest.max()
  count = jnp.maximum(MIN_CANDIDATES, jnp.floor(top / LARGEST_STEP).astype(jnp.int32))
  return top, (top - largest.min()) / count, count


def _threshold(top: Array, step: Array, i: Array) -> Array:
  # Channels that are all zero let the grid end at zero.
  return jnp.maximum(top - i * step, jnp.finfo(jnp.float32).tiny)
